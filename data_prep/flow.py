"""Dense optical flow between two frames, with the pixels where forward and backward flow agree.

A backend is a function of two uint8 RGB frames [H, W, 3] → flow: OpenCV's DIS, the default, needs
no weights; RAFT in JAX (data_prep.raft) reads converted ones. Flow is [H, W, 2] float32 pixels:
pixel p of the first frame moves to p + flow(p).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from see3d_jax.errors import InputError

FlowBackend = Callable[[np.ndarray, np.ndarray], np.ndarray]
RAFT_LONG_SIDE = 512  # px; the official filter takes 768
RAFT_ITERATIONS = 12  # the official filter takes 20; the flow hardly moves after 12


@dataclasses.dataclass(frozen=True)
class FlowPair:
    """Flow from a first to a second frame.

    Attributes:
      forward: [H, W, 2] float32 pixels.
      consistent: [H, W] bool; following the flow there and back returns to the start. False at
        occlusions and where the flow is guesswork.
      visible: [H, W] bool; the target lies inside the second frame.
    """

    forward: np.ndarray
    consistent: np.ndarray
    visible: np.ndarray


def dis_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """OpenCV DIS (medium preset) on the luminance of uint8 RGB frames."""
    import cv2

    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grays, None)


@functools.cache
def make_flow_backend(name: str) -> FlowBackend:
    """`dis`, or a RAFT file of tools.convert_raft → backend; InputError for anything else."""
    if name == "dis":
        return dis_flow
    if not name.endswith(".safetensors"):
        raise InputError(
            f"--flow: expected dis or a .safetensors of tools.convert_raft, got {name}"
        )
    from data_prep.raft import make_flow

    return make_flow(Path(name), RAFT_LONG_SIDE, RAFT_ITERATIONS)


def flow_pair(
    first: np.ndarray, second: np.ndarray, scale: float, backend: FlowBackend = dis_flow
) -> FlowPair:
    """Forward flow and its check against the backward flow; `scale` = pixels per px at 480p.

    The tolerance is 1 px at 480p plus 5 % of the motion, since flow errors grow with motion.
    """
    import cv2

    forward, backward = backend(first, second), backend(second, first)
    height, width = first.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    to_x, to_y = x + forward[..., 0], y + forward[..., 1]
    back = cv2.remap(backward, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    visible = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    loop = np.linalg.norm(forward + back, axis=-1)
    tolerance = max(0.5, scale) + 0.05 * np.linalg.norm(forward, axis=-1)
    return FlowPair(forward, visible & (loop < tolerance), visible)
