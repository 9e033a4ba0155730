"""`python -m vllm_cocktail.check ARGUMENTS`: what vLLM says of a server's command line, before it reads a parameter.

The arguments are those of vLLM's OpenAI server, the environment the server's own. They are taken through the same
steps: parsed, made a configuration, which finds the model's class, and given a tokenizer. The last line of the output
is a JSON object: `reason`, null where vLLM would go on and load the model; `warnings`, of what it would not speak of.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from pydantic import ValidationError

from cocktail_serve.errors import ConfigError
from cocktail_serve.loading import require_words
from cocktail_serve.suggestions import did_you_mean, with_options_meant
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.unmerged.worker import require_unmergeable
from vllm_cocktail.worker import require_mixable

GIB = 1024**3

_OWN_PREFIX = "VLLM_COCKTAIL_"

_CLI_ARGS = ("common", "launchers", "openai")
"""Where in `vllm.entrypoints` its command line is described: since 0.33, in 0.32, and before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints why a server with these arguments would not start, or that nothing is known against it. Returns 0."""
    try:
        reason = None
        _check(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        reason = error.message
    except ValidationError as error:  # its own text goes on with the values of all fields
        reason = "; ".join(str(found["msg"]).removeprefix("Value error, ") for found in error.errors())
    except Exception as error:  # noqa: BLE001  # whatever vLLM raises is its reason
        reason = f"{type(error).__name__}: {str(error).strip()}"
    print(f"\n{json.dumps({'reason': reason, 'warnings': list(unknown_variables(os.environ))})}", flush=True)
    return 0


def unknown_variables(names: Iterable[str]) -> Iterator[str]:
    """What to say of variables that look like vLLM's and that vLLM, which says nothing of them, does not read."""
    from vllm import envs

    known = list(envs.environment_variables)
    for name in sorted(names):
        if name.startswith("VLLM_") and name not in known and not name.startswith(_OWN_PREFIX):
            meant = did_you_mean(name, known, max_compared=None)
            yield f"vLLM reads no variable {name!r} (engine.env, or the environment of the server){meant}"


def _check(argv: Sequence[str]) -> None:
    arguments = _parse(argv)
    config = _config_of(arguments)
    manifest = Manifest.from_environ()
    (require_unmergeable if manifest.mode == "unmerged" else require_mixable)(config, manifest)
    _check_parsers(arguments)
    _check_tokenizer(config.model_config)
    _check_kv_cache(config)


def _cli_args() -> Any:
    """vLLM's description of its command line; ConfigError where it has none that is known."""
    for place in _CLI_ARGS:
        with contextlib.suppress(ModuleNotFoundError):
            return import_module(f"vllm.entrypoints.{place}.cli_args")
    raise ConfigError("this release of vLLM describes its command line elsewhere, so engine.args cannot be checked")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError with what vLLM's parser says, and the options that were meant."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_args = _cli_args()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(with_options_meant(message, parser.format_usage()))

    parser = FlexibleArgumentParser(prog="vllm")
    parser.error = refuse  # which would end the process, with a page of usage
    arguments: argparse.Namespace = cli_args.make_arg_parser(parser).parse_args(list(argv))
    cli_args.validate_parsed_serve_args(arguments)
    return arguments


def _config_of(arguments: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def _check_parsers(arguments: argparse.Namespace) -> None:
    """Raises KeyError for a parser of tool calls or reasoning that vLLM does not know; it looks them up at the end."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for path, load in (
        (arguments.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (arguments.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if path:
            load(path)
    if arguments.enable_auto_tool_choice:
        ToolParserManager.get_tool_parser(arguments.tool_call_parser)
    if arguments.structured_outputs_config.reasoning_parser:
        ReasoningParserManager.get_reasoning_parser(arguments.structured_outputs_config.reasoning_parser)


def _check_tokenizer(model: Any) -> None:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is not None:
        require_words(tokenizer, model.tokenizer)


def _check_kv_cache(config: Any) -> None:
    """Raises ConfigError where one context does not fit into a KV cache of a size that is set.

    Counted for models whose every layer attends to the whole context; others need less, and vLLM says how much.
    """
    model, parallel = config.model_config, config.parallel_config
    room: int | None = config.cache_config.kv_cache_memory_bytes
    if room is None or model.is_hybrid or model.is_attention_free or model.use_mla or model.get_sliding_window():
        return
    item_bytes = model.dtype.itemsize if config.cache_config.cache_dtype == "auto" else 1
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    per_token *= item_bytes
    if model.max_model_len * per_token > room:
        raise ConfigError(
            f"a context of {model.max_model_len} tokens needs {model.max_model_len * per_token / GIB:.2f} GiB of KV "
            f"cache, and {room / GIB:.2f} GiB are set aside: set engine.max_model_len to at most "
            f"{room // per_token}, or set more aside by kv-cache-memory-bytes in engine.args"
        )


if __name__ == "__main__":
    sys.exit(main())
