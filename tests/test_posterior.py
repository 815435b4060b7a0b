"""Law 14: predictions under a posterior are the Bayes mixture, computed by brute force from single runs."""

import math
import random

import pytest
import torch

from mambaformer import DirichletPrior, ExpertPosterior, ExpertVector
from oracle import assert_same_logits, expected
from patterns import GREEDY, tiny_config
from sequences import draw_row, one_turn, padded_turn, ragged_turns, rows_of
from test_generate import left_padded
from tiny_models import every_pattern, random_expert, random_model, shared_expert, shared_model, without_kernels_too

PRIOR = [0.5, 0.2, 0.3]


def candidates_of(pattern):
    return [None, shared_expert(pattern, 1), shared_expert(pattern, 2, 3)]


def brute_force(model, row, candidates, prior, switching=0.0, **cache_fields):
    """Predictions (tokens, vocabulary) and probabilities (tokens, candidates) after each token, and the evidence."""
    logs = [expected(model, [row], [each], **cache_fields)[0].log_softmax(-1) for each in candidates]
    p, evidence, predictions, probabilities = list(prior), 0.0, [], []
    for t, token in enumerate(row):
        if t:
            joint = [weight * math.exp(log[t - 1, token].item()) for weight, log in zip(p, logs, strict=True)]
            evidence += math.log(sum(joint))
            p = [(1 - switching) * each / sum(joint) + switching * q for each, q in zip(joint, prior, strict=True)]
        probabilities.append(p)
        predictions.append(sum(weight * log[t].exp() for weight, log in zip(p, logs, strict=True)).log())
    return torch.stack(predictions), torch.tensor(probabilities, dtype=torch.float64), evidence


def fed(posterior, turns):
    """The predictions after the real tokens of each row."""
    found = [[] for _ in turns[0].ids]
    for turn in turns:
        predictions = posterior.feed(turn.ids, turn.mask.long())
        for row, real in enumerate(turn.mask):
            found[row].append(predictions[row, real])
    return [torch.cat(pieces) for pieces in found]


def assert_is_bayes(posterior, found, rows, prior, switching=0.0):
    """`found` has the predictions of the last tokens of each row."""
    for number, row in enumerate(rows):
        predictions, probabilities, evidence = brute_force(
            posterior.model, row, posterior.candidates, prior, switching
        )
        assert_same_logits(found[number], predictions[len(row) - len(found[number]) :])
        assert (posterior.probabilities[number] - probabilities[-1]).abs().max() < 1e-10
        assert abs(posterior.log_evidence[number].item() - evidence) < 1e-9 * max(1, abs(evidence))


@without_kernels_too
@every_pattern
@pytest.mark.parametrize("switching", [0.0, 0.1, 1.0])
def test_a_posterior_of_ragged_turns_equals_brute_force(pattern, switching):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    posterior = ExpertPosterior(model, candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64), switching)
    found = fed(posterior, ragged_turns(random.Random(3), rows, count=3))
    assert_is_bayes(posterior, found, rows, PRIOR, switching)
    assert posterior.history.shape == (3, posterior.get_seq_length(), 3)
    entropy = -(posterior.probabilities * posterior.probabilities.log()).sum(-1)
    assert (posterior.entropy - entropy).abs().max() < 1e-12


@every_pattern
def test_token_by_token_equals_one_forward(pattern, monkeypatch):
    model, row = shared_model(pattern), rows_of(pattern, 2)[0]
    posterior = model.make_posterior(candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64), switching=0.05)
    found = fed(posterior, [one_turn([[token]]) for token in row])
    assert_is_bayes(posterior, found, [row], PRIOR, 0.05)
    monkeypatch.setattr("mambaformer.expert_posterior_mambaformer.MOST_LOGITS", 4 * 3 * model.config.vocab_size)
    in_parts = model.make_posterior(candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64), switching=0.05)
    assert_is_bayes(in_parts, fed(in_parts, [one_turn([row])]), [row], PRIOR, 0.05)


@every_pattern
@pytest.mark.parametrize("removed", [[2, 2, 2], [3, 0, 1], [40, 0, 40]], ids=str)
def test_crop_takes_the_evidence_back_too(pattern, removed):
    model, rows, more = shared_model(pattern), rows_of(pattern, 4), rows_of(pattern, 5, (3, 2, 4))
    posterior = ExpertPosterior(model, candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64), 0.1)
    turns = [padded_turn(random.Random(1), rows, extra=1)]
    fed(posterior, turns)
    columns, mask = posterior.get_seq_length(), turns[0].mask
    removed = [min(number, columns) for number in removed]
    posterior.crop(-removed[0] if len(set(removed)) == 1 else [-number for number in removed])
    kept = [row[: mask[n, : columns - removed[n]].sum()] for n, row in enumerate(rows)]
    probabilities = [brute_force(model, row, posterior.candidates, PRIOR, 0.1)[1] for row in kept if row]
    found = [posterior.probabilities[n] for n, row in enumerate(kept) if row]
    assert all((one - other[-1]).abs().max() < 1e-10 for one, other in zip(found, probabilities, strict=True))
    found = fed(posterior, ragged_turns(random.Random(2), more, count=2))
    assert_is_bayes(posterior, found, [one + other for one, other in zip(kept, more, strict=True)], PRIOR, 0.1)


@every_pattern
def test_selected_rows_and_forks_continue_by_themselves(pattern):
    model, rows, more = shared_model(pattern), rows_of(pattern, 6), rows_of(pattern, 7, (3, 2, 4))
    posterior = ExpertPosterior(model, candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64))
    fed(posterior, [padded_turn(random.Random(1), rows)])
    fork = posterior.fork()
    fork.batch_select_indices([2, 0, 2])
    found = fed(fork, [padded_turn(random.Random(2), more)])
    assert_is_bayes(fork, found, [rows[at] + new for at, new in zip([2, 0, 2], more, strict=True)], PRIOR)
    found = fed(posterior, [padded_turn(random.Random(3), more)])
    assert_is_bayes(posterior, found, [old + new for old, new in zip(rows, more, strict=True)], PRIOR)


def generated_by_brute_force(model, row, candidates, prior, count, switching=0.0):
    for _ in range(count):
        row = [*row, brute_force(model, row, candidates, prior, switching)[0][-1].argmax().item()]
    return row


@every_pattern
def test_generation_under_the_mixture_equals_brute_force(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 8, (6, 3, 5))
    ids, mask = left_padded(rows)
    posterior = model.make_posterior(candidates_of(pattern), torch.tensor(PRIOR, dtype=torch.float64), switching=0.1)
    options = {"expert_posterior": posterior, "posterior_mode": "mixture", "max_new_tokens": 4, **GREEDY}
    answers = model.generate(ids, attention_mask=mask, **options)
    wanted = [generated_by_brute_force(model, row, posterior.candidates, PRIOR, 4, 0.1) for row in rows]
    assert [answer[ids.shape[1] :].tolist() for answer in answers] == [row[-4:] for row in wanted]
    again = torch.cat([answers, torch.tensor([[5], [6], [7]])], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    answers = model.generate(again, attention_mask=mask, **options)  # the next turn of the chat
    whole = [[*row, token] for row, token in zip(wanted, (5, 6, 7), strict=True)]
    wanted = [generated_by_brute_force(model, row, posterior.candidates, PRIOR, 4, 0.1) for row in whole]
    assert [answer[-4:].tolist() for answer in answers] == [row[-4:] for row in wanted]


@pytest.mark.parametrize("pattern", ["everything", "mamba", "sliding_sinks", "another_mixer"])
def test_speculation_under_the_mixture_changes_no_token(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 9, (5,))[0] * 3
    ids, candidates = torch.tensor([row]), candidates_of(pattern)
    options = {"posterior_mode": "mixture", "max_new_tokens": 12, **GREEDY}
    wanted = model.generate(ids, expert_posterior=candidates, **options)
    posterior = model.make_posterior(candidates)
    found = model.generate(ids, expert_posterior=posterior, prompt_lookup_num_tokens=3, **options)
    assert found.tolist() == wanted.tolist()
    text = found[0, : posterior.get_seq_length()].tolist()
    assert_is_bayes(posterior, [torch.empty(0, model.config.vocab_size)], [text], [1 / 3] * 3)


def test_beams_under_the_mixture_search_the_mixture():
    """The mixture of one candidate is the candidate."""
    model, ids = shared_model("everything"), torch.tensor(rows_of("everything", 9, (6, 6)))
    expert, options = shared_expert("everything", 1), {"num_beams": 3, "max_new_tokens": 6, **GREEDY}
    wanted = model.generate(ids, expert_vector=expert, **options)
    found = model.generate(ids, expert_posterior=[expert], posterior_mode="mixture", **options)
    assert found.tolist() == wanted.tolist()


@every_pattern
def test_choose_continues_with_the_best_candidate_of_each_row(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 10, (9, 6, 8))
    ids, mask = left_padded(rows)
    candidates = candidates_of(pattern)
    posterior = model.make_posterior(candidates)
    found = model.generate(ids, attention_mask=mask, expert_posterior=posterior, max_new_tokens=6, **GREEDY)
    best = [brute_force(model, row, candidates, [1 / 3] * 3)[1][-1].argmax().item() for row in rows]
    vectors = [candidates[number] for number in best]
    wanted = model.generate(ids, attention_mask=mask, expert_vector=vectors, max_new_tokens=6, **GREEDY)
    assert found.tolist() == wanted.tolist()
    assert posterior.get_seq_length() == ids.shape[1]
    mask = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    model.generate(found, attention_mask=mask, expert_posterior=posterior, max_new_tokens=2, **GREEDY)
    whole = [row + answer[-6:].tolist() for row, answer in zip(rows, found, strict=True)]
    assert_is_bayes(posterior, [torch.empty(0, model.config.vocab_size)] * 3, whole, [1 / 3] * 3)


def test_sample_draws_the_candidate_from_the_posterior():
    model, row = shared_model("everything"), rows_of("everything", 10, (2,))[0]
    candidates, ids = candidates_of("everything"), torch.tensor([row])
    probabilities = brute_force(model, row, candidates, [1 / 3] * 3)[1][-1]
    options = {"max_new_tokens": 5, **GREEDY}
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = probabilities.multinomial(1).item()
        seen.add(drawn)
        torch.manual_seed(seed)
        found = model.generate(ids, expert_posterior=candidates, posterior_mode="sample", **options)
        assert found.tolist() == model.generate(ids, expert_vector=candidates[drawn], **options).tolist()
    assert len(seen) > 1


@every_pattern
def test_blend_continues_the_states_of_the_best_candidate(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 11, (8,))[0]
    candidates = candidates_of(pattern)
    probabilities = brute_force(model, row, candidates, [1 / 3] * 3)[1][-1].tolist()
    parts = [(p, each) for p, each in zip(probabilities, candidates, strict=True) if each is not None]
    best, blend = candidates[probabilities.index(max(probabilities))], ExpertVector.blend(parts)
    output = model.generate(
        torch.tensor([row]),
        expert_posterior=candidates,
        posterior_mode="blend",
        max_new_tokens=4,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    text = output.sequences[0].tolist()
    wanted = expected(model, [text], [[(0, best), (len(row) - 1, blend)]])[0][len(row) - 1 : -1]
    assert_same_logits(torch.cat(output.logits), wanted, 1e-6)  # scales of a blend are rounded to float32


def test_the_mixture_loses_no_more_than_the_prior_of_a_candidate():
    """-log prior_k nats over the whole sequence, so log K against the base under a uniform prior."""
    model, rows = shared_model("everything"), rows_of("everything", 12, (30, 25))
    candidates, prior = candidates_of("everything"), {None: 0.01, "one": 0.98, "two": 0.01}
    named = [each and ExpertVector(each.vectors, name) for name, each in zip(prior, candidates, strict=True)]
    posterior = model.make_posterior(named, prior)
    posterior.observe(*(lambda turn: (turn.ids, turn.mask))(padded_turn(random.Random(1), rows)))
    for number, row in enumerate(rows):
        for weight, candidate in zip(prior.values(), candidates, strict=True):
            alone = brute_force(model, row, [candidate], [1.0])[2]
            assert posterior.log_evidence[number] >= alone + math.log(weight) - 1e-9


def test_a_posterior_as_a_prior_continues_it():
    model, first, second = shared_model("llama"), *rows_of("llama", 13, (9, 7))
    earlier = model.make_posterior(candidates_of("llama"))
    earlier.observe(torch.tensor([first]))
    later = model.make_posterior(candidates_of("llama"), prior=earlier)
    later.observe(torch.tensor([second]))
    prior = brute_force(model, first, earlier.candidates, [1 / 3] * 3)[1][-1].tolist()
    assert_is_bayes(later, [torch.empty(0, model.config.vocab_size)], [second], prior)


def test_improbable_candidates_are_dropped_within_the_bound(monkeypatch):
    monkeypatch.setattr("mambaformer.expert_posterior_mambaformer.TOKENS_PER_DROP", 4)
    model, row = shared_model("everything"), draw_row(shared_model("everything"), random.Random(1), 24)
    candidates = candidates_of("everything")
    posterior = ExpertPosterior(model, candidates, drop_below=1e-3)
    posterior.observe(torch.tensor([row]))
    exact = brute_force(model, row, candidates, [1 / 3] * 3)
    assert len(posterior.active) < 3 and posterior.rows.cache.batch_size == len(posterior.active)
    assert abs(posterior.log_evidence.item() - exact[2]) < 2e-3
    assert (posterior.probabilities - exact[1][-1]).abs().max() < 2e-3
    assert posterior.probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_evidence_of_other_weights_is_computed_again():
    model = random_model(tiny_config("everything"))
    candidates, row = [None, random_expert(model, 1)], rows_of("everything", 14)[0]
    posterior = model.make_posterior(candidates)
    posterior.observe(torch.tensor([row[:8]]))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
        model.model.layers[0].mamba.in_proj.weight.mul_(0.9)
    found = fed(posterior, [one_turn([row[8:]])])
    assert_is_bayes(posterior, found, [row], [0.5, 0.5])


@pytest.mark.parametrize("is_long", [False, True])
def test_a_forward_that_fails_leaves_the_posterior_as_it_was(is_long, monkeypatch):
    model, row = shared_model("everything"), rows_of("everything", 15)[0]
    if is_long:
        monkeypatch.setattr("mambaformer.expert_posterior_mambaformer.MOST_LOGITS", 3 * model.config.vocab_size)
    posterior = model.make_posterior(candidates_of("everything"))
    posterior.observe(torch.tensor([row[:6]]))
    before = posterior.probabilities
    for part in (model.model.layers[-1], model.lm_head):
        calls = []

        def fail(*_, calls=calls):
            calls.append(0)
            if len(calls) > is_long:
                raise RuntimeError("interrupted")

        handle = part.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            posterior.feed(torch.tensor([row[6:9]]))
        handle.remove()
        assert posterior.get_seq_length() == 6 and torch.equal(posterior.probabilities, before)
    found = fed(posterior, [one_turn([row[6:]])])
    assert_is_bayes(posterior, found, [row], [1 / 3] * 3)


def test_evidence_that_is_no_number_is_refused_and_changes_nothing():
    model = random_model(tiny_config("llama"))
    posterior = model.make_posterior([None, random_expert(model, 1)])
    posterior.observe(torch.tensor([[1, 2, 3]]))
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(ValueError, match="no likelihood under any candidate"):
        posterior.observe(torch.tensor([[4, 5]]))
    handle.remove()
    assert_is_bayes(posterior, fed(posterior, [one_turn([[4, 5]])]), [[1, 2, 3, 4, 5]], [0.5, 0.5])


@pytest.mark.parametrize("pattern", ["everything", "mamba", "llama"])
def test_a_saved_posterior_continues_bit_for_bit(pattern, tmp_path):
    model, rows, more = shared_model(pattern), rows_of(pattern, 16), rows_of(pattern, 17, (3, 2, 4))
    prior = torch.tensor([PRIOR, [0.1, 0.1, 0.8], PRIOR], dtype=torch.float64)
    posterior = model.make_posterior(candidates_of(pattern), prior, 0.1)
    fed(posterior, [padded_turn(random.Random(1), rows)])
    posterior.save(tmp_path / "posterior")
    loaded = ExpertPosterior.load(tmp_path / "posterior", model)
    turns = [padded_turn(random.Random(2), more)]
    for found, wanted in zip(fed(loaded, turns), fed(posterior, turns), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(loaded.history, posterior.history)
    assert torch.equal(loaded.log_evidence, posterior.log_evidence)
    assert loaded.names == posterior.names


def test_a_file_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    model = random_model(tiny_config("everything"))
    posterior = model.make_posterior([None, random_expert(model, 1, name="one")])
    posterior.observe(torch.tensor([[1, 2, 3]]))
    posterior.save(tmp_path / "posterior")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="weights"):
        ExpertPosterior.load(tmp_path / "posterior", model)
    with pytest.raises(ValueError, match="another model head"):
        ExpertPosterior.load(tmp_path / "posterior", random_model(tiny_config("everything"), seed=1))
    content = bytearray((tmp_path / "posterior").read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        ExpertPosterior.load(tmp_path / "damaged", model)


def test_what_does_not_fit_is_refused():
    model, other = shared_model("everything"), shared_expert("llama", 1)
    expert = ExpertVector(shared_expert("everything", 1).vectors, "a")
    for candidates, message in [
        ([], "at least one"),
        ("a", "must be a list"),
        ([other], "model"),
        ([expert, ExpertVector(expert.vectors, "b")], "same content"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.make_posterior(candidates)
    for prior, message in [
        ({"b": 1.0}, r"names \['b'\]"),
        ({"a": 0.4}, "add up to 1"),
        (torch.tensor([0.5, float("nan")]), "add up to 1"),
        (torch.tensor([1.5, -0.5]), "at least 0"),
        (torch.tensor([1.0]), r"\(2,\) or \(rows, 2\)"),
        (model.make_posterior([expert]), "posterior over"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.make_posterior([None, expert], prior)
    with pytest.raises(TypeError, match="`prior`"):
        model.make_posterior([None, expert], 0.5)
    for rates in (
        {"switching": 1.1},
        {"drop_below": 1.0},
        {"switching": -0.1},
        {"drop_below": True},
        {"switching": 0.1, "drop_below": 0.1},
    ):
        with pytest.raises(ValueError, match=r"`switching`|`drop_below`"):
            model.make_posterior([None, expert], **rates)
    posterior, ids = model.make_posterior([None, expert]), torch.tensor([[1, 2, 3]])
    posterior.observe(ids)
    for options, message in [
        ({"posterior_mode": "best"}, "must be one of"),
        ({"expert_vector": expert}, "leave other ones out"),
        ({"cache": model.make_cache()}, "a dynamic cache of its own"),
        ({"cache_implementation": "static"}, "a dynamic cache of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, expert_posterior=posterior, max_new_tokens=1, **GREEDY, **options)
    with pytest.raises(ValueError, match="must start with the 3 columns"):
        model.generate(torch.tensor([[1, 2, 4, 5]]), expert_posterior=posterior, max_new_tokens=1, **GREEDY)
    with pytest.raises(ValueError, match="another model"):
        shared_model("llama").generate(ids, expert_posterior=posterior, max_new_tokens=1, **GREEDY)
    for removed in (1, -4, [-1, -1]):
        with pytest.raises(ValueError, match="`crop` takes"):
            posterior.crop(removed)
    for rows in ([1], [-1], []):
        with pytest.raises(ValueError, match="rows 0 to 0"):
            posterior.batch_select_indices(rows)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        posterior.feed(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))
    assert posterior.get_seq_length() == 3
    wanted = model.make_posterior([None, expert]).feed(torch.tensor([[1, 2, 3, 4]]))[:, -1]
    found = posterior.feed(torch.tensor([[-100, 4]]), torch.tensor([[0, 1]]))[:, -1]  # the id of padding is not read
    assert_same_logits(found, wanted)


def test_a_dirichlet_prior_learns_from_past_sequences(tmp_path):
    model, rows = shared_model("llama"), rows_of("llama", 18, (9, 7))
    named = [None, *(ExpertVector(shared_expert("llama", n).vectors, f"expert {n}") for n in (1, 2))]
    prior = DirichletPrior({None: 1.0, "expert 1": 2.0, "expert 2": 1.0})
    counts = [1.0, 2.0, 1.0]
    for row in rows:
        posterior = model.make_posterior(named, prior)
        posterior.observe(torch.tensor([row]))
        mean = [count / sum(counts) for count in counts]
        shares = brute_force(model, row, named, mean)[1][-1].tolist()
        prior = posterior.learned_prior(prior)
        counts = [count + share for count, share in zip(counts, shares, strict=True)]
    assert list(prior.counts.values()) == pytest.approx(counts, abs=1e-10)
    prior.save(tmp_path / "prior.json")
    assert DirichletPrior.load(tmp_path / "prior.json").counts == prior.counts
    assert sum(prior.values()) == pytest.approx(1, abs=1e-12)


def test_counts_and_files_that_are_no_prior_are_refused(tmp_path):
    for counts in ({}, {"a": 0}, {"a": float("nan")}, {1: 2.0}, {"a": True}):
        with pytest.raises(ValueError, match="`counts` must map"):
            DirichletPrior(counts)
    prior, posterior = DirichletPrior({"a": 1}), shared_model("llama").make_posterior([None])
    with pytest.raises(ValueError, match="`update` takes"):
        prior.update(posterior)
    for content in ("", "[]", '{"format": "mambaformer.prior", "counts": [["a", -1]]}', '{"format": "another"}'):
        (tmp_path / "prior.json").write_text(content)
        with pytest.raises(ValueError, match="is not a prior"):
            DirichletPrior.load(tmp_path / "prior.json")
    assert prior.counts == {"a": 1.0}
