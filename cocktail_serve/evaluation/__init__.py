"""Whether a cocktail helps: systems made for tasks and measured on held-out rows, in memory or on a running server.

The command is `cocktail-serve eval` (docs/how-to/evaluate.md). The same from Python::

    from pathlib import Path

    from cocktail_serve.config import load_settings
    from cocktail_serve.evaluation.intervals import paired_difference
    from cocktail_serve.evaluation.measure import Measuring
    from cocktail_serve.evaluation.report import Report
    from cocktail_serve.evaluation.runs import Entry, open_evaluation, run
    from cocktail_serve.evaluation.systems import SYSTEMS, find_systems
    from cocktail_serve.evaluation.tasks import load_task, sample_examples

    settings = load_settings("small.yaml")
    folder = Path("data/ag_news")                         # test.jsonl and train.jsonl
    task = load_task(folder, "decoder", limit=200, seed=0)
    entry = Entry(task, sample_examples(folder, "decoder", num=5, seed=0), target="ag-news")
    with open_evaluation(settings, "small", out=Path("runs/small"), multitask=Path("multitask")) as evaluation:
        # all at once, with tables, intervals and files
        result = run(evaluation, [entry], find_systems(None, "decoder"), temperatures=(5.0, 0.5), cross=False)
        Report(result).write(Path("runs/small"))

        # or one by one: a system is made for a task (`occasion`), then measured on any task
        occasion = evaluation.occasion(entry, temperature=0.5, alpha=0.5)
        contender = evaluation.make(SYSTEMS["lm-cocktail-10"], occasion)
        cell = evaluation.measure("lm-cocktail-10", contender, task)
        cell.metrics["accuracy"]                          # one value for each row
        cell.about["merging_weights"]

What was measured is kept under `out/cells` by content (recipe, rows, settings): a run that was broken off goes on, and
two systems that come to the same recipe are measured once. `intervals` gives paired bootstrap intervals of such rows.

Layers: `tasks` and `metrics` know no models; `systems` make mixtures through a `backend` (`in_memory` or `served`);
`measure` asks a backend for answers; `runs` does all of it; `report` and `plots` show it.
"""
