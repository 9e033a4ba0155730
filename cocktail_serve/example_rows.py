"""Rows of examples as other tools write them, said in the product's own forms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.pool import Kind

MAX_SEPARATOR = 16
"""Characters between input and output: more belongs to one of the two."""


def plain_row(row: Mapping[str, Any], kind: Kind, number: int) -> Mapping[str, Any]:
    """The row with nothing beside what its form holds; one of no known form is returned as it is.

    Known are OpenAI's fine-tuning rows, ShareGPT's conversations, FlagEmbedding's training rows and the columns of
    sentence-transformers' triplets.

    Args:
        kind: of the pool; it decides which fields of FlagEmbedding's its trainer reads.
        number: of the row, from 1.

    Raises:
        InvalidExamplesError: the row says something that would change the loss and is not served; or its form says
            not what is asked and what is answered.
    """
    _check_weight(row, number)
    row = {key: value for key, value in row.items() if key not in _LEFT_ASIDE}
    if "messages" in row:
        return _chat_row(row, number)
    if "conversations" in row:
        return _sharegpt_row(row, number)
    if "positive" in row:
        return _triplet_row(row)
    if "pos" in row:
        return _flag_embedding_row(row, kind, number)
    for keys, advice in _NO_EXAMPLES:
        if keys <= row.keys():
            raise InvalidExamplesError(advice, row=number)
    return row


_LEFT_ASIDE = frozenset({"score", "choices", "references", "weight", "id"})
"""What data sets carry beside the text."""

_NO_EXAMPLES = (
    (
        frozenset({"instruction", "output"}),
        "this is an Alpaca row, and how its instruction and input become a prompt is the model's own matter; write "
        'the prompt out: {"messages": [{"role": "user", "content": instruction + "\\n" + input}, {"role": "assistant", '
        '"content": output}]} for a chat model, {"input": the prompt, "output": output} for another',
    ),
    (
        frozenset({"chosen", "rejected"}),
        'this is a row of preferences, which has no one output; give the better one: {"input": ..., "output": ...}',
    ),
    (
        frozenset({"preferred_output", "non_preferred_output"}),
        "this is a row of preferences, which has no one output; give the better one as the last of 'messages'",
    ),
    (
        frozenset({"text"}),
        "this is a row of text alone; say what is given and what is predicted: "
        '{"input": ..., "output": ...}, where an empty input has all of the text predicted',
    ),
)


def _check_weight(row: Mapping[str, Any], number: int) -> None:
    weight = row.get("weight")
    if weight is not None and weight != 1:
        raise InvalidExamplesError(
            f"'weight' is {weight!r}, and all examples count the same: leave out the weight, or the row", row=number
        )


def _chat_row(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """OpenAI's: definitions of tools stay, an option of the API that says how they are called goes."""
    if row.get("functions"):
        raise InvalidExamplesError(
            "'functions' is not served; say them as 'tools', as OpenAI's API does now", row=number
        )
    dropped = {"functions", "parallel_tool_calls"} | ({"tools"} if not row.get("tools") else set())
    return {key: value for key, value in row.items() if key not in dropped}


_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _sharegpt_row(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise InvalidExamplesError("'conversations' must be a list of {from, value}", row=number)
    if row.get("tools"):
        raise InvalidExamplesError(
            "'tools' beside 'conversations' is not served; give 'messages' and 'tools'", row=number
        )
    messages = [] if not row.get("system") else [{"role": "system", "content": row["system"]}]
    for index, turn in enumerate(turns):
        name = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
            raise InvalidExamplesError(
                f"conversations[{index}] needs 'from' out of {', '.join(_SHAREGPT_ROLES)}, and 'value'; give calls of "
                f"functions as 'messages' with 'tool_calls'",
                row=number,
            )
        messages.append({"role": _SHAREGPT_ROLES[name], "content": turn.get("value"), "weight": turn.get("weight")})
    rest = {key: value for key, value in row.items() if key not in ("conversations", "system", "tools")}
    return {"messages": messages, **rest}


_NEGATIVE = re.compile(r"negative(_\d+)?")


def _triplet_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`{"anchor", "positive", "negative"}`, with any number of `negative_1`, ...; the anchor may be called a query."""
    negatives = [key for key in row if _NEGATIVE.fullmatch(key)]
    anchors = [key for key in ("anchor", "query") if key in row]
    rest = row.keys() - {"positive", *negatives, *anchors}
    if len(anchors) != 1 or rest or not all(isinstance(row[key], str) for key in ("positive", *negatives)):
        return row
    return {"query": row[anchors[0]], "pos": [row["positive"]], "neg": [row[key] for key in negatives]}


_TRAINING_KEYS = frozenset({"pos_scores", "neg_scores", "type", "category", "batch_size", "train_group_size"})
"""What FlagEmbedding's rows say of a training alone: teachers' scores, and how negatives are drawn."""

_PROMPTED_PASSAGES = ("symmetric_sts", "symmetric_clustering")
"""Types of FlagEmbedding's whose passages are prompted as their queries are."""


def _flag_embedding_row(row: Mapping[str, Any], kind: Kind, number: int) -> Mapping[str, Any]:
    """Prompts go before the texts, as FlagEmbedding's default format of instructions has them.

    Its trainer of embedders reads `prompt`, that of cross-encoders `query_prompt` and `passage_prompt`: there, `prompt`
    is for rerankers that are language models.
    """
    query_prompt, passage_prompt = "", ""
    if kind == "encoder":
        query_prompt = _prompt(row, "prompt", number)
        passage_prompt = query_prompt if row.get("type") in _PROMPTED_PASSAGES else ""
        read = {"prompt"}
    else:
        query_prompt, passage_prompt = _prompt(row, "query_prompt", number), _prompt(row, "passage_prompt", number)
        read = {"prompt", "query_prompt", "passage_prompt"}
    plain = {key: value for key, value in row.items() if key not in _TRAINING_KEYS | read}
    if query_prompt and "query" in plain:
        plain["query"] = _prompted(query_prompt, plain["query"])
    for key in ("pos", "neg"):
        if passage_prompt and isinstance(plain.get(key), list):
            plain[key] = [_prompted(passage_prompt, text) for text in plain[key]]
    return plain


def _prompt(row: Mapping[str, Any], key: str, number: int) -> str:
    prompt = row.get(key)
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidExamplesError(f"{key!r} must be a string, got {type(prompt).__name__}", row=number)
    return prompt or ""


def _prompted(prompt: str, text: Any) -> Any:
    """An empty text stays one, to be found as such."""
    return f"{prompt}{text}" if isinstance(text, str) and text.strip() else text


def separator_of(row: Mapping[str, Any], number: int) -> str:
    """What a row has between its input and what comes behind it.

    Raises:
        InvalidExamplesError: no string, too long for one, or what no tokenizer takes.
    """
    separator = row["separator"]
    if not isinstance(separator, str) or len(separator) > MAX_SEPARATOR:
        raise InvalidExamplesError(
            f"'separator' must be a string of at most {MAX_SEPARATOR} characters, got {separator!r:.40}", row=number
        )
    return text_of(separator, "separator", number) if separator.strip() else separator


def text_of(value: Any, key: str, number: int, *, may_be_empty: bool = False) -> str:
    """A field of a row as text.

    Raises:
        InvalidExamplesError: no string, nothing but white space, or what no tokenizer takes.
    """
    if not isinstance(value, str):
        raise InvalidExamplesError(f"{key!r} must be a string, got {type(value).__name__}", row=number)
    if not value.strip() and not (may_be_empty and not value):
        raise InvalidExamplesError(f"{key!r} is empty", row=number)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidExamplesError(
            f"{key!r} holds a lone surrogate, which no tokenizer takes: {error}", row=number
        ) from error
    return value
