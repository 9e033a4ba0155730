"""`/v1/chat/completions` and `/v1/completions`: the engine's, under the field policy."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from cocktail_serve.engines.base import CHAT_PATH, COMPLETIONS_PATH
from cocktail_serve.gateway.admission import admit
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.field_policy import apply_field_policy
from cocktail_serve.gateway.forwarding import forward_generation
from cocktail_serve.gateway.openapi import engine_errors, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.schemas.generation import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
)

# FastAPI documents these endpoints only: `DirectRouting` calls them, and they send their answers themselves
router = APIRouter(tags=["generation"], route_class=DirectRoute)

# as OpenAPI 3.2 describes streams: `data` is a chunk as JSON, and `[DONE]` at the end
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


@router.post(
    CHAT_PATH,
    response_model=ChatCompletion,
    responses={**engine_errors(), 200: _EVENTS},
    openapi_extra=json_request(ChatCompletionRequest),
)
async def create_chat_completion(request: DirectRequest) -> None:
    """A chat completion, as OpenAI's and vLLM's, whole or as a stream."""
    await _generate(request, CHAT_PATH)


@router.post(
    COMPLETIONS_PATH,
    response_model=Completion,
    responses={**engine_errors(), 200: _EVENTS},
    openapi_extra=json_request(CompletionRequest),
)
async def create_completion(request: DirectRequest) -> None:
    """A text completion, as OpenAI's and vLLM's, whole or as a stream."""
    await _generate(request, COMPLETIONS_PATH)


async def _generate(request: DirectRequest, path: str) -> None:
    async with admit(request) as admitted:
        target = await find_target(admitted, admitted.gateway.decoders)
        outgoing = apply_field_policy(admitted.body, allow_chat_template=target.config.allow_chat_template)
        served = await served_model(admitted, target)
        await forward_generation(admitted, target.engine, served, path, outgoing)
