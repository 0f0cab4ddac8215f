"""Detection networks for stage 2.

    Objectron   out of the package of data_prep.install_detector: SSD MobileNet v2, trained on
                Open Images, 10 MB; runs in OpenCV, 50 ms per frame on one core
    ONNX        any COCO model with the outputs of YOLO v5-v11, YOLO with its non-maximum
                suppression inside, RT-DETR, DETR or Mask R-CNN; runs in onnxruntime

The layout of an ONNX model is told from its inputs and outputs, never from its name. Boxes are
(x, y, width, height) pixels of the frame.
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.install_detector import COMMAND
from data_prep.semantic import Detection, Detector
from see3d_jax.errors import InputError
from see3d_jax.onnx_models import open_session

OBJECTRON_SIDE = 300
OBJECTRON_CLASSES = ("Person", "Cattle", "Cat", "Dog")
# A person half hidden or seen from behind reaches 0.35; empty scenes stay below. Animals also fire
# on stuffed ones, which may be filmed: they have to be certain.
OBJECTRON_SCORES = {"Person": 0.35, "Cattle": 0.7, "Cat": 0.7, "Dog": 0.7}
ONNX_SCORE = 0.5  # paper's Mask R-CNN threshold
# those of COCO's 80 classes that move by themselves
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
COCO_DYNAMIC = {0: "person", **dict(enumerate(_ANIMALS, 14))}
# the same in COCO's original numbering up to 90, which DETR and Mask R-CNN of torchvision use
COCO_DYNAMIC_91 = {
    1: "person",
    **{index + 2: name for index, name in COCO_DYNAMIC.items() if index},
}


@functools.cache
def objectron(path: str) -> Detector:
    """The detector inside the npm package @mediapipe/objectron."""
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
        found = []
        for name in OBJECTRON_CLASSES:
            scores = 1.0 / (1.0 + np.exp(-logits[:, labels.index(name)]))
            found += _suppress(name.lower(), boxes, scores, OBJECTRON_SCORES[name])
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


def _suppress(
    label: str, boxes: np.ndarray, scores: np.ndarray, threshold: float
) -> list[Detection]:
    """Detections of one class above the threshold, overlapping ones removed."""
    import cv2

    strong = np.flatnonzero(scores >= threshold)
    kept = cv2.dnn.NMSBoxes(boxes[strong].tolist(), scores[strong].tolist(), threshold, 0.5)
    return [
        Detection(label, float(scores[i]), tuple(int(v) for v in boxes[i]))
        for i in strong[np.ravel(np.asarray(kept, int))]
    ]


@functools.cache
def onnx(path: str) -> Detector:
    """Any COCO detector or segmenter as an ONNX file."""
    session = open_session(path, "--semantic", "curate", threads=1)  # one video per core
    inputs = session.get_inputs()
    side = _input_size(inputs[0].shape)
    names = [output.name for output in session.get_outputs()]

    def detect(frame: np.ndarray) -> list[Detection]:
        feed, scale = _prepare(frame, inputs, side)
        outputs = session.run(None, feed)
        return read_outputs(dict(zip(names, outputs)), scale, side, frame.shape[:2], path)

    return detect


def _input_size(shape: Sequence[object]) -> tuple[int, int]:
    """(height, width) of the image input; free sides become 640."""
    sides = [side if isinstance(side, int) and side > 0 else 640 for side in shape[-2:]]
    return sides[0], sides[1]


def _prepare(
    frame: np.ndarray, inputs: Sequence[object], side: tuple[int, int]
) -> tuple[dict[str, np.ndarray], float]:
    """Frame scaled into the top left of the input, RGB 0..1, NCHW (or CHW); scale = input/frame."""
    import cv2

    scale = min(side[0] / frame.shape[0], side[1] / frame.shape[1])
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    canvas = np.full((*side, 3), 114, np.uint8)
    height, width = min(side[0], small.shape[0]), min(side[1], small.shape[1])
    canvas[:height, :width] = small[:height, :width]
    image = canvas.transpose(2, 0, 1).astype(np.float32) / 255.0
    feed = {inputs[0].name: image if len(inputs[0].shape) == 3 else image[None]}
    for extra in inputs[1:]:  # RT-DETR asks for the size that its boxes shall have
        kind = np.int64 if "int64" in extra.type else np.float32
        feed[extra.name] = np.array([side[::-1]], kind)
    return feed, scale


def read_outputs(
    outputs: dict[str, np.ndarray],
    scale: float,
    side: tuple[int, int],
    frame: tuple[int, int],
    path: str = "",
) -> list[Detection]:
    """Outputs of a known layout → detections of dynamic classes.

    Args:
      outputs: name → array. Known: one [1, N, 5 + classes] (YOLO v5), one [1, 4 + classes, N]
        (YOLO v8 and later), one [1, N, 6] (boxes after suppression), `labels` + `boxes` + `scores`
        (RT-DETR with its post-processing, Mask R-CNN), or logits [1, N, classes] + boxes [1, N, 4]
        in 0..1 (DETR).
      scale: network input pixels per frame pixel.
      side: (height, width) of the network input.
      frame: (height, width) of the frame, to which boxes are cut.
      path: for messages.
    """
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    shapes = [value.shape for value in arrays.values()]
    by_word = {
        word: value for name, value in arrays.items()
        for word in ("label", "box", "score", "logit") if word in name.lower()
    }  # fmt: skip
    names = COCO_DYNAMIC
    if {"label", "box", "score"} <= set(by_word):
        corners = by_word["box"].reshape(-1, 4)
        scores, classes = by_word["score"].ravel(), by_word["label"].ravel().astype(int)
        if any(value.ndim == 4 for value in arrays.values()):  # masks: torchvision's numbering
            names = COCO_DYNAMIC_91
    elif {"logit", "box"} <= set(by_word):
        logits = by_word["logit"].reshape(-1, by_word["logit"].shape[-1])
        probabilities = 1.0 / (1.0 + np.exp(-logits))
        if logits.shape[1] > 90:  # DETR: softmax with a last class "nothing"
            exponents = np.exp(logits - logits.max(1, keepdims=True))
            probabilities = (exponents / exponents.sum(1, keepdims=True))[:, :-1]
            names = COCO_DYNAMIC_91
        scores, classes = probabilities.max(1), probabilities.argmax(1)
        corners = _corners(by_word["box"].reshape(-1, 4) * [side[1], side[0], side[1], side[0]])
    elif len(shapes[0]) == 3 and shapes[0][2] == 6:
        rows = next(iter(arrays.values()))[0]
        corners, scores, classes = rows[:, :4], rows[:, 4], rows[:, 5].astype(int)
    elif len(shapes[0]) == 3 and min(shapes[0][1:]) > 4:
        rows = next(iter(arrays.values()))[0]
        rows = rows.T if rows.shape[0] < rows.shape[1] else rows
        extra = 5 if rows.shape[1] in (85, 117) else 4  # 80 classes (+ 32 mask coefficients)
        each = rows[:, extra : extra + 80] * (rows[:, 4:5] if extra == 5 else 1.0)
        scores, classes = each.max(1), each.argmax(1)
        corners = _corners(rows[:, :4])
    else:
        raise InputError(f"--semantic {path}: unknown outputs {dict(zip(arrays, shapes))}")
    found = []
    limits = np.array([frame[1], frame[0], frame[1], frame[0]], np.float32)
    corners = np.clip(corners / scale, 0, limits)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    for index, name in names.items():
        found += _suppress(name, boxes, np.where(classes == index, scores, 0.0), ONNX_SCORE)
    return found


def _corners(boxes: np.ndarray) -> np.ndarray:
    """(centre x, y, width, height) → (left, top, right, bottom)."""
    half = boxes[:, 2:4] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)
