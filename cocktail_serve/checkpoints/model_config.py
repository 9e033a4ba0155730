"""A model's configuration as transformers understands it, whichever release of it wrote the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.layout import model_folder, read_config
from cocktail_serve.errors import CheckpointError
from cocktail_serve.loading import library_loading


def load_model_config(folder: Path) -> dict[str, Any]:
    """The configuration with the defaults of its architecture filled in, as a plain dict.

    Two releases write the same model differently (defaults left out, keys renamed), so files are not compared as text.

    Raises:
        CheckpointError: an architecture that transformers does not know, or one that comes as code of the checkpoint's
            own, which is never run.
    """
    raw = read_config(folder)
    try:
        with library_loading:
            from transformers import AutoConfig

            config: dict[str, Any] = AutoConfig.from_pretrained(
                model_folder(folder), trust_remote_code=False, local_files_only=True
            ).to_dict()
    except Exception as error:  # each architecture checks its own configuration, with errors of its own
        if "auto_map" in raw:
            raise CheckpointError(
                f"{folder}: model type {raw.get('model_type')!r} comes as code with the checkpoint, which is never "
                "run; use an architecture that transformers knows"
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot read config.json: {type(error).__name__}: {error}"
        ) from error
    return config
