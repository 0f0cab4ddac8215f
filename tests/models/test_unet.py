"""The multi-view UNet: the official outputs, the official size, and what it must not depend on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from see3d_jax.errors import InputError
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import (
    abstract_unet,
    apply_unet,
    init_unet,
    parameter_count,
    unet_params_from_torch,
)

TINY = UNetConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_strides=(2,),
    head_dim=8,
    context_dim=6,
    norm_groups=4,
)
# Tests run each program once or twice: compile fast rather than run fast.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def _jitted(config):
    apply = functools.partial(apply_unet, config)
    return jax.jit(apply, compiler_options=QUICK)


@functools.cache
def _awake(config):
    """Parameters without any zero-initialised layer, so that every path reaches the output."""
    leaves, tree = jax.tree.flatten(init_unet(config, 0))
    rng = np.random.default_rng(0)
    return tree.unflatten(
        [x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    )


def _tiny_inputs(views=3):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, views, 4, 6, 9), np.float32)
    t = rng.integers(0, 1000, (2, views))
    return x, t, rng.standard_normal((2, views, 5, 6), np.float32)


@pytest.mark.parametrize(
    "config, count",
    [
        (UNetConfig(), 865_925_124),  # the released model
        (UNetConfig(camera_dim=16), 867_586_564),
        (UNetConfig(in_channels=4, camera_dim=16), 867_572_164),  # MVDream
    ],
)
def test_full_models_have_exactly_the_official_size(config, count):
    assert parameter_count(abstract_unet(config)) == count


def test_parameter_names_and_shapes_are_the_released_ones(shared):
    index = json.loads((shared / "goldens/keys/see3d.unet.json").read_text())["keys"]
    ours = jax.tree_util.tree_flatten_with_path(abstract_unet(UNetConfig()))[0]
    ours = {".".join(key.key for key in path): leaf.shape for path, leaf in ours}
    to_torch = {1: lambda s: s, 2: lambda s: s[::-1], 4: lambda s: (s[3], s[2], s[0], s[1])}
    assert {name: list(to_torch[len(s)](s)) for name, s in ours.items()} == index


GOLDENS = [
    ("see3d_4level", "f4"),
    ("see3d_4level", "f4_tmix"),
    ("see3d_1level_64ch", "f5_nonsquare"),
    ("mvdream_camera", "f4_b2"),
]
GOLDENS += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [
        ("see3d_4level", "f1"),
        ("see3d_4level", "f6"),
        ("see3d_4level", "f4_nonsquare"),
        ("see3d_4level", "f4_b2"),
        ("see3d_1level_64ch", "f1"),
        ("mvdream_camera", "f1"),
        ("mvdream_camera", "f4"),
    ]
]


@pytest.mark.parametrize("name, case", GOLDENS)
def test_outputs_are_those_of_the_official_network(shared, name, case):
    folder = shared / "goldens/unet"
    spec = json.loads((folder / f"{name}.json").read_text())
    official = spec["config"]
    config = UNetConfig(
        in_channels=official["in_channels"],
        out_channels=official["out_channels"],
        model_channels=official["model_channels"],
        channel_mult=official["channel_mult"],
        num_res_blocks=official["num_res_blocks"],
        attention_strides=official["attention_resolutions"],
        head_dim=official["num_head_channels"],
        context_dim=official["context_dim"],
        camera_dim=official.get("camera_dim"),
    )
    params = unet_params_from_torch(load_file(folder / f"{name}.weights.safetensors"), config)
    io = load_file(folder / f"{name}.io.safetensors")
    io = {key.removeprefix(f"{case}."): x for key, x in io.items() if key.startswith(f"{case}.")}
    views = spec["cases"][case]["num_frames"]
    io = {key: x.reshape(-1, views, *x.shape[1:]) for key, x in io.items()}
    inputs = (np.moveaxis(io["x"], 2, -1), io["timesteps"], io["context"], io.get("camera"))
    out = _jitted(config)(params, *inputs)
    np.testing.assert_allclose(out, np.moveaxis(io["out"], 2, -1), rtol=0, atol=2e-5)


def test_views_are_an_unordered_set_that_see_each_other():
    x, t, context = _tiny_inputs()
    run, params = _jitted(TINY), _awake(TINY)
    out = run(params, x, t, context)
    order = np.array([2, 0, 1])
    shuffled = run(params, x[:, order], t[:, order], context[:, order])
    np.testing.assert_allclose(shuffled, out[:, order], atol=2e-5)
    changed = x.copy()
    changed[:, 2] += 1
    other = run(params, changed, t, context)
    assert np.abs(other[:, 0] - out[:, 0]).max() > 1e-3, "views 0 and 2 do not see each other"
    changed = x.copy()
    changed[1] += 1
    other = run(params, changed, t, context)
    np.testing.assert_array_equal(other[0], out[0])  # samples of a batch stay apart


def test_recomputing_blocks_changes_no_gradient():
    x, t, context = _tiny_inputs()

    def gradient(config):
        def loss(params):
            return jnp.square(apply_unet(config, params, x, t, context)).mean()

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(_awake(one_level))

    one_level = dataclasses.replace(TINY, channel_mult=(1,), attention_strides=())
    chunked = dataclasses.replace(one_level, attention_backend="chunked")
    kept = gradient(chunked)
    recomputed = gradient(dataclasses.replace(chunked, remat=True))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept)), "a weight has no gradient"


def test_fresh_weights_repeat_and_start_by_predicting_zero():
    first, again, other = init_unet(TINY, 3), init_unet(TINY, 3), init_unet(TINY, 4)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(
        first["middle_block"]["0"]["in_layers"]["2"]["weight"],
        other["middle_block"]["0"]["in_layers"]["2"]["weight"],
    )
    assert not np.any(_jitted(TINY)(first, *_tiny_inputs()))


def _as_torch(params):
    to_torch = {1: lambda x: x, 2: lambda x: x.T, 4: lambda x: x.transpose(3, 2, 0, 1)}
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        ".".join(key.key for key in path): to_torch[leaf.ndim](np.asarray(leaf))
        for path, leaf in leaves
    }


def test_torch_weights_load_whole_or_not_at_all():
    params = _awake(TINY)
    tensors = _as_torch(params)
    jax.tree.map(np.testing.assert_array_equal, unet_params_from_torch(tensors, TINY), params)

    with pytest.raises(InputError, match=r"1 missing \[out.2.bias\].*1 left over \[surplus\]"):
        broken = {**tensors, "surplus": np.zeros(3)}
        del broken["out.2.bias"]
        unet_params_from_torch(broken, TINY)
    with pytest.raises(InputError, match=r"1 wrong shapes \[time_embed.0.weight"):
        unet_params_from_torch({**tensors, "time_embed.0.weight": np.zeros((64, 15))}, TINY)


@pytest.mark.parametrize(
    "field, change, message",
    [
        (0, lambda x: x[..., :8], r"x: expected \[B, V, h, w, 9\]"),
        (0, lambda x: x[:, :, :3], "multiples of 2"),
        (1, lambda t: t[:, 0], r"t: expected \[B, V\]"),
        (2, lambda c: c[..., :5], "context: expected"),
    ],
)
def test_inputs_of_the_wrong_shape_are_named(field, change, message):
    inputs = list(_tiny_inputs())
    inputs[field] = change(inputs[field])
    with pytest.raises(ValueError, match=message):
        apply_unet(TINY, abstract_unet(TINY), *inputs)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channel_mult": (2, 4)}, "channel_mult"),
        ({"head_dim": 48}, "head_dim"),
        ({"norm_groups": 30}, "norm_groups"),
        ({"dtype": "float64"}, "dtype"),
        ({"attention_backend": "fast"}, "attention_backend"),
        ({"view_exchange": "mail"}, "view_exchange"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)
