"""A model's configuration as transformers understands it, whichever release of it wrote the file."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.layout import model_folder, read_config
from cocktail_serve.errors import CheckpointError, ConfigError
from cocktail_serve.loading import library_loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def open_model_config(folder: Path) -> PreTrainedConfig:
    """The configuration with the defaults of its architecture filled in.

    Raises:
        CheckpointError: an architecture that transformers does not know, or one that comes as code of the checkpoint's
            own, which is never run.
    """
    raw = read_config(folder)
    try:
        with library_loading:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(model_folder(folder), trust_remote_code=False, local_files_only=True)
    except ConfigError:  # there is no such library
        raise
    except Exception as error:  # each architecture checks its own configuration, with errors of its own
        if "auto_map" in raw:
            raise CheckpointError(
                f"{folder}: model type {raw.get('model_type')!r} comes as code with the checkpoint, which is never "
                "run; use an architecture that transformers knows"
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot read config.json: {type(error).__name__}: {error}"
        ) from error


def load_model_config(folder: Path) -> dict[str, Any]:
    """The same as a plain dict.

    Two releases write the same model differently (defaults left out, keys renamed), so files are not compared as text.

    Raises:
        CheckpointError: as `open_model_config`.
    """
    config: dict[str, Any] = open_model_config(folder).to_dict()
    return config


def is_declared(config: type[PreTrainedConfig], key: str) -> bool:
    """Whether a setting, as `text_config.head_dim`, is one that the architecture has.

    What a file holds beside them (who trained the model, with which tool) no code of the library reads.
    """
    name, _, rest = key.partition(".")
    nested = (getattr(config, "sub_configs", None) or {}).get(name)
    if rest and isinstance(nested, type) and is_dataclass(nested):
        return is_declared(nested, rest)
    declared = {field.name for field in fields(config)}
    return name in declared or name in config.attribute_map
