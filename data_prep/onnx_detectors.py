"""Detection networks that the user names as .onnx files, for stage 2; they run in onnxruntime.

The layout is told from the outputs, never from the file's name:

    YOLO v5                      [1, N, 5 + classes]: centre boxes in pixels, objectness, scores
    YOLO v8, 11 and the like     [1, 4 + classes, N]: centre boxes in pixels, scores
    YOLO v10, 26, or with its    [1, N, 6]: corners in pixels, score, class
      suppression inside
    RT-DETR of Ultralytics       [1, N, 6] or [1, N, 4 + classes]: centre boxes in 0..1
    RT-DETR, D-FINE with their   labels, boxes (corners in pixels), scores; a second input asks
      post-processing              for the size of the picture
    torchvision                  the same without that input: Faster and Mask R-CNN, SSD, RetinaNet
    DETR, YOLOS, RT-DETR of      logits [1, N, classes], boxes [1, N, 4]: centre boxes in 0..1
      transformers

Networks with masks have the coefficients in further columns or a fourth output; boxes suffice here.
What the classes are called is read from the file's metadata (`names`, as Ultralytics writes it);
without it they are COCO's: 80 from zero, or up to 90 from one where torchvision and DETR count so.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.detectors import suppress
from data_prep.semantic import Detection, Detector
from see3d_jax.errors import InputError
from see3d_jax.onnx_models import open_session

SCORE = 0.5  # paper's Mask R-CNN threshold
FREE_SIDE = 640  # of networks that take any size
GRAY = 114  # of the border, as YOLO was trained with
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation
COCO_CLASSES = 80
MASK_COLUMNS = 32
# those of COCO's classes that move by themselves
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
COCO_DYNAMIC = {0: "person", **dict(enumerate(_ANIMALS, 14))}
# the same in COCO's original numbering up to 90, which DETR and torchvision use
COCO_DYNAMIC_91 = {
    1: "person",
    **{index + 2: name for index, name in COCO_DYNAMIC.items() if index},
}


@functools.cache
def onnx(path: str) -> Detector:
    """The detector in an .onnx file. Raises InputError for a network that cannot be one."""
    session = open_session(path, "--semantic", "curate", threads=1)  # one video per core
    inputs, outputs = session.get_inputs(), session.get_outputs()
    side = _input_size(inputs[0].shape, path)
    named = dynamic_classes(session.get_modelmeta().custom_metadata_map.get("names", ""), path)
    sized = any("mask" not in value.name.lower() for value in inputs[1:])
    normalise = _is_detr([(output.name, output.shape) for output in outputs])

    def detect(frame: np.ndarray) -> list[Detection]:
        feed, scale = _prepare(frame, inputs, side, normalise)
        arrays = dict(zip((output.name for output in outputs), session.run(None, feed)))
        return read_outputs(arrays, scale, side, frame.shape[:2], sized, named, path)

    return detect


def dynamic_classes(names: str, path: str = "") -> dict[int, str] | None:
    """Metadata `names`, a dictionary as text → index and name of those that move by themselves.

    None when the file does not say. Raises InputError when it says that there is none.
    """
    try:
        classes = ast.literal_eval(names)
        classes = {int(index): str(name).lower() for index, name in classes.items()}
    except (ValueError, SyntaxError, AttributeError):
        return None
    if all(name.isdigit() for name in classes.values()):  # placeholders
        return None
    found = {i: name for i, name in classes.items() if name in COCO_DYNAMIC.values()}
    if not found:
        known = ", ".join(sorted(classes.values())[:6])
        raise InputError(f"--semantic {path}: knows neither person nor animal, but {known} ...")
    return found


def _input_size(shape: Sequence[object], path: str) -> tuple[int, int]:
    """(height, width) of the image input [1, 3, H, W] or [3, H, W]."""
    if len(shape) not in (3, 4) or (isinstance(shape[-3], int) and shape[-3] != 3):
        raise InputError(f"--semantic {path}: expected an image [1, 3, H, W], got {list(shape)}")
    sides = [side if isinstance(side, int) and side > 0 else FREE_SIDE for side in shape[-2:]]
    return sides[0], sides[1]


def _is_detr(outputs: Sequence[tuple[str, Sequence[object]]]) -> bool:
    """Whether logits of COCO's long numbering come out: those networks want ImageNet's colours."""
    return any("logit" in name.lower() and shape[-1] in (91, 92) for name, shape in outputs)


def _prepare(
    frame: np.ndarray, inputs: Sequence[object], side: tuple[int, int], normalise: bool = False
) -> tuple[dict[str, np.ndarray], float]:
    """Frame scaled into the top left of the input, RGB 0..1, NCHW (or CHW); scale = input/frame."""
    import cv2

    scale = min(side[0] / frame.shape[0], side[1] / frame.shape[1])
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    canvas = np.full((*side, 3), GRAY, np.uint8)
    height, width = min(side[0], small.shape[0]), min(side[1], small.shape[1])
    canvas[:height, :width] = small[:height, :width]
    image = canvas.astype(np.float32) / 255.0
    if normalise:
        image = (image - np.float32(IMAGENET[0])) / np.float32(IMAGENET[1])
    image = image.transpose(2, 0, 1).astype(_number(inputs[0].type))
    feed = {inputs[0].name: image if len(inputs[0].shape) == 3 else image[None]}
    for extra in inputs[1:]:
        if "mask" in extra.name.lower():  # DETR: where the picture is
            value = np.zeros((1, *side))
            value[:, :height, :width] = 1
        else:  # RT-DETR: the (width, height) that its boxes shall have
            value = np.array([side[::-1]])
        feed[extra.name] = value.astype(_number(extra.type))
    return feed, scale


def _number(kind: str) -> type:
    """NumPy's type of an onnxruntime type such as tensor(float16)."""
    known = {"float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
    return known.get(kind.removeprefix("tensor(").removesuffix(")"), np.float32)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Candidates: corners [N, 4] in network pixels, scores [N], classes [N] and their names.

    ended: the network has suppressed overlapping ones already, or never makes any.
    """

    corners: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: Mapping[int, str]
    ended: bool


def read_outputs(
    outputs: Mapping[str, np.ndarray],
    scale: float,
    side: tuple[int, int],
    frame: tuple[int, int],
    sized: bool = False,
    names: Mapping[int, str] | None = None,
    path: str = "",
) -> list[Detection]:
    """Outputs of a known layout → detections of dynamic classes.

    Args:
      outputs: name → array, in the network's order.
      scale: network input pixels per frame pixel.
      side: (height, width) of the network input.
      frame: (height, width) of the frame, to which boxes are cut.
      sized: the network has an input for the size of the picture.
      names: index → name of the dynamic classes, where the file says; COCO's otherwise.
      path: for messages.

    Raises InputError for any other layout.
    """
    arrays = {name: np.asarray(value, np.float32) for name, value in outputs.items()}
    by_word = {
        word: value for name, value in arrays.items()
        for word in ("label", "box", "score", "logit") if word in name.lower()
    }  # fmt: skip
    first = next(iter(arrays.values()))
    found = None
    if {"label", "box", "score"} <= set(by_word):
        found = _found_labels(by_word, COCO_DYNAMIC if sized else COCO_DYNAMIC_91)
    elif {"logit", "box"} <= set(by_word):
        found = _found_logits(by_word["logit"], by_word["box"], side)
    elif first.ndim == 3:
        found = _found_rows(first[0], side, len(arrays) > 1, names is not None)
    if found is None:
        shapes = {name: value.shape for name, value in arrays.items()}
        raise InputError(f"--semantic {path}: unknown outputs {shapes}")
    boxes = np.concatenate([found.corners[:, :2], found.corners[:, 2:] - found.corners[:, :2]], 1)
    detections = []
    for index, name in (names or found.names).items():
        scores = np.where(found.classes == index, found.scores, 0.0)
        detections += suppress(name, boxes / scale, scores, SCORE, 1.0 if found.ended else 0.5)
    cut = [dataclasses.replace(d, box=_inside(d.box, frame)) for d in detections]
    return [d for d in cut if d.box[2] and d.box[3]]  # some lie in the border


def _found_labels(by_word: Mapping[str, np.ndarray], names: Mapping[int, str]) -> _Found:
    classes = by_word["label"].ravel().astype(int)
    return _Found(by_word["box"].reshape(-1, 4), by_word["score"].ravel(), classes, names, True)


def _found_logits(logits: np.ndarray, boxes: np.ndarray, side: tuple[int, int]) -> _Found:
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[1] == 92:  # a last class "nothing" takes part in a softmax
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        scores = (exponents / exponents.sum(1, keepdims=True))[:, :-1]
    else:
        scores = 1.0 / (1.0 + np.exp(-logits))
    names = COCO_DYNAMIC_91 if logits.shape[1] in (91, 92) else COCO_DYNAMIC
    # a query may be two things at once; as in the library as many pairs count as there are queries
    best = np.argsort(-scores, axis=None)[: len(scores)]
    query, classes = np.unravel_index(best, scores.shape)
    corners = _corners(boxes.reshape(-1, 4)[query], side)
    return _Found(corners, scores[query, classes], classes, names, True)


def _found_rows(rows: np.ndarray, side: tuple[int, int], masks: bool, named: bool) -> _Found | None:
    """One array with a row (or a column) per candidate; None when its width fits no layout."""
    extra = MASK_COLUMNS if masks else 0
    if rows.shape[1] == 6 + extra:
        # pixels of any picture are beyond 2 somewhere, so what is not was measured in pictures
        whole = rows[:, :4].max(initial=0.0) <= 2.0
        corners = _corners(rows[:, :4], side) if whole else rows[:, :4]
        return _Found(corners, rows[:, 4], rows[:, 5].astype(int), COCO_DYNAMIC, True)
    by_row = rows.shape[1] < rows.shape[0]
    rows = rows if by_row else rows.T
    classes = rows.shape[1] - 4 - extra
    each = rows[:, 4 : 4 + classes]
    whole = rows[:, :4].max(initial=0.0) <= 2.0
    if by_row and not whole:  # YOLO v5 alone: its objectness comes first
        classes, each = classes - 1, each[:, 1:] * each[:, :1]
    if classes < 1 or (classes != COCO_CLASSES and not named):
        return None
    corners = _corners(rows[:, :4], side if whole else (1, 1))
    return _Found(corners, each.max(1), each.argmax(1), COCO_DYNAMIC, whole)


def _corners(boxes: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """(centre x, y, width, height) in units of `side` → (left, top, right, bottom) in pixels."""
    half = boxes[:, 2:4] / 2
    unit = np.float32([side[1], side[0], side[1], side[0]])
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1) * unit


def _inside(box: tuple[int, int, int, int], frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box (x, y, width, height) inside a frame of (height, width)."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(frame[1], box[0] + box[2]), min(frame[0], box[1] + box[3])
    return left, top, max(0, right - left), max(0, bottom - top)
