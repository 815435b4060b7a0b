"""MambaFormer (arXiv 2402.04248): Mamba and attention in one stack, with expert vectors and an exact cache.

Reads from the inside out: a layer, what all models share, the stack, and what stands on it. What a forward does is in
`MambaFormerModel.forward`; only here do weights and cache meet.
"""

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.hub import cached_file

from .cache_mambaformer import DEFAULT_REACH, MambaFormerCache, Transition
from .configuration_mambaformer import MambaFormerConfig
from .dispatch_mambaformer import DraftsUnderOneExpert, ExpertSchedule, ExpertSwitchLogitsProcessor
from .experts_mambaformer import (
    ExpertLibrary,
    ExpertVector,
    ScaledBasis,
    SingularBases,
    check_expert,
    check_spectrum,
    expert_key,
    merged_weight,
    project,
    resolve_expert,
    scale_basis,
    spectrum_of,
)
from .feed_mambaformer import (
    Feed,
    Packing,
    Recorder,
    behind_history,
    check_feed,
    check_is_ours,
    labels_of_real_tokens,
)
from .mixers_mambaformer import (
    AttentionPlan,
    MambaFormerAttention,
    MambaFormerMambaMixer,
    MambaFormerMLP,
    MambaFormerRMSNorm,
    MambaFormerRotaryEmbedding,
    plan_attention,
)
from .storage_mambaformer import Span

logger = logging.get_logger(__name__)

EXPERTS_FOLDER = "experts"
# Arguments of `from_pretrained` that say where on the Hub a file is.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# What this model's `generate` tells its own hooks, and no assistant.
OWN_GENERATION_KWARGS = ("expert_schedule", "is_speculative")
# Which class of the saved folder each Auto class finds there.
AUTO_MAP = {
    "AutoConfig": "configuration_mambaformer.MambaFormerConfig",
    "AutoModel": "modeling_mambaformer.MambaFormerModel",
    "AutoModelForCausalLM": "modeling_mambaformer.MambaFormerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mambaformer.MambaFormerForSequenceClassification",
}


class MambaFormerLayer(GradientCheckpointingLayer):
    """The mixers of one layer type and, if configured, an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        mixers = config.mixers(layer_idx)
        self.has_attention, self.has_mamba = "attention" in mixers, "mamba" in mixers
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

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention: AttentionPlan | None,
        experts: dict[str, dict[str, ScaledBasis]],
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: MambaFormerCache | None = None,
        lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attentions, prefix = None, f"layers.{self.layer_idx}"
        if self.has_attention:
            mixed, attentions = self.self_attn(
                self.self_attn_layernorm(hidden_states),
                attention,
                experts.get(f"{prefix}.self_attn", {}),
                position_embeddings,
                past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + mixed
        if self.has_mamba:
            normed = self.mamba_layernorm(hidden_states)
            mamba_experts = experts.get(f"{prefix}.mamba", {})
            hidden_states = hidden_states + self.mamba(normed, mamba_experts, past_key_values, lengths)
        if self.has_mlp:
            normed = self.mlp_layernorm(hidden_states)
            hidden_states = hidden_states + self.mlp(normed, experts.get(f"{prefix}.mlp", {}))
        return hidden_states, attentions


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
        return self.scaled or {}

    @property
    def is_reusable(self) -> bool:
        """A plan whose expert is being trained belongs to one graph."""
        return not _is_trained(self.expert)


def _is_trained(expert: Any) -> bool:
    rows = expert if isinstance(expert, list) else [expert]
    return any(vector.requires_grad for row in rows if row is not None for vector in row.vectors.values())


def weights_stamp(model: nn.Module) -> Any:
    """Tells whether weights changed, without reading them: every in-place write and every new tensor changes it.

    Weights made in inference mode do not count their writes, so merging and unmerging count theirs.
    """
    if torch.compiler.is_compiling():
        return None
    found, modules = [getattr(model, "num_merges", 0)], [model]
    while modules:  # `model.parameters()` builds every name, which takes ten times as long
        module = modules.pop()
        modules.extend(child for child in module._modules.values() if child is not None)
        for weight in module._parameters.values():
            if weight is not None:
                found.append((weight.data_ptr(), 0 if weight.is_inference() else weight._version))
    return hash(tuple(found))


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


class MambaFormerPreTrainedModel(PreTrainedModel):
    """What all MambaFormers share: loading, initialization, experts and the making of caches."""

    config_class = MambaFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = False  # `crop` restores every state, so speculative decoding may roll back

    def __init__(self, config: MambaFormerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._expert_library = ExpertLibrary()
        self._singular_bases = SingularBases()
        self._unmerged: list[tuple[nn.Module, torch.Tensor]] = []
        self.num_merges = 0

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
        """Loads a model with the experts that were saved beside it, from a folder or the Hub."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        where = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        for name in model.config.experts or []:
            file = f"{EXPERTS_FOLDER}/{name}.safetensors"
            model._expert_library.load(cached_file(pretrained_model_name_or_path, file, **where), name)
        return loaded

    # ---- caches

    def make_cache(
        self,
        storage: str = "dense",
        max_cache_len: int | None = None,
        on_expert_change: str = "recompute",
        rollback_reach: int = 0,
    ) -> MambaFormerCache:
        """A cache for this model; the options are those of `MambaFormerCache`."""
        resolve = functools.partial(resolve_with_key, self._expert_library)
        return MambaFormerCache(self.config, storage, max_cache_len, on_expert_change, resolve, rollback_reach)

    # ---- experts

    @property
    def experts(self) -> ExpertLibrary:
        """The experts that may be called by name."""
        return self._expert_library

    def load_experts(self, path: str) -> list[str]:
        """Adds the expert of a file, or all of a folder, to `experts`; returns their names."""
        return self._expert_library.load(path)

    def linear_modules(self) -> dict[str, nn.Module]:
        """The linear modules that an expert may scale, by the names that experts use."""
        prefix = "" if self.base_model is not self else "model."
        found = {prefix + name: module for name, module in self.named_modules() if name.endswith("_proj")}
        head = self.get_output_embeddings()
        return found if head is None else {**found, "lm_head": head}

    def prepare_experts(self, names: list[str] | None = None) -> None:
        """Computes the singular bases of these linear modules (default: all), or reads them from the disk cache.

        Experts do it for what they scale when they are first used; this does it at a chosen time, with a progress bar.
        """
        modules = self.linear_modules()
        self._singular_bases.prepare({name: modules[name].weight for name in names or modules})

    def spectrum(self, names: list[str]) -> dict[str, list[float]]:
        """The first singular values of these linear modules: an expert's `metadata["spectrum"]` ties it to them."""
        modules = self.linear_modules()
        return spectrum_of({name: self._singular_bases.get(name, modules[name].weight) for name in names})

    def _plan(self, expert_vector: Any, cache: MambaFormerCache | None) -> ExpertPlan:
        """Resolves and checks the expert of a forward; changes nothing."""
        check_is_ours(cache)
        is_given = expert_vector is not ...
        expert, key = None, None
        if is_given:
            resolved = resolve_expert(expert_vector, self._expert_library)
            expert, key = _with_key(resolved)
        elif cache is not None:
            expert, key = cache.expert_vector, cache.in_force.expert_key
        if self._merged_modules() and (is_given or expert is not None):
            raise ValueError(
                "An expert is merged into the weights: call `unmerge_expert()` before naming another one."
            )
        if is_given:
            self._check_what_scales_nothing(expert_vector, resolved)
        rows = expert_vector if is_given else expert
        num_rows = len(rows) if isinstance(rows, (list, tuple)) else None
        weights = None if cache is None else weights_stamp(self.base_model)
        if expert is None:
            return ExpertPlan(num_rows=num_rows, weights=weights)
        head = None if self.get_output_embeddings() is None else weights_stamp(self.get_output_embeddings())
        known = None if cache is None or _is_trained(expert) else cache.expert_plan
        # A compiled step cannot stamp the weights: it takes the plan that an eager forward left behind.
        is_fresh = torch.compiler.is_compiling() or (known and (known.weights, known.head) == (weights, head))
        if known is not None and known.key == key and is_fresh:
            return replace(known, num_rows=num_rows)
        return ExpertPlan(expert, key, num_rows, self._scaled_bases(expert), weights, head)

    def _scaled_bases(self, expert: Any) -> dict[str, dict[str, ScaledBasis]]:
        modules = self.linear_modules()
        rows = expert if isinstance(expert, list) else [expert]
        for row in rows:
            if row is not None:
                self._check_expert(row, modules)
        scaled: dict[str, dict[str, ScaledBasis]] = {}
        for name in dict.fromkeys(name for row in rows if row is not None for name in row.vectors):
            if name not in modules:
                continue  # the head, for a model without one
            z = [None if row is None else row.vectors.get(name) for row in rows]
            weight = modules[name].weight
            rank = max(len(scales) for scales in z if scales is not None)
            basis = self._singular_bases.get(name, weight, rank, weight.dtype, weight.device)
            for row in rows:
                if row is not None:
                    check_spectrum(row, name, basis.values)
            owner, _, short = name.removeprefix("model.").rpartition(".")
            scaled.setdefault(owner, {})[short] = scale_basis(basis, z if isinstance(expert, list) else z[0])
        return scaled

    def _check_what_scales_nothing(self, given: Any, resolved: Any) -> None:
        """Experts of ones are resolved to the base, and would pass whatever modules they name."""
        pairs = zip(given, resolved, strict=True) if isinstance(resolved, list) else [(given, resolved)]
        for row, expert in pairs:
            if row is not None and expert is None:
                row = self._expert_library[row] if isinstance(row, str) else row
                self._check_expert(ExpertVector(getattr(row, "vectors", row)), self.linear_modules())

    def _check_expert(self, expert: ExpertVector, modules: dict[str, nn.Module]) -> None:
        sizes = {name: tuple(module.weight.shape) for name, module in modules.items()}
        if "lm_head" not in sizes:
            sizes["lm_head"] = (self.config.vocab_size, self.config.hidden_size)
        check_expert(expert, sizes)

    def merge_expert(self, expert_vector: Any) -> None:
        """Writes an expert into the weights, W' = U diag(s * z) V^T, so that it costs nothing per token.

        The weights it changes are kept aside for `unmerge_expert`. Caches notice the change by themselves.

        Raises:
            ValueError: one is merged already, or the expert does not fit the model.
            TypeError: it is no single expert.
        """
        if self._merged_modules():
            raise ValueError("An expert is merged already: call `unmerge_expert()` first.")
        expert, _ = resolve_with_key(self._expert_library, expert_vector)
        if expert is None or isinstance(expert, list):
            raise TypeError("`merge_expert` takes one expert for all rows, and not the base.")
        modules = self.linear_modules()
        self._check_expert(expert, modules)
        merged = []
        for name, z in expert.vectors.items():
            if name in modules:  # not so the head, for a model without one
                basis = self._singular_bases.get(name, modules[name].weight)
                check_spectrum(expert, name, basis.values)
                merged.append((modules[name], merged_weight(modules[name].weight, basis, z.detach())))
        for module, weight in merged:
            self._merged_modules().append((module, _swap_weight(module, weight, self._is_tied(module))))
        self.base_model.num_merges += 1

    def unmerge_expert(self) -> None:
        """Puts back the weights of before `merge_expert`, bit for bit.

        Raises:
            ValueError: nothing is merged.
        """
        if not self._merged_modules():
            raise ValueError("No expert is merged: there is nothing to undo.")
        while self._merged_modules():
            module, weight = self._merged_modules().pop()
            if isinstance(weight, nn.Parameter):
                module.weight = weight
            else:
                _swap_weight(module, weight, is_tied=False)
        self.base_model.num_merges += 1

    def _merged_modules(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """What is merged, with what undoes it; kept by the stack, which all models that stand on it share."""
        return self.base_model._unmerged

    def _is_tied(self, module: nn.Module) -> bool:
        embedding = self.get_input_embeddings()
        return module is not embedding and module.weight is embedding.weight

    def tie_weights(self, *args, **kwargs):
        self._check_tied_head("tying weights")
        return super().tie_weights(*args, **kwargs)

    def _check_tied_head(self, action: str) -> None:
        if any(isinstance(weight, nn.Parameter) for _, weight in self._merged_modules()):
            raise ValueError(f"An expert is merged into the tied `lm_head`: call `unmerge_expert()` before {action}.")

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves weights, configuration, code and, under `experts/`, the expert vectors of the library."""
        self._check_tied_head("saving")
        self.config.auto_map = dict(AUTO_MAP)
        self.config.experts = list(self._expert_library) or None
        if self.config.experts:
            self._expert_library.save(f"{save_directory}/{EXPERTS_FOLDER}")
        return super().save_pretrained(save_directory, *args, **kwargs)


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
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        expert_vector: Any = ...,
        expert_plan: ExpertPlan | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Feeds new tokens behind those of the cache.

        Args:
            attention_mask: 0 (pad) or 1 for the new tokens (rows, tokens), or for those of the cache and the new ones.
                Pads may stand anywhere; the states at a pad are those of the last real token before it.
            position_ids: positions for RoPE (rows, tokens); by default each row counts its real tokens.
            past_key_values: a cache of `make_cache`; by default one is made if `use_cache`.
            expert_vector: see `MambaFormerForCausalLM.forward`.
            expert_plan: the same, prepared by a model that stands on this one.

        Raises:
            ValueError, TypeError: input that does not fit; the cache is then as it was.
        """
        feed = check_feed(self.config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        plan = self._plan(expert_vector, past_key_values) if expert_plan is None else expert_plan
        cache = self._cache_for(use_cache, past_key_values)
        transition = self._transition(feed, plan, cache)
        whole = (
            behind_history(feed, cache, self.embed_tokens) if transition.anew and not transition.drops_text else feed
        )
        packing = Packing.of(whole.mask)
        num_tokens, device = whole.token_ids.shape[1], whole.token_ids.device
        if cache is None:
            span = Span(num_tokens, lengths=packing.lengths)
        else:
            span = cache.begin(transition, num_tokens, packing.lengths, device)

        hidden_states = packing.pack(self._embed(whole))
        position_embeddings = None
        if self.rotary_emb is not None:
            chosen = whole.position_ids
            positions = span.positions(device) if chosen is None else packing.pack(chosen)
            position_embeddings = self.rotary_emb(hidden_states, positions)
        attention = plan_attention(self.config, span, cache, hidden_states)
        recorded = Recorder(self.config, packing, output_hidden_states, output_attentions)
        if recorded.wants_attention and self.config._attn_implementation != "eager":
            logger.warning_once("Only `attn_implementation='eager'` returns attention weights.")
        for layer_idx, layer in enumerate(self.layers):
            recorded.hidden(hidden_states)
            hidden_states, weights = layer(
                hidden_states,
                attention=attention.get(self.config.window(layer_idx)),
                experts=plan.experts(),
                position_embeddings=position_embeddings,
                past_key_values=cache,
                lengths=span.lengths,
                **kwargs,
            )
            recorded.attention(weights)
        hidden_states = self.norm(hidden_states)
        recorded.hidden(hidden_states)
        if cache is not None:
            is_embedded = feed.inputs_embeds is not None
            cache.commit(transition, span, feed.token_ids, feed.mask, feed.position_ids, is_embedded)
            cache.expert_plan = plan if plan.is_reusable else None
        num_new = feed.token_ids.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=packing.unpack(hidden_states)[:, -num_new:],
            past_key_values=cache,
            **recorded.results(num_new),
        )

    def _cache_for(self, use_cache: bool | None, given: MambaFormerCache | None) -> MambaFormerCache | None:
        is_checkpointing = self.gradient_checkpointing and self.training
        if given is not None and is_checkpointing:
            raise ValueError("Gradient checkpointing runs layers twice and cannot use a cache: leave it out.")
        if given is not None:
            return given
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if wanted and is_checkpointing:
            logger.warning_once("Gradient checkpointing runs layers twice: `use_cache=True` is ignored.")
        return self.make_cache() if wanted and not is_checkpointing else None

    def _transition(self, feed: Feed, plan: ExpertPlan, cache: MambaFormerCache | None) -> Transition:
        rows = feed.token_ids.shape[0]
        if plan.num_rows not in (None, rows):
            raise ValueError(
                f"`expert_vector` has {plan.num_rows} entries for {rows} rows of the batch: give one each."
            )
        if cache is None:
            return Transition(plan.expert, None)
        weights = plan.weights
        if torch.compiler.is_compiling():
            weights = cache.in_force.weights  # a compiled step cannot stamp the weights
        elif weights is None:
            weights = weights_stamp(self)
        return cache.plan(plan.expert, plan.key, weights)

    def _embed(self, feed: Feed) -> torch.Tensor:
        if feed.inputs_embeds is None:
            return self.embed_tokens(feed.token_ids)
        if feed.mask is None:
            return feed.inputs_embeds
        # What stands at a pad may be anything, and not even a weight of zero takes a NaN out of a sum.
        return feed.inputs_embeds.masked_fill(~feed.mask[..., None], 0)


class MambaFormerForCausalLM(MambaFormerPreTrainedModel, GenerationMixin):
    """A language model: token ids -> logits (rows, tokens, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.model = MambaFormerModel(config)
        self.model._expert_library = self._expert_library
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MambaFormerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_vector: Any = ...,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Feeds new tokens behind those of the cache; what is shared with `MambaFormerModel.forward` is told there.

        Args:
            labels: next-token targets are `labels` shifted by one (rows, tokens); -100 and pads are ignored.
            logits_to_keep: logits of only the last so many tokens (0: of all), or of those at these indices.
            expert_vector: what re-tunes the weights (SVF, arXiv 2501.06252): `None` (the base), a name in
                `model.experts`, an `ExpertVector`, {module: scales}, or a list with one of these per row. Not given,
                it is what the cache has in force. A change acts on the cached text as `on_expert_change` says.
        """
        plan = self._plan(expert_vector, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            expert_plan=plan,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head_experts = plan.experts().get("", {})
        logits = project(self.lm_head, outputs.last_hidden_state[:, kept], head_experts.get("lm_head"))
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels_of_real_tokens(labels, attention_mask[:, -labels.shape[1] :].bool())
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # ---- generation

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

    def first_layers(self, num_layers: int) -> "MambaFormerForCausalLM":
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
    is_same = (prompt[:, :num_cached] == cached) | (cached < 0) if prompt.shape[0] == cached.shape[0] else None
    if is_same is None:
        return True  # the forward says what is wrong with the rows
    mask = cache.log.mask.tensor
    return bool((is_same if mask is None else is_same | ~mask[:, :num_cached].to(prompt.device)).all())


class MambaFormerForSequenceClassification(MambaFormerPreTrainedModel):
    """A classifier of texts: token ids -> logits (rows, num_labels), read at the last real token."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MambaFormerModel(config)
        self.model._expert_library = self._expert_library
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Without an `attention_mask`, tokens that are `config.pad_token_id` count as pads."""
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


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
