"""Stages of one long task that are not repeated once they are done.

A stage is known by what goes into it (its key). Its marker is written after its result, so a stage
that was killed is done again; and a stage whose key has changed is done again with all later ones.

    stages/NAME.json   {"key": …, "seconds": …, "result": "FOLDER"}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from see3d_jax.errors import InputError, WorkError
from see3d_jax.files import write_json

FOLDER = "stages"
_ROOM = 100_000_000  # bytes that must be free: what a scene of some photos takes, twice


@dataclasses.dataclass
class Stages:
    """The stages of the task that writes into `output`, one after the other.

    Attributes:
      output: result folder of the whole task.
      report: told of every stage that starts, is done, or was done before.
      seconds: of every stage so far, by name, as measured when it was done.
      repeated: names of the stages that were really run.
    """

    output: Path
    report: Callable[[str], None] = lambda text: None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    repeated: list[str] = dataclasses.field(default_factory=list)
    _chain: str = ""

    def __post_init__(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output}: is a file; --output must be a folder")
        held = self.output.is_dir() and any(self.output.iterdir())
        if held and not (self.output / FOLDER).is_dir():
            raise InputError(
                f"{self.output}: not empty and not a result of this command; give another --output"
            )
        place = self.output.absolute()
        while not place.is_dir():
            place = place.parent
        effective = os.access in os.supports_effective_ids
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
            raise InputError(f"{place}: you may not write here; give another --output")
        if (free := shutil.disk_usage(place).free) < _ROOM:
            raise WorkError(
                f"{place}: the disk is full ({free / 1e6:.0f} MB free, {_ROOM / 1e6:.0f} MB are "
                "needed); free some space, or give another --output"
            )

    def run(self, name: str, key: Mapping[str, Any], work: Callable[[Path], object]) -> Path:
        """Calls `work` with the folder OUTPUT/NAME, unless it is there and was made from `key`.

        The key takes those of the earlier stages along. Returns the folder.
        """
        target = self.output / name
        text = json.dumps([self._chain, key], sort_keys=True, default=str)
        self._chain = hashlib.sha256(text.encode()).hexdigest()
        marker = self.output / FOLDER / f"{name}.json"
        done = _read(marker)
        if done.get("key") == self._chain and target.is_dir():
            self.seconds[name] = done["seconds"]
            self.report(f"{name}: already done ({done['seconds']:.0f} s)")
            return target
        marker.unlink(missing_ok=True)
        if done:  # of other settings: never mixed with the new result
            shutil.rmtree(target, ignore_errors=True)
        marker.parent.mkdir(parents=True, exist_ok=True)
        self.report(f"{name} …")
        start = time.monotonic()
        work(target)
        self.seconds[name] = round(time.monotonic() - start, 2)
        write_json(marker, {"key": self._chain, "seconds": self.seconds[name]})
        self.repeated.append(name)
        self.report(f"{name}: {self.seconds[name]:.0f} s")
        return target


def digest(path: Path) -> str:
    """Of a file's bytes, or of the names, sizes and times of a folder's files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    listed = [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _read(marker: Path) -> dict[str, Any]:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
