"""Options that several commands of `see3d` have, each said once."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)

output = click.option("--output", type=PATH, required=True, metavar="DIR", help="Result folder.")
checkpoint = click.option(
    "--checkpoint", type=PATH, default=None, metavar="DIR",
    help="Workdir of a training run, released weights made by tools.convert_see3d, or a packed "
    "model of tools.export_tiny [default: the small model inside the package].",
)  # fmt: skip
depth_kind = click.option(
    "--depth-kind", type=click.Choice(["disparity", "affine", "metric"]), default=None,
    help="What the depth network outputs, where its metadata does not say so: inverse depth or "
    "depth up to scale and shift, or metres.",
)  # fmt: skip
steps = click.option(
    "--steps", type=int, default=None, metavar="N",
    help="Denoising steps [default: what the training run evaluated with; 25 for released "
    "weights].",
)  # fmt: skip
guidance = click.option(
    "--guidance", type=float, default=None, metavar="G",
    help="G in (1 + G)·cond − G·uncond [default: what the training run evaluated with; 2 for "
    "released weights].",
)  # fmt: skip
sampler = click.option(
    "--sampler", type=click.Choice(["ddim", "fast", "official"]), default="ddim",
    show_default=True,
    help="fast: second order, for 10 to 20 steps; official: the released pipeline with its "
    "quirks (50 steps are 53 network calls).",
)  # fmt: skip
size = click.option(
    "--size", type=int, default=None, metavar="PIXELS",
    help="Side of the square of equal area to work at [default: the model's].",
)  # fmt: skip
seed = click.option("--seed", type=int, default=0, show_default=True)
