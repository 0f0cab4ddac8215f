"""`see3d create`: photos in, a scene out."""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax import cli_options
from see3d_jax.cli_options import PATH
from see3d_jax.cli_output import finish, note, output_options, say, shows_progress


@click.command(
    epilog="""\b
Examples:
  # three photos of one place, taken from different spots
  see3d create a.jpg b.jpg c.jpg --output out/room
  # a folder of photos or a posed scene; quick, to see whether it works at all
  see3d create my_photos --output out/room --preset draft
  # one photo, its depth by a network, a camera path of your own
  see3d create photo.jpg --depth depth_anything_v2.onnx --trajectory path.json --output out/room
  # then
  see3d view out/room
"""
)
@click.argument("photos", nargs=-1, type=PATH, metavar="PHOTO…")
@cli_options.output
@click.option(
    "--preset", type=click.Choice(["draft", "normal", "best"]), default="normal",
    show_default=True, help="How much work to put in.",
)  # fmt: skip
@cli_options.checkpoint
@click.option(
    "--depth", type=PATH, default=None, metavar="FILE",
    help="Depth map of a single photo, or a depth network (.onnx) for any number [default: the "
    "folder's own depth, else stereo between the photos].",
)  # fmt: skip
@cli_options.depth_kind
@click.option(
    "--trajectory", default=None, metavar="MOVE_OR_FILE",
    help="As of generate [default: interpolate through the photos; orbit around a single one].",
)  # fmt: skip
@click.option("--views", type=int, default=None, metavar="N", help="New views [default: preset's].")
@click.option(
    "--fov", type=float, default=None, metavar="DEGREES",
    help="Horizontal field of view of a single photo [default: 55].",
)  # fmt: skip
@cli_options.steps
@cli_options.seed
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and stop.")
@output_options
def create(photos: tuple[Path, ...], output: Path, only_plan: bool, **options: object) -> None:
    """Makes a 3D scene of one or more photos (or a folder): views, Gaussians, a page to look at.

    Checks the photos, finds their cameras and depth, generates views in between, fits 3D Gaussians.
    Says first what it will do and about how long it takes. What is finished is kept: stop it at any
    time, and run the same command again to go on.
    """
    from see3d_jax.pipelines.create import create as run
    from see3d_jax.pipelines.create_plan import Plan

    def announce(plan: Plan) -> None:
        if only_plan:
            finish(
                f"see3d create → {output} would do:\n{plan.text()}",
                seconds=round(plan.seconds, 1), memory_gb=round(plan.memory, 2),
                device=plan.device, advice=plan.advice,
                steps=[{"name": s.name, "what": s.what, "seconds": s.seconds} for s in plan.steps],
            )  # fmt: skip
            raise click.exceptions.Exit(0)
        say(f"see3d create → {output}\n{plan.text()}")
        if plan.memory > plan.available:
            note(
                f"note: about {plan.memory:.1f} GB of memory are needed and this machine has "
                f"{plan.available:.1f}; try --preset draft"
            )

    made = run(
        photos, output, announce=announce, report=lambda line: note(f"· {line}"),
        progress=shows_progress(), **options,
    )  # fmt: skip
    for text in made.notes:
        note(f"note: {text}")
    finish(
        f"done in {sum(made.seconds.values()):.0f} s of work: open {made.report} in a browser\n"
        f"  {made.gaussians}    the scene, for any 3DGS viewer\n"
        f"  {made.video}    a flight around it\n"
        f"  turn around in it, plan a path: see3d view {output}",
        report=made.report, gaussians=made.gaussians, video=made.video, metrics=made.metrics,
        seconds=made.seconds, notes=made.notes,
    )  # fmt: skip
