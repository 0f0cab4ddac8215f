"""`see3d export`: a thin shell around `pipelines.scene_export`."""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax.cli_options import PATH
from see3d_jax.cli_output import finish, output_options


@click.command(
    epilog="""\b
Examples:
  see3d export out/scene --output scene.spz
  see3d export out/scene --output scene.glb
  see3d export scene.splat --output scene.ply
  see3d export out/scene --mesh --resolution 384 --output mesh.ply
""",
)
@click.argument("scene", type=PATH)
@click.option(
    "--output", type=PATH, required=True, metavar="FILE",
    help=".ply, .splat or .spz: the Gaussians; .obj or .glb: a mesh with coloured vertices "
    "(pip install '.[mesh]').",
)  # fmt: skip
@click.option("--mesh", is_flag=True, help="Write the mesh to a .ply as well.")
@click.option(
    "--cameras", type=PATH, default=None, metavar="FILE",
    help="For a mesh: the cameras.json or transforms.json to look from [default: the cameras.json "
    "beside the scene].",
)  # fmt: skip
@click.option(
    "--resolution", type=int, default=256, show_default=True, metavar="VOXELS",
    help="For a mesh: along the longest side of the scene.",
)  # fmt: skip
@output_options
def export(scene: Path, output: Path, **options: object) -> None:
    """Writes a scene of Gaussians in another format, or as a mesh.

    SCENE is a result of see3d reconstruct or create, or a .ply, .splat or .spz file. The mesh is
    fused from the depth that the scene shows to its cameras.
    """
    from see3d_jax.pipelines.scene_export import export_scene

    written = export_scene(scene, output, **options)
    finish(f"wrote {output}: {written}", output=output, written=written)
