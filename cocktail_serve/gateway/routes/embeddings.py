"""`/v1/embeddings`, as OpenAI's."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Response

from cocktail_serve.gateway.admission import admit
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.embedding_fields import (
    MAX_INLINE_NUMBERS,
    check_inputs,
    dimensions_to_keep,
    encode_embeddings,
    prompt_of,
)
from cocktail_serve.gateway.openapi import engine_errors, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.schemas.embeddings import EmbeddingList, EmbeddingRequest
from cocktail_serve.gateway.synonyms import given
from cocktail_serve.gateway.truncation import truncation
from cocktail_serve.request_schema import parse_as

# FastAPI documents these endpoints only: `DirectRouting` calls them, and they send their answers themselves
router = APIRouter(tags=["embeddings"], route_class=DirectRoute)


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses=engine_errors(),
    openapi_extra=json_request(EmbeddingRequest),
)
async def create_embeddings(request: DirectRequest) -> None:
    """Embeddings of up to 2048 texts, as OpenAI's."""
    async with admit(request) as admitted:
        gateway = admitted.gateway
        wanted = parse_as(EmbeddingRequest, admitted.body)
        target = await find_target(admitted, gateway.encoders)
        engine, config = target.engine, target.config
        inputs = check_inputs(wanted.input, token_inputs=config.token_inputs)
        asked_by, prompt_name = given(wanted, "prompt_name", "input_type", "task")
        prompt = prompt_of(prompt_name, config, inputs, param=asked_by)
        _, whether = given(wanted, "truncation", "truncate")
        truncate_to = truncation(
            wanted.truncate_prompt_tokens, max_length=engine.max_length, whether=whether, truncate=config.truncate
        )
        size_by, size = given(wanted, "dimensions", "output_dimension")
        dimensions = dimensions_to_keep(size, full=engine.dimension, pool=config, param=size_by)
        _, encoding_format = given(wanted, "encoding_format", "embedding_type")
        served = await served_model(admitted, target)
        async with ended_with_client(request.receive):
            embedded = await engine.embed(
                served.recipe,
                inputs,
                prompt=prompt,
                truncate_to=truncate_to,
                dimensions=dimensions,
                background=admitted.background is not None,
                tenant=admitted.caller.tenant,
            )
        admitted.metered.used(served, num_in=embedded.num_tokens)
        admitted.observe_first_token(served)
        encode = partial(
            encode_embeddings,
            embedded.vectors,
            model_id=served.model_id,
            num_tokens=embedded.num_tokens,
            encoding_format=encoding_format or "float",
        )
        if embedded.vectors.size <= MAX_INLINE_NUMBERS:
            answer = encode()
        else:
            answer = await gateway.off_loop(encode)
        await request.answer(Response(answer, media_type="application/json"))
