"""What the operator lays down for all models of a pool, from arguments of the engine that mean the same in vLLM."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.generation_files import GENERATION_CONFIG, request_name
from cocktail_serve.config import PoolConfig, VLLMEngineConfig
from cocktail_serve.errors import ConfigError
from cocktail_serve.generation_settings import NO_OPTIONS, ChatTemplate, GenerationOptions

_JINJA = re.compile(r"[{}\n]")
"""What a template has and a path has not, for vLLM."""


def read_options(config: PoolConfig, base: Path) -> GenerationOptions:
    """What `engine.args` says of all models of a pool.

    Args:
        base: folder of its base, whose tokenizer the engine runs.

    Raises:
        ConfigError: a chat template or a generation_config.json that is not there or cannot be read.
    """
    engine = config.engine
    if not isinstance(engine, VLLMEngineConfig):
        return NO_OPTIONS
    defaults = _mapping(engine, "default-chat-template-kwargs")
    template = engine.argument("chat-template")
    text = None if template is None else _read_argument(str(template))
    source = engine.argument("generation-config")
    folder = None if source in (None, "auto", "vllm") else Path(source)
    if folder is not None and not (folder / GENERATION_CONFIG).is_file():
        raise ConfigError(
            f"engine.args.generation-config: {folder} holds no {GENERATION_CONFIG}; name a folder that does, or auto",
            param="engine.args.generation-config",
        )
    return GenerationOptions(
        chat_template=None if text is None else ChatTemplate(text, defaults=defaults),
        chat_template_defaults=defaults,
        generation_config=folder,
        has_sampling=source != "vllm",
        has_templates=_takes_templates(base, engine.argument("tokenizer-mode") or "auto"),
        overridden=frozenset(request_name(name) for name in _mapping(engine, "override-generation-config")),
    )


def _read_argument(given: str) -> str:
    """The template that `chat-template` means: a file, one that comes with vLLM, or the text itself."""
    param = "engine.args.chat-template"
    text = given
    if not _JINJA.search(given):
        path = next(
            (path for path in (Path(given), _vllm_template(given)) if path is not None and path.is_file()), None
        )
        if path is None:
            raise ConfigError(
                f"{param}: there is no file {given}, and vLLM has no template of that name; give a path, which is "
                "relative to the configuration, or the template itself",
                param=param,
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{param}: cannot read {path}: {error}", param=param) from error
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(text)
    except TemplateSyntaxError as error:
        # tags of transformers' own are no fault
        if "unknown tag 'generation'" not in str(error):
            raise ConfigError(f"{param}: line {error.lineno} is no Jinja: {error.message}", param=param) from error
    return text


def _takes_templates(base: Path, mode: str) -> bool:
    """Whether the engine's tokenizer is one of transformers'. By itself, vLLM takes Mistral's own where it is there."""
    if mode == "auto":
        is_mistrals = any(base.glob("consolidated*.safetensors"))
        return not (is_mistrals and (any(base.glob("tekken.json")) or any(base.glob("tokenizer.model.v*"))))
    return mode in ("hf", "slow")


def _vllm_template(name: str) -> Path | None:
    """A template that comes with vLLM, which is not imported for it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None or "/" in name:
        return None
    path = Path(spec.origin).parent / "transformers_utils" / "chat_templates" / name
    return path if path.is_file() else None


def _mapping(engine: VLLMEngineConfig, name: str) -> Mapping[str, Any]:
    value = engine.argument(name)
    if value is None:
        return {}
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"engine.args.{name}: {error}", param=f"engine.args.{name}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"engine.args.{name} must be a mapping, got {value!r:.80}", param=f"engine.args.{name}")
    return value
