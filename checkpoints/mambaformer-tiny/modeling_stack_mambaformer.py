"""The layers of a stack: the place of each, and the spec that its cache and its mask depend on.

Users remove, repeat, copy, replace and wrap layers. A layer then has another place than the one it was made for, and
the configuration may describe another layer. So the spec of a layer is read from the layer, and its place is its index
in the stack: `Place` gives the layer its own part of the cache and its own expert vectors.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from .configuration_mambaformer import MIXERS_WITH_STATES

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache
    from .configuration_mambaformer import MambaFormerConfig
    from .expert_vectors_mambaformer import ExpertVector

T = TypeVar("T")
Layer: TypeAlias = Any  # a `MambaFormerLayer`, which is defined above this room, or `None`


class ModelStack(Protocol):
    """The stack of a model, as a cache and a session use it."""

    config: "MambaFormerConfig"
    layers: nn.ModuleList

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def get_input_embeddings(self) -> nn.Module: ...

    def check_expert_vector(self, expert_vector: "ExpertVector") -> None: ...

    def weights_fingerprint(self) -> tuple[object, str]: ...


class LayerSpec(NamedTuple):
    """The properties of a layer that its cache and its mask depend on.

    Args:
        attends: whether the layer has keys and values.
        window: tokens that a query sees, itself included; `None` for all.
        is_recurrent: whether the layer has recurrent states.
    """

    attends: bool = False
    window: int | None = None
    is_recurrent: bool = False

    @property
    def layer_type(self) -> str:
        """The name of such a layer in `config.layer_types`; "other" for a layer without state."""
        if not self.attends:
            return "linear_attention" if self.is_recurrent else "other"
        if self.is_recurrent:
            return "hybrid" if self.window is None else "hybrid_sliding"
        return "full_attention" if self.window is None else "sliding_attention"


@dataclass(slots=True)
class Place:
    """One place in the stack.

    Args:
        position: index in the stack, and in the layers of the cache.
        module: the module that is called: a layer, or a wrapper of one.
        layer: our layer inside of `module`; `None` for a layer of another kind.
        spec: the spec of the layer; a layer of another kind has nothing in the cache.
        first: the first position of the same module, which names its linear modules.
    """

    position: int
    module: nn.Module
    layer: Layer
    spec: LayerSpec
    first: int

    @property
    def window(self) -> int | None:
        return self.spec.window

    @property
    def is_as_made(self) -> bool:
        """Whether the layer's own index is its position, so that it finds its cache and expert vectors by itself."""
        return self.layer is None or self.layer.layer_idx == self.position == self.first

    def cache_of(self, cache: "MambaFormerCache | None") -> "MambaFormerCache | CacheAtPosition | None":
        """The cache, with the layer's own part under the layer's own index."""
        return cache if cache is None or self.is_as_made else CacheAtPosition(cache, self.position)

    def vectors_of(self, expert_vectors: dict[str, T]) -> dict[str, T]:
        """Prepared expert vectors by mixer, under the names that the layer looks up."""
        if not expert_vectors or self.is_as_made:
            return expert_vectors
        pairs = ((own, f"layers.{self.first}.{mixer}") for mixer, own in self.layer.expert_names.items())
        return {own: expert_vectors[name] for own, name in pairs if name in expert_vectors}


class CacheAtPosition:
    """A cache for a layer at `position` whose own index is another: every index means that position."""

    def __init__(self, cache: "MambaFormerCache", position: int):
        self.cache, self.position = cache, position

    @property
    def layers(self) -> "_OneLayer":
        return _OneLayer(self.cache.layers[self.position])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.cache.update(key_states, value_states, self.position, *args, **kwargs)

    def key_store(self, layer_idx: int):
        return self.cache.key_store(self.position)

    def recurrent_store(self, layer_idx: int):
        return self.cache.recurrent_store(self.position)

    def recurrent_states(self, layer_idx: int, like: torch.Tensor):
        return self.cache.recurrent_states(self.position, like)

    def layout(self, layer_idx: int):
        return self.cache.layout(self.position)

    @property
    def replay_reach(self) -> int:
        return self.cache.replay_reach

    def __getattr__(self, name: str):
        return getattr(self.cache, name)


class _OneLayer:
    """A list that has the same layer of the cache under every index."""

    def __init__(self, layer: object):
        self.layer = layer

    def __getitem__(self, index: int):
        return self.layer


def places_of(layers: Iterable[nn.Module]) -> list[Place]:
    """The places of a stack, in order.

    Raises:
        ValueError: a module wraps several layers.
    """
    places: list[Place] = []
    firsts: dict[int, int] = {}
    for position, module in enumerate(layers):
        layer = layer_inside(module)
        spec = LayerSpec() if layer is None else layer.spec
        places.append(Place(position, module, layer, spec, firsts.setdefault(id(module), position)))
    return places


def layer_inside(module: nn.Module) -> Layer:
    """Our layer that `module` is or wraps; `None` for a layer of another kind.

    Raises:
        ValueError: `module` wraps several layers.
    """
    if "steps" in module.__dict__:
        return module
    layers = [each for each in module.modules() if "steps" in each.__dict__]
    if len(layers) > 1:
        raise ValueError(
            f"A {type(module).__name__} in `layers` wraps {len(layers)} layers, and each needs its own part of the "
            "cache: wrap each layer by itself."
        )
    return layers[0] if layers else None


def places_of_model(stack: ModelStack) -> list[Place]:
    """The places of a model's stack."""
    return places_of(list(stack.layers)[: stack.config.num_hidden_layers])


def specs_of(config: "MambaFormerConfig") -> list[LayerSpec]:
    """The specs of all layers, as the configuration describes them."""
    described = ((config.mixers(idx), config.window(idx)) for idx in range(config.num_hidden_layers))
    return [
        LayerSpec("attention" in mixers, window, not MIXERS_WITH_STATES.isdisjoint(mixers))
        for mixers, window in described
    ]


def check_cache_fits(cache: "MambaFormerCache", places: list[Place]) -> None:
    """Refuses a cache that was made for other layers.

    Raises:
        ValueError: the number or the kinds of layers differ.
    """
    if cache.specs != [place.spec for place in places]:
        raise ValueError(
            f"The cache was made for {len(cache.specs)} layers and the model now has {len(places)}, or layers of "
            "other kinds: make a new cache with `model.make_cache()` after changing `model.layers`."
        )


def without_wrappers(modules: dict[str, nn.Module], mixers: Collection[str]) -> dict[str, nn.Module]:
    """Linear modules by the names that expert vectors use, which leave out the names of wrappers.

    Args:
        mixers: the names of the mixers in their layers.
    """
    named = {name: _name_in_stack(name, mixers) for name in modules}
    uses = Counter(named.values())
    return {named[name] if uses[named[name]] == 1 else name: module for name, module in modules.items()}


def _name_in_stack(name: str, mixers: Collection[str]) -> str:
    """ "model.layers.3.inside.mlp._orig_mod.up_proj" -> "model.layers.3.mlp.up_proj"."""
    parts = name.split(".")
    if "layers" not in parts:
        return name
    start = parts.index("layers") + 2
    mixer = next((i for i in range(start, len(parts) - 1) if parts[i] in mixers), None)
    return name if mixer is None else ".".join([*parts[:start], parts[mixer], parts[-1]])


__all__ = [
    "LayerSpec",
    "Place",
    "check_cache_fits",
    "layer_inside",
    "places_of",
    "places_of_model",
    "specs_of",
    "without_wrappers",
]
