"""The layers as they stand in a stack: the place of each, and the spec that its cache and its mask depend on.

Users remove, repeat, copy, replace and wrap layers. A layer then stands at another place than the one that it was
made for, and the configuration may describe another layer. So a layer's spec is read from the layer, and its place
is where it is found: `Place` gives it the part of the cache and the expert vectors that belong there.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class LayerSpec(NamedTuple):
    """The properties of a layer that its cache and its mask depend on.

    Args:
        attends: whether it keeps keys and values.
        window: tokens that a query sees, itself included; `None` for all.
        is_recurrent: whether it keeps recurrent states.
    """

    attends: bool = False
    window: int | None = None
    is_recurrent: bool = False


@dataclass(slots=True)
class Place:
    """One place in the stack.

    Args:
        position: index in the stack, and in the layers of the cache.
        module: the module that is called: a layer, or what wraps it.
        layer: our layer inside of `module`; `None` where there is none.
        spec: of the layer; a layer of another kind keeps nothing in the cache.
        first: the first position of the same module, which names its linear modules.
    """

    position: int
    module: nn.Module
    layer: Any
    spec: LayerSpec
    first: int

    @property
    def window(self) -> int | None:
        return self.spec.window

    @property
    def is_as_made(self) -> bool:
        """Whether the layer counts itself as being here, so that it finds cache and expert vectors by itself."""
        return self.layer is None or self.layer.layer_idx == self.position == self.first

    def cache_of(self, cache: Any) -> Any:
        """The cache, in which the layer finds its own part under its own number."""
        return cache if cache is None or self.is_as_made else CacheAt(cache, self.position)

    def vectors_of(self, expert_vectors: dict[str, Any]) -> dict[str, Any]:
        """Prepared expert vectors by mixer, under the names that the layer asks for."""
        if not expert_vectors or self.is_as_made:
            return expert_vectors
        pairs = ((own, f"layers.{self.first}.{mixer}") for mixer, own in self.layer.expert_names.items())
        return {own: expert_vectors[name] for own, name in pairs if name in expert_vectors}


class CacheAt:
    """A cache as it is seen by a layer that stands at `position` and counts itself as another one."""

    def __init__(self, cache: Any, position: int):
        self.cache, self.position = cache, position

    @property
    def layers(self) -> "_Everywhere":
        return _Everywhere(self.cache.layers[self.position])

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return self.cache.update(key_states, value_states, self.position, *args, **kwargs)

    def recurrent_states(self, layer_idx: int, like):
        return self.cache.recurrent_states(self.position, like)

    def layout(self, layer_idx: int):
        return self.cache.layout(self.position)

    @property
    def replay_reach(self) -> int:
        return self.cache.replay_reach

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class _Everywhere:
    """A list that has the same layer of the cache under every index."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __getitem__(self, index: int) -> Any:
        return self.layer


def places_of(layers: Iterable[nn.Module]) -> list[Place]:
    """The places of a stack, in order.

    Raises:
        ValueError: a module wraps several layers.
    """
    found: list[Place] = []
    firsts: dict[int, int] = {}
    for position, module in enumerate(layers):
        layer = module if "steps" in module.__dict__ else layer_inside(module)
        spec = LayerSpec() if layer is None else layer.spec
        found.append(Place(position, module, layer, spec, firsts.setdefault(id(module), position)))
    return found


def layer_inside(module: nn.Module) -> Any:
    """Our layer that `module` is or wraps; `None` for a layer of another kind.

    Raises:
        ValueError: `module` wraps several.
    """
    found = [each for each in module.modules() if "steps" in each.__dict__]
    if len(found) > 1:
        raise ValueError(
            f"A {type(module).__name__} in `layers` wraps {len(found)} layers, and each needs its own part of the "
            "cache: wrap each layer by itself."
        )
    return found[0] if found else None


def places_of_model(stack: Any) -> list[Place]:
    """The places of a model's stack."""
    return places_of(list(stack.layers)[: stack.config.num_hidden_layers])


def specs_of(config: Any) -> list[LayerSpec]:
    """The specs of all layers, as the configuration describes them."""
    every = ((config.mixers(idx), config.window(idx)) for idx in range(config.num_hidden_layers))
    return [LayerSpec("attention" in mixers, window, "recurrent" in mixers) for mixers, window in every]


def check_cache_fits(cache: Any, places: list[Place]) -> None:
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
    """Linear modules by the names that expert vectors use, which do not name the wrappers around them.

    `mixers` are the names of the mixers in their layers.
    """
    named = {name: _name_in_stack(name, mixers) for name in modules}
    taken = Counter(named.values())
    return {named[name] if taken[named[name]] == 1 else name: module for name, module in modules.items()}


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
