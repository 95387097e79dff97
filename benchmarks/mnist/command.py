"""Sequential MNIST by the published recipe: every arm, resumable, several at a time.

`python -m benchmarks.mnist` needs the four files of MNIST (benchmarks/README.md says where), or
fetches them (`--download`). A second call goes on where the first one ended. A step of the full
model takes some 45 ms on one core: all arms with 50,000 steps take about two hours of one core,
with 200,000 about eight.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.command import check_least, make_console, one_of, parse, prepare
from benchmarks.common.pages import MNIST, write_part
from benchmarks.common.processes import start
from benchmarks.common.tables import markdown_table, rich_table
from benchmarks.data import SMNISTDataModule
from benchmarks.mnist.arms import ARMS
from benchmarks.mnist.run import CHUNK, LAST, Result, folder_of, train
from benchmarks.mnist.steps import step_ratios

HEADER = (
    "arm", "states", "test accuracy", "best on validation", "published", "time / full",
    "full step / its own", "looks, swaps",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        arms: Which ones, in this order.
        seeds: Each fixes initialisation, order of the batches and dropout.
        steps: Optimizer steps of every training; the published runs have 200000.
        workers: Trainings at a time, each on one thread.
        root: Folder with MNIST/raw.
        download: Fetch the files of MNIST if they are missing.
        output: Folder of checkpoints and results.
        page: Also write the table into this Markdown file, where it has the marks for it.
    """

    arms: tuple[str, ...] = one_of(tuple(ARMS), ARMS)
    seeds: tuple[int, ...] = (0,)
    steps: int = 50_000
    workers: int = 2
    root: Path = Path("data")
    download: bool = False
    output: Path = Path("results/mnist")
    page: Path | None = None

    def __post_init__(self) -> None:
        check_least(
            "--steps", 20 * CHUNK, [self.steps], ": a tenth of the run needs a few readings"
        )
        check_least("--workers", 1, [self.workers])


Ratio = tuple[float, float, float]


def rows_of(
    results: Sequence[Result], ratios: Mapping[str, Ratio] | None = None
) -> list[tuple[str, ...]]:
    """One line for each result, in the order of the arms.

    Args:
        results: Of any seeds.
        ratios: Arm -> a step of the full network over one of its own: median, smallest, largest.
    """
    full = {r.seed: r for r in results if r.arm == "full"}
    order = list(ARMS)
    return [
        _row(r, full.get(r.seed), (ratios or {}).get(r.arm))
        for r in sorted(results, key=lambda r: order.index(r.arm))
    ]


def _row(result: Result, full: Result | None, ratio: Ratio | None) -> tuple[str, ...]:
    arm = ARMS[result.arm]
    path = [arm.d_state, *(event["new_state_dim"] for event in result.history)]
    cut = result.states < arm.d_state
    return (
        arm.label,
        " → ".join(str(n) for n in dict.fromkeys(path)),
        _percent(result.accuracy),
        _percent(result.best_accuracy),
        "" if arm.published is None else f"{arm.published:.1f}",
        "" if full is None else f"{result.seconds / full.seconds:.2f}",
        "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio),
        f"{result.analysis:.1%}" if cut else "",
    )


def _ratios(results: Sequence[Result], settings: Settings) -> dict[str, Ratio]:
    """Of the first seed, if the full network is there to compare with."""
    first = [r for r in results if r.seed == settings.seeds[0]]
    if not any(r.arm == "full" for r in first):
        return {}
    prepare()

    def last(result: Result) -> Path:
        folder = folder_of(settings.output, result.arm, result.seed, result.steps)
        return folder / f"{LAST}.ckpt"

    return step_ratios(first, settings.root, last)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def note(settings: Settings) -> str:
    """What the table is about."""
    return (
        f"CPU, one thread for each training, {settings.steps:,} steps (published: 200,000), seeds "
        f"{', '.join(map(str, settings.seeds))}. Test accuracy in percent: of the last weights, "
        "and of those that validated best. Time: processor seconds of training, looks and swaps "
        "included. Full step / its own: training steps of the networks that are left, taken in "
        "turn, median (smallest to largest). Looks, swaps: their share of the training, "
        "by the clock on the wall."
    )


def prepare_files(settings: Settings) -> None:
    """Fetch and unpack, before several processes read."""
    SMNISTDataModule(root=str(settings.root), download=settings.download).prepare_data()


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "mnist", __doc__, arguments)
    console = make_console()
    prepare_files(settings)
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(settings.workers, context, start) as pool:
        jobs = [
            pool.submit(train, arm, seed, settings.steps, settings.root, settings.output)
            for seed in settings.seeds
            for arm in settings.arms
        ]
        for job in as_completed(jobs):
            results.append(job.result())
            latest = results[-1]
            console.log(f"{latest.arm}, seed {latest.seed}: {_percent(latest.accuracy)}")
    rows = rows_of(results, _ratios(results, settings))
    console.print(
        rich_table(HEADER, rows, words=2, title="Sequential MNIST", caption=note(settings))
    )
    if settings.page is not None:
        table = markdown_table(HEADER, rows)
        write_part(settings.page, MNIST, f"{note(settings)}\n\n{table}")
        console.print(f"Wrote {settings.page}")
    return 0
