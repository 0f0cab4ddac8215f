"""Files that are either whole or absent: written under a temporary name, then renamed.

Targets may be in a bucket (gs://…, through etils.epath, which needs `pip install gcsfs`): there an
object appears when its last byte has arrived, so it is made on the local disk and then copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the target's folder; renames it onto `target` when the block ends.

    The temporary name keeps the target's suffixes, because encoders choose a format by suffix.
    On an exception the temporary file (or folder) is removed and `target` is left as it was.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / epath.Path(target).name
            yield temporary
            epath.Path(target).write_bytes(temporary.read_bytes())
        return
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = folder / target.name
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)  # rename(2) cannot replace a non-empty folder
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket."""
    return "://" in os.fspath(path)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Writes strict JSON atomically (NaN is refused: no other reader would take it)."""
    write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")
