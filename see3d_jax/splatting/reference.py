"""The slow, obviously right renderer that the fast one is tested against.

Every Gaussian is evaluated at every pixel, in depth order, with textbook matrices (Σ = R S Sᵀ Rᵀ,
Σ' = J W Σ Wᵀ Jᵀ + 0.3 I, alpha = o·exp(−½ dᵀ Σ'⁻¹ d)); gradients are plain autodiff. It shares no
code with the fast path except spherical-harmonic constants' meaning, and runs in any float type,
so that finite differences can be taken in float64. Memory is N × H × W: use it for small images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.render import Rendering


def render_dense(
    gaussians: Gaussians,
    camera: Camera,
    background: jax.Array | float = 0.0,
    near: float = 0.01,
    antialiased: bool = False,
) -> Rendering:
    """Same arguments and result as `render.render` with normals; `pair_count` is 0."""
    dtype = gaussians.means.dtype
    world_to_camera = jnp.asarray(camera.world_to_camera, dtype)
    intrinsics = jnp.asarray(camera.intrinsics, dtype)
    mean2d, sharp, normals = jax.vmap(_project_one, (0, 0, 0, None, None, None, None))(
        gaussians.means,
        gaussians.log_scales,
        gaussians.quaternions,
        world_to_camera,
        intrinsics,
        camera.width,
        camera.height,
    )
    covariance = sharp + 0.3 * jnp.eye(2)
    depth = gaussians.means @ world_to_camera[2, :3] + world_to_camera[2, 3]
    colors = _colors(gaussians, world_to_camera)

    x = jnp.arange(camera.width, dtype=dtype) + 0.5
    y = jnp.arange(camera.height, dtype=dtype) + 0.5
    pixels = jnp.stack(jnp.meshgrid(x, y), -1)  # [H, W, 2]
    d = pixels[None] - mean2d[:, None, None]  # [N, H, W, 2]
    power = jnp.einsum("nhwi,nij,nhwj->nhw", d, jnp.linalg.inv(covariance), d, precision="highest")
    opacity = 1.0 / (1.0 + jnp.exp(-gaussians.opacity_logits))
    if antialiased:
        ratio = jnp.linalg.det(sharp) / jnp.linalg.det(covariance)
        opacity = opacity * jnp.sqrt(jnp.maximum(ratio, 1e-20))
    alpha = opacity[:, None, None] * jnp.exp(-0.5 * power)
    alpha = jnp.where(alpha < 1.0 / 255.0, 0.0, jnp.minimum(alpha, 0.99))
    alpha = jnp.where((depth > near)[:, None, None], alpha, 0.0)

    order = jnp.argsort(depth)
    alpha, colors, depth, normals = alpha[order], colors[order], depth[order], normals[order]
    transmittance = jnp.cumprod(1.0 - alpha, axis=0)
    before = jnp.concatenate([jnp.ones_like(transmittance[:1]), transmittance[:-1]])
    weight = alpha * before
    return Rendering(
        rgb=jnp.einsum("nhw,nc->hwc", weight, colors, precision="highest")
        + transmittance[-1][..., None] * background,
        depth=jnp.einsum("nhw,n->hw", weight, depth, precision="highest"),
        alpha=1.0 - transmittance[-1],
        pair_count=jnp.int32(0),
        normals=jnp.einsum("nhw,nc->hwc", weight, normals, precision="highest"),
    )


def _project_one(
    mean: jax.Array,
    log_scale: jax.Array,
    quaternion: jax.Array,
    world_to_camera: jax.Array,
    intrinsics: jax.Array,
    width: int,
    height: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One Gaussian → 2D mean [2], covariance [2, 2] before the blur (pixels), normal [3]."""
    w, x, y, z = quaternion / jnp.linalg.norm(quaternion)
    rotation = jnp.array(
        [
            [1 - 2 * y * y - 2 * z * z, 2 * x * y - 2 * w * z, 2 * x * z + 2 * w * y],
            [2 * x * y + 2 * w * z, 1 - 2 * x * x - 2 * z * z, 2 * y * z - 2 * w * x],
            [2 * x * z - 2 * w * y, 2 * y * z + 2 * w * x, 1 - 2 * x * x - 2 * y * y],
        ]
    )
    scaled = rotation @ jnp.diag(jnp.exp(log_scale))
    sigma = scaled @ scaled.T
    view = world_to_camera[:3, :3]
    tx, ty, tz = view @ mean + world_to_camera[:3, 3]
    tz = jnp.where(tz > 1e-6, tz, 1.0)  # behind the camera: not drawn anyway
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    # The Jacobian of the pinhole is taken at most 15 % of the image size outside the image.
    jx = tz * jnp.clip(tx / tz, (-0.15 * width - cx) / fx, (1.15 * width - cx) / fx)
    jy = tz * jnp.clip(ty / tz, (-0.15 * height - cy) / fy, (1.15 * height - cy) / fy)
    jacobian = jnp.array([[fx / tz, 0.0, -fx * jx / tz**2], [0.0, fy / tz, -fy * jy / tz**2]])
    covariance = jacobian @ view @ sigma @ view.T @ jacobian.T
    normal = view @ rotation[:, jnp.argmin(log_scale)]
    normal = normal * jnp.where(normal @ (view @ mean + world_to_camera[:3, 3]) > 0, -1.0, 1.0)
    return jnp.stack([fx * tx / tz + cx, fy * ty / tz + cy]), covariance, normal


def _colors(gaussians: Gaussians, world_to_camera: jax.Array) -> jax.Array:
    """[N, 3] colour towards the camera; harmonics from their definition, Y_lm with l ≤ 3."""
    position = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
    direction = gaussians.means - position
    squared = jnp.sum(direction**2, axis=-1, keepdims=True)
    x, y, z = (direction / jnp.sqrt(jnp.maximum(squared, 1e-24))).T  # 0 at the camera itself
    pi = jnp.pi
    one = jnp.ones_like(x)
    basis = [
        0.5 * (1 / pi) ** 0.5 * one,
        -((3 / (4 * pi)) ** 0.5) * y,
        (3 / (4 * pi)) ** 0.5 * z,
        -((3 / (4 * pi)) ** 0.5) * x,
        0.5 * (15 / pi) ** 0.5 * x * y,
        -0.5 * (15 / pi) ** 0.5 * y * z,
        0.25 * (5 / pi) ** 0.5 * (3 * z * z - 1),
        -0.5 * (15 / pi) ** 0.5 * x * z,
        0.25 * (15 / pi) ** 0.5 * (x * x - y * y),
        -0.25 * (35 / (2 * pi)) ** 0.5 * y * (3 * x * x - y * y),
        0.5 * (105 / pi) ** 0.5 * x * y * z,
        -0.25 * (21 / (2 * pi)) ** 0.5 * y * (5 * z * z - 1),
        0.25 * (7 / pi) ** 0.5 * z * (5 * z * z - 3),
        -0.25 * (21 / (2 * pi)) ** 0.5 * x * (5 * z * z - 1),
        0.25 * (105 / pi) ** 0.5 * z * (x * x - y * y),
        -0.25 * (35 / (2 * pi)) ** 0.5 * x * (x * x - 3 * y * y),
    ]
    basis = jnp.stack(basis[: gaussians.sh.shape[1]], -1)
    return jnp.maximum(jnp.einsum("nk,nkc->nc", basis, gaussians.sh, precision="highest") + 0.5, 0)
