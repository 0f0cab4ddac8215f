"""Command line of the curation: raw videos → decisions.jsonl, ArrayRecord shards, report.html.

WebVi3D (paper Sec. 3.1) in four stages, see data_prep.stages. One job per video, run one after
another or in a pool; a finished video is never done again, so an interrupted run continues when it
is started again and ends with the same bytes. Files that cannot be read are quarantined with their
reason; the command fails only when nothing could be read.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from see3d_jax.errors import InputError, WorkError, run_command

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
EXAMPLES = """
Examples:

\b
  python -m data_prep.curate --input videos/ --output curated/
  python -m data_prep.curate --input 'raw/**/*.mp4' --output curated/ --workers 8 --shards 16
  python -m data_prep.curate --input clip.mov --output curated/ --semantic off

\b
Writes into the output folder:
  decisions.jsonl   one line per input: decision, stage, reason, scores, clips
  clips-*.array_record + TFDS metadata   the kept clips
  report.html       totals, score histograms, a contact sheet per video
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to judge: where it is, what it is called in the outputs, where results go."""

    path: Path
    name: str
    folder: Path
    scratch: Path
    settings: object


@click.command(epilog=EXAMPLES)
@click.option("--input", "source", required=True, help="Folder (searched recursively), glob, file.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--workers", default=0, help="Processes; 0 = one per core, 1 = no pool.")
@click.option("--shards", default=1, type=click.IntRange(1), help="ArrayRecord shards.")
@click.option("--max-clip-seconds", default=10.0, type=click.FloatRange(0.5), show_default=True)
@click.option("--semantic", default="opencv", show_default=True,
              help="Detector: opencv (people), off, an .onnx file, or the .tgz of "
              "`npm pack @mediapipe/objectron` (people and animals).")  # fmt: skip
@click.option("--flow", default="dis", show_default=True,
              help="Optical flow: dis, or RAFT weights of tools.convert_raft.")  # fmt: skip
@click.option("--decode-timeout", default=300.0, type=click.FloatRange(1.0), show_default=True,
              help="Seconds that decoding one file may take.")  # fmt: skip
@click.option("--decode-memory", default=6144, type=click.IntRange(512), show_default=True,
              help="Megabytes of address space that decoding one file may take.")  # fmt: skip
@click.option("--seed", default=0, type=click.IntRange(0), help="Of the robust estimators.")
def app(
    source: str,
    output: Path,
    workers: int,
    shards: int,
    max_clip_seconds: float,
    semantic: str,
    flow: str,
    decode_timeout: float,
    decode_memory: int,
    seed: int,
) -> None:
    """Selects 3D-aware clips (static scene, moving camera) from raw videos."""
    files = find_videos(source)
    from data_prep.flow import make_flow_backend
    from data_prep.semantic import make_detector
    from data_prep.stages import Settings
    from data_prep.video import DecodeLimits

    make_detector(semantic)  # wrong files are refused before any work
    make_flow_backend(flow)
    settings = Settings(
        seed=seed,
        semantic=semantic,
        flow=flow,
        max_clip_seconds=max_clip_seconds,
        limits=DecodeLimits(timeout_seconds=decode_timeout, memory_mb=decode_memory),
    )
    curate(files, output, settings, workers or os.cpu_count() or 1, shards)


def find_videos(source: str) -> list[tuple[Path, str]]:
    """(path, name in the outputs) of every video of a folder, glob or file, sorted by name.

    Names are relative to the folder, or to the deepest folder common to a glob's matches. Raises
    InputError when there is nothing.
    """
    root = Path(source)
    if root.is_file():
        return [(root, root.name)]
    if root.is_dir():
        paths = [p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
        if not paths:
            raise InputError(f"{source}: holds no videos ({' '.join(VIDEO_SUFFIXES)})")
    elif glob.has_magic(source):
        paths = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
        if not paths:
            raise InputError(f"{source}: no file matches this pattern")
        root = Path(os.path.commonpath([path.parent for path in paths]))
    else:
        raise InputError(f"{source}: no such file or folder; give --input a video folder or glob")
    return sorted(((p, p.relative_to(root).as_posix()) for p in paths), key=lambda item: item[1])


def curate(
    files: Sequence[tuple[Path, str]], output: Path, settings: object, workers: int, shards: int
) -> list[dict]:
    """Judges `files` into `output`; returns the lines of decisions.jsonl.

    Raises InputError when the folder cannot be written, WorkError when no file could be read.
    """
    from tqdm import tqdm

    from data_prep.report import write_report
    from data_prep.runners import WorkerLost, run_jobs
    from data_prep.shards import error_line, merge, video_key

    work = output / ".work" / "videos"
    scratch = output / ".work" / "scratch"
    try:
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
        scratch.mkdir()
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    jobs = [
        Job(path, name, work / video_key(path, name, settings), scratch, settings)
        for path, name in files
    ]
    todo = [job for job in jobs if not (job.folder / "result.json").is_file()]
    if len(todo) < len(jobs):
        click.echo(f"{len(jobs) - len(todo)} of {len(jobs)} videos are done already")
    lost: dict[str, str] = {}
    with tqdm(total=len(todo), desc="curate", unit="video", disable=not todo) as progress:
        for job, result in run_jobs(run_job, todo, min(workers, len(todo))):
            if isinstance(result, WorkerLost):
                lost[job.name] = str(result)
            progress.update()
            progress.set_postfix_str(job.name[-32:], refresh=False)
    shutil.rmtree(scratch, ignore_errors=True)
    lines = [
        error_line(job.name, lost[job.name])
        if job.name in lost
        else json.loads((job.folder / "result.json").read_text())
        for job in jobs
    ]
    folders = [job.folder for job in jobs if job.name not in lost]
    kept = merge(lines, folders, output, shards)
    sheets = [None if job.name in lost else job.folder for job in jobs]
    write_report(output / "report.html", lines, sheets)
    for stale in set(work.iterdir()) - {job.folder for job in jobs}:
        shutil.rmtree(stale, ignore_errors=True)
    _summarise(lines, folders, kept, output)
    if all(line["decision"] == "error" for line in lines):
        raise WorkError(
            f"none of {len(lines)} input file(s) could be read; first: {lines[0]['path']}: "
            f"{lines[0]['reason']}"
        )
    return lines


def run_job(job: Job) -> None:
    """Judges one video and stores the result; trouble with one video never ends the run."""
    from data_prep.report import video_sheet
    from data_prep.shards import store_video
    from data_prep.stages import Verdict, judge_video

    started = _cpu_seconds()
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        try:
            verdict = judge_video(job.path, Path(folder), job.settings)
            sheet = video_sheet(verdict.clips)
        except (OSError, MemoryError):
            raise  # the machine's trouble (disk, memory), not the video's
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            verdict = Verdict("error", "video", f"{type(error).__name__}: {text}", {}, [])
            sheet = None
        store_video(job.folder, job.name, verdict, sheet, _cpu_seconds() - started)


def _cpu_seconds() -> float:
    """CPU time of this process and of the decoders it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _summarise(lines: Sequence[dict], folders: Sequence[Path], kept: int, output: Path) -> None:
    counts = {name: 0 for name in ("keep", "reject", "error")}
    for line in lines:
        counts[line["decision"]] += 1
    seconds = sum(
        json.loads((folder / "timing.json").read_text())["cpu_seconds"] for folder in folders
    )
    click.echo(
        f"{len(lines)} videos: {counts['keep']} keep, {counts['reject']} reject, "
        f"{counts['error']} error; {kept} clips kept; {seconds:.0f} CPU s\n"
        f"  {output / 'decisions.jsonl'}\n  {output / 'report.html'}"
    )
    if kept:
        click.echo(f"  {output}/clips-*.array_record")


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
