"""What an optimizer's step has moved moves on, by a factor of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Held", "Stretch"]


class Held:
    """Parameters of one group that are cut alike, and room for what they were before a step.

    Args:
        group: of an optimizer.
        ratio: by how much fewer states there are than at the start.
        places: of the parameters in the group.
    """

    def __init__(self, group: Mapping[str, Any], ratio: float, places: Sequence[int]) -> None:
        self.group, self.ratio, self._places = group, ratio, places
        self.parameters: list[Tensor] = [group["params"][place] for place in places]
        self._before = [torch.empty_like(parameter) for parameter in self.parameters]

    @property
    def outdated(self) -> bool:
        """Whether the group holds others in their place by now."""
        now = self.group["params"]
        pairs = zip(self._places, self.parameters, strict=True)
        return any(place >= len(now) or now[place] is not held for place, held in pairs)

    def keep(self) -> None:
        """Remember the parameters as they are."""
        torch._foreach_copy_(self._before, self.parameters)

    def extend(self, factor: float | Tensor) -> None:
        """What has moved since moves on; what has not stays the same to the bit."""
        if torch.is_tensor(factor):
            for parameter, before in zip(self.parameters, self._before, strict=True):
                parameter.add_((before - parameter).mul_(1 - factor))
        else:
            torch._foreach_lerp_(self.parameters, self._before, 1 - factor)


class Stretch:
    """The two hooks of one optimizer, and what they share during a step.

    Args:
        held: gives the parameters that it holds.
        factor: gives by what the next update of some of them is multiplied.
    """

    def __init__(
        self, held: Callable[[], Iterable[Held]], factor: Callable[[Held], float | Tensor]
    ) -> None:
        self._held, self._factor = held, factor
        self._moving: list[tuple[Held, float | Tensor]] = []

    @torch.no_grad()
    def keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step, and before the closure in it: the parameters as they are."""
        self._moving = []
        for held in self._held():
            factor = self._factor(held)
            if torch.is_tensor(factor) or factor > 1:
                held.keep()
                self._moving.append((held, factor))

    @torch.no_grad()
    def extend(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step."""
        moving, self._moving = self._moving, []
        for held, factor in moving:
            held.extend(factor)
