"""The registry's file is taken away under a server: it says so, makes no other, and goes on when it is back."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests import command_line
from tests.gateways import EXAMPLES, live_gateway
from tests.tenants import ask, code_of, make


def test_a_registry_that_vanishes_under_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with live_gateway(tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        registry = live.settings.store.registry_path
        make(http, "known")
        away = tmp_path / "away"
        registry.rename(away)
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert {pool["state"] for pool in ready.json()["pools"].values()} == {"ready"}
        assert f"the registry {registry} is gone" in ready.json()["registry"]
        assert ask(http, "known").status_code == 200, "what is in memory is served"
        refused = http.post("/v1/cocktails", json={"name": "new", "pool": "flan", "examples": EXAMPLES})
        assert (refused.status_code, code_of(refused)) == (503, "storage_error")

        config = command_line.write_config(tmp_path, store={"cache_dir": str(registry.parent)})
        for command in (("keys", "list"), ("keys", "create", "--tenant", "acme"), ("limits", "show"), ("usage",)):
            code, out, err = command_line.run(capsys, *command, "--config", config)
            assert (code, out) == (1, ""), command
            assert f"error: there is no registry {registry}: the first start of the server makes it" in err
        assert not registry.exists()
        errors = [
            record
            for record in caplog.records
            # what could not be written meanwhile is told by whoever would have written it
            if record.levelname == "ERROR" and record.name.startswith("cocktail_serve.database")
        ]
        assert [record.getMessage().partition(" (")[0] for record in errors] == [f"the registry {registry} is gone"]

        away.rename(registry)
        assert (http.get("/ready").status_code, http.get("/ready").json()["registry"]) == (200, None)
        make(http, "new")
        assert {cocktail["name"] for cocktail in http.get("/v1/cocktails").json()["data"]} == {"known", "new"}
