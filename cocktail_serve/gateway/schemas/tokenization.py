"""Tokenizer requests and answers, as vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from cocktail_serve.cocktails.parsing import InlineBody

_COCKTAIL = "An inline cocktail; `model` is then the pool."


class TokenizeRequest(BaseModel):
    """vLLM's request for tokens, documented loosely: the body for a decoder is vLLM's, under the field policy."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="Any model id.")
    prompt: str | None = Field(None, description="A text.")
    messages: list[dict[str, Any]] | None = Field(
        None,
        description="Instead, a chat, rendered as the model's are with `tools`, `chat_template_kwargs` and the like.",
    )
    add_special_tokens: bool | None = Field(None, description="true for a text, false for a chat, if left out.")
    return_token_strs: bool | None = Field(False, description="Whether `token_strs` is sent too.")
    cocktail: InlineBody | None = Field(None, description=_COCKTAIL)


class TextTokenizeRequest(BaseModel):
    """What encoders and rerankers take of it: a text."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    prompt: StrictStr
    add_special_tokens: StrictBool | None = True
    return_token_strs: StrictBool | None = False
    cocktail: Any = None


class Tokens(BaseModel):
    count: int
    max_model_len: int = Field(description="Tokens that the model takes.")
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="What the vocabulary calls them.")


class DetokenizeRequest(BaseModel):
    """vLLM's request for the text of tokens."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="Any model id.")
    tokens: list[Annotated[int, Field(ge=0)]] = Field(description="Ids of the model's own tokenizer.")
    cocktail: InlineBody | None = Field(None, description=_COCKTAIL)


class TextDetokenizeRequest(BaseModel):
    """The same, as encoders and rerankers take it."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    tokens: list[Annotated[StrictInt, Field(ge=0)]]
    cocktail: Any = None


class DetokenizedText(BaseModel):
    prompt: str
