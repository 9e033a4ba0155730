"""`doctor`: problems are found before a server is started."""

import asyncio
import json
import socket
import sqlite3
from contextlib import ExitStack, closing

import pytest
import yaml
from sqlalchemy import insert

from cocktail_serve.cli.doctor import installation
from cocktail_serve.config import load_settings
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.gateway.run_dir import own_run_dir
from cocktail_serve.merging import native
from tests import command_line
from tests.adapters import train_adapter
from tests.models import make_decoder, make_encoder_pool, pool_section


@pytest.fixture
def write_config(tmp_path):
    pool = make_encoder_pool(tmp_path / "bge", ("quora",))

    def write(**changes):
        content = {
            "server": {"port": 0},
            "store": {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 1000},
            "pools": [pool_section("bge", "encoder", pool, {"type": "sentence_transformers"})],
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def run(capsys, *args: object) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = command_line.run(capsys, "doctor", *args, "--json")
    return code, {check["name"]: check for check in json.loads(out)["checks"]}


def test_a_working_configuration_has_no_problem(write_config, capsys):
    code, checks = run(capsys, write_config())
    assert code == 0
    assert "base and 1 experts can be mixed" in checks["pool bge"]["detail"]
    assert checks["vLLM plugin"]["status"] == "ok"
    assert checks["store"]["status"] == "ok"


def test_a_port_in_use_is_a_problem(write_config, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, checks = run(capsys, write_config(server={"port": taken.getsockname()[1]}))
    assert code == 1
    assert "in use" in checks["address"]["detail"]
    assert checks["pool bge"]["status"] == "ok"


def test_a_server_that_runs_on_the_configuration_is_no_problem(write_config, capsys):
    """What is mended is checked before the server is started again: other pools may be served until then."""
    with socket.create_server(("127.0.0.1", 0)) as taken, ExitStack() as stack:
        path = write_config(server={"port": taken.getsockname()[1]})
        own_run_dir(load_settings(path), stack)
        code, checks = run(capsys, path)
        alone_code, alone = run(capsys, write_config())  # another address, and the store of a server that runs
    assert code == 0
    assert checks["address"]["status"] == "warning"
    assert "a server of this configuration runs" in checks["address"]["detail"]
    assert checks["store"]["status"] == "ok"
    assert (alone_code, alone["store"]["status"]) == (1, "problem")
    assert "another server" in alone["store"]["detail"]


def test_an_expert_that_does_not_fit_is_a_problem(write_config, tmp_path, capsys):
    base, wide = make_decoder(tmp_path / "base"), make_decoder(tmp_path / "wide", hidden_size=128)
    pool = {"id": "p", "kind": "decoder", "base": str(base), "experts": {"wide": str(wide)}, "engine": {"type": "fake"}}
    code, checks = run(capsys, write_config(pools=[pool]))
    assert code == 1
    assert "embed_tokens" in checks["pool p"]["detail"]


def test_a_folder_that_is_not_there_is_named_by_its_whole_path(write_config, tmp_path, capsys):
    """Which says where it was looked for: beside the configuration, whatever the current folder is."""
    section = pool_section("bge", "encoder", {"base": "./bge/bas"}, {"type": "sentence_transformers"})
    code, checks = run(capsys, write_config(pools=[section]))
    assert (code, checks["pool bge"]["status"]) == (1, "problem")
    whole = tmp_path / "bge" / "bas"
    assert f"there is no model folder {whole}. Did you mean 'base'?" in checks["pool bge"]["detail"]


def test_an_open_address_without_a_key_is_a_problem(write_config, monkeypatch, capsys):
    monkeypatch.delenv("COCKTAIL_ADMIN_KEY", raising=False)
    path = write_config(server={"host": "0.0.0.0", "port": 0})
    code, checks = run(capsys, path)
    assert (code, checks["keys"]["status"]) == (1, "problem")
    monkeypatch.setenv("COCKTAIL_ADMIN_KEY", "secret")
    code, checks = run(capsys, path)
    assert (code, checks["keys"]["status"]) == (0, "ok")


def test_an_open_server_is_told_of(write_config, tmp_path, capsys):
    asyncio.run(_make_registry(tmp_path / "cache" / "registry.sqlite", tenants=["default"]))
    code, checks = run(capsys, write_config())
    assert (code, checks["keys"]["status"]) == (0, "ok")
    assert checks["keys"]["detail"] == "not required: server.auth is 'auto' and server.host 127.0.0.1"
    assert "tenants" not in checks
    asyncio.run(_make_registry(tmp_path / "cache" / "registry.sqlite", tenants=["acme"]))
    code, checks = run(capsys, write_config())
    assert (code, checks["tenants"]["status"]) == (0, "warning")
    assert checks["tenants"]["detail"].startswith("acme: who sends no key is answered too, as 'default'")
    _, checks = run(capsys, write_config(server={"port": 0, "host": "0.0.0.0", "auth": "off"}))
    assert checks["keys"]["status"] == "warning"
    assert "though 0.0.0.0 is no loopback address" in checks["keys"]["detail"]


def test_an_unknown_key_is_a_problem(write_config, capsys):
    code, checks = run(capsys, write_config(sevrer={}))
    assert code == 1
    assert "sevrer" in checks["configuration"]["detail"]


def test_too_little_room_is_a_warning(write_config, tmp_path, capsys):
    code, checks = run(capsys, write_config(store={"cache_dir": str(tmp_path), "cache_bytes": "1000TB"}))
    assert (code, checks["store"]["status"]) == (0, "warning")


def test_it_says_which_mixing_kernel_is_used(monkeypatch, capsys):
    _, checks = run(capsys)
    found = native.load_kernel()
    assert checks["mixing kernel"]["status"] == ("ok" if isinstance(found, native.Kernel) else "warning")
    monkeypatch.setattr(installation, "load_kernel", lambda: "there is no C compiler")
    _, checks = run(capsys)
    assert checks["mixing kernel"]["status"] == "warning"
    assert checks["mixing kernel"]["detail"] == "torch: the same bits, several times slower: there is no C compiler"


def test_it_says_what_is_wrong_on_a_screen(write_config, capsys):
    _, out, _ = command_line.run(capsys, "doctor", write_config(sevrer={}))
    assert "✗ configuration" in out
    assert "✓ python" in out


def test_roots_of_experts_are_looked_at(write_config, tmp_path, capsys):
    fine, loose = tmp_path / "fine", tmp_path / "loose"
    fine.mkdir(mode=0o755)
    loose.mkdir()
    loose.chmod(0o777)
    roots = [str(fine), str(loose), str(tmp_path / "none")]
    code, checks = run(capsys, write_config(server={"port": 0, "expert_roots": roots}))
    assert code == 1
    assert [checks[f"expert root {root}"]["status"] for root in roots] == ["ok", "warning", "problem"]


def test_the_registry_is_looked_at_and_none_is_made(write_config, tmp_path, capsys):
    _, checks = run(capsys, write_config())
    assert (checks["registry"]["status"], "not there yet" in checks["registry"]["detail"]) == ("ok", True)
    registry = tmp_path / "cache" / "registry.sqlite"
    assert not registry.exists()
    asyncio.run(_make_registry(registry, expert=tmp_path / "gone"))
    code, checks = run(capsys, write_config(server={"port": 0, "expert_roots": [str(tmp_path)]}))
    assert (code, checks["registry"]["status"]) == (1, "ok")
    assert checks["expert bge/new"]["status"] == "problem"
    with closing(sqlite3.connect(registry)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    _, checks = run(capsys, write_config())
    assert checks["registry"]["status"] == "warning"
    with closing(sqlite3.connect(registry)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    code, checks = run(capsys, write_config())
    assert (code, checks["registry"]["status"]) == (1, "problem")


def test_a_store_that_is_not_there_is_a_problem(write_config, capsys):
    store = {"url": "postgresql://nobody@127.0.0.1:1/none", "cache_bytes": 1000}
    code, checks = run(capsys, write_config(store=store))
    assert (code, checks["registry"]["status"]) == (1, "problem")


async def _make_registry(path, *, expert=None, tenants=()):
    database = Database(f"sqlite:///{path}")
    await database.open()
    async with database.write() as connection:
        row = {"pool": "bge", "name": "new", "path": str(expert), "fingerprint": "0" * 64, "added_at": 0.0}
        if expert is not None:
            await connection.execute(insert(tables.experts).values(**row))
        for tenant in tenants:
            await connection.execute(insert(tables.tenants).values(name=tenant, created_at=0.0))
    await database.close()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_chat_template_is_looked_for_beside_the_configuration(write_config, tmp_path, capsys, is_there):
    base = make_decoder(tmp_path / "base")
    if is_there:
        (tmp_path / "chat.jinja").write_text("{{ messages }}")
    engine = {"type": "fake", "args": {"chat-template": "chat.jinja"}}
    code, checks = run(capsys, write_config(pools=[pool_section("flan", "decoder", {"base": base}, engine)]))
    assert code == (0 if is_there else 1)
    assert checks["pool flan"]["status"] == ("ok" if is_there else "problem")
    if not is_there:
        assert "engine.args.chat-template: there is no file chat.jinja" in checks["pool flan"]["detail"]


def test_it_says_how_a_decoder_pool_is_served_and_why(write_config, tmp_path, capsys):
    base = make_decoder(tmp_path / "base")
    lora = train_adapter(base, tmp_path / "lora").folder
    full = make_decoder(tmp_path / "full", perturbation_seed=1)

    def told(experts, **engine):
        section = pool_section("flan", "decoder", {"base": base, **experts}, {"type": "fake", **engine})
        return run(capsys, write_config(pools=[section]))

    code, checks = told({"lora": lora})
    assert (code, checks["pool flan: mode"]["status"]) == (0, "ok")
    size = (lora / "adapter_model.safetensors").stat().st_size / 1e6
    assert "unmerged: all experts of the configuration are LoRA adapters" in checks["pool flan: mode"]["detail"]
    assert f"their factors, {size:.1f} MB as stored" in checks["pool flan: mode"]["detail"]
    _, checks = told({"lora": lora}, mode="merged")
    assert checks["pool flan: mode"]["detail"] == "merged: engine.mode is merged"
    code, checks = told({"full": full, "lora": lora})
    assert code == 0
    assert checks["pool flan: mode"]["detail"].startswith("merged: expert 'full': it is a full model")
    code, checks = told({"full": full, "lora": lora}, mode="unmerged")
    assert (code, checks["pool flan"]["status"]) == (1, "problem")
    assert "engine.mode is unmerged, and expert 'full'" in checks["pool flan"]["detail"]
