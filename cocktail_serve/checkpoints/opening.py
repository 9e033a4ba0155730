"""From a pool's configuration to a `Pool`: find the models, compare them, fingerprint them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cocktail_serve.checkpoints.adapters.reader import AdapterReader, is_adapter
from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.fingerprint import identify_adapter, identify_folder
from cocktail_serve.checkpoints.finite import LARGEST, OVERFLOWS_FROM
from cocktail_serve.checkpoints.generation_files import common_template, read_settings
from cocktail_serve.checkpoints.generation_options import read_options
from cocktail_serve.checkpoints.layout import generates, model_class, read_config, read_library_class, read_modules
from cocktail_serve.checkpoints.quantisation import refusal
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.text_files import text_digest
from cocktail_serve.checkpoints.tokenizer import FolderTokenizer
from cocktail_serve.config import PoolConfig, Source, is_hub_id
from cocktail_serve.dtypes import MIXED_AS, DType
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.generation_settings import GenerationOptions
from cocktail_serve.pool import BASE, Kind, Member, Pool
from cocktail_serve.suggestions import did_you_mean

logger = logging.getLogger(__name__)

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

_UNKNOWN_CLASS = ("another kind of model", _NOT_SERVED)


def open_pool(config: PoolConfig, *, cache_dir: Path, progress: Callable[[str, int, int], None] | None = None) -> Pool:
    """Finds the pool's models, checks that they can be mixed, and names each by its content. Blocks.

    Args:
        cache_dir: where fingerprints are kept, so that an unchanged model is not read again.
        progress: called with a model's name, bytes read and bytes in all, while it is fingerprinted.

    Raises:
        CheckpointError: a model is not there, cannot be read, or holds what is not finite.
        IncompatibleModelsError: an expert cannot be mixed with the base; names the tensor or setting.
        ConfigError: `engine.args` names a chat template or a generation_config.json that is not there; or `engine.mode`
            is unmerged, and an expert can only be merged.
    """
    folders = {name: _locate(source) for name, source in {BASE: config.base, **config.experts}.items()}
    base = folders[BASE]
    _check_kind(base, config.kind)
    for folder in folders.values():
        _check_library_class(folder, config.kind)
    tokenizer = FolderTokenizer(base)
    warnings = [
        warning
        for name, folder in folders.items()
        if name != BASE
        for warning in _check_fits(config.id, base, name, folder, tokenizer)
    ]
    with _named(config.id, BASE):
        first = _member(BASE, folders.pop(BASE), cache_dir, progress, allow_quantised=True)
        _check_range(first, config.engine.dtype_over(first))
    experts = {}
    for name, folder in folders.items():
        with _named(config.id, name):
            experts[name] = _expert(name, folder, first, cache_dir, progress)
    pool = Pool(
        id=config.id,
        kind=config.kind,
        base=first,
        experts=experts,
        text_digest=text_digest(base, prompts=config.prompts),
        warnings=tuple(warnings),
    )
    pool = replace(pool, mode=config.engine.mode_over(pool))
    if pool.mode == "merged" and first.quantisation is not None:
        raise CheckpointError(f"pool {config.id!r}, base: {refusal(base)}{_why_merged(pool, config)}")
    with _named(config.id, BASE):
        _check_packed(first, config.engine.dtype_over(first))
    if (reason := config.engine.reason_of_mode(pool)) is not None:
        logger.info("pool %s is served %s: %s", pool.id, pool.mode, reason)
    return _with_generation(pool, config) if config.kind == "decoder" else pool


def open_expert(pool: Pool, name: str, folder: Path, *, cache_dir: Path) -> Member:
    """Checks that a folder's model can be mixed with a pool's, and names it by its content. Blocks.

    Raises:
        CheckpointError: it cannot be read, or holds what is not finite.
        IncompatibleModelsError: it cannot be mixed with the base, names the tensor or setting; or the pool is served
            unmerged, and it can only be merged.
    """
    _check_library_class(folder, pool.kind)
    _check_fits(pool.id, pool.base.path, name, folder, FolderTokenizer(pool.base.path))
    with _named(pool.id, name):
        member = _expert(name, folder, pool.base, cache_dir, None)
    if pool.mode == "unmerged" and member.merged_only is not None:
        advice = "have the operator set engine.mode: merged, or " if pool.base.quantisation is None else ""
        raise IncompatibleModelsError(
            f"pool {pool.id!r} is served unmerged, and the model {folder} cannot be: {member.merged_only}; {advice}add "
            "an adapter"
        )
    return _called(member, pool.base, pool.generation_options) if pool.kind == "decoder" else member


def _with_generation(pool: Pool, config: PoolConfig) -> Pool:
    """The pool with how its models are called, and what messages are rendered by."""
    options = read_options(config, pool.base.path)
    base = replace(pool.base, generation=read_settings(pool.base.path, options=options))
    experts = {name: _called(member, base, options) for name, member in pool.experts.items()}
    template = common_template([member.generation for member in (base, *experts.values())])
    if template is not None and template != read_settings(base.path).chat_template:
        # not the one that the base's tokenizer brings
        rendered_by = template.digest
        pool = replace(pool, text_digest=text_digest(base.path, prompts=config.prompts, chat_template=rendered_by))
    return replace(pool, base=base, experts=experts, chat_template=template, generation_options=options)


def _called(member: Member, base: Member, options: GenerationOptions) -> Member:
    return replace(member, generation=read_settings(member.path, base.path, options=options))


def _check_fits(pool_id: str, base: Path, name: str, folder: Path, tokenizer: FolderTokenizer) -> list[str]:
    """What should be looked at, and is logged, where nothing stands in the way."""
    try:
        report = compare(base, folder, tokenizer=tokenizer)
        report.raise_if_incompatible()
    except IncompatibleModelsError as error:
        raise IncompatibleModelsError(f"pool {pool_id!r}, expert {name!r}: {error.message}") from error
    warnings = [f"expert {name!r}: {finding}" for finding in report.warnings]
    for warning in warnings:
        logger.warning("pool %s, %s", pool_id, warning)
    return warnings


@contextmanager
def _named(pool_id: str, name: str) -> Iterator[None]:
    """Says of a model that cannot be read whose it is."""
    try:
        yield
    except CheckpointError as error:
        model = "base" if name == BASE else f"expert {name!r}"
        raise CheckpointError(f"pool {pool_id!r}, {model}: {error.message}") from error


def _check_range(base: Member, dtype: DType) -> None:
    """Refuses an engine that the base itself does not fit into: it is loaded there before anything is mixed."""
    if base.largest >= OVERFLOWS_FROM[dtype]:
        raise CheckpointError(
            f"{base.path} has parameters of magnitude {base.largest:g}, and engine.dtype {dtype} ends at "
            f"{LARGEST[dtype]:g}; set it to bfloat16 or float32"
        )


def _check_packed(base: Member, dtype: DType) -> None:
    """Refuses an engine whose dtype packed weights are not unpacked to."""
    if base.quantisation is None or dtype != "float32":
        return
    with CheckpointReader(base.path, allow_quantised=True) as reader:
        packed = next((name for name, weight in reader.quantised.items() if weight.is_packed), None)
    if packed is not None:
        raise CheckpointError(
            f"{base.path} stores {packed} packed ({base.quantisation}), and vLLM computes with such weights in "
            "float16 or bfloat16: set engine.dtype to one of them"
        )


def _expert(
    name: str, folder: Path, base: Member, cache_dir: Path, progress: Callable[[str, int, int], None] | None
) -> Member:
    if not is_adapter(folder):
        return replace(
            _member(name, folder, cache_dir, progress), merged_only="it is a full model, and no LoRA adapter"
        )
    is_quantised = base.quantisation is not None
    with (
        CheckpointReader(base.path, allow_quantised=is_quantised) as base_reader,
        AdapterReader(folder, base_reader) as reader,
    ):
        identity = identify_adapter(reader, base.fingerprint, largest_of_base=base.largest)
        return Member(
            name=name,
            path=folder,
            fingerprint=identity.fingerprint,
            dtype=base.dtype,
            num_bytes=reader.num_bytes,
            files=identity.files,
            largest=identity.largest,
            merged_only=reader.merged_only,
        )


def _member(
    name: str,
    folder: Path,
    cache_dir: Path,
    progress: Callable[[str, int, int], None] | None,
    *,
    allow_quantised: bool = False,
) -> Member:
    report = None if progress is None else lambda done, total: progress(name, done, total)
    identity = identify_folder(folder, cache_dir=cache_dir, allow_quantised=allow_quantised, progress=report)
    with CheckpointReader(folder, allow_quantised=allow_quantised) as reader:
        return Member(
            name=name,
            path=folder,
            fingerprint=identity.fingerprint,
            dtype=MIXED_AS[reader.dtype],
            num_bytes=reader.num_bytes,
            files=identity.files,
            largest=identity.largest,
            quantisation=None if reader.quantisation is None else reader.quantisation.method,
        )


def _why_merged(pool: Pool, config: PoolConfig) -> str:
    """Why a pool would be merged, behind the refusal of its base; nothing where its engine knows no other way."""
    reason = config.engine.reason_of_mode(pool)
    return "" if reason is None else f"; adapters alone could be served over it unmerged, and {reason}"


def _locate(source: Source) -> Path:
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not is_hub_id(source.path) or folder.exists():
        beside = (path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else ()
        raise CheckpointError(f"there is no model folder {source.path}{did_you_mean(folder.name, beside)}")
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
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; a folder is looked for from the "
            "configuration's own"
        ) from error


def unserved_class(folder: Path) -> str | None:
    """Why no kind of pool takes what sentence-transformers saved there; None where one may.

    Raises:
        CheckpointError: a file that says what it is cannot be read.
    """
    found = read_library_class(folder)
    if found is None or found in _LIBRARY_CLASSES.values():
        return None
    what, advice = _OTHER_CLASSES.get(found, _UNKNOWN_CLASS)
    return f"a {found} of sentence-transformers, {what}: {advice}"


def kind_of(folder: Path) -> Kind | None:
    """The kind of pool that a model is for; None where its files do not say.

    Raises:
        CheckpointError: no kind of pool takes it, or a file that says what it is cannot be read.
    """
    if unserved := unserved_class(folder):
        raise CheckpointError(f"{folder} is {unserved}")
    if not (model_class(folder) or read_library_class(folder) or read_modules(folder)):
        return None
    # a decoder with modules of sentence-transformers passes as both: it was saved to embed
    embeds_first: tuple[Kind, ...] = ("encoder", "reranker", "encoder_decoder", "decoder")
    order = embeds_first if read_modules(folder) else (*embeds_first[1:], "encoder")
    refused = None
    for kind in order:
        try:
            _check_library_class(folder, kind)
            _check_kind(folder, kind)
        except CheckpointError as error:
            refused = error
        else:
            return kind
    assert refused is not None
    raise refused


def _check_library_class(folder: Path, kind: Kind) -> None:
    """Refuses models of sentence-transformers that it would load as another kind after dropping what they are."""
    wanted = _LIBRARY_CLASSES.get(kind)
    found = read_library_class(folder) if wanted else None
    if found in (None, wanted):
        return
    what, advice = _OTHER_CLASSES.get(found, _UNKNOWN_CLASS)
    raise CheckpointError(
        f"{folder} is a {found} of sentence-transformers, {what}; a pool of kind {kind} serves a {wanted}: {advice}"
    )


def _check_kind(base: Path, kind: Kind) -> None:
    """A pool of the wrong kind would only fail at its first request, deep inside an engine."""
    config = read_config(base)
    name = model_class(base)
    classifies = name.endswith("ForSequenceClassification")
    both = bool(config.get("is_encoder_decoder"))
    if kind == "encoder_decoder" and not (both and generates(base)):
        raise CheckpointError(f"{base} is a {name or 'model'}, not an encoder-decoder; set the pool's 'kind'")
    if kind == "decoder" and both:
        raise CheckpointError(
            f"{base} is a {name}, an encoder-decoder: set the pool's 'kind' to encoder_decoder and its engine.type to "
            "offline"
        )
    if kind == "decoder" and name and not generates(base):
        raise CheckpointError(f"{base} is a {name}, which cannot generate: not a decoder; set the pool's 'kind'")
    if kind == "encoder" and (classifies or (generates(base) and not read_modules(base))):
        raise CheckpointError(
            f"{base} is a {name} without sentence-transformers modules: not an encoder; set the pool's 'kind'"
        )
    if kind == "reranker" and name and not classifies:
        raise CheckpointError(
            f"{base} is a {name}; a reranker classifies sequences, with one score; set the pool's 'kind'"
        )
