"""Chat templates rendered as transformers renders them, with nothing of transformers loaded.

The environment is that of its `chat_template_utils`: the options, filters, functions and blocks that publishers write
their templates for. Templates are code of whoever made the model, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cocktail_serve.checkpoints.chat_templates import DEFAULT, TOOL_USE

_KEPT_TEMPLATES = 16


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """A conversation as text.

    Args:
        variables: what else the template is given: special tokens by name, and whatever the operator sets.

    Raises:
        TemplateError: the template is none, or refuses the messages. What it does to values that it does not expect may
            end in a TypeError, ValueError or KeyError as well.
    """
    given = {"documents": None, **variables}
    return _compiled(template).render(
        **given, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
    )


def chosen(templates: str | Mapping[str, str] | None, name_or_text: str | None, *, has_tools: bool) -> str:
    """The template to render with, of those that a tokenizer has.

    Args:
        name_or_text: one of their names, or another template; None: what the tokenizer takes by itself.

    Raises:
        ValueError: there is none.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if name_or_text is not None:
        return named.get(name_or_text, name_or_text)
    if isinstance(templates, str):
        return templates
    if has_tools and TOOL_USE in named:
        return named[TOOL_USE]
    if DEFAULT in named:
        return named[DEFAULT]
    raise ValueError(f"none of its templates goes by {DEFAULT!r}; there are: {', '.join(sorted(named)) or 'none'}")


@lru_cache(maxsize=_KEPT_TEMPLATES)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`: marks what an assistant says, for training; here its content is rendered, and no more."""

    tags = {"generation"}  # noqa: RUF012  of the class, as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # as a call, and not as the plain body: what is set inside stays inside
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which no model has learnt to read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  templates may name it
    return datetime.now().strftime(format)
