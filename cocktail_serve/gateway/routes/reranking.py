"""`/v1/rerank`, as vLLM's, and the other paths that clients of rerankers know."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cocktail_serve.gateway.admission import admit
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.openapi import engine_errors, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.rerank_fields import check_documents, encode_ranking
from cocktail_serve.gateway.schemas.reranking import RerankAnswer, RerankRequest
from cocktail_serve.gateway.synonyms import given
from cocktail_serve.gateway.truncation import truncation
from cocktail_serve.request_schema import parse_as

# FastAPI documents these endpoints only: `DirectRouting` calls them, and they send their answers themselves
router = APIRouter(tags=["reranking"], route_class=DirectRoute)


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post(
    "/v1/rerank",
    response_model=RerankAnswer,
    responses=engine_errors(),
    openapi_extra=json_request(RerankRequest),
)
async def rerank(request: DirectRequest) -> None:
    """Documents in the order of their relevance to a query, as vLLM's; `/rerank` and `/v2/rerank` are the same."""
    async with admit(request) as admitted:
        wanted = parse_as(RerankRequest, admitted.body)
        target = await find_target(admitted, admitted.gateway.rerankers)
        engine = target.engine
        _, top_n = given(wanted, "top_n", "top_k")
        documents = check_documents(wanted.documents, rank_fields=wanted.rank_fields)
        truncate_to = truncation(
            wanted.truncate_prompt_tokens,
            max_length=engine.max_length,
            whether=wanted.truncation,
            truncate=target.config.truncate,
        )
        served = await served_model(admitted, target)
        async with ended_with_client(request.receive):
            reranked = await engine.rerank(
                served.recipe,
                wanted.query,
                [document.text for document in documents],
                truncate_to=truncate_to,
                max_query_tokens=wanted.max_tokens_per_query or None,
                max_document_tokens=wanted.max_tokens_per_doc or None,
                use_activation=wanted.use_activation is not False,
                tenant=admitted.caller.tenant,
            )
        admitted.metered.used(served, num_in=reranked.num_tokens)
        admitted.observe_first_token(served)
        answer = encode_ranking(
            reranked,
            documents,
            model_id=served.model_id,
            top_n=top_n or 0,
            return_documents=wanted.return_documents is not False,
            as_voyage="top_k" in wanted.model_fields_set,
        )
        await request.answer(Response(answer, media_type="application/json"))
