"""MambaFormer (arXiv 2402.04248): Mamba and attention in one stack, with expert vectors and an exact cache.

In order: the base class of all models, the stack, the heads. The steps of a forward are in `MambaFormerModel.forward`,
which opens and closes the cache's transaction and checks that the weights are those of the cache.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .cache_history_mambaformer import UNCHANGED, Change, NewTokens
from .cache_lock_mambaformer import locks_its_cache
from .cache_mambaformer import MambaFormerCache
from .cache_options_mambaformer import CacheOptions
from .cache_policies_mambaformer import Budgets, PruningPolicy, resolve_policy
from .cache_prefix_mambaformer import PrefixCache
from .cache_retention_mambaformer import Span
from .cache_transaction_mambaformer import CacheTransaction, UncachedForward
from .configuration_mambaformer import MambaFormerConfig
from .decode_program_mambaformer import DecodePrograms
from .expert_fitting_mambaformer import fit_expert_vector
from .expert_laplace_mambaformer import fit_isotropic, fit_laplace
from .expert_linear_mambaformer import apply_expert_linear
from .expert_posterior_mambaformer import ExpertPosterior
from .expert_runtime_mambaformer import (
    ExpertRuntimeMixin,
    ExpertVectorArgument,
    PreparedExpertVectors,
    is_compiled_step,
    resolve_with_key,
)
from .expert_vectors_mambaformer import ExpertVectorLike
from .files_mambaformer import digest_of
from .generation_export_mambaformer import DecodeStep
from .generation_mambaformer import MambaFormerGenerationMixin
from .generation_schedule_mambaformer import ExpertSwitchLogitsProcessor
from .inputs_mambaformer import check_forward_inputs, check_keywords, check_output_request, check_token_ids
from .inputs_packing_mambaformer import (
    Sequences,
    packed_sequences,
    refuse_packed_rows,
    split_borders,
    starts_in_input_order,
)
from .inputs_padding_mambaformer import ForwardInputs, LeftAlignment, OutputCollector, prepend_history
from .inputs_prompt_mambaformer import embedding_marks
from .library_mambaformer import (
    CACHE_NAMES,
    LibraryKwargs,
    MambaFormerCausalLMOutput,
    MambaFormerModelOutput,
    MambaFormerSequenceClassifierOutput,
    cache_of,
    name_causal_model,
)
from .mixer_attention_mambaformer import MambaFormerAttention, MambaFormerRotaryEmbedding
from .mixer_attention_masks_mambaformer import can_group, make_attention_masks
from .mixer_attention_sinks_mambaformer import needs_sink_angles, split_angles, stack_positions, turns_keys
from .mixer_base_mambaformer import MambaFormerRMSNorm
from .modeling_layer_mambaformer import MambaFormerLayer
from .modeling_losses_mambaformer import causal_lm_loss, causal_loss_arguments, check_class_labels, classification_loss
from .modeling_saving_mambaformer import SavingMixin
from .modeling_stack_mambaformer import Place, check_cache_fits, places_of_model
from .weights_parallel_mambaformer import (
    CountsReplacements,
    adapters_of,
)
from .weights_quantized_mambaformer import (
    portable,
    quantized_activations,
)
from .weights_version_mambaformer import SeenWeights, weights_stamp, without_counted_forwards

logger = logging.get_logger(__name__)


class MambaFormerPreTrainedModel(CountsReplacements, ExpertRuntimeMixin, SavingMixin, PreTrainedModel):
    """The base class of all models: initialization and caches; its mixins add expert vectors and saved folders."""

    config_class = MambaFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaFormerLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MambaFormerLayer, "attentions": MambaFormerAttention}
    _is_stateful = False  # `crop` restores every state, so speculative decoding may roll back
    _fingerprint: tuple[int | None, str] | None = None
    if TYPE_CHECKING:  # Transformers would evaluate these annotations before the stack is defined
        config: MambaFormerConfig
        base_model: "MambaFormerModel"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mixer_weights = getattr(module, "init_mixer_weights", None)
        if init_mixer_weights is not None:
            init_mixer_weights(self.config)

    # ---- caches

    def make_cache(
        self,
        storage: str = "dense",
        max_cache_len: int | None = None,
        on_expert_change: str = "recompute",
        rollback_reach: int = 0,
        kv_bits: int | dict[str, int] | None = None,
        park_bytes: int = 0,
        policy: PruningPolicy | dict[str, object] | str | None = None,
        budget: Budgets | None = None,
        state_bits: int | None = None,
        remember: int | None = None,
        **unknown,
    ) -> MambaFormerCache:
        """A cache for this model; the options are those of `CacheOptions`. `budget` replaces the one of `policy`."""
        check_keywords(self.make_cache, unknown, frozenset())
        pruning = resolve_policy(policy, budget)
        kind = storage, max_cache_len, on_expert_change, rollback_reach
        options = CacheOptions(*kind, kv_bits, park_bytes, pruning, state_bits, remember)
        resolve = functools.partial(resolve_with_key, self._expert_library)
        return MambaFormerCache(self.config, options, resolve, self.base_model)

    def make_prefix_cache(self, max_bytes: int, min_tokens: int = 16, **cache_options) -> PrefixCache:
        """A `PrefixCache` for this model, for `generate(prefix_cache=...)`; `cache_options` as of `make_cache`."""
        return PrefixCache(self, max_bytes, min_tokens, **cache_options)

    def load_cache(
        self, path: str, on_weights_change: str = "error", max_cache_len: int | None = None, **unknown
    ) -> MambaFormerCache:
        """The cache that `cache.save(path)` wrote; see `MambaFormerCache.load`."""
        check_keywords(self.load_cache, unknown, frozenset())
        return MambaFormerCache.load(path, self, on_weights_change, max_cache_len)

    def weights_fingerprint(self) -> tuple[int | None, str]:
        """`weights_stamp` and hex SHA-256 of all weights that a cache depends on; read once for each stamp.

        Raises:
            ValueError: weights are offloaded, so that their content cannot be read.
        """
        base, stamp = self.base_model, weights_stamp(self.base_model)
        fingerprint = base._fingerprint
        if fingerprint is None or fingerprint[0] != stamp:
            weights = {name: portable(weight) for name, weight in base.state_dict().items() if torch.is_tensor(weight)}
            offloaded = [name for name, weight in weights.items() if weight.is_meta]
            if offloaded:
                raise ValueError(
                    f"A session needs the content of the weights, and {offloaded[:3]} are offloaded: load the model "
                    "without offloading."
                )
            settings = {"adapters": adapters_of(base), **quantized_activations(base)}
            fingerprint = base._fingerprint = (stamp, digest_of(weights, settings))
        return fingerprint

    def weights_changed(self) -> None:
        """Tells caches and singular bases that weights were written in a way that leaves no trace.

        Such are writes through `weight.data` or through a NumPy view. All others are noticed without it.
        """
        self.base_model.num_replacements += 1


class MambaFormerModel(MambaFormerPreTrainedModel):
    """The stack without a head: token ids or embeddings -> hidden states (rows, tokens, hidden_size)."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MambaFormerLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else MambaFormerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._decode_programs, self._seen_weights = DecodePrograms(), SeenWeights()
        self.post_init()

    @can_return_tuple
    @locks_its_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        expert_vector: ExpertVectorArgument = ...,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: LibraryKwargs,
    ) -> MambaFormerModelOutput:
        """Feeds new tokens, which follow the tokens of the cache.

        Args:
            attention_mask: 0 (pad) or 1 for the new tokens (rows, tokens), or for those of the cache and the new ones.
                Pads may stand anywhere; the states at a pad are those of the last real token before it. Larger
                numbers tell sequences that are packed into a row: 1, 1, 2, 2, 0.
            position_ids: positions for RoPE (rows, tokens); by default each sequence counts its real tokens. A
                sequence starts where they do not grow.
            cache: a cache of `make_cache`; by default one is made if `use_cache`. `past_key_values` is the same
                argument under its older name.
            expert_vector: see `MambaFormerForCausalLM.forward`.
            output_hidden_states: whether to return hidden states, or the indices of those to return.
            kwargs: `seq_idx` (rows, tokens), another number for each sequence packed into a row; or `cu_seq_lens_q`,
                `cu_seq_lens_k`, `cu_seqlens` (sequences + 1,), where sequences start among the tokens of all rows.
                Packed sequences do not see each other, and no cache is made of them.

        Raises:
            ValueError, TypeError: input that does not fit; the cache is then as it was.
        """
        check_keywords(self.forward, kwargs)
        cache = cache_of(cache, past_key_values)
        borders, kwargs = split_borders(kwargs)
        new_inputs = check_forward_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        alignment, is_grouped = LeftAlignment.of(new_inputs.mask), can_group(self.config, output_attentions)
        sequences = packed_sequences(new_inputs, alignment, borders, attention_mask, cache, use_cache, is_grouped)
        prepared = self._prepare_in_force(expert_vector, cache)
        cache, places = self._cache_for(use_cache, cache) if sequences is None else None, places_of_model(self)
        if cache is not None:
            check_cache_fits(cache, places)
        change = self._change(new_inputs, prepared, cache)
        inputs = new_inputs
        if cache is not None and change.recomputes:
            inputs = prepend_history(new_inputs, cache, self.embed_tokens, change.resumed)
            alignment = LeftAlignment.of(inputs.mask)
        collector = OutputCollector(self.config, alignment, output_hidden_states, output_attentions)
        if collector.wants_attention and self.config._attn_implementation != "eager":
            logger.warning_once("Only `attn_implementation='eager'` returns attention weights.")
        uncounted = without_counted_forwards(self) if prepared.weights is not None else nullcontext()
        with self._transaction(cache, change, new_inputs, inputs, alignment) as transaction, uncounted:
            hidden_states = self._run(
                places, inputs, alignment, transaction.span, prepared, cache, collector, sequences, **kwargs
            )
        if cache is not None and change is not UNCHANGED:
            cache.prepared_expert_vectors = prepared if prepared.is_reusable else None
        num_new = new_inputs.token_ids.shape[1]
        return MambaFormerModelOutput(
            last_hidden_state=alignment.restore(hidden_states)[:, -num_new:],
            cache=cache,
            **collector.results(num_new),
        )

    def _run(
        self,
        places: list[Place],
        inputs: ForwardInputs,
        alignment: LeftAlignment,
        span: Span,
        prepared: PreparedExpertVectors,
        cache: MambaFormerCache | None,
        collector: OutputCollector,
        sequences: Sequences | None,
        **kwargs,
    ) -> torch.Tensor:
        """All layers over the inputs; left-aligned hidden states (rows, tokens, hidden_size)."""
        device = inputs.token_ids.device
        hidden_states = alignment.align(self._embed(inputs))
        position_embeddings = sink_angles = None
        if self.rotary_emb is not None:
            chosen = inputs.position_ids
            counted = span.positions(device) if sequences is None else sequences.positions
            positions = counted if chosen is None else alignment.align(chosen)
            if needs_sink_angles(self.config, span, sequences):
                is_one_query = turns_keys(self.config, span, sequences)
                stacked = stack_positions(self.config, positions, counted, is_one_query)
                position_embeddings, sink_angles = split_angles(*self.rotary_emb(hidden_states, stacked))
            else:
                position_embeddings = self.rotary_emb(hidden_states, positions)
        shown = alignment if collector.wants_attention else None
        masked = hidden_states, shown, sequences, sink_angles
        attention = make_attention_masks(places, self.config, span, cache, *masked)
        if not collector.wants_anything:
            shared = attention, prepared.scaled_bases, position_embeddings, cache, span.lengths
            decoded = self._decode_programs.run(places, prepared.weights, hidden_states, *shared, **kwargs)
            if decoded is not None:
                return self.norm(decoded)
        for place in places:
            outputs = place.module(
                collector.hidden(hidden_states),
                attention=attention.get(place.window),
                expert_vectors=place.vectors_of(prepared.scaled_bases),
                position_embeddings=position_embeddings,
                cache=place.cache_of(cache),
                lengths=span.lengths,
                positions=None if sequences is None else sequences.positions,
                **kwargs,
            )
            # A layer that a user put in may return its states alone, as most layers of Transformers do.
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            hidden_states, weights = outputs[0], outputs[1] if len(outputs) > 1 else None
            collector.attention(weights)
        return collector.hidden(self.norm(hidden_states))

    def _cache_for(self, use_cache: bool | None, cache: MambaFormerCache | None) -> MambaFormerCache | None:
        is_checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and is_checkpointing:
            raise ValueError(
                "Gradient checkpointing runs layers twice and cannot use a cache: leave it out, or run the forward "
                "under `torch.no_grad()`."
            )
        if cache is not None:
            return cache
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if wanted and is_checkpointing:
            logger.warning_once("Gradient checkpointing runs layers twice: `use_cache=True` is ignored.")
        return self.make_cache() if wanted and not is_checkpointing else None

    def _transaction(
        self,
        cache: MambaFormerCache | None,
        change: Change,
        new_inputs: ForwardInputs,
        inputs: ForwardInputs,
        alignment: LeftAlignment,
    ) -> CacheTransaction | UncachedForward:
        """Context of the run of all layers: with a cache, a transaction on it."""
        num_tokens, device = inputs.token_ids.shape[1], inputs.token_ids.device
        if cache is None:
            return UncachedForward(Span(num_tokens, lengths=alignment.lengths))
        marks = None if new_inputs.inputs_embeds is None else embedding_marks(new_inputs.inputs_embeds)
        new = NewTokens(new_inputs.token_ids, new_inputs.mask, new_inputs.position_ids, marks)
        return cache.transaction(change, new, num_tokens, alignment.lengths, device)

    def _change(
        self, new_inputs: ForwardInputs, prepared: PreparedExpertVectors, cache: MambaFormerCache | None
    ) -> Change:
        rows = new_inputs.token_ids.shape[0]
        if is_compiled_step(cache):
            return UNCHANGED
        if prepared.num_rows not in (None, rows):
            raise ValueError(
                f"`expert_vector` has {prepared.num_rows} entries for {rows} rows of the batch: give one each."
            )
        if cache is None:
            return UNCHANGED
        weights = weights_stamp(self) if prepared.weights is None else prepared.weights
        return cache.decide_change(prepared.expert_vector, prepared.key, weights)

    def _embed(self, inputs: ForwardInputs) -> torch.Tensor:
        if inputs.inputs_embeds is None:
            return self.embed_tokens(inputs.token_ids)
        if inputs.mask is None:
            return inputs.inputs_embeds
        # Embeddings at a pad may be NaN, which a weight of zero would not remove from a sum.
        return inputs.inputs_embeds.masked_fill(~inputs.mask[..., None], 0)


class MambaFormerForCausalLM(MambaFormerGenerationMixin, MambaFormerPreTrainedModel):
    """A language model: token ids -> logits (rows, tokens, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.model = MambaFormerModel(config)
        self.model._expert_library = self._expert_library
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.loss_type = "ForCausalLM"  # Transformers guesses it from the class's name; `Trainer` counts targets by it
        self.post_init()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        name_causal_model(cls.__name__)

    @can_return_tuple
    @locks_its_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_vector: ExpertVectorArgument = ...,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: LibraryKwargs,
    ) -> MambaFormerCausalLMOutput:
        """Feeds new tokens, which follow the tokens of the cache; see `MambaFormerModel.forward` for other arguments.

        Args:
            labels: next-token targets are `labels` shifted by one (rows, tokens). Ignored are -100, pads, and the
                first real token of a row, which no token of this forward predicts. So padding changes neither the
                loss nor its gradient.
            logits_to_keep: logits of only the last so many tokens (0: of all), or of those at these indices.
            expert_vector: re-tunes the weights (SVF, arXiv 2501.06252): `None` (the base), a name in
                `model.expert_vectors`, an `ExpertVector`, {module: scales}, or a list with one of these per row.
                Default: the expert vector in force in the cache. `on_expert_change` of the cache defines the effect of
                a change on the cached tokens.
            kwargs: `num_items_in_batch` is the count of `labels[:, 1:]` other than -100 in all micro-batches of an
                optimizer step, as `Trainer` passes it; the loss is then a sum divided by it. Where the count includes
                labels that are ignored here, the batch's share of it weighs the mean over the batch's targets. Over
                several micro-batches the loss is exact with right padding, and with left padding if the label of
                each row's first real token is -100.
        """
        check_keywords(self.forward, kwargs)
        shifted = kwargs.get("shift_labels")
        check_output_request(input_ids, inputs_embeds, labels, logits_to_keep, self.config.vocab_size, shifted)
        cache = cache_of(cache, past_key_values)
        if getattr(cache, "is_posterior", False):
            posterior, others = cast(ExpertPosterior, cache), (position_ids, inputs_embeds, labels)
            return self._predict_mixture(posterior, input_ids, attention_mask, logits_to_keep, expert_vector, others)
        prepared = self._prepare_in_force(expert_vector, cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            expert_vector=prepared,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head_bases = prepared.scaled_bases.get("", {})
        logits = apply_expert_linear(self.lm_head, outputs.last_hidden_state[:, kept], head_bases.get("lm_head"))
        loss = None
        if labels is not None:
            mask = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].bool()
            borders, loss_arguments = split_borders(kwargs)
            starts = starts_in_input_order(labels, attention_mask, position_ids, borders)
            targets = causal_loss_arguments(labels, mask, starts, **loss_arguments)
            loss = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **targets)
        return MambaFormerCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _predict_mixture(
        self,
        posterior: ExpertPosterior,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        expert_vector: ExpertVectorArgument,
        others: tuple[torch.Tensor | None, ...],
    ) -> MambaFormerCausalLMOutput:
        """A forward that feeds a posterior as its cache: the logits are the log-probabilities of the mixture."""
        if input_ids is None or expert_vector is not ... or any(each is not None for each in others):
            raise ValueError(
                "A posterior observes token ids and brings its expert vectors: leave `expert_vector`, `position_ids`, "
                "`inputs_embeds` and `labels` out."
            )
        num_kept = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits = posterior.predict(input_ids, attention_mask, num_kept)
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]
        return MambaFormerCausalLMOutput(logits=logits, cache=cast(MambaFormerCache, posterior))

    def make_posterior(
        self,
        candidates: Sequence[ExpertVectorLike] | None = None,
        prior: object = None,
        switching: float = 0.0,
        drop_below: float = 0.0,
        **cache_options,
    ) -> ExpertPosterior:
        """An `ExpertPosterior` over candidates, for `generate(expert_posterior=...)`; options as of `make_cache`."""
        return ExpertPosterior(self, candidates, prior, switching, drop_below, **cache_options)

    fit_laplace = fit_laplace
    fit_isotropic = fit_isotropic
    fit_expert_vector = fit_expert_vector

    def decode_step(self, cache: MambaFormerCache) -> DecodeStep:
        """One decode step after the sequence of a static cache, as a module for `torch.export`."""
        return DecodeStep(self, cache)


class MambaFormerForSequenceClassification(MambaFormerPreTrainedModel):
    """A classifier of sequences: token ids -> logits (rows, num_labels), read at the last real token."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = MambaFormerModel(config)
        self.model._expert_library = self._expert_library
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.loss_function = classification_loss
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        expert_vector: ExpertVectorArgument = ...,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: LibraryKwargs,
    ) -> MambaFormerSequenceClassifierOutput:
        """Classifies rows; the other arguments are those of `MambaFormerModel.forward`.

        Args:
            attention_mask: without one, tokens that are `config.pad_token_id` count as pads.
            labels: class indices (rows,), or values (rows, num_labels) for a regression and for several labels. The
                problem is `config.problem_type`; not set, `num_labels` and the labels' type tell it for this forward.
            kwargs: `num_items_in_batch` is the count of labels in all micro-batches of an optimizer step.

        Raises:
            ValueError: several rows without a mask and without a pad id, or labels that do not fit.
        """
        check_keywords(self.forward, kwargs)
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
        fed = inputs_embeds if input_ids is None else input_ids
        if labels is not None and isinstance(fed, torch.Tensor):  # what is fed is checked by the stack
            check_class_labels(labels, (len(fed), self.num_labels), self.config)
        if attention_mask is None:
            attention_mask = self._mask_of(input_ids, inputs_embeds)
        cache = cache_of(cache, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            expert_vector=expert_vector,
            return_dict=True,
            **kwargs,
        )
        refuse_packed_rows(outputs.last_hidden_state, attention_mask, position_ids, split_borders(kwargs)[0])
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            counts = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **counts)
        return MambaFormerSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _mask_of(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of the pad ids; without it the last column would be read even if it is a pad."""
        pad, fed = self.config.pad_token_id, inputs_embeds if input_ids is None else input_ids
        if pad is None and fed is not None and fed.shape[0] > 1:
            raise ValueError(
                f"The batch has {fed.shape[0]} rows and nothing marks their pads: pass an `attention_mask`, or set "
                "`model.config.pad_token_id`."
            )
        return None if pad is None or input_ids is None else input_ids != pad


name_causal_model(MambaFormerForCausalLM.__name__)
MambaFormerModel.register_for_auto_class("AutoModel")
MambaFormerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MambaFormerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MambaFormerConfig.register_for_auto_class()

__all__ = [
    "ExpertSwitchLogitsProcessor",
    "MambaFormerForCausalLM",
    "MambaFormerForSequenceClassification",
    "MambaFormerModel",
    "MambaFormerPreTrainedModel",
]
