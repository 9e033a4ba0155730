"""Tokenizers of model folders, exported once and kept until a file, or a library that reads it, is another."""

from __future__ import annotations

import logging
from pathlib import Path

from blake3 import blake3

from cocktail_serve.checkpoints.chat_templates import MORE_TEMPLATES
from cocktail_serve.checkpoints.kept_files import read_kept, use_kept, write_kept
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import ConfigError
from cocktail_serve.library_process import LibraryProcess
from cocktail_serve.loading import version_of
from cocktail_serve.scoring.exported_tokenizer import FORMAT, ExampleTokenizer, ExportedTokenizer, export_tokenizer
from cocktail_serve.scoring.tokenizer import load_fast_tokenizer

logger = logging.getLogger(__name__)

TOKENIZERS = "tokenizers"
"""Folder that they are kept in, among the engines' files."""

_OF_PARAMETERS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".npz"}
)
"""Files that no tokenizer is read from. All others count: which of them transformers reads, it alone knows."""


def prepare_tokenizer(folder: Path, *, kept: Path, libraries: LibraryProcess) -> None:
    """Exports the tokenizer of a folder unless that was done before, so that `open_tokenizer` takes a moment. Blocks.

    Raises:
        ConfigError: as `open_tokenizer`.
    """
    if not use_kept(_entry(folder, kept)):
        _export(folder, kept, libraries)


def open_tokenizer(folder: Path, *, kept: Path, libraries: LibraryProcess) -> ExampleTokenizer:
    """The tokenizer of a folder, with nothing of transformers in this process where that gives the same ids. Blocks.

    Args:
        kept: folder of the exports.
        libraries: where the original is loaded; ended as soon as that is done.

    Raises:
        ConfigError: there is none that tells where in the text a token starts.
    """
    try:
        exported = ExportedTokenizer(read_kept(_entry(folder, kept)))
    except (OSError, ValueError):  # none yet, or not what was written
        exported = ExportedTokenizer(_export(folder, kept, libraries))
    if not exported.needs_library:
        return exported
    logger.info("examples of %s are tokenised by transformers: %s", folder, exported.needs_library)
    original: ExampleTokenizer = load_fast_tokenizer(folder)
    return original


def _export(folder: Path, kept: Path, libraries: LibraryProcess) -> bytes:
    entry = _entry(folder, kept)
    with libraries:
        content = libraries.call(export_tokenizer, folder)
    if _entry(folder, kept) != entry:
        raise ConfigError(f"the tokenizer's files in {folder} were written to while they were read; ask again")
    try:
        kept.mkdir(parents=True, exist_ok=True)
        write_kept(entry, content)
    except OSError as error:
        logger.warning("the tokenizer of %s is not kept: %s cannot be written: %s", folder, kept, error.strerror)
    return content


def _entry(folder: Path, kept: Path) -> Path:
    """Where the export lies: named by all that decides what it is."""
    try:
        files = {
            str(path.relative_to(folder)): _digest(path)
            for path in (*folder.iterdir(), *(folder / MORE_TEMPLATES).glob("*"))
            if path.suffix not in _OF_PARAMETERS and path.is_file()
        }
    except OSError as error:
        raise ConfigError(f"the tokenizer of {folder} cannot be read: {error}") from error
    libraries = {name: version_of(name) for name in ("transformers", "tokenizers")}
    return kept / f"{digest_of({'format': FORMAT, 'files': files, 'libraries': libraries})[:32]}.tokenizer"


def _digest(path: Path) -> str:
    digest = blake3()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
