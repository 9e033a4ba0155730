"""Model folders of a training: a base to load, and an expert to write.

An expert has the parameters as their library writes them, and all else as the base's publisher has it. Written anew, a
tokenizer loses its normalizer or gains tokens, `rope_theta` goes where older tools do not look for it, and generation
settings that the publisher never completed end in an error. Training changes none of these files, so they are copied.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cocktail_serve.checkpoints.folder import copy_files, write_config
from cocktail_serve.checkpoints.layout import CONFIG, MODULES, model_folder, read_modules
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError

_MODULE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")


def dtype_of(base: Path) -> str:
    """What experts of the base are stored in: the dtype of most of its parameters.

    Raises:
        CheckpointError: the folder cannot be read as a checkpoint.
    """
    with CheckpointReader(base) as reader:
        return reader.dtype


@contextmanager
def loading(base: Path) -> Iterator[None]:
    """What a library says of a folder that it cannot load, as CheckpointError that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{base} cannot be loaded for training: {error}") from error


def store(save: Callable[[Path], object], base: Path, out: Path, *, dtype: str) -> None:
    """Writes a model that was trained from a base.

    Args:
        save: writes the model into an empty folder, by its library.
        out: gets the parameters where the base has its own, and the base's configuration, tokenizer, chat template,
            generation settings, modules and prompts.
        dtype: that of the parameters.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="saved-") as scratch:
        saved = Path(scratch)
        save(saved)
        copy_files(base, out)
        root = model_folder(base).relative_to(base)
        modules, own = read_modules(saved), read_modules(base)
        if not own:  # those that sentence-transformers chose: the expert was trained with them
            for name in (*_MODULE_FILES, *(f"{module.path}/{CONFIG}" for module in modules if module.path)):
                _move(saved / name, out / name)
        places = zip(modules, own or modules, strict=True)
        for source, target in [("", root), *((module.path, other.path) for module, other in places if module.path)]:
            for file in (saved / source).glob("*.safetensors*"):
                _move(file, out / target / file.name)
    write_config(base, out, dtype=dtype)


def _move(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)
