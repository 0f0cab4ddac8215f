"""What a trained run makes of the clips it held out, with few and with many sampling steps.

    python -m benchmarks.held_out --workdir runs/tiny [--steps 1 --steps 2 …] [--json FILE]

Clips, noise and scores are those of the evaluation in the run's own loop, so that the row with the
run's own number of steps repeats the last numbers in its metrics.jsonl. Beside the model stand what
needs none, the model with the known pixels of the condition put back, and what the codec shows of
the true views, which is the best that a network behind it can do. The data must still be where the
run's config.json says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import run_command
from see3d_jax.files import write_json

COLUMNS = {
    "heldout_psnr": "PSNR",
    "heldout_ssim": "SSIM",
    "heldout_psnr_known": "known pixels",
    "heldout_psnr_hole": "holes",
}
BASELINES = {
    "_copy": "nearest reference, copied",
    "_condition": "condition, as it is shown",
    "_inpainted": "condition, holes filled by Telea",
}
Scores = dict[str, float]


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.held_out --workdir runs/tiny
  python -m benchmarks.held_out --workdir runs/tiny --steps 1 --steps 50 --json held_out.json
"""
)
@click.option("--workdir", required=True, type=click.Path(path_type=Path), help="Of a run.")
@click.option(
    "--steps", multiple=True, type=click.IntRange(1), default=(1, 2, 4, 10, 50), show_default=True
)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(workdir: Path, steps: tuple[int, ...], output: Path | None) -> None:
    """Prints one row per way to make the held-out target views, as a table for a page."""
    rows: dict[str, Scores] = {}
    for name, scores in measure(workdir, steps):
        if not rows:
            click.echo("| held-out targets | " + " | ".join(COLUMNS.values()) + " |")
            click.echo("|---" * (1 + len(COLUMNS)) + "|")
        rows[name] = scores
        cells = (_cell(scores.get(key)) for key in COLUMNS)
        click.echo(f"| {name} | " + " | ".join(cells) + " |")
    if output is not None:
        write_json(output, {"workdir": str(workdir), "rows": rows})


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 else "exact"  # where PSNR is cut off


def measure(workdir: Path, steps: tuple[int, ...]) -> Iterator[tuple[str, Scores]]:
    """(name, scores by the names of `COLUMNS`) of one way after the other.

    Raises InputError when the folder holds no finished checkpoint, or its data is gone.
    """
    from benchmarks.evidence.runs import Trained, put_back
    from see3d_jax.data.held_out import held_out_batch
    from see3d_jax.data.mixture import Mixture, SkippedClips
    from see3d_jax.training import settings
    from see3d_jax.training.evaluate import score

    run = Trained.load(workdir)
    config, own = run.config, run.config.evaluation.sampler_steps
    codec, _ = run.codec_and_schedule()
    frozen = settings.frozen_networks(config, settings.train_spec(config).unet)
    batch, _ = held_out_batch(
        Mixture(settings.data_sources(config), config.seed), settings.example_spec(config, codec),
        config.data.held_out, config.seed, SkippedClips(), settings.preprocess(frozen),
    )  # fmt: skip

    def scores(images: np.ndarray, method: str = "") -> Scores:
        found = score(batch, images)
        return {key: found[key + method] for key in COLUMNS if key + method in found}

    made = {}
    for count in steps:
        made[count] = run.sample(batch, config.seed, num_steps=count)
        yield f"model, {count} step{'s' * (count > 1)}", scores(made[count])
    images = made[own] if own in made else run.sample(batch, config.seed)
    name = f"model, {own} step{'s' * (own > 1)}, known pixels put back"
    yield name, scores(put_back(batch, images))
    for method, name in BASELINES.items():
        found = scores(images, method)
        if found:
            yield name, found
    shown = np.asarray(codec.decode(codec.encode(batch["image"])))
    yield "best that the codec can show", scores(np.clip(shown, -1, 1))


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
