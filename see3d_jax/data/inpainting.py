"""Filling holes without a model: the baseline that a trained one has to beat."""

from __future__ import annotations

import cv2
import numpy as np


def inpaint(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fills the holes of every image with OpenCV's Telea method.

    Args:
      images: [N, h, w, 3] float in [0, 1].
      known: [N, h, w] bool, False = hole. An image without a known pixel becomes grey.

    Returns:
      Like `images`, in steps of 1/255.
    """
    filled = np.empty(images.shape, np.float32)
    for out, image, seen in zip(filled, images, known, strict=True):
        pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
        holes = np.where(seen, 0, 255).astype(np.uint8)
        out[:] = cv2.inpaint(pixels, holes, 3, cv2.INPAINT_TELEA) if seen.any() else 127
        out /= 255
    return filled
