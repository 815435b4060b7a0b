"""`generate` with expert vectors. The private hooks of Transformers are in `library_mambaformer`.

Every request becomes a schedule of expert vectors. The cache does the rest: it encodes a sequence again after a change
of expert vector, and takes back wrong drafts.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import GenerationConfig

from .cache_history_mambaformer import Status
from .cache_lock_mambaformer import GenerateLock
from .cache_mambaformer import DEFAULT_REACH, MambaFormerCache
from .cache_prefix_mambaformer import PrefixCache
from .expert_posterior_mambaformer import ExpertPosterior
from .expert_vectors_mambaformer import ExpertVectorLike, ExpertVectorsLike, resolve_expert_vector
from .generation_posterior_mambaformer import cache_under_posterior
from .generation_schedule_mambaformer import (
    BoundedDrafts,
    ExpertFields,
    ExpertSchedule,
    ExpertSwitchLogitsProcessor,
    first_schedule,
    read_expert_fields,
)
from .inputs_mambaformer import (
    EXPERT_FIELDS,
    check_cache_type,
    check_config_fields,
    check_keywords_of_generate,
    check_token_ids,
)
from .inputs_packing_mambaformer import Keywords, drop_borders
from .inputs_prompt_mambaformer import num_repeated_columns
from .library_mambaformer import CACHE_NAMES, GenerationHooks, cache_of, take_cache
from .weights_version_mambaformer import weights_stamp

if TYPE_CHECKING:
    from .expert_runtime_mambaformer import ExpertRuntimeMixin as Model
    from .modeling_mambaformer import MambaFormerForCausalLM
else:
    Model = object  # a mixin: the class that uses it is such a model

# Keywords that `generate` passes to the hooks below, and not to an assistant. No field of a `GenerationConfig` may
# have such a name: the library would take the argument for the field.
OWN_GENERATION_KWARGS = ("resolved_schedule", "is_speculative", "num_embeds_cached")


class MambaFormerGenerationMixin(GenerationHooks, Model):
    """Generation of a model that makes its own caches and has expert vectors by name."""

    model: Model  # the stack
    make_cache: Callable[..., MambaFormerCache]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        expert_vector: ExpertVectorsLike | EllipsisType = ...,
        expert_schedule: dict[int, ExpertVectorsLike] | None = None,
        prefix_cache: PrefixCache | None = None,
        expert_posterior: ExpertPosterior | Sequence[ExpertVectorLike] | None = None,
        posterior_mode: str = "choose",
        **kwargs,
    ):
        """`generate` of Transformers, with expert vectors.

        An expert vector may be passed here, in `generation_config` or in `model.generation_config`; the first of these
        counts. A schedule without an entry for token 0 starts from the next `expert_vector` in that order. Without
        any, the expert vector of the cache stays in force.

        Args:
            expert_vector: the expert vector in force, in the forms that `forward` takes.
            expert_schedule: {n: expert vector}, the expert vector that predicts new tokens from number n (0-based) on.
            prefix_cache: the prompt continues from the longest prefix that it stores, and the sequence at the end of
                generation is stored in it.
            expert_posterior: a posterior over expert vectors, or its candidates. It observes the prompt; a posterior
                that has observed a prefix observes the rest, as in the next turn of a chat.
            posterior_mode: `"choose"` continues with the most probable candidate of each row and its states;
                `"sample"` draws the candidate from the posterior; `"blend"` continues the states of the most probable
                one with the average z = sum_k p_k z_k; `"mixture"` averages the predictions of all candidates, and the
                posterior observes the new tokens too.

        Raises:
            ValueError, TypeError: an expert vector that does not fit, both arguments for token 0, or a prompt of
                several sequences packed into a row; nothing has run then.
        """
        if "custom_generate" not in kwargs:  # which has arguments of its own
            functions = [self.generate, self.library_arguments, self.prepare_inputs_for_generation, self.forward]
            check_keywords_of_generate(functions, vars(self.generation_config), kwargs)
        cache, prompt = take_cache(kwargs), inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            check_token_ids(prompt, self.config.vocab_size)
        kwargs = drop_borders(prompt, kwargs)
        check_cache_type(cache)
        embed_tokens = self.get_input_embeddings()
        num_repeated = num_repeated_columns(cache, embed_tokens, prompt, generation_config=generation_config, **kwargs)
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        for config in configs:
            check_config_fields(config)
        entries = self._resolve_schedule((expert_vector, expert_schedule), *map(read_expert_fields, configs))
        if entries:
            has_embeds = kwargs.get("inputs_embeds") is not None
            length = prompt.shape[1] if prompt is not None else 0 if has_embeds else 1
            kwargs["resolved_schedule"] = ExpertSchedule(entries, length)
        if num_repeated:
            kwargs["num_embeds_cached"] = num_repeated
        if expert_posterior is not None:
            options = [kwargs, *configs]
            if prefix_cache is not None:
                raise ValueError(
                    "`expert_posterior` needs the evidence of the prefix, which a prefix cache does not store: leave "
                    "`prefix_cache` out, and pass the `fork()` of a posterior that has observed the prefix."
                )
            if entries:
                raise ValueError("`expert_posterior` brings its expert vectors: leave other ones out.")
            cache = self._continue_posterior(expert_posterior, posterior_mode, prompt, cache, options)
        if prefix_cache is not None:
            cache = self._continue_prefix(prefix_cache, prompt, cache, entries.get(0, ...), [kwargs, *configs])
        with GenerateLock(cache):
            output = self.library_generate(inputs, generation_config, *args, cache=cache, **kwargs)
        if prefix_cache is not None and prompt is not None and cache is not None and cache.batch_size == len(prompt):
            prefix_cache.insert(cache)  # several answers to one prompt leave other rows
        return output

    def _resolve_schedule(self, *levels: ExpertFields) -> dict[int, ExpertVectorsLike]:
        """The entries of `first_schedule`, prepared, and looked up where they are names."""
        entries = first_schedule(*levels)
        for expert_vector in entries.values():
            self._prepare_in_force(expert_vector, None)
        resolved = {n: resolve_expert_vector(each, self._expert_library) for n, each in entries.items()}
        return cast(dict[int, ExpertVectorsLike], resolved)

    def _continue_prefix(
        self,
        prefix_cache: PrefixCache,
        prompt: torch.Tensor | None,
        cache: MambaFormerCache | None,
        expert_vector: ExpertVectorsLike | EllipsisType,
        options: list[Keywords | GenerationConfig],
    ) -> MambaFormerCache:
        """A cache with the longest stored prefix of the prompt; with the complete prompt if it gets several answers.

        Args:
            options: the keywords of `generate` and its configurations; the first that has an option decides.
        """
        if not hasattr(prefix_cache, "fetch"):
            kind = type(prefix_cache).__name__
            raise TypeError(f"`prefix_cache` is a {kind}: make one with `model.make_prefix_cache(max_bytes)`.")
        option = functools.partial(_first_of, [each if isinstance(each, dict) else vars(each) for each in options])
        prompt = _check_brings_cache("prefix_cache", prompt, cache, option)
        cache = prefix_cache.fetch(prompt, _mask_of(prompt, option), expert_vector)
        if max(option("num_beams") or 1, option("num_return_sequences") or 1) > 1:
            prefix_cache.encode(prompt, cache)
        return cache

    def _continue_posterior(
        self,
        posterior: ExpertPosterior | Sequence[ExpertVectorLike],
        mode: str,
        prompt: torch.Tensor | None,
        cache: MambaFormerCache | None,
        options: list[Keywords | GenerationConfig],
    ) -> MambaFormerCache:
        """The cache that generation under a posterior continues from; `options` as in `_continue_prefix`."""
        option = functools.partial(_first_of, [each if isinstance(each, dict) else vars(each) for each in options])
        prompt = _check_brings_cache("expert_posterior", prompt, cache, option)
        mask = _mask_of(prompt, option)
        model = cast("MambaFormerForCausalLM", self)
        return cast(MambaFormerCache, cache_under_posterior(model, posterior, mode, prompt, mask))

    def can_run_compiled(self, cache: MambaFormerCache | None) -> bool:
        """Whether the next decoding step may run compiled; one that encodes a sequence again may not."""
        if cache is None or not (cache.expert_vector is None or cache.prepared_expert_vectors is not None):
            return False
        is_current = cache.status == Status.CURRENT
        return is_current and cache.provenance.in_force.weights == weights_stamp(self.base_model)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: MambaFormerCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        resolved_schedule: ExpertSchedule | None = None,
        is_speculative: bool = False,
        num_embeds_cached: int = 0,
        past_key_values: MambaFormerCache | None = None,
        **kwargs,
    ) -> Keywords:
        """Inputs of the next forward: the new tokens, or all if a change of expert vector has dropped the others."""
        cache = cache_of(cache, past_key_values)
        num_cached = 0 if cache is None else cache.get_seq_length()
        if resolved_schedule is not None:
            num_new_tokens = max(input_ids.shape[1] - resolved_schedule.prompt_length, 0)
            expert_vector = resolved_schedule.in_force(num_new_tokens)
            if cache is None:
                kwargs["expert_vector"] = expert_vector
            elif expert_vector is not ...:
                cache.set_expert_vector(expert_vector)
        if inputs_embeds is not None and is_first_iteration:
            # The library removes the columns of the cache from embeddings even if they do not repeat them.
            inputs_embeds, next_sequence_length = inputs_embeds[:, num_embeds_cached:], None
        was_dropped = cache is not None and not cache.has_previous_state()
        if was_dropped and (num_cached or not is_first_iteration):
            next_sequence_length = None
            self._check_is_complete(input_ids, inputs_embeds, num_cached)
        elif not is_first_iteration and next_sequence_length == 1:
            attention_mask = None  # new tokens have no pads, and a check would synchronize host and device
        elif is_speculative and is_first_iteration and num_cached:
            # The library's speculative loop would feed the cached sequence a second time.
            next_sequence_length = input_ids.shape[1] - num_cached
        return self.library_inputs(
            input_ids,
            cache,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def _check_is_complete(input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None, num_dropped: int) -> None:
        if inputs_embeds is not None or input_ids.shape[1] <= num_dropped:
            raise ValueError(
                "The change of expert vector dropped the cached sequence (on_expert_change='reset'), and `input_ids` "
                "have only a part of it to feed again: pass the complete sequence as `input_ids`, or make the cache "
                "with on_expert_change='recompute'."
            )

    def first_layers(self, num_layers: int) -> "MambaFormerGenerationMixin":
        """The first layers with the final norm and the head, as a model that shares the weights of this one.

        It drafts for `generate(assistant_early_exit=num_layers)` (LayerSkip, arXiv 2404.16710, section 4.3).

        Raises:
            ValueError: the model has fewer layers.
        """
        if not isinstance(num_layers, int) or not 0 < num_layers <= self.config.num_hidden_layers:
            raise ValueError(
                f"`assistant_early_exit` must be a number of layers from 1 to {self.config.num_hidden_layers}, got "
                f"{num_layers!r}."
            )
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.layer_types = num_layers, (config.layer_types or [])[:num_layers]
        model, stack = copy.copy(self), copy.copy(self.model)
        layers = cast(nn.ModuleList, self.model.layers)[:num_layers]
        stack._modules = {**stack._modules, "layers": layers}
        model._modules = {**self._modules, "model": stack}
        model.config, stack.config = config, config
        # Its expert vectors may scale layers that this model lacks.
        model.generation_config = _without_expert_vectors(self.generation_config)
        return model

    # ---- methods that `GenerationHooks` calls

    def cache_for_generation(
        self,
        cache: MambaFormerCache | None,
        generation_config: GenerationConfig,
        is_speculative: bool,
        batch_size: int,
        max_length: int,
    ) -> MambaFormerCache | None:
        """The cache of a generation: the user's, or a new one; `None` if `use_cache` is false."""
        implementation = generation_config.cache_implementation
        if implementation == "offloaded" and self.device.type == "cpu":
            implementation = None  # offloaded caches are on the CPU
        is_assistant = getattr(generation_config, "is_assistant", False)
        if cache is not None:
            if implementation is not None:
                raise ValueError("Pass either `cache` or `cache_implementation`, not both.")
            check_cache_type(cache)
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            if is_speculative:
                raise ValueError("Speculative decoding removes wrong drafts from a cache: pass `use_cache=True`.")
            return None
        elif implementation in (None, "dynamic"):
            cache = self.make_cache()
        elif implementation == "static":
            size = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
            cache = self.make_cache("static", max_cache_len=size)
        elif implementation == "quantized":
            cache = self.make_cache("quantized", kv_bits=_kv_bits_of(generation_config.cache_config))
        else:
            raise ValueError(
                f"`cache_implementation` {implementation!r} is not supported on {self.device.type!r}: choose 'dynamic'"
                ", 'static' or 'quantized', or pass a cache of `model.make_cache()` as `cache`."
            )
        if is_speculative or is_assistant:
            if batch_size > 1:
                raise ValueError(
                    f"Speculative decoding takes one row at a time, and the batch has {batch_size}: call `generate` "
                    "for each row, or leave speculative decoding out."
                )
            num_drafted = generation_config.prompt_lookup_num_tokens or 0
            cache.activate_past_recording(max(num_drafted + 1, DEFAULT_REACH))
        return cache

    def candidate_generator(
        self,
        make_generator: Callable,
        cache: MambaFormerCache,
        model_kwargs: Keywords,
        *,
        generation_config: GenerationConfig,
        assistant_model: nn.Module | None = None,
        **kwargs,
    ) -> BoundedDrafts:
        """The source of drafts in speculative decoding; an assistant does not get this model's expert vectors."""
        processors = kwargs.get("logits_processor") or ()
        if any(type(processor).__name__ == ExpertSwitchLogitsProcessor.__name__ for processor in processors):
            raise ValueError(
                "`ExpertSwitchLogitsProcessor` changes the expert vector after tokens are drafted with the old one: "
                "pass `expert_schedule` to `generate` instead, or leave speculative decoding out."
            )
        self._check_can_draft(generation_config, cache, model_kwargs, kwargs["input_ids"])
        schedule = model_kwargs.get("resolved_schedule")
        generation_config = _without_expert_vectors(generation_config)
        if generation_config.assistant_early_exit is not None:
            assistant_model = self.first_layers(generation_config.assistant_early_exit)
            generation_config.assistant_early_exit = None
        drafter = make_generator(
            generation_config=generation_config,
            model_kwargs={key: value for key, value in model_kwargs.items() if key not in OWN_GENERATION_KWARGS},
            assistant_model=assistant_model,
            **kwargs,
        )
        return BoundedDrafts(drafter, schedule, cache.max_columns)

    @staticmethod
    def _check_can_draft(
        generation_config: GenerationConfig,
        cache: MambaFormerCache,
        model_kwargs: Keywords,
        input_ids: torch.Tensor,
    ) -> None:
        """Refuses prompts without the complete sequence, from which drafts are looked up or an assistant is fed."""
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Speculative decoding drafts from token ids, and the library would neither feed the first draft after "
                "`inputs_embeds` nor keep their mask: pass the prompt as `input_ids`."
            )
        num_cached, length = cache.get_seq_length(), input_ids.shape[1]
        mask = model_kwargs.get("attention_mask")
        mask_length = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        if num_cached and (length <= num_cached or mask_length != length):
            raise ValueError(
                f"The cache holds {num_cached} columns, and speculative decoding needs the cached and the new columns "
                f"as `input_ids`, but got {length} columns with a mask of {mask_length}: pass the complete sequence."
            )

    @staticmethod
    def create_masks_for_generate(
        config: object, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor | None:
        """The part of the 2-D mask for the new tokens, whose shape stays the same from token to token."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def expanded_kwargs(self, num_rows: int, expand_size: int, model_kwargs: Keywords) -> Keywords:
        """The keywords of `generate` for a batch whose rows are repeated, for beams or several answers.

        The rows of the prompt's cache are repeated too.
        """
        cache = cache_of(*(model_kwargs.get(name) for name in CACHE_NAMES))
        if cache is not None and expand_size > 1 and cache.batch_size == num_rows:
            cache.batch_repeat_interleave(expand_size)
        schedule = model_kwargs.get("resolved_schedule")
        if schedule is not None and expand_size > 1:
            model_kwargs["resolved_schedule"] = schedule.repeat_rows(expand_size)
        return model_kwargs


def _first_of(options: list[Keywords], name: str):
    """The first value of this name that is not `None`."""
    return next((option[name] for option in options if option.get(name) is not None), None)


def _check_brings_cache(
    name: str,
    prompt: torch.Tensor | None,
    cache: MambaFormerCache | None,
    option: Callable[[str], object],
) -> torch.Tensor:
    """The prompt, if nothing contradicts the argument `name` of `generate`, which brings a cache of its own."""
    if prompt is None or option("inputs_embeds") is not None or option("position_ids") is not None:
        raise ValueError(
            f"`{name}` looks up token ids at the positions that the model counts: pass the prompt as `input_ids`, and "
            f"leave `inputs_embeds` and `position_ids` out, or leave `{name}` out."
        )
    implementation = option("cache_implementation")
    if cache is not None or option("use_cache") is False or implementation not in (None, "dynamic"):
        raise ValueError(
            f"`{name}` brings a dynamic cache of its own: leave `cache`, `cache_implementation` and `use_cache=False` "
            "out. The storage of a prefix cache is chosen by `model.make_prefix_cache(max_bytes, storage=...)`, and "
            "`cache=prefix_cache.fetch(input_ids)` is such a cache."
        )
    return prompt


def _mask_of(prompt: torch.Tensor, option: Callable[[str], torch.Tensor | int | None]) -> torch.Tensor | None:
    """The mask that was passed, or the one that the library makes of the pad id."""
    mask = cast("torch.Tensor | None", option("attention_mask"))
    if mask is None and option("pad_token_id") is not None:
        return prompt != option("pad_token_id")
    return mask


def _kv_bits_of(cache_config: dict[str, int] | None) -> int | None:
    """The bits of keys and values in `cache_config` of `generate`.

    Raises:
        TypeError: it is no dict.
        ValueError: it has options that this cache has no use for.
    """
    if cache_config is not None and not isinstance(cache_config, dict):
        raise TypeError(f"`cache_config` must be a dict such as {{'nbits': 4}}, got {cache_config!r}.")
    options = dict(cache_config or {})
    kv_bits = options.pop("nbits", None)
    if options:
        raise ValueError(
            f"`cache_config` of a quantized cache has one option here, 'nbits', and {sorted(options)} was given too: "
            "each key and value is rounded by itself, so there is neither a backend nor a residual to choose."
        )
    return kv_bits


def _without_expert_vectors(generation_config: GenerationConfig) -> GenerationConfig:
    """A copy for a model that drafts, which has other expert vectors or none."""
    generation_config = copy.copy(generation_config)
    for name in EXPERT_FIELDS:
        vars(generation_config).pop(name, None)
    return generation_config


__all__ = ["MambaFormerGenerationMixin"]
