"""Blocks with a decay rate for each channel and state, and a read-out that is linear in weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.families._base import shape_source
from lightning_compressm.families._selective import SelectiveFamily

__all__ = ["RatesFamily", "with_readout"]


class RatesFamily(SelectiveFamily):
    """Blocks with a decay rate for each channel and state, in the last dimension of ``A_log``."""

    state_dim_attributes: ClassVar[tuple[str, ...]] = ("d_state", "ssm_state_size")

    def state_dim(self, module: nn.Module) -> int:
        """The last dimension of ``A_log``."""
        return int(shape_source(module, "A_log").shape[-1])

    def state_dim_in(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
        """The last dimension of the saved ``A_log``."""
        saved = tensors.get("A_log")
        if saved is None or saved.ndim != shape_source(module, "A_log").ndim:
            return None
        return int(saved.shape[-1])


def with_readout(weight: Tensor, rank: int, n: int, keep: Tensor, delta: Tensor) -> Tensor:
    """Rows for dt, B of the kept states, and C of the kept states plus ``delta`` times all of C."""
    keep = keep.to(weight.device)
    read = double(weight[rank + n :])
    change = delta.to(read.device) @ read
    # Kept rows are copied, not computed, so that no change leaves them to the bit as they were.
    rows = weight[rank + n :][keep]
    new = torch.where(change == 0, rows, (double(rows) + change).to(weight.dtype).to(weight.device))
    return torch.cat([weight[:rank], weight[rank : rank + n][keep], new])
