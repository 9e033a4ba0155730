"""Checkpoints of pico pools."""

from __future__ import annotations

from tests.pico_pools import cls_encoders, copy, decoders, edit_json, encoders, opened, tied_decoders

__all__ = ["cls_encoders", "copy", "decoders", "edit_json", "encoders", "opened", "tied_decoders"]
