"""`/v1/files` with the official client, strict about every answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateways import EXAMPLES, PAIRS, LiveGateway, live_gateway


def jsonl(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode() + b"\n"


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.base_url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
def empty(client: OpenAI) -> None:
    for file in client.files.list():
        client.files.delete(file.id)


def test_upload_retrieve_content_delete(client: OpenAI) -> None:
    content = b"\xef\xbb\xbf" + jsonl(*EXAMPLES) + b"\n"
    file = client.files.create(file=("fruit.jsonl", content), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "fruit.jsonl",
        len(content),
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            gone(file.id)
        assert caught.value.code == "file_not_found"


def test_equal_files_are_apart(client: OpenAI) -> None:
    first, second = (client.files.create(file=jsonl(*PAIRS), purpose="fine-tune") for _ in range(2))
    assert first.id != second.id
    client.files.delete(first.id)
    assert client.files.content(second.id).read() == jsonl(*PAIRS)
    client.files.delete(second.id)


@pytest.mark.usefixtures("empty")
def test_pages(client: OpenAI) -> None:
    made = [client.files.create(file=jsonl(EXAMPLES[0]), purpose="fine-tune").id for _ in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    page = client.files.list(limit=2, order="asc", after=made[1])
    assert [file.id for file in page.data] == made[2:4]
    assert page.has_more
    assert page.model_extra is not None
    assert (page.model_extra["first_id"], page.model_extra["last_id"]) == (made[2], made[3])
    assert [file.id for file in client.files.list(purpose="fine-tune", limit=3)] == made[::-1]
    assert list(client.files.list(purpose="batch")) == []
    # each page is asked for after all of the one before has been deleted
    for file in client.files.list(limit=2):
        client.files.delete(file.id)
    assert list(client.files.list()) == []


async def test_async_client(gateway: LiveGateway) -> None:
    async with AsyncOpenAI(
        base_url=gateway.base_url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        file = await client.files.create(file=jsonl(*EXAMPLES), purpose="fine-tune")
        assert file.id in [each.id async for each in client.files.list(limit=1)]
        assert (await client.files.content(file.id)).read() == jsonl(*EXAMPLES)
        assert (await client.files.delete(file.id)).id == file.id


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"input": "a", "output": "b"}\n\n{"input": "a"\n', ["1 of 2 lines", "line 3: not a JSON object"]),
        (b'{"input": "a"}\n[1]\n{"query": "q", "pos": []}', ["3 of 3", "line 1:", "line 2:", "line 3:", "is empty"]),
        (b'{"input": "a", "output": "b"}\n{"input": "\xff"}', ["line 2: not UTF-8"]),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', ["line 1: the last message must be the assistant's"]),
        (b' [{"input": "a", "output": "b"}]', ["one JSON array", "jq -c '.[]' FILE"]),
        (b"input,output\na,b", ["2 of 2", "line 1: not a JSON object", "begins with 'input,output'"]),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
            ["line 1: every answer of the assistant has weight 0"],
        ),
        (b'{"instruction": "a", "output": "b"}', ["line 1: this is an Alpaca row"]),
        (b"\n \n", ["no examples"]),
        (b"", ["no examples"]),
    ],
)
def test_malformed_lines_are_named(client: OpenAI, content: bytes, names: list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    assert (caught.value.code, caught.value.param) == ("invalid_file", "file")
    for name in names:
        assert name in caught.value.message


def test_rows_of_other_tools(client: OpenAI) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": ""}, *MESSAGES], "tools": [], "parallel_tool_calls": True},
        {"prompt": "", "completion": " a text"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {
            "query": "q",
            "pos": ["p"],
            "neg": ["n"],
            "pos_scores": [1.0],
            "neg_scores": [0.2],
            "prompt": "",
            "type": "normal",
        },
        {"anchor": "q", "positive": "p", "negative": "n"},
        {"query": "q", "pos": ["p"], "neg": ["n"], "query_prompt": "Q: "},
    ]
    assert client.files.create(file=jsonl(*rows), purpose="fine-tune").status == "processed"


def test_only_fine_tune(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=jsonl(*EXAMPLES), purpose="vision")
    assert caught.value.param == "purpose"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"json": {"purpose": "fine-tune"}}, None),
        ({"files": {"file": ("a", b"x")}}, "purpose"),
        ({"files": {"purpose": (None, "fine-tune")}}, "file"),
        ({"files": {"purpose": (None, "fine-tune"), "file": (None, "{}")}}, "file"),
        ({"content": b"no boundary", "headers": {"content-type": "multipart/form-data; boundary=x"}}, None),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, None),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, None),
        (
            {"files": {"purpose": (None, "fine-tune"), "file": ("a", b"x"), "expires_after[seconds]": (None, "9")}},
            "expires_after[seconds]",
        ),
    ],
    ids=["json", "no purpose", "no file", "text", "broken", "no boundary", "two files", "expiry"],
)
def test_forms_that_cannot_be_read(gateway: LiveGateway, request_: dict[str, object], param: str | None) -> None:
    answer = httpx.post(f"{gateway.base_url}/files", **request_)  # type: ignore[arg-type]
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "order=up", "after=file-1"])
def test_lists_are_asked_for_properly(gateway: LiveGateway, query: str) -> None:
    answer = httpx.get(f"{gateway.base_url}/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with live_gateway(tmp_path, server={"max_request_bytes": 10_000}) as small:
        client = OpenAI(base_url=small.base_url, api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=jsonl(*EXAMPLES * 100), purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code) == (413, "payload_too_large")
