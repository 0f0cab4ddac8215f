"""Depth of posed photos without any learned weights: plane sweep, cost aggregation, consistency.

For each view, planes of equal steps of inverse depth are swept through space. A plane's homography
brings the other views onto this one, and windows are compared by normalised cross-correlation,
which does not mind exposure. The best half of the views counts, for the rest may be occluded.
Semi-global aggregation along four directions fills in where texture is weak; a parabola gives
fractions of a plane. What no other view's depth confirms is unknown, and so are specks.
Cameras: OpenCV axes, world→camera, pixel centres at +0.5, planar depth, 0 = unknown.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import Camera, pixel_grid, project, relative_projection, unproject

Array = jax.Array
_WINDOW = 5  # pixels, of the cross-correlation
_STEP, _JUMP = 0.02, 0.2  # penalties of one plane and of any other change; costs are 0 to 1
_MAX_SOURCES = 4
_NEAREST = 3.0  # image widths: the largest disparity (against infinity) that is tried
_MAX_PLANES = 256
_AGREE = 0.03  # relative difference of depths that confirm each other


def stereo_depth(
    images: np.ndarray, cameras: Camera, planes: int | None = None,
    ranges: Sequence[tuple[float, float] | None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Depth of V ≥ 2 posed views of one size.

    Args:
      images: [V, h, w, 3] float in [0, 1]; cameras: batch [V].
      planes: how many depths are tried; by default one per pixel of disparity, 64 to 256.
      ranges: per view (nearest, farthest) planar depth; None: what another view can see of it, as
        far as a pixel of disparity reaches.

    Returns [V, h, w] float32, 0 where no other view confirms the depth. Views that look elsewhere
    than all others (more than 60° away) come out all 0. Raises ValueError for shapes that do not
    fit or an empty range.
    """
    count = len(images)
    if count < 2 or images.shape != (count, cameras.height, cameras.width, 3):
        raise ValueError(
            f"stereo_depth: expected images [V ≥ 2, {cameras.height}, {cameras.width}, 3], "
            f"got {images.shape}"
        )
    grey = jnp.asarray(np.asarray(images, np.float32).mean(-1))
    sources = choose_sources(cameras)
    usable = [view for view in range(count) if sources[view]]
    swept = {
        view: sweep_range(cameras, view, sources[view], ranges and ranges[view]) for view in usable
    }
    # one number of sources and planes for all views means one compiled program; a repeated source
    # changes nothing
    most = max((len(chosen) for chosen in sources), default=0)
    planes = planes or max((_planes(swept[view]) for view in usable), default=0)
    depths = [jnp.zeros(grey.shape[1:])] * count
    for view in usable:
        chosen = np.resize(sources[view], most)
        inverse = jnp.linspace(swept[view].low, swept[view].high, planes)
        depths[view] = _sweep(grey[view], grey[chosen], cameras[view], cameras[chosen], inverse)
    confirmed = _confirmed(jnp.stack(depths), cameras)
    return np.asarray(_tidied(confirmed))


def choose_sources(cameras: Camera) -> list[list[int]]:
    """For each view the nearest others, by centre, that look within 60° of its direction."""
    eyes = np.asarray(cameras.position)
    ahead = np.asarray(cameras.world_to_camera)[:, 2, :3]
    chosen = []
    for view in range(len(eyes)):
        distance = np.linalg.norm(eyes - eyes[view], axis=-1)
        usable = (ahead @ ahead[view] > 0.5) & (distance > 1e-6 * max(1e-6, distance.max()))
        order = np.argsort(distance, kind="stable")
        chosen.append([int(i) for i in order if i != view and usable[i]][:_MAX_SOURCES])
    return chosen


@dataclasses.dataclass(frozen=True)
class SweepRange:
    """Inverse depths to sweep, and how many pixels of disparity one unit of them is."""

    low: float
    high: float
    disparity: float


def sweep_range(
    cameras: Camera, view: int, sources: list[int], given: tuple[float, float] | None = None
) -> SweepRange:
    """The range to sweep for one view: as `given` (nearest, farthest), or what its sources can see.

    Of cameras side by side, what they can see begins where disparity reaches half a picture; of
    cameras that turn towards a point, it begins well before that point, wherever that is.
    Raises ValueError when the given range is empty.
    """
    eyes = np.asarray(cameras.position)
    baseline = np.median(np.linalg.norm(eyes[sources] - eyes[view], axis=-1))
    disparity = float(baseline * np.asarray(cameras.intrinsics)[view, 0, 0])  # at depth 1
    if given is not None:
        near, far = given
        if not 0 < near < far:
            raise ValueError(f"stereo_depth: near {near:.4g} must be less than far {far:.4g}")
        return SweepRange(1 / far, 1 / near, disparity)
    width, height = cameras.width, cameras.height
    grid = np.stack(np.meshgrid(np.linspace(0.1, 0.9, 9), np.linspace(0.1, 0.9, 7)), -1)
    pixels = grid.reshape(-1, 2) * [width, height]
    inverse = np.geomspace(1 / disparity, _NEAREST * width / disparity, 100)
    seen = np.zeros(len(inverse))
    for source in sources:
        a, b = (np.asarray(v) for v in relative_projection(cameras[view], cameras[source]))
        ray = np.concatenate([pixels, np.ones_like(pixels[:, :1])], -1) @ a.T
        q = ray + inverse[:, None, None] * b
        at = q[..., :2] / np.maximum(q[..., 2:], 1e-9)
        inside = (q[..., 2] > 1e-9) & (at > 0).all(-1) & (at < [width, height]).all(-1)
        seen += inside.mean(-1)
    enough = np.nonzero(seen >= 0.5 * seen.max())[0]
    return SweepRange(1 / disparity, float(inverse[enough[-1]]), disparity)


def _planes(swept: SweepRange) -> int:
    """One per pixel of disparity, in steps of 32, so that few programs are compiled."""
    pixels = (swept.high - swept.low) * swept.disparity
    return int(np.clip(32 * np.ceil(pixels / 32), 64, _MAX_PLANES))


@jax.jit
def _sweep(view: Array, others: Array, camera: Camera, cameras: Camera, inverse: Array) -> Array:
    """Depth [h, w] of one view from S others, by planes of inverse depth [D]."""
    height, width = view.shape
    a, b = jax.vmap(functools.partial(relative_projection, camera))(cameras)
    grid = jnp.asarray(pixel_grid(height, width))
    homogeneous = jnp.concatenate([grid, jnp.ones_like(grid[..., :1])], -1)
    rays = jnp.einsum("sij,hwj->shwi", a, homogeneous, precision="highest")
    mean, spread = _statistics(view)

    def cost_of(plane: Array) -> Array:
        def one(image: Array, ray: Array, shift: Array) -> Array:
            q = ray + plane * shift
            ahead = q[..., 2] > 1e-6
            at = q[..., :2] / jnp.where(ahead, q[..., 2], 1.0)[..., None]
            inside = ahead & (at > 0.5).all(-1)
            inside &= (at[..., 0] < width - 0.5) & (at[..., 1] < height - 0.5)
            other = _bilinear(image, at)
            other_mean, other_spread = _statistics(other)
            both = _box(view * other) - mean * other_mean
            likeness = both / jnp.sqrt(spread * other_spread)
            return jnp.where(inside, 0.5 * (1 - jnp.clip(likeness, -1, 1)), 0.6)

        costs = jnp.sort(jax.vmap(one)(others, rays, b), axis=0)
        return costs[: (len(others) + 1) // 2].mean(0)

    volume = jnp.moveaxis(jax.lax.map(cost_of, inverse), 0, -1)  # [h, w, D]
    volume = _aggregate(volume, view)
    best = jnp.clip(jnp.argmin(volume, -1), 1, len(inverse) - 2)
    left, middle, right = (
        jnp.take_along_axis(volume, best[..., None] + i, -1)[..., 0] for i in (-1, 0, 1)
    )
    curvature = left + right - 2 * middle
    part = jnp.where(curvature > 1e-9, 0.5 * (left - right) / jnp.maximum(curvature, 1e-9), 0.0)
    step = inverse[1] - inverse[0]
    return 1 / (inverse[0] + (best + jnp.clip(part, -0.5, 0.5)) * step)


def _box(values: Array) -> Array:
    """Mean over the window, borders repeated."""
    half = _WINDOW // 2
    for axis in (0, 1):
        pad = [(half, half) if i == axis else (0, 0) for i in (0, 1)]
        padded = jnp.pad(values, pad, mode="edge")
        length = values.shape[axis]
        parts = [jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(_WINDOW)]
        values = sum(parts) / _WINDOW
    return values


def _statistics(values: Array) -> tuple[Array, Array]:
    mean = _box(values)
    return mean, jnp.maximum(_box(values**2) - mean**2, 0.0) + 1e-5


def _bilinear(image: Array, at: Array) -> Array:
    """image [h, w] sampled at pixel positions [..., 2], borders repeated."""
    height, width = image.shape
    x = jnp.clip(at[..., 0] - 0.5, 0, width - 1.001)
    y = jnp.clip(at[..., 1] - 0.5, 0, height - 1.001)
    column, row = x.astype(jnp.int32), y.astype(jnp.int32)
    fx, fy = x - column, y - row
    flat, index = image.reshape(-1), row * width + column
    top = flat[index] * (1 - fx) + flat[index + 1] * fx
    bottom = flat[index + width] * (1 - fx) + flat[index + width + 1] * fx
    return top * (1 - fy) + bottom * fy


def _aggregate(volume: Array, image: Array) -> Array:
    """Semi-global aggregation of costs [h, w, D] along rows and columns, both ways.

    A jump costs less across an edge of the image, where depth edges tend to be.
    """
    total = jnp.zeros_like(volume)
    for axis in (0, 1):
        costs, lines = jnp.moveaxis(volume, axis, 0), jnp.moveaxis(image, axis, 0)
        change = jnp.abs(jnp.diff(lines, axis=0, prepend=lines[:1]))
        for reverse in (False, True):
            # walking backwards, the step into a line is the change to the line after it
            step = jnp.roll(change, -1, 0) if reverse else change
            jump = jnp.maximum(_JUMP / (1 + 20 * step), 2 * _STEP)
            _, along = jax.lax.scan(_advance, costs[-1 if reverse else 0] * 0, (costs, jump),
                                    reverse=reverse)  # fmt: skip
            total = total + jnp.moveaxis(along, 0, axis)
    return total


def _advance(before: Array, line: tuple[Array, Array]) -> tuple[Array, Array]:
    """One step of the aggregation: path costs [n, D] of one line → of the next."""
    costs, jump = line
    least = before.min(-1, keepdims=True)
    up = jnp.pad(before[:, 1:], ((0, 0), (0, 1)), constant_values=jnp.inf)
    down = jnp.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)
    way = jnp.minimum(before, jnp.minimum(up, down) + _STEP)
    way = jnp.minimum(way, least + jump[:, None])
    after = costs + way - least
    return after, after


@jax.jit
def _confirmed(depths: Array, cameras: Camera) -> Array:
    """Depths [V, h, w], 0 where no other view's depth agrees with the point they stand for."""
    count, height, width = depths.shape
    grid = jnp.asarray(pixel_grid(height, width)).reshape(-1, 2)

    def confirm(view: int) -> Array:
        own = depths[view].reshape(-1)
        points = unproject(cameras[view], grid, own)
        agree = jnp.zeros(own.shape, bool)
        for other in range(count):
            if other == view:
                continue
            at, z = project(cameras[other], points)
            inside = (z > 0) & (at > 0).all(-1) & (at[:, 0] < width) & (at[:, 1] < height)
            column, row = jnp.where(inside[:, None], at, 0).astype(jnp.int32).T
            seen = depths[other, row, column]
            agree |= inside & (jnp.abs(seen - z) < _AGREE * z)
        return jnp.where(agree & (own > 0), own, 0.0).reshape(height, width)

    return jnp.stack([confirm(view) for view in range(count)])


@jax.jit
@jax.vmap
def _tidied(depth: Array) -> Array:
    """Depth [h, w] without specks that were confirmed by chance, and with pinholes filled.

    A pixel stays when a third of its neighbourhood has much the same depth. An unknown pixel gets
    the mean of its neighbours when most of them are known and agree.
    """

    def around(values: Array, radius: int) -> Array:  # [n, h, w]
        padded = jnp.pad(values, radius)
        steps = range(2 * radius + 1)
        height, width = values.shape
        return jnp.stack([padded[i : i + height, j : j + width] for i in steps for j in steps])

    near = around(depth, 3)
    same = ((near > 0) & (jnp.abs(near - depth) < _AGREE * depth)).mean(0)
    depth = jnp.where(same > 1 / 3, depth, 0.0)
    near = around(depth, 2)
    known = near > 0
    mean = near.sum(0) / jnp.maximum(known.sum(0), 1)
    agree = known & (jnp.abs(near - mean) < _AGREE * mean)
    fill = (depth == 0) & (agree.mean(0) > 0.5) & (agree.sum(0) == known.sum(0))
    return jnp.where(fill, mean, depth)
