"""The model card of a mixed folder: what is in it, why, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import cocktail_serve
from cocktail_serve.cli.mergekit import MERGEKIT_FILE
from cocktail_serve.config import PoolConfig
from cocktail_serve.methods import METHODS
from cocktail_serve.pool import BASE, Kind, Pool
from cocktail_serve.recipe import Recipe

CARD_FILE = "README.md"

_LIBRARY: dict[Kind, str] = {
    "decoder": "transformers",
    "encoder": "sentence-transformers",
    "reranker": "sentence-transformers",
    "encoder_decoder": "transformers",
}
_PIPELINE: dict[Kind, str] = {
    "decoder": "text-generation",
    "encoder": "sentence-similarity",
    "reranker": "text-ranking",
    "encoder_decoder": "text2text-generation",
}
_LOADED_BY: dict[Kind, str] = {
    "decoder": (
        "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({folder!r})"
    ),
    "encoder": "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({folder!r})",
    "reranker": "from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder({folder!r})",
    "encoder_decoder": (
        "from transformers import AutoModelForSeq2SeqLM\n\nmodel = AutoModelForSeq2SeqLM.from_pretrained({folder!r})"
    ),
}


def sources_of(config: PoolConfig) -> dict[str, str]:
    """Where each model of a pool is, by name: a folder, or a hub id with `@revision` where one is given."""
    return {
        name: source.path if source.revision is None else f"{source.path}@{source.revision}"
        for name, source in {BASE: config.base, **config.experts}.items()
    }


def model_card(
    recipe: Recipe, pool: Pool, config: PoolConfig, weighing: Mapping[str, Any], *, out: Path, command: Sequence[str]
) -> str:
    """Markdown with the front matter that the model hub reads.

    Args:
        weighing: as `--json` shows it.
        out: the folder it goes into.
        command: what was typed, word by word.
    """
    taking_part = {fingerprint for fingerprint, _ in recipe.coefficients}
    sources = sources_of(config)
    on_hub = {member.name for member in pool if not Path(sources[member.name]).is_dir()}
    parents = [
        sources[member.name].partition("@")[0]
        for member in pool
        if member.name in on_hub and (member.name == BASE or member.fingerprint in taking_part)
    ]
    front_matter: dict[str, Any] = {
        **({"base_model": parents, "base_model_relation": "merge"} if parents else {}),
        "library_name": _LIBRARY[pool.kind],
        "pipeline_tag": _PIPELINE[pool.kind],
        "tags": ["merge", "lm-cocktail", "cocktail-serve"],
    }
    coefficients = dict(recipe.coefficients)
    rows = [
        (
            member.name,
            sources[member.name] if member.name in on_hub else "local folder",
            _number(weighing["losses"].get(member.name)),
            repr(coefficients.get(member.fingerprint, 0.0)),
            member.fingerprint[:12],
        )
        for member in pool
    ]
    method = METHODS[recipe.method]
    options = ", ".join(f"{name} {value}" for name, value in recipe.method_params.items())
    parts = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n",
        f"# {out.name}\n",
        f"A mixture of models of the pool `{pool.id}` ({pool.kind}), made without training by cocktail-serve "
        f"{cocktail_serve.__version__}: method {recipe.method} ({method.paper}){f', {options}' if options else ''}, "
        f"rounded once to {recipe.dtype}.\n",
        "## What is in it\n",
        _table(("model", "source", "loss (nats)", "coefficient", "fingerprint"), rows),
        "## Why\n",
        _reasons(weighing),
        "## How to use it\n",
        f"```python\n{_LOADED_BY[pool.kind].format(folder=str(out))}\n```\n",
        "## How to make it again\n",
        f"```bash\n{shlex.join(command)}\n```\n",
        f"`recipe.json` names every model by the digest of its parameters and holds the exact coefficients (recipe "
        f"`{recipe.digest}`); the same recipe gives the same bytes. `{MERGEKIT_FILE}` says the same to mergekit.\n",
    ]
    return "\n".join(parts)


def adapter_card(
    extracted: Mapping[str, Any], pool: Pool, config: PoolConfig, *, name: str, rank: int, command: Sequence[str]
) -> str:
    """Markdown beside an adapter that was extracted, with the front matter that the model hub reads.

    Args:
        extracted: the expert's part of `extraction.json`.
        name: the expert's.
        command: what was typed, word by word.
    """
    sources = sources_of(config)
    on_hub = {model for model, source in sources.items() if not Path(source).is_dir()}
    front_matter: dict[str, Any] = {
        **({"base_model": sources[BASE].partition("@")[0], "base_model_relation": "adapter"} if BASE in on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": _PIPELINE[pool.kind],
        "tags": ["lora", "cocktail-serve"],
    }
    rows = [
        (model, sources[model] if model in on_hub else "local folder", pool.members[model].fingerprint[:12])
        for model in (BASE, name)
    ]
    facts = [
        f"It lacks {extracted['relative_error']:.3f} of the expert's difference to the base (Frobenius norms, all "
        f"parameters); {extracted['lost_share']:.2%} of the squared difference is in parameters that LoRA cannot hold."
    ]
    if extracted["loss"] is not None:
        facts.append(
            f"Mean loss on the examples that were given: {extracted['loss']:.4f} nats of the expert, "
            f"{extracted['adapter_loss']:.4f} of the adapter."
        )
    layers = [
        (layer["name"], layer["kind"], str(layer["rank"]), f"{layer['relative_error']:.4f}")
        for layer in extracted["layers"]
    ]
    parts = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A LoRA adapter of rank {rank} or lower, cut out of the full expert `{name}` of the pool `{pool.id}` by "
        f"cocktail-serve {cocktail_serve.__version__}: the truncated singular value decomposition of its difference to "
        "the base, layer by layer.\n",
        _table(("model", "source", "fingerprint"), rows),
        f"{' '.join(facts)}\n",
        "## How to make it again\n",
        f"```bash\n{shlex.join(command)}\n```\n",
        "## Layers\n",
        _table(("parameter", "kind", "rank", "relative error"), layers),
    ]
    return "\n".join(parts)


def _reasons(weighing: Mapping[str, Any]) -> str:
    if not weighing["losses"]:
        if weighing["target"] is not None:
            return (
                f"No examples were given: the target `{weighing['target']}` is mixed with the base, alpha "
                f"{weighing['alpha']:g} (Eq. 3 of LM-Cocktail).\n"
            )
        return "The coefficients were given by hand, or as a recipe.\n"
    facts = [
        f"Each model's loss was measured on {weighing['num_examples']} examples of the task; the lower, the larger its "
        "coefficient.",
        f"Weighting `{weighing['weighting']}`",
    ]
    for option in ("temperature", "target", "alpha"):
        if weighing[option] is not None:
            facts[-1] += f", {option} {weighing[option]}"
    facts[-1] += "."
    if weighing["entropy"] is not None:
        facts.append(f"Entropy of the coefficients: {weighing['entropy']:.3f} nats.")
    if weighing.get("mixed_loss") is not None:
        facts.append(f"Loss of the mixture on the same examples: {weighing['mixed_loss']:.3f} nats.")
    findings = weighing.get("findings")
    if findings is not None and findings["text"] is not None:
        held_out = f", {findings['num_folds']} folds" if findings["num_folds"] else ""
        facts.append(f"Verdict by cross-validation on the examples{held_out}: **{findings['text']}**.")
    return " ".join(facts) + " The whole report is in `weighing.json`.\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
