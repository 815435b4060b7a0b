"""Infers which expert vector fits a sequence whose language changes, and plots the probabilities over its tokens.

    python examples/10_which_expert_vector.py [FOLDER]

Uses the expert vectors of the folder; if there are none, it trains a small one first, on a few verses in French. The
plot, `which_expert_vector.png`, needs matplotlib; the table needs nothing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
PLOT = Path("which_expert_vector.png")
# Genesis 1 in French (Louis Segond, 1910), and Exodus 2 in English (King James): both are in the public domain.
FRENCH = """Au commencement, Dieu créa les cieux et la terre. La terre était informe et vide: il y avait des ténèbres
à la surface de l'abîme, et l'esprit de Dieu se mouvait au-dessus des eaux. Dieu dit: Que la lumière soit! Et la
lumière fut. Dieu vit que la lumière était bonne; et Dieu sépara la lumière d'avec les ténèbres. Dieu appela la lumière
jour, et il appela les ténèbres nuit. Ainsi, il y eut un soir, et il y eut un matin: ce fut le premier jour."""
MORE_FRENCH = """Dieu dit: Que les eaux qui sont au-dessous du ciel se rassemblent en un seul lieu, et que le sec
paraisse. Et cela fut ainsi. Dieu appela le sec terre, et il appela l'amas des eaux mers. Dieu vit que cela était
bon."""
ENGLISH = """And there went a man of the house of Levi, and took to wife a daughter of Levi. And the woman conceived,
and bare a son: and when she saw him that he was a goodly child, she hid him three months."""

folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def encode(text: str, most: int) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids[:, :most]


def train(text: str, steps: int = 12) -> dict[str, torch.Tensor]:
    """The scales of singular values, 1 at the start, after a few steps that raise the likelihood of `text`."""
    ids = encode(text, 192)
    names = [name for name in model.linear_modules() if name.endswith(("in_proj", "o_proj", "down_proj"))]
    scales = {name: torch.ones(32, requires_grad=True) for name in names}
    optimizer = torch.optim.Adam(scales.values(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids, expert_vector=scales, use_cache=False).loss.backward()
        optimizer.step()
    return {name: scale.detach() for name, scale in scales.items()}


if not model.expert_vectors.names:
    model.requires_grad_(False)
    model.expert_vectors.add("french", train(FRENCH))

# With a switching rate of 0.03, a new candidate is drawn before a token with this probability (a hidden Markov model).
first, second = encode(ENGLISH, 48), encode(MORE_FRENCH, 48)
ids = torch.cat([first, second], dim=1)
posterior = model.make_posterior(switching=0.03)  # candidates: the base (None) and all of `model.expert_vectors`
posterior.observe(ids)
history, names = posterior.history[0], ["base" if name is None else name for name in posterior.names]

print(f"{'token':>5}  {'text':24}" + "".join(f"{name[:12]:>14}" for name in names))
for start in range(0, ids.shape[1], 8):
    text = repr(tokenizer.decode(ids[0, start : start + 8]))[:24]
    print(f"{start + 8:5}  {text:24}" + "".join(f"{p:14.3f}" for p in history[start + 7].tolist()))

if find_spec("matplotlib"):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3))
    axes.plot(history.numpy(), label=names)
    axes.axvline(first.shape[1], color="grey", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel="probability")
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    print(f"The plot is in {PLOT}.")

# Nats a token: the mixture that follows the change against each candidate alone.
length = ids.shape[1] - 1
mixture = -posterior.log_evidence.item() / length
alone = {}
for candidate, name in zip(posterior.candidates, names, strict=True):
    single = model.make_posterior([candidate])
    single.observe(ids)
    alone[name] = -single.log_evidence.item() / length
print("Nats a token: " + ", ".join(f"{name} {nats:.3f}" for name, nats in {"mixture": mixture, **alone}.items()))
before, after = history[first.shape[1] - 1].argmax().item(), history[-1].argmax().item()
print(f"The most probable candidate was {names[before]} before the language changed, and is {names[after]} now.")
if names == ["base", "french"]:
    assert before != after and mixture < min(alone.values())
