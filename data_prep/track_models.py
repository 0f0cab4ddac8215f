"""Point trackers for stage 4: Lucas-Kanade, or a network that the user names as an ONNX file.

A tracker is a function of uint8 RGB frames [F, H, W, 3] → Tracks. Two layouts of networks are
known, told from the shape of the first input; F has to be free, H, W and N may be fixed:

    CoTracker   video [1, F, 3, H, W] float32 0..255, queries [1, N, 3] float32 (frame, x, y)
                → tracks [1, F, N, 2] (x, y), visibility [1, F, N] bool or 0..1
                  (and confidence [1, F, N] 0..1, as CoTracker3 has it); follows points forwards
    TAPIR       video [1, F, H, W, 3] float32 -1..1, queries [1, N, 3] float32 (frame, y, x)
                → tracks [1, N, F, 2] (x, y), occlusion [1, N, F] logits
                  (and expected_dist [1, N, F] logits)

Coordinates are pixels of the video that the network sees. Outputs are told by their names: one with
"track", one with "vis" or "occ" and, if it is there, one with "dist".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from data_prep.tracking import Tracks, follow_points
from see3d_jax.errors import InputError
from see3d_jax.onnx_models import open_session

Tracker = Callable[[np.ndarray], Tracks]
QUERIES = 256
QUERY_FRAMES = (0.0, 0.5)  # points that appear later are asked for halfway
SURE = {"visibility": 0.9, "visibility times confidence": 0.6}  # of CoTracker's predictors
NETWORK_SIZE = (384, 512)  # height, width where the network leaves them free


@functools.cache
def make_tracker(name: str) -> Tracker:
    """`lk`, or an .onnx file → tracker; InputError for anything else."""
    if name == "lk":
        return lambda frames: follow_points(_grays(frames))
    if not name.endswith(".onnx"):
        raise InputError(f"--tracker: expected lk or an .onnx point tracker, got {name}")
    return _network_tracker(name)


def _grays(frames: np.ndarray) -> np.ndarray:
    import cv2

    return np.stack([cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in frames])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a network wants its inputs: (height, width), channels last or not, number of queries."""

    size: tuple[int, int]
    channels_last: bool
    queries: int


def _network_tracker(path: str) -> Tracker:
    session = open_session(path, "--tracker", "curate", threads=1)  # one video per core
    inputs = session.get_inputs()
    layout = _read_layout([list(value.shape) for value in inputs], path)
    names = [output.name for output in session.get_outputs()]

    def track(frames: np.ndarray) -> Tracks:
        import cv2

        height, width = layout.size
        small = np.stack([
            cv2.resize(np.ascontiguousarray(f), (width, height), interpolation=cv2.INTER_AREA)
            for f in frames
        ])  # fmt: skip
        queries = _queries(_grays(small), layout.queries)
        if not len(queries):
            return Tracks(np.zeros((0, len(frames), 2), np.float32), frames.shape[2:0:-1])
        feed = dict(zip((value.name for value in inputs), _feed(small, queries, layout)))
        outputs = dict(zip(names, session.run(None, feed)))
        xy = read_tracks(outputs, len(frames), layout.channels_last, path)[: len(queries)]
        if not layout.channels_last:  # before its query CoTracker has nothing to say of a point
            xy[np.arange(len(frames)) < queries[:, :1]] = np.nan
        scale = np.array([frames.shape[2] / width, frames.shape[1] / height], np.float32)
        return Tracks(xy * scale, (frames.shape[2], frames.shape[1]))

    return track


def _read_layout(shapes: list[list[object]], path: str) -> _Layout:
    fits = len(shapes) == 2 and len(shapes[0]) == 5 and len(shapes[1]) == 3
    last = fits and shapes[0][4] == 3
    if not fits or not (last or shapes[0][2] == 3):
        raise InputError(
            f"--tracker {path}: expected inputs video [1, F, 3, H, W] or [1, F, H, W, 3] and "
            f"queries [1, N, 3], got {shapes}"
        )
    if isinstance(shapes[0][1], int):
        raise InputError(
            f"--tracker {path}: takes exactly {shapes[0][1]} frames; export it with a free number"
        )
    sides = shapes[0][2:4] if last else shapes[0][3:5]
    size = tuple(s if isinstance(s, int) else free for s, free in zip(sides, NETWORK_SIZE))
    count = shapes[1][1] if isinstance(shapes[1][1], int) else QUERIES
    return _Layout(size, last, count)


def _queries(grays: np.ndarray, count: int) -> np.ndarray:
    """Corners (frame, x, y) [at most `count`, 3] of some frames of [F, H, W] uint8."""
    import cv2

    frames = sorted({int(share * (len(grays) - 1)) for share in QUERY_FRAMES})
    spacing = max(3.0, 14.0 * min(grays.shape[1:]) / 480.0)
    found = []
    for frame in frames:
        wanted = (count - sum(map(len, found))) // (len(frames) - len(found))
        corners = cv2.goodFeaturesToTrack(grays[frame], wanted, 0.003, spacing, blockSize=5)
        corners = np.zeros((0, 2), np.float32) if corners is None else corners[:, 0]
        found.append(np.column_stack([np.full(len(corners), frame, np.float32), corners]))
    return np.concatenate(found).astype(np.float32)


def _feed(
    frames: np.ndarray, queries: np.ndarray, layout: _Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Video and queries as the network wants them; the last query fills up a fixed number."""
    full = np.concatenate([queries, np.repeat(queries[-1:], layout.queries - len(queries), 0)])
    if layout.channels_last:
        return frames[None].astype(np.float32) / 127.5 - 1.0, full[None][..., [0, 2, 1]]
    return frames[None].transpose(0, 1, 4, 2, 3).astype(np.float32), full[None]


def read_tracks(
    outputs: Mapping[str, np.ndarray], frames: int, points_first: bool, path: str = ""
) -> np.ndarray:
    """Outputs of either layout → positions [N, F, 2] float32, NaN where a point is not seen."""

    def named(*words: str) -> np.ndarray | None:
        return next(
            (value for name, value in outputs.items() if any(w in name.lower() for w in words)),
            None,
        )

    xy, visible, occluded = named("track"), named("vis"), named("occ")
    seen = visible if visible is not None else occluded
    if xy is None or seen is None or np.ndim(xy) != 4:
        shapes = {name: np.shape(value) for name, value in outputs.items()}
        raise InputError(f"--tracker {path}: unknown outputs {shapes}")
    xy, seen = np.asarray(xy)[0], np.asarray(seen)[0].astype(np.float32)
    if visible is not None and np.asarray(visible).dtype == bool:
        seen = seen > 0.5
    elif visible is not None:
        confidence = named("conf")
        if confidence is None:
            seen = seen > SURE["visibility"]
        else:
            seen = seen * np.asarray(confidence)[0] > SURE["visibility times confidence"]
    else:  # TAPIR: seen and where it is believed to be
        distance = named("dist")
        unsure = 1.0 if distance is None else 1.0 - _sigmoid(np.asarray(distance)[0])
        seen = (1.0 - _sigmoid(seen)) * unsure > 0.5
    seen = seen.reshape(xy.shape[:2])
    if not points_first:
        xy, seen = xy.transpose(1, 0, 2), seen.T
    if xy.shape[1] != frames:
        raise InputError(f"--tracker {path}: gave {xy.shape[1]} frames for {frames}")
    return np.where(seen[..., None], xy, np.nan).astype(np.float32)


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value))
