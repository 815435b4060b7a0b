"""What the state machine knows of the world: random models, what each cache holds, what the oracle says, bad input."""

import contextlib
import functools
import hashlib
import random
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from mambaformer import ExpertVector, MambaFormerCache, MambaFormerConfig
from mambaformer.cache_policies_mambaformer import POLICIES
from oracle import Readings
from reference import tuned_weights
from tiny_models import random_expert, random_model

VOCAB = 11
LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
ROPE = {"rope_type": "default", "rope_theta": 100.0}
BASE = "base"


# ------------------------------------------------------------------------------------------------ models and experts


def random_fields(rng):
    """Of a configuration with one to three layers of any types; every other option is drawn too."""
    kv_heads = rng.choice([1, 2])
    return {
        "vocab_size": VOCAB,
        "hidden_size": rng.choice([8, 12, 16]),
        "num_hidden_layers": (depth := rng.choice([1, 2, 2, 3])),
        "layer_types": [rng.choice(LAYER_TYPES) for _ in range(depth)],
        "intermediate_size": rng.choice([None, None, 10]),
        "mlp_bias": rng.random() < 0.5,
        "num_attention_heads": kv_heads * rng.choice([1, 2]),
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([2, 4, 6]),
        "attention_bias": rng.random() < 0.5,
        "attention_output_bias": rng.random() < 0.5,
        "rope_parameters": rng.choice([None, dict(ROPE)]),
        "sliding_window": rng.randint(1, 6),
        "window_positions": rng.choice(["absolute", "absolute", "relative"]),
        "num_sink_tokens": rng.randint(0, 2),
        "mamba_d_state": rng.randint(1, 3),
        "mamba_d_conv": rng.randint(1, 4),
        "mamba_expand": rng.choice([1, 2]),
        "mamba_dt_rank": rng.choice(["auto", 2]),
        "mamba_conv_bias": rng.random() < 0.5,
        "mamba_proj_bias": rng.random() < 0.5,
        "mamba_inner_norms": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.5,
    }


def random_storage(rng, config):
    """Options of all caches of a family that change its logits, and how the oracle knows them; half keep all as it is.

    Static storage takes no policy.
    """
    if rng.random() < 0.5:
        return {}
    types, storage = config.layer_types, {}
    if any("attention" in name or "hybrid" in name for name in types) and rng.random() < 0.5:
        storage["kv_bits"] = {"keys": rng.choice([8, 6, 5]), "values": rng.choice([8, 4, 3])}
    if any(name.startswith(("linear", "hybrid")) for name in types) and rng.random() < 0.5:
        storage["state_bits"] = 8
    if any(name in ("full_attention", "hybrid") for name in types) and rng.random() < 0.5:
        schedule = {"interval": rng.randint(2, 5), "sinks": rng.randint(0, 1), "recent": rng.randint(0, 2)}
        storage["policy"] = {"name": rng.choice(list(POLICIES)), "budget": rng.choice([3, 4, 0.4, 0.7]), **schedule}
        if storage["policy"]["name"] in ("snap_kv", "expected_attention"):
            storage["policy"]["window"] = rng.randint(1, schedule["interval"])
        if storage["policy"]["name"] == "snap_kv":
            storage["policy"]["kernel_size"] = rng.choice([1, 3])
    return storage


class Family:
    """All models of one configuration: the experts they share, and the oracle, which remembers across programs."""

    def __init__(self, seed):
        self.seed = seed
        self.fields = random_fields(random.Random(seed))
        self.config = MambaFormerConfig(**self.fields)
        like = self.fresh_module(0)
        linear = random.Random(seed).choice(list(like.linear_modules()))
        self.experts = {
            BASE: ExpertVector({}),
            "a": random_expert(like, 1),
            "b": random_expert(like, 2),
            "low_rank": random_expert(like, 3, rank=2),
            "lone": random_expert(like, 4, modules=[linear]),
        }
        ones = {name: torch.ones(1) for name in like.linear_modules()}
        self.spellings = {BASE: [None, "ones", ones, ExpertVector(ones)]}
        for name, expert in list(self.experts.items())[1:]:
            same = ExpertVector(ones | dict(expert.vectors), name="other")
            self.spellings[name] = [name, f"{name}_again", expert, dict(expert.vectors), same]
        self.storage = random_storage(random.Random(seed), self.config)
        self.oracle = Oracle(self.config.to_dict() | self.storage, self.experts)

    def fresh_module(self, which):
        """Model 0 or 1 of the family, with the weights that it always starts with."""
        module = random_model(self.config, seed=2 * self.seed + which, loudness=1.2)
        module.model.gradient_checkpointing = False
        return module

    def fill(self, library):
        """Names every expert, some twice: identity is content."""
        linear = next(iter(self.experts["lone"].vectors))
        library.add("ones", {linear: torch.ones(1)})
        for name in self.experts:
            if name != BASE:
                library.add(name, self.experts[name])
                library.add(f"{name}_again", self.experts[name])


@functools.lru_cache(maxsize=4)
def family_of(seed):
    """The family of this seed; the last few are kept."""
    return Family(seed)


class WorldModel:
    """A model, and by which weights it ought to compute.

    `content` tells weights by their bytes, those of before a merge while one lasts. `stamp` also tells a change there
    and back from no change: the cache may not read weights, so to it every write is a change.
    """

    def __init__(self, family, which):
        self.family, self.which = family, which
        self.module = family.fresh_module(which)
        self.originals = [family.fresh_module(other).state_dict() for other in range(2)]
        family.fill(self.module.expert_vectors)
        self.merged, self.writes = None, 0
        self.content = family.oracle.learn(self.module.state_dict())

    def __repr__(self):
        return f"model{self.which}"

    @property
    def stamp(self):
        return (self.which, self.writes)

    @property
    def weights(self):
        """Tells weights by their content."""
        return (self.merged, self.content)

    def weights_changed(self):
        self.writes += 1
        if self.merged is None:
            self.content = self.family.oracle.learn(self.module.state_dict())

    def encoding(self, expert):
        """What tells under which weights a token is encoded."""
        return (self.merged or expert, self.content)


# ----------------------------------------------------------------------------------------------------------- oracle


class Oracle(Readings):
    """Knows weights by a name, and what they are under an expert; it remembers across programs."""

    def __init__(self, config, experts):
        super().__init__(config, self.weights_under)
        self.experts, self.weights, self.tuned = experts, {}, {}

    def learn(self, state_dict):
        """Remembers these weights and returns a name for them that their bytes alone decide."""
        digest = hashlib.sha256()
        for name in sorted(state_dict):
            digest.update(state_dict[name].detach().contiguous().numpy().tobytes())
        content = digest.hexdigest()[:12]
        if content not in self.weights:
            self.weights[content] = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
        return content

    def weights_under(self, encoding):
        if encoding not in self.tuned:
            expert, content = encoding
            self.tuned[encoding] = tuned_weights(self.weights[content], dict(self.experts[expert].vectors))
        return self.tuned[encoding]


# ----------------------------------------------------------------------------------------------------------- caches


class Verdict(Enum):
    """Whether an operation has to work. What may be refused is judged like all else if it is not."""

    WORKS = 1
    MAY_REFUSE = 2
    REFUSES = 3


def per_row(experts, num_rows):
    """An expert for all, or a tuple with one a row, as a tuple."""
    return experts if isinstance(experts, tuple) else (experts,) * num_rows


def simplest(experts):
    """One expert where all rows have the same."""
    return experts[0] if isinstance(experts, tuple) and len(set(experts)) == 1 else experts


@dataclass
class Ledger:
    """What a cache ought to hold.

    Args:
        policy, limit: what it was made with; `limit` in columns, `None` for dense storage.
        rows: for each row its columns, `(token, encoding)` or `None` for a pad; empty before the first forward.
        in_force: the expert, or one a row.
        encoded: the experts of the rows at the last forward, and the stamp of its weights.
        is_mixed: the text was encoded by several things ("continue"), so it cannot be encoded again.
        has_embeddings: so can a text of which some was given as embeddings.
        was_cropped: since the last forward, so that the next one may have to encode the rest again.
    """

    policy: str
    limit: int | None = None
    rows: list = field(default_factory=list)
    in_force: str | tuple = BASE
    encoded: tuple | None = None
    is_mixed: bool = False
    has_embeddings: bool = False
    was_cropped: bool = False

    @property
    def num_columns(self):
        return len(self.rows[0]) if self.rows else 0

    def text(self, row):
        return [column for column in self.rows[row] if column is not None]

    def tokens(self, row):
        return [token for token, _ in self.text(row)]

    def copy(self):
        return replace(self, rows=[list(row) for row in self.rows])

    def forget(self):
        self.rows, self.encoded = [], None
        self.is_mixed = self.has_embeddings = self.was_cropped = False

    # ---- experts

    def of_change(self, is_change):
        """The verdict on going on under other experts or weights."""
        if not is_change or not self.rows:
            return Verdict.WORKS
        if self.policy == "error":
            return Verdict.REFUSES
        is_hard = {"recompute": self.has_embeddings, "continue": self.was_cropped, "reset": False}[self.policy]
        return Verdict.MAY_REFUSE if is_hard else Verdict.WORKS

    def of_set_expert(self, experts):
        num_rows = len(self.rows)
        return self.of_change(self.rows and per_row(experts, num_rows) != per_row(self.in_force, num_rows))

    def set_expert_vector(self, experts):
        num_rows = len(self.rows)
        if self.rows and self.policy == "reset" and per_row(experts, num_rows) != per_row(self.in_force, num_rows):
            self.forget()
        self.in_force = simplest(experts)

    def is_about_to_mix(self):
        return self.policy == "continue" and self.rows and self.encoded[0] != per_row(self.in_force, len(self.rows))

    # ---- forwards

    def of_forward(self, model, experts, num_rows, width):
        is_known = not self.rows or self.encoded == (per_row(experts, num_rows), model.stamp)
        verdict = self.of_change(not is_known)
        is_too_long = self.limit is not None and self.num_columns + width > self.limit
        is_double = model.merged is not None and experts != BASE
        return Verdict.REFUSES if is_too_long or is_double else verdict

    def take_in(self, model, experts, turn, is_embedded=False):
        """The turn was fed: `experts` are in force, and text from before is what the policy says."""
        by_row = per_row(experts, len(turn))
        if self.rows and self.encoded != (by_row, model.stamp):
            if self.policy == "reset":
                self.forget()
            elif self.policy == "recompute":
                self.encode_again(model, by_row)
            else:
                self.is_mixed = True
        self.rows = self.rows or [[] for _ in turn]
        for row, expert, columns in zip(self.rows, by_row, turn, strict=True):
            row += [None if token is None else (token, model.encoding(expert)) for token in columns]
        self.in_force, self.encoded = simplest(experts), (by_row, model.stamp)
        self.has_embeddings |= is_embedded
        self.was_cropped = False

    def encode_again(self, model, by_row):
        for row, expert in zip(self.rows, by_row, strict=True):
            row[:] = [column and (column[0], model.encoding(expert)) for column in row]

    def saved_by(self, model):
        """A copy whose stamp says no more than whether it was that of the model's weights: files outlive stamps."""
        other = self.copy()
        if self.rows and self.encoded[1] != model.stamp:
            other.encoded = (self.encoded[0], None)
        return other

    def was_loaded_by(self, model, is_encoded_again):
        """From a file: the text is as it was, or is encoded by the weights of `model` at the next forward."""
        if not self.rows:
            return
        by_row = per_row(self.in_force, len(self.rows))
        if is_encoded_again:
            self.encode_again(model, by_row)
            self.encoded, self.was_cropped = (by_row, model.stamp), True
        elif self.encoded[1] is not None:
            self.encoded = (self.encoded[0], model.stamp)

    # ---- surgery

    def of_crop(self, counts):
        if not any(counts) or min(counts) == self.num_columns:
            return Verdict.WORKS
        is_hard = self.is_mixed or self.is_about_to_mix() or self.has_embeddings
        return Verdict.MAY_REFUSE if is_hard else Verdict.WORKS

    def crop(self, counts):
        """Takes the last `counts[b]` columns from row b; where another row keeps them, a pad stays behind."""
        if min(counts) == self.num_columns:
            self.forget()
            return
        for row, count in zip(self.rows, counts, strict=True):
            row[len(row) - count :] = [None] * (count - min(counts))
        self.was_cropped |= any(counts)

    def select_rows(self, rows):
        self.is_mixed |= bool(self.is_about_to_mix())
        self.rows = [list(self.rows[row]) for row in rows]
        self.encoded = (tuple(self.encoded[0][row] for row in rows), self.encoded[1])
        if isinstance(self.in_force, tuple):
            self.in_force = simplest(tuple(self.in_force[row] for row in rows))


# ------------------------------------------------------------------------------------------------------------ turns


def story(text, oddity):
    """The next token of a text: mostly the usual one, so that the oracle has often read it before."""
    return (3 * len(text) + 5 * (text[-1] if text else 0) + oddity) % VOCAB


def placed(length, width, side, dice):
    """Which of `width` columns hold the `length` real ones."""
    if side == "any":
        places = random.Random(dice).sample(range(width), length)
    else:
        places = range(length) if side == "right" else range(width - length, width)
    return [column in places for column in range(width)]


def as_tensors(turn):
    """Ids and mask (rows, columns) of a turn; pads hold ordinary token ids."""
    ids = [[(2 * n + 3) % VOCAB if token is None else token for n, token in enumerate(row)] for row in turn]
    return torch.tensor(ids), torch.tensor([[token is not None for token in row] for row in turn])


# ---------------------------------------------------------------------------------------------------- what goes wrong


class PowerCut(RuntimeError):
    """What a forward may die of."""


@contextlib.contextmanager
def power_cut_at(part):
    def cut(*_):
        raise PowerCut("there is no power left")

    handle = part.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def feeds(**given):
    """A call that feeds two good tokens to every row, but for what is `given`: functions of the ledger."""

    def call(family, slot):
        num_rows = len(slot.ledger.rows)
        options = {"input_ids": torch.ones(num_rows, 2, dtype=torch.long)}
        options |= {name: make(num_rows, slot.ledger) for name, make in given.items()}
        return slot.model.module(past_key_values=slot.cache, **options)

    return call


def contradicting_mask(num_rows, ledger):
    earlier = torch.tensor([[column is None for column in row] for row in ledger.rows])
    return torch.cat([earlier, torch.ones(num_rows, 2, dtype=torch.bool)], dim=1).long()


# What is wrong, and a call of (family, slot) that does it.
BAD_INPUTS = (
    ("float ids", feeds(input_ids=lambda n, _: torch.ones(n, 2))),
    ("ids without rows", feeds(input_ids=lambda n, _: torch.ones(n, dtype=torch.long))),
    ("no tokens", feeds(input_ids=lambda n, _: torch.ones(n, 0, dtype=torch.long))),
    ("a row too many", feeds(input_ids=lambda n, _: torch.ones(n + 1, 2, dtype=torch.long))),
    ("a token outside the vocabulary", feeds(input_ids=lambda n, _: torch.full((n, 2), VOCAB))),
    ("ids and embeddings", feeds(inputs_embeds=lambda n, _: torch.ones(n, 2, 8, dtype=torch.float64))),
    ("a mask of another width", feeds(attention_mask=lambda n, ledger: torch.ones(n, ledger.num_columns + 5))),
    ("a mask of other rows", feeds(attention_mask=lambda n, _: torch.ones(n + 1, 2))),
    ("a mask in 4-D", feeds(attention_mask=lambda n, _: torch.ones(n, 1, 2, 2))),
    ("a mask that calls the past something else", feeds(attention_mask=contradicting_mask)),
    ("positions of another width", feeds(position_ids=lambda n, _: torch.ones(n, 3, dtype=torch.long))),
    ("an unknown expert", feeds(expert_vector=lambda n, _: "nobody")),
    ("an expert too many", feeds(expert_vector=lambda n, _: ["a"] + ["b"] * n)),
    ("an expert for modules of another model", feeds(expert_vector=lambda n, _: {"model.layers.9.x": torch.ones(1)})),
    ("a number as an expert", feeds(expert_vector=lambda n, _: 3)),
    ("logits to keep that there are not", feeds(logits_to_keep=lambda n, _: torch.tensor([2]))),
    ("labels of another width", feeds(labels=lambda n, _: torch.ones(n, 3, dtype=torch.long))),
    ("set an unknown expert", lambda family, slot: slot.cache.set_expert_vector("nobody")),
    (
        "set an expert too many",
        lambda family, slot: slot.cache.set_expert_vector(["a"] + ["b"] * len(slot.ledger.rows)),
    ),
    ("crop forwards", lambda family, slot: slot.cache.crop(1)),
    ("crop more rows than there are", lambda family, slot: slot.cache.crop([0] * (len(slot.ledger.rows) + 1))),
    ("crop too much of a row", lambda family, slot: slot.cache.crop([-99] + [0] * (len(slot.ledger.rows) - 1))),
    ("crop too much", lambda family, slot: slot.cache.crop(-slot.ledger.num_columns - 1)),
    ("select a row that there is not", lambda family, slot: slot.cache.select_rows(torch.tensor([0, 9]))),
    ("reorder to a negative row", lambda family, slot: slot.cache.reorder_cache(torch.tensor([-1]))),
)


@dataclass
class Slot:
    """A live cache: the thing itself, what it ought to hold, and the model that serves it now."""

    name: str
    cache: MambaFormerCache
    ledger: Ledger
    model: WorldModel
    home: WorldModel  # that made it

    @property
    def room(self):
        return min(MOST_COLUMNS, self.ledger.limit or MOST_COLUMNS) - self.ledger.num_columns


@dataclass(frozen=True)
class Saved:
    """A file, what its cache held, and the weights of its model then."""

    path: str
    ledger: Ledger
    weights: tuple


def visible(cache):
    """What a user can see of a cache without feeding it."""
    expert = cache.expert_vector
    experts = [one and one.fingerprint for one in (expert if isinstance(expert, list) else [expert])]
    ids = None if cache.token_ids is None else cache.token_ids.tolist()
    return cache.get_seq_length(), cache.batch_size, ids, experts


def can_be_saved(slot):
    """By the model that made it; a text that other weights have encoded is of use where it is encoded again."""
    is_current = not slot.ledger.rows or slot.ledger.encoded[1] == slot.model.stamp
    return slot.model is slot.home and (is_current or slot.ledger.policy == "recompute")


def has_room_and_text(slot):
    return slot.room and slot.ledger.rows


def can_record_more(slot):
    return slot.cache.rollback_reach < 10


def can_train(slot):
    return slot.room and slot.model.merged is None and slot.ledger.policy in ("recompute", "reset")


def descend(module, loss, rate=0.05):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    torch.optim.SGD(module.parameters(), lr=rate).step()
    module.zero_grad()


MOST_COLUMNS = 26
