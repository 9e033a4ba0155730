"""A tokenizer as transformers makes it of a folder, taken out of transformers and run without it.

What a folder's files mean is decided by transformers alone: by the class that it picks, what this builds from settings,
which templates count. So it loads the folder once, in a process that may be a short-lived one, and what came out is
written down: the pipeline of the `tokenizers` library, the special tokens, the templates. What is written down is tried
beside the original before anybody uses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from blake3 import blake3
from tokenizers import Tokenizer

from cocktail_serve.checkpoints.tokenizer import texts_to_try
from cocktail_serve.loading import library_loading
from cocktail_serve.scoring.chat_rendering import chosen, render
from cocktail_serve.scoring.tokenizer import load_fast_tokenizer

FORMAT = 1
"""Raised when what is written down comes to say more, or is tried otherwise."""

_OWN_METHODS = ("__call__", "_encode_plus", "apply_chat_template", "get_chat_template")
"""What cuts texts and renders messages in transformers; a class with another of its own does more than its pipeline."""

_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": " what is\nthe capital? "}, {"role": "assistant", "content": "<paris> & é"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "that"},
        {"role": "user", "content": "which"},
    ],
)
_TOOLS = [
    {
        "type": "function",
        "function": {"name": "now", "description": "<é>", "parameters": {"type": "object", "properties": {}}},
    }
]


class ExampleTokenizer(Protocol):
    """What of a fast tokenizer of transformers examples are tokenised by."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if it has one."""

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """Its template, or its templates by name."""

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        return_offsets_mapping: bool,
        truncation: bool,
        verbose: bool,
    ) -> Mapping[str, Any]:
        """`input_ids` of a text, and as `offset_mapping` where in the text each begins and ends, in characters."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        tokenize: Literal[False],
        add_generation_prompt: bool,
        **variables: Any,
    ) -> Any:
        """The text of a conversation; `chat_template`, where it is given, is rendered instead of its own."""


class ExportedTokenizer:
    """An `ExampleTokenizer` without transformers. Not thread-safe: one thread owns it.

    Args:
        content: what `export_tokenizer` wrote.

    Raises:
        ValueError: it is not what was written, or of another format.
    """

    def __init__(self, content: bytes) -> None:
        header, _, pipeline = content.partition(b"\n")
        said = json.loads(header)
        if not isinstance(said, dict) or said.get("format") != FORMAT or said.get("pipeline") != _digest(pipeline):
            raise ValueError("not an exported tokenizer of this release")
        self.needs_library: str = said["needs_library"]
        self.eos_token_id: int | None = said["eos_token_id"]
        self.chat_template: str | dict[str, str] | None = said["chat_template"]
        self._special_tokens: dict[str, str] = said["special_tokens"]
        self._tokenizer = Tokenizer.from_buffer(pipeline)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = said["split_special_tokens"]

    def __call__(self, text: str, *, add_special_tokens: bool, **_options: bool) -> dict[str, Any]:
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return {"input_ids": encoded.ids, "offset_mapping": encoded.offsets}

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        tokenize: Literal[False] = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        if not conversation:
            raise ValueError("a conversation has at least one message")
        return render(
            chosen(self.chat_template, chat_template, has_tools=tools is not None),
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self._special_tokens, **variables},
        )


def export_tokenizer(folder: Path) -> bytes:
    """The tokenizer of a model folder, for `ExportedTokenizer`. Imports transformers. Blocks.

    Where the original does what its pipeline and templates alone do not, the export says so in `needs_library`.

    Raises:
        ConfigError: as `load_fast_tokenizer`.
    """
    tokenizer = load_fast_tokenizer(folder)
    tokenizer("a", truncation=False, padding=False)  # what the file says of them is not used, and not written down
    pipeline = tokenizer.backend_tokenizer.to_str().encode()
    header = {
        "format": FORMAT,
        "pipeline": _digest(pipeline),
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "special_tokens": dict(tokenizer.special_tokens_map),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "needs_library": "",
    }
    exported = ExportedTokenizer(_joined(header, pipeline))
    return _joined({**header, "needs_library": _difference(tokenizer, exported)}, pipeline)


def _joined(header: Mapping[str, Any], pipeline: bytes) -> bytes:
    return json.dumps(header).encode() + b"\n" + pipeline


def _digest(content: bytes) -> str:
    return blake3(content).hexdigest()


def _difference(original: Any, exported: ExportedTokenizer) -> str:
    """What the original does otherwise; empty: nothing that was tried."""
    with library_loading:
        from transformers import PreTrainedTokenizerFast

    own = [name for name in _OWN_METHODS if getattr(type(original), name) is not getattr(PreTrainedTokenizerFast, name)]
    if own:
        return f"{type(original).__name__} has a way of its own ({', '.join(own)})"
    for text in texts_to_try(original):
        for add_special_tokens in (False, True):
            options = {"return_offsets_mapping": True, "truncation": False, "verbose": False}
            mine = exported(text, add_special_tokens=add_special_tokens, **options)
            theirs = original(text, add_special_tokens=add_special_tokens, **options)
            if any(list(mine[key]) != list(theirs[key]) for key in ("input_ids", "offset_mapping")):
                return f"it cuts {text[:40]!r} otherwise than its pipeline"
    for messages in _CONVERSATIONS if original.chat_template else ():
        for tools in (None, _TOOLS):
            for prompted in (False, True):
                one, other = (_rendered(each, messages, tools, prompted) for each in (original, exported))
                if one != other:
                    return "its chat template renders otherwise than Jinja does"
    return ""


def _rendered(tokenizer: ExampleTokenizer, messages: Sequence[dict[str, Any]], tools: Any, prompted: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools, tokenize=False, add_generation_prompt=prompted
        )
    except Exception as error:  # noqa: BLE001  templates are programs: what they refuse, they refuse in their own ways
        return f"refused: {type(error).__name__}"
    return text
