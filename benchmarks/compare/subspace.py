"""Spectra over a training, and when the states that matter in the end are known."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.compare.bench import Bench
from benchmarks.train.trainer import AfterEveryStep
from lightning_compressm import find_ssm_layers
from lightning_compressm.control import (
    DiagonalLTI,
    balanced_truncation,
    hankel_singular_values,
    per_state_energy,
)
from lightning_compressm.families import Family

# Shares of the training; dense where it is decided.
_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_NEGLIGIBLE = 1e-10  # of the largest singular value


class SubspaceWatch(AfterEveryStep):
    """Keep the first linear layer's system at some steps of a training without reductions."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        steps = bench.task.steps
        self.due = {round(share * steps): share for share in _SHARES}
        self.systems: dict[float, DiagonalLTI] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(0, pl_module)

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer.global_step, module)

    def _look(self, step: int, module: L.LightningModule) -> None:
        share = self.due.get(step)
        if share is None or self.bench.task.kind != "linear":
            return
        with self.bench.untimed(), torch.no_grad():
            layer = next(iter(find_ssm_layers(module).values()))
            assert isinstance(layer.family, Family)
            self.systems[share] = layer.family.system(layer.module)

    def curves(self) -> dict[str, Any]:
        """What was seen, in plain types; empty for selective layers.

        Returns:
            `shares` of the training, `spectra` by share, and `overlap` by size and share: how much
            of the subspace that is dominant then lies in that of the end, between 0 and 1.
        """
        if not self.systems:
            return {}
        horizon = self.bench.data.length
        return {
            "shares": list(self.systems),
            "spectra": [_rounded(energies(s, horizon)) for s in self.systems.values()],
            "overlap": {str(size): self._overlaps(size, horizon) for size in self.bench.task.sizes},
        }

    def _overlaps(self, size: int, horizon: int) -> list[float]:
        bases = [dominant_subspace(s, size, horizon) for s in self.systems.values()]
        return _rounded(torch.tensor([overlap(basis, bases[-1]) for basis in bases]))


def energies(system: DiagonalLTI, horizon: int) -> Tensor:
    """Hankel energy of every state, descending, (N,)."""
    return per_state_energy(hankel_singular_values(system, horizon=horizon))


def dominant_subspace(system: DiagonalLTI, size: int, horizon: int) -> Tensor:
    """Orthonormal basis of the real state space [Re x; Im x] that `size` balanced states span.

    Returns:
        (2N, k) with k up to 2 `size`: a real pole spans one dimension.
    """
    reduction = balanced_truncation(system, size, horizon=horizon)
    # x is right x' + right_conj conj(x'): what x' = 1 and x' = i of each state become.
    basis = reduction.basis
    one = basis.right + basis.right_conj
    i = 1j * (basis.right - basis.right_conj)
    columns = torch.cat([torch.cat([part.real, part.imag]) for part in (one, i)], 1)
    u, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, sigma > _NEGLIGIBLE * sigma[0]]


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles between two subspaces, in [0, 1]."""
    smaller = min(first.shape[1], second.shape[1])
    return float((first.mT @ second).square().sum() / smaller)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
