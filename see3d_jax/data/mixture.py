"""Shard folders mixed by weight: which clip a row of the global batch is made from.

    (("clips", 0.9, "unposed"), ("posed3d", 0.1, "posed"))     config.data.mixture

Each row picks its folder from its own random numbers with exactly these probabilities; within a
folder rows walk through a shuffled order in which every clip comes once per epoch. A clip that
cannot be used is replaced by others of the same folder, so the ratio stays what it is. The kind of
a folder says what the targets of its clips are conditioned on; see `data.examples`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging

from see3d_jax.data import records
from see3d_jax.errors import InputError

KINDS = ("unposed", "posed", "superres")
# Clips tried for one row. Even if only a tenth is usable, one row in 40 000 would need more.
MAX_TRIES = 100


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One entry of config.data.mixture.

    Attributes:
      path: folder of shards, or a single shard.
      weight: share of the rows, relative to the other entries.
      kind: "unposed": conditioned on masked targets; "posed": on warped references; "superres": on
        whole targets at half their resolution.
    """

    path: str
    weight: float = 1.0
    kind: str = "unposed"

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.kind not in KINDS:
            raise InputError(
                f"config.data.mixture: {self.path!r} has weight {self.weight!r} and kind "
                f"{self.kind!r}; want a weight above 0 and one of {KINDS}"
            )


@dataclasses.dataclass(frozen=True)
class Skip:
    """A clip that could not be used, and why."""

    clip: str
    reason: str


class SkippedClips:
    """Counts and names clips that could not be used."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, skip: Skip) -> None:
        """Remembers the clip; the first time it is also named on stderr."""
        if skip.clip not in self.reasons:
            logging.warning("skipped %s: %s", skip.clip, skip.reason)
        self.reasons[skip.clip] = skip.reason

    def __len__(self) -> int:
        return len(self.reasons)


class ClipFolder:
    """Random access to the records of one entry of the mixture. Travels to worker processes."""

    def __init__(self, entry: DataSource) -> None:
        self.path, self.kind, self.weight = os.fspath(entry.path), entry.kind, entry.weight
        paths = [str(path) for path in records.shard_paths(self.path)]
        try:
            self._source = grain.sources.ArrayRecordDataSource(paths)
        except Exception:  # the reader raises bare RuntimeErrors that name no file
            raise _broken_shard(paths) from None
        if len(self) == 0:
            raise InputError(f"{self.path}: its shards hold no clips; curate again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> records.ClipRecord:
        """Raises whatever the reader raises on a damaged record, InputError on foreign bytes."""
        return records.decode(self._source[index], f"{self.path} record {index}")

    def skip(self, index: int, record: records.ClipRecord | None, error: Exception) -> Skip:
        """Names a record that cannot be used; `record` is None where it could not be read."""
        name = f"{self.path} record {index}"
        if record is not None:
            name = f"clip {record.clip_id} of {record.source}"
        return Skip(name, str(error).removeprefix(f"{name}: ") or type(error).__name__)


def _broken_shard(paths: list[str]) -> InputError:
    for path in paths:
        try:
            grain.sources.ArrayRecordDataSource([path])
        except Exception as error:
            reason = str(error) or type(error).__name__
            return InputError(
                f"{path}: not a readable ArrayRecord shard ({reason}); remove it or curate again"
            )
    return InputError(f"{paths[0]}: these shards cannot be read together; curate again")


class Mixture:
    """All folders of a run; `len` is their number of clips. Travels to worker processes."""

    def __init__(self, entries: tuple[DataSource, ...], seed: int) -> None:
        self.folders = [ClipFolder(entry) for entry in entries]
        self._orders = [
            grain.MapDataset.range(len(folder))
            .seed(_shuffle_seed(seed, number))
            .shuffle()
            .repeat(None)
            for number, folder in enumerate(self.folders)
        ]
        weights = np.array([folder.weight for folder in self.folders], np.float64)
        self._upper = np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return sum(map(len, self.folders))

    @property
    def warped(self) -> bool:
        """Whether batches carry `warped`: a condition that is more than the masked targets."""
        return any(folder.kind != "unposed" for folder in self.folders)

    def candidates(
        self, position: int, rng: np.random.Generator
    ) -> tuple[ClipFolder, Iterator[int]]:
        """The folder of a row, and its records in the order in which they are to be tried.

        Args:
          position: of the row in the stream of all rows, step · batch size + row.
          rng: the row's random numbers; advanced.
        """
        drawn = int(np.searchsorted(self._upper, rng.random(), side="right"))
        number = min(drawn, len(self.folders) - 1)  # the sum of the weights may round below 1
        return self.folders[number], self._indices(number, position, rng)

    def _indices(self, number: int, position: int, rng: np.random.Generator) -> Iterator[int]:
        count = len(self.folders[number])
        yield self._orders[number][position]  # beyond the first epoch: shuffled anew
        yield from rng.choice(count, min(count, MAX_TRIES), replace=False).tolist()


def _shuffle_seed(seed: int, number: int) -> int:
    """A seed of 32 bits for the order of one folder, unlike those of others and of other runs."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def even_order(length: int) -> Iterator[int]:
    """0 … length − 1 so that any first few are spread over the whole (bit-reversed counting)."""
    bits = max(1, (length - 1).bit_length())
    for number in range(1 << bits):
        index = int(f"{number:0{bits}b}"[::-1], 2)
        if index < length:
            yield index
