"""What the installed client of OpenAI is tested with, by the newest release of it."""

from __future__ import annotations

import pytest

from tests import other_packages

BY_THE_CLIENT = ("openai", "responses", "fine_tuning", "files", "batches")
"""Tests that ask by it, and in strict validation where it matters."""


@pytest.mark.full
def test_the_newest_client_notices_no_difference() -> None:
    version = other_packages.run(other_packages.OPENAI, ["-c", "import openai; print(openai.__version__)"])
    assert f"openai=={version.strip()}" in other_packages.OPENAI
    files = [f"tests/integration/test_gateway_{name}.py" for name in BY_THE_CLIENT]
    said = other_packages.run(other_packages.OPENAI, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files])
    assert " passed" in said
