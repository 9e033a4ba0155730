"""The order of a mix, and what every failure in it leaves behind: a scripted engine, no vLLM."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cocktail_serve.errors import (
    CapacityError,
    CheckpointError,
    ClientError,
    ConfigError,
    EngineError,
    IncompatibleModelsError,
    InvalidMixError,
    ModelChangedError,
    NotFiniteError,
)
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from vllm_cocktail.control import EngineControl
from vllm_cocktail.fence import Fence
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.reload_check import ProbeAnswer

# before a test runs: vLLM asks the machine by processes while it is imported
pytest.importorskip("vllm.sampling_params", reason="what is asked of the engine is in vLLM's own types")


def member(name: str, digit: str) -> Member:
    return Member(name, Path(name), digit * 64, "float32", 1000)


POOL = Pool("flan", "decoder", member("base", "0"), {"red": member("red", "1")}, "t")
BASE = one_hot(POOL, "base", dtype="float32")
RED = one_hot(POOL, "red", dtype="float32")
HALF = make_recipe(POOL, {"base": 0.5, "red": 0.5}, dtype="float32")


class Engine:
    """Writes down what it is asked and answers as vLLM would; `failures` makes single calls raise or answer oddly."""

    def __init__(self, *, ranks: int = 1, multimodal: bool = False) -> None:
        self.model_config = SimpleNamespace(
            is_multimodal_model=multimodal, max_model_len=32, get_vocab_size=lambda: 320
        )
        self.moves = 0.0
        """How far each mix moves all log-probabilities."""
        self.num_mixes = 0
        self.calls: list[str] = []
        self.ranks = ranks
        self.resident = BASE.digest
        self.weight_version = "default"
        self.clear_cache: bool | None = None
        self.failures: dict[str, Exception] = {}
        self.replies: dict[str, list[dict[str, Any]]] = {}
        self.mixing = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.kept: list[str] = []
        self.engine_core: Any = None

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failures:
            raise self.failures[name]

    async def collective_rpc(self, method: str, *, args: tuple[str, ...]) -> list[dict[str, Any]]:
        self._called(method)
        if method == "cocktail_mix":
            self.mixing.set()
            await self.go_on.wait()
            self.resident = Recipe.from_json(json.loads(args[0])).digest
        if method in ("cocktail_mix", "cocktail_capture"):  # each goes through vLLM's reload
            self.num_mixes += 1
        reply = {"ok": True, "error": None, "digest": self.resident, "source": "files"}
        if method == "cocktail_capture":
            reply["reason"] = "engine.expert_memory is 0"
        probed = {"cached": self.kept, "cached_bytes": 0, "model_dtype": "float32", "mixing_kernel": "compiled"}
        probed |= {"captured": [], "captured_bytes": 0}
        return self.replies.get(method) or [reply | probed for _ in range(self.ranks)]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.calls.append("generate")
        tokens = prompt["prompt_token_ids"][: params.max_tokens]
        log_prob = SimpleNamespace(logprob=-1.0 + self.moves * self.num_mixes)
        answer = SimpleNamespace(token_ids=tokens, logprobs=[{token: log_prob} for token in tokens])
        yield SimpleNamespace(outputs=[answer])

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self._called(f"pause {mode}")
        self.clear_cache = clear_cache

    async def resume_generation(self) -> None:
        self._called("resume")

    async def update_weight_version(self, version: str) -> None:
        self._called("version")
        self.weight_version = version

    async def get_weight_version(self) -> str:
        return self.weight_version

    async def reset_mm_cache(self) -> None:
        self._called("reset mm")

    async def reset_encoder_cache(self) -> None:
        self._called("reset encoder")


def captured(reason: str | None = None) -> dict[str, Any]:
    return {"ok": True, "error": None, "digest": BASE.digest, "reason": reason}


async def control_of(engine: Engine, *, managed: bool = True) -> EngineControl:
    """Started; the calls of the start are forgotten."""
    manifest = Manifest.of_pool(POOL, dtype="float32", cache_bytes=0, managed=managed)
    control = EngineControl(engine, Fence(managed=managed), manifest)  # type: ignore[arg-type]  # what it uses of it
    await control.start()
    engine.calls.clear()
    engine.mixing.clear()
    return control


async def test_a_mix_goes_on_between_a_pause_and_a_resume() -> None:
    engine = Engine(ranks=2)
    control = await control_of(engine)
    mixed = await control.mix(RED, drain_s=0)
    assert engine.calls == ["cocktail_check", "pause abort", "cocktail_mix", "version", "resume"]
    assert (mixed["resident"], mixed["source"]) == (RED.digest, "files")
    assert (control.fence.state, control.fence.resident) == ("open", RED.digest)
    assert engine.weight_version == RED.digest


@pytest.mark.parametrize("managed", [True, False])
async def test_the_prefix_cache_goes_where_requests_carry_no_salt(managed: bool) -> None:
    engine = Engine()
    control = await control_of(engine, managed=managed)
    await control.mix(RED, drain_s=0)
    assert engine.clear_cache is not managed


async def test_what_a_multimodal_model_made_of_its_inputs_goes_too() -> None:
    engine = Engine(multimodal=True)
    await (await control_of(engine)).mix(RED, drain_s=0)
    assert engine.calls[3:] == ["version", "reset mm", "reset encoder", "resume"]


async def test_what_the_workers_keep_is_not_checked_again() -> None:
    engine = Engine(ranks=2)
    control = await control_of(engine)
    engine.kept = [HALF.digest]
    await control.mix(HALF, drain_s=0)
    await control.mix(RED, drain_s=0)
    await control.mix(HALF, drain_s=0)
    assert engine.calls.count("cocktail_check") == 2
    assert engine.calls[-4:] == ["pause abort", "cocktail_mix", "version", "resume"]
    await control.mix(BASE, drain_s=0)
    await control.forget(HALF.digest)
    engine.calls.clear()
    await control.mix(HALF, drain_s=0)
    assert engine.calls[0] == "cocktail_check"


async def test_what_is_forgotten_during_a_mix_is_checked_again() -> None:
    engine = Engine()
    control = await control_of(engine)
    engine.kept = [HALF.digest, RED.digest]
    await control.mix(HALF, drain_s=0)
    engine.go_on.clear()
    engine.mixing.clear()
    mixing = asyncio.create_task(control.mix(RED, drain_s=0))
    await engine.mixing.wait()
    forgetting = asyncio.Event()
    rpc = engine.collective_rpc

    async def one_after_the_other(method: str, *, args: tuple[str, ...]) -> list[dict[str, Any]]:
        if method == "cocktail_forget":
            forgetting.set()
            await mixing  # a worker does one thing at a time
        return await rpc(method, args=args)

    engine.collective_rpc = one_after_the_other  # type: ignore[method-assign]
    forgotten = asyncio.create_task(control.forget(HALF.digest))
    await forgetting.wait()
    engine.go_on.set()
    await forgotten
    engine.calls.clear()
    await control.mix(HALF, drain_s=0)
    assert engine.calls[0] == "cocktail_check"


async def test_vllms_core_is_paused_without_the_wait_for_callers() -> None:
    engine = Engine()
    control = await control_of(engine)
    paused: list[tuple[str, bool]] = []

    async def pause_scheduler_async(*, mode: str, clear_cache: bool) -> None:
        paused.append((mode, clear_cache))

    engine.engine_core = SimpleNamespace(pause_scheduler_async=pause_scheduler_async)
    await control.mix(RED, drain_s=0)
    assert paused == [("abort", False)]
    assert "pause abort" not in engine.calls
    other = Engine()
    other.engine_core = engine.engine_core
    await (await control_of(other, managed=False)).mix(RED, drain_s=0)  # whose caches vLLM's own pause clears
    assert other.calls[1] == "pause abort"
    assert paused == [("abort", False)]


async def test_the_resident_recipe_is_left_alone() -> None:
    engine = Engine()
    mixed = await (await control_of(engine)).mix(BASE, drain_s=0)
    assert (mixed["source"], engine.calls) == ("resident", [])


async def test_an_invalid_recipe_is_found_while_requests_go_on() -> None:
    engine = Engine(ranks=2)
    control = await control_of(engine)
    ok, bad = {"ok": True, "error": None, "digest": RED.digest}, {"ok": False, "error": "no such file"}
    engine.replies["cocktail_check"] = [ok, bad]
    with pytest.raises(InvalidMixError, match="rank 1: no such file") as caught:
        await control.mix(RED, drain_s=0)
    assert caught.value.code == "invalid_recipe"
    assert engine.calls == ["cocktail_check"]
    assert (control.fence.state, control.fence.resident) == ("open", BASE.digest)


@pytest.mark.parametrize("kind", [ModelChangedError, CheckpointError, IncompatibleModelsError, NotFiniteError])
async def test_why_a_worker_does_not_mix_is_told_in_its_own_words(kind: type[ClientError]) -> None:
    engine = Engine()
    control = await control_of(engine)
    engine.replies["cocktail_check"] = [{"ok": False, "error": "red's file", "code": kind.code}]
    with pytest.raises(ClientError, match="red's file") as caught:
        await control.mix(RED, drain_s=0)
    assert type(caught.value) is kind
    assert engine.calls == ["cocktail_check"]
    assert (control.fence.state, control.fence.resident) == ("open", BASE.digest)


async def test_requests_that_do_not_finish_in_time_keep_their_parameters() -> None:
    engine = Engine()
    control = await control_of(engine)
    control.fence.enter()
    with pytest.raises(CapacityError, match="1 request") as caught:
        await control.mix(RED, drain_s=0)
    assert caught.value.code == "busy"
    assert engine.calls == ["cocktail_check"]
    assert (control.fence.state, control.fence.resident) == ("open", BASE.digest)


@pytest.mark.parametrize("step", ["pause abort", "cocktail_mix", "version", "reset mm", "reset encoder", "resume"])
async def test_any_failure_after_the_start_poisons(step: str) -> None:
    engine = Engine(multimodal=True)
    control = await control_of(engine)
    engine.failures[step] = RuntimeError("it broke")
    with pytest.raises(EngineError, match="it broke") as caught:
        await control.mix(RED, drain_s=0)
    assert caught.value.code == "mix_failed"
    assert control.fence.state == "poisoned"
    assert engine.calls[-1] == step  # nothing was tried after it, no resume above all


@pytest.mark.parametrize(
    "replies",
    [
        [{"ok": True, "error": None, "digest": RED.digest, "source": "files"}, {"ok": False, "error": "torn"}],
        [{"ok": True, "error": None, "digest": d.digest, "source": "files"} for d in (RED, HALF)],
        [{"ok": True, "error": None, "digest": HALF.digest, "source": "files"}] * 2,
    ],
    ids=["one failed", "they differ", "all another"],
)
async def test_ranks_that_did_not_all_mix_the_recipe_poison(replies: list[dict[str, Any]]) -> None:
    engine = Engine(ranks=2)
    control = await control_of(engine)
    engine.replies["cocktail_mix"] = replies
    with pytest.raises(EngineError):
        await control.mix(RED, drain_s=0)
    assert control.fence.state == "poisoned"
    assert "resume" not in engine.calls


async def test_a_poisoned_engine_is_never_mixed_again() -> None:
    engine = Engine()
    control = await control_of(engine)
    control.fence.poison("gone")
    with pytest.raises(EngineError) as caught:
        await control.mix(RED, drain_s=0)
    assert caught.value.code == "mix_failed"
    assert engine.calls == []


async def test_a_caller_that_is_cancelled_leaves_the_mix_whole() -> None:
    engine = Engine()
    control = await control_of(engine)
    engine.go_on.clear()
    caller = asyncio.create_task(control.mix(RED, drain_s=0))
    await engine.mixing.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert control.fence.state == "mixing"
    engine.go_on.set()
    await control.mix(HALF, drain_s=0)  # waits for the one before
    assert engine.calls.count("resume") == 2
    assert control.fence.resident == HALF.digest


async def test_mixes_come_one_after_the_other() -> None:
    engine = Engine()
    control = await control_of(engine)
    mixed = await asyncio.gather(*(control.mix(recipe, drain_s=0) for recipe in (RED, HALF, HALF)))
    assert [m["source"] for m in mixed] == ["files", "files", "resident"]
    assert [c for c in engine.calls if c.startswith(("pause", "resume"))] == ["pause abort", "resume"] * 2


async def test_the_status_is_what_the_workers_say() -> None:
    control = await control_of(Engine())
    control.fence.enter()
    status = await control.status()
    assert (status["resident"], status["weight_version"]) == (BASE.digest, BASE.digest)
    assert (status["state"], status["in_flight"], status["mixing_path"]) == ("open", 1, "stream")
    assert status["mixing_kernel"] == "compiled"


async def test_experts_are_captured_before_the_first_request() -> None:
    engine = Engine(ranks=2)
    engine.replies["cocktail_capture"] = [captured(), captured()]
    manifest = Manifest.of_pool(POOL, dtype="float32", cache_bytes=0, managed=True, expert_bytes=100)
    control = EngineControl(engine, Fence(managed=True), manifest)  # type: ignore[arg-type]  # what it uses of it
    await control.start()
    assert engine.calls == ["cocktail_prepare", "generate", "cocktail_capture", "generate", "cocktail_probe", "version"]
    status = await control.status()
    assert (status["mixing_path"], status["streams_because"]) == ("in_place", None)


async def test_where_one_rank_cannot_keep_its_part_none_does() -> None:
    engine = Engine(ranks=2)
    engine.replies["cocktail_capture"] = [captured(), captured("no room")]
    control = EngineControl(
        engine,  # type: ignore[arg-type]  # what it uses of it
        Fence(managed=True),
        Manifest.of_pool(POOL, dtype="float32", cache_bytes=0, managed=True, expert_bytes=100),
    )
    await control.start()
    assert engine.calls.count("cocktail_release") == 1
    status = await control.status()
    assert (status["mixing_path"], status["streams_because"]) == ("stream", "no room")


async def test_a_capture_that_fails_half_way_ends_the_start() -> None:
    engine = Engine()
    engine.replies["cocktail_capture"] = [{"ok": False, "error": "half a layer"}]
    with pytest.raises(ConfigError, match="half a layer"):
        await control_of(engine)


@pytest.mark.parametrize("path", ["stream", "in_place"])
async def test_an_engine_whose_reload_makes_another_model_of_the_base_is_refused(path: str) -> None:
    """As vLLM 0.32 did with mixtures of experts on a CPU: without an error, and for every recipe from then on."""
    engine = Engine()
    engine.moves = 0.2
    engine.replies["cocktail_capture"] = [captured("it is packed" if path == "stream" else None)]
    with pytest.raises(ConfigError, match=r"another model: its log-probabilities moved by 0\.[24] nats"):
        await control_of(engine)


async def test_a_reload_that_only_rounds_is_none() -> None:
    engine = Engine()
    engine.moves = 1e-4
    assert (await control_of(engine)).fence.resident == BASE.digest


@pytest.mark.parametrize(
    ("other", "moved"),
    [
        (ProbeAnswer((5, 6, 7), (-1.0, -2.0, -3.0)), 0.0),
        (ProbeAnswer((5, 6, 7), (-1.0, -2.0, -3.5)), 0.5),
        (
            ProbeAnswer((5, 8, 9), (-1.0, -2.001, -9.0)),
            0.001,
        ),  # a tie fell the other way, and what follows is another text
        (ProbeAnswer((5, 8, 9), (-1.0, -1.2, -9.0)), 0.8),
        (ProbeAnswer((5, 6, 7), (-1.0, math.nan, -3.0)), math.inf),
    ],
    ids=["same", "moved", "tie", "other token", "nan"],
)
def test_how_far_an_answer_moved(other: ProbeAnswer, moved: float) -> None:
    assert ProbeAnswer((5, 6, 7), (-1.0, -2.0, -3.0)).moved(other) == pytest.approx(moved)


async def test_workers_that_hold_something_else_than_the_fence_says_poison() -> None:
    engine = Engine()
    control = await control_of(engine)
    engine.resident = HALF.digest
    assert (await control.status())["state"] == "poisoned"


async def test_a_status_during_a_mix_is_no_contradiction() -> None:
    """The workers may already hold the next recipe while the fence is still closed on the last one."""
    engine = Engine()
    control = await control_of(engine)
    engine.go_on.clear()
    mixing = asyncio.create_task(control.mix(RED, drain_s=0))
    await engine.mixing.wait()
    engine.resident = RED.digest
    assert (await control.status())["state"] == "mixing"
    engine.go_on.set()
    await mixing
    assert (await control.status())["state"] == "open"


async def test_a_worker_that_refuses_the_engine_ends_the_start() -> None:
    engine = Engine()
    engine.replies["cocktail_prepare"] = [{"ok": False, "error": "start it on the base"}]
    with pytest.raises(ConfigError, match="start it on the base"):
        await control_of(engine)
