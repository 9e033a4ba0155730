"""What stands between a text and the parameters: tokenizer, chat template, pooling and prompts of a model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.layout import MODULES, load_json, model_folder, read_json, read_modules
from cocktail_serve.checkpoints.tokenizer import TOKENIZER_FILES
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import CheckpointError

_VOLATILE = frozenset({"name_or_path", "_name_or_path", "transformers_version", "tokenizer_file", "__version__"})
"""Who wrote the file and from where: says nothing of how text is read."""


def read_pooling(folder: Path) -> str:
    """How a sentence-transformers Pooling module pools, such as `mean`; several are joined by `+`.

    Raises:
        CheckpointError: no readable configuration.
    """
    config = read_json(folder / "config.json")
    mode = config.get("pooling_mode")
    if mode is not None:
        return "+".join(mode) if isinstance(mode, list) else str(mode)
    # before sentence-transformers 5 there was a flag for each
    flags = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    return "+".join(name for flag, name in flags.items() if config.get(flag)) or "mean"


def text_digest(folder: Path, *, prompts: Mapping[str, str], chat_template: str | None = None) -> str:
    """SHA-256 over the base's tokenizer, chat template, modules, their settings, and the pool's prompts.

    Args:
        chat_template: digest of what messages are rendered by, where that is not the folder's own template.

    Two folders that read text the same way may still differ here (another layout of the same JSON does not matter,
    another file does): then losses are measured again, which is never wrong.

    Raises:
        CheckpointError: a file cannot be read.
    """
    root = model_folder(folder)
    parts = {name: _content_digest(root / name) for name in TOKENIZER_FILES if (root / name).is_file()}
    for name in (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"):
        for place in {folder, root}:
            if (place / name).is_file():
                parts[f"modules/{name}"] = _content_digest(place / name)
    for module in read_modules(folder):
        config = folder / module.path / "config.json"
        if module.path and folder / module.path != root and config.is_file():
            parts[f"modules/{module.path}"] = _content_digest(config)
    more = {} if chat_template is None else {"chat_template": chat_template}
    return digest_of({"files": parts, "prompts": dict(prompts), **more})


def _content_digest(path: Path) -> str:
    if path.suffix == ".json":
        value = _stable(load_json(path))
        try:
            return digest_of(value)
        except ValueError:  # what Python writes and JSON has no words for: infinite numbers, halves of characters
            pass
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value
