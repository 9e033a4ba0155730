"""vLLM's own start, and what `doctor` says of it before: they agree, and both say why."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cli.doctor.configuration import check_config
from cocktail_serve.config import load_settings
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.progress import silent
from cocktail_serve.recipe import make_recipe
from tests.models import make_decoder
from vllm_cocktail.launch import is_cpu_build

pytestmark = pytest.mark.vllm

START_S = 300.0


@dataclass
class World:
    """A configuration of one decoder pool whose expert is the base again, to be broken."""

    folder: Path
    engine: dict[str, Any] = field(default_factory=lambda: {"type": "vllm", "max_model_len": 64})

    def __post_init__(self) -> None:
        make_decoder(self.base)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def edit_config(self, **changes: Any) -> None:
        path = self.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def write(self) -> Path:
        shutil.copytree(self.base, self.folder / "twin")
        pool = {
            "id": "p",
            "kind": "decoder",
            "base": str(self.base),
            "experts": {"twin": str(self.folder / "twin")},
            "engine": self.engine,
        }
        path = self.folder / "config.yaml"
        store = {"cache_dir": "cache", "cache_bytes": 1000}
        path.write_text(yaml.safe_dump({"server": {"port": 0}, "store": store, "pools": [pool]}))
        return path


def nothing(world: World) -> None:
    world.engine["env"] = {"VLLM_CPU_KV_CACHE_SPACE": "1"}  # which vLLM does not read


def unknown_argument(world: World) -> None:
    world.engine["args"] = {"no-such-flag": 1}


def misspelt_argument(world: World) -> None:
    world.engine["args"] = {"gpu-memory-utilisation": 0.5}


def no_number(world: World) -> None:
    world.engine["args"] = {"block-size": "many"}


def longer_than_its_positions(world: World) -> None:
    world.engine["max_model_len"] = 100_000


def heads_that_cannot_be_shared(world: World) -> None:
    world.engine["args"] = {"tensor-parallel-size": 3}


def unknown_parser(world: World) -> None:
    world.engine["args"] = {"enable-auto-tool-choice": True, "tool-call-parser": "nope"}


def no_tokenizer(world: World) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.base / name).unlink()


def another_vocabulary(world: World) -> None:
    world.edit_config(vocab_size=400)


def unknown_architecture(world: World) -> None:
    """transformers knows it and vLLM does not."""
    world.edit_config(architectures=["NoSuchForCausalLM"], model_type="no-such-model")


def context_beyond_the_cache(world: World) -> None:
    world.edit_config(max_position_embeddings=4_000_000)
    del world.engine["max_model_len"]
    if not is_cpu_build():
        world.engine["args"] = {"kv-cache-memory-bytes": 2**30}


BREAKS: dict[Callable[[World], None], tuple[str, str] | None] = {
    nothing: None,
    unknown_argument: ("no-such-flag", "no-such-flag"),
    misspelt_argument: ("did you mean --gpu-memory-utilization?", "did you mean --gpu-memory-utilization?"),
    no_number: ("'many'", "'many'"),
    longer_than_its_positions: ("100000", "100000"),
    heads_that_cannot_be_shared: ("divisible by tensor parallel size", "divisible by tensor parallel size"),
    unknown_parser: ("nope", "nope"),
    no_tokenizer: ("tokenizer", "tokenizer"),
    another_vocabulary: ("[400, 64] by its config.json", "vocab_size"),
    unknown_architecture: ("no-such-model", "no-such-model"),
    context_beyond_the_cache: ("set engine.max_model_len to at most 1048576", "KV cache"),
}
"""What `doctor` says, and what the engine does."""


def told(config: Path, status: str) -> str:
    return "\n".join(f"{c.name}: {c.detail}" for c in check_config(config, silent) if c.status == status)


def problems(config: Path) -> str:
    return told(config, "problem")


async def why_not_started(config: Path) -> str:
    """What the first start ends in; empty: the engine mixed and scored."""
    settings = load_settings(config)
    pool = await asyncio.to_thread(open_pool, settings.pools[0], cache_dir=settings.store.cache_dir)
    engine = build_vllm_engine(pool, settings.pools[0].engine, run_dir=config.parent / "run")  # type: ignore[arg-type]
    await engine.start()
    try:
        deadline = time.monotonic() + START_S
        while (state := (await engine.snapshot(deadline_s=10)).state) == "starting":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        if state == "ready":
            await engine.mix_ahead(make_recipe(pool, {"base": 0.5, "twin": 0.5}, dtype="float32"))
            assert (await engine.snapshot(deadline_s=10)).state == "ready"
            return ""
        return engine._supervisor.failure
    finally:
        await engine.stop()


@pytest.mark.full
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
async def test_doctor_and_the_start_agree(
    tmp_path: Path, broken: Callable[[World], None], caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    broken(world)
    config, expected = world.write(), BREAKS[broken]
    found = await asyncio.to_thread(problems, config)
    why = await why_not_started(config)
    assert bool(found) == bool(why) == (expected is not None), (found, why)
    if expected is not None:
        assert expected[0] in found, found
        # the line that anybody may ask for
        assert expected[1] in why.partition("\n")[0], why
    if broken is nothing:
        (warning,) = [record.getMessage() for record in caplog.records if "reads no variable" in record.getMessage()]
        assert warning.startswith("p: vLLM reads no variable 'VLLM_CPU_KV_CACHE_SPACE'")
        assert "Did you mean 'VLLM_CPU_KVCACHE_SPACE'?" in warning


def test_doctor_asks_vllm(tmp_path: Path) -> None:
    world = World(tmp_path)
    unknown_argument(world)
    world.engine["args"]["tokeniser-mode"] = "hf"
    found = problems(world.write())
    assert f"vLLM does not start on {world.base}: unrecognized arguments: --no-such-flag" in found
    assert "--tokeniser-mode (did you mean --tokenizer-mode?)" in found
    assert "mend the pool's 'engine' section" in found


@pytest.mark.full
def test_doctor_warns_of_variables_that_vllm_does_not_read(tmp_path: Path) -> None:
    world = World(tmp_path)
    nothing(world)
    assert "Did you mean 'VLLM_CPU_KVCACHE_SPACE'?" in told(world.write(), "warning")
