"""Batches cut into blocks that fit into the cache."""

from __future__ import annotations

import torch

__all__ = ["row_blocks"]

# Measured with 16 to 384 states: whole batches take up to 2.5 times as long, because every pass
# over the states then comes from memory. Several threads need longer passes to pay off.
_CPU_BLOCK_BYTES = 4 << 20
# Kernel launches dominate on accelerators, so blocks only bound the working memory there.
_DEVICE_BLOCK_BYTES = 1 << 30


def row_blocks(rows: int, bytes_per_row: int, device: torch.device) -> list[slice]:
    """Cut ``range(rows)`` into blocks whose states fit into the cache (at least one row each)."""
    budget = _DEVICE_BLOCK_BYTES
    if device.type == "cpu":
        threads = torch.get_num_threads()
        budget = _CPU_BLOCK_BYTES * (1 if threads == 1 else 2 * threads)
    size = max(1, budget // max(1, bytes_per_row))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
