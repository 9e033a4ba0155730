"""Fields of other servers that mean something here only at a value that changes nothing."""

from __future__ import annotations

import json
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

LEFT_ASIDE = "Accepted and left aside."


class Only:
    """Annotates an optional field that is accepted where it is null or one of `neutral`, and refused otherwise.

    Clients send such fields with their defaults. What would change the answer is not dropped in silence.

    Args:
        neutral: values beside null that ask for what is done anyway.
        why: why others are refused, and what to do instead.
    """

    def __init__(self, *neutral: Any, why: str) -> None:
        self._neutral = (None, *neutral)
        self._why = why

    @property
    def description(self) -> str:
        return f"Refused but for {' or '.join(map(json.dumps, self._neutral))}: {self._why}."

    def check(self, value: Any) -> Any:
        # by type too: True is 1 to Python, and not to a client
        if any(value == neutral and type(value) is type(neutral) for neutral in self._neutral):
            return value
        raise PydanticCustomError(
            "not_neutral",
            "is not served: {why}; accepted: {accepted}",
            {"why": self._why, "accepted": ", ".join(map(json.dumps, self._neutral))},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self._neutral), "description": self.description}
