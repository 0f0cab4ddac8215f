"""Layouts of detector exports, as those of Ultralytics, torchvision and transformers were seen."""

import json

import numpy as np
import pytest

from data_prep.onnx_detectors import dynamic_classes, onnx, read_outputs
from data_prep.semantic import make_detector
from see3d_jax.errors import InputError

SIDE, FRAME, SCALE = (640, 640), (240, 320), 2.0


def boxes(outputs, **options):
    found = read_outputs(outputs, SCALE, SIDE, FRAME, **options)
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


def test_mask_networks_and_detr_count_classes_from_one():
    masks = {"boxes": CORNERS, "labels": np.array([1, 3, 18]), "scores": SCORES,
             "masks": np.zeros((3, 1, 28, 28), np.float32)}  # fmt: skip
    assert boxes(masks) == PERSON
    logits = np.full((1, 3, 92), -20, np.float32)
    logits[0, [0, 1, 2], [1, 3, 91]] = 20  # the third is "nothing"
    (person,) = boxes({"logits": logits, "pred_boxes": CENTRES[None] / 640})
    assert person == ("person", 1.0, (20, 10, 50, 100))


def test_overlapping_boxes_are_one_and_unknown_outputs_are_named():
    twice = yolo(4)
    twice[0, 3] = [*CENTRES[0] + [2, 2, 0, 0], 0.8, *[0] * 79]
    assert boxes({"o": twice.transpose(0, 2, 1)}) == PERSON
    with pytest.raises(InputError, match="unknown outputs"):
        read_outputs({"o": np.zeros((1, 3))}, 1.0, SIDE, FRAME)


def test_columns_or_outputs_of_masks_change_nothing():
    masks = np.ones((1, 32, 160, 160), np.float32)
    coefficients = np.full((1, 32, 203), 9.0, np.float32)
    each = np.concatenate([yolo(4).transpose(0, 2, 1), coefficients], 1)
    assert boxes({"output0": each, "output1": masks}) == PERSON
    ended = np.concatenate([CORNERS, SCORES[:, None], CLASSES[:, None], np.ones((3, 32))], 1)[None]
    assert boxes({"output0": ended, "output1": masks}) == PERSON


def test_centre_boxes_in_parts_of_the_picture_are_told_from_pixels():
    ended = np.concatenate([CENTRES / 640, SCORES[:, None], CLASSES[:, None]], 1)[None]
    assert boxes({"output0": ended}) == PERSON
    rows = yolo(4)
    rows[..., :4] /= 640
    assert boxes({"output0": rows}) == PERSON


def test_an_input_for_the_size_of_the_picture_says_how_classes_are_counted():
    """Post-processed RT-DETR counts from 0; torchvision, whose outputs are called alike, from 1."""
    found = {"boxes": CORNERS, "scores": SCORES}
    assert boxes({**found, "labels": CLASSES}, sized=True) == PERSON
    assert boxes({**found, "labels": np.array([1, 3, 18])}) == PERSON


def test_boxes_in_the_border_are_no_objects():
    border = np.float32([[10, 500, 600, 630, 0.9, 0]])[None]  # below the 480 rows of the frame
    assert boxes({"o": border}) == []


def test_names_in_the_file_decide_which_classes_count():
    assert dynamic_classes("{0: 'car', 3: 'Dog', 7: 'person'}") == {3: "dog", 7: "person"}
    assert dynamic_classes("") is None and dynamic_classes("{0: '0', 1: '1'}") is None
    with pytest.raises(InputError, match="neither person nor animal, but bolt, nut"):
        dynamic_classes("{0: 'nut', 1: 'bolt'}")
    rows = np.zeros((1, 6, 50), np.float32)  # two classes, which are not COCO's
    rows[0, :, 0] = [90, 120, 100, 200, 0.1, 0.9]
    assert boxes({"o": rows}, names={1: "person"}) == PERSON
    with pytest.raises(InputError, match="unknown outputs"):
        boxes({"o": rows})


def write_network(path, inputs, outputs, names=""):
    """An .onnx file with these inputs that always gives these outputs."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, values = [], []
    for name, value in outputs.items():
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        values.append(helper.make_tensor_value_info(name, kind, value.shape))
    ins = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    model = helper.make_model(helper.make_graph(nodes, "g", ins, values), ir_version=9,
                              opset_imports=[helper.make_opsetid("", 17)])  # fmt: skip
    if names:
        model.metadata_props.add(key="names", value=names)
    onnx.save(model, path)
    return str(path)


def test_networks_run_whatever_their_inputs_are(tmp_path):
    pytest.importorskip("onnxruntime", reason="reads .onnx files")
    tensor = pytest.importorskip("onnx", reason="writes .onnx files").TensorProto
    frame = np.zeros((240, 320, 3), np.uint8)
    found = {"labels": np.array([0]), "boxes": CORNERS[:1], "scores": SCORES[:1]}
    image = ("images", tensor.FLOAT, [1, 3, 640, 640])
    networks = {
        "sized": ([image, ("orig_target_sizes", tensor.INT64, [1, 2])], found),
        "torchvision": ([("image", tensor.FLOAT, [3, "h", "w"])],
                        {**found, "labels": np.array([1])}),
        "half": ([("images", tensor.FLOAT16, [1, 3, 640, 640])],
                 {"output0": yolo(4).transpose(0, 2, 1).astype(np.float16)}),
        "masked": ([image, ("pixel_mask", tensor.INT64, [1, 640, 640])],
                   {"logits": np.float32(np.eye(92)[[1]] * 40)[None],
                    "pred_boxes": CENTRES[None, :1] / 640}),
    }  # fmt: skip
    for name, (inputs, outputs) in networks.items():
        path = write_network(tmp_path / f"{name}.onnx", inputs, outputs)
        (person,) = onnx(path)(frame)
        assert (person.label, person.box) == ("person", (20, 10, 50, 100)), name


def test_files_that_are_no_detector_are_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxruntime", reason="reads .onnx files")
    tensor = pytest.importorskip("onnx", reason="writes .onnx files").TensorProto
    (tmp_path / "bad.onnx").write_text(json.dumps({}))
    with pytest.raises(InputError, match="not an ONNX network"):
        make_detector(str(tmp_path / "bad.onnx"))
    outputs = {"output0": yolo(4)}
    last = [("images", tensor.FLOAT, [1, 640, 640, 3])]
    with pytest.raises(InputError, match=r"expected an image \[1, 3, H, W\]"):
        make_detector(write_network(tmp_path / "last.onnx", last, outputs))
    first = [("images", tensor.FLOAT, [1, 3, 640, 640])]
    with pytest.raises(InputError, match="neither person nor animal"):
        make_detector(write_network(tmp_path / "nuts.onnx", first, outputs, "{0: 'nut'}"))
