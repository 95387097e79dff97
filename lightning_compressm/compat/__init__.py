"""Packages that are made for GPUs, on a CPU, and layers of others made fit for a reduction.

Importing this imports none of them.
"""

from lightning_compressm.compat._mamba_ssm import enable_mamba_ssm_cpu
from lightning_compressm.compat._minimax import enable_minimax_key_channels
from lightning_compressm.compat._transformers import enable_fast_mamba_cpu

__all__ = ["enable_fast_mamba_cpu", "enable_mamba_ssm_cpu", "enable_minimax_key_channels"]
