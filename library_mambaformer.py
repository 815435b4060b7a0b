"""The only room that knows which version of Transformers or PyTorch it runs on.

Transformers 5.24.0 renamed the cache from `past_key_values` to `cache`, in arguments, in `generate`'s model kwargs and
in outputs. Users may write either name on every version. Private hooks of `GenerationMixin` and private state of
PyTorch get names of our own here, so a new release is one change in this file.
"""

import inspect
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import _C
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules import module as nn_module
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, TransformersKwargs
from typing_extensions import Unpack

from .cache_lock_mambaformer import FeedLock
from .files_folders_mambaformer import staged_at

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as Model

    class GenerationBase(Model):
        """A model with the methods of `GenerationMixin`, which pyright does not find."""

        generate: Callable
        prepare_inputs_for_generation: Callable
        _get_candidate_generator: Callable
        _expand_inputs_for_generation: Callable
else:
    Model = object  # a mixin: the class that uses it is a `PreTrainedModel`
    GenerationBase = GenerationMixin

T = TypeVar("T")
logger = logging.get_logger(__name__)

OLDEST_TESTED, NEWEST_TESTED = "5.16.1", "5.24.0"
CACHE_NAMES = ("cache", "past_key_values")
if TYPE_CHECKING:
    LibraryKwargs: TypeAlias = object
else:  # Transformers reads from this annotation which outputs a forward can return
    LibraryKwargs = Unpack[TransformersKwargs]
# Keyword arguments that Transformers, its trainer and its hooks pass to the forward of every model.
LIBRARY_KEYWORDS = frozenset(TransformersKwargs.__annotations__)
# Arguments of `generate` alone, which some of its modes pass to the model too.
KEYWORDS_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "assistant_model")
# The name under which this version of Transformers passes the cache.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(vars(GenerationMixin)["prepare_inputs_for_generation"]).parameters
    else "past_key_values"
)


def warn_if_untested(version: str) -> None:
    """Warns once where Transformers is newer than the releases that the tests have run on."""
    if Version(version).release[:2] > Version(NEWEST_TESTED).release[:2]:
        logger.warning_once(
            f"Transformers {version} is newer than the versions that MambaFormer was tested with ({OLDEST_TESTED} to "
            f"{NEWEST_TESTED}). If results look wrong, install transformers=={NEWEST_TESTED}."
        )


warn_if_untested(transformers.__version__)


# ---- the two names of the cache


def cache_of(cache: T | None, past_key_values: T | None) -> T | None:
    """The cache that a caller passed under either name.

    Raises:
        ValueError: two different caches were passed.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError(
        "`cache` and `past_key_values` are two names of one argument, but two caches were passed: pass one."
    )


def take_cache(kwargs: dict):
    """Removes the cache from `kwargs` under either name and returns it."""
    return cache_of(*(kwargs.pop(name, None) for name in CACHE_NAMES))


def _field_of(name):
    return CACHE_NAME if name in CACHE_NAMES else name


class CacheUnderBothNames(ModelOutput):
    """An output whose cache can be read and passed as `cache` and as `past_key_values`, without a warning."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **{_field_of(name): value for name, value in fields.items()})

    def __getitem__(self, key):
        return super().__getitem__(_field_of(key) if isinstance(key, str) else key)

    def __contains__(self, key):
        return super().__contains__(_field_of(key))

    def get(self, key, default=None):
        return super().get(_field_of(key), default)


def _read_cache(output: ModelOutput) -> object:
    return getattr(output, CACHE_NAME)


for _name in CACHE_NAMES:
    if _name != CACHE_NAME:
        setattr(CacheUnderBothNames, _name, property(_read_cache))


class MambaFormerModelOutput(CacheUnderBothNames, BaseModelOutputWithPast):
    """Hidden states of the stack, and the cache under both names."""


class MambaFormerCausalLMOutput(CacheUnderBothNames, CausalLMOutputWithPast):
    """Logits of the language model, and the cache under both names."""


class MambaFormerSequenceClassifierOutput(CacheUnderBothNames, SequenceClassifierOutputWithPast):
    """Logits of the classifier, and the cache under both names."""


class MambaFormerGenerateOutput(CacheUnderBothNames, GenerateDecoderOnlyOutput):
    """Result of `generate(return_dict_in_generate=True)`."""


class MambaFormerGenerateBeamOutput(CacheUnderBothNames, GenerateBeamDecoderOnlyOutput):
    """Result of a beam search with `return_dict_in_generate=True`."""


_GENERATE_OUTPUTS = {
    GenerateDecoderOnlyOutput: MambaFormerGenerateOutput,
    GenerateBeamDecoderOnlyOutput: MambaFormerGenerateBeamOutput,
}


# ---- hooks of `generate`


class GenerationHooks(GenerationBase):
    """`GenerationMixin`, with its private hooks and the name of its cache translated to names of our own.

    Subclasses implement `cache_for_generation`, `candidate_generator` and `expanded_kwargs`; they see the cache as
    `cache` on every version of Transformers.
    """

    cache_for_generation: Callable
    candidate_generator: Callable
    expanded_kwargs: Callable[[int, int, dict], dict]
    can_run_compiled: Callable[[object], bool]

    def library_generate(self, *args, cache: object = None, **kwargs):
        """`GenerationMixin.generate`, whose result has the cache under both names."""
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        output = super().generate(*args, **kwargs)
        output_class = _GENERATE_OUTPUTS.get(type(output))
        return output if output_class is None else output_class(**output)

    @property
    def library_arguments(self) -> Callable:
        """A function with the arguments of `GenerationMixin.generate`."""
        return super().generate

    def library_inputs(self, input_ids: torch.LongTensor, cache: object, **kwargs) -> dict:
        """`GenerationMixin.prepare_inputs_for_generation`, with the cache under the name that all callers read.

        PEFT reads `past_key_values` on all versions, and feeds its virtual tokens if it is missing.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in KEYWORDS_OF_GENERATE}
        inputs = super().prepare_inputs_for_generation(input_ids, **{CACHE_NAME: cache}, **kwargs)
        if CACHE_NAME in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    def get_compiled_call(self, compile_config):
        """The compiled forward that `generate` decodes with; `can_run_compiled(cache)` decides for every step."""
        compiled = super().get_compiled_call(compile_config)

        def call(*args, **kwargs):
            cache = cache_of(*(kwargs.get(name) for name in CACHE_NAMES))
            if cache is None or not self.can_run_compiled(cache):
                return self(*args, **kwargs)
            with FeedLock(cache.lock):  # a compiled forward does not say so itself
                return compiled(*args, **kwargs)

        return call

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "`prefill_chunk_size` cuts `input_ids`, and the prompt is passed as `inputs_embeds`: leave it out, or "
                "feed all pieces but the last to `model(inputs_embeds=..., cache=cache)` first."
            )
        is_speculative = generation_mode == GenerationMode.ASSISTED_GENERATION
        cache = self.cache_for_generation(
            model_kwargs.get(CACHE_NAME), generation_config, is_speculative, batch_size, max_cache_length
        )
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
            model_kwargs["is_speculative"] = is_speculative

    def _get_candidate_generator(self, *, model_kwargs, **kwargs):
        return self.candidate_generator(
            super()._get_candidate_generator, model_kwargs[CACHE_NAME], model_kwargs, **kwargs
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:
        """No positions: the cache counts the real tokens of each row itself, over all turns."""

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        if input_ids is not None:
            model_kwargs = self.expanded_kwargs(input_ids.shape[0], expand_size, model_kwargs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )


# ---- names of classes that `Trainer` recognizes


def name_causal_model(name: str) -> None:
    """Registers the name of a class as that of a causal language model.

    `Trainer` shifts labels for label smoothing only for classes with registered names; pipelines read them too.
    """
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"mambaformer:{name}"] = name


# ---- private state of PyTorch


_functorch = vars(_C)["_functorch"]  # a submodule without types


def preserve_versions(tensors: list[torch.Tensor]) -> AbstractContextManager:
    """Context that restores the versions of these tensors at its end."""
    return _unsafe_preserve_version_counter(tuple(tensors))


def has_global_hooks() -> bool:
    """Whether a hook is registered for all modules of the process."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_every_operation_seen() -> bool:
    """Whether every operation is traced or intercepted: fake tensors, counters, functorch, forward gradients."""
    return bool(
        _C._len_torch_dispatch_stack()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _C._is_tracing()
    )


@torch.compiler.assume_constant_result  # a graph is compiled for the transforms around it
def is_transformed() -> bool:
    """Whether a transform of functorch (`vmap`, `grad`, `jvp`) is in force, also while a graph is traced."""
    return _functorch.peek_interpreter_stack() is not None


# ---- uploads


class UploadsFolders(Model):
    """A model that saves folders of its own, and uploads them too.

    Transformers uploads only files that changed since its own `save_pretrained` started, and may upload another folder
    than the one that was saved.
    """

    def write_folders(self, directory: str | os.PathLike) -> list[str]:
        """Writes the folders under `directory`; returns their names."""
        return []

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        staged = staged_at(working_dir)
        if staged is None:
            written, before = set(self.write_folders(working_dir)), files_timestamps
        else:
            staged.commit()  # a failing upload must not lose what was saved
            working_dir, written = staged.target, staged.names or set()
            before = dict.fromkeys(os.listdir(working_dir), math.inf)
        before = {name: time for name, time in before.items() if name not in written}
        return super()._upload_modified_files(working_dir, repo_id, before, *args, **kwargs)
