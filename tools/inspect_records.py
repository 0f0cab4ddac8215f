"""Looks at training data: what masks are drawn, what is in shards, what training makes of them.

    python -m tools.inspect_records masks --output masks.png
    python -m tools.inspect_records clips SHARDS [--limit 20]
    python -m tools.inspect_records batch SHARDS --output batch.png [--kind posed]

`masks` makes the picture in docs/data.md. `clips` prints one line per record. `batch` draws one
batch as the training step gets it: the condition of every view above the view itself.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from see3d_jax.data import masks as mask_shapes
from see3d_jax.data.examples import ExampleSpec
from see3d_jax.data.mixture import KINDS, DataSource, Mixture
from see3d_jax.data.pipeline import training_batches
from see3d_jax.errors import run_command
from see3d_jax.media import contact_sheet, write_image

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


@click.group()
def app() -> None:
    """Looks at training data."""


@app.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A picture.")
@click.option("--seed", default=0, show_default=True)
def masks(output: Path, seed: int) -> None:
    """Draws masks: a row per kind of hole and two of mixtures, columns of 10 to 90 % missing."""
    rng = np.random.default_rng(seed)
    kinds = [(kind,) for kind in mask_shapes.KINDS] + [mask_shapes.KINDS] * 2
    rows = [
        [mask_shapes.random_mask(rng, 256, 256, (share, share), kind) for share in SHARES]
        for kind in kinds
    ]
    cells = [[np.repeat(0.4 + 0.55 * mask, 3, -1) for mask in row] for row in rows]
    names = [*mask_shapes.KINDS, "mixed", "mixed"]
    shares = [f"{share:.0%} missing" for share in SHARES]
    write_image(output, contact_sheet(cells, names, shares, cell_height=112))


@app.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--limit", default=20, show_default=True, help="Records to print; 0 = all.")
def clips(shards: Path, limit: int) -> None:
    """Prints one line per record of SHARDS, those that cannot be read included."""
    folder = Mixture((DataSource(str(shards)),), 0).folders[0]
    for index in range(min(limit or len(folder), len(folder))):
        try:
            clip = folder[index]
        except Exception as error:  # whatever is wrong with it is what one wants to see
            click.echo(f"{index}: {folder.skip(index, None, error).reason}")
            continue
        extra = ["posed"] * clip.posed + ["depth"] * bool(len(clip.depth))
        extra += [f"latents {clip.latent_shape}"] * bool(len(clip.latents))
        click.echo(
            f"{index}: {clip.clip_id}: {len(clip.images)} frames of {clip.width}×{clip.height} "
            f"from {clip.source}{''.join(f', {word}' for word in extra)}"
        )
    click.echo(f"{len(folder)} records")


@app.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A picture.")
@click.option("--kind", type=click.Choice(KINDS), default="unposed", show_default=True)
@click.option("--views", default=5, show_default=True, type=click.IntRange(2))
@click.option("--size", default=128, show_default=True, type=click.IntRange(8))
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="Clips.")
@click.option("--depth-noise", default=0.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def batch(
    shards: Path, output: Path, kind: str, views: int, size: int, rows: int,
    depth_noise: float, seed: int,
) -> None:  # fmt: skip
    """Draws a batch: for every clip its conditions, and below them the views."""
    spec = ExampleSpec(((size, size),), views, (1,), (1, 4), (0.1, 0.9), depth_noise)
    mixture = Mixture((DataSource(str(shards), kind=kind),), seed)
    drawn = next(training_batches(mixture, spec, rows, seed))
    masked = np.where(drawn["mask"] > 0.5, drawn["image"], -1)
    pairs = zip(drawn.get("warped", masked), drawn["image"])
    cells = [[view / 2 + 0.5 for view in line] for pair in pairs for line in pair]
    labels = ["reference"] + ["target"] * (views - 1)
    write_image(output, contact_sheet(cells, column_labels=labels, cell_height=size))


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
