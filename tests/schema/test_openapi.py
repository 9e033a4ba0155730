"""schemathesis on our own OpenAPI document: no 500, no status and no body that the document does not name.

Values are drawn from the document, valid and invalid; where one names a model, a pool, a file or a job, half of them
are replaced by one that is there, since a random name only ever finds the 404.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
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
from tests.models import make_decoder, make_encoder

pytestmark = pytest.mark.full

ADMIN = "the-operators-own"
TENANT = "drawn"
MIN_CASES = 5000
CASES_EACH = 180
"""Of each operation, valid and invalid each; those with few distinct values end sooner."""

NOT_SERVED = {
    "POST /v1/responses/input_tokens",
    "POST /v1/responses/compact",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}/input_items",
    "POST /v1/responses/{response_id}/cancel",
}
"""What needs responses that were kept: 501, as documented."""

NEVER_RIGHT = NOT_SERVED | {
    "POST /admin/engines/{engine_id}/restart",
    "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
}
"""And what jobs of seconds, and pools of one engine, do not offer: 400, as documented."""

REQUEST_TIMEOUT_S = 90

EXPERTS = {"flan": "decoder-new", "bge": "encoder-new"}
"""Models that may be added, by pool."""

ADDED = "added"
"""Name of an expert that is there to be removed."""

BATCH_LINES = b"\n".join(
    json.dumps(
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"model": "flan", "prompt": "a"}}
    ).encode()
    for number in range(20)
)

JSONL = "\n".join(map(json.dumps, EXAMPLES)).encode()

KINDS = {
    "model": "model",
    "model_id": "model",
    "ref": "model",
    "name": "model",
    "pool": "pool",
    "pool_id": "pool",
    "engine_id": "pool",
    "file_id": "file",
    "training_file": "file",
    "input_file_id": "batch_file",
    "batch_id": "batch",
    "key_id": "key",
    "job_id": "job",
    "path": "folder",
}
"""Fields and path parameters by what they name."""


def no_fault_of_the_server(ctx: Any, response: Any, case: Any) -> bool | None:
    """As schemathesis's own, but for what says that it is not served."""
    if response.status_code == 501 and response.json()["error"]["code"] == "not_served":
        return None
    return not_a_server_error(ctx, response, case)


CHECKS = [
    no_fault_of_the_server,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@dataclass
class Api:
    """A gateway that listens, its document, and what is there to name in requests to it."""

    schema: Any
    url: str
    key: str
    examples: Mapping[str, list[dict[str, Any]]]
    known: dict[str, list[str]] = field(default_factory=dict)
    statuses: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    num_jobs: int = 0

    def key_for(self, path: str) -> str:
        return ADMIN if path.startswith("/admin") else self.key

    def post(self, path: str, **request: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.key_for(path)}"}
        response = httpx.post(f"{self.url}{path}", headers=headers, timeout=60, **request)
        assert response.status_code < 300, f"POST {path}: {response.text}"
        made: dict[str, Any] = response.json()
        return made

    def fill(self) -> None:
        """Makes what requests may name, where an earlier request deleted it, and sets engines going again."""
        for pool in self.examples:
            self.post(f"/admin/engines/{pool}", json={"pin": None, "drain": False})
            if pool in EXPERTS:
                self.post(f"/admin/pools/{pool}/experts", json={"name": ADDED, "path": EXPERTS[pool]})
        made = [
            self.post("/v1/cocktails?wait=30", json={"name": f"known-{pool}", "pool": pool, "examples": rows})["id"]
            for pool, rows in self.examples.items()
        ]
        file = self.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("f.jsonl", JSONL)})
        lines = self.post("/v1/files", data={"purpose": "batch"}, files={"file": ("b.jsonl", BATCH_LINES)})
        spare = self.post("/admin/keys", json={"tenant": "spare"})
        self.known = {
            "model": [*self.examples, *(f"known-{pool}" for pool in self.examples), *made],
            "pool": list(self.examples),
            "file": [file["id"]],
            "batch_file": [lines["id"]],
            "key": [spare["id"]],
            "folder": list(EXPERTS.values()),
        }
        self.known["job"] = [self.make_job()]
        self.known["batch"] = [self.make_batch()]

    def make_job(self) -> str:
        """Id of a job that has just begun."""
        self.num_jobs += 1
        body = {"model": "flan", "training_file": self.known["file"][0], "seed": self.num_jobs}
        return str(self.post("/v1/fine_tuning/jobs", json=body)["id"])

    def make_batch(self) -> str:
        """Id of a batch that has just begun, once a tenant's number of them leaves room for it."""
        body = {"input_file_id": self.known["batch_file"][0], "endpoint": "/v1/completions", "completion_window": "24h"}
        headers = {"authorization": f"Bearer {self.key}"}
        for _ in range(100):
            response = httpx.post(f"{self.url}/v1/batches", headers=headers, timeout=60, json=body)
            if response.status_code == 200:
                return str(response.json()["id"])
            assert response.status_code == 429, response.text
            time.sleep(0.2)
        raise AssertionError("no batch has ended in twenty seconds")


@pytest.fixture(scope="module", params=["encoder", "reranker"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With one kind of pool in this process beside the decoders'."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    examples = {"flan": EXAMPLES, {"encoder": "bge", "reranker": "ranker"}[kind]: PAIRS}
    make_decoder(folder / "decoder")
    make_decoder(folder / "roots" / EXPERTS["flan"], perturbation_seed=7)
    make_encoder(folder / "roots" / EXPERTS["bge"], perturbation_seed=7)
    server = {"auth": "required", "expert_roots": [str(folder / "roots")]}
    with live_gateway(folder, reranker=kind == "reranker", server=server, admin_key=ADMIN) as live:
        schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
        # what is no reranker's was tried on the other gateway
        schema = schema.include(path="/v1/rerank") if kind == "reranker" else schema.exclude(path="/v1/rerank")
        api = Api(schema, live.url, "", examples)
        api.key = api.post("/admin/keys", json={"tenant": TENANT})["key"]
        yield api


def make_it_fit(case: Any, api: Api) -> None:
    """Of every second case, has names stand for what is there, and examples be fit; the same for the same case."""
    turn = zlib.crc32(repr((case.path_parameters, case.body)).encode())
    if turn % 2:
        return
    if case.operation.label == "POST /v1/fine_tuning/jobs/{job_id}/cancel":
        api.known["job"] = [api.make_job()]
    if case.operation.label == "POST /v1/batches/{batch_id}/cancel":
        api.known["batch"] = [api.make_batch()]
    for parameters in (case.path_parameters, case.body):
        if not isinstance(parameters, dict):
            continue
        for name, kind in KINDS.items():
            if isinstance(parameters.get(name), str) and not (name == "name" and parameters is case.body):
                parameters[name] = api.known[kind][turn // 2 % len(api.known[kind])]
    if case.operation.label == "DELETE /admin/pools/{pool_id}/experts/{name}":
        case.path_parameters["name"] = ADDED
    if case.operation.label == "POST /admin/pools/{pool_id}/experts" and isinstance(case.body, dict):
        case.body["name"] = f"n{turn % 3}"
    if not isinstance(case.body, dict):
        return
    if "examples" in case.body:
        pool = list(api.examples)[turn // 2 % len(api.examples)]
        # options exclude each other: the name and one of them
        kept = list(case.body)[turn // 4 % len(case.body)]
        case.body = {kept: case.body[kept], "name": f"n{turn}", "pool": pool, "examples": api.examples[pool]}
    if "file" in case.body:
        case.body = {"file": JSONL, "purpose": "fine-tune"}


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
                except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # one report of all operations
                    failures.append(f"{operation.label} ({mode.value}): {error}")
    assert not failures, "\n\n".join(failures)
    if "POST /v1/rerank" not in api.statuses:
        assert sum(statuses.total() for statuses in api.statuses.values()) >= MIN_CASES
    refused = {label for label, statuses in api.statuses.items() if min(statuses) >= 300} - NEVER_RIGHT
    assert not refused, f"no request to these was ever right, so nothing was shown: {refused}"


def try_operation(api: Api, session: requests.Session, operation: Any, mode: schemathesis.GenerationMode) -> None:
    """Sends requests to one operation that fit the document, or that do not."""
    api.fill()
    headers = {"Authorization": f"Bearer {api.key_for(operation.path)}"}

    @settings(
        max_examples=CASES_EACH, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(mode))
    def answers(case: schemathesis.Case) -> None:
        make_it_fit(case, api)
        response = case.call_and_validate(checks=CHECKS, session=session, headers=headers, timeout=REQUEST_TIMEOUT_S)
        api.statuses[operation.label][response.status_code] += 1

    answers()
