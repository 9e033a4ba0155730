"""What is shipped to watch and to run a server, held to a server: each query finds what `/metrics` shows, each flag,
variable and path is there."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cocktail_serve.config import load_settings
from tests.gateways import EXAMPLES, eventually, live_gateway

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "configs" / "monitoring"
COMPOSE = ROOT / "configs" / "compose" / "compose.yaml"
UNIT = ROOT / "configs" / "systemd" / "cocktail-serve.service"

SCRAPED = frozenset({"job", "instance"})
"""Labels that Prometheus adds."""

_SELECTOR = re.compile(r"\b((?:cocktail_|process_|vllm:)\w+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")
_MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((MONITORING / "dashboard.json").read_text())


def queries(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def alerts() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def gateway_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has done a little of everything: two replicas, swaps, embeddings, an error."""
    with (
        live_gateway(tmp_path_factory.mktemp("watched"), engine={"replicas": 2}) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        eventually(lambda: http.get("/ready").json()["pools"]["flan"]["replicas"] == ["ready", "ready"], "the start")
        body = {"name": "watched", "pool": "flan", "examples": EXAMPLES}
        assert http.post("/v1/cocktails?wait=30", json=body).json()["status"] == "ready"
        for model in ("flan", "watched", "flan/nq"):
            chat = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            assert http.post("/v1/chat/completions", json=chat).status_code == 200
        assert http.post("/v1/embeddings", json={"model": "bge", "input": "a"}).status_code == 200
        assert http.post("/v1/embeddings", json={"model": "nothing", "input": "a"}).status_code == 404
        yield live.url


@pytest.fixture(scope="module")
def labels_of(gateway_url: str) -> dict[str, set[str]]:
    """Labels by name of sample."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(httpx.get(f"{gateway_url}/metrics").text):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    return dict(found)


def test_each_query_asks_for_what_is_there(dashboard: Any, labels_of: dict[str, set[str]]) -> None:
    for query in [*queries(dashboard), *alerts()]:
        selectors = _SELECTOR.findall(query)
        assert selectors, query
        for name, matchers in selectors:
            assert name in labels_of, f"{query}: no metric {name}"
            asked = {label for label, _, _ in _MATCHER.findall(matchers)}
            assert asked <= labels_of[name] | SCRAPED, f"{query}: {name} has no label {asked - labels_of[name]}"
            kept = {label.strip() for labels in _BY.findall(query) for label in labels.split(",")}
            assert kept <= labels_of[name], f"{query}: {name} has no label {kept - labels_of[name]}"


def test_the_legend_names_labels_that_are_left(dashboard: Any, labels_of: dict[str, set[str]]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            by = {label.strip() for labels in _BY.findall(target["expr"]) for label in labels.split(",")}
            is_sum = re.match(r"\(?(sum|max|count|histogram_quantile)\b", target["expr"])
            left = by if is_sum else set.union(*(labels_of[name] for name, _ in _SELECTOR.findall(target["expr"])))
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= left | (set() if is_sum else SCRAPED), panel["title"]


def test_variables_of_the_dashboard_are_its_own(dashboard: Any, labels_of: dict[str, set[str]]) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([queries(dashboard), dashboard["panels"]])))
    assert used <= variables.keys() | {"__rate_interval"}
    for name in variables.keys() - {"datasource"}:
        metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables[name]["definition"]).groups()  # type: ignore[union-attr]
        assert label in labels_of[metric] | SCRAPED
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.fixture(scope="module")
def prometheus(gateway_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus itself, with the shipped configuration but for the addresses."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("there is no prometheus on the PATH; apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [gateway_url.removeprefix("http://")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yaml", folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [binary, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:

            def is_up() -> bool:
                try:
                    return bool(ask(client, "count_over_time(cocktail_engine_ready[1m]) >= 4"))
                except httpx.TransportError:
                    assert process.poll() is None, (folder / "log").read_text()
                    return False

            eventually(is_up, "a few scrapes")
            yield client
    finally:
        process.terminate()
        process.wait()


def ask(prometheus: httpx.Client, query: str) -> list[Any]:
    answer = prometheus.get("/api/v1/query", params={"query": query})
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, f"{query}: {answer.text}"
    result: list[Any] = answer.json()["data"]["result"]
    return result


def test_prometheus_answers_each_query_of_the_dashboard(dashboard: Any, prometheus: httpx.Client) -> None:
    empty = []
    for query in queries(dashboard):
        written = query.replace("$__rate_interval", "1m").replace("$pool", ".*").replace("$replica", ".*")
        if not ask(prometheus, written.replace("$job", ".*")):
            empty.append(query)
    assert empty == []


def test_prometheus_takes_the_rules_and_none_fires(prometheus: httpx.Client) -> None:
    (group,) = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert [rule["query"].replace(" ", "") for rule in group["rules"]] == [each.replace(" ", "") for each in alerts()]
    time.sleep(2)
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["name"]: (rule["health"], rule["state"]) for rule in rules} == {
        rule["name"]: ("ok", "inactive") for rule in rules
    }


def test_the_compose_file_mounts_what_is_there() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert set(services) == {"gateway", "postgres", "prometheus", "grafana"}
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            there = (COMPOSE.parent / source).exists() if source.startswith(".") else source in compose["volumes"]
            assert there, f"{name}: {source}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "it would be open to all"
        for needed in service.get("depends_on", ()):
            assert needed in services
    build = services["gateway"]["build"]
    assert (COMPOSE.parent / build["context"] / "Dockerfile").exists()
    targets = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert build["target"] == "${TARGET:-cpu}"
    assert {"cpu", "cuda"} <= set(targets)
    assert services["gateway"]["command"] == ["serve", "/config/cocktail.yaml"]
    assert "/config/cocktail.yaml" in services["gateway"]["volumes"][0]
    scraped = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped[0]["targets"] == ["gateway:8000"]
    source = yaml.safe_load((MONITORING / "grafana-datasource.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_the_compose_files_gateway_is_configured_for_its_image() -> None:
    environ = yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]["environment"]
    settings = load_settings(COMPOSE.parent / "cocktail.yaml", environ={**environ, "COCKTAIL_ADMIN_KEY": "key"})
    settings.check_servable()
    assert settings.store.database_url.startswith("postgresql://cocktail:")
    assert settings.server.shutdown_grace_s < 45
    (pool,) = settings.pools
    copied = re.findall(r"^COPY (\S+) /\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for source in (pool.base, *pool.experts.values()):
        inside = Path(source.path).relative_to("/app")
        assert inside.parts[0] in copied
        assert (ROOT / inside / "config.json").exists()


def unit() -> dict[str, dict[str, list[str]]]:
    """Values by section and key, which may be there several times."""
    found: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[section][key].append(value)
    return {name: dict(keys) for name, keys in found.items()}


def test_the_unit_sets_what_the_configuration_knows(tmp_path: Path) -> None:
    service = unit()["Service"]
    pairs = dict(each.split("=", 1) for line in service["Environment"] for each in line.split())
    environ = {name: value.replace("%S", "/var/lib").replace("%C", "/var/cache") for name, value in pairs.items()}
    (tmp_path / "cocktail.yaml").write_text(
        yaml.safe_dump({"pools": [{"id": "p", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}]})
    )
    settings = load_settings(tmp_path / "cocktail.yaml", environ=environ)
    assert settings.store.url == "sqlite:////var/lib/cocktail-serve/registry.sqlite"
    assert settings.store.cache_dir == Path("/var/cache/cocktail-serve")
    assert float(service["TimeoutStopSec"][0]) > settings.server.shutdown_grace_s
    program, command, config = service["ExecStart"][0].split()
    assert (Path(program).name, command, Path(config).name) == ("cocktail-serve", "serve", "cocktail.yaml")


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("there is no systemd-analyze on the PATH")
    program = tmp_path / "cocktail-serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNIT.read_text(), flags=re.MULTILINE))
    verified = subprocess.run([verify, "verify", str(copy)], capture_output=True, text=True, check=False)
    told = [line for line in verified.stderr.splitlines() if UNIT.name in line]
    assert (verified.returncode, told) == (0, []), verified.stderr
