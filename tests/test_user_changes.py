"""Law 9, for users who change a model: a replaced, wrapped, patched or hooked module counts in every form.

The reference is one forward without a cache and without kernels, through the changed modules.
"""

import contextlib
import copy

import peft
import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers.activations import ACT2FN

from mambaformer import decode_program_mambaformer as stack
from mambaformer import modeling_mambaformer as modeling
from mambaformer import ops_cpu_build_mambaformer as compiler
from mambaformer import ops_cpu_decode_mambaformer as decode
from mambaformer.mixer_attention_mambaformer import MambaFormerAttention
from mambaformer.mixer_base_mambaformer import MambaFormerRMSNorm
from mambaformer.mixer_mamba_mambaformer import MambaFormerMambaMixer
from mambaformer.mixer_mlp_mambaformer import MambaFormerMLP
from mambaformer.mixer_parts_mambaformer import MambaFormerConv1d
from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_model

PROMPT, TOLERANCES = 5, {torch.float64: 1e-10, torch.float32: 1e-6}
IDS = torch.tensor([random_rows(1)[0][:10]])


@contextlib.contextmanager
def kernels_off():
    """As in a process that was started with `MAMBAFORMER_CPU_KERNELS=0`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiler.SWITCH, "0")
        patch.setattr(compiler, "_libraries", {})
        patch.setattr(stack.DecodePrograms, "run", lambda *_: None)
        decode.kernel_of.cache_clear()
        yield
    decode.kernel_of.cache_clear()


# ---- what users do to a model: each takes the model and pytest's `monkeypatch`


class OnePlusNorm(nn.Module):
    """The norm of Gemma: weights are stored as what they differ from one by."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(norm.weight.detach().clone()), norm.variance_epsilon

    def forward(self, hidden_states):
        wide = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return wide * (1 + self.weight)


class Twice(nn.Module):
    """Wraps any module and doubles the first tensor that it returns; attributes of the module are not passed on."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        outputs = self.inside(*args, **kwargs)
        return (2 * outputs[0], *outputs[1:]) if isinstance(outputs, tuple) else 2 * outputs


class Delegating(Twice):
    """The same, with the attributes of the module inside."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)


class Foreign(nn.Module):
    """A layer of another kind, which has none of the attributes of ours and returns a tensor alone."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + torch.tanh(self.proj(hidden_states))


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 1.5 * super().forward(inputs)


def scaled(function, factor=1.5):
    def forward(self, *args, **kwargs):
        outputs = function(self, *args, **kwargs)
        return (factor * outputs[0], *outputs[1:]) if isinstance(outputs, tuple) else factor * outputs

    return forward


def patch_class(kind, name="forward"):
    return lambda model, monkeypatch: monkeypatch.setattr(kind, name, scaled(getattr(kind, name)))


def patch_instance(path, name="forward"):
    def change(model, monkeypatch):
        module = model.model.get_submodule(path)
        function = getattr(module, name)
        setattr(
            module, name, lambda *args, **kwargs: scaled(lambda _, *a, **k: function(*a, **k))(None, *args, **kwargs)
        )

    return change


def replace(path, make):
    def change(model, monkeypatch):
        parent, _, name = path.rpartition(".")
        parent = model.model.get_submodule(parent)
        old = parent[int(name)] if name.isdigit() else getattr(parent, name)
        if name.isdigit():
            parent[int(name)] = make(old)
        else:
            setattr(parent, name, make(old))

    return change


def plain_norm(norm):
    new = nn.RMSNorm(norm.weight.shape[0], eps=0.1, dtype=torch.float64)
    new.weight = norm.weight
    return new


def of_subclass(linear):
    new = Scaled(linear.in_features, linear.out_features, linear.bias is not None, dtype=torch.float64)
    new.load_state_dict(linear.state_dict())
    return new


def as_subclass(linear):
    linear.__class__ = Scaled
    return linear


def hook(path, register):
    def change(model, monkeypatch):
        module = model.model.get_submodule(path)
        if register == "forward":
            module.register_forward_hook(lambda module, args, outputs: 1.5 * outputs)
        else:
            module.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))

    return change


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrize(path, name="weight"):
    return lambda model, monkeypatch: nn.utils.parametrize.register_parametrization(
        model.model.get_submodule(path), name, Halved()
    )


def pruned(path, name="weight"):
    return lambda model, monkeypatch: nn.utils.prune.random_unstructured(model.model.get_submodule(path), name, 0.5)


def slice_in_place(model, _):
    """Pruning by hand: the same memory, of another shape."""
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data = linear.weight.data[:24]
        linear.bias.data = linear.bias.data[:24]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :24]


def turn_in_place(model, monkeypatch):
    """The same memory and shape, read in another order."""
    linear = model.model.layers[2].self_attn.k_proj
    linear.weight.data = linear.weight.data.t()


def remove(*positions):
    def change(model, monkeypatch):
        stack, kept = model.model, [i for i in range(len(model.model.layers)) if i not in positions]
        stack.layers = nn.ModuleList([stack.layers[i] for i in kept])
        fit_configuration(model, kept)

    return change


def repeat(position):
    def change(model, monkeypatch):
        stack, order = model.model, [*range(position + 1), *range(position, len(model.model.layers))]
        stack.layers = nn.ModuleList([stack.layers[i] for i in order])
        fit_configuration(model, order)

    return change


def copy_layer(position):
    def change(model, monkeypatch):
        stack, order = model.model, [*range(position + 1), *range(position, len(model.model.layers))]
        layers = [stack.layers[i] for i in order]
        layers[position] = copy.deepcopy(layers[position])
        stack.layers = nn.ModuleList(layers)
        fit_configuration(model, order)

    return change


def fit_configuration(model, order):
    config = model.config
    config.num_hidden_layers, config.layer_types = len(order), [config.layer_types[i] for i in order]


def drop_without_types(model, monkeypatch):
    """A layer less, and only the number of layers says so: the types of the others have moved up by one."""
    model.model.layers = nn.ModuleList(list(model.model.layers)[1:])
    model.config.num_hidden_layers -= 1


def tune_norms(model, monkeypatch):
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["self_attn_layernorm", "mlp_layernorm"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "ln_tuning_layers" in name:
                weight.mul_(1.5)


def tune_parameters(names):
    def change(model, monkeypatch):
        config = peft.LoraConfig(target_modules=[], target_parameters=names, init_lora_weights=False)
        peft.get_peft_model(model, config).to(torch.float64)

    return change


def wrap_lora(model, monkeypatch):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj", "in_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).to(torch.float64)


CHANGES = {
    "nothing": lambda model, monkeypatch: None,
    "class: norm": patch_class(MambaFormerRMSNorm),
    "class: linear": patch_class(nn.Linear),
    "class: mlp": patch_class(MambaFormerMLP),
    "class: attention": patch_class(MambaFormerAttention),
    "class: attention's core": patch_class(MambaFormerAttention, "attend"),
    "class: mamba": patch_class(MambaFormerMambaMixer),
    "class: mamba's recurrence": patch_class(MambaFormerMambaMixer, "recur"),
    "class: mamba's selection": patch_class(MambaFormerMambaMixer, "selection"),
    "class: convolution": patch_class(MambaFormerConv1d),
    "class: layer": patch_class(modeling.MambaFormerLayer),
    "class: layer's call": patch_class(modeling.MambaFormerLayer, "__call__"),
    "class: activation": patch_class(type(ACT2FN["silu"])),
    "instance: layer": patch_instance("layers.1"),
    "instance: norm": patch_instance("layers.2.mlp_layernorm"),
    "instance: linear": patch_instance("layers.2.mlp.up_proj"),
    "instance: attention's core": patch_instance("layers.2.self_attn", "attend"),
    "instance: mamba's selection": patch_instance("layers.0.mamba", "selection"),
    "instance: inner norm": patch_instance("layers.0.mamba.b_layernorm"),
    "hook: layer's mlp": hook("layers.0.mlp", "forward"),
    "hook: norm": hook("layers.1.mamba_layernorm", "forward"),
    "hook: activation": hook("layers.2.mlp.act_fn", "forward"),
    "hook: convolution's input": hook("layers.0.mamba.conv1d", "pre"),
    "replaced: norm that adds one": replace("layers.2.self_attn_layernorm", OnePlusNorm),
    "replaced: norm of PyTorch": replace("layers.2.mlp_layernorm", plain_norm),
    "replaced: norm by nothing": replace("layers.0.mamba_layernorm", lambda norm: nn.Identity()),
    "replaced: inner norm": replace("layers.0.mamba.c_layernorm", OnePlusNorm),
    "replaced: last norm": replace("norm", plain_norm),
    "replaced: activation": replace("layers.2.mlp.act_fn", lambda _: nn.GELU()),
    "replaced: linear of a subclass": replace("layers.4.self_attn.v_proj", of_subclass),
    "replaced: class of a linear": replace("layers.4.self_attn.v_proj", as_subclass),
    "replaced: layer of another kind": replace("layers.1", lambda layer: Foreign(32)),
    "wrapped: norm": replace("layers.1.self_attn_layernorm", Twice),
    "wrapped: linear": replace("layers.1.mamba.out_proj", Twice),
    "wrapped: mlp": replace("layers.3.mlp", Twice),
    "wrapped: attention": replace("layers.3.self_attn", Delegating),
    "wrapped: mamba": replace("layers.3.mamba", Twice),
    "wrapped: layer": replace("layers.2", Twice),
    "wrapped: layer that passes attributes on": replace("layers.3", Delegating),
    "wrapped: layer, two times": replace("layers.3", lambda layer: Twice(Delegating(layer))),
    "wrapped: layer, compiled": replace("layers.2", lambda layer: torch.compile(layer, backend="eager")),
    "wrapped: mlp, compiled": replace("layers.2.mlp", lambda mlp: torch.compile(mlp, backend="eager")),
    "parametrized: linear": parametrize("layers.4.self_attn.q_proj"),
    "parametrized: norm": parametrize("layers.4.mlp_layernorm"),
    "parametrized: decay": parametrize("layers.0.mamba", "A_log"),
    "parametrized: convolution": parametrize("layers.0.mamba.conv1d"),
    "pruned: linear": pruned("layers.0.mlp.up_proj"),
    "pruned: bias": pruned("layers.2.mlp.up_proj", "bias"),
    "pruned: norm": pruned("layers.0.mlp_layernorm"),
    "pruned: decay": pruned("layers.0.mamba", "A_log"),
    "memory: sliced in place": slice_in_place,
    "memory: turned in place": turn_in_place,
    "layers: first removed": remove(0),
    "layers: sliding one removed": remove(2),
    "layers: two removed": remove(1, 3),
    "layers: first removed, types left": drop_without_types,
    "layers: one repeated": repeat(2),
    "layers: hybrid one repeated": repeat(3),
    "layers: a copy between": copy_layer(1),
    "peft: LoRA": wrap_lora,
    "peft: norms": tune_norms,
    "peft: parameters of mlp": tune_parameters(["mlp.up_proj.weight", "self_attn.q_proj.weight"]),
    "peft: parameters of mamba": tune_parameters(["mamba.A_log"]),
}
WITHOUT_EFFECT = ("nothing", "wrapped: layer, compiled", "wrapped: mlp, compiled")


def model_of():
    return random_model(tiny_config("everything", head_dim=16))


@torch.no_grad()
def reference(model, expert=...):
    with kernels_off():
        return model(IDS, use_cache=False, expert_vector=expert).logits


# ---- the forms


def decoded(model, cache, expert=...):
    logits = [model(IDS[:, :PROMPT], cache=cache, expert_vector=expert).logits]
    logits += [model(token, cache=cache).logits for token in IDS[:, PROMPT:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


def generated(model, **options):
    """The logits of greedy decoding, which `generate` keeps in float32, and those of one forward over its tokens."""
    found = model.generate(
        IDS[:, :PROMPT], max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    with kernels_off():
        wanted = model(found.sequences, use_cache=False).logits
    return torch.stack(found.logits, dim=1), wanted[:, PROMPT - 1 : -1].float()


def in_kernels(model):
    return decoded(model, model.make_cache()), reference(model)


def in_static(model):
    return decoded(model, model.make_cache("static", max_cache_len=24)), reference(model)


def in_pytorch(model):
    with kernels_off():
        return decoded(model, model.make_cache()), reference(model)


def in_prefill(model):
    return model(IDS).logits, reference(model)


def in_chunks(model):
    cache = model.make_cache()
    return torch.cat([model(part, cache=cache).logits for part in IDS.split(3, dim=1)], dim=1), reference(model)


def in_generate(model):
    return generated(model)


def in_static_generate(model):
    return generated(model, cache_implementation="static", disable_compile=True)


def in_speculation(model):
    return generated(model, prompt_lookup_num_tokens=2)


FORMS = {
    "prefill": in_prefill,
    "chunks": in_chunks,
    "kernels": in_kernels,
    "static": in_static,
    "pytorch": in_pytorch,
    "generate": in_generate,
    "static generate": in_static_generate,
    "speculation": in_speculation,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_a_change_counts_in_every_form(change, monkeypatch):
    """A patched class, a (1 + w) norm, PEFT's norms, a wrapped or a removed layer were ignored, or were errors."""
    model = model_of()
    plain = reference(model)
    CHANGES[change](model, monkeypatch)
    moved = (reference(model) - plain).abs().max() if reference(model).shape == plain.shape else 1.0
    assert (moved > 1e-3) != (change in WITHOUT_EFFECT)
    problems = {}
    for form, run in FORMS.items():
        found, wanted = run(model)
        off = (found - wanted).abs().max() / wanted.abs().max()
        if not off < TOLERANCES[wanted.dtype]:
            problems[form] = float(off)
    assert not problems


def copied_and_hooked(path, put):
    """Puts a copy that shares all weights in a module's place, and hooks the copy."""

    def change(model, monkeypatch):
        parent, name = model.model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        module = copy.copy(getattr(parent, name))
        put(parent, name, module)
        without_hooks(module)
        module.register_forward_hook(lambda module, args, outputs: 1.5 * outputs)

    return change


def without_hooks(module):
    """As it is often done, with a dictionary that the module did not have before."""
    module._forward_hooks = type(module._forward_hooks)()


def other_hooks(model, monkeypatch):
    without_hooks(model.model.layers[0].mlp)
    hook("layers.0.mlp", "forward")(model, monkeypatch)


def set_attribute(path, **values):
    def change(model, monkeypatch):
        for name, value in values.items():
            setattr(model.model.get_submodule(path), name, value)

    return change


BETWEEN_STEPS = {
    "copy of a norm": copied_and_hooked("layers.0.mlp_layernorm", setattr),
    "copy of a norm, added": copied_and_hooked("layers.0.mlp_layernorm", nn.Module.add_module),
    "copy of an mlp, added": copied_and_hooked("layers.2.mlp", nn.Module.add_module),
    "copy of an activation, added": copied_and_hooked("layers.2.mlp.act_fn", nn.Module.add_module),
    "other hooks": other_hooks,
    "eps": set_attribute("layers.2.mlp_layernorm", variance_epsilon=0.5),
    "eps of an inner norm": set_attribute("layers.0.mamba.b_layernorm", variance_epsilon=0.5),
    "scaling": set_attribute("layers.2.self_attn", scaling=1.0),
    "no bias": set_attribute("layers.2.mlp.up_proj", bias=None),
    "another window": set_attribute("layers.2", window=3),
    "no window": set_attribute("layers.3", window=None),
    "a window": set_attribute("layers.4", window=3),
    "no mlp": set_attribute("layers.0", steps=("mamba",)),
    "nothing for an mlp": set_attribute("layers.0", steps=("mamba",), mlp=None, mlp_layernorm=None),
    "no attention": set_attribute("layers.1", steps=("mamba", "mlp")),
    "no mamba": set_attribute("layers.3", steps=("self_attn", "mlp")),
    "other order": set_attribute("layers.3", steps=("mlp", "mamba", "self_attn")),
    "no inner norms": set_attribute("layers.1.mamba", has_inner_norms=False),
    **{name: CHANGES[name] for name in CHANGES if name.startswith(("pruned", "instance", "hook"))},
}


@torch.no_grad()
@pytest.mark.parametrize("change", BETWEEN_STEPS)
def test_a_change_counts_after_kernels_have_run(change, monkeypatch):
    """Kernels are written down once: a module of the same weights, or other hooks, were not seen (off by 0.5 to 1).

    Nor was a layer whose own window, MLP or norms were switched (off by 1.2 to 5, or an AttributeError).
    """
    model = model_of()
    decoded(model, model.make_cache())
    plain = reference(model)
    BETWEEN_STEPS[change](model, monkeypatch)
    wanted = reference(model)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(decoded(model, model.make_cache()), wanted, rtol=1e-9, atol=1e-9)


def expert_of(model):
    """Scales of every plain linear module, by the names under which the model knows them."""
    source, modules = torch.Generator().manual_seed(1), model.linear_modules()
    modules = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    assert len(modules) > 10
    return {name: 0.3 + 1.4 * torch.rand(min(each.weight.shape), generator=source) for name, each in modules.items()}


# Changes under which a linear module is still called as it is, so that scaling it and merging are the same.
OF_WHOLE_LAYERS = [name for name in CHANGES if name.startswith(("layers:", "wrapped: l", "wrapped: m", "replaced: n"))]


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", *OF_WHOLE_LAYERS])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_expert_vectors_follow_the_layers_that_users_move(change, monkeypatch):
    """A layer looked its scales up under the number that it was made with, and a wrapped one was not found."""
    model = model_of()
    CHANGES[change](model, monkeypatch)
    expert = expert_of(model)
    plain, wanted = reference(model), reference(model, expert)
    torch.testing.assert_close(decoded(model, model.make_cache(), expert), wanted, rtol=1e-9, atol=1e-9)
    model.merge_expert_vector(expert)
    torch.testing.assert_close(reference(model), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decoded(model, model.make_cache()), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - plain).abs().max() > 1e-3


COMPILED = ["replaced: norm that adds one", "wrapped: mlp", "layers: sliding one removed", "layers: one repeated"]


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("change", COMPILED)
def test_a_change_counts_in_a_compiled_step(change, monkeypatch):
    model = model_of()
    CHANGES[change](model, monkeypatch)
    torch.compiler.reset()
    compiled, cache = (
        torch.compile(model, backend="eager", fullgraph=True),
        model.make_cache("static", max_cache_len=12),
    )
    model(IDS[:, :PROMPT], cache=cache)
    found = [compiled(token, cache=cache).logits for token in IDS[:, PROMPT:].split(1, dim=1)]
    torch.compiler.reset()
    torch.testing.assert_close(torch.cat(found, dim=1), reference(model)[:, PROMPT:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("change", ["peft: parameters of mlp", "peft: parameters of mamba", "wrapped: layer"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_a_change_does_not_encode_the_sequence_again_at_each_step(change, monkeypatch):
    """PEFT parametrizes a weight for the length of each forward, which passed for a change of weights."""
    model, widths = model_of(), []
    CHANGES[change](model, monkeypatch)
    model(IDS, cache=model.make_cache())  # PEFT's first forward puts parameters in another order, which counts once
    cache = model.make_cache()
    model.model.embed_tokens.register_forward_hook(lambda module, args, outputs: widths.append(outputs.shape[1]))
    decoded(model, cache)
    other = model.make_cache()
    decoded(model, other)  # nor does a forward with another cache make this one stale
    assert cache.status != "stale" and widths[: len(widths) // 2] == widths[len(widths) // 2 :]
    widths = widths[: len(widths) // 2]
    assert widths == [PROMPT] + [1] * (IDS.shape[1] - PROMPT)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["dense", "static"])
@pytest.mark.parametrize("change", [name for name in CHANGES if name.startswith(("layers:", "replaced: layer"))])
def test_a_cache_of_other_layers_is_refused(change, storage, monkeypatch):
    """A cache that was made before a layer went lost its place silently, or raised an IndexError."""
    model = model_of()
    cache = model.make_cache(storage, **({"max_cache_len": 24} if storage == "static" else {}))
    model(IDS[:, :PROMPT], cache=cache)
    CHANGES[change](model, monkeypatch)
    if change == "layers: a copy between":
        model.config.num_hidden_layers += 1
    with pytest.raises(ValueError, match="make a new cache"):
        model(IDS[:, PROMPT:], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", *OF_WHOLE_LAYERS])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_a_session_of_changed_layers_is_saved_and_loaded(change, monkeypatch, tmp_path):
    model = model_of()
    CHANGES[change](model, monkeypatch)
    cache = model.make_cache()
    model(IDS[:, :PROMPT], cache=cache)
    cache.save(tmp_path / "session.safetensors")
    found = model(IDS[:, PROMPT:], cache=model.load_cache(tmp_path / "session.safetensors")).logits
    torch.testing.assert_close(found, reference(model)[:, PROMPT:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_module_that_wraps_two_layers_is_refused():
    model = model_of()
    model.model.layers[1] = nn.Sequential(model.model.layers[1], model.model.layers[2])
    with pytest.raises(ValueError, match="wrap each layer by itself"):
        model(IDS)
