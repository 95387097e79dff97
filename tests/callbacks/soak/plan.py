"""What the soak trains: seeded random runs without end, in which every choice has its turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn, optim

from lightning_compressm.compat import enable_mamba_ssm_cpu
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock

T = TypeVar("T")

Kinds = dict[str, Callable[[int, int], nn.Module]]
LINEAR: Kinds = {"LRU": LRU, "S4D": S4D, "S5": S5}
SELECTIVE: Kinds = {"Mamba": MambaBlock, "Mamba-2": Mamba2Block}
FOREIGN = {"mamba_ssm.Mamba": "Mamba", "mamba_ssm.Mamba2": "Mamba-2"}  # and what stands in for it
LAYERS = (*LINEAR, *LINEAR, *SELECTIVE, *FOREIGN)

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda params: optim.SGD(params, lr=1e-2, momentum=0.9),
    "AdamW": lambda params: optim.AdamW(params, lr=3e-3),
    "AdamW fused": lambda params: optim.AdamW(params, lr=3e-3, fused=True),
    "AdamW amsgrad": lambda params: optim.AdamW(params, lr=3e-3, amsgrad=True),
    "RMSprop": lambda params: optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "Adagrad": lambda params: optim.Adagrad(params, lr=1e-2),
    "Adafactor": lambda params: optim.Adafactor(params, lr=1e-2),
    # Each rank has a loss of its own, so what LBFGS decides by it must never decide anything.
    "LBFGS": lambda params: optim.LBFGS(
        params, lr=1e-2, max_iter=2, history_size=3, tolerance_change=0
    ),
}
DDP: tuple[tuple[str, ...], ...] = (
    (),
    ("static_graph",),
    ("gradient_as_bucket_view",),
    ("find_unused_parameters",),
    ("static_graph", "gradient_as_bucket_view"),
    ("find_unused_parameters", "gradient_as_bucket_view"),
)
TARGETS: tuple[tuple[str, Any], ...] = (
    ("fraction", 0.1),
    ("fraction", 0.15),
    ("fraction", 0.2),
    ("fraction", 0.3),
    ("tolerance", 0.01),
    ("tolerance", 0.05),
    ("state_dim", 3),
)
CHOICES: dict[str, Sequence[Any]] = {
    "round_to": (1, 1, 1, 2, 4),
    "share_state_dim": (False, False, True),
    "balance": ("auto", "real", "folded", "complex"),
    "horizon": ("auto", None, 9),
    "criterion": ("auto", "averaged_lti", "empirical"),
    "selection": ("largest", "largest", "largest", "random"),
    "refit": (True, False),
    "max_output_error": (None, None, 0.5),
    "calibration_batches": (1, 2),
    "optimizer_state": ("transport", "transport", "truncate", "reset"),
}


@dataclass(frozen=True)
class Setting:
    """One run. `arguments` are those of the callback."""

    number: int
    layers: tuple[str, ...]
    d_model: int
    d_state: int
    length: int
    dtype: str
    optimizer: str
    ddp: tuple[str, ...]
    accumulate: int
    every_n_steps: int | None
    looks: int
    arguments: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps: one after the last look."""
        return self.looks * (self.every_n_steps or self.epoch_steps) + 1

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in an epoch; where a look comes with its end, there are few."""
        return 5 if self.every_n_steps else 2


class Deck(Generic[T]):
    """Deals every value once, in random order, before it deals one again."""

    def __init__(self, values: Sequence[T], rng: random.Random) -> None:
        self.values, self.rng = list(values), rng
        self.left: list[T] = []

    def draw(self) -> T:
        if not self.left:
            self.left = self.rng.sample(self.values, len(self.values))
        return self.left.pop()


def plan(seed: int) -> Iterator[Setting]:
    """Settings without end; the same for the same seed on every rank."""
    rng = random.Random(seed)
    layers, optimizers, ddp = Deck(LAYERS, rng), Deck(tuple(OPTIMIZERS), rng), Deck(DDP, rng)
    targets, depths = Deck(TARGETS, rng), Deck((1, 2, 3, 4), rng)
    intervals: Deck[int | None] = Deck((1, 1, 1, 2, None), rng)
    accumulate, dtypes = Deck((1, 1, 2, 3), rng), Deck(("float32", "float64"), rng)
    others = {name: Deck(values, rng) for name, values in CHOICES.items()}
    number = 0
    while True:
        name, value = targets.draw()
        chosen = tuple(layers.draw() for _ in range(depths.draw()))
        drawn = {k: deck.draw() for k, deck in others.items()}
        looks = {"fraction": 8, "tolerance": 6, "state_dim": 2}[name]
        # The local refit of Mamba-2 exchanges more than a hundred times for each layer.
        fitted = drawn["refit"] and any("Mamba-2" in (kind, FOREIGN.get(kind)) for kind in chosen)
        optimizer, options = optimizers.draw(), ddp.draw()
        # LBFGS calls its closure several times a step, and torch's DDP with static_graph fails in a
        # backward pass that exchanges nothing: neither can put batches together.
        single = optimizer == "LBFGS" or "static_graph" in options
        yield Setting(
            number=number,
            layers=chosen,
            d_model=rng.choice((4, 6, 8)),
            d_state=rng.randint(12, 48),
            length=rng.randint(8, 40),
            dtype=dtypes.draw(),
            optimizer=optimizer,
            ddp=options,
            accumulate=1 if single else accumulate.draw(),
            every_n_steps=intervals.draw(),
            looks=2 if fitted else looks,
            arguments={name: value, **drawn},
        )
        number += 1


def make_layer(kind: str, d_model: int, d_state: int) -> nn.Module:
    """A layer of ours, or of mamba_ssm where that is installed."""
    if kind in FOREIGN and find_spec("mamba_ssm") is None:
        kind = FOREIGN[kind]
    if kind not in FOREIGN:
        return (LINEAR | SELECTIVE)[kind](d_model, d_state)
    enable_mamba_ssm_cpu()
    from mamba_ssm import Mamba, Mamba2

    if kind == "mamba_ssm.Mamba":
        return Mamba(d_model, d_state)
    return Mamba2(d_model, d_state, headdim=d_model)


class Net(nn.Module):
    """Residual SSM layers between linear maps; the head is wide, so that lost copies of it show."""

    WIDE = 384

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        h = setting.d_model
        self.encoder = nn.Linear(1, h)
        self.norms = nn.ModuleList(nn.RMSNorm(h) for _ in setting.layers)
        self.layers = nn.ModuleList(make_layer(k, h, setting.d_state) for k in setting.layers)
        self.head = nn.Sequential(
            nn.Linear(h, self.WIDE), nn.GELU(), nn.Linear(self.WIDE, self.WIDE), nn.GELU()
        )
        self.out = nn.Linear(self.WIDE, 1)
        # Only DDP with find_unused_parameters bears a layer that some batches leave out.
        self.sometimes = LRU(h, 16) if "find_unused_parameters" in setting.ddp else None
        self.to(getattr(torch, setting.dtype))

    def forward(self, x: Tensor, number: int) -> Tensor:
        x = self.encoder(x.to(self.encoder.weight.dtype))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        if self.sometimes is not None and number % 2 == 0:
            x = x + self.sometimes(x)
        result: Tensor = self.out(self.head(x.mean(1)))
        return result
