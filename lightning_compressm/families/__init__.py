"""SSM architectures, one file each; they are found by themselves."""

from lightning_compressm.families._base import Family
from lightning_compressm.families._registry import (
    find_family,
    register_family,
    registered_families,
)

__all__ = ["Family", "find_family", "register_family", "registered_families"]
