"""The rooms of the cache by themselves: provenance decides without a model, and every store keeps the protocol."""

import inspect

import pytest
import torch

from mambaformer import MambaFormerCache
from mambaformer.cache_history_mambaformer import (
    Action,
    CacheLengths,
    Encoding,
    NewTokens,
    Provenance,
    Status,
    TokenHistory,
    make_removal,
)
from mambaformer.cache_layers_mambaformer import CacheStore
from mambaformer.cache_options_mambaformer import CacheOptions
from patterns import tiny_config

BASE, OTHER = ("base", "weights"), ("other", "weights")
FILLED, EMPTY = CacheLengths(columns=3, rows=1), CacheLengths()


def provenance_of(policy, encoded=BASE, in_force=BASE):
    provenance = Provenance(policy)
    encoded = None if encoded is None else Encoding(*encoded)
    provenance.restore(None, Encoding(*in_force), encoded, is_mixed=False)
    return provenance


def plan(provenance, encoding, lengths=FILLED):
    return provenance.decide_change("expert", *encoding, lengths, TokenHistory(tiny_config("mamba")))


@pytest.mark.parametrize(("policy", "action"), [
    ("recompute", Action.RECOMPUTE), ("reset", Action.RESET), ("continue", Action.MIX),
])  # fmt: skip
@pytest.mark.parametrize("encoding", [OTHER, ("base", "other weights")])
def test_a_change_is_treated_as_the_policy_says(policy, action, encoding):
    change = plan(provenance_of(policy), encoding)
    assert (change.action, change.expert_vector, change.encoding) == (action, "expert", Encoding(*encoding))


@pytest.mark.parametrize("policy", ["recompute", "reset", "continue", "error"])
def test_without_a_change_or_without_tokens_the_states_are_kept(policy):
    provenance = provenance_of(policy)
    assert plan(provenance, BASE).action is Action.KEEP
    assert plan(provenance, BASE).encoding is provenance.encoded  # a compiled step compares identities
    assert plan(provenance, OTHER, EMPTY).action is Action.KEEP


@pytest.mark.parametrize("policy", ["recompute", "reset", "continue", "error"])
def test_states_that_a_crop_lost_are_computed_again_under_every_policy(policy):
    provenance = provenance_of(policy, encoded=None)
    assert provenance.status is Status.STALE
    assert plan(provenance, BASE).action is Action.RECOMPUTE


def test_a_change_is_refused_where_it_cannot_be_followed():
    with pytest.raises(ValueError, match="expert vector changed while 3 columns"):
        plan(provenance_of("error"), OTHER)
    with pytest.raises(ValueError, match="weights changed"):
        plan(provenance_of("error"), ("base", "other weights"))
    with pytest.raises(ValueError, match="feed a token first"):
        plan(provenance_of("continue", encoded=None), OTHER)


def test_a_change_takes_place_at_its_commit():
    provenance = provenance_of("continue")
    change = plan(provenance, OTHER)
    assert provenance.status is Status.CURRENT and provenance.expert_vector is None
    provenance.put_in_force(change)
    assert provenance.status is Status.DIVERGED and not provenance.is_uniform
    provenance.commit(change)
    assert provenance.status is Status.CURRENT and provenance.is_mixed and not provenance.is_uniform
    assert provenance_of("recompute", encoded=OTHER).status is Status.STALE


def test_a_removal_counts_real_tokens_and_not_padding():
    history, lengths = TokenHistory(tiny_config("mamba")), CacheLengths()
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    history.append(lengths, NewTokens(torch.ones(2, 4, dtype=torch.long), mask))
    lengths = CacheLengths(columns=4, tokens_seen=mask.sum(1), rows=2)
    removal = make_removal([-2, -1], lengths, history)
    assert (removal.tokens.tolist(), removal.most, removal.columns_left) == ([1, 1], 1, 3)
    history.crop(removal)
    lengths.crop(removal, "cpu")
    assert (lengths.columns, lengths.tokens_seen.tolist(), lengths.overshoot) == (3, [1, 3], 1)
    assert history.read(lengths).mask.tolist() == [[False, True, False], [True, True, True]]


@pytest.mark.parametrize("options", [{}, {"storage": "static", "max_cache_len": 8}])
def test_every_store_keeps_the_protocol(options):
    methods = {name: each for name, each in vars(CacheStore).items() if inspect.isfunction(each) and name[0] != "_"}
    assert {"update", "commit", "discard", "crop", "select_rows", "fork", "state", "load_state", "spec"} < set(methods)
    kinds = set()
    for _, store in MambaFormerCache(tiny_config("everything"), CacheOptions(**options)).stores():
        kinds.add(type(store).__name__)
        for name, method in methods.items():
            wanted = list(inspect.signature(method).parameters)
            own = inspect.signature(getattr(type(store), name)).parameters
            is_free = wanted == ["self", "args", "kwargs"] or any(
                each.kind is each.VAR_POSITIONAL for each in own.values()
            )
            assert is_free or len(own) == len(wanted), (type(store), name)
    assert kinds == {"KeyValueStore", "RecurrentStore"}
