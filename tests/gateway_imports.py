"""What a gateway imports in the course of its start, imported once for all the processes that are forked from here.

With torch, which a gateway of decoders leaves to a process of its own: where it is there, none is started.
"""

from __future__ import annotations

import aiosqlite
import asyncpg
import torch._dynamo
import uvicorn.loops.uvloop
import uvicorn.protocols.http.httptools_impl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = ["AutoTokenizer", "PreTrainedTokenizerFast", "aiosqlite", "asyncpg", "torch", "uvicorn"]
