"""What follows from results: differences, claims, when a ranking settles, where nothing is won."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median

from benchmarks.common.tables import markdown_table
from benchmarks.compare.statistics import (
    Difference,
    Value,
    accuracy,
    after_cut,
    difference,
    median_and_range,
    select,
    time_to_full,
    time_to_small,
    values_of,
)
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import FULL, SMALL, Result

OURS, PUBLISHED, DEFAULTS, LATER = "ours", "published", "defaults", "defaults-late"
POST_TRAINING = "post-training"
# Which of ours, against whom, by which value, and what that is called.
COMPARISONS: tuple[tuple[str, str, Value, str], ...] = (
    (OURS, PUBLISHED, accuracy, "CompreSSM as published"),
    (OURS, PUBLISHED, after_cut, "as published, right after the cut"),
    (POST_TRAINING, f"{POST_TRAINING}-published", accuracy, "as published, trained networks cut"),
    (OURS, SMALL, accuracy, "small from scratch"),
    (OURS, "distillation", accuracy, "distillation"),
    (OURS, POST_TRAINING, accuracy, "post-training truncation"),
    (OURS, "regularizer", accuracy, "HSV regularisation"),
)
Results = Sequence[Result]
Tasks = Sequence[CompareTask]


def compare(
    results: Results,
    task: CompareTask,
    size: int | None,
    other: str,
    value: Value,
    one: str = OURS,
) -> Difference | None:
    """One arm minus another at one size."""
    ours, theirs = (select(results, task=task.name, arm=a, size=size) for a in (one, other))
    return difference(ours, theirs, value)


def differences(tasks: Tasks, results: Results) -> str:
    """Ours against every other arm, seed by seed."""
    rows = []
    for task in tasks:
        for size in task.sizes:
            found = [compare(results, task, size, o, v, one) for one, o, v, _ in COMPARISONS]
            if any(found):
                rows.append((f"{task.name}, {size}", *(points(d) for d in found)))
    if not rows:
        return ""
    header = ("task, states", *(label for *_, label in COMPARISONS))
    return (
        "## Ours against the others\n\nPoints of test accuracy, ours minus the other arm, mean "
        "over the seeds ± standard error. **Bold**: more than two standard errors. Trained "
        "networks cut: both forms of truncation after the full training, none after them.\n\n"
        + markdown_table(header, rows)
    )


def against_ours(tasks: Tasks, results: Results) -> str:
    """Every arm that ends with a given size: its accuracy, and its difference to ours."""
    columns = [(task, size) for task in tasks for size in task.sizes]
    arms = dict.fromkeys(r.arm for r in sorted(results, key=lambda r: r.arm != OURS) if r.size)
    rows = [
        (f"`{arm}`", *(_accuracy_and_gap(results, task, size, arm) for task, size in columns))
        for arm in arms
    ]
    return (
        "## Every arm against ours\n\nMean test accuracy; in brackets points more than ours, "
        "mean over the seeds ± standard error. **Bold**: more than two standard errors.\n\n"
        + markdown_table(("arm", *(f"{task.name}, {size}" for task, size in columns)), rows)
    )


def _accuracy_and_gap(results: Results, task: CompareTask, size: int, arm: str) -> str:
    runs = select(results, task=task.name, arm=arm, size=size)
    if not runs:
        return ""
    text = f"{mean(values_of(runs, accuracy)):.3f}"
    gap = compare(results, task, size, OURS, accuracy, arm) if arm != OURS else None
    return f"{text} ({points(gap)})" if gap else text


def later(tasks: Tasks, results: Results) -> str:
    """All defaults in a later window against all defaults."""
    rows = []
    for task in tasks:
        gap = compare(results, task, None, DEFAULTS, accuracy, LATER)
        if gap is None:
            continue
        runs = [select(results, task=task.name, arm=arm, size=None) for arm in (DEFAULTS, LATER)]
        rows.append(
            (
                f"{task.name}, {task.d_state}",
                *(f"{mean(mean(r.states) for r in group):.0f}" for group in runs),
                points(gap),
                *(median_and_range(values_of(group, time_to_full)) for group in runs),
            )
        )
    if not rows:
        return ""
    header = ("task, states", "left", "left, later", "points", "time / full", "time / full, later")
    return (
        "## The default window and a later one\n\nAll defaults, and the same with "
        "`window=(0.3, 0.4)`: mean states of a layer that are left by the same tolerance, test "
        "accuracy of later minus default (as in the table before), and training time.\n\n"
        + markdown_table(header, rows)
    )


def points(gap: Difference | None) -> str:
    """In percentage points."""
    if gap is None:
        return ""
    text = f"{100 * gap.mean:+.1f}"
    if gap.error is not None:
        text += f" ± {100 * gap.error:.1f}"
    return f"**{text}**" if gap.verdict in ("better", "worse") else text


def claims(tasks: Tasks, results: Results) -> str:
    """The authors' figures beside ours."""
    rows = [
        (
            "accuracy kept at a small size",
            "sequential CIFAR-10: 86.5% full, 85.7% with a quarter of the states",
            _each(tasks, results, lambda t: _means(results, t, (FULL, OURS))),
        ),
        (
            "the same size from scratch",
            "81.8% where compressed has 85.7%",
            _each(tasks, results, lambda t: _means(results, t, (SMALL, OURS))),
        ),
        (
            "training time, full / compressed",
            "up to 1.5 (images), about 4 (Mamba, 128 to about 12 states)",
            _each(tasks, results, lambda t: _speedup(results, t)),
        ),
        (
            "training time, HSV regularisation / ours",
            "40",
            _each(tasks, results, lambda t: _step_ratio(results, t)),
        ),
        (
            "distillation",
            "less accurate than compressed",
            _each(tasks, results, lambda t: _means(results, t, ("distillation", OURS))),
        ),
    ]
    return (
        "## Published claims\n\nThe authors' figures are theirs, at their scale (arXiv 2510.02823 "
        "and the README of its code); none was measured here. Accuracies here are at the smallest "
        "size of each task.\n\n" + markdown_table(("claim", "authors", "here (CPU, small)"), rows)
    )


def _each(tasks: Tasks, results: Results, cell: Callable[[CompareTask], str]) -> str:
    cells = ((task.name, cell(task)) for task in tasks)
    return "\n".join(f"{name}: {text}" for name, text in cells if text)


def _means(results: Results, task: CompareTask, arms: tuple[str, str]) -> str:
    size = min(task.sizes)
    texts = []
    for arm in arms:
        runs = select(results, task=task.name, arm=arm, size=None if arm == FULL else size)
        if not runs:
            return ""
        texts.append(f"{arm} {100 * mean(values_of(runs, accuracy)):.1f}%")
    return ", ".join(texts)


def _speedup(results: Results, task: CompareTask) -> str:
    runs = select(results, task=task.name, arm=OURS, size=min(task.sizes))
    ratios = [1 / r for r in values_of(runs, time_to_full) if r]
    return median_and_range(ratios)


def _step_ratio(results: Results, task: CompareTask) -> str:
    size = min(task.sizes)
    penalized = select(results, task=task.name, arm="regularizer", size=size)
    ours = {r.seed: r.cpu for r in select(results, task=task.name, arm=OURS, size=size)}
    return median_and_range([r.cpu / ours[r.seed] for r in penalized if ours.get(r.seed)])


def settling(tasks: Tasks, results: Results) -> str:
    """How much of the finally dominant subspace is dominant already, over training."""
    rows, shares = [], []
    for task in tasks:
        runs = [r for r in select(results, task=task.name, arm=FULL, size=None) if r.curves]
        if not runs:
            continue
        shares = runs[0].curves["shares"]
        for size in task.sizes:
            curves = [r.curves["overlap"][str(size)] for r in runs]
            means = [mean(values) for values in zip(*curves, strict=True)]
            rows.append((f"{task.name}, {size}", *(f"{value:.2f}" for value in means)))
    if not rows:
        return ""
    header = ("task, states", *(f"{share:.0%}" for share in shares))
    return (
        "## When is it settled which states matter?\n\nIn the full model without any reduction: "
        "the share (mean squared cosine of the principal angles) of the subspace of so many "
        "balanced states, first layer, that lies in the one of the end, over the training; mean "
        "over the seeds. Two random subspaces would share about the number of states over the "
        "state dimension.\n\n" + markdown_table(header, rows)
    )


def where_it_does_not_help(tasks: Tasks, results: Results) -> str:
    """Every place in the tables where another way is as good or better, or nothing gets faster."""
    lines = [line for task in tasks for line in _losses(results, task)]
    if not lines:
        return ""
    listed = "\n".join(f"- {line}" for line in lines)
    return (
        "## Where it does not help\n\nFrom the tables above, by rule: small from scratch, "
        "distillation and post-training truncation where ours is not better by more than two "
        "standard errors; all other ways of the table of differences where ours is worse by as "
        f"much; and all times that reducing does not shorten by a tenth.\n\n{listed}\n"
    )


def _losses(results: Results, task: CompareTask) -> Iterable[str]:
    simpler = {
        SMALL: "small from scratch",
        "distillation": "distillation",
        POST_TRAINING: "post-training truncation",
    }
    for size in task.sizes:
        where = f"`{task.name}`, {size} states"
        for other, label in simpler.items():
            gap = compare(results, task, size, other, accuracy)
            if gap is None or gap.verdict in ("better", "one seed"):
                continue
            how = "is better" if gap.verdict == "worse" else "is as good, within noise"
            yield f"{where}: {label} {how} (ours {points(gap)} points)."
        for one, other, value, label in COMPARISONS:
            gap = compare(results, task, size, other, value, one)
            if gap is not None and gap.verdict == "worse" and other not in simpler:
                yield f"{where}: {label}: better than ours (ours {points(gap)} points)."
        runs = select(results, task=task.name, arm=OURS, size=size)
        slow = values_of(runs, time_to_full)
        if slow and median(slow) > 0.9:
            yield f"{where}: training takes {median(slow):.2f} of the full time."
        small = values_of(runs, time_to_small)
        if small and median(small) > 1.5:
            yield (
                f"{where}: training takes {median(small):.2f} times as long as that of the small "
                "model."
            )
    runs = select(results, task=task.name, arm=DEFAULTS, size=None)
    slow = values_of(runs, time_to_full)
    if slow and median(slow) > 0.9:
        yield f"`{task.name}`, all defaults: training takes {median(slow):.2f} of the full time."
