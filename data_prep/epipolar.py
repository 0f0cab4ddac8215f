"""Robust two-view geometry: homographies and fundamental matrices, and the errors under them.

Points are [.., 2] (x, y) pixels. Fits are MAGSAC of OpenCV with a seed: the same points and seed
give the same matrix. A fit that fails gives None, under which every error is infinite.
"""

from __future__ import annotations

import numpy as np


def fit_homography(
    a: np.ndarray, b: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Robust b ~ H a, points [N, 2] → (H [3, 3] float64 or None, inliers [N] bool)."""
    import cv2

    if len(a) < 4:
        return None, np.zeros(len(a), bool)
    matrix, mask = cv2.findHomography(a, b, _usac(threshold, seed))
    if matrix is None:
        return None, np.zeros(len(a), bool)
    return matrix, mask[:, 0] > 0


def fit_fundamental(
    a: np.ndarray, b: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Robust F with bᵀ F a = 0, points [N, 2] → (F [3, 3] float64 or None, inliers [N] bool)."""
    import cv2

    if len(a) < 8:
        return None, np.zeros(len(a), bool)
    matrix, mask = cv2.findFundamentalMat(a, b, _usac(threshold, seed))
    if matrix is None or matrix.shape != (3, 3):
        return None, np.zeros(len(a), bool)
    return matrix, mask[:, 0] > 0


def transfer(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """H applied to points [.., 2] → [.., 2] float64."""
    moved = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved[..., :2] / np.where(np.abs(moved[..., 2:]) < 1e-9, 1e-9, moved[..., 2:])


def homography_error(matrix: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Transfer error |H a − b| in pixels; infinite without a matrix. a, b: [.., 2] → [..]."""
    if matrix is None:
        return np.full(a.shape[:-1], np.inf)
    return np.linalg.norm(transfer(matrix, a) - b, axis=-1)


def sampson_error(matrix: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sampson distance in pixels (first-order distance to the epipolar constraint). [.., 2] → [..].

    The square root of (bᵀFa)² / (|Fa|₁₂² + |Fᵀb|₁₂²), so it has the unit of the points.
    """
    if matrix is None:
        return np.full(a.shape[:-1], np.inf)
    line_b = a.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]  # F a
    line_a = b.astype(np.float64) @ matrix[:2] + matrix[2]  # Fᵀ b
    residual = line_b[..., 0] * b[..., 0] + line_b[..., 1] * b[..., 1] + line_b[..., 2]
    norm = (line_b[..., :2] ** 2).sum(-1) + (line_a[..., :2] ** 2).sum(-1)
    return np.abs(residual) / np.sqrt(np.maximum(norm, 1e-18))


def _usac(threshold: float, seed: int):
    import cv2

    parameters = cv2.UsacParams()
    parameters.threshold = threshold
    parameters.confidence = 0.999
    parameters.maxIterations = 2000
    parameters.randomGeneratorState = seed & 0x7FFFFFFF
    parameters.isParallel = False
    parameters.sampler = cv2.SAMPLING_UNIFORM
    parameters.score = cv2.SCORE_METHOD_MAGSAC
    parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    parameters.final_polisher = cv2.MAGSAC
    parameters.final_polisher_iterations = 3
    return parameters
