"""Can two models be mixed? Told from headers and small files, before a parameter is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.adapter import is_adapter, read_expert
from cocktail_serve.checkpoints.layout import read_config, read_modules
from cocktail_serve.checkpoints.model_config import load_model_config
from cocktail_serve.checkpoints.reader import CheckpointReader, TensorInfo
from cocktail_serve.checkpoints.text_files import (
    Tokenization,
    is_same_tokenizer_file,
    read_pooling,
    read_tokenization,
)
from cocktail_serve.errors import IncompatibleModelsError

_MAX_LISTED = 5

_IRRELEVANT = frozenset(
    {
        # who wrote the file, and how it is stored
        "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map",
        "_attn_implementation", "attn_implementation", "_commit_hash", "is_composition",
        # training alone
        "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "embd_pdrop",
        "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout", "initializer_range", "initializer_factor",
        "gradient_checkpointing", "use_cache", "pretraining_tp", "output_router_logits", "router_aux_loss_coef",
        # how it is called: the mixture is called as the base is
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
        "task_specific_params", "id2label", "label2id", "problem_type", "finetuning_task", "return_dict",
        "output_attentions", "output_hidden_states", "torchscript", "chunk_size_feed_forward",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason why two models cannot be mixed.

    Attributes:
        subject: the tensor, setting or file it is about.
        base: what the base has.
        expert: what the expert has.
        fix: what to do about it.
    """

    subject: str
    base: str
    expert: str
    fix: str

    def __str__(self) -> str:
        return f"{self.subject}: the base has {self.base}, the expert {self.expert}; {self.fix}"


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """What stands in the way of mixing `expert` with `base`; nothing, where `problems` is empty."""

    base: Path
    expert: Path
    problems: tuple[Finding, ...]

    @property
    def is_compatible(self) -> bool:
        return not self.problems

    def raise_if_incompatible(self) -> None:
        """Raises IncompatibleModelsError with the first findings in its message, unless there is none."""
        if not self.problems:
            return
        lines = [f"  - {finding}" for finding in self.problems[:_MAX_LISTED]]
        if len(self.problems) > _MAX_LISTED:
            lines.append(f"  - and {len(self.problems) - _MAX_LISTED} more; `cocktail-serve inspect` lists all")
        raise IncompatibleModelsError(f"{self.expert} cannot be mixed with {self.base}:\n" + "\n".join(lines))


def compare(base: Path, expert: Path) -> CompatibilityReport:
    """Compares an expert with the base it should share architecture, initialisation and text processing with.

    Looks at configuration, tensor names, shapes and kinds, tokenizer and pooling modules. An expert without tokenizer
    or `modules.json` is fine: the mixture uses the base's.

    Raises:
        CheckpointError: one of the folders cannot be read as a checkpoint.
    """
    with CheckpointReader(base) as base_reader, read_expert(expert, base_reader) as expert_reader:
        problems = [
            *_compare_tensors(base_reader.tensors, expert_reader.tensors),
            *_compare_tokenization(base, expert),
        ]
        if not is_adapter(expert):  # which has no configuration of its own
            problems = [*_compare_configs(base, expert), *problems, *_compare_modules(base, expert)]
    return CompatibilityReport(Path(base), Path(expert), tuple(problems))


def check_tensors(base: Mapping[str, TensorInfo], expert: Mapping[str, TensorInfo], *, name: str) -> None:
    """Raises IncompatibleModelsError unless the headers of two checkpoints can be mixed; `name` is the expert's."""
    problems = list(_compare_tensors(base, expert))
    if problems:
        raise IncompatibleModelsError(f"{name} cannot be mixed with the base: {problems[0]}")


def _compare_configs(base: Path, expert: Path) -> Iterator[Finding]:
    mine, theirs = read_config(base), read_config(expert)
    if "auto_map" not in mine.keys() | theirs.keys() and dict(_flat(mine)) == dict(_flat(theirs)):
        return  # what says the same means the same: no need to import transformers
    mine, theirs = dict(_flat(load_model_config(base))), dict(_flat(load_model_config(expert)))
    if mine.get("model_type") != theirs.get("model_type"):
        yield Finding(
            "config model_type",
            repr(mine.get("model_type")),
            repr(theirs.get("model_type")),
            "only models of one architecture can be mixed",
        )
        return  # all other settings differ for this one reason
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield Finding(
                f"config {key}",
                repr(mine.get(key)),
                repr(theirs.get(key)),
                "fine-tune the expert from this base without changing the setting",
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _IRRELEVANT or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _compare_tensors(base: Mapping[str, TensorInfo], expert: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    for name, info in base.items():
        other = expert.get(name)
        if other is None:
            # releases differ in which integer buffers they store; the base's are taken anyway
            if info.is_floating:
                yield Finding(
                    f"tensor {name}", str(info), "none", "save the expert whole, with the class the base was saved with"
                )
        elif info.shape != other.shape:
            yield Finding(f"tensor {name}", str(info), str(other), _fix_shape(name))
        elif info.is_floating != other.is_floating:
            yield Finding(f"tensor {name}", str(info), str(other), "store it in the same kind of dtype")
    for name, other in expert.items():
        if name not in base and other.is_floating:
            yield Finding(
                f"tensor {name}", "none", str(other), "save the expert with the class the base was saved with"
            )


def _fix_shape(name: str) -> str:
    if "embed" in name or "lm_head" in name:
        return "tokens were added or the vocabulary was padded: resize it back to the base's vocabulary"
    return "only models of one architecture and size can be mixed"


def _compare_tokenization(base: Path, expert: Path) -> Iterator[Finding]:
    if is_same_tokenizer_file(base, expert):
        return
    yield from _compare_pipelines(read_tokenization(base), read_tokenization(expert))


def _compare_pipelines(base: Tokenization | None, expert: Tokenization | None) -> Iterator[Finding]:
    if base is None or expert is None:
        return
    fix = "use the base's tokenizer: with another one, the same text means other parameters"
    for token in sorted(base.vocab.keys() | expert.vocab.keys()):
        mine, theirs = base.vocab.get(token), expert.vocab.get(token)
        if mine != theirs:
            yield Finding(f"tokenizer id of {token!r}", str(mine), str(theirs), fix)
            return  # one shifted id usually means that thousands are
    for part, mine_part in base.pipeline.items():
        if mine_part != expert.pipeline.get(part):
            yield Finding(f"tokenizer {part}", _short(mine_part), _short(expert.pipeline.get(part)), fix)


def _compare_modules(base: Path, expert: Path) -> Iterator[Finding]:
    mine, theirs = read_modules(base), read_modules(expert)
    if not mine or not theirs:
        return
    if [m.type for m in mine] != [m.type for m in theirs]:
        yield Finding(
            "modules.json",
            " > ".join(m.type for m in mine),
            " > ".join(m.type for m in theirs),
            "embeddings of different pooling cannot be mixed; use one chain of modules",
        )
        return
    for module, other in zip(mine, theirs, strict=True):
        if module.type == "Pooling":
            pooling, others = read_pooling(base / module.path), read_pooling(expert / other.path)
            if pooling != others:
                yield Finding("pooling", pooling, others, "embeddings of different pooling cannot be mixed")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
