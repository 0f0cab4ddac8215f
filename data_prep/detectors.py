"""Detection networks for stage 2.

    Objectron   out of the package of data_prep.install_detector: SSD MobileNet v2, trained on
                Open Images, 10 MB; runs in OpenCV. It sees 300 x 300 pixels and is unsure of
                people who are cut by the frame, whose faces OpenCV's cascade knows: both are asked
    ONNX        any detector or segmenter, see data_prep.onnx_detectors

Boxes are (x, y, width, height) pixels of the frame.
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
from pathlib import Path

import numpy as np

from data_prep.install_detector import COMMAND
from data_prep.semantic import Detection, Detector, find_faces
from see3d_jax.errors import InputError

OBJECTRON_SIDE = 300
OBJECTRON_CLASSES = ("Person", "Cattle", "Cat", "Dog")
# A person half hidden or seen from behind reaches 0.35; empty scenes stay below. Animals also fire
# on stuffed ones, which may be filmed: they have to be certain.
OBJECTRON_SCORES = {"Person": 0.35, "Cattle": 0.7, "Cat": 0.7, "Dog": 0.7}


@functools.cache
def objectron(path: str) -> Detector:
    """The detector inside the npm package @mediapipe/objectron, and frontal faces."""
    import cv2

    labels, model = _unpack_objectron(Path(path))
    network = cv2.dnn.readNetFromTFLite(np.frombuffer(model, np.uint8))
    anchors = ssd_anchors(OBJECTRON_SIDE)
    outputs = ("raw_outputs/box_encodings", "raw_outputs/class_predictions")

    def detect(frame: np.ndarray) -> list[Detection]:
        height, width = frame.shape[:2]
        side = (OBJECTRON_SIDE, OBJECTRON_SIDE)
        network.setInput(cv2.dnn.blobFromImage(frame, 1 / 127.5, side, (127.5,) * 3))
        encodings, logits = (value.reshape(len(anchors), -1) for value in network.forward(outputs))
        boxes = decode_ssd(encodings, anchors) * [width, height, width, height]
        found = find_faces(frame)
        for name in OBJECTRON_CLASSES:
            scores = 1.0 / (1.0 + np.exp(-logits[:, labels.index(name)]))
            found += suppress(name.lower(), boxes, scores, OBJECTRON_SCORES[name])
        return found

    return detect


def _unpack_objectron(path: Path) -> tuple[list[str], bytes]:
    """Label names and the TFLite model from the package: one data file with a list of its parts."""
    try:
        with tarfile.open(path) as package:
            names = {Path(member.name).name: member for member in package.getmembers()}
            stem = "objectron_solution_packed_assets"
            script = package.extractfile(names[f"{stem}_loader.js"]).read().decode()
            data = package.extractfile(names[f"{stem}.data"]).read()
        files = json.loads(re.search(r'"files":\s*(\[.*?\])', script, re.S).group(1))
        parts = {Path(f["filename"]).name: data[f["start"] : f["end"]] for f in files}
        labels = parts["object_detection_oidv4_labelmap.txt"].decode().split("\n")
        return labels, parts["object_detection_ssd_mobilenetv2_oidv4_fp16.tflite"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tarfile.TarError, EOFError, KeyError, AttributeError, ValueError):
        raise InputError(f"{path}: is damaged; delete it and run `{COMMAND}`") from None


def ssd_anchors(side: int) -> np.ndarray:
    """Default boxes of a six-level SSD: [N, 4] centre x, y, width, height in 0..1."""
    scales = [*np.linspace(0.2, 0.95, 6), 1.0]
    anchors = []
    for level in range(6):
        cells = int(np.ceil(side / (16 * 2**level)))
        if level == 0:
            shapes = [(0.1, 1.0), (scales[0], 2.0), (scales[0], 0.5)]
        else:
            shapes = [(scales[level], ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 1 / 3.0)]
            shapes.append((float(np.sqrt(scales[level] * scales[level + 1])), 1.0))
        for y in range(cells):
            for x in range(cells):
                for scale, ratio in shapes:
                    root = np.sqrt(ratio)
                    anchors.append(
                        ((x + 0.5) / cells, (y + 0.5) / cells, scale * root, scale / root)
                    )
    return np.array(anchors, np.float32)


def decode_ssd(encodings: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(ty, tx, th, tw) [N, 4] against anchors → (x, y, width, height) in 0..1."""
    y = encodings[:, 0] / 10 * anchors[:, 3] + anchors[:, 1]
    x = encodings[:, 1] / 10 * anchors[:, 2] + anchors[:, 0]
    height = np.exp(encodings[:, 2] / 5) * anchors[:, 3]
    width = np.exp(encodings[:, 3] / 5) * anchors[:, 2]
    return np.stack([x - width / 2, y - height / 2, width, height], -1)


def suppress(
    label: str, boxes: np.ndarray, scores: np.ndarray, threshold: float, overlap: float = 0.5
) -> list[Detection]:
    """Detections of one class above the threshold, those removed that overlap a stronger one.

    Boxes are [N, 4] (x, y, width, height); `overlap` is the intersection over union allowed.
    """
    import cv2

    strong = np.flatnonzero(scores >= threshold)
    kept = cv2.dnn.NMSBoxes(boxes[strong].tolist(), scores[strong].tolist(), threshold, overlap)
    return [
        Detection(label, float(scores[i]), tuple(round(float(v)) for v in boxes[i]))
        for i in strong[np.ravel(np.asarray(kept, int))]
    ]
