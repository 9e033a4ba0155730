"""The chat template of a model folder, read as transformers reads it and made to work with the base's tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.layout import read_optional_json
from cocktail_serve.checkpoints.special_tokens import SPECIAL_TOKENS, TOKENIZER_CONFIG
from cocktail_serve.errors import CheckpointError
from cocktail_serve.generation_settings import ChatTemplate

CHAT_TEMPLATE = "chat_template.jinja"
DEFAULT, TOOL_USE = "default", "tool_use"

MORE_TEMPLATES = "additional_chat_templates"
"""Folder of the templates that go by another name than `DEFAULT`."""


def own_template(
    folder: Path, tokens: Mapping[str, str], base_tokens: Mapping[str, str], *, defaults: Mapping[str, Any]
) -> ChatTemplate | None:
    """The folder's own template, to be rendered with the base's tokenizer; None where it has none.

    Args:
        tokens: the folder's special tokens by name.
        base_tokens: the base's, which rendering would give it.
        defaults: as of `ChatTemplate`.
    """
    named = templates(folder)
    text = named.get(DEFAULT)
    if text is None:
        return None
    tool_use = named.get(TOOL_USE)
    return ChatTemplate(
        _bound(text, tokens, base_tokens),
        None if tool_use is None else _bound(tool_use, tokens, base_tokens),
        defaults=defaults,
    )


def templates(folder: Path) -> dict[str, str]:
    """Templates by name, as transformers reads them: files of their own go before what the tokenizer's settings hold.

    Raises:
        CheckpointError: a file cannot be read, or does not hold templates.
    """
    files = {DEFAULT: folder / CHAT_TEMPLATE}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    there = {name: file for name, file in files.items() if file.is_file()}
    if there:
        return {name: _read_text(file) for name, file in there.items()}
    for path in (folder / TOKENIZER_CONFIG, folder / "chat_template.json"):
        given = read_optional_json(path).get("chat_template")
        if given is None:
            continue
        entries = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given
        try:
            named = {entry["name"]: entry["template"] for entry in entries}
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: chat_template must be a text, or a list of names and templates") from error
        return {name: text for name, text in named.items() if isinstance(text, str)}
    return {}


def _bound(text: str, tokens: Mapping[str, str], base_tokens: Mapping[str, str]) -> str:
    """A template that brings those special tokens itself which the base's tokenizer would give it others for."""
    said = [
        f"{{% set {name} = {json.dumps(tokens[name], ensure_ascii=False)} %}}\n"  # the newline goes with the tag
        for name in SPECIAL_TOKENS
        if name in tokens and tokens[name] != base_tokens.get(name, "") and re.search(rf"\b{name}\b", text)
    ]
    return "".join(said) + text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
