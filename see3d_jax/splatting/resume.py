"""Where a fit stands, in one file: a fit that was killed goes on and ends with the same bits.

The file is replaced as a whole. It carries a digest of everything that determines the fit; a file
of another fit (other photos, options, seed, version of JAX) is not taken up.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from see3d_jax.files import atomic_path

Tree = TypeVar("Tree")


def digest(*parts: Any) -> str:
    """Of arrays and of what has a repr, nested as one likes."""
    total = hashlib.sha256(jax.__version__.encode())
    for leaf in jax.tree.leaves(parts, is_leaf=lambda x: x is None):
        if isinstance(leaf, (np.ndarray, jax.Array)):
            array = np.ascontiguousarray(leaf)
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(array.tobytes())
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()


def save(file: Path, whose: str, tree: Any) -> None:
    """Writes the leaves of a tree of arrays and numbers."""
    arrays = {f"leaf_{i:03d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, whose=np.array(whose), **arrays)


def load(file: Path, whose: str, like: Tree) -> Tree | None:
    """The tree that was saved, as NumPy arrays in the structure of `like`.

    None where there is no file, or it belongs to another fit, or it cannot be read.
    """
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["whose"]) != whose:
                return None
            found = [arrays[f"leaf_{i:03d}"] for i in range(len(leaves))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(np.shape(a) != np.shape(b) for a, b in zip(found, leaves, strict=True)):
        return None
    return jax.tree.unflatten(structure, found)
