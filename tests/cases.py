"""What the laws are tried on: random and trained models, cache variants, experts, texts, and turns full of pads."""

import atexit
import functools
import random
import shutil
import tempfile
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from reference import ReferenceRow, tuned_weights

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 61
NO_TOKEN = 10**6  # beyond every vocabulary
ROPE = {"rope_type": "default", "rope_theta": 100.0}
ALL_FIVE = ["linear_attention", "hybrid", "sliding_attention", "hybrid_sliding", "full_attention"]

# Each layer type alone, then mixes; between them every option is on somewhere and off somewhere.
PATTERNS = {
    "mamba": {"layer_types": ["linear_attention"] * 2},
    "full": {"layer_types": ["full_attention"] * 2},
    "sliding": {"layer_types": ["sliding_attention"] * 2, "rope_parameters": ROPE},
    "sliding_sinks": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "num_sink_tokens": 2},
    "hybrid": {"layer_types": ["hybrid"] * 2, "mamba_conv_bias": False, "mamba_d_conv": 2},
    "hybrid_sliding": {"layer_types": ["hybrid_sliding"] * 2, "num_sink_tokens": 1, "rope_parameters": ROPE},
    "paper": {"num_hidden_layers": 3, "layer_types": None, "num_key_value_heads": 4},
    "llama": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": ROPE,
        "intermediate_size": 48,
        "tie_word_embeddings": False,
        "head_dim": 12,
    },
    "jamba": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 24,
        "mamba_inner_norms": True,
        "mamba_expand": 1,
        "num_key_value_heads": 1,
    },
    "another_mixer": {
        "layer_types": ["linear_attention", "hybrid_sliding"],
        "recurrent_mixer": "gated_linear_attention",
        "intermediate_size": 24,
    },
    "everything": {
        "layer_types": ALL_FIVE,
        "rope_parameters": ROPE,
        "intermediate_size": 48,
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mamba_proj_bias": True,
        "mamba_inner_norms": True,
        "num_sink_tokens": 1,
        "tie_word_embeddings": False,
    },
}


def load_trained(folder, **options):
    """The model of a folder in the repo, in float64 and eval mode; the laws read on behind any end of text."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} is part of the repo and the laws run on its weights, but it is missing")
    model = MambaFormerForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def folder_of_smollm2():
    """SmolLM2 with the trained blocks, as a folder with its tokenizer."""
    blocks = ROOT / "checkpoints" / "smollm2-hybrid" / "blocks.safetensors"
    if not blocks.is_file():
        raise FileNotFoundError(f"{blocks} is part of the repo and the laws run on its weights, but it is missing")
    folder = Path(tempfile.mkdtemp(prefix="smollm2-hybrid-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    convert(find_smollm2(), blocks=blocks, output_dir=folder)
    return folder


def load_smollm2(num_layers=6, window=48):
    """Its first layers, half of them with a window, which is shortened so that the tests' texts are far longer."""
    config = MambaFormerConfig.from_pretrained(folder_of_smollm2())
    config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
    config.sliding_window = window
    return load_trained(folder_of_smollm2(), config=config)


# Trained models, by what loads them. The tokenizer of a model is found in the folder that it names as its own
# (`name_or_path`).
TRAINED = {
    "trained_tiny": functools.partial(load_trained, ROOT / "checkpoints" / "mambaformer-tiny"),
    "trained_smollm2": load_smollm2,
}
TRAINED_SMALL = ["trained_tiny"]  # small enough for the oracle, and for decomposing all weights
# One worker runs all that is tried on a trained model: it loads and decomposes the weights only once.
ALL_TRAINED_PARAMS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TRAINED]
TRAINED_PARAMS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TRAINED_SMALL]
# What a law is tried on; a trained model stands beside the patterns as one more.
MODELS = [*PATTERNS, *TRAINED_PARAMS]

CACHE_VARIANTS = {
    "dense": {"storage": "dense"},
    "static": {"storage": "static", "max_cache_len": 96},
}


def tiny_config(pattern="everything", **over):
    """A `MambaFormerConfig` with four heads of a few channels for one of `PATTERNS`; `over` wins over both."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "sliding_window": 5,
    }
    fields |= PATTERNS[pattern] | over
    if fields["layer_types"] is not None:
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return MambaFormerConfig(**fields)


def random_model(config, seed=0, loudness=1.5):
    """A float64 model in eval mode, every weight drawn anew and large: a wrong state or key moves logits by O(1).

    `loudness` is by how much linear modules amplify; below 1, roundings do not grow from layer to layer.
    """
    torch.manual_seed(seed)
    model = MambaFormerForCausalLM(config).to(torch.float64).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_loud_values(name, parameter.shape, source, loudness))
    return model


def _loud_values(name, shape, source, loudness):
    noise = torch.randn(shape, generator=source, dtype=torch.float64)
    if name.endswith("A_log"):  # memories from one token to dozens
        return torch.log(0.5 + 7.5 * torch.rand(shape, generator=source, dtype=torch.float64))
    if name.endswith("dt_proj.bias"):  # the inverse of softplus at steps from 0.01 to 1.5
        steps = torch.logspace(-2, 0.18, shape[0], dtype=torch.float64)
        return torch.log(torch.expm1(steps))[torch.randperm(shape[0], generator=source)]
    if name.endswith("dt_proj.weight"):
        return 0.5 * noise
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith("conv1d.weight"):
        return noise
    if len(shape) == 2 and "embed" not in name:
        return loudness * noise / shape[1] ** 0.5
    return noise


def random_expert(model, seed, rank=None, modules=None, name=None):
    """An `ExpertVector` with scales between 0.3 and 1.7 for all linear modules or `modules`, top `rank` of each."""
    source = torch.Generator().manual_seed(seed)
    linears = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    vectors = {}
    for key in linears if modules is None else modules:
        size = min(linears[key].weight.shape)
        vectors[key] = 0.3 + 1.4 * torch.rand(size if rank is None else min(rank, size), generator=source)
    return ExpertVector(vectors, name=name)


def new_model(pattern, loudness=1.5):
    """A model of one of `MODELS` that may be changed; trained weights are as loud as they are."""
    return TRAINED[pattern]() if pattern in TRAINED else random_model(tiny_config(pattern), loudness=loudness)


@functools.cache
def shared_model(pattern):
    """One model a pattern for the whole run; never change its weights."""
    return new_model(pattern)


@functools.cache
def shared_expert(pattern, seed, rank=None):
    return random_expert(shared_model(pattern), seed, rank)


def random_rows(seed, lengths=(12, 7, 10)):
    """Token rows (lists of ids) of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


@functools.cache
def real_text(folder):
    """Token ids of real text, prose and Python, that the tokenizer in a model's folder makes of it."""
    texts = [(ROOT / name).read_text() for name in ("LICENSE", "tests/reference.py")]
    return AutoTokenizer.from_pretrained(folder)("\n".join(texts)).input_ids


def draw_row(model, rng, length):
    """So many ids: a piece of real text for a trained model, random ids for a random one."""
    if not model.name_or_path:
        return [rng.randrange(VOCAB) for _ in range(length)]
    text = real_text(model.name_or_path)
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def rows_for(model, seed, lengths=(12, 7, 10)):
    """Token rows of these lengths that a model is fed."""
    rng = random.Random(seed)
    return [draw_row(model, rng, length) for length in lengths]


def rows_of(pattern, seed, lengths=(12, 7, 10)):
    """`rows_for` the model of a pattern."""
    return rows_for(shared_model(pattern), seed, lengths)


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

    def __init__(self, model):
        self.model, self.stamp = model, stamp_of(model)  # holding the model keeps its id its own
        self.weights, self.decomposed, self.tuned = model.state_dict(), {}, {}
        self.readings = Readings(model.config.to_dict(), self.tuned.__getitem__)

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


def expected(model, rows, experts=None):
    """The oracle's logits, remembered per model since the laws ask for the same ones again and again.

    `experts` has one entry a row: `None`, an `ExpertVector`, or a list of `(start, None or ExpertVector)` segments.
    """
    experts = [None] * len(rows) if experts is None else experts
    oracle = _oracles.get(id(model))
    if oracle is None or oracle.stamp != stamp_of(model):
        oracle = _oracles[id(model)] = Oracle(model)
    return [oracle.logits(row, expert) for row, expert in zip(rows, experts, strict=True)]


@dataclass
class Turn:
    """One forward: ids (rows, columns) and mask (rows, columns), True at real tokens; pads hold ordinary token ids."""

    ids: torch.Tensor
    mask: torch.Tensor


def one_turn(rows):
    """Rows of one length as a turn without pads."""
    ids = torch.tensor(rows)
    return Turn(ids, torch.ones_like(ids, dtype=torch.bool))


def cut(tokens, sizes):
    """A list cut into pieces of these sizes."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(tokens[start : start + size])
        start += size
    return pieces


def random_cut(rng, length, singles=0.5):
    """Sizes that add up to `length`, with single tokens and long pieces."""
    sizes = []
    while sum(sizes) < length:
        left = length - sum(sizes)
        sizes.append(1 if rng.random() < singles else rng.randint(1, left))
    return sizes


def padded_turn(rng, pieces, extra=0, side="any"):
    """A turn that holds one piece a row: pads `left`, `right` or `any`where, `extra` columns more than needed."""
    width = max(1, max(len(piece) for piece in pieces) + extra)
    ids, mask = torch.empty(len(pieces), width, dtype=torch.long), torch.zeros(len(pieces), width, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        places = {
            "left": range(width - len(piece), width),
            "right": range(len(piece)),
            "any": sorted(rng.sample(range(width), len(piece))),
        }[side]
        ids[row] = torch.tensor([rng.randrange(VOCAB) for _ in range(width)])
        ids[row, list(places)] = torch.tensor(piece, dtype=torch.long)
        mask[row, list(places)] = True
    return Turn(ids, mask)


def ragged_turns(rng, rows, count, side=None):
    """`rows` dealt over `count` turns, unevenly: some rows rest in some turns, and one turn is a pad for all."""
    pieces_of_rows = []
    for row in rows:
        stops = sorted(rng.randint(0, len(row)) for _ in range(count - 1))
        pieces_of_rows.append([row[a:b] for a, b in zip([0, *stops], [*stops, len(row)], strict=True)])
    turns = []
    for pieces in zip(*pieces_of_rows, strict=True):
        turns.append(padded_turn(rng, pieces, rng.choice([0, 0, 1, 3]), side or rng.choice(["left", "right", "any"])))
    turns.insert(rng.randint(0, count), padded_turn(rng, [[] for _ in rows]))
    return turns


@torch.no_grad()
def feed(model, cache, turns, whole_mask=False, **options):
    """Feeds the turns and returns each row's logits at its real tokens, joined: a list of (tokens, vocabulary).

    `whole_mask` gives the mask of everything since the cache was made, else that of the new tokens only.
    `options` go to every forward.
    """
    found, masks = [[] for _ in turns[0].ids], []
    for turn in turns:
        masks.append(turn.mask)
        mask = torch.cat(masks, 1) if whole_mask else turn.mask
        mask = None if mask.all() else mask.long()
        logits = model(turn.ids, attention_mask=mask, past_key_values=cache, **options).logits
        for row, real in enumerate(turn.mask):
            found[row].append(logits[row, real])
    return [torch.cat(pieces) for pieces in found]


@torch.no_grad()
def feed_row(model, cache, tokens, sizes=None, **options):
    """Feeds one row without pads, cut into `sizes`; returns its logits (tokens, vocabulary)."""
    turns = [one_turn([piece]) for piece in cut(tokens, sizes or [len(tokens)])]
    return feed(model, cache, turns, **options)[0]


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


# Arguments of `Trainer` and its like for a few steps of SGD that write, show and report nothing.
PLAIN_SGD = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
}
