"""A default device that the user has set must not decide where the model's own bookkeeping lives."""

import pytest
import torch

from patterns import CACHE_VARIANTS, PATTERNS
from tiny_models import shared_expert, shared_model

IDS = torch.tensor([[3, 7, 1, 12, 5, 9, 2], [8, 2, 6, 4, 4, 1, 10]])
MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])


def results(pattern, variant):
    """Logits of padded turns, decoding, rollbacks, selected rows, another expert vector and packed sequences."""
    model = shared_model(pattern)
    cache, expert = model.make_cache(**CACHE_VARIANTS[variant]), shared_expert(pattern, 1)
    found = [model(IDS, attention_mask=MASK, cache=cache).logits, model(IDS[:, :1], cache=cache).logits]
    cache.crop(-2)
    cache.activate_past_recording(4)
    found.append(model(IDS[:, :3], cache=cache).logits)
    cache.crop([-1, -2])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([False, True, True, False], device="cpu"))
    cache.reorder_cache([1, 0])
    cache.set_expert_vector(expert)
    found += [model(IDS[:, :2], cache=cache).logits, model(IDS, position_ids=POSITIONS, use_cache=False).logits]
    found.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False, pad_token_id=0))
    return found


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_default_device_changes_nothing(pattern, variant):
    """On a GPU as the default device, packed rows mixed indices of two devices: helper tensors named no device."""
    with torch.no_grad():
        expected = results(pattern, variant)
        with torch.device("meta"):
            found = results(pattern, variant)
    assert all(map(torch.equal, found, expected))
