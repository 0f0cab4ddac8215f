"""Converts the weights that See3D's authors published into a folder that this project loads.

    python -m tools.convert_see3d --input See3D --output weights/see3d

INPUT is the published folder: unet/{single,sparse,SR}/ema-checkpoint (those that are there), vae,
text_encoder, tokenizer, scheduler and CLIP-ViT-H-14-laion2B-s32B-b79K. Every tensor is accounted
for and every shape checked before anything is written; precision stays as published.
"""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax.errors import run_command


@click.command(
    epilog="""\b
Examples:
  python -m tools.convert_see3d --input downloads/See3D --output weights/see3d
"""
)
@click.option("--input", "source", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--keep-camera", is_flag=True, help="Keep a stored camera embedding (unused).")
def app(source: Path, output: Path, keep_camera: bool) -> None:
    """Converts a published See3D folder INPUT into the weights folder OUTPUT."""
    from tools.weight_plans import convert_release

    convert_release(source, output, keep_camera=keep_camera)


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
