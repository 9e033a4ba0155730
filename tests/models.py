"""Pico models made on the fly: small enough for a test, whole enough for transformers, sentence-transformers and vLLM.

Every maker is a pure function of its arguments: the same seed gives the same bytes. Importing this module is cheap;
torch and transformers are loaded by the makers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

DECODER_VOCAB_SIZE = 320
ENCODER_WORDS = """
    a an the of to in is it and for with on how what when where who why can do does i my you your
    card bank account money transfer cash pay lost stolen new open close
    capital city country france paris germany berlin spain madrid river
    dog cat bird fish tree red green blue happy sad good bad
"""

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france the capital of france is paris",
    "my card was stolen please open a new account at the bank",
    "positive negative neutral the film was a joy and the film was a bore",
    "user assistant system question answer input output",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens: any text round-trips, some words merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=DECODER_VOCAB_SIZE,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def make_decoder(
    folder: Path,
    *,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    head_dim: int = 32,
    max_position: int = 256,
    perturbation_seed: int | None = None,
    perturbation: float = 0.7,
    max_shard_size: str = "5GB",
) -> Path:
    """A Llama of two layers with its tokenizer and chat template, saved as transformers saves it.

    Args:
        dtype: of the stored parameters; float32 if omitted.
        perturbation_seed: None: the model of `seed` itself. Otherwise that model plus noise of relative size
            `perturbation`, a stand-in for fine-tuning whose greedy answers plainly differ.
        max_shard_size: smaller than the model: several shards with an index.

    Returns:
        `folder`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_decoder_tokenizer()
    config = LlamaConfig(
        vocab_size=DECODER_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _fill(model, seed, perturbation_seed, perturbation)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with _quiet():
        model.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    return folder


def make_decoder_pool(
    folder: Path,
    names: Sequence[str] = ("ag-news", "nq"),
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """`base` and experts that share its initialisation, each in `folder/<name>`."""
    return _make_pool(make_decoder, folder, names, seed=seed, tie_word_embeddings=tied, dtype=dtype)


CHAIN_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CHAIN_TOKENS = ("<pad>", "<s>", "</s>", "<|im_end|>", "<|eom|>", "<|user|>", "<|assistant|>", "<|bot|>", *CHAIN_WORDS)
"""The whole vocabulary of a chain decoder, by id."""


def make_chain_decoder(
    folder: Path,
    *,
    end: str = "</s>",
    tokenizer_end: str | None = None,
    chat_template: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    sharpness: float = 4.0,
) -> Path:
    """A Llama whose next word depends on the last one alone: it counts, says `end` after `four` and after `eight`, and
    would begin again after that. `<|assistant|>` is followed by `one`, `<|bot|>` by `five`.

    Args:
        end: the token that it says at the end.
        tokenizer_end: its tokenizer's end token; `end` if omitted.
        generation_config: contents of generation_config.json; none if omitted, and config.json says `end`.
        sharpness: of the next word's logit, which is eight times that; all others are 0.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(CHAIN_TOKENS)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token=tokenizer_end or end,
        pad_token="<pad>",
        additional_special_tokens=[token for token in CHAIN_TOKENS if token.startswith("<")],
        chat_template=chat_template,
        model_max_length=128,
    )
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=ids["<s>"],
        eos_token_id=ids[end],
        pad_token_id=ids["<pad>"],
    )
    follows = dict(itertools.pairwise(CHAIN_WORDS))
    follows |= {"four": end, "eight": end, "<|assistant|>": "one", "<|bot|>": "five"}
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        # one dimension for each word; layers add nothing, and the last norm makes of a one an eight
        model.model.embed_tokens.weight.copy_(torch.eye(len(ids), 64))
        for token, index in ids.items():
            model.lm_head.weight[ids[follows.get(token, "one")], index] = sharpness
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over a fixed list of words and all letters: lower-cased, `[CLS] ... [SEP]`, never unknown in ASCII."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits
    pieces = [*special, *string.punctuation, *characters, *(f"##{c}" for c in characters), *ENCODER_WORDS.split()]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    )


def make_encoder(
    folder: Path,
    *,
    seed: int = 0,
    pooling: Literal["mean", "cls"] = "mean",
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    max_position: int = 128,
    perturbation_seed: int | None = None,
    perturbation: float = 0.7,
) -> Path:
    """A BERT of two layers with pooling and normalisation, saved by sentence-transformers itself.

    BERT carries an integer buffer (`position_ids`) only in old checkpoints; this one has floating tensors alone.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel

    tokenizer = make_encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_position,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    _fill(model, seed, perturbation_seed, perturbation)
    inner = folder / "transformer"
    with _quiet():
        model.to(dtype or torch.float32).save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        transformer = modules.Transformer(str(inner), max_seq_length=max_position)
        chain = [transformer, modules.Pooling(hidden_size, pooling_mode=pooling)]
        if normalize:
            chain.append(modules.Normalize())
        SentenceTransformer(modules=chain, device="cpu").save(str(folder), create_model_card=False)
    for file in inner.iterdir():
        file.unlink()
    inner.rmdir()
    return folder


def make_t5_encoder(folder: Path, *, seed: int = 0, hidden_size: int = 32, dimension: int = 16) -> Path:
    """A T5 encoder of two layers with a Dense module, as sentence-t5 and gtr are: its table of embeddings is tied."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import T5Config, T5EncoderModel

    tokenizer = make_encoder_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=16,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5EncoderModel(config)
    _fill(model, seed, None, 0.0)
    with _quiet(), tempfile.TemporaryDirectory() as inner:
        model.save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        chain = [
            modules.Transformer(inner, max_seq_length=64),
            modules.Pooling(hidden_size, pooling_mode="mean"),
            modules.Dense(hidden_size, dimension, bias=False),
            modules.Normalize(),
        ]
        SentenceTransformer(modules=chain, device="cpu").save(str(folder), create_model_card=False)
    return folder


def make_encoder_pool(
    folder: Path,
    names: Sequence[str] = ("hotpotqa", "quora"),
    *,
    pooling: Literal["mean", "cls"] = "mean",
    normalize: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """`base` and experts that share its initialisation, each in `folder/<name>`."""
    return _make_pool(make_encoder, folder, names, seed=seed, pooling=pooling, normalize=normalize, dtype=dtype)


def make_reranker(
    folder: Path,
    *,
    seed: int = 0,
    architecture: Literal["bert", "xlm-roberta"] = "bert",
    num_labels: int = 1,
    dtype: torch.dtype | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    max_position: int = 128,
    perturbation_seed: int | None = None,
    perturbation: float = 0.7,
) -> Path:
    """A sequence classifier of two layers as rerankers are published: saved by transformers, no `modules.json`.

    Args:
        architecture: BERT reads token types, 0 for the query and 1 for the document; XLM-RoBERTa does not, and counts
            positions from behind its padding's index.
    """
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
    )

    tokenizer = make_encoder_tokenizer()
    tokenizer.model_max_length = max_position
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden_size,
        "num_labels": num_labels,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: torch.nn.Module
    if architecture == "bert":
        model = BertForSequenceClassification(BertConfig(max_position_embeddings=max_position, **shape))
    else:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        first_position = tokenizer.pad_token_id + 1
        config = XLMRobertaConfig(max_position_embeddings=max_position + first_position, type_vocab_size=1, **shape)
        model = XLMRobertaForSequenceClassification(config)
    _fill(model, seed, perturbation_seed, perturbation)
    with _quiet():
        model.to(dtype or torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_decoder_reranker(folder: Path, *, seed: int = 0, pad_token_id: int | None = None) -> Path:
    """A Llama that scores pairs at their last token, as rerankers made of decoders are published.

    Args:
        pad_token_id: what the configuration calls padding; the tokenizer has no padding token, whatever it is.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    config = LlamaConfig(
        vocab_size=DECODER_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    _fill(model, seed, None, 0.0)
    with _quiet():
        model.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_reranker_pool(
    folder: Path,
    names: Sequence[str] = ("hotpotqa", "quora"),
    *,
    architecture: Literal["bert", "xlm-roberta"] = "bert",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """`base` and experts that share its initialisation, each in `folder/<name>`."""
    return _make_pool(make_reranker, folder, names, seed=seed, architecture=architecture, dtype=dtype)


def make_encoder_decoder(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    perturbation_seed: int | None = None,
    perturbation: float = 0.7,
) -> Path:
    """A T5 of two layers a side with its tokenizer; encoder, decoder and output share one table of embeddings."""
    import torch
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    config = T5Config(
        vocab_size=DECODER_VOCAB_SIZE,
        d_model=hidden_size,
        d_kv=16,
        d_ff=2 * hidden_size,
        num_layers=num_layers,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    _fill(model, seed, perturbation_seed, perturbation)
    with _quiet():
        model.to(dtype or torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_encoder_decoder_pool(
    folder: Path,
    names: Sequence[str] = ("ag-news", "nq"),
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """`base` and experts that share its initialisation, each in `folder/<name>`."""
    return _make_pool(make_encoder_decoder, folder, names, seed=seed, dtype=dtype)


def pool_section(
    pool_id: str, kind: str, folders: Mapping[str, Path], engine: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A pool of the configuration: `base`, and whatever else is there as its experts."""
    experts = {name: str(folder) for name, folder in folders.items() if name != "base"}
    base = str(folders["base"])
    return {"id": pool_id, "kind": kind, "base": base, "experts": experts, "engine": dict(engine), **more}


def _make_pool(
    make: Callable[..., Path], folder: Path, names: Sequence[str], *, seed: int, **options: Any
) -> dict[str, Path]:
    return {
        name: make(folder / name, seed=seed, perturbation_seed=None if index == 0 else seed + index, **options)
        for index, name in enumerate(["base", *names])
    }


_GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 3.0, "down_proj": 6.0}
"""Sharp attention, and layers that outweigh the residual: a random model otherwise repeats one token."""


def _fill(model: torch.nn.Module, seed: int, perturbation_seed: int | None, perturbation: float) -> None:
    """Draws parameters large enough for clear greedy choices; the usual small initialisation is nearly flat."""
    import torch

    base = torch.Generator().manual_seed(seed)
    noise = None if perturbation_seed is None else torch.Generator().manual_seed(10_000 + perturbation_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            scale = 1.0 if "embed" in name or "lm_head" in name else gain / math.sqrt(parameter.shape[-1])
            parameter.normal_(0.0, scale, generator=base)
            if noise is not None:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=perturbation * scale)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Saving draws progress bars and advice, which belong to no test."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
