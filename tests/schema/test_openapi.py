"""schemathesis on our own OpenAPI document: no 500, no status and no body that the document does not name.

Values are drawn from the document, valid and invalid; where one names a model, a pool, a file or a job, half of them
are replaced by one that is there, since a random name only ever finds the 404.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateways import EXAMPLES, PAIRS, live_gateway

pytestmark = pytest.mark.full

ADMIN = "the-operators-own"
TENANT = "drawn"
MIN_CASES = 5000
CASES_EACH = 180
"""Of each operation, valid and invalid each; those with few distinct values end sooner."""

REQUEST_TIMEOUT_S = 90

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@dataclass
class Api:
    """A gateway that listens, its document, and what is there to name in requests to it."""

    schema: Any
    http: httpx.Client
    key: str
    known: dict[str, list[str]] = field(default_factory=dict)
    num_cases: Counter[str] = field(default_factory=Counter)

    def fill(self) -> None:
        """Makes what requests may name, where an earlier request deleted it."""
        made = [
            self.http.post(
                "/v1/cocktails", params={"wait": 30}, json={"name": f"known-{pool}", "pool": pool, "examples": rows}
            ).json()["id"]
            for pool, rows in (("flan", EXAMPLES), ("bge", PAIRS))
        ]
        content = "\n".join(map(json.dumps, EXAMPLES)).encode()
        file = self.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("f.jsonl", content)}).json()
        models = ["flan", "flan/nq", "bge", "known-flan", "known-bge", *made]
        self.known = {"model": models, "pool": ["flan", "bge"], "file": [file["id"]]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with live_gateway(tmp_path_factory.mktemp("schema"), server={"auth": "required"}, admin_key=ADMIN) as live:
        headers = {"authorization": f"Bearer {ADMIN}"}
        key = httpx.post(f"{live.url}/admin/keys", headers=headers, json={"tenant": TENANT}).json()["key"]
        with httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http:
            yield Api(schemathesis.openapi.from_url(f"{live.url}/openapi.json"), http, key)


def name_what_is_there(case: Any, api: Api) -> None:
    """Replaces every second name of a thing by that of one which is there; the same for the same case."""
    turn = sum(map(ord, repr((case.path_parameters, case.body)))) if case.body or case.path_parameters else 0
    if turn % 2:
        return
    kinds = {"model": "model", "pool": "pool", "ref": "model", "model_id": "model", "name": "model"}
    kinds |= {"pool_id": "pool", "engine_id": "pool", "file_id": "file", "training_file": "file"}
    for parameters in (case.path_parameters, case.body):
        if not isinstance(parameters, dict):
            continue
        for name, kind in kinds.items():
            if isinstance(parameters.get(name), str) and not (name == "name" and parameters is case.body):
                known = api.known[kind]
                parameters[name] = known[turn // 2 % len(known)]
    if isinstance(case.body, dict) and "examples" in case.body:
        case.body["examples"] = EXAMPLES if turn % 4 else PAIRS


def test_every_answer_is_as_documented(api: Api) -> None:
    failures = []
    with requests.Session() as session:
        for result in api.schema.get_all_operations():
            operation = result.ok()
            for mode in schemathesis.GenerationMode:
                try:
                    try_operation(api, session, operation, mode)
                except Unsatisfiable:
                    continue  # nothing in a request to it could be wrong
                except (Exception, BaseExceptionGroup) as error:
                    failures.append(f"{operation.label} ({mode.value}): {error}")
    assert not failures, "\n\n".join(failures)
    print(api.num_cases)
    assert api.num_cases.total() >= MIN_CASES, api.num_cases


def try_operation(api: Api, session: requests.Session, operation: Any, mode: schemathesis.GenerationMode) -> None:
    """Sends requests to one operation that fit the document, or that do not."""
    api.fill()
    key = ADMIN if operation.path.startswith("/admin") else api.key

    @settings(
        max_examples=CASES_EACH, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck
    )
    @given(case=operation.as_strategy(mode))
    def answers(case: schemathesis.Case) -> None:
        name_what_is_there(case, api)
        api.num_cases[operation.label] += 1
        case.call_and_validate(
            checks=CHECKS, session=session, headers={"Authorization": f"Bearer {key}"}, timeout=REQUEST_TIMEOUT_S
        )

    answers()
