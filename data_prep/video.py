"""Stage 1, decode and cut: a video file → shots of a single camera, at 480p and about 15 frames/s.

Each file is decoded in a process of its own (`python -m data_prep.video`) under a time and a memory
limit, because broken files hang or crash decoders. decord reads first; what it cannot read goes to
OpenCV and then to the ffmpeg binary of imageio-ffmpeg, and the reader that got furthest wins, so
that the readable part of a truncated file is salvaged (and the result says so).

Frames are taken at least `FRAME_GAP_S` apart by their own timestamps: every 2nd frame of 24-30 fps
footage as in the paper, the same spacing in time for any other or a variable rate. Frames are uint8
RGB [N, H, W, 3]; times are seconds in the source.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.epipolar import (
    fit_fundamental,
    fit_homography,
    homography_error,
    sampson_error,
)
from data_prep.runners import die_with_parent

SHORT_SIDE = 480
FRAME_GAP_S = 0.049  # 30 fps -> every 2nd frame, 25 and 24 fps too, 50 and 60 fps -> every 3rd
DARK_LEVEL = 14  # 8-bit level below which a border pixel counts as black bar
DUPLICATE_MEAN = 0.4  # 8-bit levels: re-encoded copies of one frame differ by less
DUPLICATE_PEAK = 4.0
_DAMAGE = re.compile(r"error while decoding|concealing|corrupt|Invalid NAL|partial file")
_NEXT_READER = "[next reader]"
_DISK_FULL = 28  # exit code of the decoding process
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full, over quota, file too large
FLAT_FRAME_STD = 4.0  # 8-bit levels: fades to black or white carry no scene


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """What one file may cost.

    Attributes:
      video_seconds: footage read from the start of a file.
      timeout_seconds: wall time of the decoding process.
      memory_mb: address space of the decoding process.
    """

    video_seconds: float = 150.0
    timeout_seconds: float = 300.0
    memory_mb: int = 6144


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded footage, near-duplicates dropped.

    Attributes:
      frames: [N, H, W, 3] uint8 RGB, upright, short side ≤ 480 (a memory-mapped file).
      times: [N] float64 seconds in the source.
      duplicates: near-identical frames that were dropped.
      damage: broken places that the decoder complained about.
      notes: what a reader of the report should know (salvaged part, length limit, decoder).
    """

    frames: np.ndarray
    times: np.ndarray
    duplicates: int
    damage: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shot:
    """Frames [start, stop) of a video seen by one uninterrupted camera."""

    start: int
    stop: int


class DecodeError(RuntimeError):
    """The file gave no usable frames; the message says why in one line."""


def decode(path: str | os.PathLike[str], folder: Path, limits: DecodeLimits) -> Video:
    """Decodes `path` in a subprocess, frames stored in `folder` (which the caller deletes).

    Raises DecodeError with a one-line reason.
    """
    path = Path(path)
    if not path.is_file():
        raise DecodeError("no such file")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DecodeError("the file is empty (0 bytes)")
    except OSError as error:
        raise DecodeError(f"cannot be read ({error.strerror})") from None
    command = [
        sys.executable, "-m", "data_prep.video", str(path.resolve()), str(folder),
        json.dumps(dataclasses.asdict(limits)),
    ]  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # so that a hanging ffmpeg grandchild dies with its parent
    )
    try:
        _, stderr = process.communicate(timeout=limits.timeout_seconds)
    except subprocess.TimeoutExpired:
        raise DecodeError(f"decoding took longer than {limits.timeout_seconds:g} s") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    if process.returncode == _DISK_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    text = stderr.decode(errors="replace")
    result_file = folder / "result.json"
    if process.returncode != 0 or not result_file.exists():
        if "MemoryError" in text or "bad_alloc" in text or "nsufficient memory" in text:
            raise DecodeError(f"decoding needs more than {limits.memory_mb} MB")
        raise DecodeError(f"the decoder crashed (exit code {process.returncode})")
    result = json.loads(result_file.read_text())
    if not result["times"]:
        raise DecodeError(result["error"])
    shape = (len(result["times"]), *result["size"], 3)
    frames = np.memmap(folder / result["file"], np.uint8, "r", shape=shape)
    notes = list(result["notes"])
    # every reader that was tried complains about the same places again
    damage = max(len(_DAMAGE.findall(part)) for part in text.split(_NEXT_READER))
    if damage:
        notes.append(f"the decoder reported {damage} damaged places")
    return Video(frames, np.array(result["times"]), result["duplicates"], damage, tuple(notes))


def find_shots(video: Video) -> list[Shot]:
    """Splits at hard cuts and drops flat (faded) frames.

    A cut is a jump in appearance across which local features do not match: a fast camera changes
    the picture as much as a cut does, but its frames still correspond.
    """
    import cv2

    thumbs, flat = [], []
    for frame in video.frames:
        thumb = cv2.resize(frame, (48, 27), interpolation=cv2.INTER_AREA).astype(np.float32)
        thumbs.append(thumb)
        flat.append(float(thumb.std()) < FLAT_FRAME_STD)
    jumps = np.array(
        [0.0] + [float(np.abs(b - a).mean()) for a, b in itertools.pairwise(thumbs)], np.float32
    )
    shots, start = [], 0
    for i in range(1, len(thumbs)):
        around = np.delete(jumps[max(1, i - 6) : i + 7], min(i - 1, 6))
        usual = float(np.median(around)) if len(around) else 0.0
        suspicious = jumps[i] > max(6.0, 2.5 * usual) or jumps[i] > 25.0
        border = flat[i] or flat[i - 1]
        if border or (suspicious and not _same_scene(video.frames[i - 1], video.frames[i])):
            if not flat[i - 1]:
                shots.append(Shot(start, i))
            start = i
    if len(thumbs) and not flat[-1]:
        shots.append(Shot(start, len(thumbs)))
    return shots


def split_long(shot: Shot, times: np.ndarray, max_seconds: float) -> list[Shot]:
    """Cuts a shot into equal clips of at most `max_seconds`."""
    duration = float(times[shot.stop - 1] - times[shot.start])
    pieces = max(1, int(np.ceil(duration / max_seconds - 1e-6)))
    edges = np.linspace(times[shot.start], times[shot.stop - 1], pieces + 1)[1:-1]
    bounds = [shot.start, *(int(np.searchsorted(times, edge)) for edge in edges), shot.stop]
    return [Shot(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def picture_area(frames: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns inside the black bars, as slices; everything where there are no bars.

    A bar is a border that stays black over the whole clip. Bars that would eat more than half of
    the picture are a dark scene, not bars.
    """
    height, width = frames.shape[1:3]
    sample = frames[np.unique(np.linspace(0, len(frames) - 1, 16).astype(int))]
    brightest = sample.max(axis=(0, 3)).astype(np.float32)
    rows = np.flatnonzero(np.quantile(brightest, 0.98, axis=1) > DARK_LEVEL)
    columns = np.flatnonzero(np.quantile(brightest, 0.98, axis=0) > DARK_LEVEL)
    if not len(rows) or not len(columns):
        return slice(0, height), slice(0, width)
    top, bottom = _bar_edges(rows, height)
    left, right = _bar_edges(columns, width)
    if (bottom - top) * (right - left) < 0.5 * height * width:
        return slice(0, height), slice(0, width)
    return slice(top, bottom), slice(left, right)


def _bar_edges(inside: np.ndarray, length: int) -> tuple[int, int]:
    """First and last+1 picture row; two more where a bar ends, since codecs blur its edge."""
    first, last = int(inside[0]), int(inside[-1]) + 1
    first = first + 2 if first > 2 else 0
    last = last - 2 if last < length - 2 else length
    return first, last


def _same_scene(before: np.ndarray, after: np.ndarray) -> bool:
    """True when enough SIFT features of two frames follow one homography or epipolar geometry."""
    import cv2

    sift = cv2.SIFT_create(nfeatures=800, contrastThreshold=0.02)
    described = []
    for frame in (before, after):
        scale = 320.0 / max(frame.shape[:2])
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        described.append(sift.detectAndCompute(gray, None))
    (points_a, features_a), (points_b, features_b) = described
    if min(len(points_a), len(points_b)) < 20:
        return False
    pairs = cv2.BFMatcher().knnMatch(features_a, features_b, k=2)
    good = [p[0] for p in pairs if len(p) == 2 and p[0].distance < 0.75 * p[1].distance]
    # one match per target: repeated texture sends many features to one place
    good = list({match.trainIdx: match for match in good}.values())
    if len(good) < 12:
        return False
    a = np.array([points_a[m.queryIdx].pt for m in good], np.float32)
    b = np.array([points_b[m.trainIdx].pt for m in good], np.float32)
    plane, _ = fit_homography(a, b, threshold=6.0, seed=0)
    on_plane = int((homography_error(plane, a, b) < 6.0).sum())
    mirrored = plane is not None and np.linalg.det(plane[:2, :2]) <= 0
    if on_plane >= max(12, 0.3 * len(good)) and not mirrored:
        return True
    lines, _ = fit_fundamental(a, b, threshold=2.0, seed=0)
    on_lines = float((sampson_error(lines, a, b) < 2.0).mean())
    return len(good) >= 25 and on_lines >= 0.7 and not mirrored


# ------------------------------------------------------------------ inside the decoding process


@dataclasses.dataclass
class _Reader:
    """One attempt at a file: how many frames it declares and an iterator over (time, frame)."""

    name: str
    declared: int
    frames: Iterator[tuple[float, np.ndarray]]


def _decord_reader(path: str) -> _Reader:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    declared, fps = len(reader), reader.get_avg_fps() or 25.0
    times = reader.get_frame_timestamp(np.arange(declared))[:, 0].astype(float)
    if not np.all(np.isfinite(times)) or np.any(np.diff(times) <= 0):
        times = np.arange(declared) / fps

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for time in times:
            frame = reader.next().asnumpy()
            if frame.shape[-1] != 3:  # decord misreads the row padding of some very narrow videos
                raise RuntimeError(f"decord gives frames of shape {frame.shape}")
            yield float(time), frame

    return _Reader("decord", declared, frames())


def _opencv_reader(path: str) -> _Reader:
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise RuntimeError("OpenCV finds no video stream")
    fps = capture.get(cv2.CAP_PROP_FPS) or 25.0

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        last, index = -1.0, 0
        while capture.grab():
            time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000.0
            ok, frame = capture.retrieve()
            if not ok:
                break
            if time <= last:  # containers without timestamps report 0 for every frame
                time = last + 1.0 / fps if index else 0.0
            last, index = time, index + 1
            yield time, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    return _Reader("OpenCV", int(max(0, capture.get(cv2.CAP_PROP_FRAME_COUNT))), frames())


def _ffmpeg_reader(path: str) -> _Reader:
    import imageio_ffmpeg

    stream = imageio_ffmpeg.read_frames(path, pix_fmt="rgb24")
    info = stream.__next__()
    width, height = info["size"]
    fps = info.get("fps") or 25.0

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for index, data in enumerate(stream):
            yield index / fps, np.frombuffer(data, np.uint8).reshape(height, width, 3)

    return _Reader("ffmpeg", 0, frames())


def _store(reader: _Reader, file: Path, video_seconds: float) -> dict:
    """Writes the kept frames of one reader to `file`; errors midway end the footage there."""
    import cv2

    times: list[float] = []
    size, previous, decoded, duplicates, error, cut_short = None, None, 0, 0, "", False
    first_time, last_time = None, -np.inf
    with open(file, "wb") as out:
        try:
            for time, frame in reader.frames:
                first_time = time if first_time is None else first_time
                if time - first_time > video_seconds:
                    cut_short = True
                    break
                decoded += 1
                if time - last_time < FRAME_GAP_S:
                    continue
                last_time = time
                height, width = frame.shape[:2]
                scale = min(1.0, SHORT_SIDE / min(height, width))
                if size is None:
                    size = (max(16, round(height * scale)), max(16, round(width * scale)))
                if (height, width) != size:
                    frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)
                gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
                gray = cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
                gray = gray.astype(np.float32)
                if previous is not None and _near_duplicate(previous, gray):
                    duplicates += 1
                    continue
                previous = gray
                out.write(np.ascontiguousarray(frame).tobytes())
                times.append(time)
        except Exception as failure:  # decoders raise anything on broken data
            if isinstance(failure, OSError) and failure.errno in _DISK_ERRORS:
                raise  # the disk, not the video
            error = _first_line(failure)
    return {
        "decoder": reader.name, "declared": reader.declared, "decoded": decoded, "size": size,
        "times": times, "duplicates": duplicates, "error": error, "cut_short": cut_short,
        "file": file.name,
    }  # fmt: skip


def _near_duplicate(previous: np.ndarray, gray: np.ndarray) -> bool:
    difference = np.abs(gray - previous)
    return bool(
        difference.mean() < DUPLICATE_MEAN and np.quantile(difference, 0.995) < DUPLICATE_PEAK
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[[\d:]+\]\s*\S+:\d+:\s*", "", lines[0]) if lines else type(error).__name__
    return text[:160]


def _decode_in_this_process(path: str, folder: Path, limits: DecodeLimits) -> dict:
    best, declared = None, 0
    for make in (_decord_reader, _opencv_reader, _ffmpeg_reader):
        try:
            reader = make(path)
        except Exception:  # this reader cannot open it; the next may
            continue
        print(_NEXT_READER, file=sys.stderr, flush=True)
        attempt = _store(reader, folder / f"{reader.name}.rgb", limits.video_seconds)
        declared = max(declared, attempt["declared"])
        if best is None or attempt["decoded"] > best["decoded"]:
            best = attempt
        if not attempt["error"] and attempt["decoded"]:
            if attempt["cut_short"] or attempt["decoded"] >= 0.9 * declared:
                break
    if best is None or not best["times"]:
        return {"times": [], "error": "no readable video stream (not a video, audio only, or its "
                "index is missing)"}  # fmt: skip
    notes = []
    if best["decoder"] != "decord":
        notes.append(f"read by {best['decoder']}")
    if not best["cut_short"] and best["decoded"] < 0.9 * declared:
        notes.append(f"damaged: {best['decoded']} of {declared} frames were salvaged")
    elif best["error"]:
        notes.append(f"damaged after {best['decoded']} frames")
    if best["cut_short"]:
        notes.append(f"only the first {limits.video_seconds:g} s were read")
    return {**best, "notes": notes}


def _main(path: str, folder: str, limits_json: str) -> None:
    die_with_parent()
    limits = DecodeLimits(**json.loads(limits_json))
    memory = limits.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        result = _decode_in_this_process(path, Path(folder), limits)
        (Path(folder) / "result.json").write_text(json.dumps(result))
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            sys.exit(_DISK_FULL)
        raise


if __name__ == "__main__":
    import cv2

    cv2.setNumThreads(1)
    _main(*sys.argv[1:])
