"""The published runs and their small twins as data.

One place for all figures, so that files for the same task can't drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Scale = Literal["full", "cpu"]
Options = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What differs between a published run and its twin on a CPU.

    Attributes:
        data: Data module and its arguments, batch size included.
        sizes: d_model, d_state, n_blocks.
        steps: Optimizer steps.
        lr: Peak learning rate.
        validate: Steps between validations.
        every: Steps between looks at the spectra.
        window: Steps between which the run is reduced.
        inputs: Where they are not the task's.
    """

    data: tuple[str, Options]
    sizes: tuple[int, int, int]
    steps: int
    lr: float
    validate: int
    every: int
    window: tuple[int, int]
    inputs: Options | None = None


@dataclass(frozen=True)
class Task:
    """One task, at both scales.

    Attributes:
        title: What the first comment says.
        classes: Number of them.
        inputs: d_input or n_tokens.
        taus: Shares of the Hankel energy that the published runs give up.
        recipe: Further arguments of `ClassifierModule`.
        dropout: Probability of dropping an activation.
        full: As published.
        cpu: The twin.
        model: Class of the network.
        origin: Where the run at full scale is from; the end of the first comment.
    """

    title: str
    classes: int
    inputs: Options
    taus: tuple[float, ...]
    recipe: Options
    dropout: float
    full: Size
    cpu: Size
    model: str = "SequenceClassifier"
    origin: str = "As published."

    def size(self, scale: Scale) -> Size:
        return self.full if scale == "full" else self.cpu


def gentle(factor: float) -> Options:
    """The recipe of all tasks but sequential MNIST: warm-up over 10% of the steps, then cosine."""
    return {"ssm_lr_factor": factor, "weight_decay": 0.05, "warmup": 0.1}


LRA_TAUS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
DIGITS: tuple[str, Options] = ("DigitsDataModule", {"batch_size": 50})
IMAGES: Options = {"root": "data", "batch_size": 50}
# A look comes where the published code looks: where its intervals for reduction and for evaluation
# coincide (2000 and 5000 steps: every 10,000), up to the end of the window.
SMNIST = Task(
    title="Sequential MNIST",
    classes=10,
    inputs={"d_input": 1},
    taus=(0.01, 0.02, 0.04),
    recipe={"ssm_lr_factor": 1.0, "weight_decay": 0.0, "schedule": "constant"},
    dropout=0.1,
    full=Size(
        data=("SMNISTDataModule", IMAGES),
        sizes=(8, 256, 1), steps=200_000, lr=4e-4,
        validate=5000, every=10_000, window=(0, 20_000),
    ),
    cpu=Size(
        data=DIGITS,
        sizes=(8, 128, 1), steps=2000, lr=4e-3, validate=250, every=100, window=(0, 200),
    ),
)  # fmt: skip
TASKS: dict[str, Task] = {
    "smnist": SMNIST,
    "sfashion": replace(
        SMNIST,
        title="Sequential Fashion-MNIST",
        full=replace(SMNIST.full, data=("SFashionMNISTDataModule", IMAGES)),
        origin="Sequential MNIST's recipe.",
    ),
    "scifar": Task(
        title="Sequential CIFAR-10",
        classes=10,
        inputs={"d_input": 3},
        taus=(0.05, 0.1, 0.15),
        recipe=gentle(0.25),
        dropout=0.1,
        full=Size(
            data=("SCIFARDataModule", IMAGES),
            sizes=(512, 384, 6), steps=180_000, lr=1e-3,
            validate=4500, every=18_000, window=(0, 18_000),
        ),
        cpu=Size(
            data=DIGITS,
            sizes=(32, 96, 2), steps=1500, lr=1e-2, validate=250, every=150, window=(0, 150),
            inputs={"d_input": 1},
        ),
    ),
    "listops": Task(
        title="Long Range Arena, ListOps",
        classes=10,
        inputs={"n_tokens": 18},
        taus=LRA_TAUS,
        recipe=gentle(0.5),
        dropout=0.0,
        full=Size(
            data=(
                "ListOpsDataModule",
                {"root": "data/lra_release/listops-1000", "batch_size": 32, "length": 2048},
            ),
            sizes=(128, 256, 6), steps=80_000, lr=1e-3,
            validate=2000, every=2000, window=(0, 8000),
        ),
        cpu=Size(
            data=("GeneratedListOpsDataModule", {"batch_size": 32}),
            sizes=(32, 64, 2), steps=1600, lr=4e-3, validate=250, every=40, window=(0, 160),
        ),
    ),
    "imdb": Task(
        title="Long Range Arena, Text (IMDB)",
        classes=2,
        inputs={"n_tokens": 256},
        taus=LRA_TAUS,
        recipe=gentle(0.1),
        dropout=0.2,
        full=Size(
            data=(
                "IMDBDataModule",
                {"root": "data/aclImdb", "batch_size": 32, "length": 4096, "val_share": 0.0},
            ),
            sizes=(256, 192, 1), steps=50_000, lr=1e-3,
            validate=1000, every=1000, window=(1000, 4000),
        ),
        cpu=Size(
            data=("TextSourceDataModule", {"batch_size": 32}),
            sizes=(32, 48, 1), steps=1000, lr=4e-3, validate=200, every=20, window=(20, 80),
        ),
    ),
    "aan": Task(
        title="Long Range Arena, Retrieval (AAN)",
        classes=2,
        inputs={"n_tokens": 256},
        taus=LRA_TAUS,
        recipe=gentle(0.5),
        dropout=0.1,
        full=Size(
            data=(
                "AANDataModule",
                {"root": "data/lra_release/tsv_data", "batch_size": 64, "length": 4000},
            ),
            sizes=(128, 256, 6), steps=100_000, lr=1e-3,
            validate=2500, every=2500, window=(0, 10_000),
        ),
        cpu=Size(
            data=("TextPairDataModule", {"batch_size": 32}),
            sizes=(32, 64, 2), steps=800, lr=4e-3, validate=200, every=20, window=(0, 80),
        ),
        model="PairClassifier",
    ),
    "pathfinder": Task(
        title="Long Range Arena, Pathfinder with 32 x 32 pixels",
        classes=2,
        inputs={"d_input": 1},
        taus=LRA_TAUS,
        recipe=gentle(0.25),
        dropout=0.0,
        full=Size(
            data=(
                "PathfinderDataModule",
                {
                    "root": "data/lra_release/pathfinder32",
                    "batch_size": 64,
                    "resolution": 32,
                    "level": "curv_baseline",
                },
            ),
            sizes=(192, 256, 6), steps=500_000, lr=1e-3,
            validate=12_500, every=12_500, window=(0, 50_000),
        ),
        cpu=Size(
            data=("GeneratedPathfinderDataModule", {"batch_size": 50}),
            sizes=(32, 64, 2), steps=1000, lr=4e-3, validate=200, every=25, window=(0, 100),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """Mamba on associative recall, which needs no files. Steps and window as in `Size`."""

    data: Options
    sizes: tuple[int, int, int]
    steps: int
    lr: float
    validate: int
    look: int


RECALL: dict[Scale, Recall] = {
    "full": Recall(
        data={"batch_size": 64, "n_tokens": 512, "pairs": 64, "length": 256},
        sizes=(256, 128, 2), steps=50_000, lr=1e-3, validate=1250, look=5000,
    ),
    "cpu": Recall(
        data={"batch_size": 32, "n_tokens": 32, "pairs": 4, "length": 12},
        sizes=(32, 128, 2), steps=600, lr=5e-3, validate=200, look=60,
    ),
}  # fmt: skip
MAMBA_STATES = 12
