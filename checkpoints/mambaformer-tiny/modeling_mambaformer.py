"""MambaFormer (arXiv 2402.04248): Mamba and attention in one stack, with expert vectors and an exact cache.

Reads from the inside out: a layer, what all models share, the stack, and what stands on it. What a forward does is in
`MambaFormerModel.forward`; only here do weights and cache meet.
"""

import functools
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .cache_history_mambaformer import UNCHANGED, Change, NewTokens, Status
from .cache_keys_mambaformer import Span
from .cache_mambaformer import CacheStep, MambaFormerCache, UncachedStep
from .cache_use_mambaformer import feeds_its_cache
from .configuration_mambaformer import MambaFormerConfig
from .decode_program_mambaformer import FewTokens
from .expert_bases_mambaformer import SingularBases, SingularBasis
from .expert_files_mambaformer import load_named_experts, save_experts
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear, merged_weight, scale_basis
from .expert_vectors_mambaformer import (
    ExpertLibrary,
    ExpertVector,
    check_expert,
    check_spectrum,
    expert_key,
    resolve_expert,
    spectrum_of,
)
from .files_folders_mambaformer import staged_folder
from .files_mambaformer import digest_of
from .generation_export_mambaformer import DecodeStep
from .generation_mambaformer import MambaFormerGenerationMixin
from .generation_schedule_mambaformer import ExpertSwitchLogitsProcessor, prepare_to_save
from .inputs_mambaformer import check_keywords, check_token_ids
from .inputs_packing_mambaformer import Sequences, split_borders
from .inputs_padding_mambaformer import (
    Feed,
    Packing,
    Recorder,
    check_feed,
    check_is_ours,
    check_output_request,
    packed_sequences,
    prepend_history,
    refuse_classified,
    starts_as_given,
)
from .inputs_prompt_mambaformer import embedding_marks
from .library_mambaformer import (
    CACHE_NAMES,
    MambaFormerCausalLMOutput,
    MambaFormerModelOutput,
    MambaFormerSequenceClassifierOutput,
    UploadsFolders,
    cache_of,
    name_causal_model,
)
from .mixers_mambaformer import (
    AttentionPlan,
    MambaFormerAttention,
    MambaFormerMambaMixer,
    MambaFormerMLP,
    MambaFormerRMSNorm,
    MambaFormerRotaryEmbedding,
    can_group,
    plan_attention,
)
from .modeling_losses_mambaformer import causal_lm_loss, causal_loss_arguments, check_class_labels, classification_loss
from .modeling_stack_mambaformer import Place, check_cache_fits, places_of_model, without_wrappers
from .ops_eligibility_mambaformer import replaceable_by_kernels
from .weights_parallel_mambaformer import (
    CountsReplacements,
    adapters_of,
    agreed,
    base_linear,
    is_shard,
    mesh_of,
    num_shards,
    placed_like,
    weight_of,
    writes_stamp,
)
from .weights_quantized_mambaformer import (
    is_quantized,
    pack_for_this_processor,
    portable,
    quantized_activations,
    saved_as_quantized,
)
from .weights_quantized_modules_mambaformer import check_can_be_read, keep_codes_in_order, matrix_of, shape_of
from .weights_version_mambaformer import SeenWeights, version_of, weights_stamp, without_counted_forwards

logger = logging.get_logger(__name__)

NO_EXPERTS: dict[str, Any] = {}
# Which class of the saved folder each Auto class finds there.
AUTO_MAP = {
    "AutoConfig": "configuration_mambaformer.MambaFormerConfig",
    "AutoModel": "modeling_mambaformer.MambaFormerModel",
    "AutoModelForCausalLM": "modeling_mambaformer.MambaFormerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mambaformer.MambaFormerForSequenceClassification",
}


@replaceable_by_kernels
class MambaFormerLayer(CountsReplacements, GradientCheckpointingLayer):
    """The mixers of one layer type and, if configured, an MLP, each behind a norm and beside a residual."""

    _is_replayed = False
    read_by_kernels = ("has_attention", "has_mamba", "has_mlp", "window")

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.expert_names = {name: f"layers.{layer_idx}.{name}" for name in ("self_attn", "mamba", "mlp")}
        mixers = config.mixers(layer_idx)
        self.has_attention, self.has_mamba = "attention" in mixers, "mamba" in mixers
        self.window = config.window(layer_idx)
        self.has_mlp = config.intermediate_size is not None
        if self.has_attention:
            self.self_attn_layernorm = MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = MambaFormerAttention(config, layer_idx)
        if self.has_mamba:
            self.mamba_layernorm = MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mamba = MambaFormerMambaMixer(config, layer_idx)
        if self.has_mlp:
            self.mlp_layernorm = MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = MambaFormerMLP(config)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a backward pass replays this layer. Without gradients none does, and the layer may use a cache."""
        return self._is_replayed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, is_replayed: bool) -> None:
        self._is_replayed = is_replayed

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention: AttentionPlan | None,
        experts: dict[str, dict[str, ScaledBasis]],
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: MambaFormerCache | None = None,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attentions = None
        if self.has_attention:
            mixed, attentions = self.self_attn(
                self.self_attn_layernorm(hidden_states),
                attention,
                self.experts_of("self_attn", experts),
                position_embeddings,
                cache,
                **kwargs,
            )
            hidden_states = hidden_states + mixed
        if self.has_mamba:
            hidden_states = self.add_mamba(hidden_states, experts, cache, lengths, positions)
        if self.has_mlp:
            normed = self.mlp_layernorm(hidden_states)
            hidden_states = hidden_states + self.mlp(normed, self.experts_of("mlp", experts))
        return hidden_states, attentions

    def add_mamba(
        self,
        hidden_states: torch.Tensor,
        experts: dict[str, dict[str, ScaledBasis]],
        cache: MambaFormerCache | None,
        lengths: torch.Tensor | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The part of the layer that is Mamba."""
        normed = self.mamba_layernorm(hidden_states)
        experts = self.experts_of("mamba", experts)
        return hidden_states + self.mamba(normed, experts, cache, lengths, positions)

    def experts_of(self, mixer: str, experts: dict[str, dict[str, ScaledBasis]]) -> dict[str, ScaledBasis]:
        """Those of one mixer of this layer, by the names of its linear modules."""
        return experts.get(self.expert_names[mixer], NO_EXPERTS)


@dataclass(frozen=True)
class ExpertPlan:
    """An expert made ready for one model.

    Args:
        expert, key: what was resolved, and what tells it from others by content.
        num_rows: length of the list that the user gave, if it was one.
        scaled: {path of a mixer: {name of a linear module: its scaled basis}}.
        weights, head: stamps of the stack's weights and of the head's.
    """

    expert: Any = None
    key: Any = None
    num_rows: int | None = None
    scaled: Any = None
    weights: Any = None
    head: Any = None

    def experts(self) -> dict[str, dict[str, ScaledBasis]]:
        return self.scaled or NO_EXPERTS

    @property
    def is_reusable(self) -> bool:
        """A plan whose expert is being trained belongs to one graph."""
        return not _is_trained(self.expert)


@contextmanager
def _outside_inference_mode():
    """For tensors that outlive a forward: those made in inference mode cannot be used where gradients are wanted."""
    is_grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled):
        yield


def _is_trained(expert: Any) -> bool:
    rows = expert if isinstance(expert, list) else [expert]
    return any(vector.requires_grad for row in rows if row is not None for vector in row.vectors.values())


def _is_compiled_step(cache: MambaFormerCache | None) -> bool:
    """Whether a compiled forward goes on from a text as it is.

    It cannot stamp the weights, and takes the expert plan that an eager forward left behind.
    """
    if cache is None or not torch.compiler.is_compiling():
        return False
    return cache.status == Status.CURRENT and (cache.expert_vector is None or cache.expert_plan is not None)


def resolve_with_key(library: ExpertLibrary, expert_vector: Any) -> tuple[Any, Any]:
    """What a user may call an expert -> `(expert, key)`; the base is `(None, None)`."""
    return _with_key(resolve_expert(expert_vector, library))


def _with_key(expert: Any) -> tuple[Any, Any]:
    """A list of equal rows is one expert, unless they are being trained: then each row has a gradient of its own."""
    if isinstance(expert, list) and _is_trained(expert):
        return expert, tuple(expert_key(row) for row in expert)
    key = expert_key(expert)
    if isinstance(expert, list) and not isinstance(key, tuple):
        expert = expert[0]
    return (None, None) if expert is None else (expert, key)


class MambaFormerPreTrainedModel(CountsReplacements, UploadsFolders, PreTrainedModel):
    """What all MambaFormers share: loading, initialization, experts and the making of caches."""

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

    def __init__(self, config: MambaFormerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._expert_library = ExpertLibrary()
        self._singular_bases = SingularBases()
        self._unmerged: list[tuple[nn.Module, torch.Tensor, int]] = []
        self.num_merges = 0
        self._fingerprint: tuple[Any, str] | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, MambaFormerMambaMixer):
            return
        # S4D-real and the step sizes of the paper (section 3.6): A = -(1 ... N), dt log-uniform in its range.
        low, high = self.config.time_step_min, self.config.time_step_max
        states = torch.arange(1, module.state_size + 1, dtype=torch.float32, device=module.A_log.device)
        init.copy_(module.A_log, torch.log(states).expand_as(module.A_log))
        init.ones_(module.D)
        init.uniform_(module.dt_proj.weight, -(module.rank**-0.5), module.rank**-0.5)
        uniform = torch.rand(module.dt_proj.bias.shape, device=module.dt_proj.bias.device)
        dt = (low * (high / low) ** uniform).clamp(min=self.config.time_step_floor)
        init.copy_(module.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a model with the experts that its configuration names, from a folder or the Hub.

        Expert files come from where the configuration came from, under `experts/`: of an adapter, that is its base.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        pack_for_this_processor(model)
        keep_codes_in_order(model)
        model.config.check_tensor_parallel(max(map(num_shards, model.linear_modules().values()), default=1))
        load_named_experts(model._expert_library, model.config, pretrained_model_name_or_path, kwargs)
        return loaded

    # ---- caches

    def make_cache(
        self,
        storage: str = "dense",
        max_cache_len: int | None = None,
        on_expert_change: str = "recompute",
        rollback_reach: int = 0,
        **unknown,
    ) -> MambaFormerCache:
        """A cache for this model; the options are those of `MambaFormerCache`."""
        check_keywords(self.make_cache, unknown, frozenset())
        resolve = functools.partial(resolve_with_key, self._expert_library)
        return MambaFormerCache(
            self.config, storage, max_cache_len, on_expert_change, resolve, rollback_reach, self.base_model
        )

    def load_cache(
        self, path: str, on_weights_change: str = "error", max_cache_len: int | None = None, **unknown
    ) -> MambaFormerCache:
        """The cache that `cache.save(path)` wrote; see `MambaFormerCache.load`."""
        check_keywords(self.load_cache, unknown, frozenset())
        return MambaFormerCache.load(path, self, on_weights_change, max_cache_len)

    def weights_fingerprint(self) -> tuple[Any, str]:
        """`weights_stamp` and hex SHA-256 of all weights that a cache depends on; read once for each stamp.

        Raises:
            ValueError: weights are offloaded, so that their content cannot be read.
        """
        base, stamp = self.base_model, weights_stamp(self.base_model)
        known = base._fingerprint
        if known is None or known[0] != stamp:
            weights = {name: portable(weight) for name, weight in base.state_dict().items() if torch.is_tensor(weight)}
            offloaded = [name for name, weight in weights.items() if weight.is_meta]
            if offloaded:
                raise ValueError(f"A session is tied to the weights, and these are offloaded: {offloaded[:3]}.")
            beside = {"adapters": adapters_of(base), **quantized_activations(base)}
            known = base._fingerprint = (stamp, digest_of(weights, beside))
        return known

    def weights_changed(self) -> None:
        """Tells caches and singular bases that weights were written in a way that leaves no trace.

        Such are writes through `weight.data` or through a NumPy view. All others are noticed without it.
        """
        self.base_model.num_replacements += 1

    # ---- experts

    @property
    def expert_vectors(self) -> ExpertLibrary:
        """The expert vectors that may be called by name: add, blend, load and save them here."""
        return self._expert_library

    def load_expert_vectors(self, path: str) -> list[str]:
        """Adds the expert vector of a file, or all of a folder, to `expert_vectors`; returns their names."""
        return self._expert_library.load(path)

    def linear_modules(self) -> dict[str, nn.Module]:
        """The linear modules that an expert may scale, by the names that experts use."""
        prefix = "" if self.base_model is not self else "model."
        found = {prefix + name: module for name, module in self.named_modules() if name.endswith("_proj")}
        found = without_wrappers(found)
        head = self.get_output_embeddings()
        found = found if head is None else {**found, "lm_head": head}
        found = {name: base_linear(module) for name, module in found.items()}
        # A module that a user put in has no weight that could be scaled, or one of another kind.
        return {name: module for name, module in found.items() if getattr(module, "weight", None) is not None}

    @property
    def _bases(self) -> SingularBases:
        self._singular_bases.look_again(writes_stamp(self))
        return self._singular_bases

    def prepare_experts(self, names: list[str] | None = None) -> None:
        """Computes the singular bases of these linear modules (default: all), or reads them from the disk cache.

        Experts do it for what they scale when they are first used; this does it at a chosen time, with a progress bar,
        and also keeps the bases of weights on disk that were changed after loading.
        """
        modules = self.linear_modules()
        self._bases.prepare({name: functools.partial(weight_of, modules[name]) for name in names or modules})

    def _bases_of(self, names: Iterable[str], **options: Any) -> dict[str, SingularBasis]:
        modules = self.linear_modules()
        return self._bases.get_all({name: functools.partial(weight_of, modules[name]) for name in names}, **options)

    def spectrum(self, names: list[str]) -> dict[str, list[float]]:
        """The first singular values of these linear modules: an expert's `metadata["spectrum"]` ties it to them."""
        return spectrum_of(self._bases_of(names))

    def _plan(self, expert_vector: Any, cache: MambaFormerCache | None) -> ExpertPlan:
        """Resolves and checks the expert of a forward; changes nothing."""
        check_is_ours(cache)
        is_given = expert_vector is not ...
        if not is_given and _is_compiled_step(cache):
            return ExpertPlan() if cache.expert_plan is None else cache.expert_plan
        expert, key = None, None
        if is_given:
            resolved = resolve_expert(expert_vector, self._expert_library)
            expert, key = _with_key(resolved)
        elif cache is not None:
            expert, key = cache.expert_vector, cache.provenance.in_force.expert_key
        if self._merged_modules() and (is_given or expert is not None):
            raise ValueError(
                "An expert is merged into the weights: call `unmerge_expert_vector()` before naming another one."
            )
        if is_given:
            self._check_what_scales_nothing(expert_vector, resolved)
        rows = expert_vector if is_given else expert
        num_rows = len(rows) if isinstance(rows, (list, tuple)) else None
        weights = None if cache is None else weights_stamp(self.base_model)
        if expert is None:
            return ExpertPlan(num_rows=num_rows, weights=weights)
        head = self.get_output_embeddings()
        head = None if head is None else (weights_stamp(head), self.num_replacements)
        known = None if cache is None or _is_trained(expert) else cache.expert_plan
        if known is not None and (known.key, known.weights, known.head) == (key, weights, head):
            return replace(known, num_rows=num_rows)
        with _outside_inference_mode():
            return ExpertPlan(expert, key, num_rows, self._scaled_bases(expert), weights, head)

    def _scaled_bases(self, expert: Any) -> dict[str, dict[str, ScaledBasis]]:
        modules = self.linear_modules()
        rows = expert if isinstance(expert, list) else [expert]
        for row in rows:
            if row is not None:
                self.check_expert(row)
        ranks: dict[str, int] = {}
        for name, z in (pair for row in rows if row is not None for pair in row.vectors.items()):
            if name in modules:  # not so the head, for a model without one
                ranks[name] = max(len(z), ranks.get(name, 0))
        scaled: dict[str, dict[str, ScaledBasis]] = {}
        bases = self._bases_of(ranks, ranks=ranks, in_weights_dtype=True)
        for name, basis in bases.items():
            z = [None if row is None else row.vectors.get(name) for row in rows]
            for row in rows:
                if row is not None:
                    check_spectrum(row, name, basis.values)
            owner, _, short = name.removeprefix("model.").rpartition(".")
            mesh = mesh_of(modules[name])
            if mesh is not None:
                basis = replace(basis, vectors=agreed(basis.vectors, mesh))
            scaled.setdefault(owner, {})[short] = scale_basis(basis, z if isinstance(expert, list) else z[0], mesh)
        return scaled

    def _check_what_scales_nothing(self, given: Any, resolved: Any) -> None:
        """Experts of ones are resolved to the base, and would pass whatever modules they name."""
        pairs = zip(given, resolved, strict=True) if isinstance(resolved, list) else [(given, resolved)]
        for row, expert in pairs:
            if row is not None and expert is None:
                row = self._expert_library[row] if isinstance(row, str) else row
                self.check_expert(ExpertVector(getattr(row, "vectors", row)))

    def check_expert(self, expert: ExpertVector) -> None:
        """Refuses an expert (`ValueError`) that names other modules than this model has, or has too many scales."""
        modules = self.linear_modules()
        for name in expert.vectors:
            if name in modules:
                check_can_be_read(name, modules[name])
        sizes = {name: shape_of(module) for name, module in modules.items()}
        if "lm_head" not in sizes:
            sizes["lm_head"] = (self.config.vocab_size, self.config.hidden_size)
        check_expert(expert, sizes)

    def merge_expert_vector(self, expert_vector: Any) -> None:
        """Writes an expert into the weights, W' = U diag(s * z) V^T, so that it costs nothing per token.

        The weights it changes are kept aside for `unmerge_expert_vector`. Caches notice the change by themselves.

        Raises:
            ValueError: one is merged already, or the expert does not fit the model.
            TypeError: it is no single expert.
        """
        if self._merged_modules():
            raise ValueError("An expert is merged already: call `unmerge_expert_vector()` first.")
        expert, _ = resolve_with_key(self._expert_library, expert_vector)
        if expert is None or isinstance(expert, list):
            raise TypeError("`merge_expert_vector` takes one expert for all rows, and not the base.")
        self.check_expert(expert)
        modules = self.linear_modules()
        modules = {name: modules[name] for name in expert.vectors if name in modules}  # there may be no head
        for name, module in modules.items():
            _check_can_be_merged_into(name, module)
        merged = []
        for name, basis in self._bases_of(modules).items():
            check_spectrum(expert, name, basis.values)
            new = merged_weight(weight_of(modules[name]), basis, expert.vectors[name].detach())
            merged.append((modules[name], placed_like(new, modules[name].weight)))
        for module, weight in merged:
            old = _swap_weight(module, weight, self._is_tied(module))
            self._merged_modules().append((module, old, version_of(module.weight)))
        self.base_model.num_merges += 1

    def unmerge_expert_vector(self) -> None:
        """Puts back the weights of before `merge_expert_vector`, bit for bit.

        Raises:
            ValueError: nothing is merged, or the weights were trained or loaded since.
        """
        if not self._merged_modules():
            raise ValueError("No expert is merged: there is nothing to undo.")
        if any(version_of(module.weight) != version for module, _, version in self._merged_modules()):
            raise ValueError(
                "Weights were written since the expert was merged, by training or loading: putting the old ones back "
                "would mix two models. Load the model anew."
            )
        while self._merged_modules():
            module, weight, _ = self._merged_modules().pop()
            if isinstance(weight, nn.Parameter):
                module.weight = weight
            else:
                _swap_weight(module, weight, is_tied=False)
        self.base_model.num_merges += 1

    def _merged_modules(self) -> list[tuple[nn.Module, torch.Tensor, int]]:
        """What is merged, what undoes it, and the version it has; kept by the stack, which its models share."""
        return self.base_model._unmerged

    def _is_tied(self, module: nn.Module) -> bool:
        embedding = self.get_input_embeddings()
        return module is not embedding and module.weight is embedding.weight

    def tie_weights(self, *args, **kwargs):
        self._check_tied_head("tying weights")
        return super().tie_weights(*args, **kwargs)

    def _check_tied_head(self, action: str) -> None:
        if any(isinstance(weight, nn.Parameter) for _, weight, _ in self._merged_modules()):
            raise ValueError(
                f"An expert is merged into the tied `lm_head`: call `unmerge_expert_vector()` before {action}."
            )

    def _note_whether_tied(self) -> None:
        """Quantizing only the head unties it, and Transformers may say so where it has not: a file needs the truth."""
        head = self.get_output_embeddings()
        if head is not None and (self._is_tied(head) or is_quantized(base_linear(head).weight)):
            self.config.tie_word_embeddings = self._is_tied(head)

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """Saves weights, configuration, code and, under `experts/`, the expert vectors of the library.

        A save that fails leaves the folder as it was, with the model that it held; an upload that fails leaves the
        new one. Models that are sharded over processes are written in place.
        """
        self._check_tied_head("saving")
        prepare_to_save(getattr(self, "generation_config", None))
        self.config.auto_map = dict(AUTO_MAP)
        self.config.experts = list(self._expert_library) or None
        self._note_whether_tied()
        is_written_by_many = kwargs.get("distributed_checkpoint") or any(map(is_shard, self.parameters()))
        with ExitStack() as stack:
            stack.enter_context(saved_as_quantized(self))
            if is_main_process and not is_written_by_many:
                save_directory = str(stack.enter_context(staged_folder(save_directory)).path)
            if is_main_process:
                self.write_folders(save_directory)
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def write_folders(self, directory) -> list[str]:
        return save_experts(self._expert_library, directory)


def _check_can_be_merged_into(name: str, module: nn.Module) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"`{name}` is parametrized: remove the parametrization before merging.")
    if is_quantized(module.weight) or matrix_of(module) is not None:
        raise ValueError(
            f"`{name}` is quantized, and rounding it again would be another expert: pass it as `expert_vector`, or "
            "merge it before the model is quantized."
        )


@torch.no_grad()
def _swap_weight(module: nn.Module, weight: torch.Tensor, is_tied: bool) -> torch.Tensor:
    """Gives `module` the values of `weight`; returns what puts the old ones back."""
    if is_tied:
        old, module.weight = module.weight, nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        return old
    old = module.weight.detach().clone()
    module.weight.copy_(weight)
    return old


class MambaFormerModel(MambaFormerPreTrainedModel):
    """The stack without a head: token ids or embeddings -> hidden states (rows, tokens, hidden_size)."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MambaFormerLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else MambaFormerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._few_tokens, self._seen_weights = FewTokens(), SeenWeights()
        self.post_init()

    @can_return_tuple
    @feeds_its_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        expert_vector: Any = ...,
        expert_plan: ExpertPlan | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MambaFormerModelOutput:
        """Feeds new tokens behind those of the cache.

        Args:
            attention_mask: 0 (pad) or 1 for the new tokens (rows, tokens), or for those of the cache and the new ones.
                Pads may stand anywhere; the states at a pad are those of the last real token before it. Larger
                numbers tell sequences that are packed into a row: 1, 1, 2, 2, 0.
            position_ids: positions for RoPE (rows, tokens); by default each sequence counts its real tokens. A
                sequence starts where they do not grow.
            cache: a cache of `make_cache`; by default one is made if `use_cache`. `past_key_values` is the same
                argument under its older name.
            expert_vector: see `MambaFormerForCausalLM.forward`.
            expert_plan: the same, prepared by a model that stands on this one.
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
        feed = check_feed(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        packing, is_grouped = Packing.of(feed.mask), can_group(self.config, output_attentions)
        sequences = packed_sequences(feed, packing, borders, attention_mask, cache, use_cache, is_grouped)
        plan = self._plan(expert_vector, cache) if expert_plan is None else expert_plan
        cache, places = self._cache_for(use_cache, cache) if sequences is None else None, places_of_model(self)
        if cache is not None:
            check_cache_fits(cache, places)
        change = self._change(feed, plan, cache)
        whole = feed
        if change.recomputes:
            whole = prepend_history(feed, cache, self.embed_tokens)
            packing = Packing.of(whole.mask)
        recorded = Recorder(self.config, packing, output_hidden_states, output_attentions)
        if recorded.wants_attention and self.config._attn_implementation != "eager":
            logger.warning_once("Only `attn_implementation='eager'` returns attention weights.")
        uncounted = without_counted_forwards(self) if plan.weights is not None else nullcontext()
        with self._step(cache, change, feed, whole, packing) as step, uncounted:
            hidden_states = self._run(places, whole, packing, step.span, plan, cache, recorded, sequences, **kwargs)
        if cache is not None and change is not UNCHANGED:
            cache.expert_plan = plan if plan.is_reusable else None
        num_new = feed.token_ids.shape[1]
        return MambaFormerModelOutput(
            last_hidden_state=packing.unpack(hidden_states)[:, -num_new:],
            cache=cache,
            **recorded.results(num_new),
        )

    def _run(
        self,
        places: list[Place],
        whole: Feed,
        packing: Packing,
        span: Span,
        plan: ExpertPlan,
        cache: MambaFormerCache | None,
        recorded: Recorder,
        sequences: Sequences | None,
        **kwargs,
    ) -> torch.Tensor:
        """All layers over what is fed; left-aligned hidden states (rows, tokens, hidden_size)."""
        device = whole.token_ids.device
        hidden_states = packing.pack(self._embed(whole))
        position_embeddings = None
        if self.rotary_emb is not None:
            chosen = whole.position_ids
            counted = span.positions(device) if sequences is None else sequences.positions
            positions = counted if chosen is None else packing.pack(chosen)
            position_embeddings = self.rotary_emb(hidden_states, positions)
        shown = packing if recorded.wants_attention else None
        attention = plan_attention(places, self.config, span, cache, hidden_states, shown, sequences)
        if not recorded.wants_anything:
            shared = attention, plan.experts(), position_embeddings, cache, span.lengths
            of_kernels = self._few_tokens.run(places, plan.weights, hidden_states, *shared)
            if of_kernels is not None:
                return self.norm(of_kernels)
        for place in places:
            outputs = place.module(
                recorded.hidden(hidden_states),
                attention=attention.get(place.window),
                experts=place.experts_of(plan.experts()),
                position_embeddings=position_embeddings,
                cache=place.cache_of(cache),
                lengths=span.lengths,
                positions=None if sequences is None else sequences.positions,
                **kwargs,
            )
            # A layer that a user put in may return its states alone, as most layers of Transformers do.
            hidden_states, weights = (outputs, None) if isinstance(outputs, torch.Tensor) else (*outputs, None)[:2]
            recorded.attention(weights)
        return recorded.hidden(self.norm(hidden_states))

    def _cache_for(self, use_cache: bool | None, given: MambaFormerCache | None) -> MambaFormerCache | None:
        is_checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if given is not None and is_checkpointing:
            raise ValueError(
                "Gradient checkpointing runs layers twice and cannot use a cache: leave it out, or run the forward "
                "under `torch.no_grad()`."
            )
        if given is not None:
            return given
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if wanted and is_checkpointing:
            logger.warning_once("Gradient checkpointing runs layers twice: `use_cache=True` is ignored.")
        return self.make_cache() if wanted and not is_checkpointing else None

    def _step(self, cache, change: Change, feed: Feed, whole: Feed, packing: Packing) -> CacheStep | UncachedStep:
        """Context of the run of all layers: with a cache, a transaction on it."""
        num_tokens, device = whole.token_ids.shape[1], whole.token_ids.device
        if cache is None:
            return UncachedStep(Span(num_tokens, lengths=packing.lengths))
        marks = None if feed.inputs_embeds is None else embedding_marks(feed.inputs_embeds)
        new = NewTokens(feed.token_ids, feed.mask, feed.position_ids, marks)
        return cache.step(change, new, num_tokens, packing.lengths, device)

    def _change(self, feed: Feed, plan: ExpertPlan, cache: MambaFormerCache | None) -> Change:
        rows = feed.token_ids.shape[0]
        if _is_compiled_step(cache):
            return UNCHANGED
        if plan.num_rows not in (None, rows):
            raise ValueError(
                f"`expert_vector` has {plan.num_rows} entries for {rows} rows of the batch: give one each."
            )
        if cache is None:
            return UNCHANGED
        weights = weights_stamp(self) if plan.weights is None else plan.weights
        return cache.plan(plan.expert, plan.key, weights)

    def _embed(self, feed: Feed) -> torch.Tensor:
        if feed.inputs_embeds is None:
            return self.embed_tokens(feed.token_ids)
        if feed.mask is None:
            return feed.inputs_embeds
        # What stands at a pad may be anything, and not even a weight of zero takes a NaN out of a sum.
        return feed.inputs_embeds.masked_fill(~feed.mask[..., None], 0)


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
    @feeds_its_cache
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
        expert_vector: Any = ...,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MambaFormerCausalLMOutput:
        """Feeds new tokens behind those of the cache; what is shared with `MambaFormerModel.forward` is told there.

        Args:
            labels: next-token targets are `labels` shifted by one (rows, tokens). Ignored are -100, pads, and the
                first real token of a row, which no token of this forward predicts. So padding changes neither the
                loss nor its gradient.
            logits_to_keep: logits of only the last so many tokens (0: of all), or of those at these indices.
            expert_vector: what re-tunes the weights (SVF, arXiv 2501.06252): `None` (the base), a name in
                `model.expert_vectors`, an `ExpertVector`, {module: scales}, or a list with one of these per row. Not
                given, it is what the cache has in force. A change acts on the cached text as `on_expert_change` says.
            kwargs: `num_items_in_batch` is the count of `labels[:, 1:]` other than -100 in all micro-batches of an
                optimizer step, as `Trainer` passes it; the loss is then a sum divided by it. Where the count includes
                labels that are ignored here, the batch's share of it weighs the mean over the batch's targets. Steps
                of several micro-batches are exact with right pads; with left pads, where first tokens are -100 too.
        """
        check_keywords(self.forward, kwargs)
        shifted = kwargs.get("shift_labels")
        check_output_request(input_ids, inputs_embeds, labels, logits_to_keep, self.config.vocab_size, shifted)
        cache = cache_of(cache, past_key_values)
        plan = self._plan(expert_vector, cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            expert_plan=plan,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head_experts = plan.experts().get("", {})
        logits = apply_expert_linear(self.lm_head, outputs.last_hidden_state[:, kept], head_experts.get("lm_head"))
        loss = None
        if labels is not None:
            mask = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].bool()
            borders, kwargs = split_borders(kwargs)
            starts = starts_as_given(labels, attention_mask, position_ids, borders)
            targets = causal_loss_arguments(labels, mask, starts, **kwargs)
            loss = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **targets)
        return MambaFormerCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def decode_step(self, cache: MambaFormerCache) -> DecodeStep:
        """One decoding step behind the text of a static cache, as a module for `torch.export`."""
        return DecodeStep(self, cache)


class MambaFormerForSequenceClassification(MambaFormerPreTrainedModel):
    """A classifier of texts: token ids -> logits (rows, num_labels), read at the last real token."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MambaFormerModel(config)
        self.model._expert_library = self._expert_library
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
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
        expert_vector: Any = ...,
        past_key_values: MambaFormerCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
        refuse_classified(outputs.last_hidden_state, attention_mask, position_ids, split_borders(kwargs)[0])
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
        """The mask that pad ids tell; without one the last column would be read, whichever token is there."""
        pad, fed = self.config.pad_token_id, inputs_embeds if input_ids is None else input_ids
        if pad is None and fed is not None and fed.shape[0] > 1:
            raise ValueError(
                f"The batch has {fed.shape[0]} rows and nothing tells their pads: pass an `attention_mask`, or set "
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
