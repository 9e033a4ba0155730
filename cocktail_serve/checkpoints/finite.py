"""Which numbers are finite, told from their bits: as fast as memory is read, without torch."""

from __future__ import annotations

import struct

from cocktail_serve.dtypes import FLOATING, ITEM_BYTES

CHUNK_BYTES = 1 << 20
"""Bytes looked at at a time: they stay in a core's cache for whatever else is done with them."""

_MAGNITUDE = {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float32": 2**31 - 1, "float64": 2**63 - 1}
_INFINITE = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
"""The magnitude's bits of infinity: those of every finite number are less, those of a NaN more."""

_PACKED = {"float16": "<e", "float32": "<f", "float64": "<d"}

LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127, "float32": (2 - 2**-23) * 2.0**127}
"""The largest finite number of each dtype that is mixed to."""

OVERFLOWS_FROM = {
    "float16": 65520.0,
    "bfloat16": (2 - 2**-8) * 2.0**127,
    "float32": (2 - 2**-24) * 2.0**127,
}
"""Magnitudes that a dtype rounds to infinity, from this one on."""


def largest_and_not_finite(content: memoryview, dtype: str) -> tuple[float, int]:
    """Largest magnitude of the finite elements, and how many are infinite or NaN; 0 and 0 of what is not floating.

    Args:
        content: elements of one dtype in C order.
    """
    if dtype not in FLOATING or not content:
        return 0.0, 0
    import numpy as np  # most mixtures need none of this

    size = ITEM_BYTES[dtype]
    magnitude, infinite = _MAGNITUDE[dtype], _INFINITE[dtype]
    largest, not_finite = 0, 0
    for begin in range(0, len(content), CHUNK_BYTES):
        chunk = content[begin : begin + CHUNK_BYTES]
        elements = np.frombuffer(chunk, f"<u{size}")
        # as signed integers the largest is the largest positive number, as unsigned ones the largest negative, if any
        positive, negative = int(np.frombuffer(chunk, f"<i{size}").max()), int(elements.max())
        top = max(positive, negative & magnitude if negative > magnitude else 0)
        if top >= infinite:
            magnitudes = elements & magnitude
            is_finite = magnitudes < infinite
            not_finite += len(elements) - int(is_finite.sum())
            top = int(magnitudes.max(where=is_finite, initial=0))
        largest = max(largest, top)
    return _value_of(largest, dtype), not_finite


def _value_of(bits: int, dtype: str) -> float:
    if dtype == "bfloat16":
        bits, dtype = bits << 16, "float32"
    (value,) = struct.unpack(_PACKED[dtype], bits.to_bytes(ITEM_BYTES[dtype], "little"))
    return float(value)
