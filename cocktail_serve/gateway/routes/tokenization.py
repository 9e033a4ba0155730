"""`/tokenize` and `/detokenize`, as vLLM's: what a model's tokenizer makes of a text or a chat, and back.

No parameters take part, so nothing waits for a turn, and no tokens are counted.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from cocktail_serve.engines.base import DETOKENIZE_PATH, TOKENIZE_PATH, TextEngine
from cocktail_serve.errors import WrongModelKindError
from cocktail_serve.gateway.admission import AdmittedRequest, admit
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.field_policy import passed_on
from cocktail_serve.gateway.openapi import engine_errors, json_request
from cocktail_serve.gateway.requested_model import find_target, served_model
from cocktail_serve.gateway.schemas.tokenization import (
    DetokenizedText,
    DetokenizeRequest,
    TextDetokenizeRequest,
    TextTokenizeRequest,
    TokenizeRequest,
    Tokens,
)
from cocktail_serve.pool import with_article
from cocktail_serve.request_schema import parse_as

# FastAPI documents these endpoints only: `DirectRouting` calls them, and they send their answers themselves
router = APIRouter(tags=["tokenization"], route_class=DirectRoute)


@router.post("/v1/tokenize", include_in_schema=False)
@router.post(
    TOKENIZE_PATH,
    response_model=Tokens,
    responses=engine_errors(),
    openapi_extra=json_request(TokenizeRequest),
)
async def tokenize(request: DirectRequest) -> None:
    """The tokens of a text or a chat, as vLLM's; `/v1/tokenize` is the same."""
    await _ask(request, TOKENIZE_PATH)


@router.post("/v1/detokenize", include_in_schema=False)
@router.post(
    DETOKENIZE_PATH,
    response_model=DetokenizedText,
    responses=engine_errors(),
    openapi_extra=json_request(DetokenizeRequest),
)
async def detokenize(request: DirectRequest) -> None:
    """The text of tokens, as vLLM's; `/v1/detokenize` is the same."""
    await _ask(request, DETOKENIZE_PATH)


async def _ask(request: DirectRequest, path: str) -> None:
    async with admit(request) as admitted:
        target = await find_target(admitted, admitted.gateway.engines)
        engine, config = target.engine, target.config
        if engine.kind == "decoder":
            body = passed_on(admitted.body, allow_chat_template=config.allow_chat_template)
            served = await served_model(admitted, target)
            async with ended_with_client(request.receive):
                answer = await engine.ask_tokenizer(path, body, generation=served.generation)
        else:
            wanted = _parsed(admitted, path, engine)
            served = await served_model(admitted, target)
            async with ended_with_client(request.receive):
                answer = (await _answer(wanted, engine)).encode()
        admitted.metered.used(served, num_in=0)
        await request.answer(Response(answer, media_type="application/json"))


def _parsed(admitted: AdmittedRequest, path: str, engine: TextEngine) -> TextTokenizeRequest | TextDetokenizeRequest:
    if path == DETOKENIZE_PATH:
        return parse_as(TextDetokenizeRequest, admitted.body)
    if admitted.body.get("messages") is not None:
        raise WrongModelKindError(
            f"model {admitted.body['model']!r} is {with_article(engine.pool.kind)}, which reads no chats; send prompt",
            param="messages",
        )
    return parse_as(TextTokenizeRequest, admitted.body)


async def _answer(wanted: TextTokenizeRequest | TextDetokenizeRequest, engine: TextEngine) -> str:
    if isinstance(wanted, TextDetokenizeRequest):
        return DetokenizedText(prompt=await engine.detokenize(wanted.tokens)).model_dump_json()
    max_length = engine.max_length
    found = await engine.tokenize(wanted.prompt, add_special_tokens=wanted.add_special_tokens is not False)
    return Tokens(
        count=len(found.token_ids),
        max_model_len=max_length,
        tokens=found.token_ids,
        token_strs=found.tokens if wanted.return_token_strs else None,
    ).model_dump_json()
