"""Loads a model folder and saves it anew, with whatever transformers and sentence-transformers there are.

Imported by the tests, and run as a script by another environment: one JSON object `{kind, source, target}` per line
of the input, one line of the output when it is done.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path


def resave(kind: str, source: Path, target: Path) -> None:
    """A decoder by transformers, an encoder or a reranker by sentence-transformers: as their users do."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if kind == "decoder":
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(source)
        model_class = AutoModelForCausalLM
        if config.architectures[0].endswith("ForConditionalGeneration"):
            from transformers import AutoModelForImageTextToText as model_class  # noqa: N813
        model = model_class.from_pretrained(source)
        # some publishers' settings are refused unless sampling is on; saving an expert says nothing of how it samples
        model.generation_config.do_sample = True
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    elif kind == "encoder":
        from sentence_transformers import SentenceTransformer

        SentenceTransformer(str(source), device="cpu").save(str(target), create_model_card=False)
    else:
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(source), device="cpu")
        if hasattr(model, "_create_model_card"):
            model._create_model_card = lambda *_args, **_more: None  # which wants to know the Git revision
        model.save_pretrained(str(target))


def main() -> None:
    """Answers each line of the input until it ends."""
    answers = sys.stdout
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, str] = {}
        with contextlib.redirect_stdout(sys.stderr):
            try:
                resave(job["kind"], Path(job["source"]), Path(job["target"]))
            except (OSError, ValueError, RuntimeError, LookupError, ImportError, AttributeError, TypeError):
                answer["error"] = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
