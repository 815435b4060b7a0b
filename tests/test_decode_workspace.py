"""The workspace of a decode program: buffers that are needed together never share memory."""

import random

import pytest

from mambaformer.decode_workspace_mambaformer import ALIGNMENT, Intermediate, Workspace


def test_buffers_that_are_never_needed_together_share_memory():
    residual, one, two, three = Intermediate(16), Intermediate(32), Intermediate(32), Intermediate(32)
    workspace = Workspace(residual, [[residual, one], [one, two], [two, three], [three, residual]])
    assert workspace.offset(residual) == 0
    assert workspace.offset(one) == workspace.offset(three) == 16
    assert workspace.offset(two) == workspace.size - 32 == 48


@pytest.mark.parametrize("seed", range(30))
def test_buffers_are_inside_and_overlap_no_other_that_is_needed(seed):
    rng = random.Random(seed)
    residual, buffers = Intermediate(rng.randint(1, 70)), [Intermediate(rng.randint(0, 90)) for _ in range(12)]
    uses = [rng.sample(buffers, rng.randint(1, 4)) for _ in range(rng.randint(1, 20))]
    workspace = Workspace(residual, uses)

    def lives(buffer):
        at = [index for index, used in enumerate(uses) if buffer in used]
        return range(at[0], at[-1] + 1) if at else range(0)

    def memory(buffer):
        return range(workspace.offset(buffer), workspace.offset(buffer) + buffer.width)

    used = [buffer for buffer in buffers if lives(buffer)]
    for buffer in used:
        assert workspace.offset(buffer) % ALIGNMENT == 0 and memory(buffer).stop <= workspace.size
        for other in {residual, *used} - {buffer}:
            is_needed = other is residual or bool(set(lives(buffer)) & set(lives(other)))
            assert not (is_needed and set(memory(buffer)) & set(memory(other)))


@pytest.mark.parametrize(
    ("offset", "message"), [(16, "overlap"), (10**6, "outside"), (-16, "outside")], ids=["overlap", "beyond", "before"]
)
def test_a_wrong_place_is_refused(offset, message, monkeypatch):
    residual, one = Intermediate(32), Intermediate(32)
    place = Workspace._place

    def wrong(self, buffer, live):
        place(self, buffer, live)
        if buffer is one:
            self._offsets[one] = offset

    monkeypatch.setattr(Workspace, "_place", wrong)
    with pytest.raises(RuntimeError, match=message):
        Workspace(residual, [[residual, one]])
