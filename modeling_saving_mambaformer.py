"""Folders of models: loaded and saved together with the model's expert vectors."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import cast

from torch import nn
from transformers import GenerationConfig

from .configuration_mambaformer import MambaFormerConfig
from .expert_vectors_files_mambaformer import load_named_expert_vectors, save_expert_vectors
from .expert_vectors_mambaformer import ExpertVectorLibrary
from .files_folders_mambaformer import staged_folder
from .generation_schedule_mambaformer import prepare_to_save
from .library_mambaformer import UploadsFolders
from .mixer_registry_mambaformer import check_can_be_split
from .weights_parallel_mambaformer import base_linear, is_shard, num_shards
from .weights_quantized_mambaformer import is_quantized, pack_for_this_processor, saved_as_quantized
from .weights_quantized_modules_mambaformer import keep_codes_in_order

# The class of a saved folder that each Auto class loads.
AUTO_MAP = {
    "AutoConfig": "configuration_mambaformer.MambaFormerConfig",
    "AutoModel": "modeling_mambaformer.MambaFormerModel",
    "AutoModelForCausalLM": "modeling_mambaformer.MambaFormerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mambaformer.MambaFormerForSequenceClassification",
}


class SavingMixin(UploadsFolders):
    """Loads, saves and uploads the folders of models; the annotated attributes belong to `ExpertRuntimeMixin`."""

    config: MambaFormerConfig
    expert_vectors: ExpertVectorLibrary
    linear_modules: Callable[[], dict[str, nn.Module]]
    _check_tied_head: Callable[[str], None]
    _is_tied: Callable[[nn.Module], bool]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a model with the expert vectors that its configuration names, from a folder or the Hub.

        Their files are read from the source of the configuration, under `expert_vectors/`: for an adapter, from its
        base model.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = cast(SavingMixin, loaded[0] if isinstance(loaded, tuple) else loaded)
        pack_for_this_processor(model)
        keep_codes_in_order(model)
        check_can_be_split(model.config, max(map(num_shards, model.linear_modules().values()), default=1))
        load_named_expert_vectors(model.expert_vectors, model.config, kwargs)
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """Saves weights, configuration, code and, under `expert_vectors/`, the expert vectors of the library.

        If a save fails, the folder keeps its old model; if an upload fails, it has the new one. Models that are split
        over processes are written in place.
        """
        self._check_tied_head("saving")
        prepare_to_save(cast(GenerationConfig, getattr(self, "generation_config", None)))
        self.config.auto_map = dict(AUTO_MAP)
        self.config.expert_vectors = list(self.expert_vectors) or None
        self._note_whether_tied()
        is_written_by_many = kwargs.get("distributed_checkpoint") or any(map(is_shard, self.parameters()))
        with ExitStack() as stack:
            stack.enter_context(saved_as_quantized(self))
            if is_main_process and not is_written_by_many:
                save_directory = str(stack.enter_context(staged_folder(save_directory)).path)
            if is_main_process:
                self.write_folders(save_directory)
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def write_folders(self, directory: str | os.PathLike) -> list[str]:
        return save_expert_vectors(self.expert_vectors, directory)

    def _note_whether_tied(self) -> None:
        """Writes the real tying state to the config.

        Quantizing the head unties it, and Transformers' flag can be wrong in either direction.
        """
        head = self.get_output_embeddings()
        if head is not None and (self._is_tied(head) or is_quantized(base_linear(head).weight)):
            self.config.tie_word_embeddings = self._is_tied(head)


__all__ = ["SavingMixin"]
