"""Data sets as LightningDataModules: one file each."""

from benchmarks.data.delay import DelayDataModule
from benchmarks.data.digits import DigitsDataModule
from benchmarks.data.mqar import MQARDataModule

__all__ = ["DelayDataModule", "DigitsDataModule", "MQARDataModule"]
