import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.ndimage import map_coordinates

from data_prep import raft
from see3d_jax.errors import InputError
from tools.checkpoint_files import open_tensors
from tools.convert_raft import convert


def published(variant, seed=0):
    """Random tensors under the names and in the layout of the original code."""
    g = np.random.default_rng(seed)
    tensors = {}
    for name, shape in raft.parameter_shapes(variant).items():
        layer, part = name.rsplit(".", 1)
        if part == "bias":
            tensors[f"module.{layer}.bias"] = g.normal(0, 0.1, shape)
        else:
            fan = np.prod(shape[:3])
            value = g.normal(0, (1.0 / fan) ** 0.5, shape).transpose(3, 2, 0, 1)
            tensors[f"module.{layer}.weight"] = value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def add_batch_norms(tensors, seed=1):
    g = np.random.default_rng(seed)
    for name in [n for n in tensors if n.startswith("module.cnet.") and n.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        if layer == "module.cnet.conv2":
            continue
        if layer.endswith("downsample.0"):
            norms = [layer.removesuffix("downsample.0") + "norm3", layer[:-1] + "1"]
        else:
            norms = [layer[: layer.rindex("conv")] + "norm" + layer[-1]]
        width = tensors[name].shape[0]
        values = {
            "weight": g.uniform(0.5, 1.5, width), "bias": g.normal(0, 0.2, width),
            "running_mean": g.normal(0, 0.2, width), "running_var": g.uniform(0.5, 2, width),
            "num_batches_tracked": np.array(7),
        }  # fmt: skip
        for norm in norms:
            for part, value in values.items():
                kind = np.int64 if part == "num_batches_tracked" else np.float32
                tensors[f"{norm}.{part}"] = np.asarray(value, kind)
    return tensors


def opened(tensors, folder):
    save_file(tensors, folder / "raft.safetensors")
    return open_tensors(folder / "raft.safetensors")


@pytest.mark.parametrize("variant, count", [(raft.SMALL, 990_162), (raft.LARGE, 5_257_536)])
def test_published_sizes(variant, count):
    assert sum(np.prod(s) for s in raft.parameter_shapes(variant).values()) == pytest.approx(
        count, rel=0.02
    )


def test_converted_weights_load_as_their_variant(tmp_path):
    for variant in (raft.SMALL, raft.LARGE):
        parameters = convert(opened(published(variant), tmp_path))
        save_file(parameters, tmp_path / "ours.safetensors")
        found, loaded = raft.load(tmp_path / "ours.safetensors")
        assert found is variant and set(loaded) == set(parameters)


def test_batch_norms_are_folded_to_the_same_numbers(tmp_path):
    plain = published(raft.LARGE)
    folded = convert(opened(add_batch_norms(dict(plain)), tmp_path))
    with_norms = add_batch_norms(dict(plain))
    x = np.random.default_rng(3).normal(size=(1, 5, 6, 64)).astype(np.float32)
    layer = "cnet.layer1.0.conv1"
    kernel = plain[f"module.{layer}.weight"].transpose(2, 3, 1, 0)
    raw = {f"{layer}.kernel": kernel, f"{layer}.bias": plain[f"module.{layer}.bias"]}
    norm = {part: with_norms[f"module.cnet.layer1.0.norm1.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    expected = (np.asarray(raft._conv(raw, layer, x)) - norm["running_mean"]) / np.sqrt(
        norm["running_var"] + 1e-5
    ) * norm["weight"] + norm["bias"]
    np.testing.assert_allclose(raft._conv(folded, layer, x), expected, atol=2e-5)


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape"])
def test_every_tensor_is_accounted_for(spoil, tmp_path):
    tensors = published(raft.SMALL)
    name = "module.fnet.conv1.weight"
    if spoil == "missing":
        del tensors[name]
    elif spoil == "extra":
        tensors["module.surprise"] = np.zeros(3, np.float32)
    else:
        tensors[name] = np.zeros((32, 3, 5, 5), np.float32)
    with pytest.raises(InputError, match=r"lacks|surprise|expected"):
        convert(opened(tensors, tmp_path))


def test_look_up_is_bilinear_with_zeros_outside():
    g = np.random.default_rng(0)
    image = g.normal(size=(9, 11)).astype(np.float32)
    steps = np.arange(-3, 4)
    for center in ([4.3, 5.6], [0.2, 8.0], [-2.5, 3.1], [40.0, -30.0], [10.9, 0.0]):
        x, y = np.meshgrid(center[0] + steps, center[1] + steps, indexing="ij")
        expected = map_coordinates(np.pad(image, 60), [y + 60, x + 60], order=1, mode="constant")
        found = raft._window(image, np.float32(center), 3)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_upsampling_reproduces_constants_and_corners():
    flow = np.full((1, 3, 4, 2), 1.5, np.float32)
    np.testing.assert_allclose(raft._upsample_bilinear(flow), np.full((1, 24, 32, 2), 1.5))
    ramp = np.arange(4, dtype=np.float32)[None, None, :, None] * np.ones((1, 3, 4, 2), np.float32)
    fine = np.asarray(raft._upsample_bilinear(ramp))
    assert fine[0, 0, 0, 0] == 0 and fine[0, -1, -1, 0] == pytest.approx(3)
    parameters = {"update_block.mask.0.kernel": np.zeros((3, 3, 8, 256), np.float32),
                  "update_block.mask.0.bias": np.zeros(256, np.float32),
                  "update_block.mask.2.kernel": np.zeros((1, 1, 256, 576), np.float32),
                  "update_block.mask.2.bias": np.zeros(576, np.float32)}  # fmt: skip
    hidden = np.zeros((1, 3, 4, 8), np.float32)
    convex = np.asarray(raft._upsample_convex(parameters, hidden, flow))
    np.testing.assert_allclose(convex[0, 8:16, 8:24], 12.0, rtol=1e-6)  # 8 × 1.5, away from zeros


def test_a_wrong_file_is_refused(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="convert_raft"):
        raft.load(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no RAFT weights"):
        raft.load(tmp_path / "none.safetensors")


def test_recorded_flows_of_the_official_weights(shared, tmp_path):
    pytest.importorskip("torch", reason="the recorded weights are a PyTorch file")
    from tools.parity import run_all

    results = [result for result, _ in run_all(shared / "goldens", "flow:flow/36d4")]
    assert len(results) == 1 and results[0].ok, results
