"""What each optional term of a Gaussian fit does to held-out photos, at equal steps and Gaussians.

    python -m benchmarks.fit_terms --scene castle/ --scene fox/ --json terms.json

Every variant is `see3d_jax.pipelines.reconstruct` with one thing changed. Scores are of the
held-out views; LPIPS is AlexNet's where the fit minimises VGG's, so that the term is not its own
judge. Each row has the mean over seeds and scenes' views, and the difference to the plain fit of
the same scene and seed, which is what to look at: scenes differ far more than variants.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import run_command
from see3d_jax.evaluation.lpips import Lpips, load_lpips, lpips
from see3d_jax.files import write_json
from see3d_jax.media import read_image
from see3d_jax.pipelines.inputs import Scene, load_images, load_scene
from see3d_jax.pipelines.reconstruct import reconstruct
from see3d_jax.splatting.fit import FitConfig

PLAIN = "plain"
VARIANTS = {
    PLAIN: FitConfig(),
    "lpips 0.1": FitConfig(lpips_weight=0.1),
    "exposure": FitConfig(exposure=True),
    "smooth 0.01": FitConfig(smooth_weight=0.01),
    "classic densification": FitConfig(densify="classic"),
    "depth 0.05": FitConfig(depth_weight=0.05),
}
METRICS = ("psnr", "ssim", "lpips")


@click.command()
@click.option("--scene", "scenes", multiple=True, required=True, type=click.Path(path_type=Path),
              help="Posed photos; depth is tried where the scene has depth maps.")  # fmt: skip
@click.option("--steps", default=1000, show_default=True)
@click.option("--gaussians", default=8000, show_default=True)
@click.option("--max-size", default=192, show_default=True, help="Longest side, pixels.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1))
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Beside plain.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    scenes: tuple[Path, ...], seeds: int, only: tuple[str, ...], output: Path | None, **size: int
) -> None:
    """Prints held-out scores of every variant, and its differences to the plain fit."""
    judge = load_lpips("alex")
    tables = {}
    for path in scenes:
        scene = load_scene(path)
        table = tables[path.name] = {}
        for name in VARIANTS:
            if only and name not in (PLAIN, *only):
                continue
            if VARIANTS[name].depth_weight and scene.depth_paths is None:
                continue
            rows = [held_out_scores(scene, name, seed, judge, **size) for seed in range(seeds)]
            table[name] = {key: [row[key] for row in rows] for key in rows[0]}
            click.echo(f"{path.name:16} {name:22} " + _line(table[name], table[PLAIN]))
            if output is not None:  # whatever comes next, this much is done
                write_json(output, {"seeds": seeds, **size, "scenes": tables})


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


def _line(row: dict[str, list[float]], plain: dict[str, list[float]]) -> str:
    parts: list[Any] = []
    for metric in METRICS:
        gain = np.subtract(row[metric], plain[metric])
        spread = f" (±{gain.std(ddof=1):.3f})" if len(gain) > 1 else ""
        parts.append(f"{metric} {np.mean(row[metric]):.3f}, {gain.mean():+.3f}{spread}")
    return ";  ".join(parts)


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
