"""The few names a notebook needs, straight from `see3d_jax`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import see3d_jax


def test_every_name_is_there_with_a_docstring() -> None:
    assert set(see3d_jax.__all__) <= set(dir(see3d_jax))
    for name in see3d_jax.__all__:
        value = getattr(see3d_jax, name)
        assert callable(value) and value.__doc__, name
        assert name in see3d_jax.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = see3d_jax.nothing


def test_importing_the_package_is_instant() -> None:
    code = "import sys, see3d_jax; assert not {'jax', 'numpy', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
