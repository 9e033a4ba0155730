"""`/v1/decisions`: questions about an input, answered with the probabilities of their options."""

from __future__ import annotations

import json

from fastapi import APIRouter, Response

from cocktail_serve.decisions import DEFAULT_READING, pose
from cocktail_serve.engines.base import DECISIONS_PATH
from cocktail_serve.gateway.admission import admit
from cocktail_serve.gateway.decision_answers import encode_decision
from cocktail_serve.gateway.decision_fields import check_questions, check_turns, parse_decisions
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.openapi import engine_errors, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.schemas.decisions import Decision, DecisionRequest

# FastAPI documents this endpoint only: `DirectRouting` calls it, and it sends its answer itself
router = APIRouter(tags=["decisions"], route_class=DirectRoute)


@router.post(
    DECISIONS_PATH,
    response_model=Decision,
    responses=engine_errors(),
    openapi_extra=json_request(DecisionRequest),
)
async def create_decision(request: DirectRequest) -> None:
    """Predicates, choices and scores about one input, each with probabilities; all questions in one batch."""
    async with admit(request) as admitted:
        wanted = parse_decisions(admitted.body)
        target = await find_target(admitted, admitted.gateway.decoders)
        turns = check_turns(wanted.input)
        questions = check_questions(wanted.questions, turns, reading=wanted.reading)
        served = await served_model(admitted, target)
        reading, separator = wanted.reading or DEFAULT_READING, target.config.example_separator
        posed = [pose(turns, each, reading=reading, form=served.form, separator=separator) for each in questions]
        async with ended_with_client(request.receive):
            decided = await target.engine.decide(
                served.recipe,
                posed,
                tenant=admitted.caller.tenant,
                generation=served.generation,
                cache_salt=_salt(wanted),
                background=admitted.background,
            )
        admitted.metered.used(served, num_in=decided.num_tokens)
        admitted.observe_first_token(served)
        answer = encode_decision(decided, wanted.questions, model_id=served.model_id)
        await request.answer(Response(answer, media_type="application/json"))


def _salt(wanted: DecisionRequest) -> str | None:
    if wanted.prompt_cache_key is None:
        return wanted.cache_salt
    return json.dumps([wanted.cache_salt, wanted.prompt_cache_key])
