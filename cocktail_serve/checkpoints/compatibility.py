"""Can two models be mixed? Told from headers and small files, before a parameter is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.adapters.reader import is_adapter, read_expert
from cocktail_serve.checkpoints.chat_templates import DEFAULT, templates
from cocktail_serve.checkpoints.layout import (
    Module,
    model_class,
    model_folder,
    read_config,
    read_json,
    read_modules,
    read_optional_json,
)
from cocktail_serve.checkpoints.model_config import is_declared, open_model_config
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.special_tokens import TOKENIZER_CONFIG
from cocktail_serve.checkpoints.tensor_files import TensorInfo
from cocktail_serve.checkpoints.text_files import read_pooling
from cocktail_serve.checkpoints.tokenizer import FolderTokenizer, differences
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

_OF_ALL_ARCHITECTURES: Mapping[str, Any] = {"is_causal": True, "logit_scale": 1.0}
"""What the libraries ask every configuration for, whether its architecture has the setting or not; and what they take
where it is not there."""

_MODULE_DEFAULTS: Mapping[str, Any] = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "activation_function": "Tanh",
    "bias": True,
    "use_residual": False,
}
"""What releases of sentence-transformers that do not write a setting mean by that."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason why two models cannot be mixed, or should be looked at before they are.

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
    """What stands in the way of mixing `expert` with `base`; nothing, where `problems` is empty.

    Attributes:
        warnings: what differs and does not change what the parameters compute, as far as any library here reads it.
    """

    base: Path
    expert: Path
    problems: tuple[Finding, ...]
    warnings: tuple[Finding, ...] = ()

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


@dataclass(slots=True)
class _Findings:
    """What has been found so far."""

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)


def compare(base: Path, expert: Path, *, tokenizer: FolderTokenizer | None = None) -> CompatibilityReport:
    """Compares an expert with the base it should share architecture, initialisation and text processing with.

    Looks at configuration, tensor names, shapes and kinds, tokenizer and sentence-transformers modules, each by what it
    means to the library that loads it: tensors by the parameter they become, tokenizers by the ids they make, settings
    by whether the architecture has them. An expert without tokenizer or `modules.json` is fine: the mixture uses the
    base's.

    Args:
        tokenizer: the base's, for who compares several experts with it: a large one takes seconds to load and to try.

    Raises:
        CheckpointError: one of the folders cannot be read as a checkpoint.
    """
    tokenizer = tokenizer or FolderTokenizer(base)
    found = _Findings()
    # an adapter has no configuration of its own
    if is_adapter(expert) or _compare_configs(base, expert, found):
        reader = CheckpointReader(base, allow_quantised=is_adapter(expert))
        with reader as base_reader, read_expert(expert, base_reader) as expert_reader:
            found.problems += _compare_tensors(base_reader.parameters, expert_reader.tensors)
            if isinstance(expert_reader, CheckpointReader):
                found.warnings += _unread(base_reader, expert_reader)
                found.problems += _compare_repeated(expert_reader)
    _compare_tokenizers(tokenizer, FolderTokenizer(expert), found)
    found.problems += _compare_modules(base, expert, tokenizer)
    if model_class(base).endswith("ForSequenceClassification"):
        _compare_templates(base, expert, found)
    return CompatibilityReport(Path(base), Path(expert), tuple(found.problems), tuple(found.warnings))


def check_tensors(base: Mapping[str, TensorInfo], expert: Mapping[str, TensorInfo], *, name: str) -> None:
    """Raises IncompatibleModelsError unless the headers of two checkpoints can be mixed; `name` is the expert's."""
    problems = list(_compare_tensors(base, expert))
    if problems:
        raise IncompatibleModelsError(f"{name} cannot be mixed with the base: {problems[0]}")


def _compare_configs(base: Path, expert: Path, found: _Findings) -> bool:
    """Whether it is one architecture: tensors of two differ all for that one reason."""
    raw, others_raw = read_config(base), read_config(expert)
    if "auto_map" not in raw.keys() | others_raw.keys() and dict(_flat(raw)) == dict(_flat(others_raw)):
        return True  # what says the same means the same: no need to import transformers
    config = open_model_config(base)
    mine, theirs = dict(_flat(config.to_dict())), dict(_flat(open_model_config(expert).to_dict()))
    if mine.get("model_type") != theirs.get("model_type"):
        found.problems.append(
            Finding(
                "config model_type",
                repr(mine.get("model_type")),
                repr(theirs.get("model_type")),
                "only models of one architecture can be mixed",
            )
        )
        return False
    if read_modules(base):  # the half of an encoder-decoder that makes embeddings may be saved with the other, or alone
        mine["is_encoder_decoder"] = theirs.get("is_encoder_decoder")
    for key in sorted(mine.keys() | theirs.keys()):
        value, others = (settings.get(key, _OF_ALL_ARCHITECTURES.get(key)) for settings in (mine, theirs))
        if value == others:
            continue
        changes_model = key in _OF_ALL_ARCHITECTURES or is_declared(type(config), key)
        fix = _fix_setting(key, value) if changes_model else "no code of this architecture reads the setting"
        finding = Finding(f"config {key}", repr(value), repr(others), fix)
        (found.problems if changes_model else found.warnings).append(finding)
    return True


def _fix_setting(key: str, value: Any) -> str:
    if key.rpartition(".")[2] == "vocab_size":
        return _resize(value)
    return (
        "fine-tune the expert from this base without changing the setting; if it was trained with the base's value, "
        "write that into the expert's config.json"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _IRRELEVANT or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


_SAVE_WHOLE = "save the expert whole, with the class of the base (`architectures` in its config.json)"
_SAVE_MODULE = (
    "save the expert with sentence-transformers, into modules of the base's names; if this module was not trained, "
    "copy the base's modules.json and the folders that it names into the expert"
)


def _compare_tensors(base: Mapping[str, TensorInfo], expert: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    for name, info in base.items():
        other = expert.get(name)
        if other is None:
            # releases differ in which integer buffers they store; the base's are taken anyway
            if info.is_floating:
                yield Finding(f"tensor {name}", str(info), "none", _SAVE_MODULE if "/" in name else _SAVE_WHOLE)
        elif info.shape != other.shape:
            yield Finding(f"tensor {name}", str(info), str(other), _fix_shape(name, info))
        elif info.is_floating != other.is_floating:
            yield Finding(f"tensor {name}", str(info), str(other), "store it in the same kind of dtype")
    for name, other in expert.items():
        if name not in base and other.is_floating:
            yield Finding(
                f"tensor {name}",
                "none",
                str(other),
                "save both with the class that has this parameter: the base too, if it was saved without its head",
            )


def _unread(base: CheckpointReader, expert: CheckpointReader) -> Iterator[Finding]:
    """One finding for each side, however many tensors it has alone: a head, or half a model."""
    of_base = [name for name in expert.unread if name in base.tensors]
    of_expert = [name for name in expert.unread if name not in base.tensors]
    for alone, mine, theirs in ((of_base, len(of_base), "none"), (of_expert, "none", len(of_expert))):
        if alone:
            subject = f"tensor {alone[0]}" + (f" and {len(alone) - 1} more" if len(alone) > 1 else "")
            yield Finding(subject, str(mine), str(theirs), "no engine reads them; the mixture has what the base has")


def _compare_repeated(expert: CheckpointReader) -> Iterator[Finding]:
    stored = expert.as_stored
    for name, other in expert.repeated.items():
        is_same = stored.tensors[name] == stored.tensors[other] and stored.get_bytes(name) == stored.get_bytes(other)
        if not is_same:
            yield Finding(
                f"tensor {name}",
                "none",
                f"other values than in {other}, which is the same parameter",
                "load the expert with transformers, look at what it does, and save it anew",
            )


def _fix_shape(name: str, info: TensorInfo) -> str:
    if "embed" in name or "lm_head" in name or "wte" in name:
        return _resize(info.shape[0])
    return "only models of one architecture and size can be mixed"


def _resize(num_tokens: Any) -> str:
    return (
        "tokens were added or the vocabulary was padded: resize it back to the base's vocabulary "
        f"(`model.resize_token_embeddings({num_tokens})` of transformers) and save it with the base's tokenizer"
    )


def _compare_tokenizers(base: FolderTokenizer, expert: FolderTokenizer, found: _Findings) -> None:
    for difference in differences(base, expert):
        fix = (
            "all texts that were tried are cut alike; the mixture has the base's"
            if difference.is_harmless
            else "with another tokenizer the same text means other parameters: fine-tune the expert with the base's; "
            "if that was done, save the base's tokenizer files beside it"
        )
        finding = Finding(f"tokenizer {difference.part}", difference.base, difference.expert, fix)
        (found.warnings if difference.is_harmless else found.problems).append(finding)


def _compare_templates(base: Path, expert: Path, found: _Findings) -> None:
    """Of rerankers: sentence-transformers reads a pair through the tokenizer's chat template, where there is one.

    That an expert was saved without says little: releases before 6 read pairs plainly all the same.
    """
    mine, theirs = (templates(model_folder(folder)).get(DEFAULT) for folder in (base, expert))
    brings_tokenizer = (model_folder(expert) / TOKENIZER_CONFIG).is_file()
    if mine == theirs or not brings_tokenizer:
        return
    said, others_said = ("none" if text is None else repr(text[:80]) for text in (mine, theirs))
    if theirs is None:
        fix = "pairs are read through the base's; take it out of the base if the models were trained on plain pairs"
        found.warnings.append(Finding("chat template", said, others_said, fix))
        return
    fix = (
        "pairs are read through the base's, which are other tokens: train the expert with the base's; if that was "
        "done, save the base's tokenizer files beside it"
    )
    found.problems.append(Finding("chat template", said, others_said, fix))


def _compare_modules(base: Path, expert: Path, tokenizer: FolderTokenizer) -> Iterator[Finding]:
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
            included, others_included = (
                read_optional_json(folder / place.path / "config.json").get("include_prompt", True)
                for folder, place in ((base, module), (expert, other))
            )
            if included != others_included:
                yield Finding(
                    f"{module.path}/config.json include_prompt",
                    repr(included),
                    repr(others_included),
                    "embeddings of different pooling cannot be mixed",
                )
        elif module.type == "Transformer":
            yield from _compare_case(base, expert, tokenizer)
        else:
            yield from _compare_settings(base, module, expert, other)


def _compare_case(base: Path, expert: Path, tokenizer: FolderTokenizer) -> Iterator[Finding]:
    """Of lower-casing by sentence-transformers, which says nothing where the tokenizer lower-cases by itself."""
    mine, theirs = (_lower_cases(folder) for folder in (base, expert))
    if mine != theirs and not tokenizer.ignores_case:
        yield Finding(
            "sentence_bert_config.json do_lower_case",
            repr(mine),
            repr(theirs),
            "the same text means other tokens: train the expert with the base's setting; if that was done, write it "
            "into the expert's file",
        )


def _lower_cases(folder: Path) -> bool:
    # the first releases named the file after the architecture
    files = sorted(model_folder(folder).glob("sentence_*_config.json"))
    return any(bool(read_json(file).get("do_lower_case")) for file in files)


def _compare_settings(base: Path, module: Module, expert: Path, other: Module) -> Iterator[Finding]:
    """Of a module behind the transformer, such as a Dense: its activation is no parameter, and changes all vectors."""
    mine, theirs = _module_settings(base, module), _module_settings(expert, other)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield Finding(
                f"{module.path}/config.json {key}",
                repr(mine.get(key, _MODULE_DEFAULTS.get(key))),
                repr(theirs.get(key, _MODULE_DEFAULTS.get(key))),
                "vectors of different modules cannot be mixed; train the expert with the base's modules",
            )


def _module_settings(folder: Path, module: Module) -> dict[str, Any]:
    path = folder / module.path / "config.json"
    if not path.is_file():
        return {}
    # releases differ in where a class lives, and in which defaults they write
    settings = {
        key: value.rpartition(".")[2] if isinstance(value, str) and value.startswith("torch.") else value
        for key, value in read_json(path).items()
    }
    return {key: value for key, value in settings.items() if value not in (None, _MODULE_DEFAULTS.get(key))}
