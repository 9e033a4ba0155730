"""From the tensors that today's transformers saves to those that lie in the publisher's repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

Layout = Callable[[State, Mapping[str, Any]], State]
"""A state dict by published names, given the one saved and the configuration as saved."""

MoreFiles = Callable[[Path], None]
"""Writes what else lies in the publisher's folder, which holds all else."""


_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def as_saved(state: State, _config: Mapping[str, Any]) -> State:
    """Published with the class and names that transformers saves today."""
    return state


def no_more_files(_folder: Path) -> None:
    """Nothing else."""


def with_rotary_frequencies(state: State, config: Mapping[str, Any]) -> State:
    """Llama of 2023: rotary frequencies, computed from the configuration ever since, lie in each layer."""
    import torch

    dim = config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config["num_hidden_layers"])]
    return state | {name: frequencies.clone() for name in names}


def with_tied_output(state: State, _config: Mapping[str, Any]) -> State:
    """The output embeddings are stored though they are the input embeddings."""
    (source,) = (name for name in state if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    return state | {"lm_head.weight": state[source].clone()}


def gpt_2(state: State, config: Mapping[str, Any]) -> State:
    """Saved as `GPT2Model`: no `transformer.`, and each layer's causal mask as a float."""
    import torch

    size = config["n_positions"]
    mask = torch.ones(size, size).tril()[None, None]
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(config["n_layer"])}
    names = {name: name.removeprefix("transformer.") for name in state}
    return {names[name]: tensor for name, tensor in state.items() if name != "lm_head.weight"} | masks


def pythia(state: State, config: Mapping[str, Any]) -> State:
    """With the buffers of its day: a causal mask, the value that masks, rotary frequencies."""
    import torch

    size, dim = config["max_position_embeddings"], config["hidden_size"] // config["num_attention_heads"] // 4
    buffers: State = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}.attention"
        buffers[f"{prefix}.bias"] = torch.ones(size, size).tril()[None, None].bool()
        buffers[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        buffers[f"{prefix}.rotary_emb.inv_freq"] = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    renamed = {"embed_out.weight" if name == "lm_head.weight" else name: tensor for name, tensor in state.items()}
    return renamed | buffers


def gemma_3_multimodal(state: State, _config: Mapping[str, Any]) -> State:
    """The vision tower one level deeper than today."""
    return _renamed(state, ((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),))


def opt(state: State, _config: Mapping[str, Any]) -> State:
    """Saved as `OPTModel`: `decoder.` without `model.`, no output embeddings."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "lm_head.weight"}


def with_position_ids(state: State, config: Mapping[str, Any]) -> State:
    """Encoders saved before transformers 4.31 hold the row numbers of their positions."""
    import torch

    (table,) = (name for name in state if name.endswith("embeddings.position_embeddings.weight"))
    name = table.replace("position_embeddings.weight", "position_ids")
    return {name: torch.arange(config["max_position_embeddings"])[None]} | state


def bert_of_tensorflow(state: State, _config: Mapping[str, Any]) -> State:
    """As the first conversion of BERT wrote it: norms are gamma and beta, the heads of pretraining are there."""

    def renamed(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    kept = {name: tensor for name, tensor in state.items() if not name.startswith("cls.predictions.decoder")}
    return {renamed(name): tensor for name, tensor in kept.items()}


def nomic_bert(state: State, _config: Mapping[str, Any]) -> State:
    """The publisher's own code: one matrix for query, key and value, other names for all else."""
    return _renamed(
        _concatenated(state, r"self_attn\.[qkv]_proj", _QUERY_KEY_VALUE, "attn.Wqkv"),
        (
            (r"^(?=layers\.)", "encoder."),
            (r"embeddings\.LayerNorm", "emb_ln"),
            (r"self_attn\.o_proj", "attn.out_proj"),
            (r"up_proj", "fc11"),
            (r"gate_proj", "fc12"),
            (r"down_proj", "fc2"),
            (r"post_attention_layernorm", "norm1"),
            (r"post_mlp_layernorm", "norm2"),
        ),
    )


def gte(state: State, _config: Mapping[str, Any]) -> State:
    """The publisher's own code, `new`: fused query, key and value, fused gate; a prefix where there is a head."""
    state = _concatenated(state, r"self_attn\.[qkv]_proj", _QUERY_KEY_VALUE, "attention.qkv_proj")
    state = _concatenated(state, r"mlp\.(up|gate)_proj", ("mlp.up_proj", "mlp.gate_proj"), "mlp.up_gate_proj")
    return _renamed(
        state,
        (
            (r"^gte\.", "new."),
            (r"(^|new\.)layers\.", r"\1encoder.layer."),
            (r"self_attn\.o_proj", "attention.o_proj"),
            (r"post_attention_layernorm", "attn_ln"),
            (r"post_mlp_layernorm", "mlp_ln"),
        ),
    )


def t5_encoder(state: State, _config: Mapping[str, Any]) -> State:
    """The table of embeddings under both of its names."""
    return state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}


def mistral_originals(folder: Path) -> None:
    """The same parameters once more in the publisher's own names, with the configuration of its own engine."""
    from safetensors.torch import load_file, save_file

    state: State = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        state |= load_file(shard)
    config = json.loads((folder / "config.json").read_text())
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "layers",
    }
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    original = {}
    for name, tensor in state.items():
        count = next((count for part, count in heads.items() if part in name), None)
        renamed = name
        for part, theirs in names.items():
            renamed = renamed.replace(part, theirs)
        original[renamed] = (tensor if count is None else _interleaved(tensor, count)).contiguous()
    save_file(original, folder / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
    }
    (folder / "params.json").write_text(json.dumps(params))


def _interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection as rotary positions were first laid out: pairs side by side."""
    rows, columns = tensor.shape
    return tensor.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _concatenated(state: State, pattern: str, parts: tuple[str, ...], whole: str) -> State:
    """Tensors whose names hold one of `parts` as one, along the first dimension, under `whole`."""
    import torch

    fused: State = {}
    for name, tensor in state.items():
        if not re.search(pattern, name):
            fused[name] = tensor
        elif parts[0] in name:
            others = [state[name.replace(parts[0], part)] for part in parts]
            fused[name.replace(parts[0], whole)] = torch.cat(others)
    return fused


def _renamed(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed
