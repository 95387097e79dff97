"""Backward passes that can't be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["once_differentiable"]

_MESSAGE = (
    b"expected no second derivative, since the fast backward pass of this layer or scan is "
    b"once_differentiable: take the inner gradient by torch.func.grad or torch.func.vjp instead of "
    b"create_graph=True; under these transforms it runs in plain operations, which can be "
    b"differentiated as often as you like."
)
_Backward = Callable[..., Any]


def once_differentiable(backward: _Backward) -> _Backward:
    """Like torch's decorator, but for every gradient taken with ``create_graph=True``.

    Torch's own lets a gradient pass as a constant where the one of the output is: the second
    derivative of ``layer(x).sum()`` would then be missing without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        several = isinstance(outputs, tuple)
        values = outputs if several else (outputs,)
        refuse: Any = torch._C._functions.DelayedError(_MESSAGE, len(values))
        refused = refuse(*(None if v is None else v.detach().requires_grad_() for v in values))
        return refused if several else refused[0]

    return wrapper
