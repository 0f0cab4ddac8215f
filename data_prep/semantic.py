"""Stage 2, semantic dynamic recognition: clips that show people or animals most of the time.

A detector is a function frame [H, W, 3] uint8 RGB → detections of classes that may move. The
default is a network in a package that data_prep.install_detector installs; where it is not
installed, what OpenCV brings: HOG pedestrians and frontal faces, at thresholds where buildings and
foliage rarely fire. Those miss seated people from behind, small people and animals; the ones that
move are left to the dynamic stage, the ones that stand still pass. Networks are in
data_prep.detectors and data_prep.onnx_detectors.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

import numpy as np

from data_prep.install_detector import COMMAND, package_path
from see3d_jax.errors import InputError

HOG_THRESHOLD = 1.5  # SVM margin; façades and trees reach 1.4
FACE_NEIGHBOURS = 5
FACE_SIDE = 36  # px at 480p


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object of a class that may move by itself.

    Attributes:
      label: class name.
      score: the detector's own score (comparable within a detector and class only).
      box: (x, y, width, height) in pixels.
    """

    label: str
    score: float
    box: tuple[int, int, int, int]


Detector = Callable[[np.ndarray], list[Detection]]


def settled(name: str) -> str:
    """`auto` → the detector that it means on this machine; any other name as it is."""
    if name != "auto":
        return name
    return "objectron" if package_path().is_file() else "opencv"


def make_detector(name: str) -> Detector:
    """`auto`, `objectron`, `opencv`, `off` or an .onnx file → detector."""
    name = settled(name)
    if name == "opencv":
        return detect_people
    if name == "off":
        return lambda frame: []
    if name == "objectron":
        from data_prep.detectors import objectron

        if not package_path().is_file():
            raise InputError(
                f"--semantic objectron: is not installed in {sys.prefix}; run `{COMMAND}` there"
            )
        return objectron(str(package_path()))
    if name.endswith(".onnx"):
        from data_prep.onnx_detectors import onnx

        return onnx(name)
    raise InputError(
        f"--semantic: expected auto, objectron, opencv, off or an .onnx detector, got {name!r}"
    )


def detect_people(frame: np.ndarray) -> list[Detection]:
    """Pedestrians (HOG) and frontal faces in one RGB frame [H, W, 3] uint8."""
    import cv2

    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    found = []
    if gray.shape[0] >= 128 and gray.shape[1] >= 64:
        boxes, margins = _pedestrians().detectMultiScale(gray, winStride=(8, 8), scale=1.1)
        for box, margin in zip(boxes, np.ravel(margins)):
            if margin >= HOG_THRESHOLD:
                found.append(Detection("person", float(margin), tuple(int(v) for v in box)))
    return found + find_faces(frame)


def find_faces(frame: np.ndarray) -> list[Detection]:
    """Frontal faces (cascade) in one RGB frame [H, W, 3] uint8."""
    import cv2

    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    side = max(20, round(FACE_SIDE * min(gray.shape) / 480.0))
    boxes, _, scores = _faces().detectMultiScale3(
        gray, 1.1, FACE_NEIGHBOURS, minSize=(side, side), outputRejectLevels=True
    )
    return [
        Detection("face", float(score), tuple(int(v) for v in box))
        for box, score in zip(boxes, np.ravel(scores))
    ]


def detect_over_time(
    frames: np.ndarray, detector: Detector, samples: int
) -> dict[int, list[Detection]]:
    """Detections in evenly spread frames of [F, H, W, 3], by frame index."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(samples, len(frames))).astype(int))
    return {int(i): detector(np.ascontiguousarray(frames[i])) for i in chosen}


def dynamic_class_share(found: dict[int, list[Detection]]) -> float:
    """Share of the examined frames that hold at least one detection."""
    return sum(1 for detections in found.values() if detections) / max(1, len(found))


@functools.cache
def _pedestrians():
    import cv2

    hog = cv2.HOGDescriptor()
    hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    return hog


@functools.cache
def _faces():
    import cv2

    return cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")
