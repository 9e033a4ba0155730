"""What an adapter's configuration says, field by field: honoured, harmless, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cocktail_serve.checkpoints.layout import ADAPTER_CONFIG, read_json
from cocktail_serve.errors import CheckpointError

MERGE = "load it with peft over its base, merge it (merge_and_unload) and name what that saves"

_CONVERT = (
    "save it as plain LoRA: peft's save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), where FOLDER "
    "holds the adapter as it was before training"
)
_TRAIN = "train plain LoRA for this expert"
_MERGE_TRAINED = "merge the model it was trained in (merge_and_unload) and name what that saves"


@dataclass(frozen=True, slots=True)
class Field:
    """What becomes of one field of `adapter_config.json`.

    Attributes:
        use: `honoured`: it decides what is folded. `harmless`: it says nothing of what the trained adapter adds.
            `refused`: any value but null, false, zero and empty is.
        note: how it is honoured, why it is harmless, or what it does that cannot be folded.
        remedy: what to do about a refused one.
    """

    use: Literal["honoured", "harmless", "refused"]
    note: str
    remedy: str = ""


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "peft_type": Field("honoured", "`LORA` alone; other methods are refused by name"),
        "r": Field("honoured", "the rank, which the tensors must have"),
        "lora_alpha": Field("honoured", "scaling is `lora_alpha / r`"),
        "rank_pattern": Field("honoured", "rank of the modules that a key matches, as peft matches them"),
        "alpha_pattern": Field("honoured", "`lora_alpha` of the modules that a key matches, as peft matches them"),
        "use_rslora": Field("honoured", "scaling is `lora_alpha / sqrt(r)`"),
        "init_lora_weights": Field("honoured", "kinds that take something out of the base are refused, see below"),
        "fan_in_fan_out": Field("honoured", "as peft corrects it: by the layer (`Conv1D` of GPT-2), not by the flag"),
        "bias": Field("honoured", "trained biases take the place of the base's"),
        "lora_bias": Field("honoured", "the scaled bias of B is added to the layer's, which must have one"),
        "modules_to_save": Field("honoured", "modules saved whole take the place of the base's"),
        "trainable_token_indices": Field("honoured", "the rows of these tokens take the place of the base's"),
        "use_dora": Field("honoured", "each output's weights are given the trained magnitude"),
        "ensure_weight_tying": Field("honoured", "tied embeddings must be changed alike, as this makes them"),
        "target_modules": Field("harmless", "the tensors tell which modules were adapted"),
        "exclude_modules": Field("harmless", "the tensors tell which modules were adapted"),
        "layers_to_transform": Field("harmless", "the tensors tell which layers were adapted"),
        "layers_pattern": Field("harmless", "the tensors tell which layers were adapted"),
        "task_type": Field("harmless", "which class peft wraps the model in"),
        "auto_mapping": Field("harmless", "the class that it was trained in"),
        "peft_version": Field("harmless", "who wrote the file"),
        "base_model_name_or_path": Field("harmless", "the pool names the base"),
        "revision": Field("harmless", "the pool names the base"),
        "inference_mode": Field("harmless", "whether it is trained on"),
        "lora_dropout": Field("harmless", "acts in training alone"),
        "megatron_config": Field("harmless", "the layers it was trained in"),
        "megatron_core": Field("harmless", "the layers it was trained in"),
        "runtime_config": Field("harmless", "where tensors lie while it is loaded"),
        "loftq_config": Field("harmless", "acts with `init_lora_weights: loftq` alone, which is refused"),
        "eva_config": Field("harmless", "how the factors began"),
        "corda_config": Field("harmless", "acts with `init_lora_weights: corda` alone, which is refused"),
        "lora_ga_config": Field("harmless", "acts with `init_lora_weights: lora_ga` alone, which is refused"),
        "velora_config": Field("harmless", "changes the backward pass alone"),
        "monteclora_config": Field("harmless", "draws samples in training alone"),
        "qalora_group_size": Field("harmless", "acts with `use_qalora` alone, which is refused"),
        "merge_weights": Field("harmless", "of peft before 0.3: merges while it is evaluated"),
        "lora_dtype": Field("harmless", "of ms-swift: the dtype it was trained in"),
        "lorap_lr_ratio": Field("harmless", "of ms-swift: a learning rate"),
        "lorap_emb_lr": Field("harmless", "of ms-swift: a learning rate"),
        "unsloth_fixed": Field("harmless", "of Unsloth: a mark that the file was looked through"),
        "unsloth_version": Field("harmless", "of Unsloth: who wrote the file"),
        "alora_invocation_tokens": Field(
            "refused",
            "aLoRA acts from its invocation tokens on and not before them, so no one set of parameters is this model",
            f"{_TRAIN}; aLoRA needs an engine that applies adapters, token by token",
        ),
        "arrow_config": Field(
            "refused",
            "Arrow chooses among several adapters for each token, so no one set of parameters is this model",
            "name the adapters that it chooses from as experts of their own",
        ),
        "layer_replication": Field(
            "refused",
            "it repeats layers, so the adapted model is deeper than the base",
            "make the model with its layers repeated the pool's base, and set layer_replication to null",
        ),
        "target_parameters": Field("refused", "its factors belong to parameters that are no linear layer's", MERGE),
        "use_bdlora": Field("refused", "its factors are stored as blocks of larger ones", MERGE),
        "kasa_config": Field("refused", "KaSA cuts the smallest singular values out of the base", MERGE),
        "use_qalora": Field(
            "refused",
            "QA-LoRA pools the inputs of a quantised layer, which peft cannot merge",
            _TRAIN,
        ),
        "enable_lora": Field("refused", "of peft before 0.3: factors for parts of one joined projection", _TRAIN),
    }
)
"""All fields that PEFT up to 0.21 and the trainers built on it write."""


@dataclass(frozen=True, slots=True)
class Init:
    """A kind of `init_lora_weights`: how factors begin, and so to which base they belong.

    Attributes:
        note: what it does.
        remedy: empty where the base stays as it is.
    """

    note: str
    remedy: str = ""


INITS: Mapping[str, Init] = MappingProxyType(
    {
        "true": Init("A random, B zero"),
        "false": Init("A and B random"),
        "gaussian": Init("A normal, B zero"),
        "eva": Init("A from the layer's inputs, B zero"),
        "orthogonal": Init("A and B orthogonal"),
        "mica": Init("A zero, B from the smallest singular vectors of the base, which stays"),
        "pissa": Init("takes the largest singular values out of the base", f"{_CONVERT}; or {MERGE}"),
        "pissa_niter_N": Init(
            "takes about the largest singular values, found from a random start, out of the base",
            f"{_CONVERT}; or {_MERGE_TRAINED}",
        ),
        "olora": Init("takes the first directions of a QR decomposition out of the base", f"{_CONVERT}; or {MERGE}"),
        "corda": Init("takes directions found from sample inputs out of the base", f"{_CONVERT}; or {_MERGE_TRAINED}"),
        "lora_ga": Init("takes directions of the first gradient out of the base", f"{_CONVERT}; or {_MERGE_TRAINED}"),
        "loftq": Init("puts a quantised base in the base's place", _MERGE_TRAINED),
    }
)
"""Those whose base is another than the one named have a remedy, and are refused."""

_BIASES = ("none", "all", "lora_only")

_NO_PARAMETERS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
)
"""Methods of peft that add inputs instead of changing parameters."""


class AdapterConfig:
    """An `adapter_config.json` whose every field is accounted for.

    Args:
        folder: holds the file.

    Raises:
        CheckpointError: it cannot be read, or holds a setting that cannot be honoured: names it and says what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ADAPTER_CONFIG
        self._fields = read_json(self.path)
        for reason, remedy in self._refusals():
            raise CheckpointError(f"{folder} is an adapter that cannot be folded: {reason}; {remedy}")
        for name, kind in (("rank_pattern", Mapping), ("alpha_pattern", Mapping), ("modules_to_save", list)):
            if self._fields.get(name) and not isinstance(self._fields[name], kind):
                raise CheckpointError(f"{self.path}: {name} is {self._fields[name]!r}, which peft cannot read either")

    @property
    def is_dora(self) -> bool:
        return bool(self._fields.get("use_dora"))

    @property
    def has_lora_bias(self) -> bool:
        return bool(self._fields.get("lora_bias"))

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self._fields.get("fan_in_fan_out"))

    @property
    def saved_modules(self) -> list[str]:
        """Ends of the names of modules that were trained and saved whole; some may not be in the model."""
        return [str(name) for name in self._fields.get("modules_to_save") or ()]

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors.

        Raises:
            CheckpointError: it is no count.
        """
        rank = self._of_module(module, "rank_pattern", "r")
        if type(rank) is not int or rank <= 0:
            raise CheckpointError(f"{self.path}: r must be a whole number above 0, and is {rank!r} for {module}")
        return rank

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r), of a module.

        Raises:
            CheckpointError: they are no numbers.
        """
        rank = self.rank_of(module)
        alpha = self._of_module(module, "alpha_pattern", "lora_alpha")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.path}: lora_alpha must be a number, and is {alpha!r} for {module}")
        return float(alpha) / (math.sqrt(rank) if self._fields.get("use_rslora") else rank)

    def token_indices(self, module: str) -> list[int] | None:
        """The tokens whose rows of an embedding were trained apart; None where none were.

        A list is of the input embeddings, whatever they are called; a mapping names modules by the end of their names.
        """
        indices = self._fields.get("trainable_token_indices") or ()
        if isinstance(indices, Mapping):
            indices = next((value for name, value in indices.items() if module.endswith(name)), ())
        is_list = isinstance(indices, list) and all(type(index) is int for index in indices)
        return list(indices) if indices and is_list else None

    def _refusals(self) -> Iterator[tuple[str, str]]:
        """Reason and remedy of everything that stands in the way."""
        method = self._fields.get("peft_type")
        if isinstance(method, str) and method in _NO_PARAMETERS:
            yield f"{method} adds inputs and changes no parameter", _TRAIN
        elif not method:
            yield "it has no peft_type", "save it with peft again"
        elif method != "LORA":
            yield f"its peft_type is {method!r}, not LORA", MERGE
        for name, value in self._fields.items():
            field = FIELDS.get(name)
            if not value:
                continue
            if field is None:
                yield (
                    f"{name} is {value!r}, a setting that is not known here (peft_version "
                    f"{self._fields.get('peft_version')!r})",
                    f"delete it from {ADAPTER_CONFIG} if it acts in training alone; otherwise {_MERGE_TRAINED}",
                )
            elif field.use == "refused":
                yield f"it has {name}: {field.note}", field.remedy
        kind = str(self._fields.get("init_lora_weights") or False).lower()
        init = INITS.get("pissa_niter_N" if kind.startswith("pissa_niter_") else kind)
        if init is None:
            yield f"init_lora_weights is {kind!r}, which is not known here", _MERGE_TRAINED
        elif init.remedy:
            yield f"init_lora_weights is {kind!r}, which {init.note}: the factors belong to that base", init.remedy
        bias = self._fields.get("bias") or "none"
        if bias not in _BIASES:
            yield f"bias is {bias!r}", f"set it to what was trained: {', '.join(_BIASES)}"

    def _of_module(self, module: str, pattern: str, default: str) -> Any:
        """peft's rule: the first key that the module's name ends with, as a regular expression, decides."""
        for key, value in (self._fields.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self.path}: {pattern} has {key!r}, which is no pattern: {error}") from error
        return self._fields.get(default)
