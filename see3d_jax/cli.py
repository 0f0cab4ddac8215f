"""The `see3d` command: from photos to new views, from views to a Gaussian scene, and how to look.

Every command is a thin shell around one function of `see3d_jax.pipelines` or `see3d_jax.viewer`;
what a command can do, Python can do too. Heavy imports stay inside the commands so that `--help`
answers at once. Exit codes and one-line errors: see `see3d_jax.errors`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from see3d_jax import cli_options
from see3d_jax.cli_create import create
from see3d_jax.cli_evaluate import evaluate
from see3d_jax.cli_export import export
from see3d_jax.cli_options import PATH
from see3d_jax.cli_output import finish, note, output_options, say, shows_progress
from see3d_jax.errors import run_command

# Options of reconstruct that are fields of FitConfig.
_IN_CONFIG = (
    "lpips_weight", "points_weight", "depth_weight", "depth_free_scale", "smooth_weight",
    "exposure", "densify",
)  # fmt: skip


def _say_which_weights(checkpoint: Path | None) -> None:
    """Says so when the small weights inside the package stand in for --checkpoint."""
    if checkpoint is None:
        note(
            "note: no --checkpoint, so the small model inside the package is used: it was trained "
            "on a CPU and is rough; for better views give a longer run (docs/training.md) or "
            "released weights (tools.convert_see3d)"
        )


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  see3d create a.jpg b.jpg c.jpg --output out/room
  see3d view out/room
  # or step by step
  see3d generate --input photo.jpg --depth depth.png --trajectory orbit --output out/views
  see3d reconstruct --input out/views --output out/scene
  see3d info out/scene

\b
Exit codes: 0 done, 1 the work failed, 2 bad input, 130 interrupted. Tab completion: docs/cli.md.
Curation and training are modules of their own:
  python -m data_prep.curate --help
  python -m see3d_jax.main --help
""",
)
@click.version_option(package_name="see3d_jax", prog_name="see3d")
def app() -> None:
    """3D creation from pose-free videos: new views of a photo, and a scene of 3D Gaussians."""


@app.command(
    epilog="""\b
Examples:
  # one photo with its depth map: eight views on an orbit
  see3d generate --input photo.jpg --depth depth.npy --trajectory orbit \\
      --checkpoint workdir --output out/views
  # a posed scene with depth: two frames are given, all others are generated and scored
  see3d generate --input scene --reference 0 --reference 12 \\
      --trajectory scene/transforms.json --checkpoint workdir --output out/views
  # then: a Gaussian scene of the result
  see3d reconstruct --input out/views --output out/scene
""",
)
@click.option(
    "--input", "source", type=PATH, required=True, metavar="PHOTO_OR_FOLDER",
    help="One photo (give --depth), a folder with transforms.json, a COLMAP model or an INRIA "
    "cameras.json, or a folder of photos alone: their cameras are found (pycolmap) and kept in "
    "OUTPUT_cameras. Or ready warps as the official release takes them (reference_images/, "
    "warp_images/): then no --trajectory.",
)  # fmt: skip
@click.option(
    "--depth", type=PATH, metavar="FILE",
    help="Planar depth of the (first) reference: .npy, .npz, .pfm or .exr in any unit, or 16-bit "
    ".png in steps of 1/1000; or a depth network (.onnx, see --depth-kind). Default: the folder's "
    "own depth, else stereo between two or more --reference frames.",
)  # fmt: skip
@cli_options.depth_kind
@click.option(
    "--trajectory", default=None, metavar="MOVE_OR_FILE",
    help="orbit, spiral, forward, dolly_zoom, lemniscate or look_around (scaled by the depth of "
    "the first reference); interpolate (a smooth path through the references); or a file of "
    "cameras: transforms.json, CSV (x, y, z, qw, qx, qy, qz), COLMAP folder.",
)  # fmt: skip
@cli_options.checkpoint
@cli_options.output
@click.option(
    "--views", type=int, default=None, metavar="N",
    help="How many views [default: 8; all cameras of a FILE]. More than a FILE has: a smooth path "
    "through its cameras.",
)  # fmt: skip
@click.option(
    "--reference", "references", multiple=True, metavar="INDEX_OR_NAME",
    help="Frame(s) of a folder to start from; repeat for several [default: the "
    "first, with two neighbours where depth has to come from stereo].",
)  # fmt: skip
@click.option(
    "--matcher", type=PATH, default=None, metavar="FILE",
    help="A learned matcher (.onnx) for photos without cameras [default: SIFT].",
)  # fmt: skip
@click.option(
    "--fov", type=float, default=None, metavar="DEGREES",
    help="Horizontal field of view of a photo whose camera is unknown [default: 55].",
)  # fmt: skip
@cli_options.steps
@cli_options.guidance
@cli_options.sampler
@click.option(
    "--unet", default=None, metavar="NAME",
    help="Which of the released UNets [default: single for one reference, sparse for more].",
)  # fmt: skip
@click.option(
    "--prompt", default=None, metavar="TEXT",
    help="Words for the model's context, if it has CLIP's text tower [default: none, as released].",
)  # fmt: skip
@cli_options.size
@click.option(
    "--composite/--no-composite", default=None,
    help="Put the known pixels of the warp back into views/ (both are always written) [default: "
    "for small models, whose codec loses details].",
)  # fmt: skip
@click.option(
    "--truth", type=PATH, default=None, metavar="FOLDER",
    help="Posed folder holding the true images of the trajectory, to score against "
    "[default: --input, when the trajectory is its transforms.json].",
)  # fmt: skip
@click.option(
    "--views-per-round", type=int, default=None, metavar="N",
    help="Make N views, then warp the next N from these as well [default: all from the "
    "references]. Rounds are kept in OUTPUT/rounds until the end: a run that was killed goes on.",
)  # fmt: skip
@click.option(
    "--sr", type=PATH, default=None, metavar="DIR",
    help="Enlarge the views by two at the end, with the weights in DIR: a training run of "
    "configs/superres.py, or released weights with the UNet SR. They are written to enlarged/.",
)  # fmt: skip
@cli_options.seed
@output_options
def generate(output: Path, **options: object) -> None:
    """Generates new views of a photo along a camera path.

    The reference is warped to every camera through its depth; the model fills what the warp
    leaves open. OUTPUT holds views/, warps/, masks/ (white = known), inpainted/ (the warp filled
    by OpenCV, for comparison), transforms.json, contact_sheet.png, cameras.png, video.mp4,
    report.html, run.json, and metrics.json when the truth is known.
    """
    from see3d_jax.pipelines.export import ROUNDS, check_output_folder, write_generated
    from see3d_jax.pipelines.generation import generate as run
    from see3d_jax.pipelines.ready_warps import holds_ready_warps
    from see3d_jax.pipelines.sfm import beside

    check_output_folder(output)
    _say_which_weights(options["checkpoint"])
    if holds_ready_warps(options["source"]):
        _fill_ready_warps(output, options)
        return
    if options["trajectory"] is None:
        raise click.MissingParameter(param_hint="--trajectory", param_type="option")
    rounds = output / ROUNDS if options["views_per_round"] else None
    result = run(**options, rounds_folder=rounds, cameras_folder=beside(output))
    written = write_generated(result, output)
    for warning in result.run["warnings"]:
        note(f"note: {warning}")
    if result.metrics is not None:
        say("PSNR against the truth (dB):  all   known   hole")
        for name, scores in result.metrics["methods"].items():
            cells = [scores[region]["psnr"] for region in ("all", "known", "hole")]
            text = "  ".join("    –" if cell is None else f"{cell:5.2f}" for cell in cells)
            say(f"  {name.replace('_', ' '):26s}  {text}")
    finish(
        f"wrote {written}: {len(result.views)} views; look at it with `see3d view {output}`",
        output=written, views=len(result.views), warnings=result.run["warnings"],
        metrics=result.metrics,
    )  # fmt: skip


def _fill_ready_warps(output: Path, options: dict[str, object]) -> None:
    """`generate` for a folder that has warps and masks already, and so no use for a path."""
    from see3d_jax.pipelines.ready_warps import fill_ready_warps, write_filled

    used = {"checkpoint", "steps", "guidance", "sampler", "unet", "prompt", "size", "composite",
            "seed"}  # fmt: skip
    for name, value in options.items():
        if value and name not in used | {"source"}:
            option = "--" + {"references": "reference"}.get(name, name).replace("_", "-")
            raise click.UsageError(f"{option} has no meaning for ready warps; leave it out")
    result = fill_ready_warps(options["source"], **{name: options[name] for name in used})
    written = write_filled(result, output)
    finish(f"wrote {written}: {len(result.views)} views", output=written, views=len(result.views))


@app.command(
    epilog="""\b
Examples:
  see3d edit --input scene --reference 3 --edited edited.png --region region.png \\
      --checkpoint workdir --output out/edited
""",
)
@click.option(
    "--input", "source", type=PATH, required=True, metavar="FOLDER",
    help="Posed photos; their depth, if there is any, tells what stands in front of the edit.",
)  # fmt: skip
@click.option(
    "--reference", required=True, metavar="INDEX_OR_NAME", help="The frame that was edited."
)
@click.option("--edited", type=PATH, required=True, metavar="IMAGE", help="That frame, edited.")
@click.option(
    "--region", type=PATH, required=True, metavar="IMAGE", help="White where it was edited."
)
@click.option(
    "--edited-depth", type=PATH, default=None, metavar="FILE",
    help="Planar depth after the edit, if it changed the shape [default: as before].",
)  # fmt: skip
@cli_options.checkpoint
@cli_options.output
@click.option("--views", type=int, default=None, metavar="N", help="Of the others [default: all].")
@cli_options.steps
@cli_options.guidance
@cli_options.sampler
@cli_options.size
@cli_options.seed
@output_options
def edit(output: Path, **options: object) -> None:
    """Carries the edit of one photo to the other photos of a scene.

    What the edited photo shows in the region is warped into every other photo; the model fills
    what the old content leaves open. Everything else stays as it is. OUTPUT is as of generate.
    """
    from see3d_jax.pipelines.edit import edit as run
    from see3d_jax.pipelines.export import check_output_folder, write_generated

    check_output_folder(output)
    _say_which_weights(options["checkpoint"])
    result = run(**options)
    written = write_generated(result, output)
    for warning in result.run["warnings"]:
        note(f"note: {warning}")
    finish(
        f"wrote {written}: {len(result.views)} edited views",
        output=written, views=len(result.views), warnings=result.run["warnings"],
    )  # fmt: skip


@app.command(
    epilog="""\b
Examples:
  see3d reconstruct --input scene --output out/scene
  see3d reconstruct --input out/views --output out/scene --steps 400 --gaussians 8000
""",
)
@click.option(
    "--input", "source", type=PATH, required=True, metavar="DIR",
    help="Posed views (nerfstudio transforms.json, COLMAP model, INRIA cameras.json), or photos "
    "alone: their cameras are found (pycolmap) and kept in OUTPUT_cameras.",
)  # fmt: skip
@cli_options.output
@click.option("--steps", type=int, default=None, help="Optimisation steps.")
@click.option("--gaussians", "num_gaussians", type=int, default=None, help="Number of Gaussians.")
@click.option("--max-size", type=int, default=None, metavar="PIXELS", help="Longest image side.")
@click.option("--sh-degree", type=int, default=None, help="Spherical harmonics degree, 0 to 3.")
@click.option(
    "--refine-poses",
    is_flag=True,
    help="First correct the cameras by points that the photos share.",
)
@click.option(
    "--exposure/--no-exposure",
    default=True,
    show_default=True,
    help="Photos that differ in brightness get a gain and an offset of colours each.",
)
@click.option(
    "--lpips", "lpips_weight", type=float, default=0.0, metavar="WEIGHT",
    help="In the last third also minimise LPIPS, e.g. 0.03: sharper (pip install '.[metrics]').",
)  # fmt: skip
@click.option(
    "--points-weight", type=float, default=0.05, show_default=True, metavar="WEIGHT",
    help="Also keep to the depths of sparse points in the photos that saw them (COLMAP); 0: not.",
)  # fmt: skip
@click.option(
    "--depth-weight", type=float, default=0.0, metavar="WEIGHT",
    help="Also keep to the folder's depth maps, e.g. 0.05.",
)  # fmt: skip
@click.option(
    "--depth-free-scale", is_flag=True,
    help="The depth maps are right up to scale and shift of inverse depth, as a network's are.",
)  # fmt: skip
@click.option(
    "--smooth-weight", type=float, default=0.0, metavar="WEIGHT",
    help="Also keep normals smooth where the photo has no edge, e.g. 0.01.",
)  # fmt: skip
@click.option(
    "--generated-weight", type=float, default=0.3, show_default=True, metavar="WEIGHT",
    help="How much a generated pixel counts beside a known one (0 to 1), in a folder of generate.",
)  # fmt: skip
@click.option(
    "--densify", type=click.Choice(["mcmc", "classic"]), default="mcmc", show_default=True,
    help="How the scene grows: by moving faded Gaussians, after 3DGS-MCMC, or as the first 3DGS.",
)  # fmt: skip
@cli_options.seed
@output_options
def reconstruct(source: Path, output: Path, **options: object) -> None:
    """Fits a scene of 3D Gaussians to posed views and scores it on held-out ones.

    OUTPUT holds point_cloud.ply (opens in any 3DGS viewer), orbit.mp4 and metrics.json. A run that
    was killed goes on when it is called again.
    """
    from see3d_jax.pipelines.reconstruct import reconstruct as run
    from see3d_jax.splatting.fit_step import FitConfig
    from see3d_jax.splatting.processor import host_mesh, use_all_cores

    use_all_cores()
    config = FitConfig(**{name: options.pop(name) for name in _IN_CONFIG})
    given = {name: value for name, value in options.items() if value is not None}
    metrics = run(
        source, output, config=config, progress=shows_progress(), mesh=host_mesh(), **given
    )
    finish(
        f"wrote {output}: held-out PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}; "
        f"look at it with `see3d view {output}`",
        output=output, metrics=metrics,
    )  # fmt: skip


@app.command(
    epilog="""\b
Examples:
  see3d view out/room
  see3d view out/scene/point_cloud.ply --port 0
  see3d view workdir --describe
""",
)
@click.argument("path", type=PATH)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8008, show_default=True,
    help="Of the viewer; 0 takes any free one.",
)  # fmt: skip
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="Address to listen on; anything else than this machine's own lets others look.",
)  # fmt: skip
@click.option("--describe", is_flag=True, help="Only say what PATH is and what opens it.")
@output_options
def view(path: Path, port: int, host: str, describe: bool) -> None:
    """Opens PATH in a viewer: Gaussians, cameras, pictures, and an editor for camera paths.

    For a folder of see3d create, generate or reconstruct, any posed scene, a .ply, .splat or .spz
    it serves a page until Ctrl-C. Of anything else it says what it is and what opens it.
    """
    from see3d_jax.viewer import describe as description
    from see3d_jax.viewer_server import find_scene, open_server

    found = None if describe else find_scene(path)
    if found is None:
        text = description(path)
        finish(text, path=path, description=text.splitlines())
        return
    with open_server(found, host, port) as server:
        url = f"http://{host}:{server.server_address[1]}/"
        finish(f"{path}: open {url} in a browser (Ctrl-C ends it)", url=url, path=path)
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            server.serve_forever()


@app.command(
    epilog="""\b
Examples:
  see3d info runs/tiny
  see3d info weights/see3d
  see3d info data/clips
  see3d info out/scene/point_cloud.ply --json
"""
)
@click.argument("path", type=PATH)
@output_options
def info(path: Path) -> None:
    """Explains PATH: a checkpoint, weights, record shards, Gaussians, a scene, a result.

    Says what it holds (sizes, settings, scores) and what can be done with it next.
    """
    from see3d_jax.info import explain

    facts = explain(path)
    finish(facts.text(), **facts.values())


for command in (create, evaluate, export):
    app.add_command(command)


def main() -> None:
    """Entry point of the `see3d` console script."""
    run_command(lambda: app(prog_name="see3d", standalone_mode=False))


if __name__ == "__main__":
    main()
