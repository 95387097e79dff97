"""Lightning callbacks; the only part of the package that imports Lightning."""

from lightning_compressm.callbacks.compressm import CompreSSMCallback
from lightning_compressm.callbacks.monitor import HankelMonitor

__all__ = ["CompreSSMCallback", "HankelMonitor"]
