"""report.html of a curation run: totals, a histogram per score, a contact sheet per video.

On the sheets dynamic pixels are red, point tracks are green lines and detections yellow boxes, so
that thresholds can be judged by looking. Histograms stack kept (green) on rejected (grey) clips
with the threshold as a red line. The list is filtered by decision and reason in the page itself.
"""

from __future__ import annotations

import base64
import collections
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.rules import recorded_thresholds, threshold_of
from data_prep.stages import Clip
from see3d_jax import html
from see3d_jax.media import contact_sheet

CELL_HEIGHT = 108
COLUMNS = 5
MAX_CLIPS = 4
_SCRIPT = """<script>
const pick=document.getElementById('pick');
pick.onchange=()=>document.querySelectorAll('[data-tags]').forEach(
 e=>e.hidden=pick.value!=='all'&&!e.dataset.tags.split('|').includes(pick.value));
</script>"""


def video_sheet(clips: Sequence[Clip]) -> bytes | None:
    """JPEG contact sheet of up to four clips, kept ones first; None without frames."""
    shown = sorted(clips, key=lambda clip: clip.decision != "keep")[:MAX_CLIPS]
    shown = [clip for clip in shown if len(clip.frames)]
    if not shown:
        return None
    rows, labels = [], []
    for clip in shown:
        chosen = np.unique(np.linspace(0, len(clip.frames) - 1, COLUMNS).astype(int))
        masks = {mask.first: mask for mask in clip.masks}
        if masks or clip.detections:  # show frames that have something to show
            have = np.array(sorted(masks or clip.detections))
            chosen = have[np.unique(np.linspace(0, len(have) - 1, COLUMNS).astype(int))]
        rows.append([_draw(clip, int(frame), masks.get(int(frame))) for frame in chosen])
        labels.append(f"{clip.times[0]:.1f}-{clip.times[-1]:.1f}s {clip.decision}")
    buffer = io.BytesIO()
    sheet = Image.fromarray(contact_sheet(rows, labels, cell_height=CELL_HEIGHT))
    sheet.save(buffer, "JPEG", quality=72)
    return buffer.getvalue()


def _draw(clip: Clip, frame: int, mask: object | None) -> np.ndarray:
    import cv2

    picture = np.array(clip.frames[frame])
    if mask is not None:
        picture[mask.mask] = picture[mask.mask] // 3 + np.array([160, 0, 0], np.uint8)
    thickness = max(1, round(min(picture.shape[:2]) / 160))
    if clip.tracks is not None:
        trails = clip.tracks.xy[:, max(0, frame - 15) : frame + 1]
        seen = np.flatnonzero(np.isfinite(trails[:, -1, 0]))
        for index in seen[:: max(1, len(seen) // 60)]:
            trail = trails[index][np.isfinite(trails[index, :, 0])].round().astype(np.int32)
            cv2.polylines(picture, [trail], False, (40, 230, 90), thickness)
    for x, y, width, height in (d.box for d in clip.detections.get(frame, [])):
        cv2.rectangle(picture, (x, y), (x + width, y + height), (250, 220, 0), 2 * thickness)
    return picture


def write_report(path: Path, lines: Sequence[dict], folders: Sequence[Path | None]) -> None:
    """Writes the page; `folders[i]` holds sheet.jpg of `lines[i]`, or is None."""
    decisions = collections.Counter(line["decision"] for line in lines)
    clips = [clip for line in lines for clip in line["clips"]]
    kept = [clip for clip in clips if clip["decision"] == "keep"]
    seconds = sum(clip["end_s"] - clip["start_s"] for clip in kept)
    reasons = collections.Counter(_reason(line) for line in lines)
    totals = html.table(
        ["videos", "keep", "reject", "error", "clips", "clips kept", "seconds kept"],
        [[len(lines), decisions["keep"], decisions["reject"], decisions["error"], len(clips),
          len(kept), f"{seconds:.1f}"]],
    )  # fmt: skip
    options = ["all", "keep", "reject", "error", *sorted(reasons)]
    select = '<p><label>Show <select id="pick">' + "".join(
        f'<option value="{escape(o, quote=True)}">{escape(o)}</option>' for o in options
    )
    blocks = [_video_block(line, folder) for line, folder in zip(lines, folders)]
    html.write_page(
        path,
        "Curation report",
        totals,
        html.section("Reasons", html.table(["reason", "videos"], reasons.most_common())),
        html.section(
            "Scores per clip",
            html.paragraph("Green: kept, grey: rejected, red line: threshold. Clips that an "
                           "earlier stage rejected have no score."),
            f'<div class="grid">{"".join(_histograms(lines, clips))}</div>',
        ),
        html.section("Videos", select + "</select></label></p>", *blocks),
        _SCRIPT,
    )  # fmt: skip


def _reason(line: dict) -> str:
    return "could not be read" if line["decision"] == "error" else str(line["reason"])


def _video_block(line: dict, folder: Path | None) -> str:
    tags = escape("|".join([line["decision"], _reason(line)]), quote=True)
    numbers = {k: v for k, v in line["scores"].items() if isinstance(v, (int, float))}
    picture = ""
    if folder is not None and (folder / "sheet.jpg").is_file():
        data = base64.b64encode((folder / "sheet.jpg").read_bytes()).decode()
        picture = (
            f'<img loading="lazy" src="data:image/jpeg;base64,{data}" '
            f'alt="frames of {escape(line["path"], quote=True)}">'
        )
    notes = f" ({escape('; '.join(line['notes']))})" if line["notes"] else ""
    return (
        f'<article data-tags="{tags}"><h3>{escape(line["path"])}: {line["decision"]}</h3>'
        f"<p>{escape(line['stage'])}: {escape(line['reason'])}{notes}</p>{picture}"
        f"<details><summary>scores</summary>{html.table(['score', 'value'], numbers.items())}"
        + html.table(
            ["start", "end", "decision", "stage", "reason"],
            [[c["start_s"], c["end_s"], c["decision"], c["stage"], c["reason"]]
             for c in line["clips"]],
        )
        + "</details></article>"
    )  # fmt: skip


def _histograms(lines: Sequence[dict], clips: Sequence[dict]) -> list[str]:
    thresholds = recorded_thresholds(lines)
    figures = []
    for score, threshold in threshold_of():
        having = [clip for clip in clips if score in clip["scores"]]
        if having and threshold in thresholds:
            values = np.array([clip["scores"][score] for clip in having], float)
            keep = np.array([clip["decision"] == "keep" for clip in having])
            figures.append(_histogram(score, values, keep, float(thresholds[threshold])))
    return figures


def _histogram(score: str, values: np.ndarray, keep: np.ndarray, threshold: float) -> str:
    top = max(float(np.quantile(values, 0.95)), 1.6 * threshold, 1e-6)
    edges = np.linspace(0.0, top, 25)
    clipped = np.minimum(values, top)
    kept, _ = np.histogram(clipped[keep], edges)
    other, _ = np.histogram(clipped[~keep], edges)
    tallest = max(1, int((kept + other).max()))
    bars = []
    for i, (green, grey) in enumerate(zip(kept, other)):
        tall_green, tall_grey = 80.0 * green / tallest, 80.0 * grey / tallest
        bars.append(
            f'<rect x="{10 * i}" y="{80 - tall_green:.1f}" width="9" height="{tall_green:.1f}" '
            'fill="#2a9d50"/>'
            f'<rect x="{10 * i}" y="{80 - tall_green - tall_grey:.1f}" width="9" '
            f'height="{tall_grey:.1f}" fill="#8889"/>'
        )
    line = 240.0 * threshold / top
    return (
        f'<figure><svg viewBox="0 0 240 96" width="100%" role="img" aria-label="{score}">'
        f'{"".join(bars)}<path d="M{line:.1f} 0V80" stroke="#d33" stroke-width="1.5"/>'
        '<g font-size="9" fill="currentColor"><text x="0" y="92">0</text>'
        f'<text x="240" y="92" text-anchor="end">{top:.3g}</text></g></svg>'
        f"<figcaption>{score}, threshold {threshold:g}, {len(values)} clips, tallest bar "
        f"{tallest}</figcaption></figure>"
    )
