"""`see3d evaluate`: the options; the work is `see3d_jax.evaluation.benchmark.run.evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax import cli_options
from see3d_jax.cli_options import PATH
from see3d_jax.cli_output import finish, note, output_options, say

# Named here and not taken from the registry, so that --help imports nothing heavy; a test compares.
BENCHMARK_NAMES = (
    "llff", "dtu", "mipnerf360", "tanks_and_temples", "realestate10k", "co3d", "folder",
)  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  # any posed folder, or a folder of such folders: 1 and 3 given views
  see3d evaluate --benchmark folder --data scenes --checkpoint workdir --output out/evaluation
  # sparse views with ReconFusion's splits, before and after 3D Gaussians
  see3d evaluate --benchmark llff --data nerf_llff_data --splits reconfusion/llff \\
      --checkpoint weights/see3d --reconstruct --output out/llff
  # one given view of RealEstate10K, depth from a network
  see3d evaluate --benchmark realestate10k --data re10k --depth depth_anything.onnx \\
      --checkpoint weights/see3d --output out/re10k
"""
)
@click.option(
    "--benchmark", type=click.Choice(BENCHMARK_NAMES), required=True,
    help="Whose layout and protocol; folder: any posed scenes.",
)  # fmt: skip
@click.option(
    "--data", type=PATH, required=True, metavar="DIR",
    help="One scene, or a folder of scenes, as they are distributed (docs/evaluation.md).",
)  # fmt: skip
@cli_options.checkpoint
@cli_options.output
@click.option(
    "--inputs", type=int, multiple=True, metavar="N",
    help="How many views are given; repeat for several tables [default: the benchmark's: 3, 6 and "
    "9 of sparse ones, 1 of single-view ones, 1 and 3 of folder].",
)  # fmt: skip
@click.option("--scene", "scenes", multiple=True, metavar="NAME", help="Only these; repeat.")
@click.option(
    "--splits", type=PATH, default=None, metavar="DIR",
    help="Holds SCENE/train_test_split_N.json [default: the scene's own folder, else the "
    "benchmark's rule].",
)  # fmt: skip
@click.option(
    "--depth", default="auto", show_default=True, metavar="KIND_OR_FILE",
    help="Depth of the given views: scene (the benchmark's), stereo (between them), neighbours "
    "(stereo with frames that are neither given nor scored) or a depth network (.onnx). auto: the "
    "scene's, else stereo of 3 or more, else neighbours.",
)  # fmt: skip
@cli_options.size
@cli_options.steps
@cli_options.guidance
@cli_options.sampler
@click.option("--views-per-round", type=int, default=None, metavar="N", help="As of generate.")
@click.option(
    "--test-views", type=int, default=None, metavar="N",
    help="Predict at most N views of each scene, evenly chosen [default: all of the split].",
)  # fmt: skip
@click.option(
    "--reconstruct", is_flag=True,
    help="Also fit 3D Gaussians, to the given photos alone and with the model's views.",
)  # fmt: skip
@click.option("--fit-steps", type=int, default=2000, show_default=True, help="Of each fit.")
@click.option("--gaussians", type=int, default=15_000, show_default=True, help="Of each fit.")
@click.option("--lpips/--no-lpips", "with_lpips", default=True, show_default=True)
@cli_options.seed
@output_options
def evaluate(
    benchmark: str, data: Path, output: Path, checkpoint: Path | None, inputs: tuple[int, ...],
    scenes: tuple[str, ...], splits: Path | None, with_lpips: bool, **options: object,
) -> None:  # fmt: skip
    """Measures a checkpoint against baselines on a benchmark.

    PSNR, SSIM and LPIPS of predicted views, on all pixels, on those the warp knows and on its
    holes apart, beside the nearest photo, the raw warp and classic inpainting. OUTPUT holds
    results.json, report.md, report.html and every picture. Finished scenes are kept: run it again
    to go on.
    """
    from see3d_jax.evaluation.benchmark.datasets import BENCHMARKS
    from see3d_jax.evaluation.benchmark.run import Settings
    from see3d_jax.evaluation.benchmark.run import evaluate as run

    settings = Settings(
        benchmark=benchmark, checkpoint=checkpoint and str(checkpoint),
        inputs=tuple(dict.fromkeys(inputs)) or BENCHMARKS[benchmark].inputs,
        networks=("alex", "vgg") if with_lpips else (), **options,
    )  # fmt: skip
    results = run(
        settings, data, output, splits=splits, scenes=scenes,
        say=note,
    )  # fmt: skip
    for failed in results["failed"]:
        where = f"{failed['scene']} with {failed['inputs']} given"
        note(f"note: {where} was left out: {failed['reason']}")
    say((output / "report.md").read_text(encoding="utf-8"))
    finish(
        f"wrote {output}: {len(results['scenes'])} results; open {output}/report.html",
        output=output, results=results,
    )  # fmt: skip
