"""What each weighting makes of the demo's pools, scored on what was held out from the examples.

    python -m bench.weighting

Weighs offline, writes each mixture into a temporary folder, loads it with transformers or sentence-transformers, and
prints JSON: for the decoder the share of held-out questions answered exactly (greedily) and their mean loss, for the
encoder the share of held-out queries whose document comes first and the mean reciprocal rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import describe_machine
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.cli.demo.pools import DECODER_POOL, ENCODER_POOL, DemoPools, prepare
from cocktail_serve.cocktails.weighting_steps import recipe_of
from cocktail_serve.config import load_settings
from cocktail_serve.examples import parse_examples
from cocktail_serve.offline.weighing import weigh_offline
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"weighting": "uniform"},
    "paper": {"weighting": "paper"},
    "softmax, tau 0.2": {"weighting": "softmax", "temperature": 0.2},
    "search": {"weighting": "search"},
    "gradient": {"weighting": "gradient"},
    "blackbox": {"weighting": "blackbox"},
}

MAX_NEW_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "cocktail-serve" / "demo")
    folder = parser.parse_args().folder
    pools = prepare(folder)
    result = {
        "machine": describe_machine(),
        "decoder": {name: measure(pools, DECODER_POOL, body) for name, body in WEIGHTINGS.items()},
        "encoder": {name: measure(pools, ENCODER_POOL, body) for name, body in WEIGHTINGS.items()},
    }
    print(json.dumps(result, indent=2))


def measure(pools: DemoPools, pool_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """Weights, losses, seconds of the weighing, and the held-out scores of one weighting."""
    settings = load_settings(pools.config)
    rows = pools.decoder_examples if pool_id == DECODER_POOL else pools.encoder_examples
    started_at = time.monotonic()
    weighed = weigh_offline(settings, pool_id, {"examples": rows, **body}, lambda *_, **__: None)
    seconds = time.monotonic() - started_at
    weighing = weighed.weighing
    recipe = recipe_of(weighed.request.options, weighed.pool, weighing.merging_weights, dtype=weighed.dtype)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "mixture"
        save_mixture(recipe, weighed.pool, out)
        held_out = answers(out, pools) if pool_id == DECODER_POOL else ranks(out, pools)
    return {
        "temperature": None if weighing.chosen is None else weighing.chosen.temperature,
        "merging_weights": weighing.merging_weights,
        "candidates": len(weighing.candidates),
        "mixed_loss": weighed.mixed_loss,
        "seconds": round(seconds, 1),
        **held_out,
    }


def answers(folder: Path, pools: DemoPools) -> dict[str, float]:
    """Exact answers and mean loss over the held-out questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    conversations = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pools.questions
    ]
    examples = parse_examples(conversations, "decoder", max_examples=len(conversations))
    num_right = 0
    with torch.inference_mode():
        for question, answer in pools.questions:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            said = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            text = tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            num_right += text.strip() == answer
    losses = score_with_transformers(model, tokenize_examples(tokenizer, examples, max_tokens=255))
    return {"exact": num_right / len(conversations), "held_out_loss": float(np.mean(losses))}


def ranks(folder: Path, pools: DemoPools) -> dict[str, float]:
    """First places and mean reciprocal rank over the held-out queries."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    queries, right = zip(*pools.search.queries, strict=True)
    scores = model.encode(list(queries)) @ model.encode(pools.search.documents).T
    places = [1 + int((row > row[document]).sum()) for row, document in zip(scores, right, strict=True)]
    return {
        "first": float(np.mean([place == 1 for place in places])),
        "mrr": float(np.mean([1 / place for place in places])),
    }


if __name__ == "__main__":
    main()
