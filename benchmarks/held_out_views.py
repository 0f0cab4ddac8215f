"""Views between photos, against the photos that were really taken there.

    python -m benchmarks.held_out_views --scene DIR --checkpoint DIR [--json FILE]

Windows of five neighbouring frames: the first, third and fifth are given, the second and fourth are
made and compared with the photos. Depth is the scene's own, else stereo between the three. Scored
are the pipeline with this checkpoint, as the model makes it and with the known pixels of the warp
put back, beside what needs no model: the raw warp, the warp filled by OpenCV (Telea), the nearest
of the three photos. PSNR, SSIM and LPIPS (AlexNet) on all pixels, and on what the warp knows and
what it leaves open apart; for the LPIPS of a region the other pixels are those of the truth.
Windows whose frames do not overlap enough are counted and left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.evaluation.lpips import Lpips, load_lpips, lpips
from see3d_jax.files import write_json
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import contact_sheet, write_image
from see3d_jax.pipelines.baselines import nearest_reference, score
from see3d_jax.pipelines.generation import Generated, generate
from see3d_jax.pipelines.inputs import Scene, load_scene

_GIVEN, _HELD_OUT = (0, 2, 4), (1, 3)
_METRICS = ("psnr", "ssim", "lpips")


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.held_out_views --scene photos --checkpoint workdir --size 256 --json out.json
"""
)
@click.option("--scene", type=click.Path(path_type=Path), required=True, help="Posed photos.")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True)
@click.option("--windows", type=int, default=3, show_default=True, help="Evenly over the scene.")
@click.option("--size", type=int, default=None, help="As of `see3d generate`.")
@click.option("--steps", type=int, default=10, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write the pictures.")
def app(
    scene: Path, checkpoint: Path, windows: int, size: int | None, steps: int, output: Path | None,
    sheet: Path | None,
) -> None:  # fmt: skip
    """Prints a table of methods × regions × metrics."""
    opened = load_scene(scene)
    if len(opened) < 5:
        raise InputError(f"{scene}: needs at least 5 posed photos")
    made, skipped = [], []
    for start in np.unique(np.linspace(0, len(opened) - 5, windows).round().astype(int)):
        try:
            made.append(between(scene, opened, int(start), checkpoint, size, steps))
        except InputError as error:
            skipped.append(f"frames {start}-{start + 4}: {error}")
    for reason in skipped:
        click.echo(f"left out: {reason}", err=True)
    if not made:
        raise InputError(f"{scene}: no window of five frames overlaps enough")
    numbers = {**table(made), "windows": len(made), "left_out": skipped}
    _print(numbers)
    if output is not None:
        write_json(output, numbers)
    if sheet is not None:
        write_image(
            sheet,
            contact_sheet(_sheet_rows(made), [*candidates(made[0]), "truth"], cell_height=160),
        )


def between(
    folder: Path, scene: Scene, start: int, checkpoint: Path, size: int | None, steps: int
) -> Generated:
    """The held-out frames of the window at `start`, generated from the other three."""
    held_out = [start + i for i in _HELD_OUT]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "transforms.json"
        cameras = tuple(scene.cameras[i] for i in held_out)
        write_transforms(path, PosedImages(tuple(f"{i}.png" for i in held_out), cameras))
        return generate(
            folder, trajectory=str(path), checkpoint=checkpoint, truth=folder, size=size,
            references=[start + i for i in _GIVEN], steps=steps,
        )  # fmt: skip


def candidates(done: Generated) -> dict[str, np.ndarray]:
    """What is compared: [N, h, w, 3] uint8 by name."""
    nearest = nearest_reference(done.cameras, done.reference_cameras)
    return {
        "raw warp": done.warps,
        "warp + Telea": done.inpainted,
        "nearest photo": done.references[nearest],
        "model": done.generated,
        "model, known put back": done.composited,
    }


def table(made: list[Generated]) -> dict[str, Any]:
    """{"known_share", "methods": {name: {region: {metric: mean over all views}}}}."""
    network = load_lpips("alex")
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    for done in made:
        methods = candidates(done)
        scores = score(done.truth, done.masks, methods)["methods"]
        for name, images in methods.items():
            for region, values in scores[name].items():
                values = {**values, "lpips": _region_lpips(network, done, images, region)}
                kept = rows.setdefault(name, {}).setdefault(region, {m: [] for m in _METRICS})
                for metric in _METRICS:
                    if values[metric] is not None:
                        kept[metric].append(values[metric])
    return {
        "known_share": round(float(np.mean([done.masks.mean() for done in made])), 3),
        "methods": {
            name: {
                region: {m: round(float(np.mean(v)), 3) if v else None for m, v in kept.items()}
                for region, kept in regions.items()
            }
            for name, regions in rows.items()
        },
    }


def _region_lpips(network: Lpips, done: Generated, images: np.ndarray, region: str) -> float:
    chosen = {"all": np.ones_like(done.masks), "known": done.masks, "hole": ~done.masks}[region]
    shown = np.where(chosen[..., None], images, done.truth)
    pair = (part.astype(np.float32) / 255 for part in (shown, done.truth))
    return float(np.mean(lpips(network, *pair)))


def _sheet_rows(made: list[Generated]) -> list[list[np.ndarray]]:
    """Methods as rows, views as columns, the truth last."""
    rows = [
        [image for done in made for image in candidates(done)[name]] for name in candidates(made[0])
    ]
    return [*rows, [image for done in made for image in done.truth]]


def _print(numbers: dict[str, Any]) -> None:
    click.echo(f"{numbers['windows']} windows, known {numbers['known_share']:.0%} of the pixels")
    click.echo("PSNR / SSIM / LPIPS     all                    known                  hole")
    for name, regions in numbers["methods"].items():
        cells = [
            " / ".join("–" if (v := values[m]) is None else f"{v:.2f}" for m in _METRICS)
            for values in regions.values()
        ]
        click.echo(f"{name:22}  " + "  ".join(f"{cell:21}" for cell in cells))


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
