"""Weights that torchao quantized, int8 and int4: the same laws, against a plain model of the matrices they stand for.

`MODELS` are loud float32 models of a kind of weights; `twin` is the plain model. Every projection and the head are
quantized: int4 takes matrices whose outputs are a multiple of 16 and inputs one of the group, int8 has the rest.
"""

import copy
import functools
import gc
import json
import os
import random
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerRow, PerTensor
from transformers import TorchAoConfig

from mambaformer import ExpertVector, MambaFormerForCausalLM
from mambaformer.weights_quantized_mambaformer import dequantized, inner_tensors, is_quantized, packed_weight, portable
from mambaformer.weights_version_mambaformer import weights_stamp
from oracle import assert_same_logits, expected
from patterns import CACHE_VARIANTS, tiny_config
from sequences import cut, feed, feed_row, padded_turn, ragged_turns, random_rows
from tiny_models import random_expert, random_model

INT8, INT4 = Int8WeightOnlyConfig(), PrototypeInt4WeightOnlyConfig(group_size=32)
KINDS = ["int8", "int4"]
TOLERANCE = 1e-5  # float32
SHAPES = [(64, 32), (16, 64), (32, 32), (80, 64), (112, 96), (256, 32), (304, 128)]  # full blocks, and a rest
QUANTIZED_BY_NAME = {r"re:.*\.(in|out|q|k|v|o|gate|up|down)_proj\.weight": INT4, r"re:.*\.(x|dt)_proj\.weight": INT8}
LOADED_AS = {"int8": TorchAoConfig(INT8), "int4": TorchAoConfig(FqnToConfig(QUANTIZED_BY_NAME))}


def float_model(tied=False, seed=0):
    config = tiny_config("everything", vocab_size=64, intermediate_size=64, tie_word_embeddings=tied)
    return random_model(config, seed, loudness=0.9).float()


def takes_int4(module, name):
    return isinstance(module, nn.Linear) and module.out_features % 16 == 0 and module.in_features % 32 == 0


def quantized(model, kind):
    if kind == "int4":
        quantize_(model, INT4, takes_int4)
    quantize_(model, INT8, lambda module, name: isinstance(module, nn.Linear) and not is_quantized(module.weight))
    return model


def twin_of(model):
    """The same model with plain weights."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(dequantized(module.weight))
    return twin


@functools.cache
def shared(kind):
    """A quantized model and its twin; never change their weights."""
    model = quantized(float_model(), kind)
    return model, twin_of(model)


@functools.cache
def oracle(kind):
    return copy.deepcopy(shared(kind)[1]).double()


def quantized_linear(kind, num_outputs, num_inputs, dtype=torch.float32, bias=False):
    module = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=dtype)
    quantize_(module, INT8 if kind == "int8" else INT4)
    assert is_quantized(module.weight)
    return module


# ------------------------------------------------------------------------------------------------------- the matrices


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dequantized_is_what_the_module_multiplies_with(kind, shape):
    module = quantized_linear(kind, *shape)
    assert_same_logits(module(torch.eye(shape[1])).T, dequantized(module.weight), 1e-6)


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), PerGroup(32)], ids=str)
@torch.no_grad()
def test_dequantized_takes_every_granularity_of_int8(granularity):
    module = nn.Linear(96, 48, bias=False)
    quantize_(module, Int8WeightOnlyConfig(granularity=granularity))
    assert_same_logits(module(torch.eye(96)).T, dequantized(module.weight), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scales_of_the_inputs_are_part_of_the_matrix(kind):
    module = quantized_linear(kind, 48, 64)
    module.weight.act_pre_scale = torch.rand(64) + 0.5
    assert_same_logits(module(torch.eye(64)).T, dequantized(module.weight), 1e-6)


def test_dequantized_weights_have_the_requested_dtype():
    weight = torch.randn(4, 4)
    assert dequantized(weight) is weight
    assert dequantized(weight, torch.float64).dtype == torch.float64
    for kind in KINDS:
        narrow = quantized_linear(kind, 32, 32, torch.bfloat16).weight
        assert dequantized(narrow).dtype == torch.float32
        assert dequantized(narrow, torch.bfloat16).dtype == torch.bfloat16


def test_int4_with_quantized_activations_says_that_it_cannot_be_read():
    weight = quantized_linear("int4", 32, 32).weight
    weight.act_mapping_type = "symmetric"
    with pytest.raises(ValueError, match="quantize the weights only"):
        dequantized(weight)
    assert packed_weight(weight) is None


# ------------------------------------------------------------------------------------------------- for native kernels


def test_packed_int8_is_the_tensors_themselves():
    weight = quantized_linear("int8", 48, 32).weight
    packed = packed_weight(weight)
    assert (packed.kind, packed.qdata) == ("int8", weight.qdata)
    assert packed.scale.shape == (48,) and packed.scale.data_ptr() == weight.scale.data_ptr()
    assert torch.equal(packed.qdata * packed.scale[:, None], dequantized(weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_int4_is_laid_out_as_it_says(shape):
    weight = quantized_linear("int4", *shape).weight
    packed = packed_weight(weight)
    assert packed.qdata is weight.qdata and packed.scale_and_zero is weight.scale_and_zero
    assert packed.group_size == 32
    assert torch.equal(read_by_hand(packed, *shape), dequantized(weight))


def read_by_hand(packed, num_rows, width):
    """As a kernel would, byte by byte."""
    data, matrix = packed.qdata.flatten().tolist(), torch.empty(num_rows, width)
    for start in range(0, num_rows, packed.block_n):
        rows = min(packed.block_n, num_rows - start)
        has_halves = packed.has_halves and rows == packed.block_n
        for k in range(width):
            scale, zero = packed.scale_and_zero[k // packed.group_size].unbind(-1)
            for d in range(rows // 2):
                byte = data[start * width // 2 + k * rows // 2 + d]
                low, high = (d, d + rows // 2) if has_halves else (2 * d, 2 * d + 1)
                for row, code in ((start + low, byte & 15), (start + high, byte >> 4)):
                    matrix[row, k] = (code - 8) * scale[row] + zero[row]
    return matrix


@torch.no_grad()
def test_what_kernels_do_not_take_is_left_to_torchao():
    grouped, dynamic, shifted = (nn.Linear(64, 32) for _ in range(3))
    quantize_(grouped, Int8WeightOnlyConfig(granularity=PerGroup(32)))
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
    quantize_(shifted, INT8)
    shifted.weight.zero_point += 1
    scaled = quantized_linear("int4", 32, 32)
    scaled.weight.act_pre_scale = torch.ones(32)
    for module in (grouped, dynamic, shifted, scaled, nn.Linear(4, 4)):
        assert packed_weight(module.weight) is None


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_made_once_follow_new_tensors_and_are_forgotten(kind):
    module, other = quantized_linear(kind, 32, 32), quantized_linear(kind, 32, 32)
    packed = packed_weight(module.weight)
    assert packed_weight(module.weight) is packed
    module.weight.qdata = other.weight.qdata
    assert packed_weight(module.weight).qdata is other.weight.qdata
    module.weight = other.weight
    assert packed_weight(module.weight).qdata is other.weight.qdata
    gone, num_known = weakref.ref(other.weight.qdata), len(packed_weight.by_weight)
    del module, other, packed
    gc.collect()  # torchao gives a module a method that refers to it
    assert gone() is None and len(packed_weight.by_weight) < num_known


# ---------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("kind", KINDS)
def test_every_projection_and_the_head_are_quantized(kind):
    model, _ = shared(kind)
    kinds = {name: type(module.weight).__name__ for name, module in model.linear_modules().items()}
    assert set(kinds.values()) == {"int8": {"Int8Tensor"}, "int4": {"Int8Tensor", "Int4OpaqueTensor"}}[kind]
    assert not is_quantized(model.model.embed_tokens.weight)


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_plain_model_under_any_cut_and_padding(kind, variant):
    model, rows = shared(kind)[0], random_rows(1)
    turns = ragged_turns(random.Random(2), rows, 4)
    found = feed(model, model.make_cache(**CACHE_VARIANTS[variant]), turns)
    assert_same_logits(found, expected(oracle(kind), rows), TOLERANCE)


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_the_fly_are_those_of_the_plain_model(kind, variant):
    model, twin = shared(kind)
    first, second = random_expert(twin, 1), random_expert(twin, 2, rank=5)
    mixed = ExpertVector.blend([(0.7, first), (0.3, second)])
    pieces = [cut(row, [3, 4]) for row in random_rows(3, (7, 7, 7, 7))]
    turns = [padded_turn(random.Random(4), [piece[turn] for piece in pieces], extra=1) for turn in range(2)]
    experts = [None, first, second, mixed]
    found, wanted = (
        feed(each, each.make_cache(**CACHE_VARIANTS[variant]), turns, expert_vector=experts) for each in (model, twin)
    )
    assert_same_logits(found, wanted, TOLERANCE)
    base = feed(twin, twin.make_cache(), turns)
    assert (base[1] - found[1]).abs().max() > 0.1  # and they do something


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_says_what_the_plain_model_says(kind, variant):
    model, twin = shared(kind)
    expert, ids = random_expert(twin, 1), torch.tensor(random_rows(5, (6, 6)))
    options = {"max_new_tokens": 10, "do_sample": False, "expert_schedule": {0: None, 4: expert}}
    said = [
        each.generate(ids, past_key_values=each.make_cache(**CACHE_VARIANTS[variant]), **options)
        for each in (model, twin)
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_and_has_tensors_of_its_own(kind):
    model, ids = shared(kind)[0], torch.tensor(random_rows(5, (6,)))
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    addresses = [{each.data_ptr() for each in inner_tensors(one.lm_head.weight)} for one in (model, again)]
    assert not addresses[0] & addresses[1]
    assert weights_stamp(again) != weights_stamp(model)


def test_an_expert_learns_on_int8_weights_what_it_learns_on_plain_ones():
    ids, gradients = torch.tensor(random_rows(5, (6, 6))), []
    for model in shared("int8"):
        scales = {name: z.clone().requires_grad_() for name, z in random_expert(shared("int8")[1], 1).vectors.items()}
        model(ids, labels=ids, expert_vector=scales).loss.backward()
        gradients.append(torch.cat([z.grad for z in scales.values()]))
    assert_same_logits(gradients[0], gradients[1], TOLERANCE)


# ----------------------------------------------------------------------------------------------------------- experts


def with_spectrum(model, seed):
    expert = random_expert(model, seed)
    return ExpertVector(expert.vectors, metadata={"spectrum": model.spectrum(list(expert.vectors))})


@pytest.mark.parametrize("kind", KINDS)
def test_expert_vectors_of_float_weights_are_taken_and_others_refused(kind):
    original, ids = float_model(), torch.tensor(random_rows(5, (6,)))
    model = shared(kind)[0]
    with torch.no_grad():
        model(ids, expert_vector=with_spectrum(original, 1))
    with pytest.raises(ValueError, match="was trained on other weights"):
        model(ids, expert_vector=with_spectrum(float_model(seed=7), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_quantized_weights_is_refused_and_changes_nothing(kind):
    model, twin = shared(kind)
    stamp = weights_stamp(model)
    with pytest.raises(ValueError, match="pass the vector as `expert_vector`"):
        model.merge_expert_vector(random_expert(twin, 1))
    assert weights_stamp(model) == stamp
    with pytest.raises(ValueError, match="No expert vector is merged"):
        model.unmerge_expert_vector()


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_computed_once_for_what_is_written_in_any_order(kind, monkeypatch):
    model = quantized(float_model(seed=3), kind)
    model.prepare_expert_vectors()
    monkeypatch.setattr("mambaformer.expert_bases_mambaformer.compute_basis", None)
    copy.deepcopy(model).prepare_expert_vectors()


# --------------------------------------------------------------------------------------------------------- staleness


@torch.no_grad()
def replace_weight(model, new):
    model.model.layers[1].mlp.up_proj.weight = new.model.layers[1].mlp.up_proj.weight


@torch.no_grad()
def copy_weight(model, new):
    model.model.layers[1].mlp.up_proj.weight.copy_(new.model.layers[1].mlp.up_proj.weight)


@torch.no_grad()
def copy_codes(model, new):
    model.model.layers[1].mlp.up_proj.weight.qdata.copy_(new.model.layers[1].mlp.up_proj.weight.qdata)


def replace_codes(model, new):
    model.model.layers[1].mlp.up_proj.weight.qdata = new.model.layers[1].mlp.up_proj.weight.qdata.clone()


def load_weights(model, new):
    model.load_state_dict(new.state_dict())


def assign_weights(model, new):
    model.load_state_dict(new.state_dict(), assign=True)


WRITES = [replace_weight, copy_weight, copy_codes, replace_codes, load_weights, assign_weights]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_changed_are_never_used_with_states_of_the_old_ones(kind, write):
    model, new = copy.deepcopy(shared(kind)[0]), quantized(float_model(seed=4), kind)
    row, expert = random_rows(6, (9,))[0], random_expert(shared(kind)[1], 1)
    cache = model.make_cache()
    feed_row(model, cache, row[:5], expert_vector=expert)
    stamp, fingerprint = weights_stamp(model), model.weights_fingerprint()[1]
    write(model, new)
    assert weights_stamp(model) != stamp and model.weights_fingerprint()[1] != fingerprint
    found = feed_row(model, cache, row[5:])
    wanted = feed_row(twin_of(model), None, row, expert_vector=expert)[5:]
    assert_same_logits(found, wanted, TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_tells_quantized_weights_from_plain_ones(kind):
    model, twin = shared(kind)
    others = [twin, float_model(), shared("int8" if kind == "int4" else "int4")[0]]
    assert model.weights_fingerprint()[1] == copy.deepcopy(model).weights_fingerprint()[1]
    assert model.weights_fingerprint()[1] not in [other.weights_fingerprint()[1] for other in others]


def test_the_fingerprint_tells_that_activations_are_quantized():
    model, other = shared("int8")[0], float_model()
    quantize_(other, Int8DynamicActivationInt8WeightConfig())
    same = torch.equal(model.lm_head.weight.qdata, other.lm_head.weight.qdata)
    assert same and model.weights_fingerprint()[1] != other.weights_fingerprint()[1]


# -------------------------------------------------------------------------------------------------- files of all kinds


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A float model with an expert, and its folder."""
    model = float_model(tied=request.param)
    model.expert_vectors.add("bold", random_expert(model, 1))
    folder = tmp_path_factory.mktemp("float")
    model.save_pretrained(folder)
    return model, folder


def loaded(folder, **options):
    return MambaFormerForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits_of(model, **options):
    return model(torch.tensor(random_rows(5, (6,))), **options).logits


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_by_its_config_a_model_is_quantized_but_for_embedding_and_head(saved, kind):
    model = loaded(saved[1], quantization_config=LOADED_AS[kind])
    plain = {name for name, module in model.linear_modules().items() if not is_quantized(module.weight)}
    assert plain == {"lm_head"}
    assert_same_logits(logits_of(model), logits_of(twin_of(model)), TOLERANCE)
    assert_same_logits(
        logits_of(model, expert_vector="bold"), logits_of(twin_of(model), expert_vector="bold"), TOLERANCE
    )


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_it_gives_the_same_logits(saved, kind, with_head, tmp_path):
    model = loaded(saved[1], quantization_config=LOADED_AS[kind])
    if with_head:
        quantize_(model, INT8 if kind == "int8" else INT4, lambda module, name: name == "lm_head")
    settings = model.config.quantization_config, model.hf_quantizer
    model.save_pretrained(tmp_path)
    assert (model.config.quantization_config, model.hf_quantizer) == settings
    again = loaded(tmp_path)
    assert is_quantized(again.lm_head.weight) == with_head and not is_quantized(again.model.embed_tokens.weight)
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(logits_of(again, expert_vector="bold"), logits_of(model, expert_vector="bold"))
    assert again.weights_fingerprint()[1] == model.weights_fingerprint()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_quantize_did_is_saved_and_loaded_too(kind, tmp_path):
    model = shared(kind)[0]
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_a_model_of_int4_and_plain_weights_is_saved_and_loaded(saved, tmp_path):
    config = TorchAoConfig(INT4, modules_to_not_convert=["lm_head", r".*\.x_proj"])
    model = loaded(saved[1], quantization_config=config)
    quantized_names = {name for name, module in model.linear_modules().items() if is_quantized(module.weight)}
    assert quantized_names == {n for n in model.linear_modules() if not n.endswith(("lm_head", "x_proj", "dt_proj"))}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_a_head_that_is_tied_against_what_the_config_says_is_saved_as_it_is(tmp_path):
    """Transformers' `untie_embedding_weights` set the config and left the head tied: its file had none."""
    model = float_model(tied=True)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_the_head_of_an_untied_model_is_quantized_if_nothing_is_left_out(tmp_path):
    float_model(tied=False).save_pretrained(tmp_path)
    model = loaded(tmp_path, quantization_config=TorchAoConfig(INT8, modules_to_not_convert=[]))
    assert is_quantized(model.lm_head.weight) and not is_quantized(model.model.embed_tokens.weight)


def test_a_form_that_a_file_cannot_name_is_refused(tmp_path):
    model = float_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="quantization_config=TorchAoConfig"):
        model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")


def test_the_file_of_int4_weights_is_in_no_processor_s_order():
    weight = quantized_linear("int4", 80, 64).weight
    plain = portable(weight)
    codes = torch.stack([(plain.qdata << 4) >> 4, plain.qdata >> 4], dim=-1).flatten(1)
    values = codes.view(80, 2, 32) * plain.scale.T[..., None] + plain.zero_point.T[..., None]
    assert torch.equal(values.flatten(1), dequantized(weight))
    assert torch.equal(dequantized(plain), dequantized(weight))


IN_ANOTHER_PROCESS = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder, session = sys.argv[1:]
    ids = torch.tensor([[5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        alone = model(ids, expert_vector=None).logits
        cache = model.load_cache(session)
        logits = model(ids, past_key_values=cache).logits
    print(json.dumps({
        "alone": alone.tolist(), "logits": logits.tolist(), "imported_package": "mambaformer" in sys.modules,
        "fingerprint": model.weights_fingerprint()[1],
    }))
"""


def seen_by(folder, session, capability):
    """What a process sees whose processor has no more than this, and which never imports the package."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_ANOTHER_PROCESS), folder, session],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["imported_package"]
    return torch.tensor(found["alone"]), torch.tensor(found["logits"]), found["fingerprint"]


@pytest.fixture(scope="module", params=KINDS)
def chat(request, tmp_path_factory):
    """A quantized model, its folder, a session, and the logits it goes on with."""
    model, ids = shared(request.param)[0], torch.tensor([[5, 6, 7]])
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache, expert_vector=random_expert(shared(request.param)[1], 1))
        cache.save(folder / "session")
        return model, folder, model(ids, expert_vector=None).logits, model(ids, past_key_values=cache).logits


@pytest.mark.slow
def test_a_session_goes_on_in_another_process_bit_for_bit(chat):
    model, folder, alone, logits = chat
    found = seen_by(folder, folder / "session", None)
    assert torch.equal(found[0], alone) and torch.equal(found[1], logits)
    assert found[2] == model.weights_fingerprint()[1]


@pytest.mark.long
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_a_processor_of_another_order_reads_the_same_weights(chat, capability):
    model, folder, alone, logits = chat
    found = seen_by(folder, folder / "session", capability)
    assert_same_logits(found[0], alone, TOLERANCE)
    assert_same_logits(found[1], logits, TOLERANCE)
    assert found[2] == model.weights_fingerprint()[1]


def test_the_float_model_refuses_the_session_of_the_quantized_one(chat):
    with pytest.raises(ValueError, match="other weights"):
        float_model().load_cache(chat[1] / "session")


AS_A_USER = """
    import sys, torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder, again = sys.argv[1:]
    options = {"trust_remote_code": True, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = [each(ids, expert_vector="bold").logits for each in (model, reloaded)]
    assert torch.equal(*logits) and type(reloaded.lm_head.weight).__name__ == "Int8Tensor"
    assert "mambaformer" not in sys.modules
"""


@pytest.mark.slow
def test_remote_code_is_quantized_while_loading_saved_and_loaded_again(saved, tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(AS_A_USER), saved[1], tmp_path / "again"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
