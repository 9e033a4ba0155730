"""Figures 2 and 3: the share of the fine-tuned model, from 0 (the base) to 1."""

from __future__ import annotations

from typing import Any

from bench.paper.figures import mean_of
from bench.paper.session import Scores, Session, System
from bench.paper.targets import on_others, on_target


def figure(session: Session) -> dict[str, Any]:
    """Target and other tasks of LM-Cocktail 2 by alpha, mean over the setting's targets."""
    pool, setting = session.pool, session.setting
    points = []
    for number, alpha in enumerate(setting.alphas):
        session.report("alpha", number, len(setting.alphas))
        system = System("LM-Cocktail 2", "lm-cocktail-2", {"alpha": alpha})
        of_targets: dict[str, dict[str, Scores]] = {}
        for target in pool.alpha_targets:
            contender = session.make(system, target, seed=setting.seeds[0])
            of_targets[target] = {
                task: session.measure(contender, task, elsewhere=task != target)
                for task in [*pool.targets, *pool.others]
            }
        points.append(
            {"alpha": alpha, "target": mean_of(on_target(of_targets)), "others": mean_of(on_others(of_targets))}
        )
    session.report("alpha", len(setting.alphas), len(setting.alphas))
    return {"targets": pool.alpha_targets, "points": points}
