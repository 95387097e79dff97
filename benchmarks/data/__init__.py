"""Data sets as LightningDataModules: one file each."""

from benchmarks.data.delay import DelayDataModule
from benchmarks.data.digits import DigitsDataModule

__all__ = ["DelayDataModule", "DigitsDataModule"]
