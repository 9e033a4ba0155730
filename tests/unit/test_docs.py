"""The documentation says what the code does: generated pages are current, links lead somewhere, settings are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import generate
from tests.docs import pages as written
from tests.docs.journeys import JOURNEYS, NOT_WALKED

ROOT = Path(generate.__file__).parent.parent


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return generate.pages()


@pytest.mark.parametrize(
    "name", ["config.md", "cli.md", "http.md", "cocktails.md", "errors.md", "methods.md", "adapters.md", "models.md"]
)
def test_generated_page_is_up_to_date(name: str, pages: dict[str, str]) -> None:
    committed = (generate.REFERENCE / name).read_text()
    assert committed == pages[name], "run `make docs` and commit what changes"


def test_every_setting_has_a_description() -> None:
    rows = [line for line in generate.config_page().splitlines() if line.startswith("| `")]
    untold = [row for row in rows if row.split("|")[4].strip() == ""]
    assert untold == []


def prose_of(page: Path) -> list[str]:
    """Lines that are neither code nor rows of a table, which cannot be wrapped."""
    parts = page.read_text().split("```")[::2]
    return [line for part in parts for line in part.splitlines() if not line.lstrip().startswith("|")]


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    """So that a change shows as the lines that changed."""
    assert [line for line in prose_of(page) if len(line) > generate.COLUMNS and not line.startswith("<!--")] == []


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page} links to {target}, which is not there"


@pytest.mark.parametrize(("page", "least"), [("security", 15), ("durability", 12)])
def test_a_page_of_promises_names_tests_that_are_there(page: str, least: int) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / f"docs/explanation/{page}.md").read_text())
    assert len(named) >= least
    for path, test in named:
        assert re.search(rf"def {test}\(", (ROOT / path).read_text()), f"{path} has no {test}"


WALKED = {page: journey for journey in JOURNEYS.values() for page in journey.pages}
TYPED = re.compile(r"(cocktail-serve|curl|docker|lm_eval|make|pip|python|vllm) ")


@pytest.mark.parametrize("page", written.pages())
def test_every_command_of_a_page_is_typed_or_says_why_not(page: str) -> None:
    """`tests/docs` types them."""
    found = [block for block in written.blocks(page) if block.language in written.RUN]
    assert (page in WALKED) + (page in NOT_WALKED) == bool(found), "say in tests/docs/journeys.py what becomes of it"
    untold = [line for block in written.blocks(page) if not block.language for line in block.text.splitlines()]
    assert [line for line in untold if TYPED.match(line)] == [], "commands are ```bash"


def test_what_journeys_say_of_pages_is_in_them() -> None:
    for name, journey in JOURNEYS.items():
        commands = [command for page in journey.pages for block in written.blocks(page) for command in block.commands]
        for text in (*journey.changes, *journey.before, *journey.prints, *journey.not_run):
            assert any(text in command for command in commands), f"{name}: no command holds {text!r}"
