"""Whatever comes in, the parsers return a value or raise one of our errors: nothing else ever reaches a caller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cocktail_serve.cocktails.parsing import parse_inline, parse_request
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.errors import ClientError, ConfigError, InvalidExamplesError, InvalidRequestError
from cocktail_serve.examples import parse_examples, read_jsonl
from cocktail_serve.finetuning.files import check_jsonl
from cocktail_serve.imported_recipe import read_recipe
from cocktail_serve.pool import Kind, Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe

POOL = Pool(
    id="flan",
    kind="decoder",
    base=Member(name="base", path=Path("base"), fingerprint="0" * 64, dtype="float32", num_bytes=0),
    experts={"nq": Member(name="nq", path=Path("nq"), fingerprint="1" * 64, dtype="float32", num_bytes=0)},
    text_digest="2" * 64,
)

CONFIG: dict[str, Any] = {
    "server": {"host": "127.0.0.1", "port": 8000, "auth": "auto"},
    "store": {"cache_dir": "cache", "cache_bytes": "50GB"},
    "pools": [
        {
            "id": "flan",
            "kind": "decoder",
            "base": "models/base",
            "experts": {"nq": "models/nq"},
            "engine": {"type": "vllm", "max_model_len": 2048, "slice_s": 2, "args": {}},
        }
    ],
}

SETTINGS = Settings.model_validate(CONFIG)

COCKTAIL: dict[str, Any] = {
    "name": "mine",
    "pool": "flan",
    "examples": [{"input": "a", "output": "b"}],
    "target": None,
    "alpha": 0.5,
    "temperature": 5.0,
    "weighting": "softmax",
    "method": "linear",
    "method_params": {},
    "experts": ["nq"],
    "seed": 0,
    "merging_weights": None,
    "metadata": {"a": "b"},
}

ROWS: tuple[dict[str, Any], ...] = (
    {"input": "a", "output": "b"},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"query": "a", "pos": ["b"], "neg": ["c"]},
)

VARIABLES = (
    "COCKTAIL_SERVER__PORT",
    "COCKTAIL_STORE",
    "COCKTAIL_POOLS__0",
    "COCKTAIL_SERVER__HOST__X",
    "COCKTAIL_ADMIN_KEY",
)

# lone surrogates too: JSON can escape them, and UTF-8 cannot hold them
TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT

JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def changed(value: Any) -> st.SearchStrategy[Any]:
    """Values like this one in which something, at any depth, was replaced, left out or added."""
    if isinstance(value, dict) and value:
        return st.one_of(
            JSON,
            st.sampled_from(sorted(value)).flatmap(
                lambda key: changed(value[key]).map(lambda new: {**value, key: new})
            ),
            st.sampled_from(sorted(value)).map(lambda key: {k: v for k, v in value.items() if k != key}),
            st.tuples(TEXT, JSON).map(lambda item: {**value, item[0]: item[1]}),
        )
    if isinstance(value, list) and value:
        return st.one_of(JSON, changed(value[0]).map(lambda new: [new, *value[1:]]), st.just(value * 2))
    return JSON


def joined(lines: list[str]) -> bytes:
    return "\n".join(lines).encode()


def only_raises(errors: type[Exception], parse: Callable[[], object]) -> None:
    try:
        parse()
        return
    except errors as error:
        message = str(error)
    assert message, "it says what is wrong"
    json.dumps(message).encode()  # and can be sent


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.sampled_from(ROWS).flatmap(changed) | st.sampled_from(ROWS), max_size=4) | JSON,
    kind=st.sampled_from(get_args(Kind)),
)
def test_examples(rows: Any, kind: Kind) -> None:
    if not isinstance(rows, list):
        rows = [rows]
    only_raises(InvalidExamplesError, lambda: parse_examples(rows, kind, max_examples=3, seed=1))


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        TEXT | st.sampled_from(ROWS).flatmap(changed).map(json.dumps) | st.sampled_from(ROWS).map(json.dumps),
        max_size=4,
    ),
    newline=st.sampled_from(["\n", "\r\n", "\u2028", "\x0b"]),
)
def test_jsonl(lines: list[str], newline: str) -> None:
    only_raises(InvalidExamplesError, lambda: read_jsonl(newline.join(lines)))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=64) | st.lists(st.sampled_from(ROWS).flatmap(changed).map(json.dumps), max_size=4).map(joined)
)
def test_uploaded_files(content: bytes) -> None:
    only_raises(InvalidRequestError, lambda: check_jsonl(content))


@settings(max_examples=300, deadline=None)
@given(changed(COCKTAIL))
def test_cocktail_requests(body: Any) -> None:
    body = body if isinstance(body, dict) else {"name": body}
    only_raises(ClientError, lambda: parse_request(body, settings=SETTINGS, pools={"flan": POOL}, visible=None))


@settings(max_examples=300, deadline=None)
@given(changed({key: value for key, value in COCKTAIL.items() if key not in ("name", "pool")}))
def test_inline_cocktails(cocktail: Any) -> None:
    only_raises(ClientError, lambda: parse_inline(cocktail, pool=POOL, settings=SETTINGS))


@settings(max_examples=300, deadline=None)
@given(changed(make_recipe(POOL, {"base": 0.25, "nq": 0.75}, dtype="bfloat16").to_json()))
def test_recipes(value: Any) -> None:
    only_raises(ClientError, lambda: Recipe.from_json(value).digest)
    only_raises(ClientError, lambda: read_recipe(value).weights_in(POOL, dtype="bfloat16"))
    folders = {"recipe": value, "fingerprints": value, "names": value}
    only_raises(ClientError, lambda: read_recipe(folders).weights_in(POOL, dtype="bfloat16"))


@settings(max_examples=300, deadline=None)
@given(config=changed(CONFIG), environment=st.dictionaries(st.sampled_from(VARIABLES), TEXT, max_size=2))
def test_configurations(tmp_path_factory: pytest.TempPathFactory, config: Any, environment: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8", errors="surrogatepass")
    only_raises(ConfigError, lambda: load_settings(path, environ=environment))


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=80) | st.text(alphabet=" \n\t:-{}[]&*!|>'\"%@`#,?ab1", max_size=60).map(str.encode))
def test_files_that_are_no_configuration(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_bytes(content)
    only_raises(ConfigError, lambda: load_settings(path, environ={}))
