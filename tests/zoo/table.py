"""The page of the documentation that says what of the zoo works: what the tests hold, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tests.zoo.making import LORA, RESAVED_BY_4
from tests.zoo.other_release import PINNED
from tests.zoo.specimens import DECODERS, ENCODERS, RERANKERS, Specimen

_COLUMNS = (
    "form of",
    "architecture",
    "serves",
    "mixes offline",
    "LoRA",
    "saved by transformers 4",
    "saved by transformers 5",
    "remarks",
)

_OTHER = f"transformers {PINNED['transformers']} with sentence-transformers {PINNED['sentence-transformers']}"

_INTRODUCTION = (
    "# Models that are tried\n\n"
    "What `make test-full` walks, and `make test` a quarter of: tiny random models in the form of each publisher's "
    "repository, with its tensor names, buffers, files, tokenizer pipeline and storage. Each is made as a base, a full "
    "expert, an expert as a LoRA adapter of peft over all linear layers, and that full expert loaded and saved anew by "
    f"{_OTHER}, and by the releases that this project is pinned to. A yes means that losses, exported folders and "
    "answers are those of the library that the model belongs to, with parameters averaged apart, by name, in "
    "float64.\n\n"
    "An architecture that is not here goes through the same checks when a pool is opened: `cocktail-serve doctor` says "
    "what it finds. What is compared, and why: [what can be mixed](../explanation/compatibility.md).\n"
)


def models_page(note: str) -> str:
    """The page, with the remark of generated pages on top."""
    parts = [note, _INTRODUCTION]
    for title, by, specimens in (
        ("Decoders", "vLLM, on a CPU", DECODERS),
        ("Encoders", "sentence-transformers", ENCODERS),
        ("Rerankers", "sentence-transformers", RERANKERS),
    ):
        parts.append(f"\n## {title}\n\nServed by {by}.\n\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n")
        parts += [f"| {' | '.join(_cells(specimen))} |\n" for specimen in specimens]
    return "".join(parts)


def _cells(specimen: Specimen) -> Iterator[str]:
    yield (
        f"`{specimen.published_as}`"
        if "/" in specimen.published_as and " " not in specimen.published_as
        else (specimen.published_as)
    )
    yield f"`{specimen.model_class}`"
    yield "yes" if specimen.unserved is None else "no"
    yield "yes"
    yield "refused" if LORA in specimen.refused else "yes"
    if specimen.unknown_to_4:
        yield "unknown to it"
    else:
        yield "refused" if RESAVED_BY_4 in specimen.refused else "yes"
    yield "yes"
    yield "; ".join(_remarks(specimen))


def _remarks(specimen: Specimen) -> Iterable[str]:
    if specimen.remark:
        yield specimen.remark
    if specimen.unserved is not None:
        yield specimen.unserved.because
    for refusal in specimen.refused.values():
        yield refusal.because
