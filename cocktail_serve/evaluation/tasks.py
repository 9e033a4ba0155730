"""Tasks to be measured: rows with answers for decoders, a corpus with queries for encoders.

What lies in files is read here and nowhere else:

- a JSONL file, or a folder with `test.jsonl`: rows `{"input", "output"}`, and as the task has them `choices` (labels,
  to be told apart by likelihood) and `references` (all accepted outputs);
- a folder in BEIR's layout, or a folder with such a one in `test/`: `corpus.jsonl` (`_id`, `title`, `text`),
  `queries.jsonl` (`_id`, `text`), `qrels.tsv` (query, document, grade; a header line is skipped).

Few-shot examples come from `train.jsonl`, `dev.jsonl` or `fewshot.jsonl` beside the test, sampled with a seed, or from
a file of examples, which is read whole.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cocktail_serve.digest import digest_of
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.examples import ExampleSet, parse_examples, read_rows
from cocktail_serve.pool import Kind

TRAIN_FILES = ("train.jsonl", "dev.jsonl", "fewshot.jsonl")
"""Where few-shot examples are sampled from: the first of these that is there."""

NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DecoderRow:
    """A prompt and what is right.

    Attributes:
        choices: labels to be told apart; empty where the answer is free text.
        references: accepted answers, the output among them.
    """

    input: str
    output: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecoderTask:
    """Rows for a decoder.

    Attributes:
        num_given: rows in the file, before sampling.
    """

    name: str
    rows: tuple[DecoderRow, ...]
    num_given: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_choices(self) -> bool:
        return all(row.choices for row in self.rows)

    @cached_property
    def digest(self) -> str:
        """Of the rows; not of the name."""
        return digest_of([[row.input, row.output, row.choices, row.references] for row in self.rows])


@dataclass(frozen=True)
class EncoderTask:
    """A corpus, queries, and which documents answer them.

    Attributes:
        corpus: text by document id, the title before it.
        queries: text by query id; every one has a relevant document.
        qrels: grade by document id, by query id; documents without one count as not relevant.
        num_given: queries in the files that have a relevant document, before sampling.
        num_without_relevant: queries in the files that have none in the corpus, and are left out: no system can rank
            what is not there, and 0 for each of them would tell nothing apart.
    """

    name: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    num_given: int
    num_without_relevant: int = 0

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def digest(self) -> str:
        """Of corpus, queries and judgements; not of the name."""
        return digest_of(
            [dict(self.corpus), dict(self.queries), {q: dict(of_query) for q, of_query in self.qrels.items()}]
        )


Task = DecoderTask | EncoderTask


def load_task(
    path: Path,
    kind: Kind,
    *,
    name: str | None = None,
    limit: int | None = None,
    max_documents: int | None = None,
    seed: int = 0,
) -> Task:
    """Reads a task.

    Args:
        kind: of the pool that is measured: decides which form is looked for.
        name: what tables call it; None: the folder's name, or the file's.
        limit: at most so many rows or queries, sampled without replacement by `seed`, in their order.
        max_documents: at most so many documents of a corpus beside those that are judged for the queries taken,
            sampled likewise. Figures of a smaller corpus are higher: compare within one setting only.

    Raises:
        InvalidRequestError: no such file or folder, of another form, or nothing in it; names file and line.
    """
    path = Path(path)
    if kind == "decoder":
        return _decoder_task(path, name, limit, seed)
    if kind == "encoder":
        return _encoder_task(path, name, limit, max_documents, seed)
    raise InvalidRequestError(
        f"only decoder and encoder pools can be measured, this one is of kind {kind}", param="pool"
    )


def sample_examples(
    path: Path, kind: Kind, *, num: int = NUM_EXAMPLES, seed: int = 0, separator: str | None = None
) -> ExampleSet:
    """Few-shot examples of a task: a seeded sample of its train file.

    Args:
        path: the task's, whose train file is looked for beside the test.
        separator: as of `parse_examples`.

    Raises:
        InvalidRequestError: there is no train file.
        InvalidExamplesError: rows that do not fit the kind.
    """
    path = Path(path)
    train = train_file(path)
    if train is None:
        raise InvalidRequestError(
            f"{path} has no {', '.join(TRAIN_FILES)} beside it to take examples from; name a file of examples",
            param="examples",
        )
    return load_examples(train, kind, num=num, seed=seed, separator=separator)


def load_examples(
    file: Path, kind: Kind, *, num: int | None = None, seed: int = 0, separator: str | None = None
) -> ExampleSet:
    """The examples in a file of JSONL or of one JSON array; columns that data sets carry beside them are left aside.

    Args:
        num: how many are sampled by `seed`; None: all.
        separator: as of `parse_examples`.

    Raises:
        InvalidExamplesError: rows that do not fit the kind.
    """
    rows = [{key: value for key, value in row.items() if key in _EXAMPLE_KEYS} for row in _rows(file)]
    return parse_examples(rows, kind, max_examples=num or len(rows), seed=seed, separator=separator)


_EXAMPLE_KEYS = frozenset({"input", "output", "prompt", "completion", "messages", "tools", "query", "pos", "neg"}) | {
    "separator",
    "question",
    "choices",
    "answer",
}


def train_file(path: Path) -> Path | None:
    """The file that a task's few-shot examples are sampled from, or None."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent) if folder.name == "test" else (folder,):
        for file in TRAIN_FILES:
            if (place / file).is_file():
                return place / file
    return None


def _decoder_task(path: Path, name: str | None, limit: int | None, seed: int) -> DecoderTask:
    file = path / "test.jsonl" if path.is_dir() else path
    rows = [_decoder_row(row, file, number) for number, row in enumerate(_rows(file), start=1)]
    taken = _sample(rows, limit, seed)
    return DecoderTask(name or _name_of(file), tuple(taken), num_given=len(rows))


def _decoder_row(row: Any, file: Path, number: int) -> DecoderRow:
    if not (isinstance(row, dict) and isinstance(row.get("input"), str) and isinstance(row.get("output"), str)):
        raise InvalidRequestError(
            f'{file}, row {number}: expected {{"input": text, "output": text, ...}}', param="task"
        )
    choices, references = (_texts(row, key, file, number) for key in ("choices", "references"))
    if choices and row["output"] not in choices:
        raise InvalidRequestError(f"{file}, row {number}: the output is not among its choices", param="task")
    return DecoderRow(row["input"], row["output"], choices, tuple(dict.fromkeys((row["output"], *references))))


def _texts(row: Mapping[str, Any], key: str, file: Path, number: int) -> tuple[str, ...]:
    values = row.get(key) or []
    if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
        raise InvalidRequestError(f"{file}, row {number}: {key!r} must be a list of strings", param="task")
    return tuple(values)


def _encoder_task(path: Path, name: str | None, limit: int | None, max_documents: int | None, seed: int) -> EncoderTask:
    folder = path / "test" if (path / "test" / "corpus.jsonl").is_file() else path
    if not (folder / "corpus.jsonl").is_file():
        raise InvalidRequestError(
            f"{path} is no retrieval task: a folder with corpus.jsonl, queries.jsonl and qrels.tsv is", param="task"
        )
    corpus = {
        str(row["_id"]): " ".join(filter(None, (row.get("title", ""), row["text"])))
        for row in _rows(folder / "corpus.jsonl", "_id", "text")
    }
    qrels = _qrels(folder / "qrels.tsv")
    queries = {str(row["_id"]): row["text"] for row in _rows(folder / "queries.jsonl", "_id", "text")}
    judged = [
        query for query in queries if any(grade > 0 and doc in corpus for doc, grade in qrels.get(query, {}).items())
    ]
    if not judged:
        raise InvalidRequestError(f"{folder}: no query has a relevant document in the corpus", param="task")
    taken = _sample(judged, limit, seed)
    if max_documents is not None:
        kept = {doc for query in taken for doc in qrels[query]}
        others = [doc for doc in corpus if doc not in kept]
        kept.update(_sample(others, max_documents, seed))
        corpus = {doc: text for doc, text in corpus.items() if doc in kept}
    return EncoderTask(
        name or _name_of(folder),
        corpus,
        {query: queries[query] for query in taken},
        {query: {doc: grade for doc, grade in qrels[query].items() if doc in corpus} for query in taken},
        num_given=len(judged),
        num_without_relevant=len(queries) - len(judged),
    )


def _qrels(file: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_text(file).split("\n"), start=1):
        parts = line.split("\t")
        try:
            query, document, grade = parts[0], parts[1], int(parts[2])
        except (IndexError, ValueError):
            if number == 1 or not line.strip():
                continue
            raise InvalidRequestError(
                f"{file}, line {number}: expected query, document and grade", param="task"
            ) from None
        qrels.setdefault(query, {})[document] = grade
    return qrels


def _rows(file: Path, *keys: str) -> list[Any]:
    rows = read_rows(_text(file))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise InvalidRequestError(f"{file}, row {number}: expected an object with {', '.join(keys)}", param="task")
    if not rows:
        raise InvalidRequestError(f"{file} is empty", param="task")
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"cannot read {file}: {error}", param="task") from error


def _sample(items: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _name_of(path: Path) -> str:
    stem = path.stem if path.suffix == ".jsonl" else path.name
    return path.parent.name if stem == "test" else stem
