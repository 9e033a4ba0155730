"""Results as they are committed: JSON, a Markdown table beside the published figures, small PNG figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.paper import published
from bench.paper.figures import told
from bench.paper.unseen import REFERENCES

NOTE = "Hundredths of accuracy, exact match, F1, ROUGE-L or NDCG@10; 95 % paired bootstrap intervals over rows."


def write(out: Path, name: str, result: Mapping[str, Any], text: str) -> None:
    """Writes `<name>.json` and `<name>.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(text.rstrip() + "\n")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def targets_text(title: str, result: Mapping[str, Any], theirs: Mapping[str, tuple[float, float]]) -> str:
    """Tables 1 and 2."""
    has_loss = any("target_loss" in row for row in result["rows"].values())
    head = ["system", "target", "other tasks", *(["target, loss", "others, loss"] if has_loss else [])]
    head += ["published: target", "published: others"]
    rows = []
    for label, row in result["rows"].items():
        line = [label, told(row["target"]), told(row["others"])]
        if has_loss:
            line += [told(row["target_loss"], 2), told(row["others_loss"], 2)]
        rows.append(
            [*line, *(f"{value:.1f}" for value in theirs.get(label, ())), *([""] * (2 * (label not in theirs)))]
        )
    claims = [
        [
            label,
            *(told(claim[name], 2) if name in claim else "" for name in ("gain_kept", "won_back")),
            *([told(claim[name], 2) for name in ("gain_kept_loss", "won_back_loss")] if has_loss else []),
            *(told(claim[name]) if name in claim else "" for name in ("target_less_2", "others_less_2")),
        ]
        for label, claim in result["claims"].items()
    ]
    claims_head = ["system", "gain kept", "loss elsewhere won back"]
    claims_head += ["the same, by loss", "the same, by loss"] if has_loss else []
    claims_head += ["target, less LM-Cocktail 2", "others, less LM-Cocktail 2"]
    return (
        f"# {title}\n\n{NOTE} Means over {len(next(iter(result['rows'].values()))['by_target'])} targets. Published: "
        f"{published.SOURCE}, another model on other tasks.\n\n{markdown(head, rows)}\n"
        "Shares: 1 is all of the fine-tuned model's gain on its target over the base, and all of what it lost "
        "elsewhere.\n\n"
        f"{markdown(claims_head, claims)}"
    )


def tasks_text(title: str, result: Mapping[str, Any]) -> str:
    """Tables 8 and 9."""
    rows = [
        [row["system"], row["target"], *(f"{row['scores'][task]:.1f}" for task in result["tasks"])]
        if row["system"] not in ("base", "in-context examples", "multitask")
        else [row["system"], "", *(f"{row['scores'][task]:.1f}" for task in result["tasks"])]
        for row in result["rows"]
    ]
    return f"# {title}\n\n{NOTE}\n\n{markdown(['system', 'made for', *result['tasks']], rows)}"


def unseen_text(title: str, groups: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, float]) -> str:
    """Tables 3 and 4: the tasks nobody was tuned on, then those whose expert is left out."""
    parts = [f"# {title}\n\n{NOTE} Published: {published.SOURCE}, another model on other tasks.\n"]
    for heading, result in groups.items():
        has_loss = any("loss" in row for row in result["rows"].values())
        head = ["system", "score", *(f"less {name}" for name in REFERENCES), "published"]
        rows = []
        for label, row in result["rows"].items():
            line = [label, told(row["score"])]
            line += [told(row[f"less {name}"]) if f"less {name}" in row else "" for name in REFERENCES]
            rows.append([*line, f"{theirs[label]:.1f}" if label in theirs else ""])
        parts.append(f"\n## {heading}\n\n{', '.join(result['tasks'])}\n\n{markdown(head, rows)}")
        if has_loss:
            head = ["system", "loss", *(f"less {name}" for name in REFERENCES)]
            rows = [
                [
                    label,
                    told(row["loss"], 3),
                    *(told(row[f"loss less {name}"], 3) if name != label else "" for name in REFERENCES),
                ]
                for label, row in result["rows"].items()
            ]
            parts.append(f"\nThe same by loss, nats per token: less is better.\n\n{markdown(head, rows)}")
    return "".join(parts)


def weightings_text(title: str, result: Mapping[str, Any]) -> str:
    """Weightings beside base, best single expert, softmax at its best and tuning, by number of examples."""
    parts = [
        f"# {title}\n\nLoss of the answer in nats per token, mean over tasks, each a mean over draws of its examples; "
        "95 % paired bootstrap intervals over rows. Below: in how many trials (draws of tasks) a system lost less.\n"
    ]
    for num, of_count in result.items():
        rows, num_trials = of_count["rows"], len(of_count["trials"])
        references = list(dict.fromkeys(key for row in rows.values() for key in row if key.startswith("less ")))
        tasks = list(next(iter(rows.values()))["tasks"])
        parts.append(f"\n## {num} examples\n\n{num_trials} trials of {len(tasks)} tasks.\n\n")
        parts.append(
            markdown(
                ["system", "loss", *references, "below base", "below best single"],
                [
                    [
                        label,
                        told(row["loss"], 3),
                        *(told(row[key], 3) if key in row else "" for key in references),
                        *(f"{row[key]} of {num_trials}" for key in ("below base", "below best single")),
                    ]
                    for label, row in rows.items()
                ],
            )
        )
        by_task = [[label, *(f"{row['tasks'][task]:.3f}" for task in tasks)] for label, row in rows.items()]
        parts.append(f"\nBy task:\n\n{markdown(['system', *tasks], by_task)}")
        for rule in of_count["rules"]:
            lessened = "; ".join(f"{key} {told(rule[key], 3)}" for key in rule if key.startswith("less "))
            parts.append(
                f"\nOf the weightings **{rule['rule']}** loses least on {', '.join(rule['chosen on'])}. On "
                f"{', '.join(rule['reported on'])} it loses {told(rule['loss'], 3)}: {lessened}; below the base in "
                f"{rule['below base']} of {rule['trials']} trials, below the best single expert in "
                f"{rule['below best single']}.\n"
            )
    return "".join(parts)


def counts_text(title: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Table 5."""
    parts = [f"# {title}\n\n{NOTE}\n"]
    for heading, result in groups.items():
        columns = [key for key in next(iter(result["rows"].values())) if key != "num_examples"]
        rows = [
            [label, *([str(row["num_examples"])] if "num_examples" in row else []), *(told(row[c], 2) for c in columns)]
            for label, row in result["rows"].items()
        ]
        head = ["temperature, examples"]
        head += ["examples taken"] if "num_examples" in next(iter(result["rows"].values())) else []
        parts.append(f"\n## {heading}\n\n{', '.join(result['tasks'])}\n\n{markdown([*head, *columns], rows)}")
    return "".join(parts)


def alphas_text(title: str, result: Mapping[str, Any]) -> str:
    """Figures 2 and 3 as a table."""
    rows = [[f"{point['alpha']:g}", told(point["target"]), told(point["others"])] for point in result["points"]]
    return (
        f"# {title}\n\n{NOTE} Targets: {', '.join(result['targets'])}.\n\n"
        f"{markdown(['alpha', 'target', 'other tasks'], rows)}"
    )


def trials_text(title: str, result: Mapping[str, Any]) -> str:
    """How often each advice was given and right."""
    advices = ("use", "use_expert", "unsure", "no_gain")
    rows = [
        [name, str(group["trials"]), f"{group['better']}"]
        + [f"{group['advice'][a]['better']} of {group['advice'][a]['given']}" for a in advices]
        + [f"{group['advice']['use_expert']['expert_better']} of {group['advice']['use_expert']['given']}"]
        for name, group in result["summary"].items()
    ]
    head = ["trials", "number", "mixture better than base", *(f"better where `{advice}`" for advice in advices)]
    head += ["that expert better than the mixture where `use_expert`"]
    by_score = [
        [name, *(f"{group['advice'][a]['not_worse_by_score']} of {group['advice'][a]['given']}" for a in advices)]
        for name, group in result["summary"].items()
    ]
    picked = [
        [
            name,
            *(
                f"{of_name[way]['right']} of {of_name[way]['given']}"
                for way in ("shipped", "picked on the other tasks")
            ),
        ]
        for name, of_name in result["thresholds"].items()
    ]
    made_with = ", ".join(
        f"{name} {value:g}" if name == "temperature" else f"{name} {value}" for name, value in result["options"].items()
    )
    return (
        f"# {title}\n\nCocktails made with {made_with}. Better: less loss "
        f"on the test rows (decoders), higher NDCG@10 (encoders).\n\n{markdown(head, rows)}\n"
        "The same by the task's score: no worse than the base's.\n\n"
        f"{markdown(['trials', *(f'no worse where `{advice}`' for advice in advices)], by_score)}\n"
        "How often a mixture said to be better than the base is right: with the "
        "thresholds as they are, and with those picked, for each task, on the trials of all other tasks.\n\n"
        f"{markdown(['right', 'as they are', 'picked on the other tasks'], picked)}"
    )


def plot_alphas(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Target and other tasks by alpha, with intervals."""
    figure, axes = _axes(title)
    alphas = [point["alpha"] for point in result["points"]]
    for name, label in (("target", "target task"), ("others", "other tasks")):
        values = [point[name] for point in result["points"]]
        axes.plot(alphas, [value["mean"] for value in values], marker="o", label=label)
        axes.fill_between(alphas, [v["low"] for v in values], [v["high"] for v in values], alpha=0.2)
    axes.set_xlabel("alpha: share of the fine-tuned model")
    _save(figure, axes, path)


def plot_targets(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Figure 1: each system as a point, the target's score against the other tasks'."""
    figure, axes = _axes(title)
    for label, row in result["rows"].items():
        target, others = row["target"], row["others"]
        axes.errorbar(
            others["mean"],
            target["mean"],
            xerr=[[others["mean"] - others["low"]], [others["high"] - others["mean"]]],
            yerr=[[target["mean"] - target["low"]], [target["high"] - target["mean"]]],
            fmt="o",
            capsize=2,
            label=label,
        )
    axes.set_xlabel("mean of the other tasks")
    axes.set_ylabel("target task")
    _save(figure, axes, path)


def _axes(title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
