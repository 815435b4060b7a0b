"""Laws of a posterior in flight: whatever was done before, it is the Bayes mixture of what its rows hold now."""

import math
import random
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

from mambaformer import ExpertPosterior, ExpertVector
from mambaformer.expert_posterior_mambaformer import stamps_of
from oracle import assert_same_logits
from patterns import GREEDY, tiny_config
from sequences import Turn, draw_row, one_turn, rows_of
from test_posterior import PRIOR, assert_is_bayes, brute_force, candidates_of, fed
from tiny_models import every_pattern, new_model, random_expert, random_model, shared_expert, shared_model

PRUNED = {"name": "tova", "budget": 4, "interval": 3, "sinks": 1, "recent": 1}
STORAGES = {
    "dense": {},
    "codes": {"kv_bits": {"keys": 6, "values": 4}},
    "codes_of_states": {"state_bits": 8},
    "pruned": {"policy": PRUNED},
    "all": {"kv_bits": {"keys": 8, "values": 5}, "state_bits": 8, "policy": PRUNED},
}


@dataclass
class Told:
    """A posterior and what it has been told: the columns of each row, a token or `None` for padding, and its prior."""

    posterior: ExpertPosterior
    columns: list[list[int | None]]
    priors: list[list[float]]

    def tokens(self, row):
        return [token for token in self.columns[row] if token is not None]

    def fork(self):
        return Told(self.posterior.fork(), [list(row) for row in self.columns], list(self.priors))


class Program:
    """Random operations on a pool of posteriors of one model; `storage` changes logits, as the oracle does too."""

    OPERATIONS = ("feed", "feed", "feed", "step", "crop", "crop_rows", "select", "fork", "save", "weights", "refused")

    def __init__(self, pattern, storage, seed, folder, switching, rows=3):
        self.draw, self.folder, self.storage, self.switching = random.Random(seed), folder, storage, switching
        self.model = new_model(pattern)
        self.candidates = [None, random_expert(self.model, 1), random_expert(self.model, 2, 3)]
        priors = [[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [1 / 3] * 3][:rows]
        reach = self.draw.choice([0, 1, 6])
        prior, options = torch.tensor(priors, dtype=torch.float64), {"rollback_reach": reach, **storage}
        posterior = self.model.make_posterior(self.candidates, prior, switching, **options)
        self.pool = [Told(posterior, [[] for _ in priors], priors)]

    def run(self, count):
        for _ in range(count):
            told = self.draw.choice(self.pool)
            operation = self.draw.choice(self.OPERATIONS)
            if self.draw_is_possible(told, operation):
                getattr(self, operation)(told)
                for each in self.pool:
                    self.judge(each)
        for told in self.pool:
            self.feed(told)
            self.judge(told)

    def draw_is_possible(self, told, operation):
        return operation in ("feed", "select") or any(told.columns)

    def judge(self, told):
        """All beliefs and evidence of all columns against brute force."""
        posterior, history = told.posterior, told.posterior.history
        if posterior.weights is not None and posterior.weights != stamps_of(self.model):
            return  # of weights that have changed: see `weights`
        for row, prior in enumerate(told.priors):
            _, after, evidence = self.truth(told, row)
            wanted, seen = [], 0
            for token in told.columns[row]:
                seen += token is not None
                wanted.append(after[seen - 1] if seen else torch.tensor(prior, dtype=torch.float64))
            if wanted:
                assert history[row].shape == (len(wanted), 3)
                assert (history[row] - torch.stack(wanted)).abs().max() < 1e-9
                assert abs(posterior.log_evidence[row].item() - evidence) < 1e-9 * max(1, abs(evidence))

    def truth(self, told, row):
        prior, tokens = told.priors[row], told.tokens(row)
        if not tokens:
            return torch.empty(0), torch.empty(0), 0.0
        return brute_force(self.model, tokens, self.candidates, prior, self.switching, **self.storage)

    # ---- operations

    def feed(self, told, width=None):
        width = width or self.draw.randint(1, 5)
        pieces = [draw_row(self.model, self.draw, width) for _ in told.columns]
        mask = torch.tensor([[self.draw.random() < 0.7 for _ in range(width)] for _ in pieces])
        before = [len(told.tokens(row)) for row in range(len(pieces))]
        for row, piece in enumerate(pieces):
            told.columns[row] += [t if real else None for t, real in zip(piece, mask[row].tolist(), strict=True)]
        found = fed(told.posterior, [Turn(torch.tensor(pieces), mask)])
        for row, start in enumerate(before):
            if len(told.tokens(row)) > start:
                assert_same_logits(found[row], self.truth(told, row)[0][start:])

    def step(self, told):
        self.feed(told, width=1)

    def crop(self, told):
        number = self.draw.randint(0, min(4, len(told.columns[0])))
        told.posterior.crop(-number)
        told.columns = [row[: len(row) - number] for row in told.columns]

    def crop_rows(self, told):
        width = len(told.columns[0])
        numbers = [self.draw.choice([0, 1, 3, width]) for _ in told.columns]
        numbers = [min(number, width) for number in numbers]
        told.posterior.crop([-number for number in numbers])
        left = width - min(numbers)
        told.columns = [
            row[: width - number] + [None] * (left - width + number)
            for row, number in zip(told.columns, numbers, strict=True)
        ]

    def select(self, told):
        rows = [self.draw.randrange(len(told.columns)) for _ in range(self.draw.randint(1, 3))]
        if self.draw.random() < 0.3 and len(told.columns) < 3:
            told.posterior.batch_repeat_interleave(2)
            rows = [row for row in range(len(told.columns)) for _ in range(2)]
        elif self.draw.random() < 0.5:
            told.posterior.reorder_cache(torch.tensor(rows))
        else:
            told.posterior.batch_select_indices(rows)
        told.columns = [list(told.columns[row]) for row in rows]
        told.priors = [told.priors[row] for row in rows]

    def fork(self, told):
        self.pool = [*self.pool[-2:], told.fork()]

    def save(self, told):
        told.posterior.save(self.folder / "posterior")
        told.posterior = ExpertPosterior.load(self.folder / "posterior", self.model)

    def weights(self, told):
        """What was observed under other weights is observed again when it is next used, by whatever uses it."""
        with torch.no_grad():
            self.draw.choice(list(self.model.parameters())).mul_(1 + 0.2 * self.draw.random())
        use = self.draw.choice(["feed", "step", "choose", "save", "refresh"])
        getattr(told.posterior, use)() if use in ("choose", "refresh") else getattr(self, use)(told)
        self.judge(told)
        assert told.posterior.weights == stamps_of(self.model)

    def refused(self, told):
        rows, before = len(told.columns), told.posterior.history
        handle = self.model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
        try:
            with pytest.raises(ValueError, match="no likelihood under any candidate"):
                told.posterior.observe(torch.ones(rows, 2, dtype=torch.long))
        finally:
            handle.remove()
        with pytest.raises(ValueError, match="The posterior has"):
            told.posterior.observe(torch.ones(rows + 1, 2, dtype=torch.long))
        with pytest.raises(ValueError, match="`crop` takes"):
            told.posterior.crop(-len(told.columns[0]) - 1)
        assert torch.equal(told.posterior.history, before)


@every_pattern
def test_after_any_program_a_posterior_is_the_mixture(pattern, tmp_path):
    Program(pattern, {}, len(pattern), tmp_path, switching=0.1 * (len(pattern) % 2)).run(15)


@pytest.mark.parametrize("storage", STORAGES)
def test_after_any_program_on_any_storage_too(storage, tmp_path):
    Program("everything", STORAGES[storage], 1, tmp_path, switching=0.05).run(15)


def test_decisions_and_files_never_use_evidence_of_other_weights(tmp_path):
    """`choose` and `save` once used it: a loaded posterior continued from probabilities that no weights gave."""
    model = random_model(tiny_config("everything"))
    candidates, row = [None, random_expert(model, 1), random_expert(model, 2)], rows_of("everything", 14)[0]
    posterior = model.make_posterior(candidates)
    posterior.observe(torch.tensor([row]))
    for factor in (-1.0, 0.6):
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        wanted = brute_force(model, row, candidates, [1 / 3] * 3)[1][-1]
        fork = posterior.fork()
        assert fork.choose()[1] == [candidates[wanted.argmax()]]
        assert (fork.probabilities[0] - wanted).abs().max() < 1e-10
        posterior.save(tmp_path / "posterior")
        loaded = ExpertPosterior.load(tmp_path / "posterior", model)
        assert_is_bayes(loaded, fed(loaded, [one_turn([[5]])]), [[*row, 5]], [1 / 3] * 3)


def test_merged_weights_are_refused_and_unmerged_ones_continue():
    model = random_model(tiny_config("everything"))
    candidates, row = [None, random_expert(model, 1)], rows_of("everything", 15)[0]
    posterior = model.make_posterior(candidates)
    posterior.observe(torch.tensor([row[:6]]))
    before = posterior.history
    model.merge_expert_vector(candidates[1])
    for use in (lambda: posterior.observe(torch.tensor([[1]])), posterior.choose, posterior.refresh):
        with pytest.raises(ValueError, match="unmerge"):
            use()
    assert torch.equal(posterior.history, before)
    model.unmerge_expert_vector()
    assert_is_bayes(posterior, fed(posterior, [one_turn([row[6:]])]), [row], [0.5, 0.5])


def test_replacing_a_named_vector_does_not_change_a_posterior_in_flight():
    model = random_model(tiny_config("everything"))
    row, experts = rows_of("everything", 16)[0], [random_expert(model, seed, name="one") for seed in (1, 2)]
    model.expert_vectors.add(experts[0])
    posterior = model.make_posterior([None, "one"])
    found = fed(posterior, [one_turn([row[:6]])])
    del model.expert_vectors["one"]
    model.expert_vectors.add(experts[1])
    found = [torch.cat([found[0], fed(posterior, [one_turn([row[6:]])])[0]])]
    assert posterior.candidates == [None, experts[0]]
    assert_is_bayes(posterior, found, [row], [0.5, 0.5])


CONTINUE = """
import sys
import torch
from mambaformer import ExpertPosterior, MambaFormerForCausalLM

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
model = MambaFormerForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
posterior = ExpertPosterior.load(sys.argv[2], model)
predictions = posterior.feed(torch.tensor([[3, 1, 4], [1, 5, 9]]))
torch.save([predictions, posterior.history, posterior.log_evidence, posterior.active], sys.argv[3])
"""


@pytest.mark.slow
def test_a_fresh_process_continues_a_posterior_bit_for_bit(tmp_path, monkeypatch):
    """Also behind a crop, with a candidate that was dropped."""
    monkeypatch.setattr("mambaformer.expert_posterior_mambaformer.TOKENS_PER_DROP", 4)
    model = random_model(tiny_config("everything"))
    model.save_pretrained(tmp_path / "model")
    rows = rows_of("everything", 17, (9, 9))
    hopeless = ExpertVector({"lm_head": torch.full((1,), 30.0)})
    posterior = model.make_posterior([None, random_expert(model, 1), hopeless], drop_below=1e-9)
    posterior.observe(torch.tensor(rows))
    assert len(posterior.active) == 2, posterior.probabilities
    posterior.crop([-2, -3])
    posterior.save(tmp_path / "posterior")
    arguments = [tmp_path / name for name in ("model", "posterior", "results")]
    subprocess.run([sys.executable, "-c", CONTINUE, *arguments], check=True, timeout=600)
    predictions, history, log_evidence, active = torch.load(tmp_path / "results")
    assert torch.equal(predictions, posterior.feed(torch.tensor([[3, 1, 4], [1, 5, 9]])))
    assert torch.equal(history, posterior.history) and torch.equal(log_evidence, posterior.log_evidence)
    assert active == posterior.active


def test_two_threads_with_two_posteriors_of_one_model_do_not_meet():
    model, candidates = shared_model("everything"), candidates_of("everything")
    rows, barrier, found = rows_of("everything", 18, (12, 12)), threading.Barrier(3, timeout=60), [None] * 3

    def observe(which):
        torch.set_num_threads(1)
        posterior = model.make_posterior(candidates[: which + 2])
        for token in rows[which]:
            barrier.wait()
            posterior.observe(torch.tensor([[token]]))
        found[which] = posterior

    def generate():
        torch.set_num_threads(1)
        cache = model.make_cache()
        for token in rows[0]:
            barrier.wait()
            with torch.no_grad():
                found[2] = model(torch.tensor([[token]]), cache=cache, expert_vector=candidates[1]).logits

    threads = [threading.Thread(target=observe, args=(which,)) for which in range(2)]
    threads.append(threading.Thread(target=generate))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, posterior in enumerate(found[:2]):
        prior = [1 / (which + 2)] * (which + 2)
        assert_is_bayes(posterior, [torch.empty(0, model.config.vocab_size)], [rows[which]], prior)
    with torch.no_grad():
        wanted = model(torch.tensor([rows[0]]), expert_vector=candidates[1], use_cache=False).logits[:, -1:]
    assert_same_logits(found[2], wanted)


def test_a_second_thread_cannot_feed_a_posterior_in_the_middle_of_a_forward():
    model, refusals = random_model(tiny_config("everything")), []
    posterior = model.make_posterior([None, random_expert(model, 1)])
    posterior.observe(torch.tensor([[1, 2]]))

    def meddle():
        for use in (lambda: posterior.observe(torch.tensor([[3]])), lambda: posterior.crop(-1), posterior.fork):
            try:
                use()
            except ValueError as refusal:
                refusals.append(str(refusal))

    def during(*_):
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join(timeout=60)

    handle = model.lm_head.register_forward_hook(during)
    posterior.observe(torch.tensor([[4]]))
    handle.remove()
    assert len(refusals) == 3 and all("Another thread feeds this cache" in each for each in refusals)
    assert_is_bayes(posterior, [torch.empty(0, model.config.vocab_size)], [[1, 2, 4]], [0.5, 0.5])


@pytest.mark.parametrize("switching", [0.0, 0.1])
def test_bad_candidates_cost_the_base_no_more_than_the_mixture_bound(switching):
    """log K nats over the whole sequence, and -log(1 - s + s / K) a token under switching; the bound is met."""
    model, row = shared_model("everything"), draw_row(shared_model("everything"), random.Random(19), 30)
    bad = [ExpertVector({"lm_head": torch.full((1,), scale)}) for scale in (20.0, 30.0, 40.0)]
    posterior = model.make_posterior([*bad, None], switching=switching)
    posterior.observe(torch.tensor([row]))
    base = brute_force(model, row, [None], [1.0])[2]
    alone = [brute_force(model, row, [each], [1.0])[2] for each in bad]
    assert max(alone) < base - 30, "the candidates are not bad enough to test the bound"
    excess = base - posterior.log_evidence.item()
    per_token = -math.log(1 - switching + switching / 4)
    assert excess <= math.log(4) + (len(row) - 2) * per_token + 1e-9
    assert switching or excess > math.log(4) - 1e-6


@pytest.mark.parametrize("mode", ["mixture", "choose"])
def test_scores_of_beams_are_those_of_the_mixture(mode):
    model, row = shared_model("everything"), rows_of("everything", 20, (6,))[0]
    candidates, switching = candidates_of("everything"), 0.1
    posterior = model.make_posterior(candidates, torch.tensor(PRIOR, dtype=torch.float64), switching)
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "max_new_tokens": 4, **GREEDY}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(torch.tensor([row]), expert_posterior=posterior, posterior_mode=mode, **options)
    best = brute_force(model, row, candidates, PRIOR, switching)[1][-1].argmax().item()
    parts = (candidates, PRIOR, switching) if mode == "mixture" else ([candidates[best]], [1.0], 0.0)
    for text, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        logs = brute_force(model, text, *parts)[0]
        wanted = sum(logs[t - 1, text[t]].item() for t in range(len(row), len(text)))
        assert score == pytest.approx(wanted, abs=1e-4)  # Transformers keeps scores in float32


def test_a_cache_that_forgets_columns_is_fed_again_after_any_crop():
    """The posterior has all tokens, so a crop beyond the memory of its cache is exact as well."""
    model, row = shared_model("everything"), rows_of("everything", 21)[0]
    posterior = model.make_posterior(candidates_of("everything"), remember=2)
    for token in row:
        posterior.observe(torch.tensor([[token]]))
    posterior.crop(-7)
    found = fed(posterior, [one_turn([[5, 6]])])
    assert_is_bayes(posterior, found, [[*row[:-7], 5, 6]], [1 / 3] * 3)


def test_refusals_change_nothing():
    model, expert = shared_model("everything"), ExpertVector(shared_expert("everything", 1).vectors, "a")
    names = list(model.expert_vectors)
    per_row = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    posterior = model.make_posterior([None, expert], per_row)
    with pytest.raises(ValueError, match="2 rows"):
        posterior.observe(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="observed no tokens"):
        posterior.choose()
    assert posterior.batch_size == -1 and posterior.get_seq_length() == 0
    assert (posterior.probabilities - per_row).abs().max() < 1e-7 and not posterior.log_evidence.any()
    for prior, message in [
        ({}, "add up to 1"),
        ({None: 0.5, "a": 0.6}, "add up to 1"),
        ({None: 1.5, "a": -0.5}, "at least 0"),
        (torch.zeros(0, 2), "rows, 2"),
        (torch.full((1, 1, 2), 0.5), "rows, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.make_posterior([None, expert], prior)
    with pytest.raises((ValueError, KeyError), match="named 'nobody'"):
        model.make_posterior([None, "nobody"])
    with pytest.raises((TypeError, ValueError)):
        model.make_posterior([None, 3.0])
    with pytest.raises((TypeError, ValueError), match="bits"):
        model.make_posterior([None, expert], kv_bits=1)
    assert list(model.expert_vectors) == names
