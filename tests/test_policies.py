"""Pruning policies by themselves: scores of hand-made keys, budgets, names and refusals."""

import json

import pytest
import torch

import mambaformer
from mambaformer.cache_eviction_mambaformer import PrunedRetention
from mambaformer.cache_policies_mambaformer import (
    POLICIES,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    SinksAndWindow,
    SnapKV,
    policy_fields,
    resolve_policy,
    split_budget,
)

KEYS = torch.tensor([[[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]]], dtype=torch.float64)  # (1, 1, 4, 2)
NO_QUERIES = KEYS.new_zeros(0)


def queries_of(*vectors):
    """Queries (1, 1, 1, window, 2) of one head."""
    return torch.tensor(vectors, dtype=torch.float64)[None, None, None]


def test_key_norm_ranks_the_shortest_key_highest():
    scores = KeyNorm().score(KEYS, KEYS, NO_QUERIES)
    assert scores.tolist() == [[[-5.0, -1.0, -2.0, -1.0]]]


def test_key_diff_ranks_the_key_least_like_the_others_highest():
    scores = KeyDiff().score(KEYS, KEYS, NO_QUERIES)[0, 0]
    directions = KEYS[0, 0] / KEYS[0, 0].norm(dim=-1, keepdim=True)
    mean = directions.mean(0)
    torch.testing.assert_close(scores, -(directions @ mean) / mean.norm())
    assert scores.argmax() == 1


def test_tova_scores_by_the_newest_query():
    scores = TOVA().score(KEYS, KEYS, queries_of([0.0, 1.0]))
    torch.testing.assert_close(scores[0, 0], torch.tensor([4.0, 0.0, 2.0, 1.0], dtype=torch.float64).softmax(0))


def test_attention_is_averaged_over_the_heads_of_a_group():
    one, other = queries_of([0.0, 1.0]), queries_of([1.0, 0.0])
    both = TOVA().score(KEYS, KEYS, torch.cat([one, other], dim=2))
    mean = (TOVA().score(KEYS, KEYS, one) + TOVA().score(KEYS, KEYS, other)) / 2
    torch.testing.assert_close(both, mean)


def test_snap_kv_votes_are_causal_and_pooled():
    queries = queries_of([0.0, 1.0], [1.0, 0.0])  # of the two newest keys
    votes = torch.zeros(4, dtype=torch.float64)
    votes[:3] += KEYS[0, 0, :3, 1].softmax(0) / 2  # the first query does not see the newest key
    votes += KEYS[0, 0, :, 0].softmax(0) / 2
    plain = SnapKV(window=2, kernel_size=1).score(KEYS, KEYS, queries)
    torch.testing.assert_close(plain[0, 0], votes)
    pooled = SnapKV(window=2, kernel_size=3).score(KEYS, KEYS, queries)
    wanted = [max(votes[max(n - 1, 0) : n + 2]) for n in range(4)]
    torch.testing.assert_close(pooled[0, 0], torch.stack(wanted))


def test_expected_attention_is_the_mean_of_exponentials_under_a_gaussian():
    queries, values = queries_of([0.0, 1.0], [1.0, 0.0], [0.5, -1.0]), KEYS + torch.tensor([1.0, 0.0])
    mean, covariance = queries[0, 0, 0].mean(0), torch.cov(queries[0, 0, 0].T, correction=0)
    keys = KEYS[0, 0]
    exponentials = torch.stack([(mean @ key + key @ covariance @ key / 2).exp() for key in keys])
    wanted = (exponentials / exponentials.sum() + 0.1) * values[0, 0].norm(dim=-1)
    policy = ExpectedAttention(window=3, epsilon=0.1)
    torch.testing.assert_close(policy.score(KEYS, values, queries)[0, 0], wanted)


def test_sinks_and_window_ranks_by_position():
    assert SinksAndWindow().score(KEYS, KEYS, NO_QUERIES).tolist() == [[[0.0, 1.0, 2.0, 3.0]]]


@pytest.mark.parametrize("budget, kept", [(4, [4, 4, 4]), (0.5, [3, 5, 8]), (1.0, [5, 10, 15]), (0.1, [3, 3, 3])])
def test_a_budget_is_a_number_or_a_share_rounded_up(budget, kept):
    retention = PrunedRetention.with_budget(budget, interval=5, protected=3)
    assert [retention.kept(tokens) for tokens in (5, 10, 15)] == kept
    assert [retention.stored(tokens) for tokens in (0, 4, 5, 8)] == [0, 4, kept[0], kept[0] + 3]


@pytest.mark.parametrize("budget", [4, 9, 0.3, 0.9])
def test_slots_are_enough_for_every_shorter_row(budget):
    retention = PrunedRetention.with_budget(budget, interval=4, protected=2)
    for columns in range(30):
        most = max(retention.stored(tokens) for tokens in range(columns + 1))
        assert retention.num_slots(columns) == most


def test_budgets_of_layers_are_a_list_or_a_dict():
    assert KeyNorm(budget=40).budgets(2) == [40, 40]
    assert KeyNorm(budget=[0.5, None]).budgets(2) == [0.5, None]
    assert KeyNorm(budget={1: 0.25}).budgets(3) == [None, 0.25, None]
    with pytest.raises(ValueError, match="2 entries and the model has 3 layers"):
        KeyNorm(budget=[0.5, 0.5]).budgets(3)
    with pytest.raises(ValueError, match=r"names the layers \[3\]"):
        KeyNorm(budget={3: 0.5}).budgets(3)


def test_a_split_budget_keeps_all_keys_where_most_is_lost():
    assert split_budget(40, [0.1, 0.9, 0.5, 0.2], context=100, least=10) == [10, None, 40, 10]
    assert split_budget(10, [1.0, 2.0], context=100, least=10) == [10, 10]
    assert split_budget(100, [1.0, 2.0], context=100, least=10) == [None, None]
    assert KeyNorm(budget=split_budget(50, [1.0, 2.0], context=60, least=40)).budgets(2) == [40, None]
    for budget, losses, context, least in ((5, [1.0], 10, 6), (11, [1.0], 10, 6), (5, [], 10, 1), (5, [1.0], 10, 0)):
        with pytest.raises(ValueError, match="A split needs"):
            split_budget(budget, losses, context, least)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_known_by_its_name_and_survives_json(name):
    policy = POLICIES[name](budget={2: 0.25}, interval=64)
    assert resolve_policy(json.loads(json.dumps(policy_fields(policy)))) == policy
    assert resolve_policy(name, 0.25) == POLICIES[name](budget=0.25)
    assert getattr(mambaformer, type(policy).__name__) is type(policy)


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, 8, True, "half", float("nan"), [0.5, 0], {0: 0.0}, (0.5, "x")])
def test_budgets_that_keep_nothing_or_too_little_are_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        KeyNorm(budget=budget)


@pytest.mark.parametrize(
    "kind, fields",
    [
        (KeyNorm, {"interval": 0}),
        (KeyNorm, {"sinks": -1}),
        (KeyNorm, {"recent": 1.0}),
        (SnapKV, {"window": 200}),
        (SnapKV, {"kernel_size": 4}),
        (ExpectedAttention, {"window": 200}),
        (ExpectedAttention, {"epsilon": -0.1}),
        (ExpectedAttention, {"epsilon": float("nan")}),
    ],
)
def test_bad_fields_are_refused(kind, fields):
    with pytest.raises(ValueError, match=r"must be an integer|SnapKV votes|ExpectedAttention reads|must be a finite"):
        kind(**fields)


@pytest.mark.parametrize("policy", ["h2o", {"budget": 0.5}, {"name": "key_norm", "window": 3}, 7, KeyNorm])
def test_unknown_policies_and_fields_are_refused(policy):
    with pytest.raises(ValueError, match="policy"):
        resolve_policy(policy)


def test_a_budget_without_a_policy_is_refused():
    with pytest.raises(ValueError, match="belongs to a policy"):
        resolve_policy(None, 0.5)
