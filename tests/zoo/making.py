"""Puts a specimen's family on disk: base, full expert, LoRA expert, and the full expert re-saved by each release."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.zoo.other_release import OtherRelease
from tests.zoo.resaving import resave
from tests.zoo.specimens import Pooled, Specimen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BASE, FULL, LORA = "base", "full", "lora"
RESAVED_BY_4, RESAVED_BY_5 = "resaved-by-4", "resaved-by-5"
"""The expert `full`, loaded and saved by transformers 4 or 5: the same parameters in another form."""

BASE_RESAVED_BY_4, BASE_RESAVED_BY_5 = "base-resaved-by-4", "base-resaved-by-5"

_PERTURBATION = 0.7
_VECTOR_NOISE = 0.15
"""Of norms and biases: small beside 1, large beside any rounding."""

_MODEL_CARD_OF_4 = "4.46.3"


def make_family(root: Path, specimen: Specimen, other: OtherRelease | None) -> dict[str, Path]:
    """Makes all members in `root/<member>`.

    Args:
        other: transformers 4; without it, and for architectures it does not know, its members are left out.

    Returns:
        Folders by member. Those of a re-saved base are no experts: they take the base's place.
    """
    folders = {BASE: publish(root / BASE, specimen), FULL: publish(root / FULL, specimen, perturbation_seed=1)}
    folders[LORA] = make_adapter(root / LORA, specimen, folders[BASE])
    for member, source in ((RESAVED_BY_5, FULL), (BASE_RESAVED_BY_5, BASE)):
        folders[member] = root / member
        resave(specimen.kind, folders[source], folders[member])
    if other is not None and not specimen.unknown_to_4:
        for member, source in ((RESAVED_BY_4, FULL), (BASE_RESAVED_BY_4, BASE)):
            folders[member] = root / member
            other.resave(specimen.kind, folders[source], folders[member])
    return folders


def publish(folder: Path, specimen: Specimen, *, perturbation_seed: int | None = None) -> Path:
    """A model of the specimen in its publisher's form: the base, or with a seed a fine-tuned one."""
    import torch
    import transformers

    shape = dict(specimen.config)
    if specimen.kind == "reranker":
        shape["num_labels"] = 1
    config = transformers.AutoConfig.for_model(specimen.model_type, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, specimen.model_class)(config)
    _fill(model, _seed_of(specimen), perturbation_seed, specimen.table_scale)
    saved = folder / "saved"
    model.save_pretrained(saved)
    content = json.loads((saved / "config.json").read_text())
    state = specimen.layout(_read(saved), content)
    shutil.rmtree(saved)
    _write_state(folder, state, specimen.storage)
    _write_config(folder, content, specimen)
    specimen.tokenizer(folder)
    if specimen.generation is not None:
        special = {key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if content.get(key)}
        _write_json(folder / "generation_config.json", {**special, **specimen.generation})
    if specimen.pooled is not None:
        _write_modules(folder, specimen.pooled, _width(specimen), _seed_of(specimen), perturbation_seed)
    specimen.more_files(folder)
    return folder


def make_adapter(folder: Path, specimen: Specimen, base: Path) -> Path:
    """A LoRA of all linear layers, made and saved by peft, as if it had been trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.zoo.reference import load_transformer, quiet_about_patterns

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        fan_in_fan_out=specimen.model_type == "gpt2",
        task_type="CAUSAL_LM" if specimen.kind == "decoder" else None,
    )
    with quiet_about_patterns():
        model = get_peft_model(load_transformer(specimen, base), config)
    generator = torch.Generator().manual_seed(_seed_of(specimen) + 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]), generator=generator)
            elif ".lora_B." in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def _seed_of(specimen: Specimen) -> int:
    return zlib.crc32(specimen.name.encode()) % 100_000


def _fill(model: torch.nn.Module, seed: int, perturbation_seed: int | None, table_scale: float) -> None:
    """Parameters large enough for clear choices, all of them unlike their neighbours; norms and biases too."""
    import torch

    base = torch.Generator().manual_seed(seed)
    noise = None if perturbation_seed is None else torch.Generator().manual_seed(seed + perturbation_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=base), alpha=_VECTOR_NOISE)
                if noise is not None:
                    parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=_VECTOR_NOISE)
                continue
            is_table = any(part in name for part in ("embed", "lm_head", "wte", "wpe", "shared.weight"))
            scale = table_scale if is_table else 1.5 / math.sqrt(parameter.shape[-1])
            parameter.normal_(0.0, scale, generator=base)
            if noise is not None:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=_PERTURBATION * scale)


def _width(specimen: Specimen) -> int:
    """Size of a token's vector."""
    config = specimen.config
    width: int = config.get("hidden_size") or config.get("dim") or config["d_model"]
    return width


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def _write_state(folder: Path, state: Mapping[str, Tensor], storage: str) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    state = {name: tensor.contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if storage == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return
    size = sum(tensor.nbytes for tensor in state.values())
    save_torch_state_dict(state, folder, max_shard_size=size * 2 // 3 if storage == "shards" else "5GB")


def _write_config(folder: Path, content: dict[str, Any], specimen: Specimen) -> None:
    if specimen.architectures is not None:
        content["architectures"] = [specimen.architectures]
    if not specimen.unknown_to_4:
        content = _in_words_of_4(content)
        content["transformers_version"] = _MODEL_CARD_OF_4
    _write_json(folder / "config.json", content)


def _in_words_of_4(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 wrote it: other names for the dtype and the rotary positions."""
    config = {
        key: _in_words_of_4(value) if key in ("text_config", "vision_config") else value
        for key, value in content.items()
    }
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None) or {}
    if config["model_type"] == "modernbert":
        config["global_rope_theta"] = rope["full_attention"]["rope_theta"]
        config["local_rope_theta"] = rope["sliding_attention"]["rope_theta"]
        config.pop("layer_types", None)
    elif config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = rope["rope_theta"]
        config["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)
    elif "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        config["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _write_modules(folder: Path, pooled: Pooled, width: int, seed: int, perturbation_seed: int | None) -> None:
    """modules.json and its folders as sentence-transformers 2 wrote them."""
    import torch
    from safetensors.torch import save_file

    types = ["Transformer", "Pooling", *["Dense"] * len(pooled.dense), "Normalize"]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(types) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(types, paths, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    if pooled.max_length is not None:
        limits = {"max_seq_length": pooled.max_length, "do_lower_case": False}
        _write_json(folder / "sentence_bert_config.json", limits)
    if pooled.prompts:
        version = {"sentence_transformers": "2.7.0", "transformers": _MODEL_CARD_OF_4, "pytorch": "2.3.1"}
        settings = {"__version__": version, "prompts": dict(pooled.prompts), "default_prompt_name": None}
        _write_json(folder / "config_sentence_transformers.json", {**settings, "similarity_fn_name": "cosine"})
    flags = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt"}
    flags["lasttoken"] = "lasttoken"
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {f"pooling_mode_{flag}": mode == pooled.mode for flag, mode in flags.items()}
    (folder / paths[1]).mkdir()
    _write_json(folder / paths[1] / "config.json", {**pooling, "include_prompt": True})
    (folder / paths[-1]).mkdir()
    generator = torch.Generator().manual_seed(seed + 1 + (0 if perturbation_seed is None else 10 * perturbation_seed))
    for path, size in zip(paths[2:-1], pooled.dense, strict=True):
        (folder / path).mkdir()
        activation = "torch.nn.modules.linear.Identity"
        dense = {"in_features": width, "out_features": size, "bias": False, "activation_function": activation}
        _write_json(folder / path / "config.json", dense)
        weight = torch.randn(size, width, generator=generator) / math.sqrt(width)
        save_file({"linear.weight": weight}, folder / path / "model.safetensors")
        width = size


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
