"""The posterior over expert vectors: which candidate fits a sequence, and predictions that average over all of them.

Expert vectors may differ in every row of a batch, so the candidates of a sequence are rows of one cache, encoded by
one forward. A posterior has the methods of a cache, and `generate(expert_posterior=...)` uses it as one.
"""

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_buffers_mambaformer import as_index, check_rows
from .cache_contract_mambaformer import CacheContractMixin
from .cache_lock_mambaformer import CacheLock, FeedLock, not_while_fed
from .expert_beliefs_mambaformer import Beliefs, resolve_log_prior
from .expert_candidates_mambaformer import CandidateRows
from .expert_posterior_files_mambaformer import load_posterior, save_posterior
from .expert_prior_mambaformer import DirichletPrior
from .expert_vectors_mambaformer import ExpertVector, ExpertVectorLike, expert_key, resolve_expert_vector
from .weights_version_mambaformer import weights_stamp

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache
    from .modeling_mambaformer import MambaFormerForCausalLM

MOST_LOGITS = 2**26  # of all candidates in one forward; longer sequences are fed in parts
TOKENS_PER_DROP = 64  # fed between two looks at the candidates, if improbable ones are dropped


class ExpertPosterior(CacheContractMixin, Cache):
    """The posterior probability of each candidate expert vector, given the tokens fed so far; rows are independent.

    P(k | x) ~ prior_k prod_t P_k(x_t | x_<t), where P_k is the model under candidate k, and the mixture predicts
    P(x | x_<t) = sum_k P(k | x_<t) P_k(x | x_<t). Its loss over a sequence exceeds the loss of candidate k by at most
    -log prior_k nats. The first token of a row is given: nothing predicts it.

    Args:
        model: a `MambaFormerForCausalLM`.
        candidates: expert vectors in any form that `expert_vector` takes, `None` for the base; by default the base and
            all of `model.expert_vectors`.
        prior: `None` (uniform), `{name: probability}`, a tensor (candidates,) or (rows, candidates), or a posterior
            over the same candidates, whose probabilities are the prior.
        switching: probability, per token, that the next token is drawn with a new candidate from the prior; with it,
            the posterior follows a sequence that changes its subject. 1 keeps the prior: predictions are averaged with
            its weights, as over `expert_vector.sample(n)`.
        drop_below: a candidate with a smaller probability in all rows is dropped and no longer computed. Let m be the
            sum of the dropped probabilities: the loss of a whole sequence grows by at most -log(1 - m) nats against a
            mixture in which the dropped candidates never recover, and the evidence that they would have added later is
            lost.
        cache_options: options of `model.make_cache`.

    Raises:
        TypeError, ValueError: no candidates, one that does not fit the model, two of equal content, or a prior or rate
            that is no probability.
    """

    is_posterior = True  # not by its class: remote code may have loaded a second copy of it
    max_columns = None

    def __init__(
        self,
        model: "MambaFormerForCausalLM",
        candidates: Sequence[ExpertVectorLike] | None = None,
        prior: object = None,
        switching: float = 0.0,
        drop_below: float = 0.0,
        **cache_options,
    ):
        super().__init__(layers=[])
        _check_rates(switching, drop_below)
        self.model, self.switching, self.drop_below = model, float(switching), float(drop_below)
        self.candidates = _resolve_candidates(model, candidates)
        self.names = [None if each is None else each.name for each in self.candidates]
        self.log_prior = resolve_log_prior(self._probabilities_of(prior), self.names)
        self.active = list(range(len(self.candidates)))
        self.rows = CandidateRows(model, self.candidates, **{"rollback_reach": 1, **cache_options})
        self.lock = CacheLock()
        self._forget()

    def _probabilities_of(self, prior: object) -> object:
        """A prior as `resolve_log_prior` takes it: the probabilities of a posterior over the same candidates."""
        if not getattr(prior, "is_posterior", False):
            return prior
        prior = cast(ExpertPosterior, prior)
        if _keys_of(prior.candidates) != _keys_of(self.candidates):
            raise ValueError(f"`prior` is a posterior over {prior.names}, and the candidates are {self.names}.")
        return prior.probabilities

    def _forget(self) -> None:
        # After each column: the log-probabilities of all candidates (rows, columns, candidates), and the log-evidence.
        self.log_probabilities: Tensor | None = None
        self.log_evidences: Tensor | None = None
        self.weights: object = None  # the stamps of the weights that the evidence was computed with

    # ---- results

    @property
    def probabilities(self) -> Tensor:
        """The probability of each candidate for the next token, (rows, candidates) in float64; 0 if it was dropped."""
        return self._beliefs().log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """The entropy of `probabilities` in nats, (rows,)."""
        return torch.special.entr(self.probabilities).sum(-1)

    @property
    def log_evidence(self) -> Tensor:
        """Log-probability in nats of the tokens of each row but its first, under the mixture: (rows,)."""
        return self._beliefs().log_evidence

    @property
    def history(self) -> Tensor:
        """The probability of each candidate after each column, (rows, columns, candidates)."""
        if self.log_probabilities is None:
            return self.log_prior.new_zeros(len(self.log_prior), 0, len(self.candidates))
        return self.log_probabilities.exp()

    @property
    def token_ids(self) -> Tensor | None:
        """Ids of all columns fed, (rows, columns), pads included. A copy."""
        return None if self.rows.token_ids is None else self.rows.token_ids.clone()

    def _beliefs(self) -> Beliefs:
        if self.log_probabilities is None or self.log_evidences is None:
            return Beliefs.of_prior(self._log_prior_left(), len(self.log_prior))
        return Beliefs(self.log_probabilities[:, -1], self.log_evidences[:, -1])

    def _log_prior_left(self) -> Tensor:
        """The prior, given that no dropped candidate is right."""
        if len(self.active) == len(self.candidates):
            return self.log_prior
        return _spread(self.log_prior[:, self.active].log_softmax(-1), self.active, len(self.candidates))

    # ---- observing

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Observes tokens; returns the log-probabilities of the next token under the mixture after each of them.

        Args:
            input_ids: new tokens (rows, tokens).
            attention_mask: 0 at padding, which may stand anywhere: (rows, tokens), or with all earlier columns.

        Returns:
            (rows, tokens, vocabulary), at least in float32; of no use at padding.

        Raises:
            TypeError, ValueError: tokens that do not fit, or evidence that is no number; nothing has changed then.
        """
        return self.predict(input_ids, attention_mask)

    def observe(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """`feed` without its result, which would be large."""
        self.predict(input_ids, attention_mask, num_kept=1)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, num_kept: int = 0) -> Tensor:
        """`feed`; returns the predictions after the last `num_kept` tokens, or after all of them if it is 0."""
        with FeedLock(self.lock):
            ids, mask = self._check(input_ids, attention_mask)
            self._observe_again_if_weights_changed()
            parts = self._parts(*ids.shape)
            num_kept = num_kept or ids.shape[1]
            if len(parts) == 1:
                return self._observe(ids, mask, num_kept)
            work, predictions = self.fork(), []  # so that a failing part leaves everything as it was
            for part in parts:
                kept = max(part.stop - max(part.start, ids.shape[1] - num_kept), 0)
                predictions.append(work._observe(ids[:, part], mask[:, part], kept))
            self._take_from(work)
            return torch.cat(predictions, dim=1)

    def _parts(self, rows: int, num_tokens: int) -> list[slice]:
        """The tokens of the forwards of a `predict`."""
        step = max(1, MOST_LOGITS // (rows * len(self.active) * self.model.config.vocab_size))
        step = min(step, TOKENS_PER_DROP) if self.drop_below else step
        return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]

    def _observe(self, ids: Tensor, mask: Tensor, num_kept: int) -> Tensor:
        """`predict` in one forward."""
        columns, num_tokens = self.rows.columns, ids.shape[1]
        try:
            observation = self.rows.observe(ids, mask)
            after = self._fold(observation.log_likelihoods, observation.is_observed)
        except BaseException:
            self.rows.shorten(columns)
            raise
        kept = slice(num_tokens - num_kept, None)
        weights = torch.stack([each.log_probabilities for each in after], dim=2)[:, :, kept]  # (rows, active, kept)
        log_probs = observation.log_probs[:, :, kept]
        predictions = torch.logsumexp(log_probs + weights[..., None].to(log_probs), dim=1)
        self._append(after)
        if self.drop_below:
            self._drop_improbable()
        return predictions

    def _fold(self, log_likelihoods: Tensor, is_observed: Tensor) -> list[Beliefs]:
        """The beliefs about the active candidates after each token."""
        rows, device = len(log_likelihoods), log_likelihoods.device
        log_prior = self.log_prior[:, self.active].log_softmax(-1).to(device)
        beliefs, after = self._beliefs_of(rows, device), []
        for tokens in zip(log_likelihoods.unbind(1), is_observed.unbind(1), strict=True):
            beliefs = beliefs.after(*tokens, log_prior, self.switching)
            after.append(beliefs)
        return after

    def _beliefs_of(self, rows: int, device: torch.device) -> Beliefs:
        beliefs = self._beliefs()
        probabilities, evidence = beliefs.log_probabilities[:, self.active], beliefs.log_evidence
        return Beliefs(probabilities.expand(rows, -1).to(device), evidence.expand(rows).to(device))

    def _append(self, after: list[Beliefs]) -> None:
        log_probabilities = torch.stack([each.log_probabilities for each in after], dim=1)
        log_probabilities = _spread(log_probabilities, self.active, len(self.candidates))
        log_evidences = torch.stack([each.log_evidence for each in after], dim=1)
        if self.log_probabilities is not None and self.log_evidences is not None:
            log_probabilities = torch.cat([self.log_probabilities, log_probabilities], dim=1)
            log_evidences = torch.cat([self.log_evidences, log_evidences], dim=1)
        self.log_probabilities, self.log_evidences = log_probabilities, log_evidences

    def _drop_improbable(self) -> None:
        probabilities = self.probabilities[:, self.active]
        is_kept = (probabilities >= self.drop_below).any(0)
        is_kept[probabilities.sum(0).argmax()] = True
        kept = is_kept.nonzero().flatten().tolist()
        if len(kept) == len(self.active) or self.log_probabilities is None:
            return
        self.rows.select_candidates(kept)
        self.active = [self.active[each] for each in kept]
        left = self.log_probabilities[:, -1, self.active].log_softmax(-1)
        last = _spread(left, self.active, len(self.candidates))
        self.log_probabilities = torch.cat([self.log_probabilities[:, :-1], last[:, None]], dim=1)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new tokens and their mask, (rows, tokens) each."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            raise TypeError("A posterior observes token ids: pass an integer tensor (rows, tokens).")
        rows, num_tokens = input_ids.shape
        wanted = self.batch_size if self.batch_size != -1 else len(self.log_prior) if len(self.log_prior) > 1 else rows
        if rows != wanted or not num_tokens:
            raise ValueError(f"The posterior has {wanted} rows, and the tokens are {tuple(input_ids.shape)}.")
        if attention_mask is None:
            return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask.shape not in (input_ids.shape, (rows, self.get_seq_length() + num_tokens)):
            raise ValueError(
                f"`attention_mask` must be {tuple(input_ids.shape)} for the new tokens, or have all "
                f"{self.get_seq_length()} columns of before too, got {tuple(attention_mask.shape)}."
            )
        if attention_mask.dtype != torch.bool and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
            raise ValueError(
                "`attention_mask` must be 0 or 1: a posterior observes one sequence in each row, and larger numbers "
                "tell sequences that are packed into a row."
            )
        mask = attention_mask[:, -num_tokens:].bool().to(input_ids.device)
        return input_ids.masked_fill(~mask, 0), mask

    @torch.no_grad()
    def refresh(self) -> None:
        """Observes all columns again if weights have changed since they were observed.

        Evidence of other weights is never used: `feed`, `choose`, `sample`, `blend` and `save` call this first.
        `probabilities`, `log_evidence` and `history` are those of the last observation.

        Raises:
            ValueError: an expert vector is merged into the weights, so that no candidate can be run.
        """
        with FeedLock(self.lock):
            self._observe_again_if_weights_changed()

    def _observe_again_if_weights_changed(self) -> None:
        weights = stamps_of(self.model)
        if self.weights == weights:
            return
        ids, mask = self.rows.token_ids, self.rows.mask
        if ids is not None and mask is not None and self.weights is not None:
            work = self.fork()
            work.reset()
            work.weights = weights
            work.observe(ids, mask)
            self._take_from(work)
        self.weights = weights

    # ---- decisions

    def choose(self) -> tuple["MambaFormerCache", list[ExpertVector | None]]:
        """The most probable candidate of each row, and a cache of the sequences under them: no second pass."""
        self.refresh()
        return self._under(self.probabilities.argmax(-1))

    def sample(self, generator: torch.Generator | None = None) -> tuple["MambaFormerCache", list[ExpertVector | None]]:
        """A candidate for each row, drawn from the posterior (Thompson sampling), and the cache under them."""
        self.refresh()
        return self._under(self.probabilities.multinomial(1, generator=generator)[:, 0])

    def blend(self) -> list[ExpertVector | None]:
        """For each row, the average of the candidates by their probabilities: `z = sum_k p_k z_k`."""
        self.refresh()
        blends: list[ExpertVector | None] = []
        for row in self.probabilities.tolist():
            parts = [(p, each) for p, each in zip(row, self.candidates, strict=True) if each is not None]
            blends.append(ExpertVector.blend(parts, "posterior") if parts else None)
        return blends

    def _under(self, chosen: Tensor) -> tuple["MambaFormerCache", list[ExpertVector | None]]:
        position = {candidate: index for index, candidate in enumerate(self.active)}
        numbers = chosen.tolist()
        if self.batch_size == -1:
            raise ValueError("The posterior has observed no tokens: feed it a sequence first.")
        cache = self.rows.cache_of(torch.tensor([position[number] for number in numbers], device="cpu"))
        return cache, [self.candidates[number] for number in numbers]

    def learned_prior(self, prior: DirichletPrior | None = None) -> DirichletPrior:
        """A new `DirichletPrior`: the counts of `prior` (by default one for each candidate) and these sequences."""
        learned = DirichletPrior(dict.fromkeys(self.names, 1.0) if prior is None else prior.counts)
        learned.update(self)
        return learned

    # ---- files

    @not_while_fed("saved", changes=False)
    def save(self, path: str | os.PathLike) -> None:
        """Writes the posterior as one safetensors file, atomically: sequences, evidence, candidates and states.

        Raises:
            OSError: the file cannot be written.
            ValueError: weights are offloaded, so that the file cannot name them by content.
        """
        self.refresh()
        save_posterior(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: "MambaFormerForCausalLM") -> "ExpertPosterior":
        """The posterior that `save` wrote, for `model`: it continues as the saved one would have, bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file, a file of another kind, or a model with another configuration or other weights.
        """
        posterior = load_posterior(path, model)
        posterior.weights = stamps_of(model) if posterior.is_initialized else None
        return posterior

    # ---- the contract of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return self.rows.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """See `MambaFormerCache.is_linear`."""
        return self.rows.cache.is_linear

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        """Rows of the sequences, or -1 before the first tokens."""
        return -1 if self.rows.token_ids is None else self.rows.token_ids.shape[0]

    def activate_past_recording(self, reach: int = TOKENS_PER_DROP) -> None:
        """Makes `crop` of up to `reach` tokens cheap; see `MambaFormerCache.activate_past_recording`."""
        self.rows.cache.activate_past_recording(reach + 1)

    @not_while_fed("cropped")
    def crop(self, tokens_to_remove: int | Sequence[int] | Tensor) -> None:
        """Takes back the last columns and their evidence, as if they had never been fed.

        Args:
            tokens_to_remove: -k for the last k columns, or one such number per row; columns that only some rows lose
                become pads of these rows.

        Raises:
            ValueError: more columns than were fed, or a positive number.
        """
        columns, rows = self.get_seq_length(), max(self.batch_size, 0)
        numbers = tokens_to_remove.tolist() if isinstance(tokens_to_remove, Tensor) else tokens_to_remove
        by_row = list(numbers) if isinstance(numbers, Sequence) else [numbers] * rows
        is_valid = len(by_row) == rows and all(type(k) is int and 0 <= -k <= columns for k in by_row)
        if not is_valid:
            raise ValueError(
                f"`crop` takes -k for the last k of {columns} columns, or one such number for each of {rows} rows; "
                f"got {tokens_to_remove}."
            )
        if any(by_row):
            self._crop(torch.tensor(by_row, device="cpu") + columns)

    def _crop(self, left: Tensor) -> None:
        """Keeps the first `left` (rows,) columns of each row."""
        log_probabilities, log_evidences, ids = self.log_probabilities, self.log_evidences, self.rows.token_ids
        columns = int(left.max())
        if columns == 0 or log_probabilities is None or log_evidences is None or ids is None:
            self.reset()
            return
        if bool((left < columns).any()):
            # A column that is a pad from now on has the beliefs of the column before it.
            column = torch.arange(ids.shape[1], device=ids.device)
            left = left.to(ids.device)[:, None]
            is_removed = column >= left
            at = torch.minimum(column, left - 1)
            beliefs = Beliefs.of_prior(self._log_prior_left().to(ids.device), len(ids))
            is_empty = at < 0
            index = at.clamp(min=0)
            log_evidences = torch.where(is_empty, beliefs.log_evidence[:, None], log_evidences.gather(1, index))
            index = index[..., None].expand_as(log_probabilities)
            log_probabilities = log_probabilities.gather(1, index)
            log_probabilities = torch.where(is_empty[..., None], beliefs.log_probabilities[:, None], log_probabilities)
            self.rows.remove(is_removed)
        self.rows.shorten(columns)
        self.log_probabilities, self.log_evidences = log_probabilities[:, :columns], log_evidences[:, :columns]

    @not_while_fed("given other rows")
    def select_rows(self, rows: Tensor | Sequence[int]) -> None:
        """Makes row i a copy of the earlier row `rows[i]`.

        Raises:
            ValueError: there is no such row.
        """
        index = as_index(rows).long()
        check_rows(index, self.num_selectable_rows(), "posterior")
        if len(self.log_prior) > 1:
            self.log_prior = self.log_prior[index.to(self.log_prior.device)]
        if self.log_probabilities is None or self.log_evidences is None:
            return
        self.rows.select_rows(index)
        on_device = index.to(self.log_probabilities.device)
        self.log_probabilities = self.log_probabilities[on_device]
        self.log_evidences = self.log_evidences[on_device]

    def num_selectable_rows(self) -> int:
        """Rows of the sequences, or of the prior before the first tokens."""
        return self.batch_size if self.batch_size != -1 else len(self.log_prior)

    @not_while_fed("reset")
    def reset(self) -> None:
        """Drops the sequence; the prior and all candidates that were not dropped stay."""
        self.rows.reset()
        self._forget()

    @not_while_fed("forked", changes=False)
    def fork(self) -> "ExpertPosterior":
        """An independent posterior that continues from here; both share the memory that neither writes."""
        other = copy.copy(self)
        other.rows, other.active, other.lock = self.rows.fork(), list(self.active), CacheLock()
        return other

    def _take_from(self, other: "ExpertPosterior") -> None:
        self.__dict__.update({name: value for name, value in vars(other).items() if name != "lock"})

    @property
    def nbytes(self) -> int:
        """Bytes of the cache of all candidates."""
        return self.rows.cache.nbytes


def stamps_of(model: "MambaFormerForCausalLM") -> tuple[object, ...]:
    """Stamps of all weights that evidence depends on."""
    return weights_stamp(model.base_model), weights_stamp(model.lm_head), model.num_replacements


def _check_rates(switching: object, drop_below: object) -> None:
    for name, value in (("switching", switching), ("drop_below", drop_below)):
        is_certain = name == "drop_below" and value == 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1 or is_certain:
            limit = "1" if name == "switching" else "below 1"
            raise ValueError(f"`{name}` must be a probability from 0 to {limit}, got {value!r}.")
    if switching and drop_below:
        raise ValueError(
            "With `switching`, the prior brings every candidate back after each token, so none can be dropped: leave "
            "`drop_below` or `switching` out."
        )


def _resolve_candidates(
    model: "MambaFormerForCausalLM", candidates: Sequence[ExpertVectorLike] | None
) -> list[ExpertVector | None]:
    library = model.expert_vectors
    if candidates is None:
        candidates = [None, *library]
    if isinstance(candidates, (str, dict)) or not isinstance(candidates, Sequence) or not candidates:
        raise ValueError(
            "`candidates` must be a list of expert vectors, names or None for the base, with at least one entry, got "
            f"{candidates!r}."
        )
    resolved = [cast("ExpertVector | None", resolve_expert_vector(each, library)) for each in candidates]
    for each in resolved:
        if each is not None:
            model.check_expert_vector(each)
    keys = _keys_of(resolved)
    if len(set(keys)) < len(keys):
        raise ValueError(f"Two of the candidates {list(candidates)} have the same content: leave one of them out.")
    return resolved


def _keys_of(candidates: Sequence[ExpertVector | None]) -> list[object]:
    return [expert_key(each) for each in candidates]


def _spread(of_active: Tensor, active: Sequence[int], num_candidates: int) -> Tensor:
    """Log-probabilities of the active candidates (..., active) as log-probabilities of all candidates."""
    spread = of_active.new_full((*of_active.shape[:-1], num_candidates), -torch.inf)
    spread[..., list(active)] = of_active
    return spread


__all__ = ["ExpertPosterior", "stamps_of"]
