"""Writes the pages of docs/reference from the code they describe: `python -m docs.generate` (or `make docs`).

A test compares the pages with what this module makes, so they cannot drift.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cocktail_serve import errors
from cocktail_serve.batches.request import MAX_LINES, BatchBody
from cocktail_serve.batches.runner import (
    LINES_AT_ONCE,
    LINES_OF_TENANT,
    MAX_ENGINE_FAILURES,
    MAX_GIVEN_WAY,
    MAX_OUTPUT_BYTES,
)
from cocktail_serve.batches.store import MAX_UNFINISHED
from cocktail_serve.checkpoints.adapters.config import FIELDS, INITS
from cocktail_serve.cli import app as cli_app
from cocktail_serve.cocktails.parsing import CocktailBody
from cocktail_serve.config import Settings
from cocktail_serve.engines.vllm.errors import KINDS
from cocktail_serve.errors import CocktailError
from cocktail_serve.finetuning.request import JobBody
from cocktail_serve.gateway.app import create_app
from cocktail_serve.gateway.error_handlers import HTTP_ERRORS
from cocktail_serve.gateway.field_policy import FIELD_POLICY, IGNORED_BY_BEAM_SEARCH
from cocktail_serve.gateway.response_fields import NOT_SERVED, SERVED_TOOLS
from cocktail_serve.gateway.schemas.cocktails import CocktailView
from cocktail_serve.gateway.schemas.decisions import DecisionRequest
from cocktail_serve.gateway.schemas.embeddings import EmbeddingRequest
from cocktail_serve.gateway.schemas.neutral import Only
from cocktail_serve.gateway.schemas.reranking import RerankRequest
from cocktail_serve.methods import METHODS, SUM_TOLERANCE
from cocktail_serve.pool import BASE
from tests.zoo.table import models_page

REFERENCE = Path(__file__).parent / "reference"
COLUMNS = 120
NOTE = "<!-- made by `make docs` from the code; edit that instead -->\n\n"


def pages() -> dict[str, str]:
    """Text of every generated page, by file name, wrapped where it is no table."""
    made = {
        "config.md": config_page(),
        "cli.md": cli_page(),
        "http.md": http_page(),
        "cocktails.md": cocktails_page(),
        "errors.md": errors_page(),
        "methods.md": methods_page(),
        "adapters.md": adapters_page(),
        "models.md": models_page(NOTE),
    }
    return {name: "\n".join(map(_wrapped, text.split("\n"))) for name, text in made.items()}


def _wrapped(line: str) -> str:
    if line.startswith(("|", "<!--")):
        return line
    indent = "  " if line.startswith("* ") else ""
    return textwrap.fill(
        line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def config_page() -> str:
    """Every key of the configuration file, section by section."""
    parts = [
        NOTE,
        "# Configuration\n\nOne YAML file. Unknown keys are errors; relative paths are relative to the file. "
        "`COCKTAIL_SERVER__PORT=9000` overrides `server.port`: two underscores step into a section. "
        "`cocktail-serve doctor FILE` checks it.\n",
    ]
    for title, model in _sections(Settings, "(top level)"):
        doc = inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        parts.append(f"\n## {title}\n\n{doc}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts += [_config_row(name, field) for name, field in model.model_fields.items()]
    return "".join(parts)


def _sections(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, model
    for name, field in model.model_fields.items():
        path = name if title == "(top level)" else f"{title}.{name}"
        for inner in _models_in(field.annotation):
            kind = inner.model_fields.get("type")
            suffix = f" (type: {kind.default})" if kind is not None else ""
            listed = "[]" if get_origin(field.annotation) is list else ""
            yield from _sections(inner, f"{path}{listed}{suffix}")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _config_row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "" if isinstance(value, BaseModel) else f"`{json.dumps(value, default=str)}`"
    return f"| `{name}` | {_type_name(field.annotation)} | {default} | {field.description or ''} |\n"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (list, dict):
        return f"{origin.__name__} of {_type_name(arguments[-1])}"
    if origin is Union or type(annotation).__name__ == "UnionType":
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    names = {
        "str": "string",
        "SecretStr": "secret",
        "int": "integer",
        "float": "number",
        "bool": "boolean",
        "ByteSize": "bytes, as `50GB`",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, "section" if _models_in(annotation) else name.lower())


def cli_page() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(cli_app)
    parts = [
        NOTE,
        "# Command line\n\nExit codes: 0 done, 2 usage or bad input (said on stderr, nothing written), 1 failure. "
        "Every command takes `--json`.\n",
    ]
    for name, command in _commands(group):
        context = command.make_context(name, [], resilient_parsing=True)
        text = inspect.cleandoc(command.help or "")
        parts.append(f"\n## cocktail-serve {name}\n\n{text}\n\n| argument or option | meaning |\n|---|---|\n")
        for parameter in command.get_params(context):
            if parameter.name == "help":
                continue
            record = parameter.get_help_record(context)
            shown, meaning = record or (parameter.make_metavar(context), getattr(parameter, "help", None) or "")
            parts.append(f"| `{shown}` | {meaning} |\n".replace("  ", " "))
    return "".join(parts)


def _commands(group: Any) -> Iterator[tuple[str, Any]]:
    """Commands of a click group by name, those of groups inside it as `keys create`."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", each) for inner, each in _commands(command))
        else:
            yield name, command


def http_page() -> str:
    """Every route, and what happens to the fields of requests for decoders."""
    document = create_app(_any_settings()).openapi()
    parts = [
        NOTE,
        "# HTTP\n\nThe running server shows this interactively at `/docs` and as OpenAPI at `/openapi.json`. "
        "Statuses and codes of errors are in [errors](errors.md), fields of a cocktail in [cocktails](cocktails.md). "
        "HEAD is answered wherever GET is, and bodies may be sent with `Content-Encoding: gzip`. Browsers let pages of "
        "other origins call the server where [`server.cors_origins`](config.md#server) names them.\n\n"
        "| route | what it does | statuses |\n|---|---|---|\n",
    ]
    for path, operations in sorted(document["paths"].items()):
        for method, operation in operations.items():
            statuses = ", ".join(sorted(operation["responses"]))
            parts.append(f"| `{method.upper()} {path}` | {_first_sentence(operation)} | {statuses} |\n")
    parts.append(
        "\n## Body of a fine-tuning job\n\nOf `POST /v1/fine_tuning/jobs`; what a job is and tells: "
        "[how to fine-tune](../how-to/fine-tuning.md).\n\n| field | meaning |\n|---|---|\n"
    )
    parts += _body_rows(JobBody)
    parts.append(
        "\n## Body of a batch\n\nOf `POST /v1/batches`, from a file that was uploaded with the purpose `batch`: on each "
        'line `{"custom_id": "...", "method": "POST", "url": "<endpoint>", "body": {...}}`.\n\n'
        "| field | meaning |\n|---|---|\n"
    )
    parts += _body_rows(BatchBody)
    parts.append(
        f"\nA file may have {MAX_LINES:,} lines and as many bytes as one upload may be "
        "(`server.max_request_bytes`); lines may name several models, and those of one are asked together. A file that "
        "cannot be read fails its batch, with `errors` that name the line: `empty_file`, `too_many_tasks`, "
        "`invalid_json_line`, `invalid_request`, `invalid_method`, `mismatched_url`, `duplicate_custom_id`, "
        f"`invalid_file`. Answers are kept up to {MAX_OUTPUT_BYTES // 1024**2} MiB a batch; further lines fail with "
        "`output_too_large`. Lines without an answer at the end are in the error file: those refused with the answer "
        "that they got, those given up with `batch_expired` or `batch_cancelled`.\n\n"
        f"A line is asked as its tenant would ask it, under the same rules and limits, and counted in its usage. It "
        f"gives way: a gateway asks {LINES_AT_ONCE} lines at once, {LINES_OF_TENANT} of one tenant, and begins no second "
        "one on an engine while tenants ask there; a line is broken off, and asked again later, when requests wait for "
        f"its turn or its slot ({MAX_GIVEN_WAY} times at most); and half of each limit of the tenant is left to what it "
        f"asks itself. 429 and 503 are tried again until the window ends, other errors of the server "
        f"{MAX_ENGINE_FAILURES} times. One gateway works on a batch; when it ends, another or the next goes on with the "
        f"lines that have no answer. A tenant may have {MAX_UNFINISHED} unfinished batches. A batch goes on when the key "
        "that made it ends: cancel it.\n"
    )
    parts.append(
        "\n## Body of a request for decisions\n\nOf `POST /v1/decisions`; what is asked and how answers are read: "
        "[how to](../how-to/decisions.md).\n\n| field | meaning |\n|---|---|\n"
    )
    parts += _body_rows(DecisionRequest)
    for title, body in (("a rerank request", RerankRequest), ("an embedding request", EmbeddingRequest)):
        parts.append(
            f"\n## Body of {title}\n\nFields of other servers' clients are accepted where they ask for what is done here; "
            "one that would change the answer is refused by name, as is one that is not listed. A field that is null "
            "is as good as absent.\n\n| field | meaning |\n|---|---|\n"
        )
        parts += _body_rows(body)
    parts.append(
        "\n## Fields of chat and completion requests\n\nBodies go to vLLM's own OpenAI server. "
        "These fields are decided here; all others are passed on as they are. Which model's defaults complete a request: "
        "[generation settings](../explanation/generation.md).\n\n"
        "| field | action | why |\n|---|---|---|\n"
    )
    for rule in FIELD_POLICY:
        allowed = f" (`engine.{rule.allowed_by}` allows it)" if rule.allowed_by else ""
        parts.append(f"| `{rule.field}` | {rule.action}{allowed} | {rule.why} |\n")
    ignored = ", ".join(f"`{name}`" for name in IGNORED_BY_BEAM_SEARCH)
    parts.append(
        f"\nBeside `use_beam_search`, whose answers vLLM does not hold to them, these are refused: {ignored}.\n"
    )
    parts.append(
        "\n## Responses\n\n`POST /v1/responses` is vLLM's own, under the same rules (the length of an answer is "
        "`max_output_tokens`), and stateless: `store` of every response is false. What leans on what a server keeps is "
        "501, unless it is null or false:\n\n| field | what to do instead |\n|---|---|\n"
    )
    parts += [f"| `{field}` | {instead} |\n" for field, instead in NOT_SERVED.items()]
    served = ", ".join(f"`{kind}`" for kind in sorted(SERVED_TOOLS))
    parts.append(
        f"\nTools run in the client: types {served}; others, and a `tool_choice` of another type, are 501. An answer of "
        "before that comes back in several parts is 400, as vLLM would read the first alone. Streams are of typed "
        "events; one that breaks off ends in `event: error`, which OpenAI's clients raise. vLLM says what a stream used "
        "in its last event alone: one that breaks off is counted as a token for each difference of a text, and its input "
        "as a quarter of its bytes.\n"
    )
    parts.append(
        "\n## Tokens\n\n`POST /tokenize` (`/v1/tokenize`) and `POST /detokenize` (`/v1/detokenize`) are vLLM's own, for any "
        "model. Chats are rendered by the template of the model that is asked, as for its answers, and fields are refused "
        "as above. Encoders and rerankers take texts alone, and tell the tokens of their own tokenizer; a reranker reads "
        "two texts together, which has more special tokens than each. Requests count against the tenant's limits, and "
        "in its usage without tokens.\n"
    )
    return "".join(parts)


def _body_rows(body: type[BaseModel]) -> Iterator[str]:
    for name, field in body.model_fields.items():
        refusals = [each.description for each in field.metadata if isinstance(each, Only)]
        required = " (required)" if field.is_required() else ""
        yield f"| `{name}` | {field.description or ''.join(refusals)}{required} |\n"


def _first_sentence(operation: dict[str, Any]) -> str:
    text = str(operation.get("description") or operation.get("summary") or "")
    return text.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _any_settings() -> Settings:
    pool = {"id": "any", "kind": "encoder", "base": "any", "engine": {"type": "sentence_transformers"}}
    return Settings.model_validate({"pools": [pool]})


_COCKTAIL_RULES = """
## Examples

| form | pools |
|---|---|
| `{"input": "...", "output": "..."}` | decoder, encoder-decoder |
| `{"prompt": "...", "completion": "..."}` | the same, joined as they are |
| `{"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}` | decoder; text only, the last answer is the output |
| `{"input": "...", "choices": ["...", "..."], "answer": "..."}` | decoder; [decisions](../how-to/decisions.md), see below |
| `{"input": "...", "question": {"type": "predicate", "instructions": "..."}, "answer": true}` | the same; a `question` as `/v1/decisions` takes it, or a text beside `choices` |
| `{"query": "...", "pos": ["..."], "neg": ["..."]}` | encoder, where a single example needs negatives; reranker, where every one does |

What is scored is the text that the model is asked with. `input` and `output` are joined by one space, as LM-Cocktail's reference joins them; by nothing where the
input ends in white space; by the pool's [`example_separator`](config.md), where it has one; or by the row's own `separator`. What joins them is predicted with the
output, as the reference's space is. `prompt` and `completion` are joined as they are, and messages as the chat template renders them: of these the model reads the
very tokens of the prompt that it is served, and the answer is cut behind them, also where the prompt ends in a space.

The loss of a decision is the cross-entropy (nats) of its answer among the options, each read verbatim as `/v1/decisions` reads it: by the chat template where the
pool has one, and else as a text. `choices` are texts, booleans, or `{"value", "description"}`; an `answer` is one of them, of a score a level's label or its
place from 0. A cocktail is weighed by decisions or by outputs, not by both.

Rows that other tools write are taken as they are:

| rows of | what is made of them |
|---|---|
| OpenAI's fine-tuning | The output is the last answer whose `weight` is not 0; what follows it cannot change its loss and is left out. `weight` is 0 or 1, and 1 if left out; 0 on all answers is an error. `tools`, `tool_calls` (as answers too), messages of `tool` and `name` reach the chat template as they do in a request; a template that does not render the calls of the answer is an error. `parallel_tool_calls` is left aside; `functions`, `function_call`, `refusal` and reasoning apart from the content are refused. The content of `system`, `developer` and `tool` may be empty. An empty `prompt` has the loss of the completion alone, given the token that the tokenizer begins a text with; without such a token it is an error. |
| FlagEmbedding's training | Encoders: `prompt` goes before the query, and before the passages too where `type` is `symmetric_sts` or `symmetric_clustering`: its default format of instructions, `{}{}`. For a model with another, write it out in `query` and leave `prompt` out. Rerankers: `query_prompt` and `passage_prompt` likewise; `prompt` is for rerankers that are language models, and not read, as by the trainer of cross-encoders. `pos_scores`, `neg_scores`, `type`, `category`, `batch_size` and `train_group_size` are of the training alone. |
| sentence-transformers' triplets | `anchor` (or `query`), `positive`, and `negative` or `negative_1`, `negative_2`, ... |
| ShareGPT's conversations | `conversations` of `{"from", "value"}`, with `human` and `gpt` (or `user` and `assistant`), and a `system` text. Calls of functions are refused. |

Keys that data sets carry beside these (`id`, `score`, `choices`, `references`) are left aside, and a `weight` of 1, since all rows count the same; any other is an
error, which names the row. Rows of Alpaca, of preferences and of text alone are refused with the row to write instead. The command line takes a file of one JSON array
too; an uploaded file is JSONL.

## What may go together

* `examples` or `merging_weights` or `target` or `recipe`: one of them at least. `target` with `examples` is Eq. 1, alone Eq. 3.
* `merging_weights` excludes `examples`, `target`, `alpha`, `temperature`, `weighting`, `budget` and `experts`: they are the whole mixture, and sum to 1 within 1e-6
  (other rules by [method](methods.md)).
* `recipe` is the whole mixture too: what `GET /v1/cocktails/{ref}/recipe` answers on another server, or the `recipe.json` of a folder that `mix` wrote. It makes the
  same mixture bit for bit. A recipe of another base, dtype or form (merged or not) than the pool's, or of an expert that the pool lacks, is refused with what to do;
  one that was changed on its way is found by its digest. Losses, examples and report do not travel with it.
* `method` `slerp` with examples mixes the base and one expert, named by `experts`; without examples, the base and the `target`.
* `?wait=SECONDS` (0 to 60) waits for `ready`; a job that fails in that time answers with its error. Without it, follow
  `Location`: `GET /v1/cocktails/{ref}?wait=SECONDS` (0 to 60) answers the moment status or progress changes, and at
  once when the job has ended.
* `?dry_run=true` answers losses and weights and keeps nothing.
* The same request again is the same version (200), and becomes current. A change of pool, examples, options or seed is another version.

## Names and versions

`name` means its current version: the newest ready one, or the one that `PATCH {"current": "name@digest8"}` pinned (`null` unpins). A queued or failed version never moves it.
`name@digest8` always means that version. Pools resolve first, so no cocktail may take a pool's name (409).

`GET /v1/cocktails` lists all versions, the newest first. With `?limit=` (1 to 10,000, which is the default) the list
comes in pages: while `has_more`, ask again with `?after=` the `last_id` of the page before, which may have been deleted
meanwhile.
"""


def cocktails_page() -> str:
    """Fields of the request and of the answer, and the rules between them."""
    parts = [
        NOTE,
        "# Cocktails\n\n## Request\n\nBody of `POST /v1/cocktails`; the object `cocktail` in a generation or embedding "
        "request takes the same fields without `name` and `pool`. Options that are left out take the server's "
        "[defaults](config.md#defaults), and the answer says which.\n\n| field | type | meaning |\n|---|---|---|\n",
    ]
    required_first = sorted(CocktailBody.model_fields.items(), key=lambda item: not item[1].is_required())
    parts += [_field_row(name, field) for name, field in required_first]
    parts.append(_COCKTAIL_RULES)
    parts.append("\n## Answer\n\n| field | type | meaning |\n|---|---|---|\n")
    parts += [_field_row(name, field) for name, field in CocktailView.model_fields.items()]
    return "".join(parts)


def _field_row(name: str, field: FieldInfo) -> str:
    required = " (required)" if field.is_required() and field.annotation is str and name in ("name", "pool") else ""
    return f"| `{name}` | {_type_name(field.annotation)} | {field.description or ''}{required} |\n"


def methods_page() -> str:
    """Every merging method with its rule for coefficients and its parameters."""
    parts = [
        NOTE,
        "# Merging methods\n\n`method` and `method_params` of a cocktail. What they compute and cost: "
        "[methods](../explanation/methods.md).\n\n| method | from | coefficients |\n|---|---|---|\n",
    ]
    for method in METHODS.values():
        rule = (
            f"any finite numbers; `{BASE}` is always 1 and may be left out"
            if method.adds_task_vectors
            else f"sum to 1 within {SUM_TOLERANCE:g}"
        )
        count = f", of exactly {method.num_models} models" if method.num_models else ""
        parts.append(f"| `{method.name}` | {method.paper} | {rule}{count} |\n")
    parts.append("\n| method | parameter | range | default | meaning |\n|---|---|---|---|---|\n")
    parts += [
        f"| `{method.name}` | `{name}` | {option.range} | {json.dumps(option.default)} | {option.meaning} |\n"
        for method in METHODS.values()
        for name, option in method.options.items()
    ]
    return "".join(parts)


def adapters_page() -> str:
    """What becomes of every setting of an adapter."""
    parts = [
        NOTE,
        "# LoRA adapters as experts\n\nAn adapter is read as the full model that it makes of the pool's base: what it "
        "adds is computed in float64 and rounded once to float32, what it holds whole takes the base's place, sentence-"
        "transformers modules beside it (`2_Dense`) included. It is the model that peft's `merge_and_unload` makes. Of "
        "tied embeddings that call makes another model than was trained; there it is the one that was trained, or "
        "refused.\n\nWhat no one set of parameters can be, or what would need another base, is refused by name, with what "
        "to do. So is a setting that is not listed here, unless it is off (null, false, zero or empty).\n",
    ]
    for use, title in (("honoured", "Honoured"), ("refused", "Refused"), ("harmless", "Without effect on the model")):
        parts.append(f"\n## {title}\n\n| `adapter_config.json` | |{' what to do |' if use == 'refused' else ''}\n")
        parts.append("|---|---|---|\n" if use == "refused" else "|---|---|\n")
        parts += [
            f"| `{name}` | {field.note} |{f' {field.remedy} |' if field.remedy else ''}\n"
            for name, field in FIELDS.items()
            if field.use == use
        ]
    parts.append(
        "\n## Kinds of `init_lora_weights`\n\n| kind | how the factors begin | if refused, what to do |\n|---|---|---|\n"
    )
    parts += [f"| `{name}` | {init.note} | {init.remedy} |\n" for name, init in INITS.items()]
    return "".join(parts)


def errors_page() -> str:
    """Every class of errors with status, type and code."""
    parts = [
        NOTE,
        '# Errors\n\nEvery error body is `{"error": {"message", "type", "param", "code"}}`. 429 and 503 carry '
        "`Retry-After`; a 409 that no retry can cure carries `x-should-retry: false`. An error after a stream has "
        "begun is sent as one `data:` event with that body, and the stream ends without `[DONE]`. A path that is not "
        "served is 404 `route_not_found`, a method 405 `method_not_allowed`.\n\n"
        "| error | status | type | code | when |\n|---|---|---|---|---|\n",
    ]
    for cls in _subclasses(CocktailError):
        status, kind = HTTP_ERRORS[cls]
        doc = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        parts.append(f"| `{cls.__name__}` | {status} | `{kind}` | `{cls.code}` | {doc} |\n")
    codes = ", ".join(f"`{code}`" for code in exact_codes())
    parts.append(f"\nWhere one class serves several cases, the code is more exact: {codes}.\n")
    parts.append(
        "\n## Errors of vLLM\n\nWhat a decoder's engine answers becomes one of the above, the same in a whole answer and "
        "inside a stream, with its message. A prompt that does not fit is told by vLLM's words for it: 400 "
        f"`{errors.ContextLengthError.code}`.\n\n| status of vLLM | error | status | code |\n|---|---|---|---|\n"
    )
    for cls in sorted(dict.fromkeys(KINDS.values()), key=lambda cls: cls is errors.EngineError):
        statuses = ", ".join(str(int(status)) for status, kind in KINDS.items() if kind is cls)
        told = "any other" if cls is errors.EngineError else statuses
        parts.append(f"| {told} | `{cls.__name__}` | {HTTP_ERRORS[cls].status} | `{cls.code}` |\n")
    return "".join(parts)


def exact_codes() -> list[str]:
    """Codes that are given where an error is raised, over its class's own."""
    sources = Path(errors.__file__).parent.rglob("*.py")
    return sorted({code for source in sources for code in re.findall(r'code="([a-z_]+)"', source.read_text())})


def _subclasses(cls: type[CocktailError]) -> Sequence[type[CocktailError]]:
    """The classes of errors.py that are raised themselves, in the order they are written there."""
    found = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, cls)]
    raised = {errors.InvalidRequestError, errors.ServerError}
    return [error for error in found if error in raised or not error.__subclasses__()]


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


if __name__ == "__main__":
    main()
