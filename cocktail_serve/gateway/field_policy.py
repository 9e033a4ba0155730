"""Which fields of a generation request the gateway decides, refuses, and passes on. This table is the policy.

What it refuses is refused from the table. What it overrides and completes is done where the value is known: usage in
`apply_field_policy`, the rest by the engine (`engines.vllm.request_body`).

Requests go to vLLM's own OpenAI server, so that chat templates, tools, logprobs, structured output and sampling are
vLLM's. What could break the promise that no request is answered by other parameters, or from another tenant's cache,
than its own is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.generation_settings import MAX_TOKENS, NEUTRAL_SAMPLING


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What happens to one field of the request.

    Attributes:
        field: its name in the body, dotted where it lies inside another.
        action: `override`: the gateway sets it, whatever was sent. `refuse`: 400 if it is given and not null.
            `complete`: what the model asked for takes otherwise than the base, where the request does not say.
        allowed_by: engine setting that turns a refusal into passing on.
        why: for the one who meets the rule.
    """

    field: str
    action: Literal["override", "refuse", "complete"]
    why: str
    allowed_by: str | None = None


FIELD_POLICY: tuple[FieldRule, ...] = (
    FieldRule("model", "override", "the engine knows its resident parameters, not names; answers name the version"),
    FieldRule("cache_salt", "override", "prefix caches are kept apart by tenant, recipe and the salt that was sent"),
    FieldRule(
        "stream_options.include_usage",
        "override",
        "always asked of the engine to count tokens; hidden from the answer unless the request asked for it",
    ),
    FieldRule(
        "stream_options.continuous_usage_stats",
        "override",
        "always asked of the engine, so that a stream that breaks off is counted; hidden likewise",
    ),
    FieldRule("priority", "refuse", "the order of requests is the server's to decide"),
    FieldRule("request_id", "refuse", "ids inside the engine are the server's; send the header x-request-id instead"),
    FieldRule("kv_transfer_params", "refuse", "KV blocks never leave the engine that computed them"),
    FieldRule("ec_transfer_params", "refuse", "encoder caches never leave the engine that computed them"),
    FieldRule(
        "logprob_token_ids",
        "refuse",
        "vLLM would tell other requests of the batch these log-probabilities in place of their own; ask for the "
        "likeliest (`top_logprobs`), or for decisions (`/v1/decisions`)",
    ),
    FieldRule("vllm_xargs", "refuse", "it reaches extensions of the engine that know nothing of tenants"),
    FieldRule(
        "chat_template",
        "refuse",
        "a template is a program that runs in the engine; the model's own is used, else the pool's",
        allowed_by="allow_chat_template",
    ),
    FieldRule(
        "chat_template_kwargs.chat_template",
        "refuse",
        "a template is a program that runs in the engine; the model's own is used, else the pool's",
        allowed_by="allow_chat_template",
    ),
    FieldRule(
        "stop_token_ids",
        "complete",
        "the model's own end tokens are added, unless `ignore_eos`; an answer that they end has `stop_reason` null",
    ),
    *(
        FieldRule(name, "complete", "a default of the model's own generation_config.json, as vLLM takes it")
        for name in (*NEUTRAL_SAMPLING, MAX_TOKENS)
    ),
)
"""All fields that are not in this table are passed on as they are."""

_REFUSED = tuple((rule, tuple(rule.field.split("."))) for rule in FIELD_POLICY if rule.action == "refuse")

IGNORED_BY_BEAM_SEARCH = (
    "allowed_token_ids",
    "bad_words",
    "logit_bias",
    "min_tokens",
    "response_format",
    "stop",
    "structured_outputs",
)
"""What a request demands of its answer, and what vLLM (0.32) takes beside `use_beam_search` and does not heed. How
tokens are drawn is left out: beam search draws none."""

_REFUSED_NAMES = frozenset(path[0] for _, path in _REFUSED)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as the engine gets it.

    Attributes:
        body: without `model` and `cocktail`. `model` and `cache_salt` are set by the engine: they depend on the
            process and on the recipe in turn.
        shows_usage: whether the client asked for usage in its stream.
        shows_usage_in_chunks: whether it asked for it in every chunk too.
    """

    body: dict[str, Any]
    shows_usage: bool
    shows_usage_in_chunks: bool = False


def apply_field_policy(body: Mapping[str, Any], *, allow_chat_template: bool) -> Outgoing:
    """Lays `FIELD_POLICY` over a request. `body` is left unchanged.

    Args:
        allow_chat_template: the engine setting of that name.

    Raises:
        InvalidRequestError: a refused field, one that beam search does not heed, or one of ours of the wrong type;
            `param` names it.
    """
    outgoing = passed_on(body, allow_chat_template=allow_chat_template)
    _check_beam_search(body)
    # vLLM reads "true" and 1 as true; then it would stream to a gateway that waits for a whole answer
    stream = as_boolean(body, "stream")
    if not stream:
        return Outgoing(outgoing, shows_usage=False)
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise InvalidRequestError("stream_options must be an object", param="stream_options")
    shows_usage = as_boolean(options, "include_usage", "stream_options.include_usage")
    # vLLM's usage in every chunk counts only beside include_usage
    shows_each = shows_usage and as_boolean(options, "continuous_usage_stats", "stream_options.continuous_usage_stats")
    outgoing["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": True}
    return Outgoing(outgoing, shows_usage=shows_usage, shows_usage_in_chunks=shows_each)


def passed_on(body: Mapping[str, Any], *, allow_chat_template: bool) -> dict[str, Any]:
    """What of a request reaches the engine as it is: all but `model` and `cocktail`.

    Raises:
        InvalidRequestError: a refused field, or a salt that is none; `param` names it.
    """
    for rule, path in _REFUSED:
        if _lookup(body, path) is not None and not (rule.allowed_by and allow_chat_template):
            unless = f" (the operator can allow it with engine.{rule.allowed_by})" if rule.allowed_by else ""
            raise InvalidRequestError(
                f"the field {rule.field!r} is not accepted: {rule.why}{unless}",
                param=rule.field,
                code="field_not_accepted",
            )
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError("cache_salt must be a non-empty string", param="cache_salt")
    # a refused field that is null is as good as absent; vLLM takes null for some of them and not for others
    return {
        key: value
        for key, value in body.items()
        if key not in ("model", "cocktail") and not (value is None and key in _REFUSED_NAMES)
    }


def _check_beam_search(body: Mapping[str, Any]) -> None:
    if not body.get("use_beam_search"):
        return
    for name in IGNORED_BY_BEAM_SEARCH:
        if body.get(name) and body[name] != {"type": "text"}:
            raise InvalidRequestError(
                f"beam search does not heed {name!r}, and its answer could break it: leave out one of the two",
                param=name,
                code="field_not_accepted",
            )


def _lookup(body: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = body
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def as_boolean(body: Mapping[str, Any], key: str, param: str | None = None) -> bool:
    """A field that is true, or false, null or absent.

    Raises:
        InvalidRequestError: it is anything else, which vLLM may read as true.
    """
    value = body.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequestError(f"{param or key} must be true or false, got {value!r}", param=param or key)
