"""What the workers leave on disk, and how it becomes decisions.jsonl and ArrayRecord shards.

    OUTPUT/.work/videos/KEY/result.json      the line of decisions.jsonl
                            clip-003.record  a serialised ClipRecord per kept clip
                            sheet.jpg        contact sheet for report.html
                            timing.json      CPU seconds (kept out of every compared output)

KEY hashes the file's name, size and time and the settings, so a changed file or setting is judged
anew and everything else is reused. A video's folder appears by one rename when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.stages import Clip, Settings, Verdict
from see3d_jax.data.records import ClipRecord, encode, encode_jpeg, write_shards
from see3d_jax.files import atomic_path, write_text

FORMAT = 1  # raise it when verdicts or records change, so that old results are not reused


def video_key(path: Path, name: str, settings: Settings) -> str:
    """Folder name of a video's results."""
    try:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = []
    text = json.dumps([FORMAT, name, state, dataclasses.asdict(settings)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def decision_line(name: str, verdict: Verdict) -> dict[str, object]:
    """One line of decisions.jsonl."""
    return {
        "path": name,
        "decision": verdict.decision,
        "stage": verdict.stage,
        "reason": verdict.reason,
        "notes": list(verdict.notes),
        "scores": verdict.scores,
        "clips": [
            {
                "start_s": round(float(clip.times[0]), 4),
                "end_s": round(float(clip.times[-1]), 4),
                "decision": clip.decision,
                "stage": clip.stage,
                "reason": clip.reason,
                "scores": clip.scores,
            }
            for clip in verdict.clips
        ],
    }


def error_line(name: str, reason: str) -> dict[str, object]:
    """The line of a video that could not be judged."""
    return decision_line(name, Verdict("error", "video", reason, {}, []))


def clip_record(name: str, index: int, clip: Clip) -> bytes:
    """A kept clip as a serialised record."""
    height, width = clip.frames.shape[1:3]
    return encode(
        ClipRecord(
            clip_id=f"{name}#{index:03d}",
            source=name,
            fps=float(1.0 / np.median(np.diff(clip.times))),
            timestamps=clip.times.astype(np.float32),
            images=[encode_jpeg(np.ascontiguousarray(frame)) for frame in clip.frames],
            height=height,
            width=width,
        )
    )


def store_video(
    folder: Path, name: str, verdict: Verdict, sheet: bytes | None, cpu_seconds: float
) -> None:
    """Writes the results of one video; the folder appears complete or not at all."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for index, clip in enumerate(verdict.clips):
            if clip.decision == "keep":
                record = clip_record(name, index, clip)
                (temporary / f"clip-{index:03d}.record").write_bytes(record)
        if sheet is not None:
            (temporary / "sheet.jpg").write_bytes(sheet)
        (temporary / "timing.json").write_text(json.dumps({"cpu_seconds": cpu_seconds}))
        line = json.dumps(decision_line(name, verdict), allow_nan=False)
        (temporary / "result.json").write_text(line + "\n")


def merge(lines: Sequence[dict], folders: Sequence[Path], output: Path, shards: int) -> int:
    """Writes decisions.jsonl and the shards in the order of `folders`; returns kept clips.

    With nothing kept no shard is written and old ones are removed.
    """

    def records() -> Iterator[bytes]:
        for folder in folders:
            for file in sorted(folder.glob("clip-*.record")):
                yield file.read_bytes()

    kept = sum(len(list(folder.glob("clip-*.record"))) for folder in folders)
    if kept:
        write_shards(records(), output, min(shards, kept))
    else:
        for stale in [*output.glob("clips-*.array_record"), *output.glob("*_info.json")]:
            stale.unlink()
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_text(output / "decisions.jsonl", text)
    return kept
