"""`generate` with experts. The private hooks of Transformers are in `library_mambaformer`.

Everything becomes a schedule of experts, and the cache does the rest: it encodes again what a change of expert asks
for, and takes back what a draft got wrong.
"""

import copy
import functools
from typing import Any

import torch

from .cache_history_mambaformer import Status
from .cache_lock_mambaformer import GenerateLock
from .cache_mambaformer import DEFAULT_REACH, MambaFormerCache
from .cache_prefix_mambaformer import PrefixCache
from .expert_vectors_mambaformer import resolve_expert_vector
from .generation_schedule_mambaformer import (
    BoundedDrafts,
    ExpertSchedule,
    ExpertSwitchLogitsProcessor,
    first_schedule,
    names_experts,
)
from .inputs_mambaformer import (
    EXPERT_FIELDS,
    check_cache_type,
    check_config_fields,
    check_keywords_of_generate,
    check_token_ids,
)
from .inputs_packing_mambaformer import drop_borders
from .inputs_prompt_mambaformer import num_columns_again
from .library_mambaformer import CACHE_NAMES, GenerationHooks, cache_of, take_cache
from .weights_version_mambaformer import weights_stamp

# What this model's `generate` tells its own hooks, and no assistant. No field of a `GenerationConfig` may have such a
# name: the library would take the argument for the field.
OWN_GENERATION_KWARGS = ("resolved_schedule", "is_speculative", "num_embeds_cached")


class MambaFormerGenerationMixin(GenerationHooks):
    """Generation of a model that makes its own caches and knows experts by name."""

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        *args,
        expert_vector: Any = ...,
        expert_schedule=None,
        prefix_cache: PrefixCache | None = None,
        **kwargs,
    ):
        """`generate` of Transformers, with experts.

        An expert may be named here, in `generation_config` or in `model.generation_config`, in this order; a schedule
        without an entry for token 0 starts from the next `expert_vector` in that order. Without any, the expert in
        force is the cache's.

        Args:
            expert_vector: the expert in force, in the forms of `forward`.
            expert_schedule: {n: expert}, the expert in force when new token n (0-based) is predicted.
            prefix_cache: the prompt continues from the longest prefix that it stores, and the sequence at the end of
                generation is stored in it.

        Raises:
            ValueError, TypeError: an expert that does not fit, both arguments for token 0, or a prompt of several
                sequences packed into a row; nothing has run then.
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
        again = num_columns_again(cache, embed_tokens, prompt, generation_config=generation_config, **kwargs)
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        for config in configs:
            check_config_fields(config)
        of_configs = [names_experts(config) for config in configs]
        entries = first_schedule((expert_vector, expert_schedule), *of_configs)
        if entries:
            for expert in entries.values():
                self._prepare_in_force(expert, None)
            entries = {n: resolve_expert_vector(expert, self._expert_library) for n, expert in entries.items()}
            has_embeds = kwargs.get("inputs_embeds") is not None
            length = prompt.shape[1] if prompt is not None else 0 if has_embeds else 1
            kwargs["resolved_schedule"] = ExpertSchedule(entries, length)
        if again:
            kwargs["num_embeds_cached"] = again
        if prefix_cache is None:
            with GenerateLock(cache):
                return self.library_generate(inputs, generation_config, *args, cache=cache, **kwargs)
        cache = self._continue_prefix(prefix_cache, prompt, cache, entries.get(0, ...), [kwargs, *configs])
        with GenerateLock(cache):
            output = self.library_generate(inputs, generation_config, *args, cache=cache, **kwargs)
        if cache.batch_size == prompt.shape[0]:
            prefix_cache.insert(cache)
        return output

    def _continue_prefix(
        self,
        prefix_cache: PrefixCache,
        prompt: torch.Tensor | None,
        cache: Any,
        expert_vector: Any,
        options: list[Any],
    ) -> MambaFormerCache:
        """A cache with the longest prefix of the prompt that is stored; with all of it for several answers to it.

        Args:
            options: the keywords of `generate` and its configurations, the first of which decides.
        """
        chosen = [each if isinstance(each, dict) else vars(each) for each in options]
        asked = functools.partial(_first_of, chosen)
        if prompt is None or asked("inputs_embeds") is not None:
            raise ValueError("A prefix cache looks tokens up: give the prompt as `input_ids`, or leave it out.")
        if cache is not None or asked("use_cache") is False or asked("cache_implementation") not in (None, "dynamic"):
            raise ValueError(
                "`prefix_cache` brings a dynamic cache of its own: leave `cache`, `cache_implementation` and "
                "`use_cache=False` out, or give `cache=prefix_cache.fetch(input_ids)` without `prefix_cache`."
            )
        mask = asked("attention_mask")
        if mask is None and asked("pad_token_id") is not None:
            mask = prompt != asked("pad_token_id")  # the library takes such tokens for padding too
        cache = prefix_cache.fetch(prompt, mask, expert_vector)
        if max(asked("num_beams") or 1, asked("num_return_sequences") or 1) > 1:
            prefix_cache.encode(prompt, cache)
        return cache

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
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        resolved_schedule: ExpertSchedule | None = None,
        is_speculative: bool = False,
        num_embeds_cached: int = 0,
        past_key_values: MambaFormerCache | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """What the next forward is fed: the new tokens, or all of them when a change of expert dropped the cache."""
        cache = cache_of(cache, past_key_values)
        num_cached = 0 if cache is None else cache.get_seq_length()
        if resolved_schedule is not None:
            num_new_tokens = max(input_ids.shape[1] - resolved_schedule.prompt_length, 0)
            expert = resolved_schedule.in_force(num_new_tokens)
            if cache is None:
                kwargs["expert_vector"] = expert
            elif expert is not ...:
                cache.set_expert_vector(expert)
        if inputs_embeds is not None and is_first_iteration:
            # The library takes the columns of the cache away from embeddings that may not repeat them.
            inputs_embeds, next_sequence_length = inputs_embeds[:, num_embeds_cached:], None
        was_dropped = cache is not None and not cache.has_previous_state()
        if was_dropped and (num_cached or not is_first_iteration):
            next_sequence_length = None
            self._check_whole_text(input_ids, inputs_embeds, num_cached)
        elif not is_first_iteration and next_sequence_length == 1:
            attention_mask = None  # pads are in the prompt; to look for one in each new token would stop a GPU
        elif is_speculative and is_first_iteration and num_cached:
            # The library's speculative loop would feed the cached text a second time.
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
    def _check_whole_text(input_ids, inputs_embeds, num_dropped: int) -> None:
        if inputs_embeds is not None or input_ids.shape[1] <= num_dropped:
            raise ValueError(
                "The change of expert dropped the cached text (on_expert_change='reset'), and `generate` was not given"
                " all of it as `input_ids` to feed it again: pass the whole text, or use on_expert_change='recompute'."
            )

    def first_layers(self, num_layers: int) -> "MambaFormerGenerationMixin":
        """The first layers with the final norm and the head, as a model that shares this one's weights.

        It drafts for `generate(assistant_early_exit=num_layers)` (LayerSkip, arXiv 2404.16710, section 4.3).

        Raises:
            ValueError: there are not so many layers.
        """
        if not isinstance(num_layers, int) or not 0 < num_layers <= self.config.num_hidden_layers:
            raise ValueError(
                f"The model has {self.config.num_hidden_layers} layers and cannot end after {num_layers!r} of them: "
                "give `assistant_early_exit` a number of layers."
            )
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
        model, stack = copy.copy(self), copy.copy(self.model)
        stack._modules = {**self.model._modules, "layers": self.model.layers[:num_layers]}
        model._modules = {**self._modules, "model": stack}
        model.config = stack.config = config
        model.generation_config = _without_experts(self.generation_config)  # they may scale layers that it lacks
        return model

    # What `GenerationHooks` asks for.

    def cache_for_generation(
        self, cache: MambaFormerCache | None, generation_config, is_speculative: bool, batch_size: int, max_length: int
    ) -> MambaFormerCache | None:
        """The cache that generation runs on: the user's, or a new one; `None` where `use_cache` is false."""
        implementation = generation_config.cache_implementation
        if implementation == "offloaded" and self.device.type == "cpu":
            implementation = None  # the cache is where it would be offloaded to
        is_assistant = getattr(generation_config, "is_assistant", False)
        if cache is not None:
            if implementation is not None:
                raise ValueError("Give either `cache` or `cache_implementation`, not both.")
            check_cache_type(cache)
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            if is_speculative:
                raise ValueError("Speculative decoding takes wrong drafts back from a cache: pass `use_cache=True`.")
            return None
        elif implementation in (None, "dynamic"):
            cache = self.make_cache()
        elif implementation == "static":
            size = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
            cache = self.make_cache("static", max_cache_len=size)
        else:
            raise ValueError(
                f"`cache_implementation` {implementation!r} is not supported on {self.device.type!r}: choose 'dynamic'"
                " or 'static', or pass a cache of `model.make_cache()` as `cache`."
            )
        if is_speculative or is_assistant:
            if batch_size > 1:
                raise ValueError(
                    f"Speculative decoding takes one row at a time, and there are {batch_size}: call `generate` for "
                    "each, or leave it out."
                )
            drafted = generation_config.prompt_lookup_num_tokens or 0
            cache.activate_past_recording(max(drafted + 1, DEFAULT_REACH))
        return cache

    def candidate_generator(
        self,
        make_generator,
        cache: MambaFormerCache,
        model_kwargs,
        *,
        generation_config,
        assistant_model=None,
        **kwargs,
    ):
        """What drafts tokens when decoding is speculative; an assistant knows nothing of this model's experts."""
        processors = kwargs.get("logits_processor") or ()
        if any(type(processor).__name__ == ExpertSwitchLogitsProcessor.__name__ for processor in processors):
            raise ValueError(
                "`ExpertSwitchLogitsProcessor` changes the expert after tokens that were drafted under the old one: "
                "pass `expert_schedule` to `generate` instead, or leave speculative decoding out."
            )
        self._check_can_draft(generation_config, cache, model_kwargs, kwargs["input_ids"])
        schedule = model_kwargs.get("resolved_schedule")
        generation_config = _without_experts(generation_config)
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
    def _check_can_draft(generation_config, cache: MambaFormerCache, model_kwargs, input_ids) -> None:
        """Drafts are looked up in all of the text, or an assistant is fed all of it; so there has to be one."""
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Speculative decoding drafts from token ids, and the library would neither feed the first draft behind"
                " `inputs_embeds` nor keep their mask: give the prompt as `input_ids`."
            )
        num_cached, length = cache.get_seq_length(), input_ids.shape[1]
        mask = model_kwargs.get("attention_mask")
        mask_length = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        if num_cached and (length <= num_cached or mask_length != length):
            raise ValueError(
                f"The cache holds {num_cached} columns, and speculative decoding goes on from it with the whole text "
                f"only, cached and new: `generate` was given {length} columns, with a mask of {mask_length}."
            )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The new tokens' part of the 2-D mask, whose shape stays the same from token to token."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def expanded_kwargs(self, num_rows: int, expand_size: int, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of `generate` for a batch whose rows are repeated, as beams and several answers are.

        The rows of a cache of the prompt are repeated with it.
        """
        cache = cache_of(*(model_kwargs.get(name) for name in CACHE_NAMES))
        if cache is not None and expand_size > 1 and cache.batch_size == num_rows:
            cache.batch_repeat_interleave(expand_size)
        schedule = model_kwargs.get("resolved_schedule")
        if schedule is not None and expand_size > 1:
            model_kwargs["resolved_schedule"] = schedule.repeat_rows(expand_size)
        return model_kwargs


def _first_of(options: list[dict[str, Any]], name: str) -> Any:
    """The value of the first option that is given."""
    return next((option[name] for option in options if option.get(name) is not None), None)


def _without_experts(generation_config):
    """A copy for a model that drafts, which has other experts or none."""
    generation_config = copy.copy(generation_config)
    for name in EXPERT_FIELDS:
        vars(generation_config).pop(name, None)
    return generation_config


__all__ = ["MambaFormerGenerationMixin"]
