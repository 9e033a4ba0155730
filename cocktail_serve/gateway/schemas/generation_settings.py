"""How a model is called where a request does not say, as the API shows it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field

from cocktail_serve.generation_settings import GenerationSettings


class GenerationView(BaseModel):
    """What a decoder takes where a request does not say."""

    stop_token_ids: list[int] = Field(description="Tokens that end an answer.")
    sampling: dict[str, float] = Field(description="Defaults by the request's field; others are vLLM's.")
    chat_template: str | None = Field(description="SHA-256 of the template of chats; null: none.")

    @classmethod
    def of(cls, settings: GenerationSettings) -> Self:
        return cls.model_validate(settings.to_json())
