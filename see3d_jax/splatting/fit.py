"""Fits Gaussians to posed images: one view per step, Adam with a rate per parameter group.

Loss: (1 − λ)·L1 + λ·(1 − SSIM), both weighted per pixel, plus a light pull on opacities and sizes
that lets useless Gaussians fade, so that `densify.relocate` can put them to work elsewhere. All
views have one size; everything is compiled once, for the (tile, Gaussian) pairs that the fullest
view would need if all slots were in use and opaque. Should a view need more still, its step is
thrown away, the capacity raised and the step run again: the only recompilation there can be. The
same seed gives the same bits on the same number of devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from see3d_jax.evaluation.metrics import psnr, ssim
from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.binning import count_pairs
from see3d_jax.splatting.densify import relocate
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.poses import alignment_step, moved
from see3d_jax.splatting.projection import project_gaussians
from see3d_jax.splatting.render import Rendering, enough_capacity, render_within

# Cameras rest for this share of a fit, until there is a scene to align them with.
POSES_START = 0.1
# Share of the way to the aligned pose that a camera goes at once: the scene follows as well.
POSES_GAIN = 0.5
# Longest side, in pixels, of the pictures that are aligned in each third of a fit.
ALIGNED_SIDES = (48, 96, None)


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """What to optimise and how fast. Rates are per Adam step.

    Attributes:
      steps: number of views shown.
      means_rate: of positions, in units of the scene's size; decays to `means_rate_end`.
      log_scales_rate, quaternions_rate, opacity_rate, sh_rate: constant until the last third,
        then down to a tenth; `sh_rest_rate` is for degrees ≥ 1.
      ssim_weight: λ of the loss.
      opacity_pull, scale_pull: weights of the mean opacity and of the mean size ÷ scene size.
      relocate_every, relocate_until: steps between relocations (fewer in a fit of
        under 20 times as many), and the share of the fit after which there are none.
      growth: factor on the number of Gaussians at each relocation, up to the capacity.
      refine_poses: align the camera of a view with the scene each time it is shown, at first in
        small pictures (`ALIGNED_SIDES`). The world may drift as a whole: see `carried_along`.
    """

    steps: int = 2000
    means_rate: float = 6e-4
    means_rate_end: float = 1e-5
    log_scales_rate: float = 2e-2
    quaternions_rate: float = 5e-3
    opacity_rate: float = 5e-2
    sh_rate: float = 1e-2
    sh_rest_rate: float = 1e-3
    ssim_weight: float = 0.2
    opacity_pull: float = 0.01
    scale_pull: float = 0.01
    relocate_every: int = 50
    relocate_until: float = 0.7
    growth: float = 1.3
    refine_poses: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingViews:
    """V posed images of one size.

    Attributes:
      images: [V, H, W, 3] uint8.
      cameras: batch of V cameras of size W × H.
      weights: [V, H, W] uint8, 255 = a pixel counts fully, 0 = not at all; or None.
    """

    images: np.ndarray
    cameras: Camera
    weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The fitted scene and how the fit went.

    Attributes:
      gaussians: as many slots as the initial scene had; some may be empty.
      losses, psnrs: [steps] of the view shown at each step, before its update.
      seconds: wall time, compilation included; `step_seconds`: median of a step.
      pair_capacity: final size of the pair list.
      cameras: of the views, refined where that was asked for.
    """

    gaussians: Gaussians
    losses: np.ndarray
    psnrs: np.ndarray
    seconds: float
    step_seconds: float
    pair_capacity: int
    cameras: Camera


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    gaussians: Gaussians
    first_moment: Gaussians
    second_moment: Gaussians
    step: jax.Array
    poses: jax.Array | None  # [V, 4, 4] world→camera while they are refined


def fit(
    views: TrainingViews,
    initial: Gaussians,
    scene_size: float,
    config: FitConfig = FitConfig(),
    seed: int = 0,
    near: float = 0.01,
    progress: bool = True,
    mesh: Mesh | None = None,
    on_step: Callable[[int, Gaussians], None] | None = None,
) -> FitResult:
    """Optimises the Gaussians.

    Args:
      views: what to reproduce.
      initial: starting scene; its slots are the largest number of Gaussians there will be.
      scene_size: typical distance from cameras to content, in scene units; scales the rates.
      config: rates and schedule.
      seed: of the order of the views and of relocation.
      near: nearest visible depth, in scene units.
      progress: show a bar with PSNR and time left.
      mesh: from `render.host_mesh`: draws a band of the image on each of its devices.
      on_step: called after every step, e.g. to record a time lapse.
    """
    started = time.perf_counter()
    generator = np.random.default_rng(seed)
    keys = jax.random.key(seed)
    images, weights = views.images, views.weights
    cameras = Camera(
        jnp.asarray(views.cameras.intrinsics, jnp.float32),
        jnp.asarray(views.cameras.world_to_camera, jnp.float32),
        views.cameras.width,
        views.cameras.height,
    )
    poses = cameras.world_to_camera if config.refine_poses else None
    state = _State(initial, _zeros(initial), _zeros(initial), jnp.int32(0), poses)
    scale = jnp.float32(scene_size)
    # A short fit must reach its number of Gaussians too.
    relocate_every = min(config.relocate_every, max(1, config.steps // 20))
    if mesh is not None:  # every device has a copy, now and not anew at every step
        copies = NamedSharding(mesh, PartitionSpec())
        state, images, weights, cameras = jax.device_put((state, images, weights, cameras), copies)
    else:
        images, weights = jax.device_put((images, weights))
    share = float((np.asarray(initial.opacity_logits) > EMPTY_LOGIT / 2).mean())
    pairs = int(_most_pairs(mesh, initial, cameras, jnp.float32(near)))
    capacity = enough_capacity(int(pairs / max(share, 1e-6)))
    losses, psnrs, durations = np.zeros(config.steps), np.zeros(config.steps), []
    order: list[int] = []
    bar = tqdm(total=config.steps, unit="step", desc="fit", disable=not progress, mininterval=0.5)
    smooth = None
    for step in range(config.steps):
        if not order:
            order = list(generator.permutation(len(views.images)))
        index = jnp.int32(order.pop())
        began = time.perf_counter()
        while True:
            candidate, loss, quality, pairs = _step(
                config, capacity, mesh, state, images, weights, cameras, index, scale,
                jnp.float32(near),
            )  # fmt: skip
            if int(pairs) <= capacity:
                break
            capacity = enough_capacity(int(pairs) * 5 // 4)
        state = candidate
        losses[step], psnrs[step] = float(loss), float(quality)
        durations.append(time.perf_counter() - began)
        if not np.isfinite(losses[step]):
            raise FloatingPointError(f"the fit diverged at step {step}: loss {losses[step]}")
        if (step + 1) % relocate_every == 0 and step < config.relocate_until * config.steps:
            state = _relocate(state, jax.random.fold_in(keys, step), jnp.float32(config.growth))
        smooth = psnrs[step] if smooth is None else 0.95 * smooth + 0.05 * psnrs[step]
        bar.set_postfix_str(f"PSNR {smooth:.2f} dB", refresh=False)
        bar.update()
        if on_step is not None:
            on_step(step, state.gaussians)
    bar.close()
    return FitResult(
        gaussians=state.gaussians,
        losses=losses,
        psnrs=psnrs,
        seconds=time.perf_counter() - started,
        step_seconds=float(np.median(durations)),
        pair_capacity=capacity,
        cameras=_posed(cameras, state.poses),
    )


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


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    config: FitConfig,
    capacity: int,
    mesh: Mesh | None,
    state: _State,
    images: jax.Array,
    weights: jax.Array | None,
    cameras: Camera,
    index: jax.Array,
    scene_size: jax.Array,
    near: jax.Array,
) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
    """One Adam step on one view → new state, loss, PSNR, pairs needed."""
    truth = images[index].astype(jnp.float32) / 255.0
    weight = None if weights is None else weights[index].astype(jnp.float32) / 255.0

    camera = _posed(cameras, state.poses)[index]

    def loss_of(gaussians: Gaussians) -> tuple[jax.Array, Rendering]:
        picture = render_within(gaussians, camera, capacity, near=near, mesh=mesh)
        loss = photometric_loss(picture.rgb, truth, weight, config.ssim_weight)
        loss += config.opacity_pull * jax.nn.sigmoid(gaussians.opacity_logits).mean()
        loss += config.scale_pull * jnp.exp(gaussians.log_scales).mean() / scene_size
        return loss, picture

    (loss, picture), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.gaussians)
    after = _adam(state, gradient, _rates(config, state.step, scene_size))
    if state.poses is not None:
        pose = _aligned(config, state.step, picture, truth, weight, camera)
        after = dataclasses.replace(after, poses=state.poses.at[index].set(pose))
    return after, loss, psnr(picture.rgb, truth, weight), picture.pair_count


def _aligned(
    config: FitConfig,
    step: jax.Array,
    picture: Rendering,
    truth: jax.Array,
    weight: jax.Array | None,
    camera: Camera,
) -> jax.Array:
    """World→camera [4, 4] of a view after a step towards what it shows."""

    def motion_at(pooling: int) -> jax.Array:
        return alignment_step(
            picture.rgb, picture.depth, picture.alpha, truth, weight, camera.intrinsics, pooling
        )

    progress = step / config.steps
    longest = max(camera.width, camera.height)
    poolings = [max(1, longest // (side or longest)) for side in ALIGNED_SIDES]
    stage = jnp.minimum((progress * len(poolings)).astype(jnp.int32), len(poolings) - 1)
    motion = jax.lax.switch(stage, [partial(motion_at, pooling) for pooling in poolings])
    gain = jnp.where(progress < POSES_START, 0.0, POSES_GAIN * _late(config, step))
    return moved(camera.world_to_camera, gain * motion)


def photometric_loss(
    image: jax.Array, truth: jax.Array, weight: jax.Array | None, ssim_weight: float
) -> jax.Array:
    """(1 − λ)·L1 + λ·(1 − SSIM) of [H, W, 3] images in [0, 1], weighted by [H, W] or not."""
    error = jnp.abs(image - truth).mean(-1)
    absolute = error.mean() if weight is None else (error * weight).sum() / (weight.sum() + 1e-6)
    if ssim_weight == 0.0:
        return absolute
    return (1 - ssim_weight) * absolute + ssim_weight * (1.0 - ssim(image, truth, weight))


def _rates(config: FitConfig, step: jax.Array, scene_size: jax.Array) -> Gaussians:
    """Learning rate of every parameter group, in the shape of the parameters."""
    decay = (config.means_rate_end / config.means_rate) ** (step / config.steps)
    late = _late(config, step)
    return Gaussians(
        means=config.means_rate * scene_size * decay,
        log_scales=config.log_scales_rate * late,
        quaternions=config.quaternions_rate * late,
        opacity_logits=config.opacity_rate * late,
        sh=jnp.where(jnp.arange(16) == 0, config.sh_rate, config.sh_rest_rate) * late,
    )


def _late(config: FitConfig, step: jax.Array) -> jax.Array:
    """1, and from two thirds of the fit on down to 0.1."""
    return 0.1 ** jnp.maximum(0.0, (step / config.steps - 2 / 3) * 3)


def _adam(state: _State, gradient: Gaussians, rates: Gaussians) -> _State:
    """Adam (β = 0.9, 0.999; ε = 1e-15, gradients of splats are tiny)."""
    step = state.step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.first_moment, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state.second_moment, gradient)
    correct1, correct2 = 1 - 0.9**step, 1 - 0.999**step
    coefficients = gradient.sh.shape[1]
    rates = dataclasses.replace(rates, sh=rates.sh[:coefficients, None])
    after = jax.tree.map(
        lambda p, m, v, rate: p - rate * (m / correct1) / (jnp.sqrt(v / correct2) + 1e-15),
        state.gaussians,
        first,
        second,
        rates,
    )
    return _State(after, first, second, step, state.poses)


@jax.jit
def _relocate(state: _State, key: jax.Array, growth: jax.Array) -> _State:
    moments = (state.first_moment, state.second_moment)
    gaussians, (first, second), _ = relocate(state.gaussians, moments, key, growth)
    return _State(gaussians, first, second, state.step, state.poses)


def _posed(cameras: Camera, poses: jax.Array | None) -> Camera:
    return cameras if poses is None else dataclasses.replace(cameras, world_to_camera=poses)


def _zeros(gaussians: Gaussians) -> Gaussians:
    return jax.tree.map(jnp.zeros_like, gaussians)
