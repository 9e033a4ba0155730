"""How models are called where a request does not say, in real vLLM: as their folders say, mixtures by the rule."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from transformers import AutoTokenizer

from bench.server import RunningServer, running_server
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.examples import parse_examples
from cocktail_serve.scoring.decoder import tokenize_examples
from tests.models import CHAIN_TOKENS, make_chain_decoder, pool_section

pytestmark = pytest.mark.vllm

IM_END, EOM = CHAIN_TOKENS.index("<|im_end|>"), CHAIN_TOKENS.index("<|eom|>")

BASE_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# the expert's: another prompt, and an end token by name, which has to be the expert's own
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|> {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
COUNT = "one two three four"
QUESTION: Any = [{"role": "user", "content": "eight"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, dict[str, Path]]]:
    folder = tmp_path_factory.mktemp("generation")
    folders = {
        "base": make_chain_decoder(folder / "base", chat_template=BASE_TEMPLATE),
        "chat": make_chain_decoder(
            folder / "chat", end="<|im_end|>", chat_template=CHAT_TEMPLATE, generation_config={"eos_token_id": IM_END}
        ),
        # says one of the two end tokens that its generation_config.json names, and not its tokenizer's
        "tools": make_chain_decoder(
            folder / "tools",
            end="<|eom|>",
            tokenizer_end="<|im_end|>",
            chat_template=BASE_TEMPLATE,
            generation_config={"eos_token_id": [IM_END, EOM]},
        ),
        # hardly knows what comes next, so that only its own low temperature makes it count
        "cool": make_chain_decoder(
            folder / "cool",
            chat_template=BASE_TEMPLATE,
            generation_config={"eos_token_id": 2, "temperature": 0.01, "max_new_tokens": 3, "do_sample": True},
            sharpness=0.1,
        ),
    }
    engine = {
        "type": "vllm",
        "dtype": "float32",
        "max_model_len": 128,
        "slice_s": 0.1,
        "queue_timeout_s": 300,
        "args": {"max-num-seqs": 8},
    }
    config = folder / "config.yaml"
    pools = [pool_section("count", "decoder", folders, engine)]
    config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "reports": False, "pools": pools}))
    with running_server(config, log=folder / "server.log") as server:
        yield server, folders


@pytest.fixture(scope="module")
def server(served: tuple[RunningServer, dict[str, Path]]) -> RunningServer:
    return served[0]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def mixed(server: RunningServer, **merging_weights: float) -> dict[str, Any]:
    body = {"name": "-".join(merging_weights), "pool": "count", "merging_weights": merging_weights}
    cocktail: dict[str, Any] = server.post("/v1/cocktails?wait=60", body)
    assert cocktail["status"] == "ready"
    return cocktail


def complete(client: openai.OpenAI, model: str, **options: Any) -> Any:
    asked = {"prompt": "<|assistant|>", "max_tokens": 8, "temperature": 0.0} | options
    return client.completions.create(model=model, **asked)


@pytest.mark.parametrize("model", ["count", "count/chat"])
def test_a_model_ends_at_its_own_end_token(client: openai.OpenAI, model: str) -> None:
    answer = complete(client, model)
    (choice,) = answer.choices
    assert (choice.text.strip(), choice.finish_reason) == (COUNT, "stop")
    assert choice.stop_reason is None, "who ended by itself was stopped by nothing"
    assert answer.usage.completion_tokens == 5, "the end token is counted"


@pytest.mark.parametrize("model", ["count", "count/chat"])
def test_streams_end_alike(client: openai.OpenAI, model: str) -> None:
    chunks = list(complete(client, model, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks).strip() == COUNT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.choices[0].stop_reason for chunk in chunks} == {None}
    chats = list(client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, stream=True))
    assert (chats[-1].choices[0].finish_reason, chats[-1].choices[0].stop_reason) == ("stop", None)


def test_every_choice_ends(client: openai.OpenAI) -> None:
    choices = complete(client, "count/chat", n=3, temperature=1.0).choices
    ends = [(choice.text.strip(), choice.finish_reason, choice.stop_reason) for choice in choices]
    assert ends == [(COUNT, "stop", None)] * 3


def test_a_further_end_token_is_told_as_vllm_tells_it(client: openai.OpenAI) -> None:
    (choice,) = complete(client, "count/tools").choices
    assert (choice.text.strip(), choice.finish_reason, choice.stop_reason) == (COUNT, "stop", EOM)


def test_what_a_request_stops_at_stays(client: openai.OpenAI) -> None:
    three = CHAIN_TOKENS.index("three")
    (choice,) = complete(client, "count/chat", extra_body={"stop_token_ids": [three]}).choices
    assert (choice.text.strip(), choice.finish_reason, choice.stop_reason) == ("one two", "stop", three)
    (choice,) = complete(client, "count/chat", stop=["two"]).choices
    assert (choice.text.strip(), choice.stop_reason) == ("one", "two")
    # and the model's own end is there beside it
    (choice,) = complete(client, "count/chat", extra_body={"stop_token_ids": [EOM]}).choices
    assert (choice.text.strip(), choice.finish_reason, choice.stop_reason) == (COUNT, "stop", None)


@pytest.mark.parametrize("model", ["count", "count/chat"])
def test_the_end_can_be_ignored(client: openai.OpenAI, model: str) -> None:
    (choice,) = complete(client, model, extra_body={"ignore_eos": True}).choices
    assert (choice.text.split(), choice.finish_reason) == ([*COUNT.split(), "one", "two", "three"], "length")
    # then it is a token like any other, and a request may stop at it
    options = {"ignore_eos": True, "stop_token_ids": [IM_END]}
    (choice,) = complete(client, "count/chat", extra_body=options).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", IM_END)


def test_an_answer_is_as_long_as_asked_at_least(client: openai.OpenAI) -> None:
    (choice,) = complete(client, "count/chat", extra_body={"min_tokens": 8}).choices
    assert choice.finish_reason == "length"
    assert "<|im_end|>" not in choice.text


def test_the_end_token_is_shown_where_it_is_asked_for(client: openai.OpenAI) -> None:
    options = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    for model, end in (("count", "</s>"), ("count/chat", "<|im_end|>")):
        (choice,) = complete(client, model, extra_body=options).choices
        assert choice.text.split() == [*COUNT.split(), end]


@pytest.mark.parametrize(("model", "end"), [("count", "</s>"), ("count/chat", "<|im_end|>")])
def test_log_probabilities_are_there_for_every_token(client: openai.OpenAI, model: str, end: str) -> None:
    logprobs = complete(client, model, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == [*COUNT.split(), end]
    assert logprobs.token_logprobs == pytest.approx([0.0] * 5, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "answer", "num_prompt_tokens"),
    # `<|user|> eight <|assistant|>`; the expert's own puts its end token behind each message
    [("count", COUNT, 3), ("count/chat", "five six seven eight", 4)],
)
def test_a_model_is_asked_by_its_own_template(
    client: openai.OpenAI, model: str, answer: str, num_prompt_tokens: int
) -> None:
    chat = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0.0)
    (choice,) = chat.choices
    assert choice.message.content is not None
    assert (choice.message.content.strip(), choice.finish_reason) == (answer, "stop")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == num_prompt_tokens
    body = {"return_token_ids": True}
    ids = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=1, extra_body=body).model_dump()
    tokens = [CHAIN_TOKENS[token] for token in ids["prompt_token_ids"]]
    assert tokens == (
        ["<|user|>", "eight", "<|assistant|>"] if model == "count" else ["<|user|>", "eight", "<|im_end|>", "<|bot|>"]
    )


def test_templates_of_requests_are_refused_as_ever(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="count/chat", messages=QUESTION, extra_body={"chat_template": "{{ messages }}"}
        )
    assert caught.value.param == "chat_template"


def test_sampling_defaults_are_the_models_own(client: openai.OpenAI) -> None:
    counted = [complete(client, "count/cool", temperature=None, seed=seed).choices[0].text.strip() for seed in range(4)]
    assert counted == [COUNT] * 4
    warm = [complete(client, "count/cool", temperature=1.0, seed=seed).choices[0].text.strip() for seed in range(4)]
    assert COUNT not in warm, "a request's own temperature goes before it"
    chat = client.chat.completions.create(model="count/cool", messages=QUESTION)
    assert (chat.choices[0].message.content or "").split() == ["one", "two", "three"]
    assert chat.choices[0].finish_reason == "length"
    longer = client.chat.completions.create(model="count/cool", messages=QUESTION, max_completion_tokens=9)
    assert (longer.choices[0].message.content or "").strip() == COUNT
    # others do not take it
    others = client.chat.completions.create(model="count/chat", messages=QUESTION)
    assert others.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_a_mixture_ends_as_any_of_its_models(server: RunningServer, client: openai.OpenAI, share: float) -> None:
    cocktail = mixed(server, base=1 - share, chat=share)
    assert cocktail["generation"]["stop_token_ids"] == [2, IM_END]
    (choice,) = complete(client, cocktail["id"]).choices
    assert (choice.text.strip(), choice.finish_reason, choice.stop_reason) == (COUNT, "stop", None)


def test_a_mixture_is_asked_as_its_models_were_scored(
    served: tuple[RunningServer, dict[str, Path]], client: openai.OpenAI, tmp_path: Path
) -> None:
    server, folders = served
    config = PoolConfig.model_validate(pool_section("count", "decoder", folders, {"type": "vllm"}))
    pool = open_pool(config, cache_dir=tmp_path)
    messages = [*QUESTION, {"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    examples = parse_examples([{"messages": [*messages, {"role": "assistant", "content": "three"}]}], "decoder")
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    (scored,) = tokenize_examples(tokenizer, examples, max_tokens=100, chat_template=pool.chat_template)
    cocktail = mixed(server, base=0.5, chat=0.5)
    asked: Any = {"messages": messages, "max_tokens": 1, "extra_body": {"return_token_ids": True}}
    prompt = client.chat.completions.create(model=cocktail["id"], **asked).model_dump()["prompt_token_ids"]
    assert prompt == scored.token_ids[: scored.output_start]


@pytest.mark.parametrize("model", ["count", "count/chat"])
def test_the_tokens_told_of_a_chat_are_those_that_are_read(
    server: RunningServer, client: openai.OpenAI, model: str
) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    asked: Any = {"messages": messages, "max_tokens": 1, "extra_body": {"return_token_ids": True}}
    chat = client.chat.completions.create(model=model, **asked).model_dump()
    told = server.post("/tokenize", {"model": model, "messages": messages, "return_token_strs": True})
    assert told["tokens"] == chat["prompt_token_ids"]
    assert (told["count"], len(told["token_strs"])) == (chat["usage"]["prompt_tokens"],) * 2
    text = server.post("/detokenize", {"model": model, "tokens": told["tokens"]})["prompt"]
    assert server.post("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})["count"] > 0
    asked = {"prompt": COUNT, "max_tokens": 1, "temperature": 0.0}
    plain = server.post("/v1/tokenize", {"model": model, "prompt": COUNT})
    assert plain["count"] == client.completions.create(model=model, **asked).usage.prompt_tokens  # type: ignore[union-attr]
    assert plain["max_model_len"] == 128


@pytest.mark.parametrize("model", ["count", "count/chat", "count/cool"])
def test_a_response_is_a_chat_in_other_words(server: RunningServer, client: openai.OpenAI, model: str) -> None:
    """By the template, the end tokens and the sampling of the model that is asked, whole and as a stream."""
    url = f"{server.url}/v1"
    strict = openai.OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)
    messages: Any = [*QUESTION, {"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    asked: Any = {"messages": messages, "extra_body": {"return_token_ids": True}}
    chat = client.chat.completions.create(model=model, **asked)
    content = chat.choices[0].message.content
    whole = strict.responses.create(model=model, input=messages, extra_body={"enable_response_messages": True})
    assert (whole.model, whole.output_text) == (model, content)
    read = whole.model_dump()["input_messages"][0]["tokens"]
    assert read == chat.model_dump()["prompt_token_ids"], "the template of the model"
    assert chat.usage is not None
    assert whole.usage is not None
    used = (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == used
    assert whole.status == {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason]
    with strict.responses.stream(model=model, input=messages) as stream:
        stream.until_done()
        streamed = stream.get_final_response()
    assert (streamed.model, streamed.output_text, streamed.usage) == (model, content, whole.usage)
    instructed = strict.responses.create(model=model, input="eight", instructions="two", max_output_tokens=1)
    assert (instructed.usage and instructed.usage.output_tokens, instructed.status) == (1, "incomplete")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=model, input="one " * 500)
    assert caught.value.code == "context_length_exceeded"


def test_a_batch_answers_as_its_lines_alone(server: RunningServer, client: openai.OpenAI) -> None:
    models = ["count", "count/chat", mixed(server, base=0.5, chat=0.5)["id"]]
    asked = [{"model": model, "messages": QUESTION, "max_tokens": 8, "temperature": 0.0} for model in models]
    path: Any = "/v1/chat/completions"
    lines = [{"custom_id": body["model"], "method": "POST", "url": path, "body": body} for body in asked]
    file = client.files.create(file="\n".join(map(json.dumps, lines)).encode(), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=path, completion_window="24h")
    deadline = time.monotonic() + 120
    while (batch := client.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    assert batch.output_file_id is not None
    for line, body in zip(client.files.content(batch.output_file_id).text.splitlines(), asked, strict=True):
        answer = json.loads(line)
        alone = client.chat.completions.create(**body)  # type: ignore[call-overload]
        assert (answer["custom_id"], answer["response"]["body"]["model"]) == (body["model"], body["model"])
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content


def test_what_is_shown_is_what_is_taken(server: RunningServer) -> None:
    (pool,) = server.http.get("/v1/pools").json()["data"]
    shown = {name: member["generation"] for name, member in {"base": pool["base"], **pool["experts"]}.items()}
    assert {name: each["stop_token_ids"] for name, each in shown.items()} == {
        "base": [2],
        "chat": [2, IM_END],
        "tools": [2, IM_END, EOM],
        "cool": [2],
    }
    assert shown["cool"]["sampling"] == {"temperature": 0.01, "max_tokens": 3}
    assert shown["chat"]["chat_template"] != shown["base"]["chat_template"] == shown["tools"]["chat_template"]
    alone, both = mixed(server, base=0.5, cool=0.5), mixed(server, cool=0.5, chat=0.5)
    assert alone["generation"] == shown["cool"]
    assert both["generation"] == {**shown["base"], "stop_token_ids": [2, IM_END]}, "experts that differ: the base's"
