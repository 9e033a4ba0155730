"""Dtypes by torch's names for them: importing torch takes longer than mixing a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
"""What parameters are mixed to, and computed with."""

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

MIXED_AS: Mapping[str, DType] = {
    "float64": "float32",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}
"""What parameters of each floating dtype are mixed to where nothing else is said."""
