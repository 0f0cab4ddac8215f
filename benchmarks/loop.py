"""What the generation loop itself costs: an oracle fills the holes with the truth, round by round.

    python -m benchmarks.loop --scene DIR [--frames 24] [--json FILE]

The first frame is the one given view, the others are made in the order of the file. What can go
wrong is then the pipeline's own part: anchors, depth, alignment, warps, masks. All pictures have
one size, so that every known pixel is one resampling away from an equal picture. Estimated depth is
the true one (exact); at another scale and a power of it, as a network might say (curve); that, and
up to 5 % nearer or farther from one part of the picture to the next (bent); or what stereo finds.

Per round: PSNR on the pixels that the mask calls known; the same round warped from true views with
true depth in place of the anchors; the share of known pixels that show a surface more than 3 %
behind the true one. Two drifts, both in dB and on known pixels:
  drift_db               the most that a round loses against the same round from true views, on the
                         pixels that both know
  first_minus_last_db    mean of the first half of the rounds less that of the second half
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.pipelines.depth import stereo_estimate
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.rounds import DepthEstimator, Round, run_rounds, warp_round
from see3d_jax.pipelines.warps import View, resize_depth

_BEHIND = 0.03  # relative depth: what lies farther behind the true surface is a wrong one


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.loop --scene scene_with_depth --frames 24 --json loop.json
"""
)
@click.option("--scene", type=click.Path(path_type=Path), required=True, help="Posed, with depth.")
@click.option("--frames", type=int, default=24, show_default=True, help="From the start of it.")
@click.option("--views-per-round", type=int, default=4, show_default=True)
@click.option("--size", type=int, default=240, show_default=True, help="Longer side, in pixels.")
@click.option(
    "--depth", type=click.Choice(["exact", "curve", "bent", "stereo"]), default="curve",
    show_default=True, help="Estimated depth of new views.",
)  # fmt: skip
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    scene: Path, frames: int, views_per_round: int, size: int, depth: str, output: Path | None
) -> None:  # fmt: skip
    """Prints what every round of the loop knows, and how right it is."""
    first, *targets = true_views(scene, frames, size)
    rounds = oracle_rounds([first], targets, views_per_round, depth)
    numbers = summary([judge(done, [first], targets) for done in rounds])
    columns = list(numbers["rounds"][0])
    click.echo("  ".join(columns))
    for row in numbers["rounds"]:
        click.echo("  ".join(f"{row[name]!s:>{len(name)}}" for name in columns))
    for name in ("drift_db", "first_minus_last_db"):
        click.echo(f"{name} {numbers[name]}")
    if output is not None:
        write_json(output, numbers)


def true_views(scene: Path, frames: int, size: int) -> list[View]:
    """The first frames of a scene with depth, the longer side `size` pixels."""
    opened = load_scene(scene)
    if len(opened) < frames or frames < 2 or opened.depth_paths is None:
        raise InputError(f"{scene}: needs at least {max(2, frames)} posed images with depth")
    images, cameras = load_images(opened, tuple(range(frames)))
    shrink = size / max(images[0].shape[:2])
    height, width = (round(length * shrink) for length in images[0].shape[:2])
    return [
        View(
            cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA),
            resize_depth(load_depth(opened, i), width, height),
            camera.resized(width, height),
        )
        for i, (image, camera) in enumerate(zip(images, cameras, strict=True))
    ]


def distorted(depth: np.ndarray, bent: bool = False) -> np.ndarray:
    """Planar depth [h, w] as a network might say it: another scale, and not linear in depth."""
    estimate = np.where(depth > 0, 3.0 * np.maximum(depth, 1e-6) ** 0.9, 0)
    if bent:
        y, x = np.mgrid[: depth.shape[0], : depth.shape[1]] / max(depth.shape)
        estimate *= 1 + 0.05 * np.sin(5 * x + 1) * np.cos(4 * y)
    return estimate.astype(np.float32)


def oracle_rounds(
    references: list[View], targets: list[View], views_per_round: int, depth: str = "curve",
    **options: Any,
) -> list[Round]:  # fmt: skip
    """`run_rounds` with the truth in the place of the model, and of the depth network if any."""

    def fill(
        number: int, anchors: list[View], indices: list[int], warps: np.ndarray, masks: np.ndarray
    ) -> np.ndarray:
        return np.where(masks[..., None], warps, np.stack([targets[i].image for i in indices]))

    depth_of = {_pose(view.camera): view.depth for view in targets}

    def estimate(new: list[View], existing: list[View]) -> np.ndarray:
        if depth == "stereo":
            return stereo_estimate(new, existing)
        depths = [depth_of[_pose(view.camera)] for view in new]
        return np.stack([d if depth == "exact" else distorted(d, depth == "bent") for d in depths])

    options.setdefault("fill", fill)
    options.setdefault("estimator", DepthEstimator(estimate, depth in ("exact", "stereo")))
    cameras = stack([view.camera for view in targets])
    return run_rounds(references, cameras, views_per_round, **options)


def judge(done: Round, references: list[View], targets: list[View]) -> dict[str, Any]:
    """The figures of one round, see the top of the file."""
    indices = done.report["views"]
    truth = np.stack([targets[i].image for i in indices])
    depth = np.stack([targets[i].depth for i in indices])
    anchors = [targets[i] for i in done.report["anchors"]]
    cameras = stack([targets[i].camera for i in indices])
    ideal, ideal_masks, _, _ = warp_round(references, anchors, cameras)
    both = done.masks & ideal_masks
    judged = done.masks & (depth > 0)
    behind = judged & (done.depths > depth * (1 + _BEHIND))
    return {
        "views": f"{indices[0]}-{indices[-1]}",
        "known": round(float(done.masks.mean()), 3),
        "by_reference": done.report["known_by_references"],
        "psnr": known_psnr(done.warps, done.masks, truth),
        "from_truth": known_psnr(ideal, ideal_masks, truth),
        "lost": round(known_psnr(ideal, both, truth) - known_psnr(done.warps, both, truth), 2),
        "wrong_surface": round(float(behind.sum() / max(1, judged.sum())), 4),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds' figures and the two drifts."""
    half = max(1, len(rows) // 2)
    early, late = ([row["psnr"] for row in part] for part in (rows[:half], rows[-half:]))
    return {
        "rounds": rows,
        "drift_db": max(row["lost"] for row in rows),
        "first_minus_last_db": round(float(np.mean(early) - np.mean(late)), 2),
        "wrong_surface_fraction": max(row["wrong_surface"] for row in rows),
    }


def known_psnr(warps: np.ndarray, masks: np.ndarray, truth: np.ndarray) -> float:
    """PSNR over the known pixels of all views [m, h, w, 3] uint8 together, in dB."""
    squared = np.square((warps.astype(np.float32) - truth) / 255).mean(-1)[masks]
    return round(float(-10 * np.log10(max(squared.mean() if squared.size else 1.0, 1e-10))), 2)


def _pose(camera: Camera) -> bytes:
    return np.asarray(camera.world_to_camera).tobytes()


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
