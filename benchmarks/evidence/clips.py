"""Training clips for the scaling study: a share of a folder, and clips that curation would drop."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from see3d_jax.data.records import (
    ClipRecord,
    decode_image,
    encode,
    encode_jpeg,
    read_records,
    write_shards,
)


def subset(folder: Path, share: float, output: Path) -> Path:
    """The first `share` of the clips of a folder as a folder of its own; made once."""
    if not output.is_dir():
        records = list(read_records(folder))
        count = max(2, round(share * len(records)))
        write_shards((encode(record) for record in records[:count]), output, num_shards=1)
    return output


def with_uncurated(folder: Path, output: Path) -> Path:
    """All clips, and of each a second that shows no new viewpoint, or something that moves.

    Every other clip stands still (its middle frame throughout, with sensor noise); in the others a
    patch of the scene travels through the frames. Made once.
    """
    if not output.is_dir():
        clips = list(read_records(folder))
        spoiled = [spoil(record, number) for number, record in enumerate(clips)]
        write_shards((encode(record) for record in [*clips, *spoiled]), output, num_shards=1)
    return output


def spoil(record: ClipRecord, number: int) -> ClipRecord:
    """A clip that curation would drop, made of one that it keeps; no depth, no poses."""
    rng = np.random.default_rng(number)
    frames = [decode_image(data) for data in record.images]
    if number % 2:
        still = frames[len(frames) // 2].astype(np.float32)
        noisy = [still + rng.normal(0, 2, still.shape) for _ in frames]
    else:
        noisy = list(_with_mover([frame.astype(np.float32) for frame in frames], rng))
    images = tuple(encode_jpeg(np.clip(frame, 0, 255).astype(np.uint8)) for frame in noisy)
    return ClipRecord(
        f"{record.clip_id}_uncurated", f"{record.source}_uncurated", record.fps, record.timestamps,
        images, record.height, record.width,
    )  # fmt: skip


def _with_mover(frames: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """A round patch of the first frame, a third of its width, moves straight across."""
    height, width = frames[0].shape[:2]
    radius = width // 6
    rows, columns = np.mgrid[-radius:radius, -radius:radius]
    inside = rows**2 + columns**2 < radius**2
    top, left = (int(rng.integers(0, side - 2 * radius)) for side in (height, width))
    patch = frames[0][top : top + 2 * radius, left : left + 2 * radius][..., ::-1]
    start, end = rng.uniform(0, 1, (2, 2)) * (height - 2 * radius, width - 2 * radius)
    moved = []
    for place, frame in zip(np.linspace(0, 1, len(frames)), frames):
        y, x = (start + place * (end - start)).astype(int)
        frame = frame.copy()
        frame[y : y + 2 * radius, x : x + 2 * radius][inside] = patch[inside]
        moved.append(frame)
    return moved
