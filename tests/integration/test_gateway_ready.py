"""What a gateway says of an engine that cannot start: to everybody, and to the operator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cocktail_serve.gateway.app import create_app
from tests.gateways import DEADLINE_S, make_pools, make_settings

ADMIN = {"authorization": "Bearer the-operators-own"}
MEANT = "unrecognized arguments: --max-modell-len (did you mean --max-model-len?) 9"


@pytest.mark.parametrize("auth", ["off", "required"])
def test_the_log_of_a_failed_start_is_shown_to_the_operator(tmp_path: Path, auth: str) -> None:
    settings = make_settings(
        tmp_path,
        engine={"args": {"max-modell-len": 9}},
        server={"auth": auth},
        admin_key="the-operators-own",
    )
    with TestClient(create_app(settings, pools=make_pools(tmp_path, settings))) as http:

        def found() -> dict[str, Any]:
            answer = http.get("/ready")
            assert answer.status_code == 503
            pool: dict[str, Any] = answer.json()["pools"]["flan"]
            return pool

        deadline = time.monotonic() + DEADLINE_S
        while found()["state"] == "starting":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pool = found()
        assert pool["state"] == "failed"
        assert pool["detail"]["reason"].startswith(f"{MEANT}; mend it and start the server again")
        assert ("log" in pool["detail"]) == (auth == "off")
        shown = http.get("/admin/engines/flan", headers=ADMIN).json()["detail"]["log"]
        assert shown[-1].endswith("error: unrecognized arguments: --max-modell-len 9")
        if auth == "off":
            assert pool["detail"]["log"] == shown
