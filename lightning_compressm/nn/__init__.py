"""State-space layers and scans as plain PyTorch modules and functions."""

from lightning_compressm.nn.lru import LRU
from lightning_compressm.nn.scan import linear_recurrence

__all__ = ["LRU", "linear_recurrence"]
