"""What the workers leave on disk, and how it becomes decisions.jsonl and ArrayRecord shards.

    OUTPUT/.work/videos/KEY/result.json      the line of decisions.jsonl
                            clip-003.record  a serialised ClipRecord per kept clip
                            sheet.jpg        contact sheet for report.html
                            timing.json      CPU seconds per stage, in no compared output

KEY hashes the file's name, size and time, the settings and the networks they name, so whatever
changes is judged anew and everything else is reused. A video's folder appears by one rename when it
is complete.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.install_detector import package_path
from data_prep.rules import recorded_thresholds
from data_prep.stages import Clip, Settings, Verdict
from see3d_jax.data.records import ClipRecord, encode, encode_jpeg, write_shards
from see3d_jax.files import atomic_path, write_text

SHARD_BYTES = 256 * 10**6
FORMAT = 2  # raise it when verdicts or records change, so that old results are not reused


def model_hashes(settings: Settings) -> dict[str, str]:
    """sha256 of every file with weights that the settings name, by the setting."""
    named = {name: Path(getattr(settings, name)) for name in ("semantic", "flow", "tracker")}
    if settings.semantic == "objectron":
        named["semantic"] = package_path()
    return {name: _sha256(path) for name, path in named.items() if path.is_file()}


def video_key(path: Path, name: str, settings: Settings, models: Mapping[str, str]) -> str:
    """Folder name of a video's results, judged with networks of these hashes."""
    try:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = []
    text = json.dumps([FORMAT, name, state, dataclasses.asdict(settings), models])
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
    folder: Path, name: str, verdict: Verdict, sheet: bytes | None, seconds: Mapping[str, float]
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
        (temporary / "timing.json").write_text(json.dumps(dict(seconds)))
        line = json.dumps(decision_line(name, verdict), allow_nan=False)
        (temporary / "result.json").write_text(line + "\n")


def merge(lines: Sequence[dict], folders: Sequence[Path], output: Path, shards: int) -> int:
    """Writes decisions.jsonl, the shards, a dataset card and checksums; returns kept clips.

    `shards` 0 makes as many as keep each under `SHARD_BYTES`. With nothing kept no shard is written
    and old ones are removed.
    """
    files = [file for folder in folders for file in sorted(folder.glob("clip-*.record"))]
    sizes = [file.stat().st_size for file in files]
    shards = min(shards or -(-sum(sizes) // SHARD_BYTES), len(files))
    if files:
        write_shards((files[i].read_bytes() for i in balanced(sizes, shards)), output, shards)
    else:
        for stale in [*output.glob("clips-*.array_record"), *output.glob("*_info.json")]:
            stale.unlink()
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_text(output / "decisions.jsonl", text)
    write_text(output / "README.md", dataset_card(lines, shards, sum(sizes)))
    named = [*sorted(output.glob("clips-*.array_record")), *sorted(output.glob("*_info.json"))]
    named += [output / "decisions.jsonl", output / "README.md"]
    sums = [f"{_sha256(file)}  {file.name}\n" for file in named]
    write_text(output / "checksums.sha256", "".join(sums))
    return len(files)


def balanced(sizes: Sequence[int], shards: int) -> list[int]:
    """Order of records that, dealt out round-robin, gives shards of nearly equal size.

    Every round takes the next largest records and gives the largest to the smallest shard; the
    last, incomplete round reaches the first shards only, as dealing does.
    """
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    filled, rounds = [0] * shards, []
    for start in range(0, len(sizes), shards or 1):
        batch = largest_first[start : start + shards]
        smallest_first = sorted(range(len(batch)), key=lambda shard: (filled[shard], shard))
        placed = dict(zip(smallest_first, batch))
        for shard, index in placed.items():
            filled[shard] += sizes[index]
        rounds.append([placed[shard] for shard in range(len(batch))])
    return [index for batch in rounds for index in batch]


def dataset_card(lines: Sequence[dict], shards: int, num_bytes: int) -> str:
    """README.md of the dataset: what is in it, what was left out and why, the thresholds."""
    clips = [clip for line in lines for clip in line["clips"]]
    kept = [clip for clip in clips if clip["decision"] == "keep"]
    seconds = sum(clip["end_s"] - clip["start_s"] for clip in kept)
    frames = sum(clip["scores"]["clip_frames"] for clip in kept)
    decisions = collections.Counter(line["decision"] for line in lines)
    reasons = collections.Counter(
        (clip["stage"], clip["reason"]) for clip in clips if clip["decision"] != "keep"
    )
    errors = collections.Counter(line["reason"] for line in lines if line["decision"] == "error")
    thresholds = recorded_thresholds(lines)
    detectors = sorted({line["scores"].get("detector", "") for line in lines} - {""})
    rows = [
        "# Static-scene clips with real viewpoint change", "",
        "Selected from raw videos by `python -m data_prep.curate` (WebVi3D, See3D Sec. 3.1).", "",
        "| | |", "|---|---|",
        f"| videos judged | {len(lines)} |",
        *(f"| ... {name} | {decisions[name]} |" for name in ("keep", "reject", "error")),
        f"| clips kept, of those cut | {len(kept)} of {len(clips)} |",
        f"| frames | {frames} |", f"| hours | {seconds / 3600:.3f} |",
        f"| detector of people and animals | {', '.join(detectors) or 'not needed'} |",
        f"| shards, megabytes | {shards}, {num_bytes / 1e6:.1f} |", "",
        "Why clips were left out:", "", "| stage | reason | clips |", "|---|---|---|",
        *(f"| {stage} | {reason} | {count} |" for (stage, reason), count in sorted(
            reasons.items(), key=lambda item: (-item[1], item[0]))), "",
        "Files that could not be read:", "", "| reason | files |", "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in sorted(errors.items())), "",
        "Thresholds:", "", "| name | value |", "|---|---|",
        *(f"| {name} | {value:g} |" for name, value in thresholds.items()), "",
        "Each record is a TFDS example (features.json); every score is in decisions.jsonl. Check "
        "the files with `sha256sum -c checksums.sha256`. Clips keep the rights of their sources.",
    ]  # fmt: skip
    return "\n".join(rows) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
