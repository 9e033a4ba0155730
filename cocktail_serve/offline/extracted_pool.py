"""A pool of full experts as a pool of adapters: each expert extracted, and what that costs measured on examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.adapters.reader import is_adapter
from cocktail_serve.checkpoints.opening import open_expert
from cocktail_serve.config import PoolConfig, Settings, Source
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.offline.extraction import Extraction, extract_adapter
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.offline.weighing import open_losses
from cocktail_serve.pool import BASE, Pool, with_article
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import one_hot
from cocktail_serve.scoring.finite import require_finite
from cocktail_serve.weighting.candidates import mean


@dataclass(frozen=True, slots=True)
class ExtractedPool:
    """What was made of a pool.

    Attributes:
        extractions: by expert.
        passed_through: experts that are adapters already.
        losses: mean loss (nats) on the examples of the base and of each expert that was extracted, by name; empty
            without examples.
        adapter_losses: of the adapters, rounded into the engine's dtype as a mixture is.
    """

    pool: Pool
    rank: int
    extractions: Mapping[str, Extraction]
    passed_through: tuple[str, ...]
    num_examples: int
    losses: Mapping[str, float]
    adapter_losses: Mapping[str, float]


def extract_pool(
    settings: Settings, pool_id: str, folder: Path, *, rank: int, rows: Sequence[Any] | None, report: OnProgress
) -> ExtractedPool:
    """Writes an adapter for each full expert of a pool of decoders, `folder/<expert>`.

    Args:
        folder: is there, and is left half-written by a failure.
        rows: examples to measure losses on, unchecked; None: none are measured.

    Raises:
        InvalidRequestError: no pool of decoders, no full expert in it, or one that no adapter can be made of.
        ClientError: as `open_pool` and `parse_examples`.
        EngineError: a model that transformers cannot load or run.
        StorageError: the disk has no room.
    """
    config = settings.pool(pool_id)
    if config.kind != "decoder":
        raise InvalidRequestError(
            f"pool {pool_id!r} is {with_article(config.kind)} pool; adapters are extracted for decoders alone, whose "
            "engine can serve them unmerged"
        )
    examples = None
    if rows is not None:
        examples = parse_examples(
            rows, config.kind, max_examples=config.max_examples, separator=config.example_separator
        )
    pool = open_with_progress(settings, config, report)
    full = [name for name, member in pool.experts.items() if not is_adapter(member.path)]
    if not full:
        raise InvalidRequestError(f"all experts of pool {pool_id!r} are adapters already: there is nothing to extract")
    # before anything is extracted: examples may be refused
    losses = _mean_losses(pool, config, examples, names=[BASE, *full], what="scoring experts", report=report)
    extractions = {
        name: extract_adapter(
            pool.base,
            pool.experts[name],
            folder / name,
            rank=rank,
            source=config.base.path,
            revision=config.base.revision,
            report=report,
        )
        for name in full
    }
    adapters = {name: open_expert(pool, name, folder / name, cache_dir=settings.store.cache_dir) for name in full}
    adapted = replace(pool, experts={**pool.experts, **adapters})
    return ExtractedPool(
        pool=pool,
        rank=rank,
        extractions=extractions,
        passed_through=tuple(name for name in pool.experts if name not in full),
        num_examples=0 if examples is None else len(examples),
        losses=losses,
        adapter_losses=_mean_losses(adapted, config, examples, names=full, what="scoring adapters", report=report),
    )


def _mean_losses(
    pool: Pool, config: PoolConfig, examples: ExampleSet | None, *, names: Sequence[str], what: str, report: OnProgress
) -> dict[str, float]:
    if examples is None:
        return {}
    dtype = config.engine.dtype_over(pool.base)
    found: dict[str, float] = {}
    with open_losses(pool, config, examples) as losses_of:
        for name in names:
            report(what, len(found), len(names))
            losses = losses_of(one_hot(pool, name, dtype=dtype), None)
            require_finite(losses, repr(name), dtype)
            found[name] = mean(losses)
        report(what, len(found), len(names))
    return found


def pool_section(extracted: ExtractedPool, config: PoolConfig) -> dict[str, Any]:
    """The pool in a configuration beside the adapters: settings as they were, adapters by their folders.

    Without `engine.mode`: what full experts had to be served by says nothing of these.
    """
    experts = {
        name: name if name in extracted.extractions else _written(source) for name, source in config.experts.items()
    }
    section = config.model_dump(mode="json", exclude_unset=True, exclude={"engine": {"mode"}})
    return section | {"base": _written(config.base), "experts": experts}


def _written(source: Source) -> str | dict[str, Any]:
    """As a configuration has it."""
    return source.path if source.revision is None else source.model_dump()
