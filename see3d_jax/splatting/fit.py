"""Fits Gaussians to posed images: one view per step, Adam with a rate per parameter group.

Loss: (1 − λ)·L1 + λ·(1 − SSIM), both weighted per pixel, with LPIPS, known depth and smoothness
where asked for (`losses`), plus a light pull on opacities and sizes that lets useless Gaussians
fade, so that `densify.relocate` can put them to work elsewhere. All views have one size;
everything is compiled once, for the (tile, Gaussian) pairs that the fullest view would need if all
slots were in use and opaque. Should a view need more still, its step is thrown away, the capacity
raised and the step run again: the only recompilation there can be. The same seed gives the same
bits on the same number of devices, also when a fit was killed and went on (`resume`).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from see3d_jax.errors import WorkError
from see3d_jax.evaluation.lpips import MIN_SIDE, load_lpips
from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting import resume
from see3d_jax.splatting.binning import count_pairs
from see3d_jax.splatting.exposure import applied
from see3d_jax.splatting.fit_step import (
    FitConfig,
    Photos,
    State,
    fewness,
    fit_step,
    grow,
    initial_state,
)
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.processor import keep_memory
from see3d_jax.splatting.projection import project_gaussians
from see3d_jax.splatting.render import enough_capacity

Tree = TypeVar("Tree")
# Steps between two files to go on from.
SAVE_EVERY = 200


@dataclasses.dataclass(frozen=True)
class TrainingViews:
    """V posed images of one size.

    Attributes:
      images: [V, H, W, 3] uint8.
      cameras: batch of V cameras of size W × H.
      weights: [V, H, W] uint8, 255 = a pixel counts fully, 0 = not at all; or None.
      depths: [V, H, W] float32 planar z, 0 = unknown; or None.
      points: [V, K, 3] float32, sparse points that each view saw: x, y in pixels, planar z (0 =
        none, as views see different numbers of them); or None.
    """

    images: np.ndarray
    cameras: Camera
    weights: np.ndarray | None = None
    depths: np.ndarray | None = None
    points: np.ndarray | None = None

    def __post_init__(self) -> None:
        images, cameras = self.images, self.cameras
        if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(f"images: expected [V, H, W, 3] with V ≥ 1, got {images.shape}")
        if images.dtype != np.uint8:
            raise ValueError(f"images: expected uint8 (0 to 255, never NaN), got {images.dtype}")
        shape = images.shape[:3]
        if (len(cameras.world_to_camera), cameras.height, cameras.width) != shape:
            raise ValueError(f"cameras: expected {shape[0]} of {shape[2]}×{shape[1]} pixels")
        finite = (
            np.isfinite(np.asarray(m)).all() for m in (cameras.world_to_camera, cameras.intrinsics)
        )
        if not all(finite):
            raise ValueError("cameras: not all numbers are finite")
        for name, dtype in (("weights", np.uint8), ("depths", np.float32)):
            values = getattr(self, name)
            if values is not None and (values.shape != shape or values.dtype != dtype):
                raise ValueError(
                    f"{name}: expected {np.dtype(dtype)} of shape {shape}, got "
                    f"{values.dtype} {values.shape}"
                )
        if self.depths is not None and not (np.isfinite(self.depths) & (self.depths >= 0)).all():
            raise ValueError("depths: expected finite numbers ≥ 0, with 0 where unknown")
        if self.points is not None:
            points, size = self.points, np.array([shape[2], shape[1], np.inf])
            if points.ndim != 3 or points.shape[::2] != (shape[0], 3) or points.dtype != np.float32:
                raise ValueError(f"points: expected float32 [{shape[0]}, K, 3], got {points.shape}")
            if not ((points >= 0) & (points < size)).all():
                raise ValueError("points: expected pixels of the images and finite depths ≥ 0")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The fitted scene and how the fit went.

    Attributes:
      gaussians: as many slots as the initial scene had; some may be empty.
      losses, psnrs: [steps] of the view shown at each step, before its update.
      seconds: wall time of this run, compilation included; `step_seconds`: median of a step.
      pair_capacity: final size of the pair list.
      cameras: of the views, refined where that was asked for.
      exposures: [V, 3, 2] gain and offset of every channel as they were applied, or None.
    """

    gaussians: Gaussians
    losses: np.ndarray
    psnrs: np.ndarray
    seconds: float
    step_seconds: float
    pair_capacity: int
    cameras: Camera
    exposures: np.ndarray | None


def fit(
    views: TrainingViews,
    initial: Gaussians,
    scene_size: float,
    config: FitConfig | None = None,
    seed: int = 0,
    near: float = 0.01,
    content_from: float = 0.0,
    progress: bool = True,
    mesh: Mesh | None = None,
    on_step: Callable[[int, Gaussians], None] | None = None,
    state_file: Path | None = None,
) -> FitResult:
    """Optimises the Gaussians.

    Args:
      views: what to reproduce.
      initial: starting scene; its slots are the largest number of Gaussians there will be.
      scene_size: typical distance from cameras to content, in scene units; scales the rates.
      config: what is minimised, rates and schedule.
      seed: of the order of the views and of growth.
      near: nearest visible depth, in scene units.
      content_from: distance from the cameras at which the content begins, as far as is known, in
        scene units; what hangs before it stays small (`fit_step.NEAR_SPREAD`).
      progress: show a bar with PSNR and time left, where stderr is a terminal.
      mesh: from `processor.host_mesh`: draws a band of the image on each of its devices.
      on_step: called after every step, e.g. to record a time lapse.
      state_file: kept up to date every `SAVE_EVERY` steps; a fit that finds the file of its own
        earlier run there goes on with it. The caller removes it when the result is safe.

    Raises InputError when LPIPS is asked for and cannot be had, WorkError when the fit diverges.
    """
    started = time.perf_counter()
    keep_memory()
    config = config or FitConfig()
    # A program of its own, compiled when the fit gets there: a branch in one program took as long
    # as LPIPS itself.
    without_lpips = dataclasses.replace(config, lpips_weight=0.0)
    number = len(views.images)
    keys = jax.random.key(seed)
    photos, state = _on_devices(views, initial, (scene_size, near, content_from), config, mesh)
    # A short fit must reach its number of Gaussians too.
    grow_every = min(config.relocate_every, max(1, config.steps // 20))
    started_with = int((np.asarray(initial.opacity_logits) > EMPTY_LOGIT / 2).sum())
    capacity = _first_capacity(photos, initial, mesh)
    numbers = (np.zeros((config.steps, 2)), np.zeros(()))  # loss and PSNR by step; the bar's PSNR
    whose, done = "", 0
    if state_file is not None:
        bands = 1 if mesh is None else mesh.size
        given = views.images, views.weights, views.depths, views.points, views.cameras
        whose = resume.digest(config, seed, bands, given, initial, scene_size, near, content_from)
        packed = (state, np.int64(capacity), numbers)
        found = resume.load(state_file, whose, packed)
        if found is not None:
            state, capacity, numbers = _put(found[0], mesh), int(found[1]), found[2]
            done = int(found[0].step)
    scores, smooth = numbers[0], float(numbers[1])
    durations = []
    # `disable` is given only to force it: TQDM_DISABLE has its say otherwise.
    shown = {} if progress and sys.stderr.isatty() else {"disable": True}
    bar = tqdm(
        total=config.steps, initial=done, unit="step", desc="fit", mininterval=0.5, **shown
    )  # fmt: skip
    for step in range(done, config.steps):
        epoch, turn = divmod(step, number)
        index = jnp.int32(np.random.default_rng((seed, epoch)).permutation(number)[turn])
        key = jax.random.fold_in(keys, step)
        terms = config if step >= config.lpips_from * config.steps else without_lpips
        began = time.perf_counter()
        while True:
            candidate, loss, quality, pairs = fit_step(
                terms, capacity, mesh, state, photos, index, key
            )
            if int(pairs) <= capacity:
                break
            capacity = enough_capacity(int(pairs) * 5 // 4)
        state = candidate
        scores[step] = float(loss), float(quality)
        durations.append(time.perf_counter() - began)
        if not np.isfinite(scores[step, 0]):
            bar.close()
            raise WorkError(f"the fit diverged at step {step}: its loss is {scores[step, 0]}")
        if (step + 1) % grow_every == 0 and step < config.relocate_until * config.steps:
            share = min(1.0, (step + 1) / (config.full_at * config.steps))
            target = jnp.int32(started_with + round(share * (initial.count - started_with)))
            state = grow(config.densify, state, key, target, photos.scene_size)
        smooth = scores[step, 1] if step == 0 else 0.95 * smooth + 0.05 * scores[step, 1]
        bar.set_postfix_str(f"PSNR {smooth:.2f} dB", refresh=False)
        bar.update()
        if on_step is not None:
            on_step(step, state.gaussians)
        if state_file is not None and (step + 1) % SAVE_EVERY == 0 and step + 1 < config.steps:
            numbers = scores, np.float64(smooth)
            packed = (state, np.int64(capacity), numbers)
            resume.save(state_file, whose, packed)
    bar.close()
    return FitResult(
        gaussians=state.gaussians,
        losses=scores[:, 0],
        psnrs=scores[:, 1],
        seconds=time.perf_counter() - started,
        step_seconds=float(np.median(durations)) if durations else 0.0,
        pair_capacity=capacity,
        cameras=state.posed(photos.cameras),
        exposures=None if state.exposures is None else np.asarray(applied(state.exposures)),
    )


def _on_devices(
    views: TrainingViews,
    initial: Gaussians,
    distances: tuple[float, float, float],
    config: FitConfig,
    mesh: Mesh | None,
) -> tuple[Photos, State]:
    """What a step reads and what it changes, where the steps will run.

    `distances`: scene_size, near and content_from.
    """
    network = None
    if config.lpips_weight:
        network = load_lpips("vgg")
        if min(views.images.shape[1:3]) < MIN_SIDE[network.network]:
            raise ValueError("images: too small for LPIPS; leave lpips_weight at 0")
    cameras = views.cameras
    photos = Photos(
        views.images,
        views.weights,
        views.depths if config.depth_weight else None,
        views.points if config.points_weight * fewness(len(views.images)) else None,
        Camera(
            jnp.asarray(cameras.intrinsics, jnp.float32),
            jnp.asarray(cameras.world_to_camera, jnp.float32),
            cameras.width,
            cameras.height,
        ),
        network,
        *map(jnp.float32, distances),
    )
    state = initial_state(jax.tree.map(jnp.asarray, initial), config, photos.cameras)
    return _put((photos, state), mesh)


def _put(tree: Tree, mesh: Mesh | None) -> Tree:
    """Onto the device, or every device: now, and not anew at every step."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _first_capacity(photos: Photos, initial: Gaussians, mesh: Mesh | None) -> int:
    """Room for the pairs of the fullest view, were all slots in use."""
    share = float((np.asarray(initial.opacity_logits) > EMPTY_LOGIT / 2).mean())
    pairs = int(_most_pairs(mesh, initial, photos.cameras, photos.near))
    return enough_capacity(int(pairs / max(share, 1e-6)))


@partial(jax.jit, static_argnums=0)
def _most_pairs(
    mesh: Mesh | None, gaussians: Gaussians, cameras: Camera, near: jax.Array
) -> jax.Array:
    """[] int32, pairs of the fullest band of any view, were all Gaussians opaque."""
    logits = jnp.where(gaussians.opacity_logits > EMPTY_LOGIT / 2, 5.0, EMPTY_LOGIT)
    gaussians = dataclasses.replace(gaussians, opacity_logits=logits)

    def count(camera: Camera) -> jax.Array:
        projected = project_gaussians(gaussians, camera, near)
        return count_pairs(projected, camera.width, camera.height, mesh.size if mesh else 1)

    return jax.lax.map(count, cameras).max()
