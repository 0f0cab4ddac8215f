import numpy as np
import pytest
from curate_scenes import make

from data_prep.stages import Clip, Settings, measure_viewpoint
from data_prep.track_models import make_tracker, read_tracks
from see3d_jax.errors import InputError

STEP = (3.0, -1.0)  # px per frame that the networks of these tests claim of every point


def network(path, channels_last=False, frames="F", points="N"):
    """A "tracker" in ONNX: every query moves by STEP per frame; seen in all but frame 0."""
    onnx = pytest.importorskip("onnx", reason="builds a small network")
    from onnx import TensorProto, helper, numpy_helper

    def constant(name, value, kind=np.int64):
        return numpy_helper.from_array(np.array(value, kind), name)

    def node(op, inputs, output, **more):
        return helper.make_node(op, inputs, [output], **more)

    columns = [0, 2, 1] if channels_last else [0, 1, 2]
    point_axis, frame_axis = (1, 2) if channels_last else (2, 1)
    nodes = [
        node("Gather", ["queries", "columns"], "ordered", axis=2),
        node("Slice", ["ordered", "one", "three", "two"], "xy"),
        node("Slice", ["ordered", "zero", "one", "two"], "start"),
        node("Shape", ["video"], "shape"),
        node("Gather", ["shape", "first"], "count", axis=0),
        node("Range", ["first0", "count", "first"], "range"),
        node("Cast", ["range"], "times", to=TensorProto.FLOAT),
        node("Unsqueeze", ["times", "frame_axes"], "each"),  # [1, F, 1, 1] or [1, 1, F, 1]
        node("Unsqueeze", ["xy", "point_axes"], "from"),
        node("Unsqueeze", ["start", "point_axes"], "since"),
        node("Sub", ["each", "since"], "after"),
        node("Mul", ["after", "step"], "moved"),
        node("Add", ["from", "moved"], "tracks"),
        node("Mul", ["after", "nothing"], "none"),
        node("Add", ["none", "each"], "flag4"),  # the frame number, for every point
        node("Squeeze", ["flag4", "last"], "flag"),
    ]
    if channels_last:  # occluded where positive
        nodes.append(node("Sub", ["half", "flag"], "occlusion"))
        seen = "occlusion"
    else:
        nodes.append(node("Greater", ["flag", "half"], "visibility"))
        seen = "visibility"
    video = [1, frames, 24, 32, 3] if channels_last else [1, frames, 3, 24, 32]
    axes = [point_axis, frame_axis]
    graph = helper.make_graph(
        nodes, "tracker",
        [helper.make_tensor_value_info("video", TensorProto.FLOAT, video),
         helper.make_tensor_value_info("queries", TensorProto.FLOAT, [1, points, 3])],
        [helper.make_tensor_value_info("tracks", TensorProto.FLOAT, None),
         helper.make_tensor_value_info(
             seen, TensorProto.FLOAT if channels_last else TensorProto.BOOL, None)],
        [constant("columns", columns), constant("zero", [0]), constant("one", [1]),
         constant("two", [2]), constant("three", [3]), constant("first", 1),
         constant("first0", 0), constant("frame_axes", [0, point_axis, 3]),
         constant("point_axes", [frame_axis]), constant("last", [3]),
         constant("step", STEP, np.float32), constant("nothing", 0, np.float32),
         constant("half", 0.5, np.float32)],
    )  # fmt: skip
    assert sorted(axes) == [1, 2]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_network_moves_the_points_at_the_size_of_the_frames(tmp_path, channels_last):
    pytest.importorskip("onnxruntime", reason="runs .onnx files")
    path = network(tmp_path / "tracker.onnx", channels_last)
    frames = np.stack(make("static", 5))  # 320 x 240: ten times what the network sees
    tracks = make_tracker(path)(frames)
    assert tracks.size == (320, 240) and len(tracks.xy) > 10
    assert np.isnan(tracks.xy[:, 0]).all(), "not visible in the first frame"
    later = np.isnan(tracks.xy[:, 1, 0])  # asked for halfway
    assert 0 < later.sum() < len(later) or channels_last
    assert not (channels_last and later.any()), "TAPIR looks back as well, CoTracker does not"
    steps = np.diff(tracks.xy[~later, 1:], axis=1)
    np.testing.assert_allclose(steps, np.broadcast_to([30.0, -10.0], steps.shape), rtol=1e-4)


def test_a_network_with_a_fixed_number_of_points_gets_it(tmp_path):
    pytest.importorskip("onnxruntime", reason="runs .onnx files")
    path = network(tmp_path / "tracker.onnx", points=500)
    tracks = make_tracker(path)(np.stack(make("static", 4)))
    assert 10 < len(tracks.xy) < 500, "queries that only fill up are no tracks"


def test_the_viewpoint_stage_uses_it(tmp_path):
    pytest.importorskip("onnxruntime", reason="runs .onnx files")
    frames = np.stack(make("static", 9))
    clip = Clip(frames, np.arange(9) / 12)
    path = network(tmp_path / "tracker.onnx")
    measure_viewpoint(clip, Settings(tracker=path, all_stages=True))
    assert clip.scores["median_track_radius"] > 50, "this network sees every point fly"


def test_unfit_networks_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="expected lk"):
        make_tracker("cotracker")
    with pytest.raises(InputError, match="unknown outputs"):
        read_tracks({"positions": np.zeros((1, 2, 3, 2))}, 2, False)
    pytest.importorskip("onnxruntime", reason="runs .onnx files")
    (tmp_path / "bad.onnx").write_text("x")
    with pytest.raises(InputError, match=r"--tracker .*not an ONNX network"):
        make_tracker(str(tmp_path / "bad.onnx"))
    with pytest.raises(InputError, match="exactly 8 frames"):
        make_tracker(network(tmp_path / "fixed.onnx", frames=8))


def test_both_layouts_say_where_points_are_seen():
    xy = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)  # 2 frames of 3 points
    seen = np.array([[[1, 0, 1], [0, 0, 1]]], bool)
    tracks = read_tracks({"tracks": xy, "visibility": seen}, 2, points_first=False)
    turned = read_tracks(
        {"tracks": xy.transpose(0, 2, 1, 3), "occlusion": np.where(seen, -9.0, 9.0).swapaxes(1, 2)},
        2, points_first=True,
    )  # fmt: skip
    np.testing.assert_array_equal(tracks, turned)
    np.testing.assert_array_equal(np.isfinite(tracks[..., 0]), seen[0].T)
    unsure = {"tracks": xy.transpose(0, 2, 1, 3), "occlusion": np.full((1, 3, 2), -9.0),
              "expected_dist": np.full((1, 3, 2), 9.0)}  # fmt: skip
    assert np.isnan(read_tracks(unsure, 2, points_first=True)).all()


def test_cotracker_has_to_be_sure_of_a_point():
    xy = np.zeros((1, 1, 3, 2), np.float32)
    visibility = np.float32([[[0.95, 0.8, 0.7]]])
    alone = read_tracks({"tracks": xy, "visibility": visibility}, 1, points_first=False)
    assert np.isfinite(alone[:, 0, 0]).tolist() == [True, False, False]
    both = {"tracks": xy, "visibility": visibility, "confidence": np.float32([[[0.5, 0.8, 0.99]]])}
    found = read_tracks(both, 1, points_first=False)
    assert np.isfinite(found[:, 0, 0]).tolist() == [False, True, True]
