"""The scene: a set of 3D Gaussians with view-dependent colour, as one frozen pytree.

Parameters are stored unconstrained, the way 3DGS files store them, so that an optimiser may move
them freely: log scales, opacity logits, quaternions of any length (wxyz, normalised on use),
spherical-harmonic coefficients of colour − 0.5. Positions are world coordinates (OpenCV axes for
cameras, any unit). A slot whose opacity logit is `EMPTY_LOGIT` holds no Gaussian: it is never
drawn and gets no gradient, which lets a scene grow inside fixed array sizes (no recompilation).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

# Spherical-harmonic normalisation of degree 0: colour = 0.5 + SH_C0 · sh[0].
SH_C0 = 0.28209479177387814
# sigmoid(−20) ≈ 2e−9, far below the 1/255 that can change a pixel.
EMPTY_LOGIT = -20.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians:
    """N Gaussians (float32 arrays; the first axis is N in each).

    Attributes:
      means: [N, 3] world positions.
      log_scales: [N, 3] natural log of the standard deviations along the local axes.
      quaternions: [N, 4] wxyz, local → world rotation, any positive length.
      opacity_logits: [N] opacity = sigmoid(logit).
      sh: [N, K, 3] colour coefficients, K = (degree + 1)², coefficient-major RGB.
    """

    means: Array
    log_scales: Array
    quaternions: Array
    opacity_logits: Array
    sh: Array

    @property
    def count(self) -> int:
        """Number of slots, empty ones included."""
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0–3."""
        return sh_degree_of(self.sh.shape[-2])


def sh_degree_of(coefficients: int) -> int:
    """Number of coefficients per channel (1, 4, 9, 16) → degree (0, 1, 2, 3)."""
    degree = {1: 0, 4: 1, 9: 2, 16: 3}.get(coefficients)
    if degree is None:
        raise ValueError(f"sh: expected 1, 4, 9 or 16 coefficients, got {coefficients}")
    return degree


def from_points(
    points: np.ndarray,
    colors: np.ndarray,
    capacity: int,
    sh_degree: int = 1,
    opacity: float = 0.1,
) -> Gaussians:
    """Round Gaussians at points, as wide as the gap to their neighbours.

    Args:
      points: [M, 3] world positions, M ≤ capacity.
      colors: [M, 3] RGB in [0, 1].
      capacity: number of slots N; the N − M slots after the points stay empty.
      sh_degree: 0–3; coefficients above degree 0 start at zero.
      opacity: starting opacity of every point.
    """
    number = len(points)
    if not 0 < number <= capacity:
        raise ValueError(f"points: expected 1..{capacity} (the capacity) points, got {number}")
    means = np.zeros((capacity, 3), np.float32)
    means[:number] = points
    log_scales = np.full((capacity, 3), -6.0, np.float32)
    log_scales[:number] = np.log(neighbour_distance(np.asarray(points, np.float64)))[:, None]
    quaternions = np.zeros((capacity, 4), np.float32)
    quaternions[:, 0] = 1.0
    logits = np.full(capacity, EMPTY_LOGIT, np.float32)
    logits[:number] = np.log(opacity / (1.0 - opacity))
    sh = np.zeros((capacity, (sh_degree + 1) ** 2, 3), np.float32)
    sh[:number, 0] = (np.asarray(colors, np.float64) - 0.5) / SH_C0
    return Gaussians(*map(jnp.asarray, (means, log_scales, quaternions, logits, sh)))


def neighbour_distance(points: np.ndarray, neighbours: int = 3) -> np.ndarray:
    """[M, 3] → [M] root mean squared distance to the nearest few points (> 0, outliers capped)."""
    from scipy.spatial import cKDTree

    if len(points) == 1:
        return np.full(1, 0.01)
    k = min(neighbours, len(points) - 1)
    distance, _ = cKDTree(points).query(points, k=k + 1)
    gap = np.sqrt(np.mean(distance[:, 1:] ** 2, axis=1))
    typical = max(float(np.median(gap)), 1e-6)
    return np.clip(gap, 0.01 * typical, 10.0 * typical)


def occupied(gaussians: Gaussians) -> Gaussians:
    """The same scene without its empty slots (NumPy arrays; the size depends on the data)."""
    keep = np.asarray(gaussians.opacity_logits) > EMPTY_LOGIT / 2
    return jax.tree.map(lambda leaf: np.asarray(leaf)[keep], gaussians)
