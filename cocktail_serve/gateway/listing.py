"""Lists that are encoded a few entries at a time: long ones do not keep the event loop from other requests."""

from __future__ import annotations

from collections.abc import Iterable

import orjson
from fastapi import Response
from pydantic import BaseModel

from cocktail_serve.cocktails.pacing import paced


async def list_response(envelope: BaseModel, views: Iterable[BaseModel], *, every: int) -> Response:
    """The answer that holds `views` as the `data` of the envelope.

    Args:
        views: made while they are encoded.
        every: how many of them are made and encoded at a stretch.
    """
    data = [orjson.Fragment(view.model_dump_json()) async for view in paced(views, every=every)]
    return Response(orjson.dumps({**envelope.model_dump(), "data": data}), media_type="application/json")
