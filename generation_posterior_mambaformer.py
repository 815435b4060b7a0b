"""`generate` under a posterior over expert vectors: from a prompt to the cache that generation continues from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from .cache_buffers_mambaformer import count_common_columns
from .expert_posterior_mambaformer import ExpertPosterior
from .expert_vectors_mambaformer import ExpertVectorLike

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache
    from .modeling_mambaformer import MambaFormerForCausalLM


MODES = ("choose", "sample", "blend", "mixture")


def cache_under_posterior(
    model: "MambaFormerForCausalLM",
    candidates: ExpertPosterior | Sequence[ExpertVectorLike],
    mode: str,
    prompt: Tensor,
    mask: Tensor | None,
) -> "MambaFormerCache | ExpertPosterior":
    """The cache that `generate` continues from; it lacks at least the last column of the prompt.

    Args:
        candidates: a posterior that has observed nothing, or a prefix of the prompt; or the candidates of a new one.
        mode: one of `MODES`.
        prompt, mask: (rows, columns); the mask is `None` where all tokens are real.

    Raises:
        TypeError, ValueError: an unknown mode, or a prompt that does not continue the sequence of the posterior.
    """
    if mode not in MODES:
        raise ValueError(f"`posterior_mode` must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    if getattr(candidates, "is_posterior", False):
        posterior = cast(ExpertPosterior, candidates)
    else:
        posterior = ExpertPosterior(model, cast("Sequence[ExpertVectorLike]", candidates))
    if posterior.model is not model:
        raise ValueError("`expert_posterior` belongs to another model: make one with `model.make_posterior()`.")
    num_new = prompt.shape[1] - _check_continues(posterior, prompt, mask)
    if mode == "mixture":
        if not num_new:
            posterior.crop(-1)
        return posterior
    if num_new:
        posterior.observe(prompt[:, -num_new:], None if mask is None else mask[:, -num_new:])
    return _cache_of_one(posterior, mode, prompt.shape[1] - 1)


def _cache_of_one(posterior: ExpertPosterior, mode: str, columns: int) -> "MambaFormerCache":
    """The first columns under one candidate for each row; generation predicts from the last column of the prompt."""
    cache, _ = posterior.sample() if mode == "sample" else posterior.choose()
    num_extra = cache.get_seq_length() - columns
    if num_extra > 0:
        cache.crop(-num_extra)
    if mode == "blend":
        cache.options = replace(cache.options, on_expert_change="continue")
        cache.provenance.policy = "continue"
        cache.set_expert_vector([*posterior.blend()])
    return cache


def _check_continues(posterior: ExpertPosterior, prompt: Tensor, mask: Tensor | None) -> int:
    """Columns of the posterior's sequence, which must be a prefix of the prompt."""
    observed, is_real, columns = posterior.rows.token_ids, posterior.rows.mask, posterior.get_seq_length()
    if observed is None or is_real is None:
        return 0
    has_rows = prompt.shape[0] == observed.shape[0]
    if not has_rows or count_common_columns(prompt, mask, observed, is_real) < columns:
        raise ValueError(
            f"`input_ids` must start with the {columns} columns that the posterior has observed: pass the complete "
            "sequence, call `posterior.crop(-k)` to take columns back, or `posterior.reset()`."
        )
    return columns


__all__ = ["cache_under_posterior"]
