"""Writes docs/evidence.md from the results of studies; no number in it is typed by hand.

    python -m benchmarks.evidence.report --input docs/evidence --page docs/evidence.md

Takes STUDY.json of `python -m benchmarks.evidence`, and report.md of `see3d evaluate` under the
name evaluate_WHAT.md; STUDY.md and evaluate_WHAT.jpg beside them are remarks and pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_text

_PATH = click.Path(path_type=Path)
# What the paper reports at full size, on real scenes.
_PAPER = {
    "table3": "MV-Posed 26.21 dB, SSIM 0.822, LPIPS 0.182; MV-UnposeM 16.14, 0.521, 0.443; "
    "MV-UnposeT 25.56, 0.811, 0.194",
    "table6": "0 % 25.56 dB, 10 % 25.95, 20 % 26.19, 60 % 26.14, 100 % (MV-Posed) 26.21",
    "scaling": "10 % 19.32 dB, 20 % 21.04, 40 % 22.57, 80 % 24.08, 100 % 25.01; unfiltered 19.55",
}
_TITLES = {
    "embedded": "The model inside the package",
    "table3": "Table 3: what the targets are conditioned on",
    "table6": "Table 6: how much posed data",
    "scaling": "How much data, and uncurated data",
    "leakage": "Leakage: what V_t tells of the target",
    "solvers": "Solvers: quality against network calls",
}
_COLUMNS = (
    ("psnr_all", "PSNR, all", 2), ("psnr_known", "known", 2), ("psnr_hole", "holes", 2),
    ("ssim", "SSIM", 3), ("lpips_all", "LPIPS, all", 3), ("lpips_hole", "holes", 3),
    ("validation_psnr_all", "validation: PSNR, all", 2), ("validation_psnr_hole", "holes", 2),
    ("validation_lpips_hole", "LPIPS, holes", 3),
)  # fmt: skip


@click.command()
@click.option("--input", "source", type=_PATH, required=True, help="Folder of STUDY.json files.")
@click.option("--page", type=_PATH, required=True, help="Markdown file to write.")
def app(source: Path, page: Path) -> None:
    """Makes the page."""
    studies = [source / f"{name}.json" for name in _TITLES if (source / f"{name}.json").is_file()]
    evaluations = sorted(source.glob("evaluate_*.md"))
    if not studies and not evaluations:
        raise InputError(f"{source}: holds no STUDY.json of `python -m benchmarks.evidence`")
    parts = [_section(path, page.parent) for path in studies]
    # right after the model that they are of, if it is there
    parts[1:1] = [_evaluation(path, page.parent) for path in evaluations]
    head = (
        "# Evidence\n\nMade by `python -m benchmarks.evidence.report`; every table names the "
        "command that reruns it.\nScores are of target views of scenes that no run has seen, shown "
        "to the model as warps of the references\nthrough imperfect depth; mean ± standard "
        "deviation over seeds. *Known* and *holes* are pixels of the warp;\nLPIPS (AlexNet) of "
        "holes is taken with the known pixels replaced by the truth.\n"
    )
    write_text(page, "\n".join([head, *parts]))
    click.echo(f"wrote {page}")


def _evaluation(path: Path, beside: Path) -> str:
    """A report of `see3d evaluate`, its headings one level lower."""
    text = path.read_text()
    lines = [f"#{line}" if line.startswith("#") else line for line in text.splitlines()]
    lines[0] = f"## {path.stem.removeprefix('evaluate_').replace('_', ' ').capitalize()}"
    picture = path.with_suffix(".jpg")
    if picture.is_file():
        lines.append(f"\n![{path.stem}]({picture.relative_to(beside)})")
    return "\n".join(lines) + "\n"


def _section(path: Path, beside: Path) -> str:
    try:
        table = json.loads(path.read_text())
        rows, free = table["rows"], table["baselines"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: is no result of a study ({error})") from None
    names = [name for name, _, _ in _COLUMNS if any(name in row for row in rows.values())]
    shown = [(name, title, digits) for name, title, digits in _COLUMNS if name in names]
    lines = [
        f"## {_TITLES[path.stem]}\n",
        f"{table['views']} views of {table['scenes']} scenes, `{table['command']}`"
        + "".join(f", {k} {v}" for k, v in _options(table).items()) + "\n",
        "| | " + " | ".join(title for _, title, _ in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]  # fmt: skip
    for name, scores in free.items():
        cells = (f"{scores[key]:.{digits}f}" for key, _, digits in shown)
        lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
    for name, scores in rows.items():
        cells = (
            f"{scores[key][0]:.{digits}f} ± {scores[key][1]:.{digits}f}" for key, _, digits in shown
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if path.stem in _PAPER:
        lines.append(f"\nThe paper, at full size: {_PAPER[path.stem]}.")
    picture = path.with_suffix(".jpg")
    if picture.is_file():
        lines.append(f"\n![{_TITLES[path.stem]}]({picture.relative_to(beside)})")
    curves = path.with_name(f"{path.stem}_curves.png")
    if curves.is_file():
        lines.append(f"\n![{_TITLES[path.stem]}, curves]({curves.relative_to(beside)})")
    notes = path.with_suffix(".md")
    if notes.is_file():
        lines.append("\n" + notes.read_text().strip())
    return "\n".join(lines) + "\n"


def _options(table: dict[str, Any]) -> dict[str, Any]:
    kept = ("seeds", "depth_noise")
    if table["options"].get("train"):
        kept = ("steps", "pretraining_steps", *kept, "overrides")
    return {
        name.replace("_", " "): table["options"][name]
        for name in kept
        if table["options"].get(name) not in (None, [], ())
    }


def main() -> None:
    """Console entry."""
    run_command(
        lambda: app(prog_name="python -m benchmarks.evidence.report", standalone_mode=False)
    )


if __name__ == "__main__":
    main()
