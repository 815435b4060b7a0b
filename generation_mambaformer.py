"""`generate` with experts: what of it is ours, and the hooks of Transformers that it hangs on.

Everything becomes a schedule of experts, and the cache does the rest: it encodes again what a change of expert asks
for, and takes back what a draft got wrong.
"""

import copy
from typing import Any

import torch
from transformers.generation import GenerationMixin, GenerationMode

from .cache_mambaformer import DEFAULT_REACH, MambaFormerCache
from .dispatch_mambaformer import DraftsUnderOneExpert, ExpertSchedule, ExpertSwitchLogitsProcessor
from .experts_mambaformer import resolve_expert
from .feed_mambaformer import check_is_ours
from .placement_mambaformer import weights_stamp

# What this model's `generate` tells its own hooks, and no assistant.
OWN_GENERATION_KWARGS = ("expert_schedule", "is_speculative")


class MambaFormerGenerationMixin(GenerationMixin):
    """Generation of a model that makes its own caches and knows experts by name."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, expert_vector: Any = ..., expert_schedule=None, **kwargs):
        """`generate` of Transformers, with experts.

        Args:
            expert_vector: the expert in force, in the forms of `forward`; not given, it is the cache's.
            expert_schedule: {n: expert}, the expert in force when new token n (0-based) is predicted.

        Raises:
            ValueError, TypeError: an expert that does not fit, or both arguments for token 0; nothing has run then.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_goes_on(prompt, **kwargs)
        entries = dict(expert_schedule) if expert_schedule is not None else {}
        if expert_vector is not ...:
            if 0 in entries:
                raise ValueError("`expert_vector` and `expert_schedule[0]` both name the first expert: give one.")
            entries[0] = expert_vector
        if expert_schedule is not None or entries:
            for expert in entries.values():
                self._plan(expert, None)
            entries = {n: resolve_expert(expert, self._expert_library) for n, expert in entries.items()}
            has_embeds = kwargs.get("inputs_embeds") is not None
            length = prompt.shape[1] if prompt is not None else 0 if has_embeds else 1
            kwargs["expert_schedule"] = ExpertSchedule(entries, length)
        return super().generate(inputs, *args, **kwargs)

    def get_compiled_call(self, compile_config):
        """The compiled forward that `generate` decodes with; a step that must encode a text again runs as it is."""
        compiled = super().get_compiled_call(compile_config)

        def call(*args, past_key_values: MambaFormerCache | None = None, **kwargs):
            cache = past_key_values
            has_plan = cache is not None and (cache.expert_vector is None or cache.expert_plan is not None)
            is_ready = has_plan and cache.is_settled and cache.in_force.weights == weights_stamp(self.base_model)
            return (compiled if is_ready else self)(*args, past_key_values=cache, **kwargs)

        return call

    @staticmethod
    def _check_goes_on(
        prompt, past_key_values=None, attention_mask=None, inputs_embeds=None, generation_config=None, **kwargs
    ) -> None:
        """Refuses a prompt that `generate` would take for the text in the cache and more, and is not."""
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_draft = getattr(generation_config, "is_assistant", False)  # wrong drafts are only slow
        if num_cached == 0 or is_draft or prompt is None or inputs_embeds is not None:
            return
        check_is_ours(past_key_values)
        if attention_mask is not None and attention_mask.shape[1] != prompt.shape[1]:
            return  # the new part of the text, with a mask of all of it
        if not _starts_with(prompt, past_key_values):
            raise ValueError(
                f"`input_ids` of {prompt.shape[1]} columns must be the {num_cached} columns of the cache and new ones"
                " behind them: give the whole text, or only its new part with an `attention_mask` of all of it."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: MambaFormerCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        expert_schedule: ExpertSchedule | None = None,
        is_speculative: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """What the next forward is fed: the new tokens, or all of them when a change of expert dropped the cache."""
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if expert_schedule is not None:
            num_new_tokens = max(input_ids.shape[1] - expert_schedule.prompt_length, 0)
            expert = expert_schedule.in_force(num_new_tokens)
            if past_key_values is None:
                kwargs["expert_vector"] = expert
            elif expert is not ...:
                past_key_values.set_expert(expert)
        was_dropped = past_key_values is not None and not past_key_values.has_previous_state()
        if was_dropped and (num_cached or not is_first_iteration):
            next_sequence_length = None
            self._check_whole_text(input_ids, inputs_embeds, num_cached)
        elif not is_first_iteration and next_sequence_length == 1:
            attention_mask = None  # pads are in the prompt; to look for one in each new token would stop a GPU
        elif is_speculative and is_first_iteration and num_cached:
            # The library's speculative loop would feed the cached text a second time.
            next_sequence_length = input_ids.shape[1] - num_cached
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
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
        return model

    # Hooks of `GenerationMixin` that have no public name. Nothing else in the project rests on private ones of it.

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Puts a cache under `past_key_values`; for a name like ours the library would say `cache_params`."""
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get("past_key_values")
        if implementation == "offloaded" and self.device.type == "cpu":
            implementation = None  # the cache is where it would be offloaded to
        if cache is not None:
            if implementation is not None:
                raise ValueError("Give either `past_key_values` or `cache_implementation`, not both.")
            check_is_ours(cache)
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            return
        elif implementation in (None, "dynamic"):
            model_kwargs["past_key_values"] = self.make_cache()
        elif implementation == "static":
            size = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs["past_key_values"] = self.make_cache("static", max_cache_len=size)
        else:
            raise ValueError(
                f"`cache_implementation` {implementation!r} is not supported on {self.device.type!r}: choose 'dynamic'"
                " or 'static', or pass a cache of `model.make_cache()` as `past_key_values`."
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION or getattr(generation_config, "is_assistant", False):
            if batch_size > 1:
                raise ValueError(
                    f"Speculative decoding takes one row at a time, and there are {batch_size}: call `generate` for "
                    "each, or leave it out."
                )
            drafted = generation_config.prompt_lookup_num_tokens or 0
            model_kwargs["is_speculative"] = generation_mode == GenerationMode.ASSISTED_GENERATION
            model_kwargs["past_key_values"].activate_past_recording(max(drafted + 1, DEFAULT_REACH))

    def _get_candidate_generator(self, *, generation_config, model_kwargs, assistant_model=None, **kwargs):
        """What drafts tokens when decoding is speculative; an assistant knows nothing of this model's experts."""
        processors = kwargs.get("logits_processor") or ()
        if any(type(processor).__name__ == ExpertSwitchLogitsProcessor.__name__ for processor in processors):
            raise ValueError(
                "`ExpertSwitchLogitsProcessor` changes the expert after tokens that were drafted under the old one: "
                "pass `expert_schedule` to `generate` instead, or leave speculative decoding out."
            )
        self._check_can_draft(generation_config, model_kwargs, kwargs["input_ids"])
        schedule = model_kwargs.get("expert_schedule")
        if generation_config.assistant_early_exit is not None:
            generation_config = copy.copy(generation_config)
            assistant_model = self.first_layers(generation_config.assistant_early_exit)
            generation_config.assistant_early_exit = None
        drafter = super()._get_candidate_generator(
            generation_config=generation_config,
            model_kwargs={key: value for key, value in model_kwargs.items() if key not in OWN_GENERATION_KWARGS},
            assistant_model=assistant_model,
            **kwargs,
        )
        return drafter if schedule is None else DraftsUnderOneExpert(drafter, schedule)

    @staticmethod
    def _check_can_draft(generation_config, model_kwargs, input_ids) -> None:
        """Drafts are looked up in all of the text, or an assistant is fed all of it; so there has to be one."""
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Speculative decoding drafts from token ids, and the library would neither feed the first draft behind"
                " `inputs_embeds` nor keep their mask: give the prompt as `input_ids`."
            )
        num_cached, length = model_kwargs["past_key_values"].get_seq_length(), input_ids.shape[1]
        mask = model_kwargs.get("attention_mask")
        mask_length = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        if num_cached and (length <= num_cached or mask_length != length):
            raise ValueError(
                f"The cache holds {num_cached} columns, and speculative decoding goes on from it with the whole text "
                f"only, cached and new: `generate` was given {length} columns, with a mask of {mask_length}."
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:
        """No positions: the cache counts the real tokens of each row itself, over all turns."""

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """The new tokens' part of the 2-D mask, whose shape stays the same from token to token."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        schedule = model_kwargs.get("expert_schedule")
        if schedule is not None and expand_size > 1:
            model_kwargs["expert_schedule"] = schedule.repeat_rows(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


def _starts_with(prompt: torch.Tensor, cache: MambaFormerCache) -> bool:
    """Whether token ids (rows, columns) are what is cached, with more behind it; pads may be any token."""
    cached = cache.token_ids.to(prompt.device)
    num_cached = cached.shape[1]
    if prompt.shape[1] <= num_cached:
        return False
    if prompt.shape[0] != cached.shape[0]:
        return True  # the forward says what is wrong with the rows
    is_same = (prompt[:, :num_cached] == cached) | (cached < 0)
    mask = cache.log.mask.tensor
    return bool((is_same if mask is None else is_same | ~mask[:, :num_cached].to(prompt.device)).all())


__all__ = ["MambaFormerGenerationMixin"]
