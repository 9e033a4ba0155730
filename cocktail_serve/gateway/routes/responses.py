"""`/v1/responses`: the engine's, under the field policy, and stateless: nothing is kept of a response."""

from __future__ import annotations

from typing import Any, NoReturn

from fastapi import APIRouter

from cocktail_serve.engines.base import RESPONSES_PATH, TOKENIZE_PATH
from cocktail_serve.errors import NotServedError
from cocktail_serve.gateway.admission import admit
from cocktail_serve.gateway.dependencies import TenantDep
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.forwarding import forward_generation
from cocktail_serve.gateway.openapi import engine_errors, error_responses, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.response_fields import apply_response_policy
from cocktail_serve.gateway.schemas.responses import ResponseRequest, ResponseView

# FastAPI documents this endpoint only: `DirectRouting` calls it, and it sends its answers itself
router = APIRouter(tags=["generation"], route_class=DirectRoute)

stored = APIRouter(tags=["generation"])
"""What needs responses that were kept: says so."""

_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


@router.post(
    RESPONSES_PATH,
    response_model=ResponseView,
    responses={**engine_errors(501), 200: _EVENTS},
    openapi_extra=json_request(ResponseRequest),
)
async def create_response(request: DirectRequest) -> None:
    """A response, as OpenAI's and vLLM's, whole or as a stream of typed events; nothing is kept of it."""
    async with admit(request) as admitted:
        target = await find_target(admitted, admitted.gateway.decoders)
        outgoing = apply_response_policy(admitted.body, allow_chat_template=target.config.allow_chat_template)
        served = await served_model(admitted, target)
        await forward_generation(admitted, target.engine, served, RESPONSES_PATH, outgoing)


@stored.post("/v1/responses/input_tokens", responses=error_responses(501))
async def count_input_tokens(tenant: TenantDep) -> None:
    """Not served: 501. `POST /tokenize` tells how many tokens a chat has."""
    raise NotServedError(f"input tokens are not counted here: POST {TOKENIZE_PATH} with the `messages` tells them")


@stored.post("/v1/responses/compact", responses=error_responses(501))
async def compact_response(tenant: TenantDep) -> None:
    """Not served: 501. Leave out of `input` what is too long."""
    raise NotServedError("conversations are not compacted here: leave out of `input` what is too long")


@stored.get("/v1/responses/{response_id}", responses=error_responses(404, 501))
async def retrieve_response(tenant: TenantDep, response_id: str) -> None:
    """Not served: 501. Nothing is kept of a response."""
    _refuse_stored()


@stored.delete("/v1/responses/{response_id}", responses=error_responses(404, 501))
async def delete_response(tenant: TenantDep, response_id: str) -> None:
    """Not served: 501. There is nothing to delete."""
    _refuse_stored()


@stored.get("/v1/responses/{response_id}/input_items", responses=error_responses(404, 501))
async def list_input_items(tenant: TenantDep, response_id: str) -> None:
    """Not served: 501. Nothing is kept of a response."""
    _refuse_stored()


@stored.post("/v1/responses/{response_id}/cancel", responses=error_responses(404, 501))
async def cancel_response(tenant: TenantDep, response_id: str) -> None:
    """Not served: 501. A response ends when its client closes the connection."""
    raise NotServedError("no response runs in the background here; close the connection to end one")


def _refuse_stored() -> NoReturn:
    raise NotServedError(
        "nothing is kept of a response here: keep what POST /v1/responses answers, and send it in `input` to go on"
    )
