"""Draws how a training run went: the loss of every step, and held-out quality beside the baselines.

    python -m tools.plot_run --workdir DIR --output FILE.svg|.png     (pip install '.[plots]')

Reads metrics.jsonl alone, so it also works on a run that is still going on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import atomic_path

# Name in metrics.jsonl → what it is, as docs/training.md calls it.
METHODS = {
    "": "model",
    "_copy": "nearest reference",
    "_condition": "condition, holes black",
    "_inpainted": "condition, holes filled by Telea",
}


@click.command(
    epilog="""\b
Examples:
  python -m tools.plot_run --workdir runs/tiny --output tiny.svg
"""
)
@click.option("--workdir", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help=".svg or .png")
def app(workdir: Path, output: Path) -> None:
    """Draws the curves of the training run in WORKDIR to OUTPUT."""
    if output.suffix not in (".svg", ".png"):
        raise InputError(f"--output {output}: expected a name that ends in .svg or .png")
    draw(read_metrics(workdir), output)
    click.echo(f"wrote {output}")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl; InputError naming the line that is broken."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --workdir wants the folder of a training run")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}: line {number} is not JSON") from None
    return entries


def draw(entries: list[dict[str, Any]], output: Path) -> None:
    """Two panels: loss (a moving mean), and PSNR of the whole views and of their holes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed: pip install '.[plots]'") from None
    steps, losses = np.array([(e["step"], e["loss"]) for e in entries if "loss" in e]).T
    scores = [entry for entry in entries if "heldout_psnr" in entry]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = max(1, min(100, len(losses) // 10))
    left.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"))
    left.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
    for index, (suffix, label) in enumerate(METHODS.items()):
        for name, style in (("psnr", "-"), ("psnr_hole", "--")):
            points = [(e["step"], e.get(f"heldout_{name}{suffix}")) for e in scores]
            points = [point for point in points if point[1] is not None]
            if points:
                marker = "o" if not suffix else None
                right.plot(
                    *zip(*points), style, color=f"C{index}", marker=marker, markersize=3,
                    label=label if name == "psnr" else None,
                )  # fmt: skip
    right.set(xlabel="step", ylabel="held-out PSNR, dB (dashed: holes)")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=150)


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
