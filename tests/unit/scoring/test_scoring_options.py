"""Options of questions in tokens, and the probabilities that come of their log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cocktail_serve.decisions import PosedQuestion, Reading, pose
from cocktail_serve.errors import ContextLengthError, InvalidRequestError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.questions import Option, Question
from cocktail_serve.scoring.decoder import tokenize_examples
from cocktail_serve.scoring.options import TokenizedOptions, log_probabilities, tokenize_options
from tests.models import CHAT_TEMPLATE, make_decoder_tokenizer

THINKING = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Of a model that may think before it answers: a finished turn has an empty thought."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_decoder_tokenizer()


def posed(*options: str, reading: Reading = "verbatim", **how: Any) -> PosedQuestion:
    question = Question("which is it", tuple(map(Option, options)))
    return pose((("user", "the film was a joy"),), question, reading=reading, **{"form": "text", **how})


def tokenized(
    tokenizer: PreTrainedTokenizerFast, *questions: PosedQuestion, max_tokens: int = 255, **options: Any
) -> list[TokenizedOptions]:
    return [
        tokenize_options(tokenizer, question, index=index, max_tokens=max_tokens, **options)
        for index, question in enumerate(questions)
    ]


@pytest.mark.parametrize("form", ["text", "chat"])
def test_verbatim_the_tokens_are_those_of_examples(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    question = posed("good", "good enough", "bad", form=form)
    template = ChatTemplate(CHAT_TEMPLATE)
    (options,) = tokenized(tokenizer, question, chat_template=template)
    examples = tokenize_examples(tokenizer, ExampleSet.of(question.examples), max_tokens=255, chat_template=template)
    assert options.sequences == examples
    assert len({tuple(rest[:1]) for rest in options.continuations}) > 1, "the prompt holds all that they share"
    assert options.num_tokens == len(options.prompt) + sum(map(len, options.continuations))
    assert options.labels == []


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING.text])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_labels_are_told_apart_by_one_token(tokenizer: PreTrainedTokenizerFast, form: str, template: str) -> None:
    question = posed("good", "bad", "so so", reading="labels", form=form)
    (options,) = tokenized(tokenizer, question, chat_template=ChatTemplate(template))
    assert [tokenizer.decode([label]).strip() for label in options.labels] == ["A", "B", "C"]
    shown = tokenizer.decode(options.prompt)
    assert "B. bad" in shown
    assert (options.continuations, options.num_tokens) == ([], len(options.prompt))
    if form == "chat" and template == THINKING.text:
        assert shown.endswith("<think></think>")


def test_letters_that_are_no_tokens_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Lower:
        eos_token_id = None
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            ids = [1 if character.isalpha() else 0 for character in text]
            return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}

    question = posed("good", "bad", reading="labels")
    with pytest.raises(InvalidRequestError, match=r"questions\[1\].*letters AB.*verbatim") as caught:
        tokenize_options(Lower(), question, index=1, max_tokens=255)  # type: ignore[arg-type]
    assert caught.value.param == "questions.1"


def test_an_option_longer_than_the_context_names_its_question(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ContextLengthError, match=r"questions\[1\].*at most 64 can be read") as caught:
        tokenized(tokenizer, posed("good", "bad"), posed("good", "bad " * 60), max_tokens=64)
    assert caught.value.param == "questions.1"


@given(st.lists(st.floats(-1e6, 0), min_size=2, max_size=400))
def test_probabilities_sum_to_one(log_probs: list[float]) -> None:
    probabilities = np.exp(log_probabilities(log_probs))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert (np.diff(probabilities[np.argsort(log_probs)]) >= 0).all()


def test_what_can_hardly_be_said_at_all_is_compared_all_the_same() -> None:
    assert np.exp(log_probabilities([-2000.0, -2000.0 - np.log(3)])) == pytest.approx([0.75, 0.25])
