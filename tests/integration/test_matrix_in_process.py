"""The encoders and rerankers people have, served: every family of the zoo by the engine inside this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
from cocktail_serve.engines.in_process.reranker_engine import RerankerEngine
from cocktail_serve.recipe import make_recipe
from tests.zoo.families import Family, Zoo, cases
from tests.zoo.making import BASE
from tests.zoo.reference import answers
from tests.zoo.specimens import ENCODERS, RERANKERS, Specimen

TEXTS = ["what is the capital of france", "paris", "my card was stolen ①ﬁ  é"]

TOLERANCE = 1e-4


EVERY_SPECIMEN = pytest.mark.parametrize("specimen", cases([*ENCODERS, *RERANKERS]))


@pytest.fixture
def family(specimen: Specimen, zoo: Zoo) -> Family:
    return zoo.family(specimen)


async def served(config: PoolConfig, mixtures: list[dict[str, float]], cache: Path) -> list[np.ndarray]:
    """What the engine answers to `TEXTS` under each mixture: embeddings, or raw scores of all but the first."""
    pool = open_pool(config, cache_dir=cache)
    is_encoder = pool.kind == "encoder"
    engine = EncoderEngine(pool, config) if is_encoder else RerankerEngine(pool, config)
    await engine.start()
    try:
        said = []
        for mixture in mixtures:
            recipe = make_recipe(pool, mixture, dtype="float32")
            if isinstance(engine, EncoderEngine):
                said.append((await engine.embed(recipe, TEXTS)).vectors)
            else:
                reranked = await engine.rerank(recipe, TEXTS[0], TEXTS[1:], use_activation=False)
                said.append(np.asarray(reranked.scores).reshape(-1, 1))
        return said
    finally:
        await engine.stop()


@EVERY_SPECIMEN
async def test_members_and_mixtures_answer_as_their_library(family: Family, tmp_path: Path) -> None:
    mixtures = [{name: 1.0} for name in (BASE, *family.experts)]
    mixtures.append({BASE: 0.25} | dict.fromkeys(family.experts, 0.75 / len(family.experts)))
    said = await served(family.pool(), mixtures, tmp_path / "cache")
    for mixture, answer in zip(mixtures, said, strict=True):
        expected = answers(family.specimen, family.reference.mixed(mixture), TEXTS)
        np.testing.assert_allclose(answer, expected, rtol=0, atol=TOLERANCE, err_msg=str(mixture))


@EVERY_SPECIMEN
async def test_a_mixture_written_by_mix_is_a_base(family: Family, tmp_path: Path) -> None:
    pool = open_pool(family.pool(), cache_dir=tmp_path / "cache")
    weights = {BASE: 0.4, family.experts[0]: 0.6}
    save_mixture(make_recipe(pool, weights, dtype="float32"), pool, tmp_path / "mixed")
    config = family.pool(family.experts[:1], base=tmp_path / "mixed")
    for mixture, expected in (
        ({BASE: 1.0}, weights),
        ({BASE: 0.5, family.experts[0]: 0.5}, {BASE: 0.2, family.experts[0]: 0.8}),
    ):
        (answer,) = await served(config, [mixture], tmp_path / "cache")
        library = answers(family.specimen, family.reference.mixed(expected), TEXTS)
        np.testing.assert_allclose(answer, library, rtol=0, atol=TOLERANCE, err_msg=str(mixture))
