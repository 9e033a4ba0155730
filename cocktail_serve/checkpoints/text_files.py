"""What stands between a text and the parameters: tokenizer, chat template, pooling and prompts of a model folder."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.layout import MODULES, load_json, model_folder, read_json, read_modules
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import CheckpointError
from cocktail_serve.loading import library_loading

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)

_VOLATILE = frozenset({"name_or_path", "_name_or_path", "transformers_version", "tokenizer_file", "__version__"})
"""Who wrote the file and from where: says nothing of how text is read."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """What decides which ids a text becomes.

    Attributes:
        vocab: id by token, added tokens included.
        pipeline: further parts by name; equal parts cut text the same way.
    """

    vocab: Mapping[str, int]
    pipeline: Mapping[str, Any]


def read_tokenization(folder: Path) -> Tokenization | None:
    """The tokenizer of a model folder, or None where it has none.

    Raises:
        CheckpointError: there is one and it cannot be read.
    """
    root = model_folder(folder)
    if (root / "tokenizer.json").is_file():
        return _from_tokenizer_json(root / "tokenizer.json")
    if not any((root / name).is_file() for name in TOKENIZER_FILES if name.startswith(("vocab", "spiece", "sent"))):
        return None
    try:
        with library_loading:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
        return Tokenization(vocab=dict(tokenizer.get_vocab()), pipeline={})
    except Exception as error:  # each tokenizer class has errors of its own
        raise CheckpointError(f"{root}: transformers cannot read the tokenizer: {error}") from error


def is_same_tokenizer_file(one: Path, other: Path) -> bool:
    """Whether both folders hold the same `tokenizer.json`, byte for byte, as fine-tuned models usually do."""
    mine, theirs = (model_folder(folder) / "tokenizer.json" for folder in (one, other))
    return mine.is_file() and theirs.is_file() and filecmp.cmp(mine, theirs, shallow=False)


def _from_tokenizer_json(path: Path) -> Tokenization:
    content = read_json(path)
    try:
        model = content["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # unigram: [token, score] in the order of ids
            ids = {token: index for index, (token, _) in enumerate(vocab)}
            scores: Any = [score for _, score in vocab]
        else:
            ids, scores = dict(vocab), None
        ids.update({token["content"]: token["id"] for token in content.get("added_tokens") or []})
        # both ways of writing a merge are in use: "a b" and ["a", "b"]
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
        return Tokenization(
            vocab=ids,
            pipeline={
                "type": model.get("type") or ("BPE" if merges else None),
                "merges": merges,
                "scores": scores,
                "normalizer": content.get("normalizer"),
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {error!r}") from error


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


def text_digest(folder: Path, *, prompts: Mapping[str, str]) -> str:
    """SHA-256 over the base's tokenizer, chat template, modules, their settings, and the pool's prompts.

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
    return digest_of({"files": parts, "prompts": dict(prompts)})


def _content_digest(path: Path) -> str:
    if path.suffix == ".json":
        return digest_of(_stable(load_json(path)))
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value
