"""Logits of `reference.py` for a model, remembered between tests, and comparisons with them."""

import random
from bisect import bisect_right
from dataclasses import dataclass, field

import torch

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from reference import ReferenceRow, tuned_weights
from sequences import feed, ragged_turns, rows_for


@dataclass
class Reading:
    """The oracle after some tokens: its memory, the logits of the last one, and how it was seen to go on."""

    reader: ReferenceRow
    logits: torch.Tensor | None = None
    further: dict = field(default_factory=dict)


class Readings:
    """`reference.py`, token by token; what was read once is remembered by tokens and what each was encoded by.

    Args:
        config: of the model, as a dict.
        weights_of: gives the weights by which an encoding (anything hashable) reads a token.
    """

    MOST_READINGS, MOST_NUMBERS = 30_000, 2**26  # numbers in Mamba states

    def __init__(self, config, weights_of):
        self.config, self.weights_of = config, weights_of
        state_of_a_layer = config["mamba_expand"] * config["hidden_size"] * config["mamba_d_state"]
        self.most = min(self.MOST_READINGS, self.MOST_NUMBERS // (config["num_hidden_layers"] * state_of_a_layer))
        self._forget()

    def _forget(self):
        self.start, self.num_readings = Reading(ReferenceRow(self.config)), 0

    @torch.no_grad()
    def logits(self, text):
        """Logits (vocabulary,) of each `(token, encoding)` of a text."""
        if self.num_readings > self.most:
            self._forget()
        at, found = self.start, []
        for step in text:
            if step not in at.further:
                at.further[step] = self._read(at.reader, *step)
            at = at.further[step]
            found.append(at.logits)
        return found

    def _read(self, reader, token, encoding):
        self.num_readings += 1
        reader = reader.copy()
        return Reading(reader, reader.read(token, self.weights_of(encoding)))


class Oracle:
    """What `reference.py` says of one model under any expert, as long as its weights are those of `stamp`."""

    def __init__(self, model, **cache_fields):
        self.model, self.stamp = model, stamp_of(model)  # holding the model keeps its id its own
        self.weights, self.decomposed, self.tuned = model.state_dict(), {}, {}
        self.readings = Readings(model.config.to_dict() | cache_fields, self.tuned.__getitem__)

    def logits(self, row, expert):
        """Logits (tokens, vocabulary) of a row, under an expert as `expected` takes it."""
        segments = expert if isinstance(expert, list) else [(0, expert)]
        starts, encodings = [start for start, _ in segments], [self._learn(one) for _, one in segments]
        in_force = [encodings[bisect_right(starts, position) - 1] for position in range(len(row))]
        logits = self.readings.logits(zip(row, in_force, strict=True))
        return torch.stack(logits) if row else torch.zeros(0, self.model.config.vocab_size, dtype=torch.float64)

    def _learn(self, expert):
        """A name for the weights under an expert, which is its content; from here on they are known by it."""
        vectors = {} if expert is None else dict(expert.vectors)
        content = tuple((key, tuple(z.tolist())) for key, z in sorted(vectors.items()))
        if content not in self.tuned:
            self.tuned[content] = tuned_weights(self.weights, vectors, self.decomposed)
        return content


def stamp_of(model):
    """Another one whenever weights were written to or replaced."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]


_oracles = {}


def expected(model, rows, experts=None, **cache_fields):
    """The oracle's logits, remembered per model since the laws ask for the same ones again and again.

    `experts` has one entry a row: `None`, an `ExpertVector`, or a list of `(start, None or ExpertVector)` segments.
    `cache_fields` say what a cache keeps: `kv_bits={"keys": n, "values": n}` where it rounds.
    """
    experts = [None] * len(rows) if experts is None else experts
    key = id(model), str(cache_fields)
    oracle = _oracles.get(key)
    if oracle is None or oracle.stamp != stamp_of(model):
        oracle = _oracles[key] = Oracle(model, **cache_fields)
    return [oracle.logits(row, expert) for row, expert in zip(rows, experts, strict=True)]


@torch.no_grad()
def uncached_logits(model, ids, **options):
    """Logits of one forward without a cache."""
    return model(ids, use_cache=False, **options).logits


def assert_same_logits(found, wanted, tolerance=1e-10):
    """Equal up to `tolerance` of the logit scale; lists are compared row by row."""
    if isinstance(found, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_logits(one, other, tolerance)
        return
    assert found.shape == wanted.shape
    if wanted.numel():
        scale = max(1.0, wanted.abs().max().item())
        difference = (found - wanted).abs().max().item()
        assert difference <= tolerance * scale, f"off by {difference / scale:.1e} of the logit scale {scale:.1f}"


def tails(rows, counts):
    """The last entries of each row: what comes after the first `counts` of them."""
    return [row[count:] for row, count in zip(rows, counts, strict=True)]


def read_on(model, cache, rows, experts=None, seed=29, cache_fields=None, **options):
    """Feeds every row a new, ragged continuation and asserts that it is read as the oracle reads the whole row."""
    rng = random.Random(seed)
    more = rows_for(model, seed, [rng.randint(1, 4) for _ in rows])
    found = feed(model, cache, ragged_turns(rng, more, count=2), **options)
    whole = [old + new for old, new in zip(rows, more, strict=True)]
    wanted = expected(model, whole, experts, **(cache_fields or {}))
    assert_same_logits(found, tails(wanted, [len(row) for row in rows]))
    return whole
