"""Which name was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cocktail_serve.cocktails.parsing import CocktailBody
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.errors import ConfigError, InvalidRequestError
from cocktail_serve.request_schema import fields_beside, parse_as
from cocktail_serve.suggestions import MAX_COMPARED, did_you_mean

EXPERTS = ("ag-news", "nq", "squad")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ag_news", ". Did you mean 'ag-news'?"),
        ("AG-NEWS", ". Did you mean 'ag-news'?"),
        ("sqaud", ". Did you mean 'squad'?"),
        ("hotpotqa", ""),
        ("", ""),
        ("ag-news" * 100, ""),
    ],
)
def test_the_closest_name_is_told_where_one_is_close(given: str, told: str) -> None:
    assert did_you_mean(given, EXPERTS) == told


def test_a_long_list_is_not_looked_through() -> None:
    names = (f"{index:x>20}" for index in range(10_000))
    did_you_mean("films", names)
    assert next(names) == f"{MAX_COMPARED:x>20}"


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        (None, "sevrer", "server"),
        ("server", "prot", "port"),
        ("pool", "expert", "experts"),
        ("engine", "max_modle_len", "max_model_len"),
        ("engine", "quantum", None),
    ],
)
def test_a_key_of_the_configuration(section: str | None, key: str, meant: str | None, tmp_path: Path) -> None:
    engine: dict[str, object] = {"type": "vllm"}
    pool: dict[str, object] = {"id": "flan", "kind": "decoder", "base": "base", "engine": engine}
    server: dict[str, object] = {}
    data: dict[str, object] = {"server": server, "pools": [pool]}
    {None: data, "server": server, "pool": pool, "engine": engine}[section][key] = {}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as refused:
        load_settings(path, environ={})
    said = "Extra inputs are not permitted" + (f". Did you mean {meant!r}?" if meant else "")
    assert refused.value.message.endswith(f"{key}: {said}")


def test_fields_are_those_of_the_place() -> None:
    assert "max_model_len" in fields_beside(Settings, ("pools", 0, "engine", "vllm", "max_modle_len"))
    assert "token_inputs" not in fields_beside(Settings, ("pools", 0, "engine", "vllm", "max_modle_len"))
    assert "revision" in fields_beside(Settings, ("pools", 0, "experts", "nq", "revison"))


def test_a_field_of_a_request() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'temperature'") as refused:
        parse_as(CocktailBody, {"name": "x", "pool": "flan", "tempreature": 1})
    assert refused.value.param == "tempreature"
