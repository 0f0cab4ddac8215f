"""Depth networks in ONNX files, made here: brightness plays the part of depth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import write_image
from see3d_jax.pipelines.depth import reference_depths
from see3d_jax.pipelines.depth_model import load_depth_model
from see3d_jax.pipelines.inputs import Scene, load_images, load_scene

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx")
pytest.importorskip("onnxruntime", reason="runs .onnx files")
H, W = 48, 64
CAMERA = Camera(intrinsics_matrix(60, 60, W / 2, H / 2), np.eye(4, dtype=np.float32), W, H)
PLAIN = {"size": 64, "multiple": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}


def write_network(path, outputs=("depth",), shape=(1, 3, "h", "w"), metadata=None, sides=None):
    """A network that returns, per output, the mean of the channels (or constants, or points)."""
    from onnx import TensorProto, helper

    nodes, values = [], []
    for name in outputs:
        rank = [1, "h", "w"]
        if name == "points":  # [1, h, w, 3]: the picture's channels as x, y, z
            nodes.append(helper.make_node("Transpose", ["x"], [name], perm=[0, 2, 3, 1]))
            rank = [1, "h", "w", 3]
        elif name == "mask":  # known where the mean is above a quarter
            nodes.append(helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=0))
            nodes.append(helper.make_node("Constant", [], ["q"], value_float=0.25))
            nodes.append(helper.make_node("Greater", ["m", "q"], ["g"]))
            nodes.append(helper.make_node("Cast", ["g"], [name], to=TensorProto.FLOAT))
        else:
            nodes.append(helper.make_node("ReduceMean", ["x"], [name], axes=[1], keepdims=0))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, rank))
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [entry], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, str(path))
    return path


def ramp(low=0.2, high=0.9):
    values = np.linspace(low, high, W, dtype=np.float32)
    return np.broadcast_to(values, (H, W))


def picture(values):
    return np.repeat(np.round(values[..., None] * 255), 3, -1).astype(np.uint8)


def test_metadata_and_the_file_beside_say_how_to_ask(tmp_path):
    path = write_network(tmp_path / "m.onnx", metadata={**PLAIN, "kind": "metric"})
    model = load_depth_model(path)
    np.testing.assert_allclose(model.depth(picture(ramp()), CAMERA)[0], ramp(), atol=4e-3)
    (tmp_path / "m.json").write_text(json.dumps({"input_range": 255, "canonical_focal": 30}))
    found, aligned = load_depth_model(path).depth(picture(ramp()), CAMERA)
    np.testing.assert_allclose(found, ramp() * 255 * 2, rtol=0.02)  # focal 60 for one of 30
    assert not aligned


def test_a_network_of_fixed_size_gets_its_size(tmp_path):
    path = write_network(tmp_path / "m.onnx", shape=(1, 3, 32, 32), metadata=PLAIN)
    found = load_depth_model(path, "metric").predict(picture(ramp()), CAMERA)
    assert found.shape == (H, W)
    np.testing.assert_allclose(found[:, 4:-4], ramp()[:, 4:-4], atol=0.02)


def test_point_maps_give_z_and_masks_leave_unknown(tmp_path):
    path = write_network(tmp_path / "m.onnx", ("points", "mask"), metadata=PLAIN)
    model = load_depth_model(path, "affine")
    image = picture(ramp(0.1, 0.9))
    image[..., :2] = 200  # x and y of the points: z alone is depth
    image[:10] = 20
    found, _ = model.depth(image, CAMERA)
    np.testing.assert_allclose(found[12:, 20:], ramp(0.1, 0.9)[12:, 20:], atol=5e-3)
    assert not found[:8].any()


@pytest.mark.parametrize("kind", ["disparity", "affine", "metric"])
def test_each_kind_is_brought_to_known_depths(tmp_path, kind):
    """A slanted surface from 2 to 6, as each kind of network would see it, and 40 known depths."""
    truth = np.broadcast_to(np.linspace(2, 6, W), (H, W))
    seen = {"disparity": 1.3 / truth + 0.1, "affine": 0.1 * truth + 0.2, "metric": 0.15 * truth}
    model = load_depth_model(write_network(tmp_path / "m.onnx", metadata=PLAIN), kind)
    rng = np.random.default_rng(0)
    pixels = rng.uniform([0, 0], [W, H], (40, 2))
    depths = truth[pixels[:, 1].astype(int), pixels[:, 0].astype(int)].copy()
    depths[:6] *= 3  # wrong ones
    found, aligned = model.depth(picture(seen[kind]), CAMERA, pixels, depths)
    assert aligned and np.median(np.abs(found / truth - 1)) < 0.03


def test_without_anything_known_disparity_spans_ten_to_one(tmp_path):
    model = load_depth_model(write_network(tmp_path / "m.onnx", metadata=PLAIN), "disparity")
    found, aligned = model.depth(picture(ramp()), CAMERA)
    assert not aligned and found[0, -1] == pytest.approx(1) and found[0, 0] == pytest.approx(10)
    assert (np.diff(found[0]) <= 1e-6).all()  # brighter is nearer


def _scene(tmp_path, count=1) -> Scene:
    for i in range(count):
        write_image(tmp_path / f"{i}.png", picture(ramp()))
    write_transforms(
        tmp_path / "transforms.json",
        PosedImages(tuple(f"{i}.png" for i in range(count)), (CAMERA,) * count),
    )
    return load_scene(tmp_path)


def test_a_posed_photo_gets_its_depth_from_the_model(tmp_path):
    scene = _scene(tmp_path)
    model = load_depth_model(write_network(tmp_path / "m.onnx", metadata=PLAIN), "metric")
    images, cameras = load_images(scene)
    (depth,), source = reference_depths(scene, [0], images, cameras, 64, model)
    assert source == "model"
    np.testing.assert_allclose(depth, ramp(), atol=4e-3)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.write_text("no network"), "not an ONNX network"),
        (lambda p: p.unlink(), "--depth .*: no such file"),
        (lambda p: p.with_suffix(".json").write_text('{"mean": 3}'), "mean of its settings"),
        (lambda p: p.with_suffix(".json").write_text('{"side": 3}'), "unknown side"),
        (lambda p: p.with_suffix(".json").write_text("[]"), "not an object of settings"),
        (lambda p: None, "must be declared: --depth-kind"),
        (lambda p: write_network(p, shape=(1, 3, 4, 5, 6)), "expected one input"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(tmp_path, spoil, message):
    path = write_network(tmp_path / "m.onnx")
    spoil(path)
    with pytest.raises(InputError, match=message):
        load_depth_model(path)


def test_nothing_but_nan_is_named(tmp_path):
    """A deviation so small that the input overflows: what a broken export looks like."""
    path = write_network(tmp_path / "m.onnx", metadata={**PLAIN, "std": [1e-45] * 3})
    with pytest.raises(InputError, match="nothing but NaN"):
        load_depth_model(path, "metric").predict(picture(ramp()), CAMERA)
