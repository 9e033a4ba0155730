"""From a pool's configuration to a `Pool`: find the models, compare them, fingerprint them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cocktail_serve.checkpoints.adapter import AdapterReader, is_adapter
from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.fingerprint import fingerprint_adapter, fingerprint_folder
from cocktail_serve.checkpoints.layout import read_config, read_library_class, read_modules
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.text_files import text_digest
from cocktail_serve.config import PoolConfig, Source
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.pool import BASE, Kind, Member, Pool

_DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_DOWNLOADED = ("onnx/*", "openvino/*", "original/*", "training_args.bin", "optimizer.*", "scheduler.*")

_LIBRARY_CLASSES: dict[Kind, str] = {"encoder": "SentenceTransformer", "reranker": "CrossEncoder"}

_NOT_SERVED = "its models can be mixed by no engine here; serve it with a tool of its kind"
_OTHER_CLASSES = {
    "SparseEncoder": ("which makes a weight per word of the vocabulary", _NOT_SERVED),
    "MultiVectorEncoder": ("which makes a vector per token", _NOT_SERVED),
    "ColBERT": ("which makes a vector per token", _NOT_SERVED),
    "CrossEncoder": ("which scores pairs of texts", "set the pool's 'kind' to reranker"),
    "SentenceTransformer": ("which embeds single texts", "set the pool's 'kind' to encoder"),
}
"""What other classes of sentence-transformers do, and what to do about one."""


def open_pool(config: PoolConfig, *, cache_dir: Path, progress: Callable[[str, int, int], None] | None = None) -> Pool:
    """Finds the pool's models, checks that they can be mixed, and names each by its content. Blocks.

    Args:
        cache_dir: where fingerprints are kept, so that an unchanged model is not read again.
        progress: called with a model's name, bytes read and bytes in all, while it is fingerprinted.

    Raises:
        CheckpointError: a model is not there or cannot be read.
        IncompatibleModelsError: an expert cannot be mixed with the base; names the tensor or setting.
    """
    folders = {name: _locate(source) for name, source in {BASE: config.base, **config.experts}.items()}
    base = folders[BASE]
    _check_kind(base, config.kind)
    for folder in folders.values():
        _check_library_class(folder, config.kind)
    for name, folder in folders.items():
        if name != BASE:
            _check_fits(config.id, base, name, folder)
    first = _member(BASE, folders.pop(BASE), cache_dir, progress)
    return Pool(
        id=config.id,
        kind=config.kind,
        base=first,
        experts={name: _expert(name, folder, first, cache_dir, progress) for name, folder in folders.items()},
        text_digest=text_digest(base, prompts=config.prompts),
    )


def open_expert(pool: Pool, name: str, folder: Path, *, cache_dir: Path) -> Member:
    """Checks that a folder's model can be mixed with a pool's, and names it by its content. Blocks.

    Raises:
        CheckpointError: it cannot be read.
        IncompatibleModelsError: it cannot be mixed with the base; names the tensor or setting.
    """
    _check_library_class(folder, pool.kind)
    _check_fits(pool.id, pool.base.path, name, folder)
    return _expert(name, folder, pool.base, cache_dir, None)


def _check_fits(pool_id: str, base: Path, name: str, folder: Path) -> None:
    try:
        compare(base, folder).raise_if_incompatible()
    except IncompatibleModelsError as error:
        raise IncompatibleModelsError(f"pool {pool_id!r}, expert {name!r}: {error.message}") from error


def _expert(
    name: str, folder: Path, base: Member, cache_dir: Path, progress: Callable[[str, int, int], None] | None
) -> Member:
    if not is_adapter(folder):
        return _member(name, folder, cache_dir, progress)
    with CheckpointReader(base.path) as base_reader, AdapterReader(folder, base_reader) as reader:
        return Member(
            name=name,
            path=folder,
            fingerprint=fingerprint_adapter(reader, base.fingerprint),
            dtype=base.dtype,
            num_bytes=reader.num_bytes,
        )


def _member(name: str, folder: Path, cache_dir: Path, progress: Callable[[str, int, int], None] | None) -> Member:
    report = None if progress is None else lambda done, total: progress(name, done, total)
    fingerprint = fingerprint_folder(folder, cache_dir=cache_dir, progress=report)
    with CheckpointReader(folder) as reader:
        return Member(
            name=name,
            path=folder,
            fingerprint=fingerprint,
            dtype=_dtype_name(reader),
            num_bytes=reader.num_bytes,
        )


def _dtype_name(reader: CheckpointReader) -> str:
    return "float32" if reader.dtype == "float64" else reader.dtype


def _locate(source: Source) -> Path:
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1 or folder.exists():
        raise CheckpointError(f"there is no model folder {source.path}")
    return _download(source)


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=list(_DOWNLOADED),
                ignore_patterns=list(_NOT_DOWNLOADED),
            )
        )
    except Exception as error:  # the hub, its HTTP client and the disk have errors of their own
        revision = f" at revision {source.revision!r}" if source.revision else ""
        raise CheckpointError(
            f"{source.path!r} is no local folder, and the hub did not give it{revision}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def _check_library_class(folder: Path, kind: Kind) -> None:
    """Refuses models of sentence-transformers that it would load as another kind after dropping what they are."""
    wanted = _LIBRARY_CLASSES.get(kind)
    found = read_library_class(folder) if wanted else None
    if found in (None, wanted):
        return
    what, advice = _OTHER_CLASSES.get(found, ("another kind of model", "see the pool's 'kind'"))
    raise CheckpointError(
        f"{folder} is a {found} of sentence-transformers, {what}; a pool of kind {kind} serves a {wanted}: {advice}"
    )


def _check_kind(base: Path, kind: Kind) -> None:
    """A pool of the wrong kind would only fail at its first request, deep inside an engine."""
    config = read_config(base)
    architectures = config.get("architectures") or []
    name = str(architectures[0]) if architectures else ""
    generates = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    classifies = name.endswith("ForSequenceClassification")
    both = bool(config.get("is_encoder_decoder"))
    if kind == "encoder_decoder" and not (both and generates):
        raise CheckpointError(f"{base} is a {name or 'model'}, not an encoder-decoder; set the pool's 'kind'")
    if kind == "decoder" and both:
        raise CheckpointError(
            f"{base} is a {name}, an encoder-decoder: set the pool's 'kind' to encoder_decoder and its engine.type to "
            "offline"
        )
    if kind == "decoder" and name and not generates:
        raise CheckpointError(f"{base} is a {name}, which cannot generate: not a decoder; set the pool's 'kind'")
    if kind == "encoder" and (classifies or (generates and not read_modules(base))):
        raise CheckpointError(
            f"{base} is a {name} without sentence-transformers modules: not an encoder; set the pool's 'kind'"
        )
    if kind == "reranker" and name and not classifies:
        raise CheckpointError(
            f"{base} is a {name}; a reranker classifies sequences, with one score; set the pool's 'kind'"
        )
