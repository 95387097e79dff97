"""Cut Mamba layers that recall pairs by their states, by every criterion, and compare.

`python -m benchmarks.mqar` trains a net of two layers for each kind and seed (the weights are kept
in the output folder, so that a second call goes on where the first one ended), cuts copies of it,
and trains the cut ones and the uncut one for a tenth of the steps more. It needs mamba-ssm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import mean

from benchmarks.common.command import make_console, parse, prepare
from benchmarks.common.cuts import AS_TRAINED, Cut, make_rows, print_table, select, write_files
from benchmarks.models.language import Kind
from benchmarks.mqar.run import DEFAULT, TARGET_DIM, Run, Settings

KEPT_ACCURACY = 0.95
LOSS_RATIO = 1.15


def note(run: Run) -> str:
    recipe, sizes = run.recipe, run.sizes
    return (
        f"CPU. Two {run.kind} layers, N={sizes.d_state}, H={sizes.d_model}; {recipe.pairs} "
        f"pairs in {recipe.length} steps, {recipe.n_tokens} tokens; {run.steps} steps of training. "
        f"Rows but the default: without refit. Every row with max_output_error=None, so that none "
        f"keeps more states than it shows. Test accuracy and loss over all queries: means over "
        f"seeds {', '.join(map(str, run.settings.seeds))}."
    )


def verdict(kind: Kind, cuts: Sequence[Cut]) -> tuple[bool, str]:
    """Whether the default meets the kind's target at `TARGET_DIM` states, and a line about it."""
    full, cut = select(cuts, AS_TRAINED), select(cuts, DEFAULT, TARGET_DIM)
    if kind == "mamba1":
        kept = mean(c.accuracy for c in cut) / mean(c.accuracy for c in full)
        return kept >= KEPT_ACCURACY, (
            f"mamba1: {kept:.1%} of the accuracy kept; the target is {KEPT_ACCURACY:.0%}"
        )
    ratio = mean(c.loss for c in cut) / mean(c.loss for c in full)
    return ratio <= LOSS_RATIO, (
        f"mamba2: {ratio:.2f} times the loss of the uncut; the target is {LOSS_RATIO:g}"
    )


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "mqar", __doc__, arguments)
    console = make_console()
    prepare()
    missed = 0
    for kind in settings.kinds:
        run = Run(kind, settings, console)
        cuts = run.measure()
        rows = make_rows(cuts)
        print_table(rows, f"{kind}: recall right after one cut, on the CPU", console)
        console.print(note(run))
        stem = settings.output / f"mqar_{kind}"
        for path in write_files(
            stem, rows, cuts, {**asdict(settings), **asdict(run.sizes)}, note(run)
        ):
            console.print(f"Wrote {path}")
        if settings.target:
            met, line = verdict(kind, cuts)
            console.print(line)
            missed += not met
    return int(missed > 0)
