"""Fit a few tensors of a reduced layer to the output of the layer that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_compressm._precision import double
from lightning_compressm.reduction.processes import Processes

__all__ = ["fit_output", "output_error"]

STEPS = 120
LEARNING_RATE = 0.06

Runs = Iterable[tuple[Tensor, Tensor]]
"""Pairs of an output and what it should be."""


@torch.no_grad()
def output_error(runs: Runs, processes: Processes) -> float:
    """Root mean square of the difference, relative to that of the wanted outputs.

    Args:
        runs: outputs and wanted outputs, batch by batch.
        processes: those that hold other batches.

    Returns:
        The error, >= 0; infinity if an output is not finite.

    Example:
        >>> output_error([(torch.tensor([3.0]), torch.tensor([2.0]))], Processes())
        0.5
    """
    sums = [_sums(output, wanted) for output, wanted in runs]
    difference, size = processes.add_up(torch.stack(sums).sum(0)).tolist()
    error = (difference / size) ** 0.5 if size > 0 else float(difference > 0)
    return error if error == error else float("inf")


def fit_output(
    tensors: Sequence[Tensor],
    run: Callable[[], Runs],
    processes: Processes,
    *,
    steps: int = STEPS,
    lr: float = LEARNING_RATE,
) -> float:
    """Move ``tensors`` in place so that outputs come as close as possible to what they should be.

    A bounded number of Adam steps on all batches, without randomness; the best values met stay, so
    the error never grows.

    Args:
        tensors: to be fitted; leaves of the graph.
        run: gives the outputs for the present values, and the wanted ones.
        processes: those that hold other batches; gradients are added up over them.
        steps: of Adam.
        lr: peak learning rate of the steps, relative to the root mean square of each tensor.

    Returns:
        The error of the best values, as :func:`output_error` gives it.

    Example:
        >>> factor = torch.tensor([2.0])
        >>> x = torch.tensor([1.0, 3.0])
        >>> error = fit_output([factor], lambda: [(factor * x, 1.9 * x)], Processes(), steps=100)
        >>> error < 0.02
        True
    """
    best, best_error = [t.detach().clone() for t in tensors], float("inf")
    groups = [{"params": [t], "lr": lr * _size(t)} for t in tensors]
    flags = [t.requires_grad for t in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        gradients, error = _gradients(tensors, run, processes)
        if error < best_error:
            best, best_error = [t.detach().clone() for t in tensors], error
        if step == steps or not error < float("inf"):
            break
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for tensor, value, flag in zip(tensors, best, flags, strict=True):
            tensor.copy_(value)
            tensor.grad = None
            tensor.requires_grad_(flag)
    return best_error


def _gradients(
    tensors: Sequence[Tensor], run: Callable[[], Runs], processes: Processes
) -> tuple[list[Tensor], float]:
    """Gradients of the relative squared error over all batches and processes, and the error."""
    totals = [torch.zeros_like(t) for t in tensors]
    sums = []
    with torch.enable_grad():
        for output, wanted in run():
            loss = (output.float() - wanted.float()).square().sum()
            for total, part in zip(totals, torch.autograd.grad(loss, tensors), strict=True):
                total += part
            sums.append(_sums(output.detach(), wanted))
    of_error, *totals = _add_up_at_once([torch.stack(sums).sum(0), *totals], processes)
    difference, size = of_error.tolist()
    scale = 1 / size if size > 0 else 1.0
    gradients = [total * scale for total in totals]
    error = (difference * scale) ** 0.5
    return gradients, error if error == error else float("inf")


def _add_up_at_once(tensors: Sequence[Tensor], processes: Processes) -> list[Tensor]:
    """Each tensor summed over all processes, in one exchange; the first is the most precise."""
    like = tensors[0]
    flat = processes.add_up(torch.cat([t.detach().flatten().to(like) for t in tensors]))
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view_as(t).to(t) for part, t in zip(parts, tensors, strict=True)]


def _sums(output: Tensor, wanted: Tensor) -> Tensor:
    """Sums of squares of the difference and of what was wanted."""
    output, wanted = double(output), double(wanted)
    return torch.stack([(output - wanted).square().sum(), wanted.square().sum()])


def _size(tensor: Tensor) -> float:
    return float(double(tensor.detach()).square().mean().sqrt()) or 1.0
