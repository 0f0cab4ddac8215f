"""Shared fixtures: small data made on the spot, and the optional folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Small CPU programs: compile time dominates, so skip XLA's costlier passes unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs beside the checkout, where there is one."""
    root = Path(os.environ.get("SEE3D_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "README.md").is_file():
        pytest.skip(f"no shared data at {root} (set SEE3D_SHARED)")
    return root
