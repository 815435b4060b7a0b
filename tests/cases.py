"""What the laws are tried on: layer patterns, cache variants, loud random models, experts, and turns full of pads."""

import functools
import random
from dataclasses import dataclass

import torch

from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM
from reference import reference_logits

VOCAB = 61
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


@functools.cache
def shared_model(pattern):
    """One model a pattern for the whole run; never change its weights."""
    return random_model(tiny_config(pattern))


@functools.cache
def shared_expert(pattern, seed, rank=None):
    return random_expert(shared_model(pattern), seed, rank)


def random_rows(seed, lengths=(12, 7, 10)):
    """Token rows (lists of ids) of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


_known_logits = {}


def expected(model, rows, experts=None):
    """The oracle's logits, remembered per (model, row, expert) since the laws ask for the same ones again and again.

    `experts` has one entry a row: `None`, an `ExpertVector`, or a list of `(start, None or ExpertVector)` segments.
    """
    experts = [None] * len(rows) if experts is None else experts
    answers = []
    for row, expert in zip(rows, experts, strict=True):
        key = (id(model), tuple(row), _content(expert))
        if key not in _known_logits:
            vectors = [(n, _vectors(e)) for n, e in expert] if isinstance(expert, list) else _vectors(expert)
            answer = reference_logits(model.state_dict(), model.config.to_dict(), [row], [vectors])
            _known_logits[key] = (model, answer[0])  # holding the model keeps its id its own
        answers.append(_known_logits[key][1])
    return answers


def _vectors(expert):
    return None if expert is None else dict(expert.vectors)


def _content(expert):
    if isinstance(expert, list):
        return tuple((start, _content(one)) for start, one in expert)
    return expert if expert is None else tuple((key, tuple(z.tolist())) for key, z in sorted(expert.vectors.items()))


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
