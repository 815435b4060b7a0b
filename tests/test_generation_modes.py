"""Every mode of `generate` over every layer pattern and storage, against full forwards without a cache.

The oracles here know rows, beams and seeds but neither caches nor pads: each runs one row as a plain text.
"""

import functools
import itertools
import sys
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from oracle import assert_same_logits, expected
from patterns import NO_TOKEN, PATTERNS, VOCAB
from sequences import feed, one_turn, random_rows, rows_of
from tiny_models import MODELS, shared_expert, shared_model

NO_PAD = {"pad_token_id": NO_TOKEN}
GREEDY = {"do_sample": False, **NO_PAD}
NUM_NEW = 6
STORAGES = {
    "dense": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
SCHEDULE = ((0, 1), (2, 2), (4, None))

over_patterns = pytest.mark.parametrize("pattern", PATTERNS)
over_models = pytest.mark.parametrize("pattern", MODELS)
over_storages = pytest.mark.parametrize("storage", STORAGES)


def left_padded(rows, pad=3):
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def with_experts(pattern, schedule=SCHEDULE):
    return {n: None if seed is None else shared_expert(pattern, seed) for n, seed in schedule}


def seed_at(schedule, n):
    return [seed for start, seed in schedule if start <= n][-1]


@functools.cache
def next_logits(pattern, ids, seed=None):
    """Logits (vocabulary,) after a row of ids, from one forward without a cache."""
    expert = None if seed is None else shared_expert(pattern, seed)
    with torch.no_grad():
        model = shared_model(pattern)
        return model(torch.tensor([ids]), expert_vector=expert, use_cache=False, logits_to_keep=1).logits[0, -1]


def greedy(pattern, row, num_new=NUM_NEW, schedule=((0, None),), process=lambda ids, logits: logits):
    """New tokens, each from a forward of all the text before it."""
    ids = tuple(row)
    for n in range(num_new):
        logits = process(ids, next_logits(pattern, ids, seed_at(schedule, n)))
        ids = (*ids, logits.argmax().item())
    return list(ids[len(row) :])


def beams(pattern, row, num_beams, num_new=NUM_NEW, schedule=((0, None),)):
    """Beam search written out: the `num_beams` best texts and their summed log-probabilities, best first."""
    kept = [(0.0, tuple(row))]
    for n in range(num_new):
        grown = []
        for score, ids in kept:
            scores = next_logits(pattern, ids, seed_at(schedule, n)).float().log_softmax(-1) + score
            grown += [(value, (*ids, token)) for token, value in enumerate(scores.tolist())]
        kept = sorted(grown, reverse=True)[:num_beams]
    return [list(ids[len(row) :]) for _, ids in kept]


# ------------------------------------------------------------------------------------------------- greedy and padding


@over_storages
@over_models
def test_rows_padded_on_either_side_are_what_they_are_by_themselves(pattern, storage):
    rows = rows_of(pattern, 1, (8, 4, 6))
    ids, mask = left_padded(rows)
    right = torch.tensor([row + [3] * (ids.shape[1] - len(row)) for row in rows])
    options = {"max_new_tokens": NUM_NEW, "expert_schedule": with_experts(pattern), **STORAGES[storage], **GREEDY}
    wanted = [greedy(pattern, row, schedule=SCHEDULE) for row in rows]
    for given, where in ((ids, mask), (right, mask.flip(1))):
        found = shared_model(pattern).generate(given, attention_mask=where, **options)
        assert found[:, ids.shape[1] :].tolist() == wanted


@over_storages
@over_models
def test_embeddings_chunks_and_configurations_say_what_tokens_say(pattern, storage):
    model, rows = shared_model(pattern), rows_of(pattern, 2, (7, 7))
    ids = torch.tensor(rows)
    embeds, schedule = model.get_input_embeddings()(ids), with_experts(pattern)
    options = {"max_new_tokens": NUM_NEW, **STORAGES[storage], **GREEDY}
    calls = {
        "configuration": {
            "inputs": ids,
            "generation_config": GenerationConfig(**options),
            "expert_schedule": schedule,
        },
        "ids": {"inputs": ids, "expert_schedule": schedule, **options},
    }
    if storage != "no cache":
        calls |= {
            "chunks": {"inputs": ids, "prefill_chunk_size": 3, "expert_schedule": schedule, **options},
            # Embeddings are not remembered, so their expert stays.
            "embeddings": {"inputs_embeds": embeds, "expert_vector": schedule[0], **options},
            "both": {"inputs": ids, "inputs_embeds": embeds, "expert_vector": schedule[0], **options},
        }
    changed = [greedy(pattern, row, schedule=SCHEDULE) for row in rows]
    kept = [greedy(pattern, row, schedule=((0, 1),)) for row in rows]
    for name, arguments in calls.items():
        found = model.generate(**arguments)[:, -NUM_NEW:].tolist()
        assert found == (kept if "inputs_embeds" in arguments else changed), name


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded"])
@pytest.mark.parametrize("size", [None, 40])
def test_named_caches_generate_the_same(implementation, size):
    model, rows = shared_model("everything"), random_rows(3, (8, 5))
    ids, mask = left_padded(rows)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_NEW,
        cache_implementation=implementation,
        max_cache_len=size,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert found.sequences[:, ids.shape[1] :].tolist() == [greedy("everything", row) for row in rows]
    room = ids.shape[1] + NUM_NEW - 1 if size is None else size
    assert found.past_key_values.max_columns == (room if implementation == "static" else None)


@pytest.mark.parametrize("implementation", ["offloaded_static", "sliding_window", "nonsense"])
def test_a_cache_that_there_is_not_is_refused(implementation):
    ids = torch.tensor(random_rows(3, (5,)))
    with pytest.raises(ValueError, match=r"(?i)cache_implementation|not supported"):
        shared_model("paper").generate(ids, max_new_tokens=2, cache_implementation=implementation, **GREEDY)


# ----------------------------------------------------------------------------------------------------- sampling, beams


@over_patterns
def test_samples_follow_the_seed_whatever_the_cache(pattern):
    ids, mask = left_padded(rows_of(pattern, 4, (8, 5)))
    model, found = shared_model(pattern), []  # built here: its weights are random numbers, too
    for options in STORAGES.values():
        torch.manual_seed(5)
        sampled = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NUM_NEW,
            do_sample=True,
            temperature=1.5,
            top_p=0.95,
            num_return_sequences=2,
            expert_schedule=with_experts(pattern),
            **options,
            **NO_PAD,
        )
        found.append(sampled.tolist())
    assert found[0] == found[1] == found[2]
    assert len({tuple(row) for row in found[0]}) == 4


@over_patterns
def test_a_sample_is_drawn_from_what_a_full_forward_says(pattern):
    row = rows_of(pattern, 5, (8,))[0]
    torch.manual_seed(6)
    found = shared_model(pattern).generate(
        torch.tensor([row]), max_new_tokens=NUM_NEW, do_sample=True, top_k=0, **NO_PAD
    )
    torch.manual_seed(6)
    ids = tuple(row)
    for _ in range(NUM_NEW):
        ids = (*ids, torch.multinomial(next_logits(pattern, ids).float().softmax(-1)[None], 1).item())
    assert found[0].tolist() == list(ids)


@over_storages
@over_models
def test_beams_are_the_best_texts_under_their_experts(pattern, storage):
    rows = rows_of(pattern, 6, (8, 5))
    ids, mask = left_padded(rows)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4, **STORAGES[storage], **GREEDY}
    found = shared_model(pattern).generate(
        ids, attention_mask=mask, expert_schedule=with_experts(pattern, SCHEDULE[:2]), **options
    )
    wanted = [beam for row in rows for beam in beams(pattern, row, 3, 4, SCHEDULE[:2])]
    assert found[:, ids.shape[1] :].tolist() == wanted


@over_patterns
def test_sampled_beams_follow_the_seed_whatever_the_cache(pattern):
    ids, mask = left_padded(rows_of(pattern, 7, (8, 5)))
    found = []
    for options in STORAGES.values():
        torch.manual_seed(5)
        sampled = shared_model(pattern).generate(
            ids, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=True, **options, **NO_PAD
        )
        found.append(sampled.tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("storage", ["dense", "static"])
@over_patterns
def test_the_cache_that_beams_hand_back_is_of_the_texts_that_it_says(pattern, storage):
    """The library hands back its running beams, and once all have ended those need not be the winners.

    Fed on, each row is the text in its log; who goes on with answers that are other texts is refused.
    """
    model, rows = shared_model(pattern), rows_of(pattern, 8, (8, 8))
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "return_dict_in_generate": True}
    found = model.generate(torch.tensor(rows), max_cache_len=40, **options, **STORAGES[storage], **GREEDY)
    cache, answers = found.past_key_values, found.sequences.tolist()
    texts = cache.token_ids.tolist()
    goes_on = {"inputs": found.sequences, "past_key_values": cache.fork(), "max_new_tokens": 3, **GREEDY}
    if texts == [answer[:-1] for answer in answers]:
        wanted = [answer + greedy(pattern, answer, 3) for answer in answers]
        assert model.generate(**goes_on).tolist() == wanted
    else:
        with pytest.raises(ValueError, match="pass the complete sequence"):
            model.generate(**goes_on)
    logits = feed(model, cache, [one_turn([[5, 9]] * len(texts))])
    assert_same_logits(logits, [one[-2:] for one in expected(model, [[*text, 5, 9] for text in texts])])


# --------------------------------------------------------------------------------------------------- what is returned


@over_storages
@over_patterns
def test_scores_logits_and_states_are_those_of_full_forwards(pattern, storage):
    model, row = shared_model(pattern), rows_of(pattern, 9, (8,))[0]
    found = model.generate(
        torch.tensor([row]),
        max_new_tokens=NUM_NEW,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
        repetition_penalty=1.4,
        **STORAGES[storage],
        **GREEDY,
    )
    text = found.sequences[0].tolist()
    wanted = [next_logits(pattern, tuple(text[: len(row) + n])) for n in range(NUM_NEW)]
    torch.testing.assert_close(torch.cat(found.logits), torch.stack(wanted).float(), atol=1e-5, rtol=1e-5)
    penalised = [penalty(1.4)(text[: len(row) + n], logits) for n, logits in enumerate(wanted)]
    torch.testing.assert_close(torch.cat(found.scores), torch.stack(penalised).float(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        states = model(torch.tensor([text[:-1]]), use_cache=False, output_hidden_states=True).hidden_states
    for layer, whole in enumerate(states):
        torch.testing.assert_close(found.hidden_states[0][layer], whole[:, : len(row)], atol=1e-9, rtol=0)
        for n in range(1, NUM_NEW):
            last = found.hidden_states[n][layer][:, -1]
            torch.testing.assert_close(last, whole[:, len(row) + n - 1], atol=1e-9, rtol=0)


def test_attention_weights_are_those_of_a_full_forward():
    model, row = shared_model("llama"), random_rows(10, (6,))[0]
    model.set_attn_implementation("eager")
    try:
        found = model.generate(
            torch.tensor([row]),
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_attentions=True,
            **GREEDY,
        )
        with torch.no_grad():
            whole = model(found.sequences[:, :-1], use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for layer, weights in enumerate(whole):
        torch.testing.assert_close(found.attentions[0][layer], weights[:, :, :6, :6], atol=1e-10, rtol=0)
        for n in range(1, 4):
            at = 6 + n - 1
            step = found.attentions[n][layer][:, :, 0]
            torch.testing.assert_close(step, weights[:, :, at, : at + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("storage", ["dense", "static"])
@over_models
def test_a_cache_handed_back_goes_on_in_the_next_mode(pattern, storage):
    """Greedy, then several answers to each text: the cache is repeated for them, and each goes on by itself."""
    model, rows = shared_model(pattern), rows_of(pattern, 11, (8, 8))
    options = {"return_dict_in_generate": True, "max_cache_len": 40, **STORAGES[storage], **GREEDY}
    first = model.generate(torch.tensor(rows), max_new_tokens=4, expert_vector=shared_expert(pattern, 1), **options)
    cache = first.past_key_values
    cache.batch_repeat_interleave(2)
    texts = first.sequences.repeat_interleave(2, dim=0)
    texts = torch.cat([texts, torch.tensor([[1], [2], [3], [4]])], dim=1)
    second = model.generate(texts, max_new_tokens=4, past_key_values=cache, **GREEDY)
    wanted = [greedy(pattern, text, 4, ((0, 1),)) for text in texts.tolist()]
    assert second[:, texts.shape[1] :].tolist() == wanted


# ------------------------------------------------------------------------------------- processors, criteria, streamers


def penalty(value):
    """Repetition penalty (arXiv 1909.05858, equation 13), as Transformers has it: of all tokens of the text."""

    def process(ids, logits):
        seen = torch.tensor(sorted(set(ids)))
        logits, values = logits.clone(), logits[seen]
        logits[seen] = torch.where(values < 0, values * value, values / value)
        return logits

    return process


def forbidding(forbidden):
    """Takes out the tokens that `forbidden(ids)` names."""

    def process(ids, logits):
        logits = logits.clone()
        logits[list(forbidden(ids))] = -torch.inf
        return logits

    return process


def ends_of_repeated_bigrams(ids):
    return {second for first, second in itertools.pairwise(ids) if first == ids[-1]}


PROCESSORS = {
    "repetition penalty": ({"repetition_penalty": 1.7}, penalty(1.7)),
    "no repeated bigrams": ({"no_repeat_ngram_size": 2}, forbidding(ends_of_repeated_bigrams)),
    "bad words": ({"bad_words_ids": [[n] for n in range(30)]}, forbidding(lambda ids: range(30))),
    "suppressed": ({"suppress_tokens": list(range(20, 50))}, forbidding(lambda ids: range(20, 50))),
    "allowed": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) // 2, 60]},
        forbidding(lambda ids: set(range(VOCAB)) - {ids[-1] // 2, 60}),
    ),
}


@over_storages
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything"])
def test_logits_processors_act_on_the_logits_of_full_forwards(pattern, name, storage):
    row = rows_of(pattern, 12, (8,))[0]
    options, process = PROCESSORS[name]
    found = shared_model(pattern).generate(
        torch.tensor([row]),
        max_new_tokens=NUM_NEW,
        expert_schedule=with_experts(pattern),
        **options,
        **STORAGES[storage],
        **GREEDY,
    )
    assert found[0, len(row) :].tolist() == greedy(pattern, row, schedule=SCHEDULE, process=process)


@over_storages
@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything"])
def test_ends_of_text_come_when_they_may_and_rows_end_each_for_itself(pattern, storage):
    rows = rows_of(pattern, 13, (8, 5))
    ids, mask = left_padded(rows)
    answers = [greedy(pattern, row, 10) for row in rows]
    end = answers[0][3]
    # Rows that have ended are fed pads until all have.
    options = {"max_new_tokens": 10, "eos_token_id": end, **STORAGES[storage], **GREEDY, "pad_token_id": 3}
    found = shared_model(pattern).generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    for row, answer in zip(found, answers, strict=True):
        length = answer.index(end) + 1 if end in answer else 10
        assert row[:length] == answer[:length] and set(row[length:]) <= {3}
    late = shared_model(pattern).generate(ids, attention_mask=mask, min_new_tokens=6, **options)
    without = [greedy(pattern, row, 6, process=forbidding(lambda ids: [end])) for row in rows]
    assert late[:, ids.shape[1] : ids.shape[1] + 6].tolist() == without
    forced = shared_model(pattern).generate(
        ids, attention_mask=mask, max_new_tokens=5, forced_eos_token_id=7, **STORAGES[storage], **GREEDY
    )
    assert forced[:, ids.shape[1] :].tolist() == [[*answer[:4], 7] for answer in answers]


class AfterTokens(StoppingCriteria):
    """Stops once a text ends in a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@functools.cache
def tokenizer():
    """One character a token."""
    built = Tokenizer(models.WordLevel({chr(ord("0") + i): i for i in range(VOCAB)}, unk_token="0"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False)


@over_storages
def test_criteria_stop_where_they_say(storage):
    model, row = shared_model("everything"), random_rows(14, (8,))[0]
    answer = greedy("everything", row, 10)
    length = answer.index(answer[3]) + 1
    letters = tokenizer().decode(answer[2:4])
    stops = {
        "criterion": ({"stopping_criteria": [AfterTokens(answer[3])]}, length),
        "time": ({"stopping_criteria": [MaxTimeCriteria(0.0, initial_timestamp=0.0)]}, 1),
        "max_time": ({"max_time": 0.0}, 1),
        "string": ({"stop_strings": [letters], "tokenizer": tokenizer()}, None),
    }
    for name, (options, wanted) in stops.items():
        found = model.generate(torch.tensor([row]), max_new_tokens=10, **options, **STORAGES[storage], **GREEDY)
        found = found[0, len(row) :].tolist()
        assert found == answer[: len(found)], name
        assert len(found) == wanted if wanted else letters in tokenizer().decode(found)


@over_storages
def test_streamers_get_the_text_as_it_comes(storage, capsys):
    model, row = shared_model("everything"), random_rows(15, (8,))[0]
    text = tokenizer().decode(greedy("everything", row))
    options = {"max_new_tokens": NUM_NEW, "expert_vector": None, **STORAGES[storage], **GREEDY}
    model.generate(torch.tensor([row]), streamer=TextStreamer(tokenizer(), skip_prompt=True), **options)
    assert capsys.readouterr().out.strip() == text
    stream = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, args=(torch.tensor([row]),), kwargs={"streamer": stream, **options}
    )
    thread.start()
    assert "".join(stream) == text
    thread.join()


# ------------------------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize("given", ["whole text", "new part"])
@pytest.mark.parametrize("storage", ["dense", "static"])
@over_models
def test_a_chat_in_a_batch_of_uneven_padded_turns_is_each_chat_by_itself(pattern, storage, given):
    model = shared_model(pattern)
    cache = model.make_cache(storage, **({"max_cache_len": 80} if storage == "static" else {}))
    ids, mask = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    said = [[], []]
    for turn, lengths in enumerate([(5, 3), (2, 6), (4, 1)]):
        rows = rows_of(pattern, 30 + turn, lengths)
        new_ids, new_mask = left_padded(rows)
        ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, new_mask], 1)
        fed = ids if given == "whole text" else ids[:, cache.get_seq_length() :]
        found = model.generate(fed, attention_mask=mask, past_key_values=cache, max_new_tokens=3, **GREEDY)
        answers = found[:, -3:]
        for row, new, earlier in zip(rows, answers.tolist(), said, strict=True):
            earlier += row
            assert new == greedy(pattern, earlier, 3)
            earlier += new
        ids, mask = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)


@pytest.mark.parametrize("storage", ["dense", "static"])
def test_a_part_of_a_chat_that_would_be_taken_for_all_of_it_is_refused(storage):
    """Its first columns were taken for the cached ones, and never fed."""
    model, (row, other) = shared_model("everything"), random_rows(50, (6, 9))
    cache = model.make_cache(storage, **({"max_cache_len": 80} if storage == "static" else {}))
    feed(model, cache, [one_turn([row])])
    forwards = []
    hook = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for wrong in (other, other[:2], row, row[:3]):
        for mask in (None, torch.ones(1, len(wrong), dtype=torch.long)):
            with pytest.raises(ValueError, match="pass the complete sequence"):
                model.generate(torch.tensor([wrong]), attention_mask=mask, past_key_values=cache, **GREEDY)
    hook.remove()
    assert not forwards and cache.get_seq_length() == 6
    found = model.generate(torch.tensor([row + other]), past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert found[0, 15:].tolist() == greedy("everything", row + other, 4)


# ------------------------------------------------------------------------------------------------------------ threads


def requests(pattern):
    """Eight calls of `generate` that differ in expert, cache, storage and mode; none draws random numbers."""
    model = shared_model(pattern)
    ids, mask = left_padded(rows_of(pattern, 40, (9, 6)))
    one, first = ids[:1], shared_expert(pattern, 1)
    batch = {"inputs": ids, "attention_mask": mask}
    static = {"cache_implementation": "static"}
    own = {"past_key_values": lambda: model.make_cache("static", max_cache_len=30)}
    return [
        {**batch},
        {**batch, "expert_vector": [None, first]},
        {**batch, "expert_schedule": with_experts(pattern), **static},
        {**batch, "num_beams": 3, "expert_vector": shared_expert(pattern, 2)},
        {"inputs": one, "prompt_lookup_num_tokens": 3, "expert_schedule": with_experts(pattern)},
        {"inputs": one, "assistant_early_exit": 1},
        {**batch, "expert_vector": [first, None], **own},
        {**batch, "use_cache": False, "expert_schedule": with_experts(pattern)},
    ]


def answer(pattern, request):
    made = {key: value() if key == "past_key_values" else value for key, value in request.items()}
    return shared_model(pattern).generate(max_new_tokens=8, **made, **GREEDY).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["paper", "everything"])
def test_eight_threads_on_one_model_answer_as_if_alone(pattern):
    alone = [answer(pattern, request) for request in requests(pattern)]
    found, start = {}, threading.Barrier(8)

    def run(index, request):
        start.wait()
        found[index] = [answer(pattern, request) for _ in range(2)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(requests(pattern))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for index, wanted in enumerate(alone):
        assert found[index] == [wanted, wanted], index
