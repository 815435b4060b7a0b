"""Law 10: whatever is drafted, by whom, and however much of it is taken back, the tokens are those of greedy decoding.

Plain greedy decoding is a full forward for every token, without a cache.
"""

import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.streamers import BaseStreamer

from mambaformer import ExpertSwitchLogitsProcessor
from mambaformer.generation_schedule_mambaformer import BoundedDrafts, ExpertSchedule
from mambaformer.library_mambaformer import CACHE_NAME
from oracle import assert_same_logits, expected, uncached_logits
from patterns import GREEDY, PATTERNS, VOCAB, tiny_config
from sequences import feed_row, random_ids, random_rows, rows_of
from tiny_models import MODELS, new_model, random_model, shared_expert, shared_model

NUM_NEW = 12
DRAFTERS = ("lookup", "llama", "twin", "early exit")


@functools.cache
def prompt(pattern="everything", seed=1):
    """A text that repeats itself, so that there is something to look up."""
    part = rows_of(pattern, seed, [7])[0]
    return torch.tensor([part + part[:5]])


def drafting(model):
    """What makes `model` a drafter of five tokens at a time, however unsure it is."""
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.assistant_confidence_threshold = 0
    return model


@functools.cache
def llama(vocab_size):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return drafting(LlamaForCausalLM(config).eval())


@functools.cache
def twin(pattern):
    """A model that is nearly the same, so that its drafts are often right and sometimes not."""
    model, source = new_model(pattern), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
            parameter.add_(0.01 * noise * parameter.abs().mean())
    return drafting(model)


def drafter(pattern, name):
    """Arguments of `generate`."""
    return {
        "lookup": lambda: {"prompt_lookup_num_tokens": 4},
        "llama": lambda: {"assistant_model": llama(shared_model(pattern).config.vocab_size)},
        "twin": lambda: {"assistant_model": twin(pattern)},
        "early exit": lambda: {"assistant_early_exit": 1},
    }[name]()


@functools.cache
def greedy(pattern, text, num_new=NUM_NEW, schedule=((0, None),)):
    """The slowest way: a full forward for every token, under the expert (a seed) that the schedule names."""
    model, ids = shared_model(pattern), list(text)
    for n in range(num_new):
        seed = [seed for start, seed in schedule if start <= n][-1]
        expert = None if seed is None else shared_expert(pattern, seed)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), expert_vector=expert, use_cache=False, logits_to_keep=1).logits
        ids.append(logits[0, -1].argmax().item())
    return ids


SCHEDULE = ((0, 1), (3, 2), (7, None), (8, 1))


def with_experts(pattern, schedule):
    return {n: None if seed is None else shared_expert(pattern, seed) for n, seed in schedule}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("pattern", MODELS)
def test_drafts_give_the_tokens_of_greedy_decoding(pattern, name):
    found = shared_model(pattern).generate(prompt(pattern), max_new_tokens=NUM_NEW, **drafter(pattern, name), **GREEDY)
    assert found[0].tolist() == greedy(pattern, tuple(prompt(pattern)[0].tolist()))


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("pattern", MODELS)
def test_expert_vectors_that_change_inside_drafts_change_no_token(pattern, name):
    model, wanted = shared_model(pattern), greedy(pattern, tuple(prompt(pattern)[0].tolist()), NUM_NEW, SCHEDULE)
    for policy in ("recompute", "reset"):
        cache = model.make_cache(on_expert_change=policy)
        found = model.generate(
            prompt(pattern),
            max_new_tokens=NUM_NEW,
            past_key_values=cache,
            expert_schedule=with_experts(pattern, SCHEDULE),
            **drafter(pattern, name),
            **GREEDY,
        )
        assert found[0].tolist() == wanted
        assert cache.expert_vector == shared_expert(pattern, 1)


CACHES = {
    "dense": {},
    "recorded": {"rollback_reach": 3},
    "static": {"storage": "static", "max_cache_len": 64},
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("storage", CACHES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_turns_on_ones_own_cache_go_on_where_drafts_ended(pattern, storage, name):
    """A text in a cache used to be fed a second time when the next turn was speculative."""
    model, text = shared_model(pattern), prompt(pattern)
    cache = model.make_cache(**CACHES[storage])
    for seed in (5, 6):
        text = model.generate(text, max_new_tokens=7, past_key_values=cache, **drafter(pattern, name), **GREEDY)
        assert text[0].tolist() == greedy(pattern, tuple(text[0, :-7].tolist()), 7)
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, prompt(pattern, seed)], dim=1)
    fed = cache.get_seq_length()
    found = feed_row(model, cache, text[0, fed:].tolist(), [1, text.shape[1] - fed - 1])
    assert_same_logits(found, expected(model, [text[0].tolist()])[0][fed:])


class Counted:
    """Counts the tokens that stacks are fed, and those that pass through one layer."""

    def __init__(self, model, layer_idx, is_counted):
        self.fed = self.passed = 0
        self.hooks = [
            model.model.register_forward_pre_hook(
                lambda stack, args, kwargs: self.feed(kwargs["input_ids"]) if is_counted(stack) else None,
                with_kwargs=True,
            ),
            model.model.layers[layer_idx].register_forward_pre_hook(lambda _, args: self.passes(args[0])),
        ]

    def feed(self, input_ids):
        self.fed += input_ids.shape[1]

    def passes(self, hidden_states):
        self.passed += hidden_states.shape[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_is_encoded_a_second_time(pattern, name):
    model = shared_model(pattern)
    with (
        Counted(model, 0, lambda stack: True) as of_all,
        Counted(model, -1, lambda stack: stack is model.model) as of_the_model,
    ):
        model.generate(prompt(pattern), max_new_tokens=NUM_NEW, **drafter(pattern, name), **GREEDY)
    assert of_all.fed == of_all.passed
    assert of_the_model.fed == of_the_model.passed >= prompt(pattern).shape[1] + NUM_NEW - 1


def test_a_draft_longer_than_the_usual_reach_is_taken_back_at_once():
    """Drafts of 70 tokens, nearly all of them wrong, in a cache that takes back 64 unless it is told of more."""
    model, part = shared_model("mamba"), random_rows(17, [75])[0]
    ids = torch.tensor([part + part[:5]])
    with Counted(model, -1, lambda stack: stack is model.model) as counted:
        found = model.generate(ids, max_new_tokens=80, prompt_lookup_num_tokens=70, **GREEDY)
    assert counted.fed == counted.passed > ids.shape[1] + 79 + 64
    assert found[0].tolist() == greedy("mamba", tuple(ids[0].tolist()), num_new=80)


@pytest.mark.parametrize(("start", "kept"), [(1, 0), (3, 2), (6, 5), (7, 6), (8, 6)])
def test_a_draft_reaches_as_far_as_the_expert_in_force(start, kept):
    """One forward verifies it and predicts the token behind it: the last that the expert is in force for."""
    ids = prompt()
    lookup = PromptLookupCandidateGenerator(num_output_tokens=6, max_matching_ngram_size=2, max_length=100)
    drafter = BoundedDrafts(lookup, ExpertSchedule({0: None, start: None}, ids.shape[1]))
    drafted, _ = drafter.get_candidates(ids)
    assert drafted.shape[1] - ids.shape[1] == kept


def test_drafts_of_a_twin_are_mostly_right_and_sometimes_not():
    """Else the tests above would try only one of the two."""
    num_forwards, num_cropped = [], []
    for pattern in PATTERNS:
        model = shared_model(pattern)
        hook = model.model.register_forward_pre_hook(lambda *_: num_forwards.append(1))
        cache = model.make_cache()
        crop = cache.crop
        cache.crop = lambda removed, crop=crop: (num_cropped.append(removed < 0), crop(removed))
        model.generate(
            prompt(), max_new_tokens=NUM_NEW, past_key_values=cache, assistant_model=twin(pattern), **GREEDY
        )
        hook.remove()
    assert len(num_forwards) < 0.5 * len(PATTERNS) * NUM_NEW
    assert 0 < sum(num_cropped) < len(num_cropped)


class Collected(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("name", DRAFTERS)
def test_scores_states_and_streams_are_those_of_plain_decoding(name):
    model = shared_model("everything")
    options = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "output_logits": True}
    options |= {"output_scores": True, "output_hidden_states": True, "repetition_penalty": 1.3, **GREEDY}
    plain = model.generate(prompt(), **options)
    stream = Collected()
    found = model.generate(prompt(), streamer=stream, **drafter("everything", name), **options)
    assert found.sequences.tolist() == plain.sequences.tolist() == [stream.tokens] and stream.has_ended
    for kind in ("logits", "scores"):
        torch.testing.assert_close(torch.cat(found[kind]), torch.cat(plain[kind]), atol=1e-4, rtol=1e-5)
    for step in (0, -1):  # the library mixes up the tokens of the first draft
        for one, other in zip(found.hidden_states[step], plain.hidden_states[step], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything"])
def test_an_end_of_text_inside_a_draft_ends_the_text_and_the_cache_there(pattern, name):
    model, wanted = shared_model(pattern), greedy(pattern, tuple(prompt(pattern)[0].tolist()))
    start = prompt(pattern).shape[1]
    for at in (start, start + 4, start + 7):
        end = wanted.index(wanted[at], start) + 1
        cache = model.make_cache()
        found = model.generate(
            prompt(pattern),
            max_new_tokens=NUM_NEW,
            eos_token_id=wanted[at],
            past_key_values=cache,
            **drafter(pattern, name),
            **GREEDY,
        )
        assert found[0].tolist() == wanted[:end]
        logits = feed_row(model, cache, wanted[cache.get_seq_length() :])
        assert_same_logits(logits, expected(model, [wanted])[0][-logits.shape[0] :])


@functools.cache
def tokenizer(offset=0):
    """Single characters; the ids of two tokenizers differ by their offset."""
    letters = {chr(ord("0") + i): (i + offset) % (VOCAB + offset) for i in range(VOCAB + offset)}
    built = Tokenizer(models.WordLevel(letters, unk_token="0"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False)


def test_a_stop_string_stops_at_the_draft_that_holds_it():
    """The library asks about stop strings after a whole draft: what it returns may go on behind them, greedily.

    It hands them to an assistant without the tokenizer that they need, so only lookup takes them.
    """
    model, wanted = shared_model("everything"), greedy("everything", tuple(prompt()[0].tolist()))
    stop = tokenizer().decode(wanted[prompt().shape[1] + 2 : prompt().shape[1] + 5])
    options = {"max_new_tokens": NUM_NEW, "stop_strings": [stop], "tokenizer": tokenizer(), **GREEDY}
    plain = model.generate(prompt(), **options)[0].tolist()
    found = model.generate(prompt(), prompt_lookup_num_tokens=4, **options)[0].tolist()
    assert plain == wanted[: len(plain)] and len(plain) < len(wanted)
    assert len(found) >= len(plain) and found == wanted[: len(found)]


def test_an_assistant_with_another_tokenizer_drafts_through_the_text():
    model = shared_model("paper")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB + 7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    found = model.generate(
        prompt(),
        max_new_tokens=NUM_NEW,
        assistant_model=drafting(LlamaForCausalLM(config).eval()),
        tokenizer=tokenizer(),
        assistant_tokenizer=tokenizer(7),
        **GREEDY,
    )
    assert found[0].tolist() == greedy("paper", tuple(prompt()[0].tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("pattern", ["mamba", "hybrid_sliding", "everything"])
def test_samples_follow_the_seed_whatever_the_cache_takes_back_and_how(pattern, name):
    """Static storage and a reach of nothing encode again what dense storage takes back at once."""
    model, found = shared_model(pattern), []
    drafts = drafter(pattern, name)  # built before the seed: a new model draws its weights
    for options in ({}, {"rollback_reach": 70}, {"storage": "static", "max_cache_len": 64}):
        torch.manual_seed(7)
        cache = model.make_cache(**options)
        sampled = model.generate(
            prompt(pattern),
            max_new_tokens=NUM_NEW,
            do_sample=True,
            top_k=4,
            pad_token_id=VOCAB,
            past_key_values=cache,
            **drafts,
        )
        found.append(sampled.tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_padded_prompt_drafts_too(name):
    padded = torch.cat([torch.tensor([[3, 3]]), prompt()], dim=1)
    mask = torch.tensor([[0] * 2 + [1] * prompt().shape[1]])
    options = {"max_new_tokens": NUM_NEW, **drafter("everything", name), **GREEDY}
    found = shared_model("everything").generate(padded, attention_mask=mask, **options)
    assert found[0, 2:].tolist() == greedy("everything", tuple(prompt()[0].tolist()))


def counted_forwards(model):
    forwards = []
    return forwards, model.model.register_forward_pre_hook(lambda *_: forwards.append(1))


def test_what_cannot_be_speculated_is_refused_before_anything_runs():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    cache, full = model.make_cache(), model.make_cache()
    with torch.no_grad():
        model(prompt(), past_key_values=full)
    hook = ExpertSwitchLogitsProcessor(cache, schedule={2: expert})
    whole = torch.ones(1, prompt().shape[1] + 3, dtype=torch.long)
    bad = {
        "expert_schedule": {"inputs": prompt(), "past_key_values": cache, "logits_processor": [hook]},
        "one row at a time": {"inputs": prompt().repeat(2, 1)},
        "use_cache=True": {"inputs": prompt(), "use_cache": False},
        "drafts from token ids": {"inputs_embeds": model.get_input_embeddings()(prompt())},
        "pass the complete sequence, or only": {"inputs": prompt()[:, :3], "past_key_values": full},
        "pass the complete sequence": {"inputs": prompt()[:, :3], "past_key_values": full, "attention_mask": whole},
    }
    forwards, counting = counted_forwards(model)
    for message, options in bad.items():
        with pytest.raises(ValueError, match=message):
            model.generate(max_new_tokens=4, prompt_lookup_num_tokens=3, **options, **GREEDY)
    counting.remove()
    assert not forwards and cache.get_seq_length() == 0 and cache.expert_vector is None
    logits = feed_row(model, full, [4, 5])
    assert_same_logits(logits, expected(model, [[*prompt()[0].tolist(), 4, 5]])[0][-2:])


@pytest.mark.parametrize("pattern", ["mamba", "everything"])
def test_drafts_on_a_static_cache_fit_or_are_refused(pattern):
    """The last draft was verified in one column more than the static cache held, since Transformers 5.24.0."""
    model = shared_model(pattern)
    options = {"cache_implementation": "static", "prompt_lookup_num_tokens": 5, "max_new_tokens": NUM_NEW, **GREEDY}
    if CACHE_NAME == "past_key_values":
        with pytest.raises(ValueError, match="Static cache"):
            model.generate(prompt(pattern), **options)
    else:
        assert model.generate(prompt(pattern), **options).tolist()[0] == greedy(
            pattern, tuple(prompt(pattern)[0].tolist())
        )


@pytest.mark.parametrize("wrong", [0, 6, -1, 1.5])
def test_an_exit_that_no_layer_has_is_refused(wrong):
    with pytest.raises(ValueError, match="must be a number of layers"):
        shared_model("everything").first_layers(wrong)


def test_a_model_of_the_first_layers_shares_weights_and_changes_nothing():
    model = random_model(tiny_config("everything"))
    before = copy.deepcopy(model.config.to_dict())
    short = model.first_layers(2)
    assert len(short.model.layers) == 2 and short.model.layers[1] is model.model.layers[1]
    ids = random_rows(2, [6])[0]
    config = tiny_config("everything", layer_types=model.config.layer_types[:2], num_hidden_layers=2)
    alone = random_model(config)
    alone.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in alone.state_dict()})
    assert_same_logits(feed_row(short, short.make_cache(), ids, [4, 2]), expected(alone, [ids])[0])
    assert model.config.to_dict() == before and len(model.model.layers) == 5


@pytest.mark.long
def test_smollm2_as_a_hybrid_says_the_same_however_its_tokens_are_drafted(tmp_path, monkeypatch):
    """A small round of `make bench-speculation`, in float32: real weights, prompts and tokenizer."""
    path = Path(__file__).resolve().parent.parent / "benchmarks/speculation.py"
    spec = importlib.util.spec_from_file_location("speculation", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speculation", benchmark)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--prompts", "3", "--max-new-tokens", "8", "--models", "random", "--output", str(tmp_path)])
    runs = [benchmark.Run(**run) for run in json.loads((tmp_path / "speculation.json").read_text())]
    assert [run.mode for run in runs].count("lookup") == 3 and len(runs) == 12
    assert all(run.is_right for run in runs)
    assert sum(run.num_forwards < run.num_tokens for run in runs) >= 3  # drafts were accepted


def test_a_model_may_exit_early_to_assist_itself():
    """Transformers lowers `num_hidden_layers` while the first layers propose tokens; all ran, and an index failed."""
    model, ids = random_model(tiny_config("everything"), loudness=0.7), random_ids()
    greedy = model.generate(ids, max_new_tokens=8, **GREEDY)
    for exit_at in (1, 3):
        assert (
            model.generate(ids, max_new_tokens=8, assistant_early_exit=exit_at, **GREEDY).tolist() == greedy.tolist()
        )
    shallow = random_model(tiny_config("everything", layer_types=model.config.layer_types[:3]))
    shallow.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if name in shallow.state_dict()}
    )
    model.config.num_hidden_layers = 3
    assert torch.equal(uncached_logits(model, ids), uncached_logits(shallow, ids))


def test_refused_speculation_leaves_the_users_cache_as_it_was():
    """The library refused two rows after the cache had started to record for them."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache()
    with pytest.raises(ValueError, match="one row at a time"):
        model.generate(
            ids.expand(2, -1), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, **GREEDY
        )
    assert cache.rollback_reach == 0
