"""What models there are in the zoo: architecture, the form it is published in, and who can do what with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.zoo import layouts, tokenizers
from tests.zoo.layouts import Layout
from tests.zoo.tokenizers import VOCAB_SIZE, WriteTokenizer

Kind = Literal["decoder", "encoder", "reranker"]

HIDDEN, HEADS, HEAD_DIM, POSITIONS = 64, 2, 32, 256
"""Of decoders: what vLLM's kernels on a CPU take."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """The sentence-transformers modules behind an encoder.

    Attributes:
        mode: of pooling.
        dense: output sizes of the Dense modules between pooling and normalisation.
        prompts: as `config_sentence_transformers.json` names them.
        max_length: what `sentence_bert_config.json` says; None where the publisher has no such file.
    """

    mode: Literal["mean", "cls", "lasttoken"] = "mean"
    dense: tuple[int, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = 128


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something of a family is not taken.

    Attributes:
        says: what the message says, as a regular expression.
        because: for the table of the documentation.
    """

    says: str
    because: str


@dataclass(frozen=True, slots=True)
class Specimen:
    """A tiny model in the form of one publisher.

    Attributes:
        name: of the family.
        published_as: models on the hub in this form.
        model_class: of transformers: what the parameters are drawn for.
        config: beside `model_type`, what differs from the defaults of its configuration class.
        layout: from the names that transformers saves to those published.
        storage: how the parameters lie in the folder.
        architectures: as `config.json` says, where that is not the model's class.
        pooled: of an encoder.
        table_scale: of the embeddings' values; less where the architecture multiplies them by itself.
        generation: what `generation_config.json` says beside the special tokens; None where there is none.
        more_files: writes what else lies in the folder.
        unknown_to_4: whether transformers 4 does not have the architecture (its publisher came with code).
        refused: members of the family that cannot be mixed with its base, and why.
        unserved: why vLLM's CPU build does not run it; None where it does.
        remark: for the table of the documentation.
        is_in_short_run: whether `make test` walks it; the others wait for `make test-full`.
    """

    name: str
    kind: Kind
    published_as: str
    model_class: str
    model_type: str
    config: Mapping[str, Any]
    tokenizer: WriteTokenizer
    layout: Layout = layouts.as_saved
    storage: Literal["single", "shards", "bin"] = "single"
    architectures: str | None = None
    pooled: Pooled | None = None
    table_scale: float = 1.0
    generation: Mapping[str, Any] | None = None
    more_files: layouts.MoreFiles = layouts.no_more_files
    unknown_to_4: bool = False
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    unserved: Refusal | None = None
    remark: str = ""
    is_in_short_run: bool = False

    def __str__(self) -> str:
        return self.name


_LORA_OF_EXPERTS = Refusal(
    "target_parameters",
    "an adapter of peft over the experts themselves has `target_parameters`: load it with peft and merge it",
)
_LORA_OF_FUSED = Refusal(
    "joined with others",
    "an adapter names query, key and value (and the two halves of a gate) apart, the published base holds them as one",
)
_NEEDS_TORCHVISION = Refusal(
    "failed to be inspected",
    "vLLM's class for it imports torchvision, which the CPU build is installed without",
)
_HALVED_WINDOW = Refusal(
    "config sliding_window",
    "transformers 4 halves `sliding_window` each time it saves the model: write the base's value into the expert's "
    "config.json",
)

_LLAMA_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_GEMMA_SHAPE = {
    **_LLAMA_SHAPE,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA_3_TEXT = {**_GEMMA_SHAPE, "layer_types": ["sliding_attention", "full_attention"]}

DECODERS = (
    Specimen(
        "llama-2",
        "decoder",
        "meta-llama/Llama-2-7b-hf",
        "LlamaForCausalLM",
        "llama",
        {**_LLAMA_SHAPE, "bos_token_id": 1, "eos_token_id": 2},
        tokenizers.llama_2,
        layout=layouts.with_rotary_frequencies,
        storage="shards",
        is_in_short_run=True,
        remark="rotary frequencies in each layer, as of 2023",
    ),
    Specimen(
        "llama-3",
        "decoder",
        "meta-llama/Llama-3.2-1B",
        "LlamaForCausalLM",
        "llama",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "bos_token_id": 360,
            "eos_token_id": [361, 362],
        },
        tokenizers.llama_3,
    ),
    Specimen(
        "mistral",
        "decoder",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "MistralForCausalLM",
        "mistral",
        {**_LLAMA_SHAPE, "num_key_value_heads": 1, "head_dim": HEAD_DIM, "sliding_window": None},
        tokenizers.mistral,
        storage="shards",
        more_files=layouts.mistral_originals,
        is_in_short_run=True,
        remark="`consolidated.safetensors`, `params.json` and `tokenizer.model.v3` beside it are left alone",
    ),
    Specimen(
        "qwen-2",
        "decoder",
        "Qwen/Qwen2-0.5B",
        "Qwen2ForCausalLM",
        "qwen2",
        {**_LLAMA_SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": True, "eos_token_id": 360},
        tokenizers.qwen,
    ),
    Specimen(
        "qwen-2.5",
        "decoder",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen2ForCausalLM",
        "qwen2",
        {**_LLAMA_SHAPE, "num_key_value_heads": 1, "eos_token_id": 362, "rope_theta": 1000000.0},
        tokenizers.qwen,
        storage="shards",
        generation={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    ),
    Specimen(
        "qwen-3",
        "decoder",
        "Qwen/Qwen3-0.6B",
        "Qwen3ForCausalLM",
        "qwen3",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "tie_word_embeddings": True,
            "eos_token_id": 362,
        },
        tokenizers.qwen,
        layout=layouts.with_tied_output,
        is_in_short_run=True,
        remark="output embeddings stored though tied",
    ),
    Specimen(
        "gemma-2",
        "decoder",
        "google/gemma-2-2b",
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA_SHAPE,
        tokenizers.gemma,
        storage="shards",
        table_scale=0.2,
    ),
    Specimen(
        "gemma-3",
        "decoder",
        "google/gemma-3-1b-it",
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA_3_TEXT,
        tokenizers.gemma,
        table_scale=0.2,
    ),
    Specimen(
        "gemma-3-multimodal",
        "decoder",
        "google/gemma-3-4b-it",
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": {**_GEMMA_3_TEXT, "model_type": "gemma3_text"},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 10,
            "eoi_token_index": 11,
            "image_token_index": 12,
            "tie_word_embeddings": True,
        },
        tokenizers.gemma,
        layout=layouts.gemma_3_multimodal,
        remark="the vision tower is mixed along; names of transformers 4",
        unserved=_NEEDS_TORCHVISION,
        table_scale=0.2,
    ),
    Specimen(
        "phi-3",
        "decoder",
        "microsoft/Phi-3-mini-4k-instruct",
        "Phi3ForCausalLM",
        "phi3",
        {**_LLAMA_SHAPE, "sliding_window": 64, "pad_token_id": 381, "eos_token_id": 381, "bos_token_id": 1},
        tokenizers.phi_3,
        storage="shards",
    ),
    Specimen(
        "gpt-2",
        "decoder",
        "openai-community/gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "bos_token_id": 360,
            "eos_token_id": 360,
        },
        tokenizers.gpt_2,
        layout=layouts.gpt_2,
        is_in_short_run=True,
        remark="no `transformer.`, causal masks as numbers",
    ),
    Specimen(
        "pythia",
        "decoder",
        "EleutherAI/pythia-160m",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        tokenizers.gpt_neox,
        layout=layouts.pythia,
        remark="`masked_bias`, masks and rotary frequencies",
    ),
    Specimen(
        "opt",
        "decoder",
        "facebook/opt-125m",
        "OPTForCausalLM",
        "opt",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        tokenizers.opt,
        layout=layouts.opt,
        storage="bin",
        remark="`pytorch_model.bin`, `decoder.` without `model.`, no tokenizer.json",
    ),
    Specimen(
        "falcon",
        "decoder",
        "tiiuae/falcon-7b",
        "FalconForCausalLM",
        "falcon",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "multi_query": True,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
            "new_decoder_architecture": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        tokenizers.generic_byte_level,
        layout=layouts.with_tied_output,
        storage="shards",
        remark="output embeddings stored though tied",
    ),
    Specimen(
        "stablelm",
        "decoder",
        "stabilityai/stablelm-2-1_6b",
        "StableLmForCausalLM",
        "stablelm",
        {**_LLAMA_SHAPE, "use_qkv_bias": True, "partial_rotary_factor": 0.25, "bos_token_id": 0, "eos_token_id": 0},
        tokenizers.generic_byte_level,
    ),
    Specimen(
        "smollm-3",
        "decoder",
        "HuggingFaceTB/SmolLM3-3B",
        "SmolLM3ForCausalLM",
        "smollm3",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 1,
            "no_rope_layers": [1, 0],
            "tie_word_embeddings": True,
            "pad_token_id": 361,
            "bos_token_id": 360,
            "eos_token_id": 362,
        },
        tokenizers.llama_3,
        storage="shards",
    ),
    Specimen(
        "olmo-2",
        "decoder",
        "allenai/OLMo-2-1124-7B",
        "Olmo2ForCausalLM",
        "olmo2",
        {**_LLAMA_SHAPE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0},
        tokenizers.generic_byte_level,
        storage="shards",
    ),
    Specimen(
        "granite",
        "decoder",
        "ibm-granite/granite-3.1-2b-instruct",
        "GraniteForCausalLM",
        "granite",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 1,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 1 / HEAD_DIM,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        tokenizers.generic_byte_level,
    ),
    Specimen(
        "olmoe",
        "decoder",
        "allenai/OLMoE-1B-7B-0924",
        "OlmoeForCausalLM",
        "olmoe",
        {**_LLAMA_SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1, "eos_token_id": 0},
        tokenizers.gpt_neox,
        storage="shards",
        refused={"lora": _LORA_OF_EXPERTS},
        is_in_short_run=True,
    ),
    Specimen(
        "mixtral",
        "decoder",
        "mistralai/Mixtral-8x7B-v0.1",
        "MixtralForCausalLM",
        "mixtral",
        {**_LLAMA_SHAPE, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokenizers.llama_2,
        storage="shards",
        refused={"lora": _LORA_OF_EXPERTS},
    ),
    Specimen(
        "qwen-2-moe",
        "decoder",
        "Qwen/Qwen1.5-MoE-A2.7B",
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {
            **_LLAMA_SHAPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "eos_token_id": 360,
        },
        tokenizers.qwen,
        storage="shards",
    ),
)

_BERT_SHAPE = {
    "vocab_size": 192,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_ROBERTA_SHAPE = {
    **_BERT_SHAPE,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 130,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_MODERNBERT_SHAPE = {
    **_BERT_SHAPE,
    "vocab_size": VOCAB_SIZE,
    "global_attn_every_n_layers": 2,
    "local_attention": 16,
    "pad_token_id": 363,
    "cls_token_id": 361,
    "sep_token_id": 362,
    "bos_token_id": 361,
    "eos_token_id": 362,
}
_GTE_SHAPE = {**_BERT_SHAPE, "pad_token_id": 1, "type_vocab_size": 1}
_QUERY_PROMPT = {"query": "Instruct: find\nQuery:", "document": ""}

ENCODERS = (
    Specimen(
        "bert",
        "encoder",
        "BAAI/bge-base-en-v1.5",
        "BertModel",
        "bert",
        _BERT_SHAPE,
        tokenizers.bert,
        layout=layouts.with_position_ids,
        pooled=Pooled("cls"),
    ),
    Specimen(
        "bert-pretraining",
        "encoder",
        "google-bert/bert-base-uncased",
        "BertForPreTraining",
        "bert",
        _BERT_SHAPE,
        tokenizers.bert,
        layout=layouts.bert_of_tensorflow,
        pooled=Pooled(),
        is_in_short_run=True,
        remark="`bert.`, heads of pretraining, `gamma` and `beta`; its modules are the zoo's",
    ),
    Specimen(
        "roberta",
        "encoder",
        "sentence-transformers/all-roberta-large-v1",
        "RobertaModel",
        "roberta",
        _ROBERTA_SHAPE,
        tokenizers.roberta,
        layout=layouts.with_position_ids,
        pooled=Pooled(),
        storage="bin",
        remark="`pytorch_model.bin`",
    ),
    Specimen(
        "xlm-roberta",
        "encoder",
        "intfloat/multilingual-e5-base",
        "XLMRobertaModel",
        "xlm-roberta",
        _ROBERTA_SHAPE,
        tokenizers.xlm_roberta,
        layout=layouts.with_position_ids,
        pooled=Pooled(),
    ),
    Specimen(
        "mpnet",
        "encoder",
        "sentence-transformers/all-mpnet-base-v2",
        "MPNetModel",
        "mpnet",
        {**_BERT_SHAPE, "max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        tokenizers.mpnet,
        layout=layouts.with_position_ids,
        pooled=Pooled(),
    ),
    Specimen(
        "distilbert",
        "encoder",
        "sentence-transformers/msmarco-distilbert-base-v4",
        "DistilBertModel",
        "distilbert",
        {"vocab_size": 192, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128},
        tokenizers.distilbert,
        pooled=Pooled(),
    ),
    Specimen(
        "modernbert",
        "encoder",
        "Alibaba-NLP/gte-modernbert-base",
        "ModernBertModel",
        "modernbert",
        _MODERNBERT_SHAPE,
        tokenizers.modernbert,
        pooled=Pooled("cls"),
    ),
    Specimen(
        "nomic-bert",
        "encoder",
        "nomic-ai/nomic-embed-text-v1.5",
        "NomicBertModel",
        "nomic_bert",
        _BERT_SHAPE,
        tokenizers.bert,
        layout=layouts.nomic_bert,
        pooled=Pooled(),
        unknown_to_4=True,
        refused={"lora": _LORA_OF_FUSED},
        is_in_short_run=True,
        remark="names of its publisher's own code",
    ),
    Specimen(
        "gte",
        "encoder",
        "Alibaba-NLP/gte-multilingual-base",
        "GteModel",
        "gte",
        _GTE_SHAPE,
        tokenizers.xlm_roberta,
        layout=layouts.gte,
        pooled=Pooled("cls"),
        unknown_to_4=True,
        refused={"lora": _LORA_OF_FUSED},
        remark="names of its publisher's own code",
    ),
    Specimen(
        "t5",
        "encoder",
        "sentence-transformers/sentence-t5-base",
        "T5EncoderModel",
        "t5",
        {
            "vocab_size": 192,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        tokenizers.t5,
        layout=layouts.t5_encoder,
        pooled=Pooled(dense=(48,)),
        is_in_short_run=True,
        remark="embeddings under two names, a Dense",
    ),
    Specimen(
        "qwen-3-embedding",
        "encoder",
        "Qwen/Qwen3-Embedding-0.6B",
        "Qwen3Model",
        "qwen3",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "tie_word_embeddings": True,
            "eos_token_id": 360,
        },
        tokenizers.qwen_embedding,
        architectures="Qwen3ForCausalLM",
        pooled=Pooled("lasttoken", prompts=_QUERY_PROMPT, max_length=None),
        remark="last token, padded on the left, prompts",
    ),
    Specimen(
        "embedding-gemma",
        "encoder",
        "google/embeddinggemma-300m",
        "Gemma3TextModel",
        "gemma3_text",
        {**_GEMMA_3_TEXT, "use_bidirectional_attention": True},
        tokenizers.embedding_gemma,
        pooled=Pooled(
            dense=(96, 64), prompts={"query": "task: search result | query: ", "document": "title: none | text: "}
        ),
        refused={"resaved-by-4": _HALVED_WINDOW},
        remark="two Dense, prompts",
        table_scale=0.2,
    ),
)

RERANKERS = (
    Specimen(
        "bert-reranker",
        "reranker",
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        "BertForSequenceClassification",
        "bert",
        {**_BERT_SHAPE, "num_labels": 1},
        tokenizers.bert,
        layout=layouts.with_position_ids,
    ),
    Specimen(
        "xlm-roberta-reranker",
        "reranker",
        "BAAI/bge-reranker-v2-m3",
        "XLMRobertaForSequenceClassification",
        "xlm-roberta",
        {**_ROBERTA_SHAPE, "num_labels": 1},
        tokenizers.xlm_roberta,
        is_in_short_run=True,
    ),
    Specimen(
        "roberta-reranker",
        "reranker",
        "cross-encoder/stsb-roberta-base",
        "RobertaForSequenceClassification",
        "roberta",
        {**_ROBERTA_SHAPE, "num_labels": 1},
        tokenizers.roberta,
        layout=layouts.with_position_ids,
    ),
    Specimen(
        "modernbert-reranker",
        "reranker",
        "Alibaba-NLP/gte-reranker-modernbert-base",
        "ModernBertForSequenceClassification",
        "modernbert",
        {**_MODERNBERT_SHAPE, "num_labels": 1},
        tokenizers.modernbert,
    ),
    Specimen(
        "deberta-v2-reranker",
        "reranker",
        "mixedbread-ai/mxbai-rerank-base-v1",
        "DebertaV2ForSequenceClassification",
        "deberta-v2",
        {
            **_BERT_SHAPE,
            "num_labels": 1,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 16,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        tokenizers.deberta_v2,
    ),
    Specimen(
        "electra-reranker",
        "reranker",
        "cross-encoder/ms-marco-electra-base",
        "ElectraForSequenceClassification",
        "electra",
        {**_BERT_SHAPE, "embedding_size": 16, "num_labels": 1},
        tokenizers.electra,
        layout=layouts.with_position_ids,
        storage="bin",
        remark="`pytorch_model.bin`",
    ),
    Specimen(
        "gte-reranker",
        "reranker",
        "Alibaba-NLP/gte-multilingual-reranker-base",
        "GteForSequenceClassification",
        "gte",
        {**_GTE_SHAPE, "num_labels": 1},
        tokenizers.xlm_roberta,
        layout=layouts.gte,
        unknown_to_4=True,
        refused={"lora": _LORA_OF_FUSED},
        is_in_short_run=True,
    ),
    Specimen(
        "qwen-2-reranker",
        "reranker",
        "Qwen 2.5 fine-tuned as a sequence classifier",
        "Qwen2ForSequenceClassification",
        "qwen2",
        {**_LLAMA_SHAPE, "num_key_value_heads": 1, "num_labels": 1, "pad_token_id": 360, "eos_token_id": 362},
        tokenizers.qwen,
        is_in_short_run=True,
        remark="the pair is read through its chat template, as sentence-transformers 6 does",
    ),
    Specimen(
        "llama-reranker",
        "reranker",
        "Llama 3 fine-tuned as a sequence classifier",
        "LlamaForSequenceClassification",
        "llama",
        {**_LLAMA_SHAPE, "num_labels": 1, "pad_token_id": 362, "bos_token_id": 360, "eos_token_id": 361},
        tokenizers.llama_3_padded,
    ),
)

SPECIMENS = (*DECODERS, *ENCODERS, *RERANKERS)


def find(name: str) -> Specimen:
    """The specimen of that name."""
    (specimen,) = (specimen for specimen in SPECIMENS if specimen.name == name)
    return specimen


def folder_of(root: Path, specimen: Specimen) -> Path:
    """Where a family lies."""
    return root / specimen.name
