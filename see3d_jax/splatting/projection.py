"""3D Gaussians → 2D Gaussians in the image (EWA splatting, Zwicker et al. 2001; 3DGS Sec. 4).

Differentiable in every Gaussian parameter and in the camera's pose and intrinsics. All per-
Gaussian maths runs on arrays with N as the last axis, because thousands of 3×3 products are slow
on every backend while a few fused loops over N are not.

The 2D falloff is stored as a Cholesky factor: with d = pixel − mean,
  alpha(pixel) = opacity · exp(−½ (z1² + z2²)),  z1 = l11·dx + l21·dy,  z2 = l22·dy.
It stays accurate for long thin Gaussians, where the usual inverse covariance cancels.

Anti-aliased (Mip-Splatting, Yu et al. 2024, Eq. 9): the blur that keeps a Gaussian a pixel wide
also makes it cover more than it should; its opacity is lowered by √(det Σ / det (Σ + blur)), so
that the light it sends stays the same however small it is seen.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.gaussians import SH_C0, Gaussians

# Below this alpha an 8-bit image cannot change: the support of a Gaussian ends there.
MIN_ALPHA = 1.0 / 255.0
# Added to the 2D covariance, pixels²: a Gaussian never gets thinner than about a pixel.
BLUR = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """N Gaussians in one image; `extents` is 0 where nothing is to be drawn.

    Attributes:
      means: [2, N] x, y in pixels (centres at +0.5).
      cholesky: [3, N] l11, l21, l22 in 1/pixels (see the module docstring).
      opacities: [N] in [0, 1]; of the 2D Gaussian, so already lowered when anti-aliased.
      colors: [3, N] RGB ≥ 0.
      depths: [N] planar z of the centre.
      extents: [2, N] half width and height, in pixels, of the region where alpha ≥ 1/255.
    """

    means: jax.Array
    cholesky: jax.Array
    opacities: jax.Array
    colors: jax.Array
    depths: jax.Array
    extents: jax.Array


def project_gaussians(
    gaussians: Gaussians, camera: Camera, near: float = 0.01, antialiased: bool = False
) -> Projected:
    """Projects N Gaussians into one camera; those nearer than `near` (scene units) are dropped.

    `antialiased` (static): see the module docstring. Draw a scene the way it was fitted.
    """
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    fx, fy = camera.intrinsics[0, 0], camera.intrinsics[1, 1]
    cx, cy = camera.intrinsics[0, 2], camera.intrinsics[1, 2]

    points = gaussians.means.T
    x, y, depth = (_dot(row[:, None], points) + t for row, t in zip(rotation, translation))
    in_front = depth > near
    # The double where keeps NaN out of the gradient of points at or behind the camera.
    z = jnp.where(in_front, depth, 1.0)
    slope_x, slope_y = x / z, y / z
    means = jnp.stack([fx * slope_x + cx, fy * slope_y + cy])

    # Rows of J·W·R·S (2×3): the covariance is this matrix times its transpose. The linearisation
    # is taken no further out than 15 % beyond the image, where it would blow up.
    margin_x, margin_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy
    bent_x = jnp.clip(slope_x, -cx / fx - margin_x, (camera.width - cx) / fx + margin_x)
    bent_y = jnp.clip(slope_y, -cy / fy - margin_y, (camera.height - cy) / fy + margin_y)
    axes = rotation_columns(gaussians.quaternions) * jnp.exp(gaussians.log_scales).T  # [3, 3, N]
    axes = [_dot(row[:, None, None], axes) for row in rotation]  # each [3, N]
    u = (fx / z) * (axes[0] - bent_x * axes[2])
    v = (fy / z) * (axes[1] - bent_y * axes[2])
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    # det(A Aᵀ) = |u × v|²: a sum of squares, where uu·vv − uv² would cancel.
    cross = [u[i] * v[j] - u[j] * v[i] for i, j in ((1, 2), (2, 0), (0, 1))]
    sharp = sum(c * c for c in cross)
    determinant = sharp + BLUR * (uu + vv) + BLUR * BLUR
    uu, vv = uu + BLUR, vv + BLUR
    l11 = jnp.sqrt(vv / determinant)
    cholesky = jnp.stack([l11, -uv / vv * l11, 1.0 / jnp.sqrt(vv)])

    opacities = jax.nn.sigmoid(gaussians.opacity_logits)
    if antialiased:
        # The root is that of a sum of squares: cut off where its gradient would be 0 / 0.
        opacities *= jnp.sqrt(jnp.maximum(sharp, 1e-20) / determinant)
    # alpha ≥ MIN_ALPHA ⇔ z1² + z2² ≤ reach, so fainter Gaussians cover fewer pixels.
    reach = 2.0 * jnp.log(jnp.maximum(opacities / MIN_ALPHA, 1.0))
    extents = jnp.sqrt(reach * jax.lax.stop_gradient(jnp.stack([uu, vv])))
    size = jnp.array([camera.width, camera.height], means.dtype)[:, None]
    drawn = in_front & (opacities > MIN_ALPHA)
    drawn &= ((means + extents > 0) & (means - extents < size)).all(0)
    extents = jax.lax.stop_gradient(jnp.where(drawn, extents, 0.0))

    position = -_dot(rotation, translation[:, None])
    return Projected(
        means=means,
        cholesky=cholesky,
        opacities=opacities,
        colors=sh_colors(gaussians.sh, gaussians.means.T - position[:, None]),
        depths=depth,
        extents=extents,
    )


def normals_towards_camera(gaussians: Gaussians, camera: Camera) -> jax.Array:
    """[3, N] unit normals, camera axes: each Gaussian's shortest axis, on the side that is seen.

    Differentiable in the quaternions and the pose (which axis is shortest is not).
    """
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    shortest = jax.nn.one_hot(jnp.argmin(gaussians.log_scales, 1), 3, axis=0)  # [3, N]
    in_world = (rotation_columns(gaussians.quaternions) * shortest).sum(1)
    normal = jnp.stack([_dot(row[:, None], in_world) for row in rotation])
    centre = [_dot(r[:, None], gaussians.means.T) + t for r, t in zip(rotation, translation)]
    return jnp.where(_dot(normal, centre) > 0, -normal, normal)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over the leading axis of three: one loop over N, where XLA's reductions are slow."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rotation_columns(quaternions: jax.Array) -> jax.Array:
    """wxyz [N, 4], any length → rotation matrices [3, 3, N] (row, column, Gaussian)."""
    w, x, y, z = quaternions.T
    squared = jnp.maximum(w * w + x * x + y * y + z * z, 1e-24)
    w, x, y, z = quaternions.T / jnp.sqrt(squared)
    return jnp.stack(
        [
            jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]),
            jnp.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]),
            jnp.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]),
        ]
    )


def sh_colors(sh: jax.Array, directions: jax.Array) -> jax.Array:
    """Colour seen along directions from the camera: sh [N, K, 3], directions [3, N] → [3, N] ≥ 0.

    Real spherical harmonics in the order and with the signs of 3DGS files (Condon–Shortley
    phase: degree 1 is −y, z, −x).
    """
    number = sh.shape[1]
    basis = [jnp.full(sh.shape[0], SH_C0, sh.dtype)]
    if number > 1:
        squared = _dot(directions, directions)
        x, y, z = directions / jnp.sqrt(jnp.maximum(squared, 1e-24))
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if number > 4:
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if number > 9:
        basis += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return jnp.maximum(_weighted(jnp.stack(basis), sh) + 0.5, 0.0)


@jax.custom_vjp
def _weighted(basis: jax.Array, sh: jax.Array) -> jax.Array:
    """Σ over k of basis [K, N] · sh [N, K, 3] → [3, N]."""
    return sum(row * sh[:, k].T for k, row in enumerate(basis))


# Autodiff would make K arrays of the size of sh, each of them zero but for one coefficient.
def _weighted_backward(residuals, gradient):  # noqa: ANN001
    basis, sh = residuals
    by_basis = sum(sh[:, :, c].T * gradient[c] for c in range(3))
    return by_basis, basis.T[:, :, None] * gradient.T[:, None]


_weighted.defvjp(lambda basis, sh: (_weighted(basis, sh), (basis, sh)), _weighted_backward)
