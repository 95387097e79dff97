"""At which step the loss stopped being a number, without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LossWatch"]

_TOGETHER = 64  # steps whose losses are looked at together: one by one would cost each step more


class LossWatch:
    """Remembers losses, and looks at some of them at a time.

    Example:
        >>> watch = LossWatch()
        >>> for step, loss in enumerate((1.0, float("nan"), 2.0), start=1):
        ...     watch.note(torch.tensor(loss), step)
        >>> watch.first_bad_step()
        2
    """

    def __init__(self) -> None:
        self._noted: list[tuple[int, Tensor]] = []
        self._looked_at: list[tuple[tuple[int, ...], Tensor]] = []  # steps, whether each is finite

    def note(self, loss: Tensor, step: int) -> None:
        """Take note of the loss of a step, of any shape."""
        self._noted.append((step, loss.detach() if loss.requires_grad else loss))
        if len(self._noted) == _TOGETHER:
            self._look()

    def first_bad_step(self) -> int | None:
        """The first step with a loss that was not finite, if there was one; waits for devices."""
        if self._noted:
            self._look()
        for steps, finite in self._looked_at:
            if not bool(finite.all()):
                return steps[int(finite.logical_not().int().argmax())]
        return None

    def _look(self) -> None:
        steps, losses = zip(*self._noted, strict=True)
        finite = torch.stack([torch.isfinite(loss).all() for loss in losses])
        self._noted.clear()
        # On a CPU nothing is waited for: what is in order need not be kept.
        if finite.device.type != "cpu" or not bool(finite.all()):
            self._looked_at.append((steps, finite))
