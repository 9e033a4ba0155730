"""Ratios with paired intervals, and the settings that are shipped."""

from __future__ import annotations

import numpy as np
import pytest

from bench.paper.chat_pool import MAX_CHARACTERS
from bench.paper.figures import averaged, difference_of, mean_of, ratio_of
from bench.paper.setting import FOLDER, load_setting
from cocktail_serve.errors import ConfigError


def test_a_ratio_of_itself_is_one_in_every_draw() -> None:
    rng = np.random.default_rng(0)
    ours, base = {"a": rng.random(40).tolist()}, {"a": (rng.random(40) - 2).tolist()}
    assert ratio_of((ours, base), (ours, base)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_ratio_is_of_means_over_tasks_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(1)
    base = {name: rng.normal(0, 1, 200).tolist() for name in ("a", "b")}
    tuned = {name: (np.asarray(rows) + rng.normal(2, 0.5, 200)).tolist() for name, rows in base.items()}
    half = {name: ((np.asarray(base[name]) + np.asarray(tuned[name])) / 2).tolist() for name in base}
    found = ratio_of((half, base), (tuned, base))
    assert found == {"mean": 0.5, "low": 0.5, "high": 0.5}, "the same rows are drawn for all four"
    noisy = {name: (np.asarray(rows) + rng.normal(0, 1, 200)).tolist() for name, rows in half.items()}
    found = ratio_of((noisy, base), (tuned, base))
    assert found["low"] < 0.5 < found["high"]
    assert found["low"] < found["mean"] < found["high"]


def test_means_weigh_tasks_alike_whatever_their_rows() -> None:
    assert mean_of({"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0]})["mean"] == 50.0
    assert difference_of({"a": [1.0, 0.0]}, {"a": [0.0, 0.0]}, scale=1.0)["mean"] == 0.5
    assert averaged([[0.0, 1.0], [1.0, 1.0]]) == [0.5, 1.0]


@pytest.mark.parametrize("name", ["small", "paper"])
def test_shipped_settings_load_and_name_tasks_once(name: str) -> None:
    setting = load_setting(name)
    for kind in ("decoder", "encoder"):
        pool = setting.pool(kind)
        assert set(pool.targets.values()) <= set(pool.experts)
        assert not set(pool.targets) & {*pool.others, *pool.unseen}
        assert set(pool.alpha_targets) <= set(pool.targets)
    assert setting.alphas[0] == 0.0
    assert setting.alphas[-1] == 1.0
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == ["paper", "small", "smollm2"]


def test_the_chat_models_setting_is_of_tasks_that_no_expert_saw() -> None:
    setting = load_setting("smollm2")
    pool = setting.pool("decoder")
    assert set(pool.experts) == set(MAX_CHARACTERS)
    assert len(pool.unseen) >= 10
    assert not set(pool.unseen) & set(pool.experts)
    with pytest.raises(ConfigError, match="no pool of encoders"):
        setting.pool("encoder")
