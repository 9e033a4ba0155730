"""Dtypes by torch's names for them: importing torch takes longer than mixing a model."""

from __future__ import annotations

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Size of an element."""

FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})
"""What is mixed; the others are taken from the base."""
