"""Data sets as LightningDataModules: one file each."""

from benchmarks.data.cifar import SCIFARDataModule
from benchmarks.data.delay import DelayDataModule
from benchmarks.data.digits import DigitsDataModule
from benchmarks.data.images import SFashionMNISTDataModule, SMNISTDataModule
from benchmarks.data.listops import GeneratedListOpsDataModule, ListOpsDataModule
from benchmarks.data.lra_text import AANDataModule, IMDBDataModule
from benchmarks.data.mqar import MQARDataModule
from benchmarks.data.pathfinder import GeneratedPathfinderDataModule, PathfinderDataModule
from benchmarks.data.text import TextDataModule, TextPairDataModule, TextSourceDataModule

__all__ = [
    "AANDataModule",
    "DelayDataModule",
    "DigitsDataModule",
    "GeneratedListOpsDataModule",
    "GeneratedPathfinderDataModule",
    "IMDBDataModule",
    "ListOpsDataModule",
    "MQARDataModule",
    "PathfinderDataModule",
    "SCIFARDataModule",
    "SFashionMNISTDataModule",
    "SMNISTDataModule",
    "TextDataModule",
    "TextPairDataModule",
    "TextSourceDataModule",
]
