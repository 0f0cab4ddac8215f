import io
import json
import tarfile

import numpy as np
import pytest

from data_prep.detectors import decode_ssd, objectron, read_outputs, ssd_anchors
from data_prep.semantic import make_detector
from see3d_jax.errors import InputError

SIDE, FRAME, SCALE = (640, 640), (240, 320), 2.0


def boxes(outputs):
    found = read_outputs(outputs, SCALE, SIDE, FRAME)
    return [(d.label, round(d.score, 2), d.box) for d in found]


# one person with corners (40, 20)-(140, 220) in network pixels, a car beside it, a weak dog
CORNERS = np.float32([[40, 20, 140, 220], [300, 300, 400, 400], [10, 10, 30, 30]])
CENTRES = np.float32([[90, 120, 100, 200], [350, 350, 100, 100], [20, 20, 20, 20]])
SCORES, CLASSES = np.float32([0.9, 0.95, 0.3]), np.array([0, 2, 16])
PERSON = [("person", 0.9, (20, 10, 50, 100))]


def yolo(classes_after, noise=0):
    each = np.zeros((3, 80), np.float32)
    each[np.arange(3), CLASSES] = SCORES
    columns = [CENTRES, np.ones((3, classes_after - 4), np.float32), each]
    rows = np.concatenate(columns, 1)
    return np.concatenate([rows, np.zeros((200, rows.shape[1]), np.float32)])[None]


def test_every_layout_gives_the_same_person():
    assert boxes({"output0": yolo(5)}) == PERSON
    assert boxes({"output0": yolo(4).transpose(0, 2, 1)}) == PERSON
    ended = np.concatenate([CORNERS, SCORES[:, None], CLASSES[:, None]], 1)[None]
    assert boxes({"output0": ended.astype(np.float32)}) == PERSON
    rtdetr = {"labels": CLASSES[None], "boxes": CORNERS[None], "scores": SCORES[None]}
    assert boxes(rtdetr) == PERSON


def test_mask_networks_and_detr_count_classes_from_one():
    masks = {"boxes": CORNERS, "labels": np.array([1, 3, 18]), "scores": SCORES,
             "masks": np.zeros((3, 1, 28, 28), np.float32)}  # fmt: skip
    assert boxes(masks) == PERSON
    logits = np.full((1, 3, 92), -20, np.float32)
    logits[0, [0, 1, 2], [1, 3, 91]] = 20  # the third is "nothing"
    (person,) = boxes({"logits": logits, "pred_boxes": CENTRES[None] / 640})
    assert person == ("person", 1.0, (20, 10, 50, 100))


def test_overlapping_boxes_are_one_and_unknown_outputs_are_named():
    twice = np.float32([[40, 20, 140, 220, 0.9, 0], [42, 22, 140, 220, 0.8, 0]])[None]
    assert len(boxes({"o": twice})) == 1
    with pytest.raises(InputError, match="unknown outputs"):
        read_outputs({"o": np.zeros((1, 3))}, 1.0, SIDE, FRAME)


def test_ssd_boxes_decode_to_their_anchors():
    anchors = ssd_anchors(300)
    assert len(anchors) == 1917 and anchors.min() > 0
    found = decode_ssd(np.zeros((1917, 4), np.float32), anchors)
    np.testing.assert_allclose(found[:, :2] + found[:, 2:] / 2, anchors[:, :2], atol=1e-6)
    np.testing.assert_allclose(found[:, 2:], anchors[:, 2:], atol=1e-6)


def test_bad_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        objectron(str(tmp_path / "none.tgz"))
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as package:
        package.addfile(tarfile.TarInfo("package/readme"), io.BytesIO(b""))
    with pytest.raises(InputError, match="is damaged"):
        objectron(str(tmp_path / "other.tgz"))
    pytest.importorskip("onnxruntime", reason="reads .onnx files")
    (tmp_path / "bad.onnx").write_text(json.dumps({}))
    with pytest.raises(InputError, match="not an ONNX network"):
        make_detector(str(tmp_path / "bad.onnx"))
