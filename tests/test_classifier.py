"""A classifier reads each row at its last real token, whoever tells it where the pads are."""

import inspect
import random

import pytest
import torch

from mambaformer import MambaFormerForSequenceClassification
from oracle import assert_same_logits
from patterns import tiny_config
from sequences import padded_turn, random_rows
from tiny_models import random_model

ROWS = random_rows(4, (7, 3, 1, 5))
PAD = 60


def classifier(pattern="everything", **options):
    """A float64 classifier of three classes with the loud weights of `random_model`."""
    torch.manual_seed(0)
    model = MambaFormerForSequenceClassification(tiny_config(pattern, num_labels=3, **options)).double().eval()
    model.model.load_state_dict(random_model(tiny_config(pattern)).model.state_dict())
    torch.nn.init.normal_(model.score.weight)
    return model


def logits_alone(model):
    return torch.cat([model(torch.tensor([row])).logits for row in ROWS])


@pytest.mark.parametrize("side", ["left", "right", "any"])
@pytest.mark.parametrize("pad_token_id", [None, PAD])
@pytest.mark.parametrize("pattern", ["mamba", "full", "everything"])
@torch.no_grad()
def test_padded_rows_are_classified_as_alone(pattern, pad_token_id, side):
    model = classifier(pattern, pad_token_id=pad_token_id)
    turn, wanted = padded_turn(random.Random(1), ROWS, extra=2, side=side), logits_alone(model)
    embeds = model.get_input_embeddings()(turn.ids)
    for mask in (turn.mask, turn.mask.long()):
        assert_same_logits(model(turn.ids, attention_mask=mask).logits, wanted)
        assert_same_logits(model(inputs_embeds=embeds, attention_mask=mask).logits, wanted)
    if pad_token_id is not None:
        assert_same_logits(model(turn.ids.masked_fill(~turn.mask, PAD)).logits, wanted)


@torch.no_grad()
def test_rows_without_a_mask_and_without_a_pad_id_are_refused():
    """The last column was read, and so the answers of shorter rows came from their pads: off by 5.4."""
    model = classifier(pad_token_id=None)
    ids = padded_turn(random.Random(1), ROWS, side="right").ids
    with pytest.raises(ValueError, match=r"4 rows .* `attention_mask`, or set `model.config.pad_token_id`"):
        model(ids)
    with pytest.raises(ValueError, match="attention_mask"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert model(ids[:1]).logits.shape == (1, 3)
    model.config.pad_token_id = PAD
    assert model(ids).logits.shape == (4, 3)


@torch.no_grad()
def test_a_row_of_pads_alone_has_logits_of_zero():
    """It had the logits of its pads."""
    model, mask = classifier(), torch.ones(2, 3, dtype=torch.long)
    mask[1] = 0
    found = model(torch.tensor([[4, 5, 6], [7, 8, 9]]), attention_mask=mask).logits
    assert_same_logits(found[:1], model(torch.tensor([[4, 5, 6]])).logits)
    assert (found[1] == 0).all()


def test_the_signature_of_a_classifier_names_its_arguments():
    """`inputs_embeds` went through `**kwargs`, where Transformers does not look for it."""
    classifier = (
        MambaFormerForSequenceClassification(tiny_config("paper", num_labels=3, pad_token_id=0)).double().eval()
    )
    ids, mask = torch.tensor([[0, 5, 9], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    taken = inspect.signature(classifier.forward).parameters
    assert {"position_ids", "past_key_values", "inputs_embeds", "use_cache", "expert_vector"} <= taken.keys()
    with torch.no_grad():
        embeds = classifier.get_input_embeddings()(ids)
        assert_same_logits(classifier(inputs_embeds=embeds, attention_mask=mask).logits, classifier(ids).logits)
