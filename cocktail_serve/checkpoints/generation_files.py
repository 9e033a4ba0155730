"""How a model folder says that it is called, read as vLLM reads it: end tokens, sampling defaults, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.chat_templates import (
    CHAT_TEMPLATE,
    DEFAULT,
    MORE_TEMPLATES,
    TOOL_USE,
    own_template,
    templates,
)
from cocktail_serve.checkpoints.layout import CONFIG, model_folder, read_config, read_json
from cocktail_serve.checkpoints.special_tokens import special_tokens, token_id
from cocktail_serve.errors import CheckpointError
from cocktail_serve.generation_settings import (
    MAX_TOKENS,
    NEUTRAL_SAMPLING,
    NO_OPTIONS,
    ChatTemplate,
    GenerationOptions,
    GenerationSettings,
)

GENERATION_CONFIG = "generation_config.json"

MAX_NEW_TOKENS = "max_new_tokens"
"""What generation_config.json calls `MAX_TOKENS`; the other defaults have the request's names there too."""

_TEXT_CONFIGS = ("decoder", "generator", "text_config")
"""Where a model with more than text keeps the text model's configuration, in the order that transformers looks."""


def read_settings(
    folder: Path, base: Path | None = None, *, options: GenerationOptions = NO_OPTIONS
) -> GenerationSettings:
    """How a model of a pool is called by what its folder and the operator say.

    What a folder lacks is the base's: an adapter's configuration, the tokenizer of an expert that was saved without.

    Args:
        base: the base's folder, where `folder` is an expert's.

    Raises:
        CheckpointError: a file cannot be read, or holds what no release of transformers writes.
    """
    root, base_root = model_folder(folder), model_folder(folder if base is None else base)
    base_tokens = special_tokens(base_root)
    tokens = {**base_tokens, **special_tokens(root)}
    end = tokens.get("eos_token")
    # the same token has the same id in both, which was checked when the tokenizers were compared
    end_id = token_id(base_root if end == base_tokens.get("eos_token") else root, end) if end else None
    generation = _generation_config(options.generation_config or root) or _generation_config(base_root)
    where, values = generation or (root / GENERATION_CONFIG, {})
    vocab_size = _vocab_size(base_root)
    named = [*_token_ids(values, where), *([] if end_id is None else [end_id])]
    # vLLM refuses requests that name tokens beyond the vocabulary, which no model says anyway
    stops = {token for token in named if token >= 0 and (vocab_size is None or token < vocab_size)}
    if end_id is None and len(stops) == 1:
        (end_id,) = stops  # the tokenizer's class knows it, and its files do not say
    return GenerationSettings(
        end_token_ids=(end_id,) if end_id in stops else (),
        stop_token_ids=tuple(sorted(stops)),
        sampling=_sampling(values, where, options),
        chat_template=_chat_template(root, tokens, base_tokens, options),
    )


def _chat_template(
    root: Path, tokens: Mapping[str, str], base_tokens: Mapping[str, str], options: GenerationOptions
) -> ChatTemplate | None:
    if not options.has_templates:
        return None
    if options.chat_template is not None:
        return options.chat_template
    return own_template(root, tokens, base_tokens, defaults=options.chat_template_defaults)


def common_template(settings: Sequence[GenerationSettings]) -> ChatTemplate | None:
    """What messages of a whole pool are rendered by: the base's template, else the one that all experts with one share.

    Args:
        settings: the base's first.
    """
    base, *experts = settings
    templates = [each.chat_template for each in experts if each.chat_template is not None]
    if base.chat_template is not None or not templates:
        return base.chat_template
    return templates[0] if all(template == templates[0] for template in templates) else None


def write_settings(folder: Path, settings: GenerationSettings, *, base: GenerationSettings) -> None:
    """Makes a copy of the base's folder say how a mixture is called. What is the base's stays, byte for byte."""
    if settings.stop_token_ids != base.stop_token_ids or settings.sampling != base.sampling:
        values = _written(folder)
        if settings.stop_token_ids != base.stop_token_ids:
            stops = list(settings.stop_token_ids)
            values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        if settings.sampling != base.sampling:
            for name in (*NEUTRAL_SAMPLING, MAX_NEW_TOKENS, "do_sample"):
                values.pop(name, None)
            values |= {MAX_NEW_TOKENS if name == MAX_TOKENS else name: v for name, v in settings.sampling.items()}
            # without, transformers refuses to save a model whose generation_config.json names these
            if settings.sampling.keys() & {"temperature", "top_p", "top_k", "min_p"}:
                values["do_sample"] = True
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
    template, own = settings.chat_template, templates(folder)
    if template is not None and (template.text, template.tool_use) != (own.get(DEFAULT), own.get(TOOL_USE)):
        (folder / "chat_template.json").unlink(missing_ok=True)  # a processor's, which vLLM would ask first
        more = folder / MORE_TEMPLATES
        for file in more.glob("*.jinja"):
            file.unlink()
        (folder / CHAT_TEMPLATE).write_text(template.text, encoding="utf-8", newline="")
        if template.tool_use is not None:
            more.mkdir(exist_ok=True)
            (more / f"{TOOL_USE}.jinja").write_text(template.tool_use, encoding="utf-8", newline="")


def _written(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; where there is none, what would count of its config.json then."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        return read_json(path)
    _, values = _generation_config(folder) or (path, {})
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", *NEUTRAL_SAMPLING, MAX_NEW_TOKENS)
    return {name: values[name] for name in kept if values.get(name) is not None}


def _generation_config(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The file that says how a model is called, and what it says; None for an adapter, which usually has neither.

    As transformers: generation_config.json alone where there is one, else config.json and the text model's part of it.
    """
    path = folder / GENERATION_CONFIG
    if path.is_file():
        return path, read_json(path)
    path = folder / CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    inner: dict[str, Any] = next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict)), {})
    return path, {**inner, **{name: value for name, value in config.items() if value is not None}}


def _token_ids(values: Mapping[str, Any], where: Path) -> list[int]:
    given = values.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{where}: eos_token_id must be a token id or a list of them, got {given!r:.80}")
    return ids


def _sampling(values: Mapping[str, Any], where: Path, options: GenerationOptions) -> dict[str, float]:
    if not options.has_sampling:
        return {}
    found: dict[str, float] = {}
    for name in (*NEUTRAL_SAMPLING, MAX_NEW_TOKENS):
        value = values.get(name)
        if value is None or request_name(name) in options.overridden:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{where}: {name} must be a number, got {value!r:.80}")
        if value != NEUTRAL_SAMPLING.get(name):
            found[request_name(name)] = value
    return found


def request_name(name: str) -> str:
    """The field of a request that a name of generation_config.json is the default of."""
    return MAX_TOKENS if name == MAX_NEW_TOKENS else name


def _vocab_size(folder: Path) -> int | None:
    """Tokens that the model can say at all."""
    config = read_config(folder)
    for values in (config, *(config.get(name) for name in _TEXT_CONFIGS)):
        if isinstance(values, dict) and isinstance(values.get("vocab_size"), int):
            return int(values["vocab_size"])
    return None
