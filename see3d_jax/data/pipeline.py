"""Clip shards in, training batches out: deterministic, resumable, and not stopped by one bad clip.

    ArrayRecord shards → shuffle, repeat → one example per clip → threads or workers → batches

An example is V frames of one clip in shuffled order, the first S of them references (S drawn per
example), the rest targets behind random masks (paper Sec. 3.2). Every random choice comes from
(seed, position in the stream), and an iterator's position is a small JSON value, so that a resumed
run sees the very same batches. A clip that cannot be used is skipped, counted and named on stderr.

    image         [B, V, h, w, 3] float32 in [−1, 1]
    mask          [B, V, h, w, 1] float32, 1 = known; all ones on references
    is_reference  [B, V] bool, references first
    frame         [B, V] int32, frame number within the clip (views close in time look alike)
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging
from tqdm import tqdm

from see3d_jax.data import records
from see3d_jax.data.masks import random_mask
from see3d_jax.data.transforms import choose_frames, decode_square, to_model_range
from see3d_jax.errors import InputError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """What one training example looks like.

    Attributes:
      image_size: side of the square views, pixels.
      views: V, references and targets together.
      references: numbers of reference views to draw from, evenly.
      stride: smallest and widest step between neighbouring frames drawn from a clip.
      hole_range: smallest and largest share of missing pixels on targets.
    """

    image_size: int
    views: int
    references: tuple[int, ...]
    stride: tuple[int, int]
    hole_range: tuple[float, float]

    def __post_init__(self) -> None:
        if not self.references or not all(1 <= s < self.views for s in self.references):
            raise InputError(
                f"config.data.references: {self.references} must lie between 1 and views − 1 "
                f"= {self.views - 1}"
            )
        if not 1 <= self.stride[0] <= self.stride[1]:
            raise InputError(f"config.data.stride: want 1 ≤ low ≤ high, got {self.stride}")
        if not 0.0 < self.hole_range[0] <= self.hole_range[1] < 1.0:
            raise InputError(
                f"config.data.hole_range: want 0 < low ≤ high < 1, got {self.hole_range}"
            )


class SkippedClips:
    """Counts and names clips that could not be used. Shared by the reading threads of a process."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Remembers the clip; the first time it is also named on stderr."""
        with self._lock:
            known = name in self.reasons
            self.reasons[name] = reason
        if not known:
            logging.warning("skipped %s: %s", name, reason)

    def __len__(self) -> int:
        return len(self.reasons)

    def __getstate__(self) -> dict[str, dict[str, str]]:  # locks do not travel to workers
        return {"reasons": self.reasons}

    def __setstate__(self, state: dict[str, dict[str, str]]) -> None:
        self.reasons, self._lock = state["reasons"], threading.Lock()


class ClipSource:
    """Random access to the records of a shard folder; unreadable ones come back as None."""

    def __init__(self, folder: str | os.PathLike[str], skipped: SkippedClips) -> None:
        self.folder = os.fspath(folder)
        self.skipped = skipped
        paths = [str(path) for path in records.shard_paths(folder)]
        try:
            self._source = grain.sources.ArrayRecordDataSource(paths)
        except Exception:  # the reader raises bare RuntimeErrors that name no file
            raise _broken_shard(paths) from None
        if len(self) == 0:
            raise InputError(f"{folder}: its shards hold no clips; curate again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> records.ClipRecord | None:
        name = f"{self.folder} record {index}"
        try:
            return records.decode(self._source[index], name)
        except Exception as error:  # bad checksum, foreign bytes, unknown version
            self.skipped.add(name, str(error).removeprefix(f"{name}: ") or type(error).__name__)
            return None


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


def make_example(
    record: records.ClipRecord, rng: np.random.Generator, spec: ExampleSpec
) -> dict[str, np.ndarray]:
    """One clip → one example (arrays as in the module docstring, without the batch axis).

    Raises ValueError when the clip is too short, OSError when a drawn frame does not decode.
    """
    frames = choose_frames(rng, len(record.images), spec.views, spec.stride)
    num_references = int(rng.choice(spec.references))
    images = [decode_square(record.images[frame], spec.image_size) for frame in frames]
    masks = [
        random_mask(rng, spec.image_size, spec.image_size, spec.hole_range)
        if view >= num_references
        else np.ones((spec.image_size, spec.image_size, 1), np.float32)
        for view in range(spec.views)
    ]
    return {
        "image": to_model_range(np.stack(images)),
        "mask": np.stack(masks),
        "is_reference": np.arange(spec.views) < num_references,
        "frame": frames.astype(np.int32),
    }


def training_batches(
    source: ClipSource,
    spec: ExampleSpec,
    batch_size: int,
    seed: int,
    held_out: frozenset[str] = frozenset(),
    threads: int = 2,
    workers: int = 0,
) -> grain.IterDataset:
    """An endless dataset of batches without the clips whose source is in `held_out`.

    `iter()` of it gives an iterator with `get_state` and `set_state`. `workers` > 0 uses that many
    processes instead of threads; batches are then the same at any number of threads, and differ
    between numbers of workers.
    """
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    stream = stream.random_map(
        functools.partial(_example_or_none, spec=spec, held_out=held_out, skipped=source.skipped)
    )
    # Elements that are None fall out here; the position counts them, so resuming stays exact.
    dataset = stream.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch_size)
    ).batch(batch_size)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return dataset


def _example_or_none(
    record: records.ClipRecord | None,
    rng: np.random.Generator,
    spec: ExampleSpec,
    held_out: frozenset[str],
    skipped: SkippedClips,
) -> dict[str, np.ndarray] | None:
    if record is None or record.source in held_out:
        return None
    try:
        return make_example(record, rng, spec)
    except Exception as error:  # one bad clip among millions must not end a run
        skipped.add(f"clip {record.clip_id} of {record.source}", str(error))
        return None


def held_out_batch(
    source: ClipSource, spec: ExampleSpec, clips: int, seed: int
) -> tuple[Batch, frozenset[str]]:
    """A fixed batch from up to `clips` clips of different sources, and those sources' names.

    Clips are taken at even distances through the shards. Whole source videos are held out, not
    clips, because clips of one video show the same scene. At least one usable clip is always left
    to train on: with a single source video the set of names is empty and the batch comes from
    training clips. Raises InputError when no clip is usable.
    """
    usable: dict[str, dict[str, np.ndarray]] = {}  # source → its example
    order = _even_order(len(source))
    for index in tqdm(order, "held-out clips", len(source), leave=False, delay=5):
        record = source[index]
        if record is None or record.source in usable:
            continue
        rng = np.random.default_rng((seed, index))
        example = _example_or_none(record, rng, spec, frozenset(), source.skipped)
        if example is not None:
            usable[record.source] = example
        if len(usable) > clips:  # one more source than is held out: it stays for training
            break
    if not usable:
        reason = next(iter(source.skipped.reasons.values()), "no reason given")
        raise InputError(
            f"{source.folder}: none of its {len(source)} clips can be used with "
            f"config.data.views={spec.views}, e.g. {reason}; use fewer views or longer clips"
        )
    names = list(usable)[:clips] if len(usable) > clips else list(usable)[:-1]
    chosen = [usable[name] for name in names] or list(usable.values())
    batch = {key: np.stack([example[key] for example in chosen]) for key in chosen[0]}
    return batch, frozenset(names)


def _even_order(length: int) -> Iterator[int]:
    """0 … length − 1 so that any first few are spread over the whole (bit-reversed counting)."""
    bits = max(1, (length - 1).bit_length())
    for number in range(1 << bits):
        index = int(f"{number:0{bits}b}"[::-1], 2)
        if index < length:
            yield index
