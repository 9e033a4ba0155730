"""Decisions, as OpenAI's: questions about an input, answered with probabilities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from cocktail_serve.cocktails.parsing import InlineBody
from cocktail_serve.decisions import Reading
from cocktail_serve.gateway.schemas.neutral import LEFT_ASIDE
from cocktail_serve.questions import MAX_OPTIONS

MAX_QUESTIONS = 400
MAX_OPTIONS_IN_ALL = 8192
"""Of all questions of a request: each is read by itself."""


def _part(kind: str, key: str, schema: dict[str, Any]) -> dict[str, Any]:
    properties = {"type": {"const": kind}, key: schema}
    return {"type": "object", "properties": properties, "required": ["type", key]}


_TEXT = {"type": "string"}
_INPUT_TEXT = _part("input_text", "text", _TEXT)
_OBJECT = {"type": "object"}
_INPUT_JSON = _part("input_json", "data", {"anyOf": [_OBJECT, {"type": "array", "items": _OBJECT}]})
_ANSWERED = [_part("output_text", "text", _TEXT), _part("refusal", "refusal", _TEXT)]
_INSTRUCTIONS_SCHEMA = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_INPUT_TEXT, _INPUT_JSON]}}]}


def _message(roles: list[str], parts: list[dict[str, Any]]) -> dict[str, Any]:
    content = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": parts}}]}
    properties = {"role": {"enum": roles}, "type": {"const": "message"}, "content": content}
    return {"type": "object", "properties": properties, "required": ["role", "content"]}


_MESSAGE = {
    "anyOf": [
        _message(["user"], [_INPUT_TEXT, _INPUT_JSON]),
        _message(["developer", "system"], [_INPUT_TEXT]),
        _message(["assistant"], _ANSWERED),
    ]
}
_VALUE_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "boolean"}]}
_INPUT_SCHEMA = {"anyOf": [_TEXT, {"type": "array", "items": _MESSAGE, "minItems": 1}]}


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid")

    # checked by `decision_fields.check_questions`
    instructions: Annotated[Any, WithJsonSchema(_INSTRUCTIONS_SCHEMA)] = Field(
        description="What is asked: a text, or parts `input_text` and `input_json`; empty where the input asks it."
    )
    name: StrictStr | None = Field(None, description="Comes back with the answer.")


class PredicateQuestion(_Question):
    """How likely a statement about the input is true."""

    type: Literal["predicate"]


def _text_or_boolean(value: Any) -> str | bool:
    if isinstance(value, str | bool):
        return value
    raise PydanticCustomError("text_or_boolean", "must be a text, true or false")


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: Annotated[Any, AfterValidator(_text_or_boolean), WithJsonSchema(_VALUE_SCHEMA)] = Field(
        description='The answer; the text `"true"` and `true` are two.'
    )
    description: StrictStr | None = Field(None, description="What it stands for.")


class ChoiceQuestion(_Question):
    """Which of the choices it is."""

    type: Literal["choice"]
    choices: list[Choice] = Field(min_length=2, max_length=MAX_OPTIONS)


class Level(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: StrictStr = Field(min_length=1)
    description: StrictStr | None = Field(None, description="What it stands for.")


class ScoreQuestion(_Question):
    """Which of the levels, which are in order, it is."""

    type: Literal["score"]
    levels: list[Level] = Field(min_length=2, max_length=MAX_OPTIONS)


AnyQuestion = PredicateQuestion | ChoiceQuestion | ScoreQuestion


class DecisionRequest(BaseModel):
    """OpenAI's request for decisions."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(description="A model id of a decoder pool; with `cocktail`, the pool's id.")
    # checked by `decision_fields`, whose errors name the place
    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="What the questions are about: a text, or messages of `user`, `developer`, `system` and "
        "`assistant`. Parts `input_json` are read as text; images and calls of tools are refused."
    )
    questions: list[AnyQuestion] = Field(
        min_length=1,
        max_length=MAX_QUESTIONS,
        description=f"Up to {MAX_QUESTIONS}, with up to {MAX_OPTIONS} options each and {MAX_OPTIONS_IN_ALL} in all.",
    )
    reading: Reading | None = Field(
        None,
        description="`verbatim`: how likely each option's own text is as the whole reply; `labels`: the options are "
        "shown under the letters A to Z, at most 26, and the reply's first token is read. Left out: as the model's "
        "examples were weighed, which is verbatim.",
    )
    prompt_cache_key: StrictStr | None = Field(None, description="Requests of different keys share no cached prompts.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description=LEFT_ASIDE)
    safety_identifier: StrictStr | None = Field(None, max_length=128, description=LEFT_ASIDE)
    cache_salt: StrictStr | None = Field(None, min_length=1, description="As of a chat.")
    cocktail: InlineBody | None = Field(None, description="Mix for this request, or find the same mixture again.")


class PredicateAnswer(BaseModel):
    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float = Field(description="That the statement is true.")


class ChoiceProbability(BaseModel):
    value: str | bool
    probability: float


_CONFIDENCE = "How likely the model is to say it, among all that it might say."


class ChoiceAnswer(BaseModel):
    type: Literal["choice"] = "choice"
    name: str | None
    choice: str | bool = Field(description="The most likely; of equals the first.")
    confidence: float = Field(description=_CONFIDENCE)
    probabilities: list[ChoiceProbability] = Field(description="In the order of the choices; they sum to 1.")


class ScoreProbability(BaseModel):
    value: int = Field(description="Place among the levels, from 0.")
    label: str
    probability: float


class ScoreAnswer(BaseModel):
    type: Literal["score"] = "score"
    name: str | None
    score: float = Field(description="Mean of the places of the levels, from 0, by their probabilities.")
    confidence: float = Field(description=f"Of the most likely level: {_CONFIDENCE[0].lower()}{_CONFIDENCE[1:]}")
    probabilities: list[ScoreProbability] = Field(description="In the order of the levels; they sum to 1.")


class DecisionInputDetails(BaseModel):
    cached_tokens: int = Field(description="Those that had been computed before.")
    cache_write_tokens: int = 0


class DecisionOutputDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    input_tokens: int = Field(
        description="Of each question once, with the input; verbatim, those of each option's text besides."
    )
    input_tokens_details: DecisionInputDetails
    output_tokens: int = Field(0, description="Nothing is generated.")
    output_tokens_details: DecisionOutputDetails = DecisionOutputDetails()
    total_tokens: int


class Decision(BaseModel):
    model: str = Field(description="The version that answered.")
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer] = Field(description="In the order of the questions.")
    usage: DecisionUsage
