"""Command line of the curation: raw videos → decisions.jsonl, ArrayRecord shards, report.html.

WebVi3D (paper Sec. 3.1) in four stages, see data_prep.stages. One job per video, run one after
another, in a pool or on a Ray cluster; a finished video is never done again, so an interrupted run
continues when it is started again and ends with the same bytes. Files that cannot be read are
quarantined with their reason; the command fails only when nothing could be read.
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
from typing import TYPE_CHECKING

import click

from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import write_text

if TYPE_CHECKING:
    from data_prep.runners import Runner
    from data_prep.stages import Settings

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
EXAMPLES = """
Examples:

\b
  python -m data_prep.curate --input videos/ --output curated/
  python -m data_prep.curate --input 'raw/**/*.mp4' --output curated/ --workers 8 --shards 16
  python -m data_prep.curate --input clip.mov --output curated/ --semantic off
  python -m data_prep.curate --input list.txt --output /share/curated --runner ray --address auto

\b
Writes into the output folder:
  decisions.jsonl   one line per input: decision, stage, reason, scores, clips
  clips-*.array_record + TFDS metadata   the kept clips
  README.md, checksums.sha256   dataset card; for sha256sum -c
  report.html       totals, score histograms, a contact sheet per video
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to judge: where it is, what it is called in the outputs, where results go."""

    path: Path
    name: str
    folder: Path
    scratch: Path
    settings: Settings


@click.command(epilog=EXAMPLES)
@click.option("--input", "source", required=True, help="Folder (searched recursively), glob, "
              "video, list.txt of paths, or .parquet with a column path or file.")  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--config", type=click.Path(path_type=Path),
              help="JSON of data_prep.stages.Settings, thresholds included.")  # fmt: skip
@click.option("--runner", default="process", type=click.Choice(["serial", "process", "ray"]),
              show_default=True, help="Where the videos are judged.")  # fmt: skip
@click.option("--workers", default=0, help="Processes of the pool; 0 = one per core.")
@click.option("--address", default="", help="Ray cluster, such as auto or HOST:PORT; without it "
              "one starts on this machine.")  # fmt: skip
@click.option("--gpus-per-video", default=0.0, type=click.FloatRange(0), help="On Ray: share of a "
              "GPU that one video takes (for RAFT or an ONNX detector).")  # fmt: skip
@click.option("--shards", default=0, type=click.IntRange(0), help="ArrayRecord shards; 0 = as many "
              "as stay under 256 MB.")  # fmt: skip
@click.option("--all-stages", is_flag=True, help="Measure every score of every clip, also of "
              "rejected ones, for data_prep.evaluate --leave-one-out.")  # fmt: skip
@click.option("--max-clip-seconds", default=10.0, type=click.FloatRange(0.5), show_default=True)
@click.option("--semantic", default="auto", show_default=True,
              help="Detector: objectron (people and animals; see data_prep.install_detector), "
              "opencv (people; weak), off, or an .onnx file. auto is objectron where it is "
              "installed, else opencv; reruns keep what the first run took.")  # fmt: skip
@click.option("--flow", default="dis", show_default=True,
              help="Optical flow: dis, or RAFT weights of tools.convert_raft.")  # fmt: skip
@click.option("--tracker", default="lk", show_default=True, help="Point tracks: lk, or a network "
              "as .onnx with the tensors of CoTracker or TAPIR (docs/curation.md).")  # fmt: skip
@click.option("--decode-timeout", default=300.0, type=click.FloatRange(1.0), show_default=True,
              help="Seconds that decoding one file may take.")  # fmt: skip
@click.option("--decode-memory", default=6144, type=click.IntRange(512), show_default=True,
              help="Megabytes of address space that decoding one file may take.")  # fmt: skip
@click.option("--seed", default=0, type=click.IntRange(0), help="Of the robust estimators.")
def app(
    source: str,
    output: Path,
    config: Path | None,
    runner: str,
    workers: int,
    address: str,
    gpus_per_video: float,
    shards: int,
    all_stages: bool,
    max_clip_seconds: float,
    semantic: str,
    flow: str,
    tracker: str,
    decode_timeout: float,
    decode_memory: int,
    seed: int,
) -> None:
    """Selects 3D-aware clips (static scene, moving camera) from raw videos."""
    files = find_videos(source)
    from data_prep.flow import make_flow_backend
    from data_prep.runners import Runner, cores
    from data_prep.semantic import make_detector
    from data_prep.stages import Settings
    from data_prep.track_models import make_tracker
    from data_prep.video import DecodeLimits

    settings = read_settings(config) if config is not None else Settings()
    given = {
        "seed": seed, "semantic": semantic, "flow": flow, "tracker": tracker,
        "max_clip_seconds": max_clip_seconds,
        "all_stages": all_stages,
        "limits": DecodeLimits(timeout_seconds=decode_timeout, memory_mb=decode_memory),
    }  # fmt: skip
    if config is not None:  # what the command line does not say stays as in the file
        context = click.get_current_context()
        options = {"limits": "decode_timeout"}
        given = {
            name: value for name, value in given.items()
            if context.get_parameter_source(options.get(name, name)).name == "COMMANDLINE"
        }  # fmt: skip
    settings = dataclasses.replace(settings, **given)
    make_detector(settings.semantic)  # wrong files are refused before any work
    make_flow_backend(settings.flow)
    make_tracker(settings.tracker)
    where = Runner(runner, workers or cores(), address, gpus_per_video)
    curate(files, output, settings, where, shards)


def read_settings(path: Path) -> Settings:
    """Settings from JSON; unknown fields are refused with their name."""
    from data_prep.rules import Thresholds
    from data_prep.stages import Settings
    from data_prep.video import DecodeLimits

    def build(kind: type, values: object, where: str) -> object:
        if not isinstance(values, dict):
            raise InputError(f"{path}: {where or 'the file'} has to be a JSON object")
        known = {field.name for field in dataclasses.fields(kind)}
        for name in values:
            if name not in known:
                raise InputError(f"{path}: unknown setting {where}{name}")
        return kind(**values)

    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from None
    if isinstance(values, dict):
        for name, kind in {"limits": DecodeLimits, "thresholds": Thresholds}.items():
            if name in values:
                values[name] = build(kind, values[name], f"{name}.")
    return build(Settings, values, "")


def find_videos(source: str) -> list[tuple[Path, str]]:
    """(path, name in the outputs) of every video of a folder, glob or file, sorted by name.

    Names are relative to the folder, or to the deepest folder common to a glob's matches. Raises
    InputError when there is nothing.
    """
    root = Path(source)
    if root.is_file() and root.suffix.lower() in (".txt", ".parquet"):
        paths = _listed(root)
        root = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
        paths = [path.absolute() for path in paths]
    elif root.is_file():
        return [(root, root.name)]
    elif root.is_dir():
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


def _listed(path: Path) -> list[Path]:
    """The videos that a list names: one path per line, or a column of a Parquet file."""
    if path.suffix.lower() == ".txt":
        entries = [line.strip() for line in path.read_text().splitlines()]
        entries = [line for line in entries if line and not line.startswith("#")]
    else:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: is no Parquet file ({error})") from None
        column = next((name for name in ("path", "file") if name in table.column_names), None)
        if column is None:
            raise InputError(f"{path}: has no column path or file, only {table.column_names}")
        entries = [str(entry) for entry in table[column].to_pylist()]
    if not entries:
        raise InputError(f"{path}: lists no videos")
    return [path.parent / entry for entry in dict.fromkeys(entries)]  # absolute ones stay


def curate(
    files: Sequence[tuple[Path, str]],
    output: Path,
    settings: Settings,
    runner: Runner | None = None,
    shards: int = 0,
) -> list[dict]:
    """Judges `files` into `output`; returns the lines of decisions.jsonl.

    Raises InputError when the folder cannot be written, WorkError when no file could be read.
    """
    from tqdm import tqdm

    from data_prep.report import write_report
    from data_prep.runners import Runner, WorkerLost, run_jobs
    from data_prep.shards import error_line, merge, model_hashes, video_key

    work = output / ".work" / "videos"
    scratch = output / ".work" / "scratch"
    try:
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
        scratch.mkdir()
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    settings = dataclasses.replace(settings, semantic=choose_detector(settings.semantic, output))
    models = model_hashes(settings)
    jobs = [
        Job(path, name, work / video_key(path, name, settings, models), scratch, settings)
        for path, name in files
    ]
    todo = [job for job in jobs if not (job.folder / "result.json").is_file()]
    todo.sort(key=lambda job: -_file_size(job.path))  # a long one at the end would keep one core
    if len(todo) < len(jobs):
        click.echo(f"{len(jobs) - len(todo)} of {len(jobs)} videos are done already")
    lost: dict[str, str] = {}
    with tqdm(total=len(todo), desc="curate", unit="video", disable=not todo) as progress:
        for job, result in run_jobs(run_job, todo, runner or Runner()):
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


def choose_detector(name: str, output: Path) -> str:
    """What `--semantic name` means in this output folder; asked once, by the driver.

    `auto` stays what it was when the folder was begun, so that a rerun on a machine with another
    detector repeats nothing and mixes nothing. Raises InputError for a detector that is not here.
    """
    from data_prep.install_detector import COMMAND
    from data_prep.semantic import make_detector, settled

    note, here = output / ".work" / "detector", settled(name)
    if name == "auto" and note.is_file():
        before = note.read_text().strip()
        if before != here:
            click.echo(
                f"note: {output} was begun with --semantic {before} and goes on with it; give "
                f"--semantic {here} to judge everything anew",
                err=True,
            )
        here = before
    elif name == "auto" and here == "opencv":
        click.echo(
            "warning: no detector network is installed; OpenCV's takes its place, which misses "
            f"most animals and many people. To install one (33 MB, by npm): {COMMAND}",
            err=True,
        )
    make_detector(here)
    write_text(note, here + "\n")
    return here


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it gets its verdict later
        return 0


def run_job(job: Job) -> None:
    """Judges one video and stores the result; trouble with one video never ends the run."""
    from data_prep.report import video_sheet
    from data_prep.runners import LimitExceeded, limited
    from data_prep.semantic import make_detector
    from data_prep.shards import store_video
    from data_prep.stages import Verdict, judge_video

    make_detector(job.settings.semantic)  # missing on this node? then no video is to blame
    started = _cpu_seconds()
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        try:
            with limited(job.settings.video_seconds, job.settings.video_megabytes):
                verdict = judge_video(job.path, Path(folder), job.settings)
                sheet = video_sheet(verdict.clips)
        except LimitExceeded as error:
            verdict, sheet = Verdict("error", "video", f"judging it {error}", {}, []), None
        except (OSError, MemoryError):
            raise  # the machine's trouble (disk, memory), not the video's
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            verdict = Verdict("error", "video", f"{type(error).__name__}: {text}", {}, [])
            sheet = None
        seconds = {"cpu_seconds": _cpu_seconds() - started, **verdict.stage_seconds()}
        store_video(job.folder, job.name, verdict, sheet, seconds)


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
