"""Points that pictures share: found where they are, and wrong ones thrown out."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project
from see3d_jax.pipelines.matching import Matches, load_matcher, sift_matches, verified

SHIFT = np.array([7, 12])  # x, y


def _two_crops():
    photo = data.astronaut()
    return photo[:300, :320], photo[SHIFT[1] : 300 + SHIFT[1], SHIFT[0] : 320 + SHIFT[0]]


def test_sift_finds_the_shift_of_two_crops():
    found = sift_matches(*_two_crops())
    assert len(found) > 200
    error = np.linalg.norm(found.first - found.second - SHIFT, axis=1)
    assert np.mean(error < 0.5) > 0.95
    one = np.zeros((40, 40, 3), np.uint8)
    assert len(sift_matches(one, one)) == 0  # nothing to see


def test_verification_keeps_what_fits_one_motion():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (120, 3)).astype(np.float32)
    k = intrinsics_matrix(300, 300, 160, 120)
    views = [Camera(k, look_at(eye, (0, 0, 0)), 320, 240) for eye in ((0, 0, -4), (1, 0.2, -4))]
    first, second = (np.array(project(view, points)[0]) for view in views)
    second[:40] += rng.uniform(15, 60, (40, 2)) * rng.choice([-1, 1], (40, 2))
    kept = verified(Matches(first, second))
    right = {tuple(p) for p in first[40:]}
    assert len(kept) > 75 and np.mean([tuple(p) in right for p in kept.first]) > 0.93
    assert len(verified(Matches(first[:5], second[:5]))) == 0
    again = verified(Matches(first, second))
    np.testing.assert_array_equal(kept.first, again.first)


def _network(path, outputs, batch=False):
    """A network that ignores the pictures and says the given tensors."""
    onnx = pytest.importorskip("onnx", reason="the networks are made with onnx")
    pytest.importorskip("onnxruntime", reason="runs .onnx files")
    from onnx import TensorProto, helper, numpy_helper

    shape = [2 if batch else 1, 1, "h", "w"]
    names = ["images"] if batch else ["image0", "image1"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
    nodes = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(v))
             for n, v in outputs.items()]  # fmt: skip
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}
    values = [helper.make_tensor_value_info(n, kinds[v.dtype.kind], v.shape)
              for n, v in outputs.items()]  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, values)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        str(path),
    )
    return path


A = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
B = np.array([[9, 8], [7, 6]], np.float32)


@pytest.mark.parametrize(
    "outputs, batch",
    [
        ({"kpts0": A[None], "kpts1": B[None], "matches0": np.array([[0, 1], [2, 0]])}, False),
        ({"keypoints0": A, "keypoints1": B, "matches0": np.array([[1, -1, 0]])}, False),
        ({"keypoints": np.stack([A, np.r_[B, B[:1]]]), "matches": np.array([[0, 0, 1], [0, 2, 0]])},
         True),
        ({"mkpts0": A[[0, 2]], "mkpts1": B[[1, 0]]}, False),
    ],
)  # fmt: skip
def test_learned_matchers_of_every_shape_say_the_same(tmp_path, outputs, batch):
    matcher = load_matcher(_network(tmp_path / "m.onnx", outputs, batch))
    found = matcher(np.zeros((40, 50, 3), np.uint8), np.zeros((44, 46, 3), np.uint8))
    np.testing.assert_array_equal(found.first, A[[0, 2]] + 0.5)
    np.testing.assert_array_equal(found.second, B[[1, 0]] + 0.5)


def test_what_is_no_matcher_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--matcher .*: no such file"):
        load_matcher(tmp_path / "m.onnx")
    picture = np.zeros((40, 50, 3), np.uint8)
    wrong = _network(tmp_path / "m.onnx", {"depth": A})
    with pytest.raises(InputError, match="no keypoints among its outputs depth"):
        load_matcher(wrong)(picture, picture)
    wrong = _network(tmp_path / "m.onnx", {"kpts0": A, "kpts1": B, "matches": np.array([[0, 5]])})
    with pytest.raises(InputError, match="points that it did not find"):
        load_matcher(wrong)(picture, picture)
    (tmp_path / "m.onnx").write_text("nothing")
    with pytest.raises(InputError, match="not an ONNX network"):
        load_matcher(tmp_path / "m.onnx")
