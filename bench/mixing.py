"""Mixing at memory speed: a read-only scan, the kernel, the offline tool, LM_Cocktail and mergekit, on one pool.

Builds the pool, and with `--peers FOLDER` an environment each for LM_Cocktail 0.0.4 and mergekit 0.1.5 (by `uv`), then
measures everything in turn, `--runs` times, each in a process of its own. Prints JSON: medians, ratios, peak anonymous
memory, and how far the merged tensors of all three lie from float64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import make_environment
from bench.machine import describe_machine

PEERS: Mapping[str, tuple[str, ...]] = {
    "lm_cocktail": ("LM_Cocktail==0.0.4", "transformers<5", "sentence-transformers<5", "accelerate", "torch"),
    "mergekit": ("mergekit==0.1.5", "torch"),
}
SAMPLE_S = 0.005
"""Between two looks at a process's memory."""

_LM_COCKTAIL = """
import json, sys, time
from LM_Cocktail import mix_models
models, weights, out = json.loads(sys.argv[1])
begin = time.perf_counter()
mix_models(model_names_or_paths=models, model_type="decoder", weights=weights, output_path=out)
print(json.dumps({"seconds": time.perf_counter() - begin}))
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the pool's models, Llama's."""

    num_models: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{prefix}.self_attn.{name}.weight", (self.hidden, self.hidden)
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}.mlp.{name}.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}.{name}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())


def make_pool(folder: Path, size: Size, seed: int = 0) -> list[Path]:
    """Model folders of bfloat16 parameters: a base, and experts that moved a little from it.

    The numbers are a seeded block of normals, repeated from another place in each tensor: made in seconds, and no
    slower to mix than real ones.
    """
    generator = np.random.default_rng(seed)
    block = generator.standard_normal(1_048_583, dtype=np.float32) * np.float32(0.02)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "vocab_size": size.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folders = []
    for number in range(size.num_models):
        moved = block if number == 0 else block * (1 + 0.1 * generator.standard_normal(len(block), dtype=np.float32))
        halves = (moved.view(np.uint32) >> 16).astype(np.uint16)
        path = folder / f"model-{number}"
        path.mkdir(parents=True)
        with (path / "model.safetensors").open("wb") as file:
            file.write(_safetensors_header(size))
            for turn, (_, shape) in enumerate(size.tensors(), start=1):
                np.resize(np.roll(halves, -7919 * turn), math.prod(shape)).tofile(file)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        _write_tokenizer(path)
        folders.append(path)
    return folders


def _safetensors_header(size: Size) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in size.tensors():
        end = begin + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer that any release of transformers reads: the peers want one."""
    from tokenizers import Tokenizer, models

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_config(folder: Path, models: Sequence[Path]) -> Path:
    """The configuration that `cocktail-serve mix` reads."""
    path = folder / f"config-{len(models)}.json"  # JSON is YAML too
    pool = {
        "id": "bench",
        "kind": "decoder",
        "base": str(models[0]),
        "experts": {model.name: str(model) for model in models[1:]},
        "engine": {"type": "fake", "dtype": "bfloat16"},
    }
    path.write_text(json.dumps({"store": {"cache_dir": str(folder / "cache")}, "pools": [pool]}))
    return path


def weights_of(num_models: int) -> list[float]:
    """Merging weights that no float holds exactly, of sum 1."""
    weights = [1.0 + 0.1 * number for number in range(num_models)]
    return [weight / math.fsum(weights) for weight in weights]


# What runs in a process of its own, by name


def child_kernel(models: Sequence[str]) -> dict[str, Any]:
    """Scan and kernel over the same mapped files; the kernel in chunks, as the offline tool calls it."""
    from cocktail_serve.checkpoints.mixture import address_of
    from cocktail_serve.checkpoints.reader import CheckpointReader
    from cocktail_serve.merging import native
    from cocktail_serve.merging.native import Kernel, Operand
    from cocktail_serve.merging.threads import in_parallel

    kernel = native.load_kernel()
    if not isinstance(kernel, Kernel):
        raise SystemExit(kernel)
    readers = [CheckpointReader(Path(model)) for model in models]
    weights = weights_of(len(models))
    scan = _load_scan()
    chunk = 1 << 18
    pieces, alive = [], []
    for name, info in readers[0].tensors.items():
        contents = [reader.get_bytes(name) for reader in readers]
        alive.append(contents)
        operands = [Operand(address_of(content), "bfloat16") for content in contents]
        pieces += [
            ([operand.at(begin) for operand in operands], min(chunk, info.num_elements - begin))
            for begin in range(0, info.num_elements, chunk)
        ]
    num_bytes = sum(2 * size * len(operands) for operands, size in pieces)
    own = threading.local()

    def read(first: int, last: int) -> None:
        for operands, size in pieces[first:last]:
            for operand in operands:
                scan(operand.address, 2 * size)

    def merge(first: int, last: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(2 * chunk))
        for operands, size in pieces[first:last]:
            kernel.merge(operands, weights, Operand(address_of(own.buffer), "bfloat16"), size)

    times: dict[str, list[float]] = {"scan": [], "kernel": []}
    for _ in range(6):
        for what, work in (("scan", read), ("kernel", merge)):
            begin_s = time.perf_counter()
            in_parallel(work, len(pieces), 1)
            times[what].append(time.perf_counter() - begin_s)
    # the first round maps the pages
    medians = {what: statistics.median(seconds[1:]) for what, seconds in times.items()}
    return {
        "scan_gb_per_s": num_bytes / medians["scan"] / 1e9,
        "kernel_gb_per_s": num_bytes / medians["kernel"] / 1e9,
        "kernel_over_scan": medians["scan"] / medians["kernel"],
        "best_kernel_over_best_scan": min(times["scan"][1:]) / min(times["kernel"][1:]),
    }


def _load_scan() -> Callable[[int, int], int]:
    from cocktail_serve.merging import native

    compiler = native.find_compiler()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "scan.so"
        native.build(compiler, Path(__file__).with_name("scan.c"), built)
        scan = ctypes.CDLL(str(built)).scan
    scan.argtypes, scan.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return scan  # type: ignore[no-any-return]


def child_offline(config: str, out: str) -> dict[str, Any]:
    """The offline tool after imports, with the models' fingerprints known, and memory beyond what imports took."""
    from cocktail_serve.checkpoints.folder import save_mixture
    from cocktail_serve.checkpoints.opening import open_pool
    from cocktail_serve.config import load_settings
    from cocktail_serve.recipe import make_recipe

    settings = load_settings(Path(config))
    pool_config = settings.pools[0]
    begin_s = time.perf_counter()
    open_pool(pool_config, cache_dir=settings.store.cache_dir)
    fingerprinted_s = time.perf_counter() - begin_s
    with _peak_anonymous(os.getpid()) as memory:
        begin_s = time.perf_counter()
        pool = open_pool(pool_config, cache_dir=settings.store.cache_dir)
        names = [member.name for member in pool]
        recipe = make_recipe(pool, dict(zip(names, weights_of(len(names)), strict=True)), dtype="bfloat16")
        save_mixture(recipe, pool, Path(out))
        seconds = time.perf_counter() - begin_s
    return {"seconds": seconds, "first_opening_s": fingerprinted_s, "anonymous_mb": memory["grown"] / 1e6}


@contextmanager
def _peak_anonymous(process: int) -> Iterator[dict[str, int]]:
    """Samples a process's anonymous memory: `peak`, and by how much it has `grown`, bytes."""
    status = Path(f"/proc/{process}/status")

    def anonymous() -> int:
        try:
            text = status.read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)

    before = anonymous()
    result = {"peak": before, "grown": 0}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_S):
            result["peak"] = max(result["peak"], anonymous())
            result["grown"] = result["peak"] - before

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield result
    finally:
        is_over.set()
        watcher.join()


def run(command: Sequence[str], *, timeout_s: float = 900, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs a process to its end: wall time, peak anonymous memory, and what its last line of JSON says.

    Raises:
        RuntimeError: it failed; carries the end of what it said.
    """
    begin_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    with _peak_anonymous(process.pid) as memory:
        out, err = process.communicate(timeout=timeout_s)
    wall_s = time.perf_counter() - begin_s
    if process.returncode:
        raise RuntimeError(f"{command[:3]} exited with {process.returncode}:\n{err[-2000:]}")
    lines = [line for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    said = json.loads(lines[-1]) if lines else {}
    return {"wall_s": wall_s, "peak_anonymous_mb": memory["peak"] / 1e6, **said}


def _mergekit_config(models: Sequence[Path], path: Path) -> Path:
    weighted = [
        {"model": str(model), "parameters": {"weight": weight}}
        for model, weight in zip(models, weights_of(len(models)), strict=True)
    ]
    path.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": weighted}))
    return path


def agreement(models: Sequence[Path], out: Path) -> dict[str, float]:
    """How far merged tensors lie from float64, in units of bfloat16's last place, over a part of every tensor."""
    import torch

    from cocktail_serve.checkpoints.reader import CheckpointReader

    weights = weights_of(len(models))
    readers = [CheckpointReader(model) for model in models]
    merged = CheckpointReader(out)
    worst, beyond, count = 0.0, 0, 0
    for name in readers[0].tensors:
        part = slice(0, 1 << 18)
        exact = sum(w * r.get(name).reshape(-1)[part].double() for w, r in zip(weights, readers, strict=True))
        assert isinstance(exact, torch.Tensor)
        found = merged.get(name).reshape(-1)[part].double()
        _, exponent = torch.frexp(exact)
        unit = torch.ldexp(torch.ones_like(exact), exponent.clamp_min(-125) - 8)
        off = (found - exact).abs() / unit
        worst, beyond, count = max(worst, float(off.max())), beyond + int((off > 1.0).sum()), count + len(off)
    return {"max_ulp": round(worst, 3), "share_beyond_one_ulp": beyond / count}


def measure(folder: Path, size: Size, *, runs: int, peers: Path | None) -> dict[str, Any]:
    """Everything, `runs` times in turn."""
    models = make_pool(folder / "models", size)
    weights = weights_of(len(models))
    configs = {count: write_config(folder, models[:count]) for count in {2, len(models)}}
    config = configs[len(models)]
    names = ["base", *(model.name for model in models[1:])]
    given = ",".join(f"{name}={weight!r}" for name, weight in zip(names, weights, strict=True))
    out = folder / "out"
    child = [sys.executable, "-m", "bench.mixing", "--child"]
    ours = [sys.executable, "-m", "cocktail_serve.cli", "mix", str(config), "--pool", "bench", "--weights", given]
    steps: dict[str, list[str]] = {
        "kernel": [*child, json.dumps(["kernel", [str(model) for model in models]])],
        "offline_in_process": [*child, json.dumps(["offline", str(config), str(out)])],
        "offline_in_process_two_models": [*child, json.dumps(["offline", str(configs[2]), str(out)])],
        "offline_whole_process": [*ours, "--out", str(out)],
        "offline_whole_process_first_time": [*ours, "--out", str(out)],
    }
    if peers is not None:
        arguments = json.dumps([[str(model) for model in models], weights, str(out)])
        reference = make_environment(peers / "lm_cocktail", PEERS["lm_cocktail"])
        steps["lm_cocktail"] = [str(reference), "-c", _LM_COCKTAIL, arguments]
        mergekit = make_environment(peers / "mergekit", PEERS["mergekit"]).with_name("mergekit-yaml")
        yaml = _mergekit_config(models, folder / "mergekit.yaml")
        steps["mergekit"] = [str(mergekit), str(yaml), str(out)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    parity: dict[str, Any] = {}
    for _ in range(runs):
        for name, command in steps.items():
            shutil.rmtree(out, ignore_errors=True)
            if name.endswith("first_time"):
                shutil.rmtree(folder / "cache", ignore_errors=True)
            _warm(models)
            found[name].append(run(command))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
            if name in ("offline_whole_process", "lm_cocktail", "mergekit") and name not in parity:
                parity[name] = agreement(models, out)
    medians = {name: _medians(rows) for name, rows in found.items()}
    return {
        "machine": describe_machine(),
        "pool": {"models": size.num_models, "parameters": size.num_parameters, "dtype": "bfloat16"},
        "runs": runs,
        "medians": medians,
        "ratios": _ratios(medians),
        "against_float64": parity,
    }


def _warm(models: Sequence[Path]) -> None:
    """Puts all models into the page cache, and waits until what was written before is on disk."""
    os.sync()
    for model in models:
        with (model / "model.safetensors").open("rb") as file:
            while file.read(1 << 24):
                pass


def _medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: round(statistics.median(float(row[key]) for row in rows), 4) for key in numbers}


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    ratios = {"kernel_over_scan": medians["kernel"]["kernel_over_scan"]}
    if "lm_cocktail" in medians:
        theirs = medians["lm_cocktail"]["seconds"]
        ratios["lm_cocktail_over_offline_in_process"] = theirs / medians["offline_in_process"]["seconds"]
    if "mergekit" in medians:
        for what in ("offline_whole_process", "offline_whole_process_first_time"):
            ratios[f"mergekit_over_{what}"] = medians["mergekit"]["wall_s"] / medians[what]["wall_s"]
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4224)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where the pool is built; a temporary folder there is removed.")
    parser.add_argument("--peers", type=Path, help="Folder of the peers' environments; made there if missing.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, *rest = json.loads(arguments.child)
        print(json.dumps({"kernel": child_kernel, "offline": child_offline}[name](*rest)))
        return
    size = Size(arguments.models, arguments.hidden, arguments.intermediate, arguments.layers, arguments.vocab)
    needed = 2 * size.num_parameters * (size.num_models + 1)
    with tempfile.TemporaryDirectory(prefix="mixing-", dir=arguments.folder) as folder:
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{folder} needs {needed:,} bytes free; name another --folder")
        print(json.dumps(measure(Path(folder), size, runs=arguments.runs, peers=arguments.peers), indent=2))


if __name__ == "__main__":
    main()
