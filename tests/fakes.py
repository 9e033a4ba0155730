"""Pools for the fake engine: a tokenizer and names, no parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cocktail_serve.pool import Member, Pool
from tests.models import make_decoder_tokenizer


def make_fake_pool(folder: Path, names: Sequence[str] = ("ag-news", "nq"), *, pool_id: str = "flan") -> Pool:
    """A decoder pool whose members all lie in `folder`, which holds a tokenizer and no model."""
    make_decoder_tokenizer().save_pretrained(folder)
    members = {
        name: Member(
            name=name,
            path=folder,
            fingerprint=hashlib.sha256(name.encode()).hexdigest(),
            dtype="float32",
            num_bytes=0,
        )
        for name in ("base", *names)
    }
    base = members.pop("base")
    return Pool(id=pool_id, kind="decoder", base=base, experts=members, text_digest="fake")
