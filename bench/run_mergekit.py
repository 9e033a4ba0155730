"""Runs mergekit for `bench.parity`, in mergekit's own environment; imports nothing of this project.

Reads a JSON list of `{"config": {...}, "out": folder}` from standard input and merges one after the other.
"""

import json
import sys

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

for job in json.load(sys.stdin):
    run_merge(
        MergeConfiguration.model_validate(job["config"]),
        job["out"],
        options=MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
