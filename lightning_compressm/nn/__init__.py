"""State-space layers and scans as plain PyTorch modules and functions."""

from lightning_compressm.nn.lru import LRU
from lightning_compressm.nn.s4d import S4D
from lightning_compressm.nn.s5 import S5
from lightning_compressm.nn.scan import linear_recurrence
from lightning_compressm.nn.selective_scan import selective_scan

__all__ = ["LRU", "S4D", "S5", "linear_recurrence", "selective_scan"]
