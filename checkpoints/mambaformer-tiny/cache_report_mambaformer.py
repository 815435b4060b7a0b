"""The report of a cache: bytes by layer type and kind, and which of them are spare or shared."""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache

# Parts of a report that count bytes which other parts count too, and parts that count bytes which are gone.
PARTS_OF_HELD = ("slack", "shared")
NOT_HELD = ("evicted",)


def make_report(cache: "MambaFormerCache") -> dict[str, dict[str, int]]:
    """The report of `MambaFormerCache.report`."""
    columns, report = cache.get_seq_length(), {}
    slack: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    evicted: Counter[str] = Counter()
    for spec, layer in zip(cache.specs, cache.layers, strict=True):
        kinds = report.setdefault(spec.layer_type, {})
        for store in layer.stores.values():
            for kind, nbytes in store.nbytes().items():
                kinds[kind] = kinds.get(kind, 0) + nbytes
            slack.update(store.slack(columns))
            shared.update(store.shared())
            evicted.update(store.evicted(columns))
    report["tokens"] = cache.history.nbytes()
    if cache.options.park_bytes:
        report["parked"] = {"states": cache.parked.nbytes}
    if cache.options.policy is not None:
        report["evicted"] = dict(evicted)
    return report | {"slack": dict(slack), "shared": dict(shared)}


def bytes_held(report: dict[str, dict[str, int]]) -> int:
    """The bytes of all tensors that a report counts, each once."""
    return sum(sum(kinds.values()) for part, kinds in report.items() if part not in PARTS_OF_HELD + NOT_HELD)


__all__ = ["bytes_held", "make_report"]
