"""Experts that a `GenerationConfig` names: servers, pipelines and generation_config.json have no other way."""

import copy
import json

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from mambaformer import ExpertVector, MambaFormerForCausalLM
from patterns import VOCAB, tiny_config
from sequences import random_rows
from tiny_models import random_expert, random_model

GREEDY = {"do_sample": False, "pad_token_id": VOCAB, "max_new_tokens": 8}
MODES = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "sampling": {"do_sample": True},
}


@pytest.fixture
def model():
    """A model of its own for each test, with the experts "bold" and "calm"."""
    model = random_model(tiny_config("everything"))
    for seed, name in enumerate(("bold", "calm")):
        model.expert_vectors.add(random_expert(model, seed + 1, name=name))
    return model


IDS = torch.tensor(random_rows(3)[:1])


def answer(model, **options):
    torch.manual_seed(0)
    return model.generate(IDS, **options).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_experts_of_a_configuration_generate_as_the_arguments_do(model, mode):
    """`GenerationConfig(expert_vector=...)` was ignored: a server answered every request with the base."""
    options = {**GREEDY, **MODES[mode]}
    base = answer(model, **options)
    for named in ({"expert_vector": "bold"}, {"expert_schedule": {0: "calm", 3: "bold"}}):
        expected = answer(model, **options, **named)
        assert expected != base
        assert answer(model, generation_config=GenerationConfig(**options, **named)) == expected
        vars(model.generation_config).update(named)
        assert answer(model, **options) == expected
        assert answer(model, **options, expert_vector=None) == base
        for name in named:
            delattr(model.generation_config, name)


def test_the_argument_wins_over_configuration_model_and_cache(model):
    def with_cache(**options):
        cache = model.make_cache()
        cache.set_expert_vector("calm")
        return answer(model, cache=cache, **options)

    base, bold, calm = (answer(model, **GREEDY, expert_vector=name) for name in (None, "bold", "calm"))
    assert with_cache(**GREEDY) == calm
    assert with_cache(generation_config=GenerationConfig(**GREEDY, expert_vector=None)) == base
    model.generation_config.expert_vector = "bold"
    assert with_cache(**GREEDY) == bold
    assert with_cache(generation_config=GenerationConfig(**GREEDY)) == bold
    assert with_cache(generation_config=GenerationConfig(**GREEDY, expert_vector="calm")) == calm
    assert with_cache(generation_config=GenerationConfig(**GREEDY, expert_vector=None)) == base
    config = GenerationConfig(**GREEDY, expert_vector="calm")
    assert model.generate(IDS, config, expert_vector=None).tolist() == base
    assert not hasattr(config, "resolved_schedule") and config.expert_vector == "calm"


def test_a_schedule_that_starts_late_starts_from_the_next_vector_in_order(model):
    expected = answer(model, **GREEDY, expert_schedule={0: "bold", 3: "calm"})
    model.generation_config.expert_vector = "bold"
    assert answer(model, **GREEDY, expert_schedule={3: "calm"}) == expected
    assert answer(model, generation_config=GenerationConfig(**GREEDY, expert_schedule={3: "calm"})) == expected
    del model.generation_config.expert_vector
    model.generation_config.expert_schedule = {0: "calm", 2: "calm"}
    schedule = {"expert_vector": "bold", "expert_schedule": {3: "calm"}}
    assert answer(model, generation_config=GenerationConfig(**GREEDY, **schedule)) == expected


def test_bad_experts_of_a_configuration_are_refused_before_anything_has_run(model):
    bad = {
        "no expert vector named 'ghost'": {"expert_vector": "ghost"},
        "no expert vector named 'spectre'": {"expert_schedule": {0: "bold", 5: "spectre"}},
        "both for new token 0": {"expert_vector": "bold", "expert_schedule": {"0": "calm"}},
        "keys of a schedule number new tokens": {"expert_schedule": {"soon": "bold"}},
        "two entries for one new token": {"expert_schedule": {"0": "bold", 0: "calm"}},
        "must be a dict": {"expert_schedule": ["bold"]},
        "takes None, a name": {"expert_vector": 7},
    }
    for message, named in bad.items():
        cache = model.make_cache()
        with pytest.raises((ValueError, TypeError), match=message):
            model.generate(IDS, generation_config=GenerationConfig(**GREEDY, **named), cache=cache)
        assert cache.get_seq_length() == 0 and cache.expert_vector is None
    model.generation_config.expert_vector = "ghost"
    with pytest.raises(ValueError, match="no expert vector named 'ghost'"):
        model.generate(IDS, **GREEDY)


@pytest.mark.parametrize(
    "field, meant",
    {"expert_vectors": "expert_vector", "expert": "expert_vector", "expert_shedule": "expert_schedule"}.items(),
)
def test_a_misspelt_field_of_a_configuration_is_named(model, field, meant):
    """Transformers keeps fields that it does not know: a misspelt one answered with the base, and nobody was told."""
    message = f"no field `{field}`: did you mean `{meant}`"
    cache = model.make_cache()
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, generation_config=GenerationConfig(**GREEDY, **{field: "bold"}), cache=cache)
    assert cache.get_seq_length() == 0
    setattr(model.generation_config, field, "bold")
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, **GREEDY)


def test_fields_of_a_configuration_that_other_programs_use_are_taken(model):
    config = GenerationConfig(**GREEDY, chat_format="chatml", max_window_size=6144)
    assert answer(model, generation_config=config) == answer(model, **GREEDY)


def test_names_are_saved_in_generation_config_json_and_count_after_loading(model, tmp_path):
    expected = answer(model, **GREEDY, expert_schedule={0: "calm", 3: "bold", 12: None})
    model.generation_config.expert_vector = "calm"
    model.generation_config.expert_schedule = {3: "bold", 12: None}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["expert_vector"] == "calm" and saved["expert_schedule"] == {"3": "bold", "12": None}
    loaded = MambaFormerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert answer(loaded, **GREEDY) == expected
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == saved


def test_vectors_serve_in_a_configuration_and_are_refused_when_it_is_saved(model, tmp_path):
    expert = model.expert_vectors["bold"]
    expected = answer(model, **GREEDY, expert_vector="bold")
    for given in (expert, dict(expert.vectors), [expert]):
        model.generation_config.expert_vector = given
        assert answer(model, **GREEDY) == expected
        with pytest.raises(ValueError, match=r"generation_config\.expert_vector.*only names"):
            model.save_pretrained(tmp_path / "new")
    del model.generation_config.expert_vector
    model.generation_config.expert_schedule = {2: ExpertVector(dict(expert.vectors))}
    with pytest.raises(ValueError, match=r"generation_config\.expert_schedule\[2\]` is a ExpertVector"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rows_of_a_configuration_have_their_own_experts(model):
    rows = torch.cat([IDS, IDS])
    for mode in ({}, {"num_beams": 2}):
        config = GenerationConfig(**GREEDY, **mode, expert_vector=["bold", None])
        expected = [answer(model, **GREEDY, **mode, expert_vector=name)[0] for name in ("bold", None)]
        assert model.generate(rows, generation_config=config).tolist() == expected
        assert config.expert_vector == ["bold", None]


def test_an_assistant_knows_nothing_of_the_experts_that_its_main_model_names(model):
    """The library hands the main model's configuration to the assistant, whose library has no such name."""
    assistant = random_model(tiny_config("paper"), seed=5)
    expected = answer(model, **GREEDY, expert_schedule={0: "bold", 4: None})
    config = GenerationConfig(**GREEDY, expert_schedule={0: "bold", 4: None})
    assert answer(model, generation_config=config, assistant_model=assistant) == expected
    assistant.expert_vectors.add(random_expert(assistant, 7, name="draft"))
    assistant.generation_config.expert_vector = "draft"
    assert answer(model, generation_config=config, assistant_model=assistant) == expected


def test_a_pipeline_takes_experts_by_its_configuration(model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    texts = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = " ".join(f"w{n}" for n in IDS[0].tolist())

    def say(**options):
        return texts(prompt, return_tensors=True, **options)[0]["generated_token_ids"]

    for name in ("bold", "calm"):
        expected = answer(model, **GREEDY, expert_vector=name)[0]
        config = GenerationConfig(**GREEDY, expert_vector=name)
        assert say(generation_config=copy.deepcopy(config)) == expected
        assert say(**GREEDY, expert_vector=name) == expected
