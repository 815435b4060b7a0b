"""Several candidate expert vectors for each sequence, as rows of one cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .expert_bases_mambaformer import at_least_float32
from .expert_vectors_mambaformer import ExpertVector

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache
    from .modeling_mambaformer import MambaFormerForCausalLM


@dataclass(frozen=True)
class Observation:
    """Some tokens under each candidate.

    Args:
        log_probs: of the token after each of them, (rows, candidates, tokens, vocabulary).
        log_likelihoods: of the tokens, given the ones before, (rows, tokens, candidates) in float64.
        is_observed: (rows, tokens), False at padding and at the first token of a row, which nothing predicts.
    """

    log_probs: Tensor
    log_likelihoods: Tensor
    is_observed: Tensor


class CandidateRows:
    """Sequences that are encoded under each candidate: row `r * candidates + k` of the cache is row r under k.

    Columns that were taken back or whose predictions are not there any more are missing in the cache, and are fed
    again at the start of the next forward. So no action of this class runs the model but `observe`.

    Attributes:
        token_ids, mask: all columns, (rows, columns) each; `None` before the first.
        predictions: log-probabilities (rows, candidates, vocabulary) of the token after the last real one of each row;
            `None` if columns are missing in the cache.
    """

    def __init__(self, model: "MambaFormerForCausalLM", candidates: Sequence[ExpertVector | None], **cache_options):
        self.model, self.candidates = model, list(candidates)
        self.cache: MambaFormerCache = model.make_cache(**cache_options)
        self._forget()

    def _forget(self) -> None:
        self.token_ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.predictions: Tensor | None = None

    @property
    def columns(self) -> int:
        return 0 if self.token_ids is None else self.token_ids.shape[1]

    @property
    def num_missing(self) -> int:
        """Columns that the cache lacks."""
        return self.columns - self.cache.get_seq_length()

    # ---- observing

    def observe(self, ids: Tensor, mask: Tensor) -> Observation:
        """Feeds new columns (rows, tokens); a forward that fails leaves everything as it was."""
        missing = self.num_missing
        fed_ids, fed_mask = ids, mask
        if missing and self.token_ids is not None and self.mask is not None:
            fed_ids = torch.cat([self.token_ids[:, -missing:], ids], dim=1)
            fed_mask = torch.cat([self.mask[:, -missing:], mask], dim=1)
        log_probs = self._run(fed_ids, fed_mask)
        predictions = self._last_predictions(log_probs[:, :, :missing], fed_mask[:, :missing])
        log_probs = log_probs[:, :, missing:]
        observation = self._likelihoods(predictions, log_probs, ids, mask)
        self.predictions = predictions
        self.predictions = self._last_predictions(log_probs, mask)
        self.token_ids = ids if self.token_ids is None else torch.cat([self.token_ids, ids], dim=1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        return observation

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (rows, candidates, tokens, vocabulary) after each token."""
        rows, count = ids.shape[0], len(self.candidates)
        repeated = mask.repeat_interleave(count, 0).long()
        logits = self.model(
            ids.repeat_interleave(count, 0),
            attention_mask=None if bool(mask.all()) else repeated,
            cache=self.cache,
            expert_vector=[*self.candidates * rows],
        ).logits
        return logits.to(at_least_float32(logits.dtype)).log_softmax(-1).unflatten(0, (rows, count))

    def _last_predictions(self, log_probs: Tensor, mask: Tensor) -> Tensor:
        """The predictions after some columns: those after the last real one, or the earlier ones."""
        rows, count, num_tokens, vocabulary = log_probs.shape
        earlier = self.predictions
        if earlier is None:
            earlier = log_probs.new_full((rows, count, vocabulary), torch.nan)  # no token yet, so never read
        if not num_tokens:
            return earlier
        last = _last_real(mask)[:, -1]
        index = last.clamp(min=0)[:, None, None, None].expand(-1, count, 1, vocabulary)
        return torch.where((last >= 0)[:, None, None], log_probs.gather(2, index)[:, :, 0], earlier)

    def _likelihoods(self, predictions: Tensor, log_probs: Tensor, ids: Tensor, mask: Tensor) -> Observation:
        rows, count = log_probs.shape[:2]
        had_token = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        if self.mask is not None:
            had_token = self.mask.any(1)
        last = _last_real(mask)
        before = torch.cat([last.new_full((rows, 1), -1), last[:, :-1]], dim=1)  # the real token before each, or -1
        row = torch.arange(rows, device=ids.device)[:, None, None]
        candidate = torch.arange(count, device=ids.device)[:, None]
        within = log_probs[row, candidate, before.clamp(min=0)[:, None], ids[:, None]]
        from_before = predictions[row, candidate, ids[:, None]]
        log_likelihoods = torch.where((before >= 0)[:, None], within, from_before).transpose(1, 2).double()
        is_observed = mask & ((before >= 0) | had_token[:, None])
        return Observation(log_probs, log_likelihoods.masked_fill(~is_observed[..., None], 0.0), is_observed)

    # ---- surgery

    def shorten(self, columns: int) -> None:
        """Keeps the first columns, also if a forward failed after it had fed the cache."""
        if columns == self.columns and self.num_missing >= 0:
            return
        if columns == 0 or self.token_ids is None or self.mask is None:
            self.reset()
            return
        self.token_ids, self.mask = self.token_ids[:, :columns], self.mask[:, :columns]
        self._drop_last_real(columns)

    def remove(self, is_removed: Tensor) -> None:
        """Turns columns of some rows (rows, columns) into padding."""
        if self.mask is not None:
            self.mask = self.mask & ~is_removed
            self._drop_last_real(int(is_removed.any(0).nonzero()[0]))

    def _drop_last_real(self, changed: int) -> None:
        """Leaves the last real token of every row, and all columns from `changed` on, to the next forward."""
        if self.mask is None:
            return
        last, in_cache = _last_real(self.mask)[:, -1], self.cache.get_seq_length()
        kept = min(int(torch.where(last >= 0, last, self.columns).min()), changed)
        if in_cache > kept:
            self._crop_cache(kept)
        self.predictions = None

    def _crop_cache(self, columns: int) -> None:
        """Keeps the first columns in the cache, or none of them if it has forgotten tokens that this would need."""
        if columns == 0:
            self.cache.reset()
            return
        try:
            self.cache.crop(columns - self.cache.get_seq_length())
        except ValueError:  # all tokens are in `token_ids`, so the next forward feeds them again
            if not self.cache.history.bounds.forgotten:
                raise
            self.cache.reset()

    def select_rows(self, rows: Tensor) -> None:
        count = len(self.candidates)
        offsets = torch.arange(count, device=rows.device)
        self.cache.select_rows((rows[:, None] * count + offsets).flatten())
        for name in ("token_ids", "mask", "predictions"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows.to(tensor.device)])

    def select_candidates(self, kept: Sequence[int]) -> None:
        """Keeps the candidates with these indices."""
        rows = 0 if self.token_ids is None else self.token_ids.shape[0]
        index = torch.tensor(list(kept), device="cpu")
        offsets = torch.arange(rows, device="cpu")[:, None] * len(self.candidates)
        self.candidates = [self.candidates[each] for each in kept]
        if rows:
            self.cache.select_rows((offsets + index).flatten())
        if self.predictions is not None:
            self.predictions = self.predictions[:, index.to(self.predictions.device)]

    def cache_of(self, chosen: Tensor) -> "MambaFormerCache":
        """A cache of the rows under the candidates (rows,), without the columns that are missing."""
        cache, count = self.cache.fork(), len(self.candidates)
        rows = torch.arange(len(chosen), device=chosen.device) * count + chosen
        cache.select_rows(rows)
        return cache

    def fork(self) -> "CandidateRows":
        other = copy.copy(self)
        other.cache, other.candidates = self.cache.fork(), list(self.candidates)
        return other

    def reset(self) -> None:
        self.cache.reset()
        self._forget()


def _last_real(mask: Tensor) -> Tensor:
    """The index of the last real column up to each column, (rows, columns); -1 if there is none yet."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).cummax(1).values


__all__ = ["CandidateRows", "Observation"]
