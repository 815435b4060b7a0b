"""`generate`: experts by schedule and by hook, in every mode that generation has for the core."""

import pytest
import torch
from transformers import LogitsProcessorList

from mambaformer import ExpertSwitchLogitsProcessor
from patterns import GREEDY, VOCAB, tiny_config
from sequences import random_rows
from tiny_models import random_expert, random_model, shared_expert, shared_model

PATTERNS = ["mamba", "full", "sliding_sinks", "hybrid_sliding", "paper", "everything"]


def left_padded(rows, pad=3):
    """Rows of ids, padded on the left with an ordinary token, and their mask."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def step_by_step(model, row, num_tokens, expert_at):
    """The slowest way: no cache, one row, a full forward for every token under the expert of that token."""
    ids = list(row)
    for n in range(num_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), expert_vector=expert_at(n), use_cache=False).logits
        ids.append(logits[0, -1].argmax().item())
    return ids[len(row) :]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_schedule_equals_fresh_generations_in_a_padded_batch(pattern, options):
    model = shared_model(pattern)
    first, second = shared_expert(pattern, 1), shared_expert(pattern, 2)
    rows = random_rows(5)
    ids, mask = left_padded(rows)
    schedule = {0: first, 4: second, 9: None}
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, expert_schedule=schedule, **GREEDY, **options)
    for row, answer in zip(rows, found, strict=True):
        expected = step_by_step(model, row, 12, lambda n: first if n < 4 else second if n < 9 else None)
        assert answer[ids.shape[1] :].tolist() == expected
        text = torch.tensor([row])
        for n, expert in ((4, first), (5, second), (3, None)):
            text = model.generate(text, max_new_tokens=n, expert_vector=expert, **GREEDY)
        assert text[0, len(row) :].tolist() == expected


@pytest.mark.parametrize("policy", ["recompute", "reset"])
@pytest.mark.parametrize("storage", ["dense", "static"])
def test_the_logits_processor_switches_like_the_schedule(policy, storage):
    model, first, second = shared_model("everything"), shared_expert("everything", 1), shared_expert("everything", 2)
    ids, mask = left_padded(random_rows(7))
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, expert_schedule={0: first, 3: second, 6: None}, **GREEDY
    )
    size = {"max_cache_len": 40} if storage == "static" else {}
    cache = model.make_cache(storage, on_expert_change=policy, **size)
    cache.set_expert_vector(first)
    hook = ExpertSwitchLogitsProcessor(cache, schedule={3: second, 6: None})
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([hook]),
        **GREEDY,
    )
    assert found.tolist() == expected.tolist()
    assert cache.expert_vector is None


def test_a_callable_chooses_the_expert_from_the_text_so_far():
    model, expert = shared_model("paper"), shared_expert("paper", 1)
    ids = torch.tensor(random_rows(3)[:1])
    cache = model.make_cache()

    def choose(input_ids, scores):
        return expert if input_ids.shape[1] % 2 else None

    hook = ExpertSwitchLogitsProcessor(cache, choose=choose)
    found = model.generate(ids, max_new_tokens=6, past_key_values=cache, logits_processor=[hook], **GREEDY)
    lengths = range(ids.shape[1], ids.shape[1] + 6)
    experts = [None] + [expert if length % 2 else None for length in lengths]
    assert found[0, ids.shape[1] :].tolist() == step_by_step(model, ids[0].tolist(), 6, lambda n: experts[n])


def test_continue_keeps_the_text_so_far_as_the_old_expert_encoded_it():
    model, first, second = shared_model("everything"), shared_expert("everything", 1), shared_expert("everything", 2)
    ids = torch.tensor(random_rows(2)[:1])
    cache = model.make_cache(on_expert_change="continue")
    found = model.generate(
        ids, max_new_tokens=8, past_key_values=cache, expert_schedule={0: first, 4: second}, **GREEDY
    )
    by_hand = model.make_cache(on_expert_change="continue")
    fed, answer = ids, []
    for n in range(8):
        with torch.no_grad():
            expert = first if n < 4 else second
            logits = model(fed, past_key_values=by_hand, expert_vector=expert).logits
        fed = logits[:, -1:].argmax(-1)
        answer.append(fed.item())
    assert found[0, ids.shape[1] :].tolist() == answer


def test_experts_per_row_survive_beam_search_and_several_answers():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    rows = random_rows(4, lengths=(8, 8))
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    together = model.generate(torch.tensor(rows), expert_vector=[None, expert], **options)
    for index, row_expert in enumerate((None, expert)):
        alone = model.generate(torch.tensor(rows[index : index + 1]), expert_vector=row_expert, **options)
        assert together[2 * index : 2 * index + 2].tolist() == alone.tolist()


def test_several_answers_and_samples_follow_the_seed_whatever_the_cache():
    model = shared_model("paper")
    ids, mask = left_padded(random_rows(6))

    def sample(**options):
        torch.manual_seed(0)
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=True,
            num_return_sequences=3,
            pad_token_id=VOCAB,
            **options,
        ).tolist()

    assert sample() == sample(use_cache=False) == sample(cache_implementation="static")


@pytest.mark.parametrize("storage", ["dense", "static"])
def test_a_chat_of_padded_turns_on_one_cache_equals_each_row_alone(storage):
    model = shared_model("everything")
    cache = model.make_cache(storage, **({"max_cache_len": 80} if storage == "static" else {}))
    texts, masks, alone = torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.long), [[], [], []]
    for turn in range(3):
        rows = random_rows(20 + turn, lengths=(4, 2, 6))
        ids, mask = left_padded(rows)
        texts, masks = torch.cat([texts, ids], dim=1), torch.cat([masks, mask], dim=1)
        answer = model.generate(texts, attention_mask=masks, past_key_values=cache, max_new_tokens=4, **GREEDY)
        masks = torch.cat([masks, torch.ones_like(answer[:, texts.shape[1] :])], dim=1)
        for row, new, said in zip(rows, answer[:, texts.shape[1] :].tolist(), alone, strict=True):
            said += row
            assert new == step_by_step(model, said, 4, lambda n: None)
            said += new
        texts = answer


def test_a_returned_cache_goes_on_where_generation_stopped():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    ids = torch.tensor(random_rows(9)[:1])
    first = model.generate(ids, max_new_tokens=4, expert_vector=expert, return_dict_in_generate=True, **GREEDY)
    went_on = model.generate(first.sequences, max_new_tokens=4, past_key_values=first.past_key_values, **GREEDY)
    at_once = model.generate(ids, max_new_tokens=8, expert_vector=expert, **GREEDY)
    assert went_on.tolist() == at_once.tolist()
    assert first.past_key_values.expert_vector == expert


def test_prompts_padded_on_either_side_get_the_same_answer():
    model = shared_model("everything")
    rows = random_rows(11)
    ids, mask = left_padded(rows)
    right_ids = torch.tensor([row + [3] * (ids.shape[1] - len(row)) for row in rows])
    left = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    right = model.generate(right_ids, attention_mask=mask.flip(1), max_new_tokens=6, **GREEDY)
    assert left[:, ids.shape[1] :].tolist() == right[:, ids.shape[1] :].tolist()


def test_embeddings_and_chunks_of_a_prompt_generate_what_its_tokens_do():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    ids = torch.tensor(random_rows(12)[:1])
    expected = model.generate(ids, max_new_tokens=6, expert_vector=expert, **GREEDY)[:, ids.shape[1] :]
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=6, expert_vector=expert, **GREEDY)
    chunked = model.generate(ids, max_new_tokens=6, expert_vector=expert, prefill_chunk_size=5, **GREEDY)
    assert found.tolist() == expected.tolist() == chunked[:, ids.shape[1] :].tolist()


def test_a_prompt_of_embeddings_refuses_a_recompute_and_keeps_its_cache():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    ids = torch.tensor(random_rows(12)[:1])
    cache = model.make_cache()
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(ids[:, :1], past_key_values=cache, expert_vector=expert)
    assert cache.expert_vector is None and cache.get_seq_length() == ids.shape[1]
    with torch.no_grad():
        went_on = model(ids[:, :1], past_key_values=cache).logits
        expected = model(torch.cat([ids, ids[:, :1]], dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(went_on, expected, atol=1e-10, rtol=0)


def test_generation_refuses_what_it_cannot_do_before_anything_runs():
    model, expert = random_model(tiny_config("paper")), shared_expert("paper", 1)
    ids = torch.tensor(random_rows(1)[:1])
    other = random_expert(random_model(tiny_config("mamba", hidden_size=64)), 1)
    bad = {
        "both for new token 0": {"expert_vector": expert, "expert_schedule": {0: expert}},
        "from 0": {"expert_schedule": {-1: expert}},
        "integers": {"expert_schedule": {"2": expert}},
        "dict": {"expert_schedule": [expert]},
        "no expert vector named": {"expert_vector": "nobody"},
        "singular values": {"expert_schedule": {3: other}},
        "not both": {"past_key_values": model.make_cache(), "cache_implementation": "static"},
        "not supported": {"cache_implementation": "offloaded_static"},
    }
    for message, options in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            model.generate(ids, max_new_tokens=3, **GREEDY, **options)
    cache = model.make_cache()
    with pytest.raises(ValueError, match="exactly one"):
        ExpertSwitchLogitsProcessor(cache)
    with pytest.raises(ValueError, match="New token 0"):
        ExpertSwitchLogitsProcessor(cache, schedule={0: expert})
