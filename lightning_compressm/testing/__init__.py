"""For tests of families: the contract that every one of them keeps."""

from lightning_compressm.testing.contract import CONTRACT, check_family

__all__ = ["CONTRACT", "check_family"]
