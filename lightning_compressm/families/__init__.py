"""SSM architectures, one file each; they are found by themselves."""

from lightning_compressm.families._base import Family, FamilyBase
from lightning_compressm.families._registry import (
    find_family,
    model_attributes,
    named_layers,
    register_family,
    registered_families,
)
from lightning_compressm.families._selective import SelectiveFamily
from lightning_compressm.families._table import support_table

__all__ = [
    "Family",
    "FamilyBase",
    "SelectiveFamily",
    "find_family",
    "model_attributes",
    "named_layers",
    "register_family",
    "registered_families",
    "support_table",
]
