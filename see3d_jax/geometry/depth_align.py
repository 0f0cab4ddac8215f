"""Depth of a new view brought to the scale of what exists, paper Sec. 3.3.

Eq. 4: keypoint k of the new view, matched in the anchors, gets the depth d* = alpha_k d + beta_k
whose reprojection meets its matches. alpha and beta enter through d* alone, so a keypoint has one
degree of freedom, its inverse depth r along the ray: anchor pixels are q(r) = a + r b, each match
gives r in closed form, and a few robust Gauss-Newton steps join the matches of all anchors.
Eq. 5-6: locally weighted linear regression on a coarse grid over x, y and (edge-aware) depth, with
a ridge. What is regressed is the relative error of the best global fit, on [log d, 1]: errors of
depth are relative, and the ridge then leans on the global fit. That is a scale and shift, and a
smooth curve of depth on top, which carries over to where no keypoint is near.
Cameras: OpenCV axes, world→camera, pixel centres at +0.5, planar depth.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera, relative_projection

Array = jax.Array
_STEPS = 4  # Gauss-Newton converges quadratically from a closed form that is nearly right
_ROUNDS = 4  # of reweighting in the regression
_TRIALS = 256  # two-point trials of the global fit: fails once in 1e60 at half outliers
_LEVELS = 10  # of the grid along log depth
_RIDGE, _RIDGE_SLOPE = 0.02, 0.005  # typical keypoints; the same × their variance of log depth
REACH = 1.3  # of a keypoint: noise averages over a few, and little detail is smoothed away
_REJECT = 3.0  # standard deviations
_KNOTS = 20  # of the curve along log depth: all keypoints tell of it, so it may bend more
_CURVE_LIMITS = 0.3, 0.1, 0.05  # relative errors that count a quarter, in turn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidedDepths:
    """Depths of K keypoints that agree with the anchors.

    Attributes:
      depth: [K] float32 planar depth in the new view; 1 where `valid` is 0.
      deviation: [K] float32 relative standard deviation of the depth, from the pixel noise.
      valid: [K] float32, 1 = at least one anchor supports this depth.
      support: [A, K] float32, 1 = the match in that anchor agrees with it.
    """

    depth: Array
    deviation: Array
    valid: Array
    support: Array


def guide_keypoints(
    new: Camera, anchors: Camera, pixels: Array, anchor_pixels: Array, matched: Array,
    noise: float = 1.0,
) -> GuidedDepths:  # fmt: skip
    """Eq. 4 for all keypoints at once.

    Args:
      new: one camera; anchors: batch [A].
      pixels: [K, 2] keypoints in the new view.
      anchor_pixels: [A, K, 2] their matches; matched: [A, K] bool, False = none in that anchor.
      noise: standard deviation of a match, pixels.

    A match that no depth explains within 3 standard deviations is an outlier and has no say.
    Raises ValueError for shapes that do not fit.
    """
    count = (*anchors.intrinsics.shape[:-2], len(pixels))
    if len(count) != 2 or anchor_pixels.shape != (*count, 2) or matched.shape != count:
        raise ValueError(
            f"guide_keypoints: expected anchor_pixels {(*count, 2)} and matched {count} for anchors"
            f" [A] and pixels [K, 2], got {anchor_pixels.shape} and {matched.shape}"
        )
    return _guide(new, anchors, pixels, anchor_pixels, matched, noise)


@jax.jit
def _guide(
    new: Camera, anchors: Camera, pixels: Array, anchor_pixels: Array, matched: Array, noise: Array
) -> GuidedDepths:
    a, b = jax.vmap(lambda anchor: relative_projection(new, anchor))(anchors)
    homogeneous = jnp.concatenate([pixels, jnp.ones_like(pixels[:, :1])], -1)
    a = jnp.einsum("aij,kj->aki", a, homogeneous, precision="highest")  # [A, K, 3]
    b = b[:, None, :]

    def residual(inverse: Array) -> tuple[Array, Array, Array]:
        """Inverse depths [..., K] → residual and its slope [..., A, K, 2], in front [..., A, K]."""
        q = a + inverse[..., None, :, None] * b
        ahead = q[..., 2] > 1e-6
        z = jnp.where(ahead, q[..., 2], 1.0)[..., None]
        at = q[..., :2] / z
        return at - anchor_pixels, (b[..., :2] - at * b[..., 2:]) / z, ahead

    def weight(error: Array) -> Array:
        """Geman-McClure: squared errors in standard deviations² → weights in (0, 1]."""
        return 1.0 / (1.0 + error / _REJECT**2) ** 2

    # Every anchor proposes the least-squares r of (a + r b) × m = 0; the best supported one starts.
    offset, along = (v[..., :2] - anchor_pixels * v[..., 2:] for v in (a, b))
    proposed = -(offset * along).sum(-1) / jnp.maximum((along**2).sum(-1), 1e-12)
    usable = matched & (proposed > 1e-6)
    proposed = jnp.where(usable, proposed, 1.0)
    error, _, ahead = residual(proposed)  # [A proposals, A, K, ...]
    error = (error**2).sum(-1) / noise**2
    score = jnp.where(matched & ahead, 1 / (1 + error / _REJECT**2), 0.0).sum(1)
    score = jnp.where(usable, score, -1.0)
    best = jnp.argmax(score, 0)
    inverse = jnp.take_along_axis(proposed, best[None], 0)[0]
    start = inverse
    for _ in range(_STEPS):
        error, slope, ahead = residual(inverse)
        w = jnp.where(matched & ahead, weight((error**2).sum(-1) / noise**2), 0.0)
        step = (w * (error * slope).sum(-1)).sum(0)
        curvature = (w * (slope**2).sum(-1)).sum(0)
        inverse = inverse - step / jnp.maximum(curvature, 1e-12)
        inverse = jnp.clip(inverse, 0.5 * start, 2 * start)  # no leap from the supported start
    error, slope, ahead = residual(inverse)
    support = matched & ahead & ((error**2).sum(-1) < (_REJECT * noise) ** 2)
    information = (support * (slope**2).sum(-1)).sum(0)
    valid = usable.any(0) & support.any(0) & (information > 0) & jnp.isfinite(inverse)
    deviation = noise / jnp.sqrt(jnp.maximum(information, 1e-12)) / jnp.maximum(inverse, 1e-9)
    return GuidedDepths(
        jnp.where(valid, 1 / jnp.where(valid, inverse, 1.0), 1.0),
        jnp.where(valid, deviation, 1.0),
        valid.astype(jnp.float32),
        (support & valid).astype(jnp.float32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlignedDepth:
    """A depth map in the scale of the anchors.

    Attributes:
      depth: [H, W] float32, 0 where the estimate is unknown.
      scale, shift: the robust global fit that the local one leans on, scalars.
      error: [K] float32, relative error at each keypoint of a fit in which it had no say.
    """

    depth: Array
    scale: Array
    shift: Array
    error: Array


def align_depth(
    depth: Array, pixels: Array, guided: GuidedDepths, *,
    bandwidth: float | None = None, edge_aware: bool = True,
) -> AlignedDepth:  # fmt: skip
    """Eq. 5-6: corrects an estimated depth map by the guided depths of its keypoints.

    Args:
      depth: [H, W] estimate, affine-invariant or metric; ≤ 0 or not finite = unknown.
      pixels: [K, 2] keypoints; guided: their depths.
      bandwidth: reach of a keypoint, pixels; default 1.3 times the mean distance of keypoints.
      edge_aware: let keypoints speak for pixels of similar depth only, so that corrections do not
        leak over depth edges and need not be linear in depth.

    Where no keypoint is near, the global fit holds; where there is no usable keypoint at all, the
    depth comes back unchanged. Raises ValueError for shapes that do not fit.
    """
    if depth.ndim != 2 or pixels.shape != (*guided.depth.shape, 2):
        raise ValueError(
            f"align_depth: expected depth [H, W] and pixels {(*guided.depth.shape, 2)}, got "
            f"{depth.shape} and {pixels.shape}"
        )
    bandwidth = float(bandwidth or REACH * math.sqrt(depth.size / max(1, len(pixels))))
    if not bandwidth > 0:
        raise ValueError(f"align_depth: bandwidth must be > 0 pixels, got {bandwidth}")
    return _align(jnp.asarray(depth, jnp.float32), pixels, guided, bandwidth, edge_aware)


def fit_global(estimate: Array, guided: GuidedDepths, key: Array) -> tuple[Array, Array]:
    """Robust scale and shift with guided ≈ scale · estimate + shift: RANSAC, then refined.

    `estimate` is [K], the map's depth at the keypoints; the shift is 0 where all are alike.
    Errors are relative, in the guided depths' standard deviations but at least 5 %.
    """
    d, target, w = estimate, guided.depth, guided.valid * (estimate > 0)
    sigma = jnp.maximum(guided.deviation, 0.05) * target
    usable_first = jnp.argsort(-w)
    drawn = jax.random.uniform(key, (2, _TRIALS)) * jnp.maximum((w > 0).sum(), 1)
    pair = usable_first[drawn.astype(jnp.int32)]
    d_pair, t_pair = d[pair], target[pair]
    run = d_pair[1] - d_pair[0]
    scale = (t_pair[1] - t_pair[0]) / jnp.where(jnp.abs(run) < 1e-6, 1.0, run)
    scale = jnp.where((jnp.abs(run) < 1e-6) | (scale <= 0), t_pair[0] / d_pair[0], scale)
    shift = t_pair[0] - scale * d_pair[0]
    error = (scale[:, None] * d + shift[:, None] - target) / sigma  # [trials, K]
    cost = (w * error**2 / (error**2 + 1)).sum(-1)
    best = jnp.argmin(cost)
    scale, shift = scale[best], shift[best]
    for _ in range(3):
        error = (scale * d + shift - target) / sigma
        weight = w / (1 + error**2) ** 2 / sigma**2
        weight = weight / jnp.maximum(weight.sum(), 1e-20)
        mean_d, mean_t = (weight * d).sum(), (weight * target).sum()
        spread = (weight * (d - mean_d) ** 2).sum()
        slope = (weight * (d - mean_d) * (target - mean_t)).sum() / jnp.maximum(spread, 1e-12)
        flat = spread < 1e-8 * mean_d**2
        slope = jnp.where(flat | (slope <= 0), mean_t / jnp.maximum(mean_d, 1e-9), slope)
        scale, shift = slope, mean_t - slope * mean_d
    nothing = w.sum() < 1
    return jnp.where(nothing, 1.0, scale), jnp.where(nothing, 0.0, shift)


@functools.partial(jax.jit, static_argnames=("edge_aware",))
def _align(
    depth: Array, pixels: Array, guided: GuidedDepths, bandwidth: Array, edge_aware: bool
) -> AlignedDepth:
    height, width = depth.shape
    known = jnp.isfinite(depth) & (depth > 0)
    depth = jnp.where(known, depth, 0.0)
    column = jnp.clip(pixels[:, 0].astype(jnp.int32), 0, width - 1)
    row = jnp.clip(pixels[:, 1].astype(jnp.int32), 0, height - 1)
    at = depth[row, column]
    usable = guided.valid * (at > 0)
    guided = dataclasses.replace(guided, valid=usable)
    scale, shift = fit_global(at, guided, jax.random.key(0))

    # Coordinates in bandwidths; log depth has its own, small enough to follow a curved relation.
    log = jnp.log(jnp.maximum(at, 1e-9))
    low = jnp.where(usable > 0, log, jnp.inf).min()
    low, high = jnp.where(jnp.isfinite(low), low, 0.0), jnp.where(usable > 0, log, -jnp.inf).max()
    high = jnp.maximum(jnp.where(jnp.isfinite(high), high, 0.0), low + 1e-3)
    reach = jnp.maximum((high - low) / (_LEVELS - 1), 0.1)
    place = pixels / bandwidth
    level = log / reach
    apart = ((place[:, None] - place[None]) ** 2).sum(-1)
    if edge_aware:
        apart = apart + (level[:, None] - level[None]) ** 2
    kernel = jnp.exp(-0.5 * apart) * (1 - jnp.eye(len(at)))  # without its own point: honest errors

    # In relative units: residuals against the global fit, and regressor d as deviation from it.
    base = jnp.maximum(scale * at + shift, 1e-3 * jnp.maximum(guided.depth, 1e-9))
    residual = (guided.depth - base) / base
    centre = (usable * log).sum() / jnp.maximum(usable.sum(), 1)
    deviation = jnp.clip(guided.deviation, 0.005, 1.0)
    regressor = log - centre
    knots = jnp.linspace(low, high, _KNOTS)
    sway = jnp.maximum(knots[1] - knots[0], 0.05)
    near = jnp.exp(-0.5 * ((knots[:, None] - log[None]) / sway) ** 2)
    curve = jnp.zeros_like(knots)
    for limit in _CURVE_LIMITS:
        error = residual - _between(curve, log, low, high)
        weight = _typical_is_one(usable / (1 + (error / limit) ** 2) ** 2 / deviation**2)
        curve = _solve(near @ _moments(weight, regressor, residual), knots - centre)
    residual = (1 + residual) / (1 + _between(curve, log, low, high)) - 1
    weight = _typical_is_one(usable / (1 + (residual / 0.3) ** 2) ** 2 / deviation**2)
    for _ in range(_ROUNDS):
        fit = _solve(kernel @ _moments(weight, regressor, residual), regressor)
        error = residual - fit
        spread = 1.4826 * _masked_median(jnp.abs(error), usable)
        limit = _REJECT * jnp.maximum(jnp.maximum(deviation, spread), 0.01)
        weight = usable / (1 + (error / limit) ** 2) ** 2 / (deviation**2 + spread**2)
        weight = _typical_is_one(weight)
    inlier = usable * (jnp.abs(error) < limit)

    nodes_y, lift_y = _nodes(height, 2 + min(height // 16, 32))
    nodes_x, lift_x = _nodes(width, 2 + min(width // 16, 32))
    across = jnp.exp(-0.5 * (nodes_x[:, None] / bandwidth - place[None, :, 0]) ** 2)
    down = jnp.exp(-0.5 * (nodes_y[:, None] / bandwidth - place[None, :, 1]) ** 2)
    levels = jnp.linspace(low, high, _LEVELS if edge_aware else 2)
    near = jnp.exp(-0.5 * (levels[:, None] / reach - level[None]) ** 2)
    near = near if edge_aware else jnp.ones_like(near)
    moments = _moments(weight * inlier, regressor, residual)
    plane = (down[:, None] * across[None]).reshape(-1, len(at))
    sums = plane @ (near[:, :, None] * moments).transpose(1, 0, 2).reshape(len(at), -1)
    sums = sums.reshape(len(nodes_y), len(nodes_x), len(levels), -1)
    field = _solve(sums, levels - centre)
    field = jnp.einsum("hy,yxz,wx->zhw", lift_y, field, lift_x, precision="highest")
    log = jnp.log(jnp.maximum(depth, 1e-9))
    correction = (1 + _between(curve, log, low, high)) * (1 + _between(field, log, low, high))
    base = jnp.maximum(scale * depth + shift, 1e-3 * (scale * jnp.exp(low) + jnp.abs(shift)))
    aligned = jnp.where(known, base * jnp.maximum(correction, 0.05), 0.0)
    return AlignedDepth(aligned, scale, shift, error)


def _between(values: Array, at: Array, low: Array, high: Array) -> Array:
    """Interpolates values [Z, ...] at equal steps over low..high, linearly, at positions [...]."""
    position = jnp.clip((at - low) / (high - low) * (len(values) - 1), 0, len(values) - 1)
    return sum(jnp.maximum(1 - jnp.abs(position - n), 0.0) * values[n] for n in range(len(values)))


def _moments(weight: Array, x: Array, y: Array) -> Array:
    """[K, 5]: what a regression of y on [x, 1] has to know of each keypoint."""
    return jnp.stack([weight, weight * x, weight * x**2, weight * y, weight * x * y], -1)


def _solve(sums: Array, query: Array) -> Array:
    """Summed moments [..., 5] → the regression's value at `query` [...].

    The ridge counts as a fraction of a typical keypoint; it pulls the correction to 0.
    """
    s0, s1, s2, t0, t1 = jnp.moveaxis(sums, -1, 0)
    # around the local mean, where slope and height do not depend on each other
    total = s0 + _RIDGE
    mean = s1 / total
    spread = jnp.maximum(s2 - s1 * mean, 0.0) + _RIDGE_SLOPE
    slope = (t1 - t0 * mean) / spread
    return t0 / total + jnp.where(s0 > 0.1, slope, 0.0) * (query - mean)


def _typical_is_one(weight: Array) -> Array:
    """Weights [K] divided by their median above 0, so that a ridge means the same everywhere."""
    return weight / jnp.maximum(_masked_median(weight, weight), 1e-20)


def _nodes(length: int, count: int) -> tuple[Array, Array]:
    """Grid positions [G] over 0..length, and the hat weights [length, G] that interpolate them."""
    nodes = jnp.linspace(0.0, float(length), count)
    position = (jnp.arange(length) + 0.5) / length * (count - 1)
    return nodes, jnp.maximum(1 - jnp.abs(position[:, None] - jnp.arange(count)), 0.0)


def _masked_median(values: Array, mask: Array) -> Array:
    """Median of the values where mask > 0; 0 when there are none."""
    ordered = jnp.sort(jnp.where(mask > 0, values, jnp.inf))
    middle = jnp.maximum((mask > 0).sum() - 1, 0) // 2
    return jnp.where(jnp.isfinite(ordered[middle]), ordered[middle], 0.0)
