"""Mixing inside the running engine: vLLM's own `reload_weights` of a merged folder, beside our mix of the same models.

Builds the pool of `bench.mixing` and its merged folder, starts vLLM on it, and measures in turn, `--runs` times:

- `mix`: all models mixed from their files, nothing of the recipe kept;
- `kept`: a swap to the same recipe, kept in memory by the last mix;
- `expert`: one model of the pool, as scoring swaps to it;
- `reload`: `reload_weights` of the merged folder, vLLM's own way.

Times are those of the collective RPC, seen by its caller. `--plain` measures again on linear layers as plain tensors
(what a GPU has), streamed and in place; `--http` the whole control route too; `--profile` says where the time goes.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.machine import describe_machine
from bench.mixing import Size, make_pool, run, weights_of, write_config
from bench.plain_linear import plain_parameters
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import load_settings
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from vllm_cocktail.launch import WORKER_EXTENSIONS, server_args, server_env
from vllm_cocktail.manifest import Manifest

CACHE_BYTES = 2 << 30
MAX_MODEL_LEN = 256
PROFILED_WORKER = "bench.engine_profile.ProfiledWorker"
PAUSE_S = 1.5
"""Between two calls over HTTP: a vLLM worker spins for a second after each."""


def child(folder: str, recipe_json: str, expert_json: str, runs: int, is_profiled: bool) -> dict[str, Any]:
    """vLLM in a process of its own: seconds of each call, and where they went."""
    from vllm import LLM

    llm = LLM(
        model=str(Path(folder) / "models" / "model-0"),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        worker_extension_cls=PROFILED_WORKER if is_profiled else WORKER_EXTENSIONS["merged"],
    )
    digest = Recipe.from_json(json.loads(recipe_json)).digest

    def call(method: str, *args: str, **kwargs: str) -> dict[str, Any]:
        begin_s = time.perf_counter()
        (reply,) = llm.collective_rpc(method, args=args, kwargs=kwargs)
        reply = reply or {}
        if not reply.get("ok", True):
            raise SystemExit(reply["error"])
        return {"seconds": time.perf_counter() - begin_s, "source": reply.get("source"), **reply}

    def mix(recipe: str) -> dict[str, Any]:
        return call("cocktail_profile", "mix", recipe) if is_profiled else call("cocktail_mix", recipe)

    def reload(merged: str) -> dict[str, Any]:
        if is_profiled:
            return call("cocktail_profile", "reload", merged)
        return call("reload_weights", weights_path=merged)

    call("cocktail_prepare")
    captured = call("cocktail_capture")
    found: dict[str, list[dict[str, Any]]] = {"mix": [], "kept": [], "expert": [], "reload": []}
    for _ in range(runs + 1):
        call("cocktail_forget", digest)
        found["mix"].append(mix(recipe_json))
        found["reload"].append(reload(str(Path(folder) / "merged")))
        found["kept"].append(mix(recipe_json))
        found["expert"].append(mix(expert_json))
    return {
        "streams_because": captured["reason"],
        "capture_s": captured["seconds"],
        "sources": {what: rows[-1]["source"] for what, rows in found.items()},
        # the first round maps files and warms allocators
        "seconds": {what: [round(row["seconds"], 4) for row in rows[1:]] for what, rows in found.items()},
        "first_mix_s": round(found["mix"][0]["seconds"], 4),
        **({"profile": {what: _profile(rows[1:]) for what, rows in found.items()}} if is_profiled else {}),
    }


def _profile(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of what a profiled call says."""
    profile: dict[str, Any] = {
        key: _medians({part: [row[key].get(part, 0.0) for row in rows] for part in rows[0][key]})
        for key in ("parts", "beside")
    }
    return profile | _medians({key: [row[key] for row in rows] for key in ("user_s", "system_s", "page_faults")})


def over_http(folder: Path, manifest: Path, pool: Pool, recipe: Recipe, runs: int) -> dict[str, list[float]]:
    """Seconds of the control route, from the client's request to its answer."""
    sockets = Path(tempfile.mkdtemp(prefix="vllm-"))
    uds = sockets / "engine.sock"
    command = server_args(
        model=pool.base.path, uds=uds, served_model_name="bench", dtype="bfloat16", max_model_len=MAX_MODEL_LEN
    )
    env = server_env(manifest=manifest, api_key="bench", owner_pid=os.getpid())
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    found: dict[str, list[float]] = {"mix": [], "kept": [], "expert": []}
    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(uds)),
            base_url="http://engine",
            headers={"authorization": "Bearer bench"},
            timeout=120,
        ) as http:
            _until_ready(http, process)

            def timed(what: str, mixed: Recipe) -> None:
                time.sleep(PAUSE_S)
                begin_s = time.perf_counter()
                answer = http.post("/v1/cocktail/mix", json={"recipe": mixed.to_json()})
                found[what].append(time.perf_counter() - begin_s)
                answer.raise_for_status()

            expert = one_hot(pool, next(iter(pool.experts)), dtype="bfloat16")
            for _ in range(runs + 1):
                http.post("/v1/cocktail/forget", json={"digest": recipe.digest}).raise_for_status()
                timed("mix", recipe)
                timed("expert", expert)
                timed("kept", recipe)
                timed("expert", expert)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(sockets)
    return {what: [round(second, 4) for second in seconds[1:]] for what, seconds in found.items()}


def _until_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if http.get("/v1/cocktail/status").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    raise SystemExit(f"vLLM exited with {process.returncode}")


def prepare(folder: Path, size: Size) -> tuple[Pool, Recipe]:
    """The pool, and the merged folder beside it."""
    models = make_pool(folder / "models", size)
    settings = load_settings(write_config(folder, models))
    pool = open_pool(settings.pools[0], cache_dir=folder / "cache")
    names = [BASE, *pool.experts]
    recipe = make_recipe(pool, dict(zip(names, weights_of(len(names)), strict=True)), dtype="bfloat16")
    save_mixture(recipe, pool, folder / "merged")
    return pool, recipe


def measure(folder: Path, size: Size, *, runs: int, plain: bool, http: bool, profile: bool) -> dict[str, Any]:
    """Everything; each engine in a process of its own."""
    pool, recipe = prepare(folder, size)
    expert = one_hot(pool, next(iter(pool.experts)), dtype="bfloat16")
    arguments = [str(folder), json.dumps(recipe.to_json()), json.dumps(expert.to_json()), runs, profile]

    def manifest(name: str, expert_bytes: int) -> Path:
        made = Manifest.of_pool(
            pool, dtype="bfloat16", cache_bytes=CACHE_BYTES, managed=True, expert_bytes=expert_bytes
        )
        return made.write(folder / f"{name}.json")

    def engine(name: str, expert_bytes: int, environ: Mapping[str, str]) -> dict[str, Any]:
        env = server_env(
            manifest=manifest(name, expert_bytes),
            api_key="bench",
            owner_pid=os.getpid(),  # as a gateway starts it: its processes nap while they wait for each other
            environ={**os.environ, **environ},
        )
        found = run([sys.executable, "-m", "bench.engine_mixing", "--child", json.dumps(arguments)], env=env)
        print(f"{name}: {found}", file=sys.stderr, flush=True)
        return {**found, "medians": _medians(found["seconds"])}

    result: dict[str, Any] = {
        "machine": describe_machine(),
        "pool": {"models": size.num_models, "parameters": size.num_parameters, "dtype": "bfloat16"},
        "runs": runs,
        "packed": engine("packed", 0, {}),
    }
    if http:
        seconds = over_http(folder, manifest("http", 0), pool, recipe, runs)
        result["packed_over_http"] = {"seconds": seconds, "medians": _medians(seconds)}
        print(f"packed_over_http: {seconds}", file=sys.stderr, flush=True)
    if plain:
        environ = plain_parameters(folder)
        everything = 2 * size.num_parameters * (size.num_models + 1)
        result["plain_in_place"] = engine("plain_in_place", everything, environ)
        result["plain_streamed"] = engine("plain_streamed", 0, environ)
    result["ratios_to_reload"] = {
        name: {
            what: round(seconds / _reload_of(name, result)["medians"]["reload"], 2)
            for what, seconds in engine["medians"].items()
            if what != "reload"
        }
        for name, engine in result.items()
        if isinstance(engine, dict) and "medians" in engine
    }
    return result


def _reload_of(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The engine whose reload a figure is compared with: its own, or the one that the server over HTTP is like."""
    compared: dict[str, Any] = result[name.removesuffix("_over_http")]
    return compared


def _medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {what: round(statistics.median(values), 4) for what, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4224)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="Also with plain tensors, streamed and in place.")
    parser.add_argument("--http", action="store_true", help="Also over the control route.")
    parser.add_argument("--profile", action="store_true", help="Take the times of the RPCs apart.")
    parser.add_argument("--folder", type=Path, help="Where the pool is built; a temporary folder there is removed.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work: Callable[..., dict[str, Any]] = child
        print(json.dumps(work(*json.loads(arguments.child))), flush=True)
        return
    size = Size(arguments.models, arguments.hidden, arguments.intermediate, arguments.layers, arguments.vocab)
    with tempfile.TemporaryDirectory(prefix="engine-mixing-", dir=arguments.folder) as folder:
        found = measure(
            Path(folder),
            size,
            runs=arguments.runs,
            plain=arguments.plain,
            http=arguments.http,
            profile=arguments.profile,
        )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
