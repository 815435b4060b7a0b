"""Token sequences, turns full of pads, and how a model is fed with them."""

import functools
import random
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from patterns import ROOT, VOCAB
from tiny_models import shared_model


def random_rows(seed, lengths=(12, 7, 10)):
    """Token rows (lists of ids) of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def random_ids(seed=3, length=9):
    """Token ids (1, length)."""
    return torch.tensor(random_rows(seed, lengths=(length,)))


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
