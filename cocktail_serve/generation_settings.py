"""How a model is called where a request does not say: tokens that end its answers, sampling defaults, chat template.

docs/explanation/generation.md says what a model alone and a mixture take, and why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cocktail_serve.digest import digest_of

NEUTRAL_SAMPLING: Mapping[str, float] = MappingProxyType(
    {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
    }
)
"""Sampling fields of a request that a model may have defaults for, and what vLLM takes where it has none."""

MAX_TOKENS = "max_tokens"
"""A further default: the length of an answer to a chat. What a model without it takes is the room that is left."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What messages are rendered by.

    Attributes:
        text: a Jinja template.
        tool_use: the one for requests that bring tools, where the model has another for them.
        defaults: further variables of the template, under those that a request gives.
    """

    text: str
    tool_use: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what messages are rendered to, 64 hex characters."""
        return digest_of({"text": self.text, "tool_use": self.tool_use, "defaults": dict(self.defaults)})


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How one model, or a mixture, is called.

    Attributes:
        end_token_ids: the end token of the model's tokenizer; of a mixture, those of all its models. Ascending.
        stop_token_ids: all tokens that end an answer, those among them. Ascending.
        sampling: defaults by the name of the request's field: those of `NEUTRAL_SAMPLING`, and `MAX_TOKENS`.
        chat_template: None where it has none of its own.
    """

    end_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    chat_template: ChatTemplate | None = None

    def to_json(self) -> dict[str, Any]:
        """What is shown of it: a template by its digest."""
        return {
            "stop_token_ids": list(self.stop_token_ids),
            "sampling": dict(sorted(self.sampling.items())),
            "chat_template": None if self.chat_template is None else self.chat_template.digest,
        }


NO_SETTINGS = GenerationSettings()


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What the operator lays down for all models of a pool, by arguments of the engine that mean the same in vLLM.

    Attributes:
        chat_template: `chat-template` with `default-chat-template-kwargs`: taken instead of every model's own.
        chat_template_defaults: `default-chat-template-kwargs` alone.
        generation_config: `generation-config`, a folder: its generation_config.json is taken instead of every model's.
        has_sampling: False for `generation-config: vllm`: no model's sampling defaults are taken.
        has_templates: False where the engine's tokenizer renders messages by itself and takes no template: Mistral's.
        overridden: fields whose defaults `override-generation-config` sets, in the engine itself.
    """

    chat_template: ChatTemplate | None = None
    chat_template_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    generation_config: Path | None = None
    has_sampling: bool = True
    has_templates: bool = True
    overridden: frozenset[str] = frozenset()


NO_OPTIONS = GenerationOptions()


def mixed_settings(
    base: GenerationSettings, experts: Sequence[GenerationSettings], *, chat_template: ChatTemplate | None
) -> GenerationSettings:
    """How a mixture is called.

    What ends the answer of any of its models ends the mixture's: it has learnt to say that from this model, and nobody
    has trained what it would say after. Sampling defaults are a set that was chosen together, so they are the experts'
    where all have the same ones, and else the base's. Messages are rendered as they were when the models were weighed.

    Args:
        experts: those that take part, with a coefficient above 0.
        chat_template: the pool's.
    """
    models = [base, *experts]
    sampling = [expert.sampling for expert in experts]
    agree = bool(sampling) and all(each == sampling[0] for each in sampling)
    return GenerationSettings(
        end_token_ids=_union(model.end_token_ids for model in models),
        stop_token_ids=_union(model.stop_token_ids for model in models),
        sampling=sampling[0] if agree else base.sampling,
        chat_template=chat_template,
    )


def sent_stop_token_ids(
    body: Mapping[str, Any], settings: GenerationSettings, own: GenerationSettings
) -> list[Any] | None:
    """The `stop_token_ids` that a server is sent, which ends answers by tokens of its own anyway.

    It gives one of them as `stop_reason`, where its own give null: `hidden_stop_reasons` tells which are hidden again.

    Args:
        settings: of the model that answers.
        own: the server's.

    Returns:
        Those of the request, and of the model's what the server does not know; None: the request's as they are.
    """
    if settings.stop_token_ids == own.stop_token_ids or ignores_end(body):
        return None
    given = body.get("stop_token_ids") or []
    if not isinstance(given, list):  # refused by vLLM, in words of its own
        return None
    known = {*own.stop_token_ids, *(token for token in given if isinstance(token, int))}
    return [*given, *(token for token in settings.stop_token_ids if token not in known)]


def hidden_stop_reasons(body: Mapping[str, Any], end_token_ids: Collection[int]) -> Collection[int]:
    """Tokens that are no `stop_reason` of an answer to the client: the model has ended by itself, which is null.

    Args:
        end_token_ids: of the model that answers.
    """
    return () if ignores_end(body) else end_token_ids


def ignores_end(body: Mapping[str, Any]) -> bool:
    """Whether a request asks for what comes after the end of an answer, by a value that vLLM reads as true."""
    value = body.get("ignore_eos")
    if isinstance(value, str):
        return value.lower() in ("1", "true", "t", "yes", "y", "on")
    return bool(value)


def _union(ids: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(sorted({token for each in ids for token in each}))
