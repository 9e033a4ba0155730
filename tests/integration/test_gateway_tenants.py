"""Two tenants on one gateway: each has a world of its own, and `/admin` is neither's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cocktail_serve.engines.vllm.request_body import BodyWriter
from tests.gateways import EXAMPLES, PAIRS, LiveGateway
from tests.tenants import MESSAGES, Tenants, ask, code_of, guarded_gateway, make


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    with guarded_gateway(folder) as tenants:
        yield tenants


class TestIsolation:
    def test_anothers_cocktail_is_not_there(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("isolated-a"), tenants.of("isolated-b")
        cocktail = make(ours, "secret-plans")
        calls: list[Callable[[httpx.Client, str], httpx.Response]] = [
            lambda http, ref: http.get(f"/v1/cocktails/{ref}"),
            lambda http, ref: http.get(f"/v1/cocktails/{ref}/examples"),
            lambda http, ref: http.get(f"/v1/cocktails/{ref}/recipe"),
            lambda http, ref: http.get(f"/v1/cocktails/{ref}/report"),
            lambda http, ref: http.get(f"/v1/models/{ref}"),
            ask,
            lambda http, _: http.patch("/v1/cocktails/secret-plans", json={"current": None}),
            lambda http, ref: http.delete(f"/v1/cocktails/{ref}"),
            lambda http, ref: http.delete(f"/v1/models/{ref}"),
        ]
        for ref in (cocktail["id"], "secret-plans"):
            for call in calls:
                answer, unknown = call(theirs, ref), call(theirs, "never-made")
                assert answer.status_code == 404, answer.request.url
                if "never-made" in str(unknown.request.url):
                    told = answer.text.replace(ref, "X")
                    assert told == unknown.text.replace("never-made", "X"), "as if it had never been"
        assert ask(ours, cocktail["id"]).status_code == 200

    def test_lists_show_ones_own(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("lists-a"), tenants.of("lists-b")
        cocktail = make(ours, "mine")
        assert [entry["id"] for entry in ours.get("/v1/cocktails").json()["data"]] == [cocktail["id"]]
        assert theirs.get("/v1/cocktails").json()["data"] == []
        listed = {entry["id"]: entry["owned_by"] for entry in ours.get("/v1/models").json()["data"]}
        assert listed["mine"] == listed[cocktail["id"]] == "lists-a"
        assert "mine" not in theirs.get("/v1/models").text

    def test_one_name_means_each_tenants_own(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("names-a"), tenants.of("names-b")
        made = make(ours, "films", temperature=0.1), make(theirs, "films", temperature=3.0)
        assert made[0]["id"] != made[1]["id"]
        assert [ask(http, "films").json()["model"] for http in (ours, theirs)] == [each["id"] for each in made]
        assert ours.delete("/v1/cocktails/films").status_code == 200
        assert theirs.get("/v1/cocktails/films").json()["id"] == made[1]["id"]

    def test_the_same_request_is_another_cocktail_of_the_same_recipe(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("same-a"), tenants.of("same-b")
        mine = make(ours, "same")
        response = theirs.post(
            "/v1/cocktails", params={"wait": 30}, json={"name": "same", "pool": "flan", "examples": EXAMPLES}
        )
        assert response.status_code == 201, "new for this tenant, though the other has it"
        assert response.json()["recipe"]["digest"] == mine["recipe"]["digest"]
        ours.delete("/v1/cocktails/same")
        assert ask(theirs, "same").status_code == 200

    def test_an_inline_cocktail_is_its_senders(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("inline-a"), tenants.of("inline-b")
        answered = ask(ours, "flan", cocktail={"examples": EXAMPLES})
        assert answered.status_code == 200
        model = answered.json()["model"]
        assert ask(ours, model).status_code == 200
        assert ask(theirs, model).status_code == 404

    def test_prefix_caches_are_kept_apart(self, tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
        salts = []
        original = BodyWriter.cache_salt

        def note(bodies: BodyWriter, *args: Any) -> str:
            salts.append(original(bodies, *args))
            return salts[-1]

        monkeypatch.setattr(BodyWriter, "cache_salt", note)
        ours, theirs = tenants.of("salts-a"), tenants.of("salts-b")
        for http in (ours, theirs, ours):
            assert ask(http, "flan", cache_salt="guessed").status_code == 200
        assert salts[0] == salts[2] != salts[1], "the same prompt, model and salt of another tenant share no block"


class TestScopes:
    def test_a_key_to_use_makes_and_deletes_nothing(self, tenants: Tenants) -> None:
        make(tenants.of("scoped"), "ready")
        http = tenants.of("scoped", "use")
        assert ask(http, "ready").status_code == 200
        assert http.get("/v1/cocktails/ready").status_code == 200
        body = {"name": "another", "pool": "flan", "examples": EXAMPLES}
        for response in (
            http.post("/v1/cocktails", json=body),
            http.post("/v1/cocktails", params={"dry_run": "true"}, json=body),
            http.patch("/v1/cocktails/ready", json={"current": None}),
            http.delete("/v1/cocktails/ready"),
            http.delete("/v1/models/ready"),
            http.post("/v1/files", files={"file": ("f.jsonl", b"{}")}, data={"purpose": "fine-tune"}),
            http.delete("/v1/files/file-1"),
            ask(http, "flan", cocktail={"examples": EXAMPLES}),
        ):
            assert (response.status_code, code_of(response)) == (403, "permission_denied")
        assert http.get("/v1/cocktails/ready").status_code == 200

    def test_an_admins_key_is_no_tenants(self, tenants: Tenants) -> None:
        http = tenants.of("ops", "admin")
        assert http.get("/admin/tenants").status_code == 200
        for response in (ask(http, "flan"), http.get("/v1/models"), http.get("/v1/cocktails")):
            assert response.status_code == 403

    def test_admin_is_closed_to_tenants_and_strangers(self, tenants: Tenants) -> None:
        routes = [
            (method.upper(), path.replace("{key_id}", "000000000000").replace("{name}", "acme"))
            for path, operations in tenants.live.app.openapi()["paths"].items()
            if path.startswith("/admin")
            for method in operations
        ]
        assert len(routes) >= 6
        stranger, tenant = tenants.client(None), tenants.of("acme", "use", "create")
        for method, path in routes:
            assert stranger.request(method, path).status_code == 401, (method, path)
            assert tenant.request(method, path).status_code == 403, (method, path)

    def test_admin_needs_a_key_where_auth_is_off(self, gateway: LiveGateway) -> None:
        assert httpx.get(f"{gateway.url}/v1/models").status_code == 200
        assert httpx.get(f"{gateway.url}/admin/keys").status_code == 401


class TestKeys:
    def test_revoked_is_refused_at_once(self, tenants: Tenants) -> None:
        made = tenants.key("revoked")
        http = tenants.client(made["key"])
        assert http.get("/v1/models").status_code == 200
        revoked = tenants.admin.delete(f"/admin/keys/{made['id']}")
        assert (revoked.status_code, revoked.json()["status"]) == (200, "revoked")
        assert http.get("/v1/models").status_code == 401
        assert tenants.admin.delete("/admin/keys/000000000000").status_code == 404

    def test_rotation(self, tenants: Tenants) -> None:
        made = tenants.key("rotated")
        old = tenants.client(made["key"])
        kept = tenants.admin.post(f"/admin/keys/{made['id']}/rotate", json={"overlap_s": 3600}).json()
        assert old.get("/v1/models").status_code == tenants.client(kept["key"]).get("/v1/models").status_code == 200
        ended = tenants.admin.post(f"/admin/keys/{kept['id']}/rotate", json={"overlap_s": 0}).json()
        assert tenants.client(kept["key"]).get("/v1/models").status_code == 401
        assert tenants.client(ended["key"]).get("/v1/models").status_code == 200
        again = tenants.admin.post(f"/admin/keys/{kept['id']}/rotate", json={})
        assert (again.status_code, code_of(again)) == (409, "key_ended")

    def test_lists_hold_no_secret(self, tenants: Tenants) -> None:
        made = tenants.key("listed", "use", expires_in_s=60)
        listed = tenants.admin.get("/admin/keys", params={"tenant": "listed"})
        assert [key["id"] for key in listed.json()["data"]] == [made["id"]]
        assert made["key"].split("-", 2)[2] not in listed.text

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"tenant": "A B"}, "tenant"), ({"tenant": "a", "scopes": ["root"]}, "scopes.0"), ({"who": 1}, "tenant")],
    )
    def test_malformed(self, tenants: Tenants, fields: dict[str, Any], param: str) -> None:
        response = tenants.admin.post("/admin/keys", json=fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param

    def test_the_official_client(self, tenants: Tenants) -> None:
        good = openai.OpenAI(base_url=tenants.live.base_url, api_key=tenants.key("client")["key"])
        assert good.chat.completions.create(model="flan", messages=MESSAGES, max_tokens=2).choices  # type: ignore[arg-type]
        bad = openai.OpenAI(base_url=tenants.live.base_url, api_key="sk-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            bad.models.list()
        good.close()
        bad.close()


class TestPools:
    def test_others_are_not_there(self, tenants: Tenants) -> None:
        http = tenants.of("narrow")
        before = make(http, "before")
        pairs = make(http, "pairs", pool="bge", examples=PAIRS)
        allowed = tenants.admin.put("/admin/tenants/narrow", json={"pools": ["bge"]})
        assert (allowed.status_code, allowed.json()["pools"]) == (200, ["bge"])
        assert [pool["id"] for pool in http.get("/v1/pools").json()["data"]] == ["bge"]
        assert {entry["pool"] for entry in http.get("/v1/models").json()["data"]} == {"bge"}
        for model in ("flan", "flan/nq", before["id"], "before"):
            assert ask(http, model).status_code == 404, model
            assert http.get(f"/v1/models/{model}").status_code == 404, model
        hidden = ask(http, "flan", cocktail={"examples": EXAMPLES})
        assert hidden.status_code == 404
        for near, meant in (("flam", None), ("befor", None), ("bgee", "bge"), ("pair", "pairs")):
            for told in (ask(http, near), http.get(f"/v1/models/{near}")):
                assert told.json()["error"]["message"].partition(" Did you mean ")[2] == (
                    f"{meant!r}?" if meant else ""
                )
        created = http.post("/v1/cocktails", json={"name": "n", "pool": "flan", "examples": EXAMPLES})
        assert (created.status_code, code_of(created)) == (404, "pool_not_found")
        assert "there are: bge" in created.json()["error"]["message"]
        assert http.post("/v1/embeddings", json={"model": pairs["id"], "input": "x"}).status_code == 200
        tenants.admin.put("/admin/tenants/narrow", json={"pools": None})
        assert ask(http, "before").status_code == 200
        assert ask(http, "befor").json()["error"]["message"].endswith("Did you mean 'before'?")
        assert "Did you mean 'before'?" in http.get("/v1/cocktails/beforee").json()["error"]["message"]
        assert "Did you mean" not in ask(tenants.of("elsewhere"), "befor").json()["error"]["message"]

    def test_an_unknown_pool_is_told(self, tenants: Tenants) -> None:
        response = tenants.admin.put("/admin/tenants/narrow", json={"pools": ["flam"]})
        assert (response.status_code, code_of(response)) == (404, "pool_not_found")


def test_no_key_is_in_the_log_or_the_database_file(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    made = tenants.key("unseen")
    secret = made["key"].split("-", 2)[2]
    http = tenants.client(made["key"])
    http.get("/v1/models")
    http.post("/v1/chat/completions", content=b"{")
    assert secret not in caplog.text
    folder = Path(tenants.live.settings.store.cache_dir)
    files = [path for path in folder.glob("registry.sqlite*") if path.is_file()]
    assert any(made["id"].encode() in path.read_bytes() for path in files)
    assert not any(secret.encode() in path.read_bytes() for path in files)
