"""Expert vectors prepared for a forward: once for each content, outside of graphs, by no argument of a forward."""

import copy
import inspect
import shutil
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mambaformer import ExpertVector, MambaFormerForCausalLM, MambaFormerForSequenceClassification
from mambaformer.expert_runtime_mambaformer import MOST_PREPARED
from oracle import assert_same_logits, expected, uncached_logits
from patterns import tiny_config
from sequences import feed_row, random_ids, random_rows
from tiny_models import random_expert, random_model


@pytest.fixture
def model():
    return random_model(tiny_config("everything"))


@pytest.fixture
def prepared(model, monkeypatch):
    """The expert vectors that `model` prepares, in order; it keeps none of earlier tests."""
    calls, prepare = [], model._scale_bases

    def counted(expert_vector):
        assert not torch.compiler.is_compiling()
        calls.append(expert_vector)
        return prepare(expert_vector)

    monkeypatch.setattr(model, "_scale_bases", counted)
    return calls


def same_logits(model, row, expert_vector):
    with torch.no_grad():
        found = model(torch.tensor([row]), expert_vector=expert_vector, use_cache=False).logits[0]
    resolved = ExpertVector(expert_vector) if isinstance(expert_vector, dict) else expert_vector
    assert_same_logits(found, expected(model, [row], [resolved])[0])


@torch.no_grad()
def test_caches_that_take_turns_prepare_each_vector_once(model, prepared):
    """Only the cache kept its last one, so a session that changed back and forth paid for every change."""
    vectors, rows = [random_expert(model, seed) for seed in (1, 2)], random_rows(4, [12, 12])
    caches, found = [model.make_cache() for _ in rows], [[], []]
    for start in range(0, 12, 3):
        for which, cache in enumerate(caches):
            cache.set_expert_vector(vectors[which])
            found[which].append(feed_row(model, cache, rows[which][start : start + 3]))
    for which, row in enumerate(rows):
        assert_same_logits(torch.cat(found[which]), expected(model, [row], [vectors[which]])[0])
    one = model.make_cache()
    for turn in range(6):  # one session that changes back and forth
        one.set_expert_vector(vectors[turn % 2])
        feed_row(model, one, rows[0][turn : turn + 1])
    model(torch.tensor([rows[0]]), expert_vector=vectors[0])
    assert prepared == vectors


@torch.no_grad()
def test_threads_that_take_turns_prepare_each_vector_at_most_once_each(model, prepared):
    vectors, rows = [random_expert(model, seed) for seed in (1, 2)], random_rows(4, [9, 9])
    wanted = [expected(model, [row], [vector])[0] for row, vector in zip(rows, vectors, strict=True)]
    failures = []

    def work(which):
        try:
            for turn in range(6):
                cache = model.make_cache()
                cache.set_expert_vector(vectors[(which + turn) % 2])
                found = feed_row(model, cache, rows[(which + turn) % 2])
                assert_same_logits(found, wanted[(which + turn) % 2])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and 2 <= len(prepared) <= 4


def test_only_the_last_few_vectors_stay_prepared(model, prepared):
    row, vectors = random_rows(4, [5])[0], [random_expert(model, seed) for seed in range(1, MOST_PREPARED + 2)]
    for vector in vectors:
        same_logits(model, row, vector)
    for vector in reversed(vectors[1:]):
        same_logits(model, row, vector)
    assert prepared == vectors
    same_logits(model, row, vectors[0])
    assert len(prepared) == MOST_PREPARED + 2


def test_changed_weights_and_copies_of_the_model_are_prepared_anew(model, prepared):
    row, vector = random_rows(4, [5])[0], random_expert(model, 1)
    same_logits(model, row, vector)
    twin = copy.deepcopy(model)
    del twin._scale_bases  # of the fixture
    with torch.no_grad():
        for each in (model, twin):
            each.linear_modules()["model.layers.1.mlp.down_proj"].weight.mul_(-2)
            each.lm_head.weight.mul_(3)
    same_logits(model, row, vector)
    same_logits(twin, row, vector)
    assert len(prepared) == 2
    model.weights_changed()
    same_logits(model, row, vector)
    assert len(prepared) == 3


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_a_weight_that_is_computed_is_never_taken_for_an_earlier_one(model):
    """The mask is no parameter, so no stamp of the weights shows that it changed."""
    module = model.linear_modules()["model.layers.1.mlp.down_proj"]
    ids, vector = torch.tensor(random_rows(4, [5])[:1]), random_expert(model, 1)
    mask = (torch.arange(module.weight.numel()) % 2).to(module.weight).view_as(module.weight)
    parametrize.register_parametrization(module, "weight", Masked(mask))
    with torch.no_grad():
        first = model(ids, expert_vector=vector).logits
        module.parametrizations.weight[0].mask.copy_(1 - mask)
        second = model(ids, expert_vector=vector).logits
        parametrize.remove_parametrizations(module, "weight")
        assert_same_logits(second[0], model(ids, expert_vector=vector).logits[0])
    assert not torch.allclose(first, second)


def test_equal_content_with_other_labels_is_checked_again(model):
    """Trailing ones, modules of ones and the spectrum are no part of the content, and are checked all the same."""
    row, vector = random_rows(4, [5])[0], random_expert(model, 1)
    same_logits(model, row, vector)
    name, z = next(iter(vector.vectors.items()))
    longer = {**vector.vectors, name: torch.cat([z, torch.ones(9999, dtype=z.dtype)])}
    with pytest.raises(ValueError, match="scales for"):
        model(torch.tensor([row]), expert_vector=longer)
    with pytest.raises(ValueError, match="does not have"):
        model(torch.tensor([row]), expert_vector={**vector.vectors, "model.layers.0.mlp.dwn_proj": [1.0]})
    foreign = ExpertVector(vector.vectors, metadata={"spectrum": {name: [1e6, 1.0]}})
    with pytest.raises(ValueError, match="trained on other weights"):
        model(torch.tensor([row]), expert_vector=foreign)
    same_logits(model, row, vector)


def test_a_vector_that_is_trained_is_prepared_for_every_graph(model, prepared):
    row = random_rows(4, [5])[0]
    z = nn.Parameter(torch.ones(2, dtype=torch.float64))
    vector = ExpertVector({"model.layers.1.mlp.down_proj": z})
    for value in (2.0, 3.0):
        with torch.no_grad():
            z.fill_(value)
        model(torch.tensor([row]), expert_vector=vector).logits.square().sum().backward()
        assert z.grad.abs().sum() > 0
        z.grad = None
    assert len(prepared) == 2


def test_no_forward_has_an_argument_for_prepared_vectors(model):
    for function in (model.forward, model.model.forward, model.generate):
        assert not [name for name in inspect.signature(function).parameters if "plan" in name or "prepared" in name]
    with pytest.raises(TypeError, match="expert_plan"):
        model(torch.tensor([[1, 2]]), expert_plan=None)


@pytest.mark.slow
def test_a_compiled_model_prepares_new_vectors_outside_of_its_graphs(model, prepared):
    """The compiler traced hashes, files and decompositions: 50 seconds and a warning for a new expert vector."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, row = torch.compile(model, backend="aot_eager"), random_rows(5, [6])[0]
    vectors, counted = [random_expert(model, seed) for seed in (1, 2, 3)], []
    for vector in vectors:
        with torch.no_grad():
            found = compiled(torch.tensor([row]), expert_vector=vector, use_cache=False).logits[0]
        assert_same_logits(found, expected(model, [row], [vector])[0])
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert prepared == vectors
    assert counted[0] > 0 and len(set(counted)) == 1, "the graphs serve all vectors of one shape"
    torch.compiler.reset()


def test_an_expert_vector_is_merged_once_by_a_model_or_its_stack():
    """The causal model and its stack each kept their own account, so an expert could be applied twice."""
    model = random_model(tiny_config("everything"))
    expert = random_expert(model, 1)
    before = uncached_logits(model, random_ids())
    model.model.merge_expert_vector(expert)
    for attempt in (lambda: model.merge_expert_vector(expert), lambda: model(random_ids(), expert_vector=expert)):
        with pytest.raises(ValueError, match="unmerge_expert_vector"):
            attempt()
    with pytest.raises(ValueError, match="unmerge_expert_vector"):
        model(random_ids(), expert_vector=None)
    model.unmerge_expert_vector()
    assert torch.equal(uncached_logits(model, random_ids()), before)


def test_a_classifier_takes_expert_vectors_made_with_a_head():
    """Merging looked for an `lm_head` that a classifier does not have."""
    config = tiny_config("everything", num_labels=3, pad_token_id=0)
    classifier = MambaFormerForSequenceClassification(config).double().eval()
    expert = random_expert(random_model(config), 1)
    ids = random_ids(length=6).clamp(min=1)
    with torch.no_grad():
        on_the_fly = classifier(ids, expert_vector=expert).logits
        classifier.merge_expert_vector(expert)
        assert_same_logits(classifier(ids).logits, on_the_fly)
        padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
        assert_same_logits(classifier(padded).logits, on_the_fly)
        assert_same_logits(
            classifier(padded.flip(1), attention_mask=(padded != 0).flip(1)).logits, classifier(ids.flip(1)).logits
        )


@pytest.mark.parametrize("write", ["load", "train"])
def test_unmerging_never_mixes_two_models(write):
    """The modules that the expert had scaled got their old weights back, and all others kept the new ones."""
    model, other, ids = random_model(tiny_config("paper")), random_model(tiny_config("paper"), seed=1), random_ids()
    model.merge_expert_vector(random_expert(model, 1, modules=["model.layers.1.self_attn.q_proj"]))
    if write == "load":
        model.load_state_dict(other.state_dict())
    else:
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = uncached_logits(model, ids)
    with pytest.raises(ValueError, match="mix two models"):
        model.unmerge_expert_vector()
    assert_same_logits(uncached_logits(model, ids), before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_nothing_is_merged_into_a_computed_weight():
    """The merged weight was written into the value of a parametrization, which is computed anew."""
    model = random_model(tiny_config("everything"))
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[1].self_attn.v_proj, "weight", Doubled())
    with pytest.raises(ValueError, match="is parametrized"):
        model.merge_expert_vector(random_expert(model, 1, modules=["model.layers.1.self_attn.v_proj"]))


def test_weights_are_not_tied_while_an_expert_vector_is_merged():
    """Tying took the expert out of the head without a word."""
    model = random_model(tiny_config("paper"))
    model.merge_expert_vector(random_expert(model, 1))
    with pytest.raises(ValueError, match="unmerge_expert_vector"):
        model.tie_weights()
    model.unmerge_expert_vector()
    model.tie_weights()


def test_expert_vectors_of_a_checkpoint_outlive_its_folder(tmp_path):
    """They were read when first used, from a place that might be gone by then."""
    model = random_model(tiny_config("paper"))
    model.expert_vectors.add("bold", random_expert(model, 1))
    model.save_pretrained(tmp_path / "model")
    loaded = MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert loaded.expert_vectors["bold"] == model.expert_vectors["bold"]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/expert_vectors/bold.safetensors").is_file()
    MambaFormerForCausalLM(loaded.config).save_pretrained(tmp_path / "fresh")
    assert not (tmp_path / "fresh/experts").exists()
