"""Folds a LoRA adapter into its base: a full checkpoint, for tools that take no adapter.

python -m examples.train_experts.fold --kind encoder --base models/base --adapter models/lora --out models/expert
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path


def fold(kind: str, base: Path, adapter: Path, out: Path) -> None:
    """Writes the base with `W + scale * B A` in every adapted layer, summed in float32 and stored in the base's dtype.

    Whole or not at all; does nothing where `out` holds a model.
    """
    if (out / "config.json").is_file():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        folder = Path(partial) / out.name
        (_fold_decoder if kind == "decoder" else _fold_encoder)(base, adapter, folder)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)


def _fold_decoder(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from .decoder import LOCAL_ONLY, store_decoder

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **LOCAL_ONLY)
    store_decoder(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(), base, out)


def _fold_encoder(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel

    from .encoder import load, store_encoder

    model = load(base)
    # peft changes the transformer itself
    PeftModel.from_pretrained(model[0].auto_model, str(adapter)).merge_and_unload()
    store_encoder(model, base, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("decoder", "encoder"), required=True)
    for name in ("base", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    fold(options.kind, options.base, options.adapter, options.out)


if __name__ == "__main__":
    main()
