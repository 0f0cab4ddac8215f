"""Writes weights back in the layout that See3D's and MVDream's PyTorch code loads.

    python -m tools.export_diffusers --input weights/see3d --output See3D

INPUT is a folder of converted weights, or the workdir of a training run, whose moving average is
exported as one UNet. What was converted comes back bit for bit: names, shapes, precision, settings.
"""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax.errors import run_command


@click.command(
    epilog="""\b
Examples:
  python -m tools.export_diffusers --input weights/see3d --output See3D
  # the network of a training run
  python -m tools.export_diffusers --input runs/webvi3d --output export/ema-checkpoint
"""
)
@click.option("--input", "source", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
def app(source: Path, output: Path) -> None:
    """Exports converted weights, or a training run, INPUT to the PyTorch folder OUTPUT."""
    from see3d_jax.models.release import load_release
    from tools.weight_exports import export_release, export_training

    if (source / "checkpoints").is_dir():
        export_training(source, output)
    else:
        export_release(load_release(source), output)
    click.echo(f"wrote {output}")


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
