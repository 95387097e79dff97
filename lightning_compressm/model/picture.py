"""A picture of a model, to put it back exactly as it was after a load that failed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModelPicture"]


class ModelPicture:
    """The objects and the values of a model's tensors, and whatever else its state dict holds.

    Args:
        model: the model; its weights are copied, so this takes as much memory again.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> picture, before = ModelPicture(layer), layer.weight.clone()
        >>> _ = nn.init.zeros_(layer.weight)
        >>> picture.restore()
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._homes: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is not None and not is_lazy(tensor):
                        value = copies.setdefault(id(tensor), tensor.detach().clone())
                        self._homes.append((store, key, tensor, value))
        tensors = {*dict(model.named_parameters(remove_duplicate=False))}
        tensors |= {*dict(model.named_buffers(remove_duplicate=False))}
        state = model.state_dict()
        self._others = {k: deepcopy(v) for k, v in state.items() if k not in tensors}

    @torch.no_grad()
    def restore(self) -> None:
        """Put back objects, values and extra state."""
        for store, key, tensor, value in self._homes:
            store[key] = tensor
            if not tensor.is_meta:
                tensor.copy_(value)
        if self._others:
            self.model.load_state_dict(self._others, strict=False)
