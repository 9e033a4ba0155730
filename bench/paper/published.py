"""What LM-Cocktail published, printed beside ours.

Quoted from the results section of the reference code's README, `FlagOpen/FlagEmbedding:research/LM_Cocktail/README.md`
(commit 7ed43d67), which gives these means of the paper's tables and no figure for a single task. What it does not give
(Llama with in-context examples on FLAN, multitask models, blackbox, figures by task, by alpha or by number of examples)
is not quoted here: see the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "FlagOpen/FlagEmbedding, research/LM_Cocktail/README.md"

TABLE1: Mapping[str, tuple[float, float]] = {
    "base": (40.8, 46.8),
    "fine-tuned": (94.4, 38.6),
    "LM-Cocktail 2": (94.5, 47.7),
    "LM-Cocktail 10, tau 5": (94.4, 48.3),
}
"""Target task, and mean of 29 other tasks, of Llama-2-chat-7b."""

TABLE2: Mapping[str, tuple[float, float]] = {
    "base": (71.8, 49.8),
    "fine-tuned": (76.0, 48.5),
    "LM-Cocktail 2": (74.8, 50.0),
    "LM-Cocktail 10, tau 5": (74.7, 50.6),
}
"""Target task, and mean of 14 other tasks, of bge-base-en-v1.5."""

TABLE3: Mapping[str, float] = {"base": 45.9, "in-context examples": 46.7, "LM-Cocktail, tau 5": 48.0}
"""Mean of MMLU's 57 tasks."""

TABLE4: Mapping[str, float] = {"base": 47.3, "LM-Cocktail, tau 5": 48.8}
"""Mean of 12 retrieval tasks."""
