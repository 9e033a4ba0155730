"""The tokenizer that examples are scored with: the base's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.errors import ConfigError
from cocktail_serve.loading import library_loading, require_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """As `load_tokenizer`, one that tells where in the text a token starts: outputs of decoders are found by it.

    Raises:
        ConfigError: there is none.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{folder} has no fast tokenizer (tokenizer.json), which tells where an output starts: add the one that "
            "its publisher has, or mix by merging_weights, which need no losses"
        )
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Blocks.

    Raises:
        ConfigError: there is none that transformers can load without code of the checkpoint's own.
    """
    try:
        with library_loading:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ConfigError:  # there is no such library
        raise
    except Exception as error:  # each tokenizer class, and the import itself, has errors of its own
        raise ConfigError(
            f"transformers cannot load the tokenizer of {folder}; copy tokenizer.json and tokenizer_config.json there "
            f"from the model that it was made of: {type(error).__name__}: {_first_line(error)}"
        ) from error
    require_words(tokenizer, folder)
    return tokenizer


def _first_line(error: Exception) -> str:
    return re.sub(r":\s*$", ": ...", str(error).strip().partition("\n")[0])
