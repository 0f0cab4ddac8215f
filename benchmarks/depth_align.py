"""How well and how fast estimated depth is aligned to other views, paper Eq. 4-6.

    python -m benchmarks.depth_align --scene DIR [--json FILE]

DIR holds posed images with exact depth. The true depth of a view is distorted (an affine map; a
different one in each of six patches; a smooth non-linear one that also varies over the image), its
keypoints are matched in up to three other views with 1 px noise, and 20 % of the matches are wrong.
Peers: one global scale and shift by RANSAC, and the paper's optimiser, which moves alpha and beta
of every keypoint by gradient steps (Adam, compiled, until its loss settles). All three use the
same matches; both keypoint methods end in the same local regression. `speedup_vs_iterative` is of
the keypoints' depths, which is what differs; `speedup_with_regression` is of the whole alignment.
Times are without compilation. The headline is the smooth non-linear distortion.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, project, relative_projection, stack, unproject
from see3d_jax.geometry.depth_align import (
    GuidedDepths,
    align_depth,
    fit_global,
    guide_keypoints,
)
from see3d_jax.pipelines.inputs import Scene, load_depth, load_scene

KEYPOINTS, ANCHORS, VIEWS = 1024, 3, 4
NOISE, OUTLIERS = 1.0, 0.2  # pixels; share of matches
DISTORTIONS = ("smooth", "affine", "piecewise")
ADAM_RATE, ADAM_STEPS, ADAM_SETTLED = 0.02, 2000, 1e-4


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.depth_align --scene scene_with_depth --json align.json
"""
)
@click.option("--scene", type=click.Path(path_type=Path), required=True, help="Posed, with depth.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
@click.option("--seed", type=int, default=0, show_default=True)
def app(scene: Path, output: Path | None, seed: int) -> None:
    """Prints errors and times of the three methods under every distortion."""
    numbers = measure(load_scene(scene), seed)
    click.echo(f"{'':12}{'ours':>9}{'global':>9}{'iterative':>11}   (median relative error)")
    for kind, row in numbers["by_distortion"].items():
        click.echo(f"{kind:12}{row['ours']:9.4f}{row['global']:9.4f}{row['iterative']:11.4f}")
    click.echo(
        f"keypoints: ours {numbers['keypoints_ms']:.2f} ms, iterative "
        f"{numbers['iterative_keypoints_ms']:.2f} ms ({numbers['speedup_vs_iterative']:.1f} x); "
        f"regression {numbers['regression_ms']:.2f} ms"
    )
    if output is not None:
        write_json(output, numbers)


def measure(scene: Scene, seed: int = 0, views: int = VIEWS) -> dict[str, Any]:
    """All numbers of the benchmark, as plain JSON values."""
    if len(scene) < 2 or scene.depth_paths is None:
        raise InputError(f"{scene.root}: needs at least 2 posed images with depth")
    rng = np.random.default_rng(seed)
    depths = [load_depth(scene, i) for i in range(len(scene))]
    cameras = list(scene.cameras)
    targets = np.unique(np.linspace(0, len(scene) - 1, views).round().astype(int))
    errors = {kind: {"ours": [], "global": [], "iterative": []} for kind in DISTORTIONS}
    seconds = {"ours": [], "iterative": [], "regression": []}
    steps = []
    for target in targets:
        anchors = choose_anchors(cameras, depths, target)
        if not anchors:
            continue
        matches = make_matches(cameras, depths, target, anchors, rng)
        camera, anchor = cameras[target], stack([cameras[i] for i in anchors])
        for kind in DISTORTIONS:
            estimate = distort(depths[target], kind, rng)
            at = at_keypoints(estimate, matches[0])
            guided, took = timed(guide_keypoints, camera, anchor, *matches, NOISE)
            seconds["ours"].append(took)
            slow, took = timed(guide_iteratively, camera, anchor, at, *matches)
            seconds["iterative"].append(took)
            steps.append(int(slow[1]))
            ours, took = timed(align_depth, estimate, matches[0], guided)
            seconds["regression"].append(took)
            scale, shift = fit_global(at, guided, jax.random.key(1))
            found = {
                "ours": ours.depth,
                "global": np.asarray(scale) * estimate + np.asarray(shift),
                "iterative": align_depth(estimate, matches[0], slow[0]).depth,
            }
            for name, aligned in found.items():
                errors[kind][name].append(relative_error(aligned, depths[target]))
    if not steps:
        raise InputError(f"{scene.root}: no two views overlap")
    table = {
        kind: {name: float(np.median(np.concatenate(e))) for name, e in row.items()}
        for kind, row in errors.items()
    }
    ms = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    return {
        "median_rel_error": table["smooth"]["ours"],
        "global_median_rel_error": table["smooth"]["global"],
        "iterative_median_rel_error": table["smooth"]["iterative"],
        "speedup_vs_iterative": ms["iterative"] / ms["ours"],
        "speedup_with_regression": (ms["iterative"] + ms["regression"])
        / (ms["ours"] + ms["regression"]),
        "keypoints_ms": ms["ours"], "iterative_keypoints_ms": ms["iterative"],
        "regression_ms": ms["regression"], "iterative_steps": float(np.median(steps)),
        "by_distortion": table, "views": len(targets), "keypoints": KEYPOINTS,
        "noise_pixels": NOISE, "outliers": OUTLIERS, "seed": seed,
    }  # fmt: skip


def relative_error(aligned: Any, truth: np.ndarray) -> np.ndarray:
    """|aligned / truth − 1| on the pixels whose depth is known."""
    known = truth > 0
    return np.abs(np.asarray(aligned)[known] / truth[known] - 1)


def timed(call: Any, *arguments: Any, repeats: int = 3) -> tuple[Any, float]:
    """The result and the least seconds of a few calls after a first, compiling one."""
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


# --- the problem ----------------------------------------------------------------------------------


def choose_anchors(cameras: list[Camera], depths: list[np.ndarray], target: int) -> list[int]:
    """The nearest views that see at least 30 % of the target view's surfaces."""
    eyes = np.stack([np.asarray(camera.position) for camera in cameras])
    order = np.argsort(np.linalg.norm(eyes - eyes[target], axis=-1), kind="stable")
    rng = np.random.default_rng(0)
    pixels, points = sample_points(cameras[target], depths[target], 400, rng)
    chosen = []
    for i in order:
        if i != target and len(chosen) < ANCHORS and len(pixels):
            if visible(cameras[i], depths[i], points)[1].mean() > 0.3:
                chosen.append(int(i))
    return chosen


def sample_points(
    camera: Camera, depth: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [K, 2] with known depth and their world points [K, 3]."""
    rows, columns = np.nonzero(depth > 0)
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    rows, columns = rows[chosen], columns[chosen]
    pixels = np.stack([columns, rows], -1).astype(np.float32) + 0.5
    return pixels, np.asarray(unproject(camera, pixels, depth[rows, columns]))


def visible(camera: Camera, depth: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where world points [K, 3] appear in a view: pixels [K, 2], and which are not hidden."""
    pixels, z = (np.asarray(part) for part in project(camera, points))
    inside = (z > 0) & (pixels >= 0).all(-1) & (pixels < [camera.width, camera.height]).all(-1)
    column, row = np.where(inside[:, None], pixels, 0).astype(int).T
    seen = depth[row, column]
    return pixels, inside & (np.abs(seen - z) < 0.01 * z)


def make_matches(
    cameras: list[Camera], depths: list[np.ndarray], target: int, anchors: list[int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Keypoints [K, 2], noisy matches [A, K, 2] with outliers, and which exist [A, K].

    Half of the outliers land anywhere, half on the right epipolar line but at a wrong depth: those
    no two-view geometry can tell.
    """
    camera = cameras[target]
    pixels, points = sample_points(camera, depths[target], KEYPOINTS, rng)
    places, exist = [], []
    for i in anchors:
        place, seen = visible(cameras[i], depths[i], points)
        place = place + rng.normal(0, NOISE, place.shape)
        wrong = rng.random(len(place)) < OUTLIERS
        anywhere = rng.random(place.shape) * [cameras[i].width, cameras[i].height]
        eye = np.asarray(camera.position)
        stretched = eye + (points - eye) * rng.uniform(0.5, 2, (len(points), 1))
        along = np.asarray(project(cameras[i], stretched.astype(np.float32))[0])
        outlier = np.where(rng.random((len(place), 1)) < 0.5, anywhere, along)
        places.append(np.where(wrong[:, None], outlier, place))
        exist.append(seen)
    return pixels, np.stack(places).astype(np.float32), np.stack(exist)


def distort(depth: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """An estimator's depth [H, W] of the true one: positive, order-preserving where it can be."""
    known = depth > 0
    relative = depth / np.median(depth[known])
    height, width = depth.shape
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    if kind == "affine":
        bent = 0.6 * relative + 0.3
    elif kind == "piecewise":
        scales = rng.uniform(0.7, 1.4, (2, 3))
        bent = relative * scales[(2 * y).astype(int), (3 * x).astype(int)] + 0.1
    else:
        phase = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * x + phase[0]) * np.cos(1.5 * np.pi * y + phase[1])
        bent = 0.8 * relative**0.7 * (1 + 0.2 * wave) + 0.15
    return np.where(known, bent, 0).astype(np.float32)


# --- the peer ---------------------------------------------------------------------------


def guide_iteratively(
    camera: Camera, anchors: Camera, at: np.ndarray,
    pixels: np.ndarray, places: np.ndarray, exist: np.ndarray,
) -> tuple[GuidedDepths, jax.Array]:  # fmt: skip
    """The paper's optimiser of alpha and beta per keypoint; also the number of its steps."""
    depth, steps, supported = _optimise(camera, anchors, pixels, at, places, exist)
    deviation, support = jnp.full(len(pixels), 0.02), jnp.zeros(exist.shape)
    return GuidedDepths(depth, deviation, supported, support), steps


def at_keypoints(estimate: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """[K] values of a map at pixels."""
    column, row = pixels.astype(int).T
    return estimate[row, column]


@jax.jit
def _optimise(
    camera: Camera, anchors: Camera, pixels: jax.Array, at: jax.Array, places: jax.Array,
    exist: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Adam on a robust (Huber) reprojection loss over alpha, beta [K]; started at the median scale.

    Stops when the loss changes by less than `ADAM_SETTLED` over 20 steps.
    """
    a, b = jax.vmap(functools.partial(relative_projection, camera))(anchors)
    homogeneous = jnp.concatenate([pixels, jnp.ones_like(pixels[:, :1])], -1)
    a = jnp.einsum("aij,kj->aki", a, homogeneous, precision="highest")
    offset, along = (v[..., :2] - places * v[..., 2:] for v in (a, b[:, None]))
    inverse = -(offset * along).sum(-1) / (along**2).sum(-1)
    ratio = jnp.where(exist & (inverse > 0), 1 / (inverse * at), jnp.nan)
    start = jnp.nanmedian(ratio)

    def loss_of(parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        depth = jnp.maximum(parameters[0] * at + parameters[1], 1e-3)
        q = a * depth[:, None] + b[:, None]
        error = q[..., :2] / jnp.maximum(q[..., 2:], 1e-3) - places
        distance = jnp.sqrt((error**2).sum(-1) + 1e-9)
        huber = jnp.where(distance < NOISE, 0.5 * distance**2, NOISE * (distance - 0.5 * NOISE))
        return (jnp.where(exist, huber, 0.0)).sum(), (depth, distance)

    def step(carry: tuple) -> tuple:
        parameters, first, second, n, old, loss = carry
        (loss_now, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9 ** (n + 1)) / (jnp.sqrt(second / (1 - 0.999 ** (n + 1))) + 1e-8)
        old, loss = jnp.where(n % 20 == 0, loss, old), jnp.where(n % 20 == 0, loss_now, loss)
        return parameters - ADAM_RATE * start * move, first, second, n + 1, old, loss

    def going(carry: tuple) -> jax.Array:
        n, old, loss = carry[3:]
        return (n < ADAM_STEPS) & (jnp.abs(old - loss) > ADAM_SETTLED * loss)

    parameters = jnp.stack([jnp.full_like(at, start), jnp.zeros_like(at)])
    zeros = jnp.zeros_like(parameters)
    carry = (parameters, zeros, zeros, jnp.int32(0), jnp.inf, jnp.float32(1e30))
    carry = jax.lax.while_loop(going, step, carry)
    depth, distance = loss_of(carry[0])[1]
    supported = (exist & (distance < 3 * NOISE)).any(0)
    return depth, carry[3], supported.astype(jnp.float32)


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
