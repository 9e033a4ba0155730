"""The special tokens of a model folder's tokenizer, told from its small files: no tokenizer is loaded here."""

from __future__ import annotations

from pathlib import Path

from cocktail_serve.checkpoints.layout import read_optional_json
from cocktail_serve.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a tokenizer gives its chat template beside the messages."""


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokenizer's special tokens by name, as far as its files say: absent ones are its class's, or another's."""
    config = read_optional_json(folder / TOKENIZER_CONFIG)
    values = dict(config)
    if "added_tokens_decoder" not in config:  # as transformers: the older file counts where the newer entry is missing
        values |= read_optional_json(folder / "special_tokens_map.json")
    tokens = {}
    for name in SPECIAL_TOKENS:
        if name in values:
            value = values[name]
            tokens[name] = value.get("content", "") if isinstance(value, dict) else value if value is not None else ""
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def token_id(folder: Path, token: str) -> int | None:
    """The id of a token; None where the tokenizer does not have it.

    Small files first: a tokenizer.json of a large vocabulary takes a second to read.
    """
    decoder = read_optional_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    for index, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and entry.get("content") == token and str(index).isdigit():
            return int(index)
    added = read_optional_json(folder / "added_tokens.json").get(token)
    return added if isinstance(added, int) else _id_in_tokenizer(folder / "tokenizer.json", token)


def _id_in_tokenizer(path: Path, token: str) -> int | None:
    tokenizer = read_optional_json(path)
    try:
        ids = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
        vocab = tokenizer.get("model", {}).get("vocab") or {}
        if isinstance(vocab, list):  # unigram: [token, score] in the order of ids
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        found = ids.get(token, vocab.get(token))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {error!r}") from error
    return found if isinstance(found, int) else None
