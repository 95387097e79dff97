"""Tests here register families of their own; the next test finds the registry as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_compressm.families import _registry, registered_families


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    registered_families()
    before = dict(_registry._families)
    yield
    _registry._families.clear()
    _registry._families.update(before)
