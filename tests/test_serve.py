"""`transformers serve` with this model, as `examples/08_serve.py` starts it, asked by the stock `openai` client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
import torch
from transformers import AutoTokenizer

from mambaformer import MambaFormerForCausalLM
from patterns import ROOT
from tiny_models import random_expert

PROMPT = "Once upon a time"
NUM_TOKENS = 12
SECONDS_TO_START = 240


def served_folder(folder):
    """The trained model with two experts and a chat template: what a user would have on disk."""
    tiny = ROOT / "checkpoints" / "mambaformer-tiny"
    model = MambaFormerForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    modules = [name for name in model.linear_modules() if name.endswith("down_proj")]
    for seed, name in enumerate(("bold", "calm")):
        model.expert_vectors.add(random_expert(model, seed + 1, modules=modules, name=name))
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_it_answers(process, url, log):
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            return urllib.request.urlopen(url, timeout=1).read()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not answer: {log.read_text()}") from None
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`(client, folder, model, tokenizer)` while a server runs in another process, which never sees the package."""
    home = tmp_path_factory.mktemp("serve")
    model, tokenizer = served_folder(home / "model")
    port, log = free_port(), home / "log"
    # A cache of its own: code that another test has loaded from a folder of this name is not found.
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples/08_serve.py", home / "model", "--trust-remote-code", "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            cwd=home,
            env=environment,
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(process, f"{url}/health", log)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            yield client, str(home / "model"), model, tokenizer
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(server, named, **options):
    client, folder, _, _ = server
    fields = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0, **named}
    return client.chat.completions.create(
        model=folder,
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={"generation_config": json.dumps(fields)},
        **options,
    )


def own_answer(server, named):
    """What `generate` says in this process."""
    _, _, model, tokenizer = server
    prompt = tokenizer(PROMPT, return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False, **named)[0, prompt.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_the_served_model_is_listed(server):
    """The command looked the class up in the library and died: AttributeError, no attribute MambaFormerForCausalLM."""
    client, folder, _, _ = server
    assert [model.id for model in client.models.list()] == [folder]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_request_is_answered_under_the_expert_that_it_names(server, is_streamed):
    answers = {}
    for named in ({}, {"expert_vector": "bold"}, {"expert_vector": "calm"}, {"expert_schedule": {4: "bold"}}, {}):
        reply = ask(server, named, stream=is_streamed)
        if is_streamed:
            found = "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)
        else:
            found = reply.choices[0].message.content
            assert reply.usage.completion_tokens == NUM_TOKENS
        assert found.strip() == own_answer(server, named).strip()
        answers[str(named)] = found
    assert len(set(answers.values())) == 4


def test_a_request_for_an_unknown_expert_vector_is_refused_and_harms_nobody(server):
    """It was answered by "Internal Server Error", which a client takes for a reason to try again."""
    for named in ({"expert_vector": "ghost"}, {"expert_schedule": {"3": "ghost"}}):
        with pytest.raises(openai.BadRequestError, match="no expert vector named 'ghost'"):
            ask(server, named)
        with pytest.raises(openai.APIError) as refused:
            list(ask(server, named, stream=True))
        assert "no expert vector named 'ghost'" in str(refused.value.body)
    assert ask(server, {"expert_vector": "bold"}).choices[0].message.content


def test_a_prompt_without_a_chat_is_continued_under_the_expert_that_it_names(server):
    """The README named only chats, for which the tokenizer of `mambaformer-tiny` has no template."""
    client, folder, _, _ = server
    answers = set()
    for named in ({}, {"expert_vector": "bold"}, {"expert_vector": "calm"}):
        config = json.dumps({"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0, **named})
        reply = client.completions.create(model=folder, prompt=PROMPT, extra_body={"generation_config": config})
        assert reply.choices[0].text.strip() == own_answer(server, named).strip()
        answers.add(reply.choices[0].text)
    assert len(answers) == 3


MISTAKES = {
    "takes None, a name": {"expert_vector": 3},
    "keys of a schedule number new tokens": {"expert_schedule": {"soon": "bold"}},
    "A schedule must be a dict": {"expert_schedule": ["bold"]},
    "did you mean `expert_vector`": {"expert_vectors": "bold"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_of_a_client_is_never_an_internal_server_error(server, message):
    """A value of another type was: a TypeError passed by the handler of ValueErrors. A misspelt name was ignored."""
    with pytest.raises(openai.BadRequestError, match=message):
        ask(server, MISTAKES[message])


def test_a_configuration_that_is_no_string_is_a_bad_request(server):
    """A client sends JSON within JSON only if it is told so: an object in its place was an internal server error."""
    client, folder, _, _ = server
    with pytest.raises(openai.BadRequestError, match="JSON object must be str"):
        client.chat.completions.create(
            model=folder,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={"generation_config": {"expert_vector": "bold"}},
        )
