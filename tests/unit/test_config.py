"""The configuration file: read once, unknown keys refused, environment on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from platformdirs import user_data_path

from cocktail_serve.config import (
    TEMPERATURES,
    FakeEngineConfig,
    SentenceTransformersEngineConfig,
    Settings,
    VLLMEngineConfig,
    load_settings,
)
from cocktail_serve.errors import ConfigError
from cocktail_serve.pool import Kind

POOL: dict[str, Any] = {
    "id": "flan",
    "kind": "decoder",
    "base": "models/base",
    "experts": {"ag-news": "models/ag-news", "hub": {"path": "someone/expert", "revision": "abc123"}},
    "engine": {"type": "vllm", "max_model_len": 2048, "slice_s": 0.5, "args": {"enforce-eager": True}},
}

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(data: Any, environ: dict[str, str] | None = None) -> Settings:
        path = tmp_path / "config.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return load_settings(path, environ=environ or {})

    return load


def with_pool(**changes: Any) -> dict[str, Any]:
    return {"pools": [{**POOL, **changes}]}


def test_a_whole_configuration(load: Load, tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    settings = load(
        {
            "server": {"host": "0.0.0.0", "port": 9000},
            "store": {"url": "sqlite:///state/registry.db", "cache_dir": "cache", "cache_bytes": "50GB"},
            **with_pool(),
        }
    )
    pool = settings.pool("flan")
    assert isinstance(pool.engine, VLLMEngineConfig)
    assert pool.engine.args == {"enforce-eager": True}
    assert settings.store.cache_bytes == 50 * 1000**3
    # relative to the file
    assert settings.store.cache_dir == tmp_path / "cache"
    assert settings.store.database_url == f"sqlite:///{tmp_path}/state/registry.db"
    assert pool.base.path == str(tmp_path / "models" / "base")
    # what is no folder may be a hub id and stays as it is
    assert pool.experts["hub"].path == "someone/expert"
    assert pool.experts["hub"].revision == "abc123"


def test_defaults(load: Load, tmp_path: Path) -> None:
    settings = load(with_pool())
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert (settings.defaults.alpha, settings.defaults.weighting) == (0.5, "softmax")
    assert {kind: settings.defaults.temperature_of(kind) for kind in TEMPERATURES} == TEMPERATURES
    assert set(TEMPERATURES) == set(get_args(Kind))
    assert settings.store.database_url == f"sqlite:///{user_data_path('cocktail-serve')}/registry.sqlite"
    assert settings.store.former_registry_path == settings.store.cache_dir / "registry.sqlite"
    assert settings.store.cache_dir == Path("~/.cache/cocktail-serve").expanduser()


@pytest.mark.parametrize(
    ("host", "auth", "required"),
    [
        ("127.0.0.1", "auto", False),
        ("localhost", "auto", False),
        ("::1", "auto", False),
        ("127.8.8.8", "auto", False),
        ("0.0.0.0", "auto", True),
        ("::", "auto", True),
        ("gateway.internal", "auto", True),
        ("0.0.0.0", "off", False),
        ("127.0.0.1", "required", True),
    ],
)
def test_a_key_is_required_off_loopback(load: Load, host: str, auth: str, required: bool) -> None:
    assert load({"server": {"host": host, "auth": auth}, **with_pool()}).server.requires_key is required


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"servr": {}, **with_pool()}, "servr"),
        ({"server": {"prot": 1}, **with_pool()}, "server.prot"),
        ({"server": {"port": 70000}, **with_pool()}, "server.port"),
        ({"server": {"port": "http"}, **with_pool()}, "server.port"),
        ({"server": {"auth": "maybe"}, **with_pool()}, "server.auth"),
        ({"store": {"cache_bytes": "much"}, **with_pool()}, "store.cache_bytes"),
        ({"defaults": {"temperature": 0}, **with_pool()}, "defaults.temperature"),
        ({"defaults": {"temperature": float("nan")}, **with_pool()}, "defaults.temperature"),
        ({"defaults": {"alpha": 1.5}, **with_pool()}, "defaults.alpha"),
        ({"pools": []}, "pools"),
        ({"server": {}}, "pools"),
        (with_pool(expert={}), "pools.0.expert"),
        (with_pool(id="Flan"), "pools.0.id"),
        (with_pool(id="base"), "reserved"),
        (with_pool(experts={"base": "x"}), "reserved"),
        (with_pool(experts={"AG": "x"}), "pools.0.experts.AG"),
        (with_pool(experts={"a": {"path": "x", "trust": True}}), "pools.0.experts.a.trust"),
        (with_pool(kind="image"), "pools.0.kind"),
        (with_pool(kind="encoder"), "an encoder pool needs engine.type sentence_transformers"),
        (with_pool(engine={"type": "sentence_transformers"}), "a decoder pool needs engine.type vllm or fake"),
        (with_pool(engine={"type": "tgi"}), "pools.0.engine"),
        (with_pool(engine={"type": "vllm", "slice": 1}), "slice"),
        (with_pool(engine={"type": "vllm", "max_model_len": 1}), "max_model_len"),
        (with_pool(engine={"type": "vllm", "dtype": "int8"}), "dtype"),
        ({"pools": [POOL, POOL]}, "twice there: ['flan']"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(load: Load, data: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(data)
    assert named in caught.value.message
    assert "config.yaml" in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pools: [", "as YAML"),
        ("", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("server: {port: 1}\nserver: {port: 2}", "'server' is there twice"),
        ("pools: [{id: a, experts: {nq: x, nq: y}}]", "'nq' is there twice"),
        ("pools: !!python/object/apply:os.getpid []", "as YAML"),
    ],
)
def test_what_is_no_configuration(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_settings(tmp_path / "none.yaml", environ={})
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path, environ={})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path / "binary.yaml", environ={})


def test_environment_lies_on_top(load: Load) -> None:
    environ = {
        "COCKTAIL_SERVER__PORT": "9001",
        "COCKTAIL_DEFAULTS__TEMPERATURE": "0.5",
        "COCKTAIL_MAX_INLINE_COCKTAILS": "7",
        "COCKTAIL_API_KEY": "somebody else's",
        "PATH": "/bin",
    }
    settings = load({"server": {"port": 9000, "host": "::1"}, **with_pool()}, environ)
    assert (settings.server.port, settings.server.host) == (9001, "::1")
    assert settings.defaults.temperature == settings.defaults.temperature_of("encoder") == 0.5
    assert settings.max_inline_cocktails == 7


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("COCKTAIL_SERVER__PROT", "1", "server.prot"),
        ("COCKTAIL_SERVER__PORT", "[", "COCKTAIL_SERVER__PORT as YAML"),
        ("COCKTAIL_POOLS__0__ID", "x", "steps into 'pools'"),
        ("COCKTAIL_SRVER__PORT", "1", "srver"),
    ],
)
def test_an_environment_variable_that_is_wrong_is_named(load: Load, variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(with_pool(), {variable: value})


def test_the_admin_key_comes_from_the_environment_alone_and_is_never_shown(load: Load) -> None:
    settings = load(with_pool(), {"COCKTAIL_ADMIN_KEY": "1234"})
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "1234"
    assert "1234" not in repr(settings)
    with pytest.raises(ConfigError, match="never read from a file"):
        load({"admin_key": "1234", **with_pool()})


def test_unknown_pool_names_those_there_are(load: Load) -> None:
    with pytest.raises(ConfigError, match="no pool 'nope'; it has: flan"):
        load(with_pool()).pool("nope")


@pytest.mark.parametrize(
    ("kind", "engine", "expected"),
    [
        ("decoder", {"type": "fake"}, FakeEngineConfig),
        ("encoder", {"type": "sentence_transformers", "dtype": "bfloat16"}, SentenceTransformersEngineConfig),
        ("reranker", {"type": "sentence_transformers"}, SentenceTransformersEngineConfig),
    ],
)
def test_engines_by_kind(load: Load, kind: str, engine: dict[str, str], expected: type) -> None:
    assert type(load(with_pool(kind=kind, engine=engine)).pool("flan").engine) is expected


def test_a_folder_that_is_not_there_is_named_whole(load: Load, tmp_path: Path) -> None:
    """So that an error says where it was looked for. What may be a hub id stays as it is."""
    experts = {"up": "../models/x", "deep": "models/llama/x", "hub": "someone/x", "plain": "gpt2"}
    settings = load({"pools": [POOL | {"base": "./base", "experts": experts}], "store": {"cache_dir": "../cache"}})
    pool = settings.pools[0]
    assert pool.base.path == str(tmp_path / "base")
    assert {name: source.path for name, source in pool.experts.items()} == {
        "up": str(tmp_path.parent / "models" / "x"),
        "deep": str(tmp_path / "models" / "llama" / "x"),
        "hub": "someone/x",
        "plain": "gpt2",
    }
    assert settings.store.cache_dir == tmp_path.parent / "cache"


def test_paths_in_engine_arguments_are_relative_to_the_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "defaults").mkdir()
    args = {
        "chat-template": "chat.jinja",
        "--generation_config": "defaults",
        "tool-parser-plugin": "chat.jinja",  # not known to be a path
    }
    engine = load(with_pool(engine={"type": "vllm", "args": args})).pools[0].engine
    assert isinstance(engine, VLLMEngineConfig)
    assert engine.args == {
        "chat-template": str(tmp_path / "chat.jinja"),
        "--generation_config": str(tmp_path / "defaults"),
        "tool-parser-plugin": "chat.jinja",
    }
    assert engine.argument("generation-config") == str(tmp_path / "defaults")
    assert engine.argument("max-num-seqs") is None
    for template in ("{{ messages }}", "x" * 10_000, "{% set a = 1 %}\nchat.jinja", "vllms_own.jinja"):
        engine = load(with_pool(engine={"type": "vllm", "args": {"chat-template": template}})).pools[0].engine
        assert isinstance(engine, VLLMEngineConfig)
        assert engine.argument("chat-template") == template


def test_replicas_have_a_device_each_or_share_all(load: Load) -> None:
    def engine(**more: Any) -> Any:
        return load({"pools": [POOL | {"engine": POOL["engine"] | more}]}).pools[0].engine

    assert (engine().replicas, engine().devices) == (1, [])
    assert engine(replicas=2).devices == []
    assert engine(replicas=2, devices=["0", "1,2"]).devices == ["0", "1,2"]
    with pytest.raises(ConfigError, match="1 entries for 2 replicas"):
        engine(replicas=2, devices=["0"])
    with pytest.raises(ConfigError, match="env sets CUDA_VISIBLE_DEVICES, which devices sets"):
        engine(devices=["0"], env={"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(ConfigError, match=r"engine\.vllm\.replicas"):
        engine(replicas=0)


@pytest.mark.parametrize("kind", ["encoder", "reranker"])
def test_models_in_the_gateways_process_have_no_replicas(load: Load, kind: Kind) -> None:
    pool = POOL | {"kind": kind, "engine": {"type": "sentence_transformers", "replicas": 2}}
    with pytest.raises(ConfigError, match=r"compute inside the gateway's process.*run several gateways"):
        load({"pools": [pool]})
