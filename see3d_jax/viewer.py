"""How to look at a result: what a folder is and what opens it, and the report page of a run.

Results are recognised by the files in them, not by their name, so `describe` also works on folders
that were copied or renamed. `write_report` puts the stages of one run (curation, training,
generation, reconstruction) on one self-contained page: pictures, curves and numbers, no script
and nothing loaded from elsewhere. Curves are inline SVG, drawn here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax import html
from see3d_jax.errors import InputError

_SPLAT_VIEWERS = (
    "drag it into a splat viewer in the browser (https://superspl.at/editor, or any other that "
    "reads 3DGS .ply); nothing is uploaded"
)


# --- what is this, and what opens it ------------------------------------------------------------


def describe(path: str | os.PathLike[str]) -> str:
    """What `path` is and how to open it, as text of a few lines.

    Raises InputError for a missing path or one that holds nothing we know.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return _describe_file(path)
    found = [text for recognise in _RECOGNISERS if (text := recognise(path))]
    if not found or (path / "report.html").is_file():
        inside = sorted(child for child in path.iterdir() if child.is_dir())
        nested = [(child, text) for child in inside if (text := _first(child))]
        if not found and not nested:
            raise InputError(
                f"{path}: no result of see3d_jax in this folder (looked for run.json, report.html, "
                "transforms.json, point_cloud.ply, decisions.jsonl, metrics.jsonl)"
            )
        found = found or [f"{path}: a folder of results; look at one of"]
        for child, text in nested:
            what = text.splitlines()[0].removeprefix(f"{child}: ")
            found.append(f"  see3d view {child}    ({what})")
    return "\n".join(found)


def _first(folder: Path) -> str | None:
    return next((text for recognise in _RECOGNISERS if (text := recognise(folder))), None)


def _describe_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".ply":
        return f"{path}: {_ply_summary(path)}\n  {_SPLAT_VIEWERS}"
    if suffix == ".html":
        return f"{path}: a report\n  open it in a browser: {path.resolve().as_uri()}"
    if suffix in (".mp4", ".mov", ".webm", ".mkv", ".avi"):
        return f"{path}: a video\n  any player or browser plays it: {path.resolve().as_uri()}"
    if suffix in (".png", ".jpg", ".jpeg", ".webp"):
        return f"{path}: a picture\n  any viewer or browser shows it: {path.resolve().as_uri()}"
    if path.name == "transforms.json":
        return _scene(path.parent) or f"{path}: cameras"
    raise InputError(f"{path}: not a result that see3d_jax knows (.ply, .html, .mp4, .png, folder)")


def _ply_summary(path: Path) -> str:
    """One phrase from the header of a .ply; raises InputError when it has none."""
    with path.open("rb") as file:
        head = file.read(8192)
    if not head.startswith(b"ply"):
        raise InputError(f"{path}: not a PLY file (it does not start with 'ply')")
    lines = head.split(b"end_header")[0].decode("ascii", "replace").split("\n")
    count = next((line.split()[-1] for line in lines if line.startswith("element vertex")), "?")
    splats = any("scale_0" in line for line in lines)
    return f"{count} 3D Gaussians (3DGS .ply)" if splats else f"a point cloud of {count} points"


def _lines(title: str, folder: Path, entries: Sequence[tuple[str, str]]) -> str:
    """A title and one line for each entry that exists."""
    there = [f"  {name:22s} {what}" for name, what in entries if (folder / name).exists()]
    return "\n".join([f"{folder}: {title}", *there])


def _report(folder: Path) -> str | None:
    if not (folder / "report.html").is_file() or (folder / "decisions.jsonl").is_file():
        return None
    uri = (folder / "report.html").resolve().as_uri()
    return f"{folder}: the report of a run\n  open it in a browser: {uri}"


def _reconstruction(folder: Path) -> str | None:
    if not (folder / "point_cloud.ply").is_file():
        return None
    scores = read_json(folder / "metrics.json") or {}
    score = ""
    if isinstance(scores.get("psnr"), int | float):
        score = f", held-out PSNR {scores['psnr']:.2f} dB"
        if isinstance(scores.get("ssim"), int | float):
            score += f", SSIM {scores['ssim']:.3f}"
    title = f"a reconstructed scene: {_ply_summary(folder / 'point_cloud.ply')}{score}"
    return _lines(
        title,
        folder,
        [
            ("point_cloud.ply", _SPLAT_VIEWERS),
            ("orbit.mp4", "a flight around the scene; any video player"),
            ("renders.png", "held-out photos above what the scene shows from there"),
            ("metrics.json", "scores on held-out views"),
        ],
    )


def _generation(folder: Path) -> str | None:
    run = read_json(folder / "run.json")
    if not run or run.get("command") != "see3d generate":
        return None
    return _lines(
        f"{len(run.get('views', []))} generated views",
        folder,
        [
            ("contact_sheet.png", "start here: warp, mask, inpainted, generated (and truth)"),
            ("video.mp4", "the views as a video; any video player"),
            ("views", "the views themselves; warps/, masks/ and inpainted/ have the same names"),
            ("metrics.json", "scores against the truth"),
            ("transforms.json", f"cameras; next: see3d reconstruct --input {folder} --output DIR"),
        ],
    )


def _training(folder: Path) -> str | None:
    events = any(f for place in (folder, folder / "events") for f in place.glob("events.out.tf*"))
    if not events and not (folder / "metrics.jsonl").is_file():
        return None
    text = _lines(
        "a training workdir",
        folder,
        [
            ("samples", "sample grids: reference | condition | prediction | truth"),
            ("metrics.jsonl", "losses and speed, one line per logged step"),
        ],
    )
    if events:
        text += f"\n  curves: pip install tensorboard && tensorboard --logdir {folder}"
    return text


def _curation(folder: Path) -> str | None:
    if not (folder / "decisions.jsonl").is_file():
        return None
    decisions = [line["decision"] for line in read_json_lines(folder / "decisions.jsonl")]
    counts = ", ".join(f"{decisions.count(name)} {name}" for name in ("keep", "reject", "error"))
    uri = (folder / "report.html").resolve().as_uri()
    return _lines(
        f"curated videos ({counts})",
        folder,
        [
            ("report.html", f"open it in a browser: {uri}"),
            ("decisions.jsonl", "one line per video: decision, reason, scores, clips"),
        ],
    )


def _synthetic(folder: Path) -> str | None:
    scenes = sorted((folder / "scenes").glob("*/transforms.json"))
    if not scenes or not (folder / "records").is_dir():
        return None
    return _lines(
        f"{len(scenes)} ray-traced clips",
        folder,
        [
            ("contact_sheet.png", "frames of every clip"),
            ("videos", "the clips as mp4; next: python -m data_prep.curate --input …/videos"),
            ("scenes", "posed images with depth; see3d view any of them"),
            ("records", "shards to train on, with poses and depth"),
        ],
    )


def _scene(folder: Path) -> str | None:
    run = read_json(folder / "run.json")
    if run and run.get("command") == "see3d generate":
        return _generation(folder)
    scene = read_json(folder / "transforms.json")
    if scene:
        count = f"a posed scene of {len(scene.get('frames', []))} views (transforms.json)"
    elif (folder / "sparse").is_dir():
        count = "a COLMAP scene"
    else:
        return None
    return f"{folder}: {count}\n  next: see3d reconstruct --input {folder} --output DIR"


_RECOGNISERS: tuple[Callable[[Path], str | None], ...] = (
    _report,
    _reconstruction,
    _generation,
    _curation,
    _training,
    _synthetic,
    lambda folder: None if _generation(folder) else _scene(folder),
)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None when absent or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a torn last line (a run killed while writing) is skipped."""
    values = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


# --- the report of a run ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunFolders:
    """Where the stages of one run wrote; a stage that was not run is None.

    Attributes:
      videos: folder whose contact_sheet.png shows what the run started from.
      generations, reconstructions: heading → folder, shown in this order.
    """

    videos: Path | None = None
    curation: Path | None = None
    training: Path | None = None
    generations: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    reconstructions: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def write_report(
    path: str | os.PathLike[str],
    title: str,
    folders: RunFolders,
    commands: Sequence[tuple[str, float]] = (),
    introduction: str = "",
) -> None:
    """Writes the self-contained page of one run.

    `commands` are (command line, seconds) in the order they ran. Folders are read as they are: a
    file that a stage did not write leaves its picture or table out.
    """
    parts = [html.paragraph(introduction)] if introduction else []
    if folders.videos and (folders.videos / "contact_sheet.png").is_file():
        sheet = html.image(folders.videos / "contact_sheet.png", "Some frames of every video")
        parts.append(html.section("Videos", html.folded("Show the videos", html.scrolling(sheet))))
    if folders.curation:
        parts.append(_curation_section(folders.curation))
    if folders.training:
        parts.append(_training_section(folders.training))
    parts += [_generation_section(name, folder) for name, folder in folders.generations.items()]
    parts += [
        _reconstruction_section(name, folder) for name, folder in folders.reconstructions.items()
    ]
    if commands:
        rows = [(f"{seconds:.0f} s", command) for command, seconds in commands]
        total = sum(seconds for _, seconds in commands)
        parts.append(
            html.section(f"Commands ({total:.0f} s in all)", html.table(("time", "command"), rows))
        )
    html.write_page(path, title, *parts)


def _curation_section(folder: Path) -> str:
    lines = read_json_lines(folder / "decisions.jsonl")
    rows = [
        (
            Path(str(line.get("path", "?"))).name,
            line.get("decision", "?"),
            line.get("stage") or "",
            line.get("reason") or "",
            sum(clip.get("decision") == "keep" for clip in line.get("clips") or []),
        )
        for line in lines
    ]
    kept = sum(row[1] == "keep" for row in rows)
    body = [
        html.paragraph(
            f"{len(rows)} videos looked at, {kept} kept, {sum(row[4] for row in rows)} clips "
            "written. Training takes static scenes seen from a moving camera."
        ),
        html.folded(
            "Decision for every video" if len(rows) <= 60 else "Decisions for the first 60 videos",
            html.table(("video", "decision", "stage", "reason", "clips kept"), rows[:60]),
        ),
    ]
    return html.section("Curation", *body)


def _training_section(folder: Path) -> str:
    lines = read_json_lines(folder / "metrics.jsonl")
    body = []
    curves = []
    for key, label in (("loss", "training loss"), ("heldout_psnr", "held-out PSNR, dB")):
        points = [(line["step"], line[key]) for line in lines if "step" in line and key in line]
        if len(points) > 1:
            curves.append(curve_svg([p[0] for p in points], [p[1] for p in points], "step", label))
    if curves:
        body.append(f'<div class="grid">{"".join(curves)}</div>')
    if lines:
        last: dict[str, Any] = {}
        for line in lines:
            last.update(line)
        rows = [(k, _number(v)) for k, v in last.items() if isinstance(v, int | float)]
        body.append(html.folded("Last logged values", html.table(("value", "at the end"), rows)))
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        body.append(
            html.image(
                grids[-1],
                "Newest sample grid of the run, as trained: reference | condition | prediction "
                "| truth",
            )
        )
    return html.section("Training", *body)


def _generation_section(heading: str, folder: Path) -> str:
    run = read_json(folder / "run.json") or {}
    body = []
    if run.get("note"):
        body.append(html.paragraph(run["note"]))
    if (folder / "contact_sheet.png").is_file():
        body.append(
            html.scrolling(html.image(folder / "contact_sheet.png", "Views, stage by stage"))
        )
    scores = read_json(folder / "metrics.json")
    if scores:
        body.append(_score_table(scores))
    if (folder / "video.mp4").is_file():
        body.append(html.video(folder / "video.mp4", "The views, there and back"))
    return html.section(heading, *body)


def _score_table(scores: dict[str, Any]) -> str:
    header = ("image", "PSNR all", "PSNR known", "PSNR hole", "SSIM all", "SSIM known", "SSIM hole")
    rows = []
    for name, regions in scores["methods"].items():
        cells = [
            "–" if regions[region][metric] is None else f"{regions[region][metric]:{style}}"
            for metric, style in (("psnr", ".2f"), ("ssim", ".3f"))
            for region in ("all", "known", "hole")
        ]
        rows.append((name.replace("_", " "), *cells))
    note = (
        f"Against the true images of {scores['num_views']} cameras; {scores['hole_share']:.0%} of "
        "all pixels are holes of the warp. PSNR in dB. Higher is better."
    )
    return html.paragraph(note) + html.table(header, rows)


def _reconstruction_section(heading: str, folder: Path) -> str:
    scores = read_json(folder / "metrics.json") or {}
    rows = [
        (label, _number(scores[key]))
        for key, label in (
            ("psnr", "PSNR on held-out views, dB"),
            ("ssim", "SSIM on held-out views"),
            ("train_psnr", "PSNR on fitted views, dB"),
            ("num_train_views", "views fitted"),
            ("num_test_views", "views held out"),
            ("num_gaussians", "Gaussians"),
            ("starting_points", "started from"),
            ("steps", "steps"),
            ("milliseconds_per_step", "milliseconds per step"),
        )
        if key in scores
    ]
    body = [html.table(("measure", "value"), rows)] if rows else []
    if (folder / "renders.png").is_file():
        caption = "Held-out images above what the scene of Gaussians shows from there"
        body.append(html.scrolling(html.image(folder / "renders.png", caption)))
    if (folder / "orbit.mp4").is_file():
        body.append(html.video(folder / "orbit.mp4", "A flight along the path of the cameras"))
    return html.section(heading, *body)


def _number(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def curve_svg(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """One curve as inline SVG in the colours of the page, with a smoothed line over the raw one.

    `x` rises; non-finite `y` are left out. The smoothing is an exponential mean over about a tenth
    of the points.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not pairs:
        return html.paragraph(f"{y_label}: no finite values")
    xs, ys = (np.array(column, np.float64) for column in zip(*pairs))
    smooth = np.empty_like(ys)
    decay = 1 - 1 / max(1.0, len(ys) / 10)
    mean, weight = 0.0, 0.0
    for i, value in enumerate(ys):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth[i] = mean / weight
    width, height, left, bottom, top = 360, 220, 46, 34, 26
    low, high = float(np.quantile(ys, 0.005)), float(np.quantile(ys, 0.995))
    low, high = min(low, smooth.min()), max(high, smooth.max())
    high = high if high > low else low + max(abs(low), 1.0) * 0.1
    span_x = max(xs[-1] - xs[0], 1e-9)

    def place(values: np.ndarray) -> str:
        px = left + (xs - xs[0]) / span_x * (width - left - 10)
        py = (
            height
            - bottom
            - (np.clip(values, low, high) - low) / (high - low) * (height - bottom - top)
        )
        keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), 400)).astype(int))
        return " ".join(f"{px[i]:.1f},{py[i]:.1f}" for i in keep)

    ticks = []
    for share in (0.0, 0.5, 1.0):
        level = height - bottom - share * (height - bottom - top)
        ticks.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="currentColor" stroke-opacity=".2"/>'
            f'<text x="{left - 5}" y="{level + 4:.1f}" text-anchor="end">'
            f"{low + share * (high - low):.3g}</text>"
            f'<text x="{left + share * (width - left - 10):.1f}" y="{height - bottom + 15}" '
            f'text-anchor="{("start", "middle", "end")[round(share * 2)]}">'
            f"{xs[0] + share * span_x:.0f}</text>"
        )
    text = f"{y_label}: from {smooth[0]:.3g} to {smooth[-1]:.3g}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(text, quote=True)}" '
        'style="width:100%;max-width:36rem;font:11px system-ui,sans-serif;fill:currentColor">'
        f'<text x="{left}" y="14">{escape(y_label)}</text>{"".join(ticks)}'
        f'<text x="{width - 10}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>'
        f'<polyline points="{place(ys)}" fill="none" stroke="#3b82f6" stroke-opacity=".35"/>'
        f'<polyline points="{place(smooth)}" fill="none" stroke="#3b82f6" stroke-width="2"/>'
        f"</svg><figcaption>{escape(text)} (smoothed)</figcaption></figure>"
    )
