"""What each optional term of a Gaussian fit does to held-out photos, at equal steps and Gaussians.

    python -m benchmarks.fit_terms --scene castle/ --scene fox/ --json terms.json

Every variant is `see3d_jax.pipelines.reconstruct` with one thing changed. Scores are of the
held-out views; LPIPS is AlexNet's where the fit minimises VGG's, so that the term is not its own
judge. Each row has the mean over the scene's views and seeds and, in brackets, the difference to
the plain fits of the same seeds with its standard deviation over them. Scores that the JSON file
holds already, of the same steps, sizes and seeds, are not measured again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.evaluation.lpips import Lpips, load_lpips, lpips
from see3d_jax.files import write_json
from see3d_jax.media import read_image
from see3d_jax.pipelines.inputs import Scene, load_images, load_scene
from see3d_jax.pipelines.reconstruct import reconstruct
from see3d_jax.splatting.fit import FitConfig

PLAIN = "plain"
VARIANTS = {
    PLAIN: FitConfig(),
    "lpips 0.03": FitConfig(lpips_weight=0.03),
    "no exposure": FitConfig(exposure=False),
    "no dropout": FitConfig(dropout=0.0),
    "no points": FitConfig(points_weight=0.0),
    "smooth 0.01": FitConfig(smooth_weight=0.01),
    "classic densification": FitConfig(densify="classic"),
    "depth 0.05": FitConfig(depth_weight=0.05),
}
METRICS = {"psnr": 2, "ssim": 3, "lpips": 4}  # digits after the point


@click.command()
@click.option("--scene", "scenes", multiple=True, required=True, type=click.Path(path_type=Path),
              help="Posed photos; depth and points are tried where they are known.")  # fmt: skip
@click.option("--steps", default=1000, show_default=True)
@click.option("--gaussians", default=8000, show_default=True)
@click.option("--max-size", default=192, show_default=True, help="Longest side, pixels.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1))
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Beside plain.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    scenes: tuple[Path, ...], seeds: int, only: tuple[str, ...], output: Path | None, **size: int
) -> None:
    """Prints a Markdown table: held-out scores of every variant, and gains over the plain fit."""
    judge = load_lpips("alex")
    settings = {"seeds": seeds, **size}
    tables = _earlier(output, settings)
    click.echo("| scene | fit | PSNR, dB | SSIM | LPIPS |\n|---|---|---|---|---|")
    for path in scenes:
        scene = load_scene(path)
        table = tables.setdefault(path.name, {})
        for name in VARIANTS:
            if only and name not in (PLAIN, *only):
                continue
            if VARIANTS[name].depth_weight and scene.depth_paths is None:
                continue
            if not VARIANTS[name].points_weight and scene.observations is None:
                continue
            rows = table.setdefault(name, [])
            for seed in range(len(rows), seeds):
                rows.append(held_out_scores(scene, name, seed, judge, **size))
                if output is not None:  # whatever comes next, this much is done
                    write_json(output, {**settings, "scenes": tables})
            click.echo(f"| {path.name} | {name} | " + " | ".join(_cells(rows, table[PLAIN])) + " |")


def _earlier(output: Path | None, settings: dict[str, int]) -> dict[str, dict[str, list]]:
    """Scores by scene, variant and seed that a run with the same settings has left in the file."""
    if output is None or not output.is_file():
        return {}
    content = json.loads(output.read_text(encoding="utf-8"))
    scenes = content.pop("scenes")
    if content != settings:
        raise InputError(f"{output}: holds scores of other settings; choose another file")
    return scenes


def held_out_scores(
    scene: Scene, name: str, seed: int, judge: Lpips, *, steps: int, gaussians: int, max_size: int
) -> dict[str, float]:
    """Means over the held-out views, and milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "fit"
        metrics = reconstruct(
            scene.root, output, steps=steps, num_gaussians=gaussians, max_size=max_size, seed=seed,
            orbit_frames=1, config=VARIANTS[name], progress=False,
        )  # fmt: skip
        held_out = scene.held_out()[1]
        photos, _ = load_images(scene, held_out, max_size)
        seen = [
            float(lpips(judge, read_image(output / "renders" / f"{scene.names[i]}.png") / 255.0,
                        photo / 255.0))
            for i, photo in zip(held_out, photos, strict=True)
        ]  # fmt: skip
    return {
        "psnr": metrics["psnr"], "ssim": metrics["ssim"], "lpips": round(float(np.mean(seen)), 5),
        "milliseconds_per_step": metrics["milliseconds_per_step"],
    }  # fmt: skip


def _cells(rows: list[dict[str, float]], plain: list[dict[str, float]]) -> list[str]:
    """Mean of each metric, the mean gain over the plain fit, and its spread over seeds."""
    cells = []
    for metric, digits in METRICS.items():
        values, before = (np.array([row[metric] for row in x]) for x in (rows, plain))
        cell = f"{values.mean():.{digits}f}"
        if rows is not plain:
            gain = values - before
            cell += f" ({gain.mean():+.{digits}f}"
            cell += f" ± {gain.std(ddof=1):.{digits}f})" if len(gain) > 1 else ")"
        cells.append(cell)
    return cells


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
