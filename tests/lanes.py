"""Which cases of the tests a lane runs.

- `fast` (`make test-fast`, the working loop): each test once, on its hardest case, but for tests marked `slow` or
  `long`.
- `gate` (`make test`, before a merge): all but tests marked `long`. A law that is tried on many layer patterns runs
  with every value of every parameter, and in all combinations on the pattern that has all options on.
- `all` (`make test-all`, CI): everything.

Which cases stand for the rest differs from law to law, so that between them the laws meet nearly every pair of values.
"""

import random
import zlib
from collections import defaultdict

LANES = ("fast", "gate", "all")
HARDEST = "everything"  # of `PATTERNS`
HARD = (HARDEST, "static", "expert_per_row", "bfloat16")


def chosen(items, lane):
    """The items of a lane, slow ones first, so that no worker is left alone with one at the end."""
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = {id(item) for name, cases in tests.items() for item in cases_of(name, cases, lane)}
    return sorted((item for item in items if id(item) in kept), key=lambda item: not is_marked(item, "slow", "long"))


def cases_of(name, cases, lane):
    """The cases of one test that a lane runs."""
    if lane == "all":
        return cases
    left_out = ("slow", "long") if lane == "fast" else ("long",)
    cases = [case for case in cases if not is_marked(case, *left_out)]
    if lane == "fast":
        return [max(cases, key=hardness)] if cases else []
    return thinned(name, cases) if any("pattern" in case.fixturenames for case in cases) else cases


def thinned(name, cases):
    """Cases with each value of each parameter, and all that run on the hardest pattern."""
    random.Random(zlib.crc32(name.encode())).shuffle(cases := list(cases))
    kept, seen = [], set()
    for case in sorted(cases, key=lambda case: HARDEST not in ids_of(case)):
        values = set(enumerate(ids_of(case))) or {name}
        if HARDEST in ids_of(case) or values - seen:
            kept.append(case)
            seen |= values
    return kept


def hardness(case):
    return sum(name in ids_of(case) for name in HARD)


def ids_of(case):
    """One id for each `parametrize` of the test."""
    return case.callspec._idlist if hasattr(case, "callspec") else []


def is_marked(item, *names):
    return any(item.get_closest_marker(name) for name in names)
