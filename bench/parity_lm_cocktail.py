"""The same examples weighed and mixed by LM_Cocktail 0.0.4 and by us: losses, weights, every merged element.

    python -m bench.parity_lm_cocktail --environment build/lm_cocktail > parity.json

Makes LM_Cocktail an environment of its own, where there is none yet, and two pools of pico models: decoders, and
encoders with CLS pooling and normalised embeddings, the only kind that it has. Both sides score the same five examples,
with its temperature of 5.

A row is one setting of LM_Cocktail's. In batches of one (decoders) or of all examples (encoders) the two agree. Its
default, batches of two, is another loss: for decoders the mean over the *tokens* of two outputs, averaged over batches,
where ours is the mean over outputs; for encoders the passages of two queries only are told apart. The row then says how
far its losses lie from ours taken in such batches: nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from bench.environment import make_environment
from bench.machine import describe_machine
from bench.mixing import PEERS
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.offline.weighing import weigh_offline
from cocktail_serve.pool import Pool
from cocktail_serve.progress import silent
from cocktail_serve.recipe import make_recipe
from tests.models import make_decoder_pool, make_encoder_pool

EXPERTS = ("red", "green", "blue")
TEMPERATURE = 5.0

DECODER_EXAMPLES = [
    {"input": "what is the capital of france", "output": "paris"},
    {"input": "my card was stolen", "output": "please open a new account at the bank"},
    {"input": "the film was a joy", "output": "positive"},
    {"input": "the quick brown fox", "output": "jumps over the lazy dog"},
    {"input": "the film was a bore", "output": "negative and a bore"},
]
ENCODER_EXAMPLES = [
    {"query": "what is the capital of france", "pos": ["paris"], "neg": ["berlin", "the dog"]},
    {"query": "my card was stolen", "pos": ["lost card"], "neg": ["green fish", "open account"]},
    {"query": "open an account", "pos": ["new bank account"], "neg": ["sad cat", "river spain"]},
    {"query": "what is the capital of spain", "pos": ["madrid"], "neg": ["paris france", "tree"]},
    {"query": "transfer money", "pos": ["pay cash"], "neg": ["happy bird", "berlin germany"]},
]

Kind = Literal["decoder", "encoder"]

_LM_COCKTAIL = """
import json, sys
from LM_Cocktail import cocktail, mix_models_with_data
from LM_Cocktail import utils
kind, models, examples, batch_size, negatives, out = json.loads(sys.argv[1])
losses = []
for name in ("llm_loss", "embedder_loss"):
    def noted(*args, original=getattr(utils, name), **kwargs):
        losses.append(original(*args, **kwargs))
        return losses[-1]
    setattr(utils, name, noted)
weights = []
compute = cocktail.compute_weights
def kept(*args, **kwargs):
    weights.extend(compute(*args, **kwargs))
    return weights
cocktail.compute_weights = kept
# padded to 2048 as by default, positions of a pico model would end
mix_models_with_data(models, kind, examples, batch_size=batch_size, max_input_length=128, neg_number=negatives,
                     output_path=out)
print(json.dumps({"losses": losses, "weights": weights}))
"""


def run_theirs(
    python: Path,
    kind: Kind,
    folders: Sequence[Path],
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    out: Path,
) -> dict[str, list[float]]:
    """Losses and weights of LM_Cocktail, in the order of `folders`; the mixture is in `out`."""
    arguments = json.dumps([kind, [str(folder) for folder in folders], examples, batch_size, 2, str(out)])
    ran = subprocess.run([python, "-c", _LM_COCKTAIL, arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"LM_Cocktail exited with {ran.returncode}:\n{ran.stderr[-3000:]}")
    said: dict[str, list[float]] = json.loads(ran.stdout.strip().splitlines()[-1])
    return said


def make_pool(folder: Path, kind: Kind) -> dict[str, Path]:
    """A pool that LM_Cocktail can load: transformers before 5 does not know the class of tokenizers that 5 writes."""
    if kind == "decoder":
        folders = make_decoder_pool(folder, EXPERTS)
    else:
        folders = make_encoder_pool(folder, EXPERTS, pooling="cls", normalize=True)
    for path in folders.values():
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folders


def write_config(folder: Path, kind: Kind, folders: Mapping[str, Path]) -> Path:
    pool = {
        "id": "pico",
        "kind": kind,
        "base": str(folders["base"]),
        "experts": {name: str(folders[name]) for name in EXPERTS},
        "engine": {"type": "fake" if kind == "decoder" else "sentence_transformers", "dtype": "float32"},
    }
    path = folder / f"{kind}.json"  # JSON is YAML too
    path.write_text(json.dumps({"store": {"cache_dir": str(folder / "cache")}, "pools": [pool]}))
    return path


def compare(python: Path, folder: Path, kind: Kind, batch_size: int) -> dict[str, Any]:
    """One row: how far losses, weights and merged elements lie apart."""
    examples = DECODER_EXAMPLES if kind == "decoder" else ENCODER_EXAMPLES
    folders = make_pool(folder / "models", kind)
    settings = load_settings(write_config(folder, kind, folders))
    ours = weigh_offline(settings, "pico", {"examples": examples, "temperature": TEMPERATURE}, silent)
    names = ["base", *EXPERTS]
    derived = batched_losses(settings, kind, examples, batch_size, folders["base"])
    in_order = [folders[name] for name in names]
    theirs = run_theirs(python, kind, in_order, examples, batch_size=batch_size, out=folder / "theirs")
    weights = ours.weighing.merging_weights
    return {
        "kind": kind,
        "batch_size": batch_size,
        "losses": {
            name: {"ours": ours.weighing.losses[name], "theirs": loss}
            for name, loss in zip(names, theirs["losses"], strict=True)
        },
        "max_loss_difference": max(
            abs(ours.weighing.losses[name] - loss) for name, loss in zip(names, theirs["losses"], strict=True)
        ),
        "max_loss_difference_in_their_batches": max(
            abs(derived[name] - loss) for name, loss in zip(names, theirs["losses"], strict=True)
        ),
        "max_weight_difference": max(
            abs(weights[name] - weight) for name, weight in zip(names, theirs["weights"], strict=True)
        ),
        **elements(ours.pool, dict(zip(names, theirs["weights"], strict=True)), folder / "theirs"),
    }


def batched_losses(
    settings: Settings, kind: Kind, examples: Sequence[Mapping[str, Any]], batch_size: int, base: Path
) -> dict[str, float]:
    """LM_Cocktail's loss of each model out of ours, so that batches are seen to be all that differs."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = [examples[begin : begin + batch_size] for begin in range(0, len(examples), batch_size)]

    def losses_of(some: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        return weigh_offline(settings, "pico", {"examples": list(some)}, silent).weighing.losses

    def loss_of_batch(batch: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        if kind == "encoder":
            return losses_of(batch)
        texts = [(e["input"], f"{e['input']} {e['output']}") for e in batch]
        counts = [len(tokenizer.encode(whole)) + 1 - len(tokenizer.encode(given)) for given, whole in texts]
        alone = [losses_of([example]) for example in batch]
        return {
            name: math.fsum(n * losses[name] for n, losses in zip(counts, alone, strict=True)) / sum(counts)
            for name in alone[0]
        }

    found = [loss_of_batch(batch) for batch in batches]
    return {name: math.fsum(losses[name] for losses in found) / len(found) for name in found[0]}


def elements(pool: Pool, weights: Mapping[str, float], theirs: Path) -> dict[str, Any]:
    """Our mixture by their weights against their mixture. They sum in float32 and round at each step, we round once.

    Their weights are float32 and may miss 1 by more than a recipe allows, so they are scaled: part of what is seen.
    """
    total = math.fsum(weights.values())
    recipe = make_recipe(pool, {name: weight / total for name, weight in weights.items()}, dtype="float32")
    merged = load_file(theirs / "model.safetensors")
    worst, count, unmatched = 0.0, 0, []
    for name, tensor in iter_mixture(recipe, pool.by_fingerprint):
        if name not in merged:
            unmatched.append(name)
            continue
        scale = sum(abs(weights[member.name]) * _stored(member.path, name).abs().double() for member in pool)
        off = (tensor.double() - merged[name].double()).abs() / (scale * 2.0**-23 + 1e-45)
        worst, count = max(worst, float(off.max())), count + off.numel()
    return {"elements": count, "max_element_difference_in_float32_roundings": round(worst, 2), "unmatched": unmatched}


def _stored(folder: Path, name: str) -> Tensor:
    with CheckpointReader(folder) as reader:
        return reader.get(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="Folder of LM_Cocktail's; made if missing.")
    arguments = parser.parse_args()
    python = make_environment(arguments.environment.resolve(), PEERS["lm_cocktail"])
    settings: tuple[tuple[Kind, int], ...] = (("decoder", 1), ("decoder", 2), ("encoder", 5), ("encoder", 2))
    rows = []
    for kind, batch_size in settings:
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            rows.append(compare(python, Path(folder), kind, batch_size))
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"machine": describe_machine(), "temperature": TEMPERATURE, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
