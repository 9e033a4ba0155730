"""The command line against a running server: what a client of the API can do, without one."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from cocktail_serve.cli.client.options import ServerOptions
from tests.command_line import answer, refusal, run
from tests.gateways import EXAMPLES, LiveGateway, live_gateway
from tests.tenants import Tenants, guarded_gateway

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of whoever runs the tests."""
    for variable in ("COCKTAIL_BASE_URL", "COCKTAIL_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with guarded_gateway(tmp_path_factory.mktemp("guarded")) as tenants:
        yield tenants


@pytest.fixture
def url(server: LiveGateway, environ: pytest.MonkeyPatch) -> str:
    """Of the server, which the environment names."""
    environ.setenv("COCKTAIL_BASE_URL", server.base_url)
    return server.url


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, EXAMPLES)))
    return path


def get(url: str, path: str) -> Any:
    return httpx.get(f"{url}{path}").raise_for_status().json()


def test_a_cocktail_is_made_shown_listed_reported_pinned_and_deleted(url: str, examples: Path, capsys: Capture) -> None:
    words = ("create", "films", "--pool", "flan", "--examples", examples, "--validation-examples", examples)
    code, out, err = run(capsys, *words, "--temperature", 0.5)
    assert code == 0, err
    made = get(url, "/v1/cocktails/films")
    assert f"{made['id']}: ready, pool flan, made 20" in out
    assert all(name in out for name in ("base", "ag-news", "nq", "temperature 0.5", "3 examples", "█"))
    assert f"recipe {made['recipe']['digest'][:12]} (float32, merged)" in out
    assert "making films@" in err
    assert err.splitlines()[-1] == "ask it: cocktail-serve chat films"
    assert made["validation_loss"] == pytest.approx(made["mixed_loss"])

    assert answer(capsys, "show", "films") == made
    assert answer(capsys, "show", made["id"]) == made
    assert run(capsys, "show", "films")[1] == out

    newer = answer(capsys, "create", "films", "--pool", "flan", "--examples", examples, "--temperature", 2.0)
    assert (newer["status"], newer["current"]) == ("ready", True)
    _, out, _ = run(capsys, "list", "--name", "films")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["id", "current", "status", "pool", "loss", "made"]
    assert [row[0] for row in rows[1:]] == [newer["id"], made["id"]]
    assert [row[1:3] for row in rows[1:]] == [["*", "ready"], ["ready", "flan"]]
    assert answer(capsys, "list") == get(url, "/v1/cocktails")

    told = answer(capsys, "report", made["id"])
    assert (told["report_status"], told["mixed_loss"]) == ("ready", made["mixed_loss"])
    _, out, _ = run(capsys, "report", made["id"])
    assert told["verdict"] in out
    assert f"on the examples that it was weighed with: {made['mixed_loss']:.3f} nats" in out
    assert f"held out: each under a mixture weighed without it: {told['held_out_loss']:.3f} nats" in out
    held_out = told["best_expert_held_out_loss"]
    assert f"held out: each under the expert that the others choose: {held_out:.3f} nats" in out

    assert run(capsys, "pin", made["id"])[1] == f"films is {made['id']}\n"
    assert get(url, "/v1/cocktails/films")["id"] == made["id"]
    assert answer(capsys, "pin", "films", "--newest")["id"] == newer["id"]
    assert "a version, as films@1a2b3c4d, or a name and --newest" in refusal(capsys, "pin", "films")
    assert "a version, as films@1a2b3c4d" in refusal(capsys, "pin", made["id"], "--newest")

    said = refusal(capsys, "delete", "films")
    assert "has 2 versions, which all go: give --yes" in said
    assert run(capsys, "delete", newer["id"])[1] == f"deleted {newer['id']}\n"
    assert answer(capsys, "delete", "films") == {"id": "films", "object": "cocktail", "deleted": True}
    assert "there is no cocktail 'films'" in refusal(capsys, "show", "films")
    assert "there is no cocktail 'films'" in refusal(capsys, "delete", "films")


def test_all_versions_go_when_they_are_confirmed(url: str, capsys: Capture) -> None:
    for weight in ("0.5", "1.0"):
        weights = f"base={1 - float(weight)},nq={weight}"
        answer(capsys, "create", "gone", "--pool", "flan", "--weights", weights)
    assert run(capsys, "delete", "gone", "--yes")[0] == 0
    assert get(url, "/v1/cocktails?name=gone")["data"] == []


def test_without_cocktails_the_next_step_is_told(url: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "list", "--name", "nothing")
    assert (code, out) == (0, "")
    assert "`cocktail-serve create` makes one" in err
    _, out, _ = run(capsys, "list", "--models")
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["bge", "encoder", "bge", "operator"],
        ["bge/hotpotqa", "encoder", "bge", "operator"],
        ["bge/quora", "encoder", "bge", "operator"],
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pool", "flan"), "there is nothing to mix"),
        (("--target", "nq"), "name a pool; there are: bge, flan"),
        (("--pool", "flan", "--target", "none"), "pool 'flan' has no expert 'none'"),
        (("--pool", "none", "--target", "nq"), "there is no pool 'none'; there are: bge, flan"),
        (("--pool", "flan", "--weights", "base=0.5"), "must sum to 1"),
    ],
)
def test_what_cannot_be_made_is_told(url: str, capsys: Capture, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(capsys, "create", "not-made", *words)
    assert get(url, "/v1/cocktails?name=not-made")["data"] == []


def test_a_job_that_fails_ends_the_command(server: LiveGateway, url: str, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"query": "a" * 10, "pos": ["b"], "neg": ["c"]}, {"query": "d", "pos": ["e"], "neg": ["f"]}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    engine = server.app.state.gateway.engines["bge"]
    original = engine.mix_ahead
    engine.mix_ahead = None  # a fault of ours
    try:
        words = ("create", "fails", "--pool", "bge", "--examples", tmp_path / "pairs.jsonl")
        code, out, err = run(capsys, *words)
    finally:
        engine.mix_ahead = original
    assert (code, out) == (1, "")
    assert "failed: the job failed by a fault of the server" in err
    _, out, _ = run(capsys, "show", "fails")
    assert "error: the job failed by a fault of the server" in out
    assert answer(capsys, "report", "fails")["report_status"] == "pending"


def test_a_recipe_goes_to_another_server_and_finds_its_pool(
    url: str, gateway: LiveGateway, tmp_path: Path, capsys: Capture, environ: pytest.MonkeyPatch
) -> None:
    made = answer(capsys, "create", "travels", "--pool", "flan", "--weights", "base=0.25,nq=0.75")
    code, exported, _ = run(capsys, "export", "travels")
    assert (code, json.loads(exported)) == (0, made["recipe"])
    (tmp_path / "recipe.json").write_text(exported)
    there = ("--server", gateway.url)
    arrived = answer(capsys, "create", "arrived", "--recipe", tmp_path / "recipe.json", *there)
    assert (arrived["pool"], arrived["recipe"]) == ("flan", made["recipe"])
    environ.setattr(sys, "stdin", io.StringIO(exported))
    assert answer(capsys, "create", "arrived", "--recipe", "-", *there)["id"] == arrived["id"]
    other = {**made["recipe"], "base": "0" * 64}
    (tmp_path / "recipe.json").write_text(json.dumps({k: v for k, v in other.items() if k != "digest"}))
    said = refusal(capsys, "create", "refused", "--recipe", tmp_path / "recipe.json", *there)
    assert "has no pool of the recipe's base 000000000000" in said
    answer(capsys, "delete", "arrived", *there)


class TestChat:
    def test_the_answer_comes_token_by_token(self, url: str, capsys: Capture, environ: pytest.MonkeyPatch) -> None:
        written: list[str] = []

        class Screen(io.StringIO):
            def write(self, text: str) -> int:
                written.append(text)
                return super().write(text)

        screen = Screen()
        environ.setattr(sys, "stdout", screen)
        code, _, err = run(capsys, "chat", "flan/nq", "hello", "--max-tokens", 12, "--temperature", 0)
        assert code == 0, err
        whole = httpx.post(
            f"{url}/v1/chat/completions",
            json={
                "model": "flan/nq",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 12,
                "temperature": 0,
            },
        ).json()
        assert screen.getvalue() == whole["choices"][0]["message"]["content"] + "\n"
        assert len(written) > 6
        assert "cut off at the limit of tokens" in err

    def test_a_token_may_be_what_ends_a_line_elsewhere(self, capsys: Capture, environ: pytest.MonkeyPatch) -> None:
        """vLLM sends text as it is, in UTF-8: separators of lines too, which JSON need not escape."""
        parts = ["a\u2028b", "\x85", "c\u2029", "é" * 9, "\x7f\r\n"]
        chunks = [{"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in parts]
        events = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks).encode()
        body = events + b"data: [DONE]\n\n"
        pieces = [body[begin : begin + 7] for begin in range(0, len(body), 7)]  # also within a character

        def answer_all(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=iter(pieces))

        client = partial(httpx.Client, transport=httpx.MockTransport(answer_all))
        environ.setattr(httpx, "Client", client)
        code, out, err = run(capsys, "chat", "flan", "hello")
        assert (code, out) == (0, "".join(parts)), err

    def test_json_is_the_whole_answer(self, url: str, capsys: Capture) -> None:
        told = answer(capsys, "chat", "flan", "hello", "--max-tokens", 3, "--system", "be brief")
        assert (told["object"], told["model"]) == ("chat.completion", "flan")

    def test_a_message_from_stdin(self, url: str, capsys: Capture, environ: pytest.MonkeyPatch) -> None:
        _, direct, _ = run(capsys, "chat", "flan", "hello", "--max-tokens", 5)
        for words in (("chat", "flan", "-"), ("chat", "flan")):
            environ.setattr(sys, "stdin", io.StringIO("hello\n"))
            assert run(capsys, *words, "--max-tokens", 5)[1] == direct
        environ.setattr(sys, "stdin", io.StringIO(" \n"))
        assert "the message is empty" in refusal(capsys, "chat", "flan", "-")

    def test_a_conversation_remembers_what_was_said(
        self, url: str, capsys: Capture, environ: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[Mapping[str, str]]] = []
        said = iter(["hello", "", "and then?"])

        def stream(client: Any, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            asked.append(body["messages"])
            yield {"choices": [{"delta": {"role": "assistant"}}]}
            for part in ("well", " said"):
                yield {"choices": [{"delta": {"content": part}, "finish_reason": None}]}

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        def read(prompt: str) -> str:
            try:
                return next(said)
            except StopIteration:
                raise EOFError from None

        environ.setattr("cocktail_serve.api_client.ServerClient.stream", stream)
        environ.setattr("builtins.input", read)
        environ.setattr(sys, "stdin", Terminal())
        code, out, _ = run(capsys, "chat", "flan", "--system", "be brief")
        assert (code, out) == (0, "well said\nwell said\n")
        first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        reply = {"role": "assistant", "content": "well said"}
        assert asked == [first, [*first, reply, {"role": "user", "content": "and then?"}]]
        assert "give a message" in refusal(capsys, "chat", "flan", "--json")

    def test_what_the_server_refuses_is_told(self, url: str, capsys: Capture) -> None:
        assert "the model 'none' does not exist" in refusal(capsys, "chat", "none", "hello")
        assert "answered 400" in refusal(capsys, "chat", "bge", "hello")

    def test_a_stream_that_breaks_off_is_an_error(self, server: LiveGateway, url: str, capsys: Capture) -> None:
        (server.faults / "stream_cut").touch()
        code, _, err = run(capsys, "chat", "flan", "hello", "--max-tokens", 50)
        (server.faults / "stream_cut").unlink(missing_ok=True)
        assert code == 1, err
        assert "broke the answer off" in err


class TestWhichServer:
    def test_a_cocktail_answers_by_its_own_recipe_with_the_tenants_key(
        self, guarded: Tenants, capsys: Capture, environ: pytest.MonkeyPatch
    ) -> None:
        key = guarded.key("acme", "use", "create")["key"]
        environ.setenv("COCKTAIL_BASE_URL", guarded.live.url)
        environ.setenv("COCKTAIL_API_KEY", key)
        answer(capsys, "create", "own", "--pool", "flan", "--weights", "base=0.5,nq=0.5")
        code, out, _ = run(capsys, "chat", "own", "hello", "--max-tokens", 8)
        assert code == 0
        asked = {"model": "own", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        whole = httpx.post(
            f"{guarded.live.url}/v1/chat/completions", json=asked, headers={"authorization": f"Bearer {key}"}
        )
        assert out == whole.json()["choices"][0]["message"]["content"] + "\n"
        other = guarded.key("other", "use")["key"]
        assert answer(capsys, "list", "--key", other)["data"] == []
        assert "lacks the scope" in refusal(capsys, "delete", "own", "--key", other)
        assert "not valid" in refusal(capsys, "list", "--key", "ck-0-0")
        environ.delenv("COCKTAIL_API_KEY")
        said = refusal(capsys, "list")
        assert "answered 401: an API key is required" in said
        assert "COCKTAIL_API_KEY" in said

    @pytest.mark.parametrize(
        ("options", "environ", "server", "key"),
        [
            ({}, {}, "http://127.0.0.1:8000", None),
            ({"server": "http://a/v1/", "key": "k"}, {}, "http://a", "k"),
            ({}, {"OPENAI_BASE_URL": "http://o/v1", "OPENAI_API_KEY": "ok"}, "http://o", "ok"),
            ({"key": "k"}, {"OPENAI_BASE_URL": "http://o/v1", "OPENAI_API_KEY": "ok"}, "http://o", "k"),
            ({"server": "http://a"}, {"OPENAI_BASE_URL": "http://o", "OPENAI_API_KEY": "ok"}, "http://a", None),
            ({}, {"OPENAI_API_KEY": "ok"}, "http://127.0.0.1:8000", None),
        ],
        ids=str,
    )
    def test_a_key_of_openai_goes_to_no_other_server(
        self, options: dict[str, str], environ: dict[str, str], server: str, key: str | None
    ) -> None:
        with ServerOptions(**options).client(environ) as client:
            assert client.url == server
            assert client._http.headers.get("authorization") == (None if key is None else f"Bearer {key}")

    def test_a_server_that_is_not_there_is_told(self, capsys: Capture) -> None:
        code, out, err = run(capsys, "list", "--server", "http://127.0.0.1:9")
        assert (code, out) == (1, "")
        assert err.startswith("error: cannot reach http://127.0.0.1:9: ")
        assert "is the server running" in err
        assert "is no address of a server" in refusal(capsys, "list", "--server", "127.0.0.1:9")
