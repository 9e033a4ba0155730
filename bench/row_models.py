"""Models for `bench.rows`: a base with random parameters, adapters over it, and mixtures of these as one adapter each.

Speed and memory hang on shapes alone, so nothing is trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cocktail_serve.dtypes import DType
from tests.adapters import train_adapter
from tests.models import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


@dataclass(frozen=True)
class Shape:
    """A Llama and adapters of all its linear layers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: DType
    rank: int
    max_model_len: int = 512


SHAPES = {
    "small": Shape(256, 688, 6, 4, 4, 8192, "float32", rank=16),
    "smollm2": Shape(576, 1536, 30, 9, 3, 49152, "bfloat16", rank=8),
}
"""A small pool in float32; HuggingFaceTB/SmolLM2-135M. Both tied."""


def make_pool(folder: Path, shape: Shape, num_experts: int) -> dict[str, Path]:
    """`base` and experts, each in `folder/<name>`."""
    base = _make_base(folder / "base", shape)
    experts = [f"expert-{number}" for number in range(num_experts)]
    for seed, name in enumerate(experts, start=1):
        train_adapter(base, folder / name, seed=seed, r=shape.rank, lora_alpha=2 * shape.rank)
    return {"base": base, **{name: folder / name for name in experts}}


def make_one_adapter(folder: Path, experts: Mapping[str, Path], weights: Mapping[str, float]) -> int:
    """A mixture as one adapter: factors side by side, coefficients and scalings in one of them; its rank."""
    import torch
    from safetensors.torch import load_file, save_file

    parts, config = [], {}
    for name, weight in weights.items():
        if name == "base":
            continue
        config = json.loads((experts[name] / "adapter_config.json").read_text())
        scale = weight * config["lora_alpha"] / config["r"]
        loaded = load_file(experts[name] / "adapter_model.safetensors")
        parts.append({key: factor * scale if "lora_A" in key else factor for key, factor in loaded.items()})
    folder.mkdir(parents=True)
    joined = {key: torch.cat([part[key] for part in parts], dim=0 if "lora_A" in key else 1) for key in parts[0]}
    save_file(joined, folder / "adapter_model.safetensors")
    rank = sum(next(factor for key, factor in part.items() if "lora_A" in key).shape[0] for part in parts)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": rank, "lora_alpha": rank}))
    return rank


def _make_base(folder: Path, shape: Shape) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _make_tokenizer(shape)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_model_len,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens are bytes and pairs of them, as many as the model has: any answer has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs: Sequence[tuple[str, str]] = list(
        itertools.islice(itertools.product(characters, characters), shape.vocab - len(special) - len(characters))
    )
    tokens = [*special, *characters, *(first + second for first, second in pairs)]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(pairs)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=shape.max_model_len,
    )
