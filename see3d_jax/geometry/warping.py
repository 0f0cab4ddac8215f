"""Forward warping of images with depth into other cameras, with a z-buffer and a hole mask.

Every source pixel is a surfel: the parallelogram that its square covers on the surface, whose
slope comes from neighbouring depths. A plane's inverse depth is linear in the image, so a surfel
at pixel p with inverse depth d and slope g projects to homogeneous target coordinates

    q(δ) = A·(p + δ) + (d + g·δ)·b,   A = K_t R K_s⁻¹,  b = K_t t,   |δ| ≤ ½,

and the δ that lands on a target pixel centre solves a 2 × 2 linear system exactly. Surfels of one
surface tile the target without cracks, colours are interpolated at sub-pixel positions, and the
nearest surfel wins. Pixels at depth discontinuities mix two surfaces' colours, and surfels seen
from behind show the inside of something: both still hide what lies behind them, but leave a hole.
Masks: 1 = known. Pixel centres at +0.5, planar depth, 0 = unknown depth.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera, pixel_grid, relative_projection

Array = jax.Array
_HALF = 0.505  # half a pixel, and a hair against cracks from rounding
_SNAP = 1e-3  # offsets below this many pixels are rounding: identity stays bit-exact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarpedViews:
    """Warps into T target views.

    Attributes:
      image: [T, H, W, 3] float32, 0 in holes.
      depth: [T, H, W] float32 planar depth in the target, 0 in holes.
      known: [T, H, W, 1] float32, 1 = seen by a source, 0 = hole.
    """

    image: Array
    depth: Array
    known: Array


def warp_views(
    images: Array, depth: Array, source: Camera, target: Camera,
    footprint: int = 3, edge_threshold: float | None = 0.03, most_stretch: float | None = None,
) -> WarpedViews:  # fmt: skip
    """Warps S source views with depth into T target cameras, merged by z-buffer.

    Args:
      images: [S, h, w, 3] float colours (any range).
      depth: [S, h, w] planar depth in the source cameras; ≤ 0 or not finite = unknown.
      source, target: cameras of batch shape [S] and [T]; image sizes may differ.
      footprint: target pixels tried around each surfel, per axis. Surfaces stay closed up to a
        magnification of footprint − 1.
      edge_threshold: relative inverse-depth jump between neighbours, beyond their slope, that
        counts as an occlusion edge; edges are left open, and so is a rim of one pixel around every
        hole. None keeps every pixel.
      most_stretch: target pixels that a source pixel may be drawn out to, in its longest direction;
        surfaces that a source shows too small for that are left open. None draws all.

    Where several sources know the same surface, the one that shows it largest is taken.
    Raises ValueError for shapes that do not fit.
    """
    expected = (*source.intrinsics.shape[:-2], source.height, source.width)
    if len(expected) != 3 or images.shape != (*expected, 3) or depth.shape != expected:
        raise ValueError(
            f"warp_views: expected images {(*expected, 3)} and depth {expected} for a batch [S] of "
            f"source cameras, got {images.shape} and {depth.shape}"
        )
    if target.intrinsics.ndim != 3:
        raise ValueError("warp_views: target must be a batch [T] of cameras")
    if footprint < 2:
        raise ValueError(f"warp_views: footprint must be at least 2, got {footprint}")
    threshold = float("inf") if edge_threshold is None else float(edge_threshold)
    longest = float("inf") if most_stretch is None else float(most_stretch)
    return _warp(images, depth, source, target, footprint, threshold, longest)


@functools.partial(jax.jit, static_argnames=("footprint", "threshold", "longest"))
def _warp(
    images: Array, depth: Array, source: Camera, target: Camera, footprint: int, threshold: float,
    longest: float,
) -> WarpedViews:  # fmt: skip
    images = jnp.asarray(images, jnp.float32)
    surfels = jax.vmap(functools.partial(_surfels, threshold=threshold))(depth)
    size = target.height, target.width

    def warp_one(pose: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        to_target = Camera(*pose, target.width, target.height)
        # sources one after the other: a scatter is serial on CPU, and memory stays bounded
        layers = jax.lax.map(
            lambda s: _warp_pair(*s, to_target, footprint, threshold, longest),
            (images, surfels, source),
        )
        return _merge(*layers)

    image, z, known = jax.lax.map(
        warp_one, (jnp.asarray(target.intrinsics), jnp.asarray(target.world_to_camera))
    )
    known = known.reshape(-1, *size)
    if threshold < float("inf"):
        known = _without_rim(known)
    return WarpedViews(
        image.reshape(-1, *size, 3) * known[..., None],
        z.reshape(-1, *size) * known,
        known[..., None],
    )


def _without_rim(known: Array) -> Array:
    """Known pixels [T, H, W] but those beside a hole: their true colours are mixed with what the
    hole hides (3 % of the pixels had 7 % of the squared error)."""
    padded = jnp.pad(known, ((0, 0), (1, 1), (1, 1)), constant_values=1.0)
    beside = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    return functools.reduce(jnp.minimum, beside, known)


def _surfels(depth: Array, threshold: float) -> tuple[Array, Array, Array, Array]:
    """Depth [h, w] → inverse depth (0 = unknown), slope [h, w, 2] (x, y), edge [h, w]."""
    valid = jnp.isfinite(depth) & (depth > 0)
    inverse = jnp.where(valid, 1.0 / jnp.where(valid, depth, 1.0), 0.0)

    def slope_along(axis: int) -> tuple[Array, Array]:
        ahead = jnp.diff(inverse, axis=axis)
        both = jnp.logical_and(*_pairs(valid, axis))
        jump = jnp.where(both, ahead, jnp.inf)
        forward = jnp.concatenate([jump, jnp.full_like(_slice(inverse, axis, 0), jnp.inf)], axis)
        backward = jnp.concatenate([jnp.full_like(_slice(inverse, axis, 0), jnp.inf), jump], axis)
        # the smaller of the two steps stays on this pixel's surface at an edge
        slope = jnp.where(jnp.abs(forward) < jnp.abs(backward), forward, backward)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        limit = threshold * inverse
        edge = jnp.zeros_like(valid)
        for step in (forward, backward):
            edge |= jnp.isfinite(step) & (jnp.abs(step - slope) > limit)
        return slope, edge

    (slope_x, edge_x), (slope_y, edge_y) = slope_along(1), slope_along(0)
    # a pixel that jumps on both sides (a thin thing) has no slope to trust
    steep = jnp.maximum(jnp.abs(slope_x), jnp.abs(slope_y)) > 0.25 * inverse
    slope = jnp.where(steep[..., None], 0.0, jnp.stack([slope_x, slope_y], -1))
    edge = edge_x | edge_y | steep if threshold < float("inf") else jnp.zeros_like(valid)
    return inverse, slope, edge


def _pairs(values: Array, axis: int) -> tuple[Array, Array]:
    length = values.shape[axis]
    return (
        jax.lax.slice_in_dim(values, 0, length - 1, axis=axis),
        jax.lax.slice_in_dim(values, 1, length, axis=axis),
    )


def _slice(values: Array, axis: int, index: int) -> Array:
    return jax.lax.slice_in_dim(values, index, index + 1, axis=axis)


def _warp_pair(
    image: Array, surfels: tuple[Array, Array, Array], source: Camera, target: Camera,
    footprint: int, threshold: float, longest: float,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """One source into one target, flat over N target pixels.

    Returns colour [N, 3], depth [N] (infinity where nothing lands), known [N] bool, magnification
    [N] (target area of a source pixel).
    """
    inverse, slope, edge = (part.reshape(-1, *part.shape[2:]) for part in surfels)
    height, width = target.height, target.width
    pixels = jnp.asarray(pixel_grid(source.height, source.width).reshape(-1, 2))
    a, b = relative_projection(source, target)
    q = pixels @ a[:, :2].T + a[:, 2] + inverse[:, None] * b  # [n, 3]
    q_slope = a[:, :2] + slope[:, None, :] * b[:, None]  # [n, 3, 2]: dq/dδ
    ahead = (inverse > 0) & (q[:, 2] > 1e-6)
    centre = q[:, :2] / jnp.where(ahead, q[:, 2], 1.0)[:, None]
    start = jnp.floor(centre - 0.5 * (footprint - 1))
    start = jnp.clip(start, -footprint, jnp.array([width, height]))  # integers stay small

    index, z = [], []
    for row in range(footprint):
        for column in range(footprint):
            corner = start + jnp.array([column, row], jnp.float32)
            delta, landed = _solve(q, q_slope, corner + 0.5)
            x, y = corner[:, 0].astype(jnp.int32), corner[:, 1].astype(jnp.int32)
            hit = (jnp.abs(delta).max(-1) <= _HALF) & ahead & (landed > 1e-6)
            hit &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
            here = inverse + jnp.sum(slope * delta, -1)
            hit &= here > 0
            index.append(jnp.where(hit, y * width + x, width * height))
            z.append(jnp.where(hit, landed / jnp.where(hit, here, 1.0), jnp.inf))
    index, z = jnp.stack(index), jnp.stack(z)  # [footprint², n]
    nearest = jnp.full(width * height + 1, jnp.inf).at[index].min(z)
    wins = (z <= nearest[index]) & jnp.isfinite(z)
    count = pixels.shape[0]
    number = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), z.shape)
    winner = jnp.full(width * height + 1, count, jnp.int32)
    winner = winner.at[jnp.where(wins, index, width * height)].min(number)[:-1]
    nearest = nearest[:-1]

    covered = winner < count
    winner = jnp.minimum(winner, count - 1)
    target_pixels = jnp.asarray(pixel_grid(height, width).reshape(-1, 2))
    delta, _ = _solve(q[winner], q_slope[winner], target_pixels)
    delta = jnp.where((jnp.abs(delta) < _SNAP) | ~covered[:, None], 0.0, delta)
    area, stretch = _magnification(q[winner], q_slope[winner])
    colour = _interpolate(image, inverse, slope, edge, winner, delta, threshold)
    known = covered & ~edge[winner] & (area > 0) & (stretch <= longest)
    return colour, jnp.where(covered, nearest, jnp.inf), known, area


def _solve(q: Array, q_slope: Array, at: Array) -> tuple[Array, Array]:
    """The δ [n, 2] that lands on target position `at` [n, 2], and q₂ there (depth · inverse)."""
    m = q_slope[:, :2] - at[:, :, None] * q_slope[:, 2:]  # [n, 2, 2]
    r = at * q[:, 2:] - q[:, :2]
    determinant = m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]
    safe = jnp.where(jnp.abs(determinant) < 1e-12, 1e-12, determinant)
    dx = (r[:, 0] * m[:, 1, 1] - m[:, 0, 1] * r[:, 1]) / safe
    dy = (m[:, 0, 0] * r[:, 1] - r[:, 0] * m[:, 1, 0]) / safe
    return jnp.stack([dx, dy], -1), q[:, 2] + q_slope[:, 2, 0] * dx + q_slope[:, 2, 1] * dy


def _magnification(q: Array, q_slope: Array) -> tuple[Array, Array]:
    """Target area [n] of a source pixel, negative = seen from behind, and its longest extent."""
    depth = jnp.where(jnp.abs(q[:, 2]) < 1e-6, 1e-6, q[:, 2])
    j = (q_slope[:, :2] - (q[:, :2] / depth[:, None])[:, :, None] * q_slope[:, 2:]) / depth[
        :, None, None
    ]
    area = j[:, 0, 0] * j[:, 1, 1] - j[:, 0, 1] * j[:, 1, 0]
    # the larger singular value of j, from the sum of their squares and their product
    squares = jnp.square(j).sum((1, 2))
    root = jnp.sqrt(jnp.maximum(jnp.square(squares) - 4 * jnp.square(area), 0.0))
    return area, jnp.sqrt((squares + root) / 2)


def _interpolate(
    image: Array, inverse: Array, slope: Array, edge: Array, winner: Array, delta: Array,
    threshold: float,
) -> Array:  # fmt: skip
    """Colour [N, 3] at `winner`'s pixel + δ, from neighbours on the same surface only.

    Cubic (Catmull-Rom: 0.9 dB better than bilinear on textures) where all 16 neighbours are clean,
    else bilinear among the clean ones of the inner four. The winner itself is always one of them.
    """
    height, width, channels = image.shape
    # one table, so that a neighbour costs one gather: colour, inverse depth, clean
    clean = (inverse > 0) & ~edge
    table = jnp.concatenate(
        [image.reshape(-1, channels), inverse[:, None], clean[:, None].astype(jnp.float32)], -1
    )
    row, column = winner // width, winner % width
    base = jnp.where(delta < 0, -1, 0)
    fraction = delta - base
    cubic_x, cubic_y = _catmull_rom(fraction[:, 0]), _catmull_rom(fraction[:, 1])
    here, tilt = inverse[winner], slope[winner]
    cubic, linear, weights, all_clean = 0.0, 0.0, 0.0, True
    for j in range(4):
        for i in range(4):
            dx, dy = base[:, 0] + i - 1, base[:, 1] + j - 1
            x, y = column + dx, row + dy
            tap = table[jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)]
            expected = here + tilt[:, 0] * dx + tilt[:, 1] * dy
            usable = jnp.abs(tap[:, -2] - expected) <= threshold * here
            usable &= (x >= 0) & (x < width) & (y >= 0) & (y < height) & (tap[:, -1] > 0)
            itself = (dx == 0) & (dy == 0)
            all_clean &= usable | itself
            cubic += (cubic_x[i] * cubic_y[j])[:, None] * tap[:, :channels]
            if i in (1, 2) and j in (1, 2):
                part_x = fraction[:, 0] if i == 2 else 1 - fraction[:, 0]
                part_y = fraction[:, 1] if j == 2 else 1 - fraction[:, 1]
                weight = jnp.where(usable | itself, part_x * part_y, 0.0)
                linear += weight[:, None] * tap[:, :channels]
                weights += weight
    colour = jnp.where(all_clean[:, None], cubic, linear / weights[:, None])
    return jnp.clip(colour, image.min(), image.max())  # cubic weights overshoot at contrasts


def _catmull_rom(f: Array) -> tuple[Array, Array, Array, Array]:
    """Weights of the samples at −1, 0, 1, 2 for a position f in [0, 1)."""
    return (
        0.5 * f * (f * (2 - f) - 1),
        0.5 * (f * f * (3 * f - 5) + 2),
        0.5 * f * (f * (4 - 3 * f) + 1),
        0.5 * f * f * (f - 1),
    )


def _merge(
    colour: Array, depth: Array, known: Array, area: Array, tolerance: float = 0.02
) -> tuple[Array, Array, Array]:
    """Layers [S, N] of the sources → one view: the nearest surface, from its largest picture.

    A source that only knows something farther than what another source knows to stand there, even
    if that one cannot colour it, has no say.
    """
    nearest = depth.min(0)
    eligible = known & (depth <= nearest * (1 + tolerance))
    # a small target area per source pixel means that the source shows the surface larger
    best = jnp.argmin(jnp.where(eligible, area, jnp.inf), 0)
    any_known = eligible.any(0)
    pick = functools.partial(jnp.take_along_axis, axis=0)
    picked = pick(colour, best[None, :, None])[0]
    z = pick(depth, best[None])[0]
    return (
        jnp.where(any_known[:, None], picked, 0.0),
        jnp.where(any_known, z, 0.0),
        any_known.astype(jnp.float32),
    )
