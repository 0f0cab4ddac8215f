"""CLIP's towers: the official outputs and sizes, a plain restatement, and what they must ignore."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf

from see3d_jax.errors import InputError
from see3d_jax.models.clip_text import ClipTextConfig, read_text_config
from see3d_jax.models.clip_vision import (
    ClipVisionConfig,
    Preprocessing,
    preprocess,
    read_preprocessing,
    read_vision_config,
)
from see3d_jax.models.weights import (
    abstract_clip_text,
    abstract_clip_vision,
    apply_clip_text,
    apply_clip_vision,
    clip_text_params_from_torch,
    clip_vision_params_from_torch,
    parameter_count,
)

SMALL = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
TEXT = ClipTextConfig(**SMALL, vocab_size=30, max_position_embeddings=9)
VISION = ClipVisionConfig(
    **SMALL, hidden_act="quick_gelu", image_size=12, patch_size=4, projection_dim=7
)
# Tests run each program once or twice: compile fast rather than run fast.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def _jitted(apply, config):
    return jax.jit(functools.partial(apply, config), compiler_options=QUICK)


def _torch_shapes(abstract):
    to_torch = {1: lambda s: s, 2: lambda s: s[::-1], 4: lambda s: (s[3], s[2], s[0], s[1])}
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    return {
        ".".join(key.key for key in path): to_torch[leaf.ndim](leaf.shape) for path, leaf in leaves
    }


def _random_tensors(abstract, seed=0):
    """Random weights under PyTorch names and in PyTorch layouts; about unit gain per layer."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 4))).astype(np.float32)
        for name, shape in _torch_shapes(abstract).items()
    }


# --- the plain restatement, float64, on PyTorch layouts -------------------------------------------


def _norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T.astype(np.float64) + w[f"{name}.bias"]


def _layers(w, config, x, prefix, causal):
    """One sample [tokens, width], one head and one layer at a time."""
    size = config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        name = f"{prefix}.encoder.layers.{index}"
        y = _norm(w, f"{name}.layer_norm1", x)
        q, k, v = (_linear(w, f"{name}.self_attn.{one}_proj", y) for one in "qkv")
        heads = []
        for start in range(0, config.hidden_size, size):
            at = slice(start, start + size)
            weights = np.exp(q[:, at] @ k[:, at].T / np.sqrt(size))
            weights = np.tril(weights) if causal else weights
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, at])
        x = x + _linear(w, f"{name}.self_attn.out_proj", np.concatenate(heads, 1))
        y = _linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.layer_norm2", x))
        if config.hidden_act == "gelu":
            y = y * (1 + erf(y / np.sqrt(2))) / 2
        else:
            y = y / (1 + np.exp(-1.702 * y))
        x = x + _linear(w, f"{name}.mlp.fc2", y)
    return x


# --- text -----------------------------------------------------------------------------------------


def _text(seed=0):
    tensors = _random_tensors(abstract_clip_text(TEXT), seed)
    return tensors, clip_text_params_from_torch(tensors, TEXT)


IDS = np.array([[1, 2, 3, 4, 5, 6, 0, 0, 0], [7, 29, 7, 0, 0, 0, 0, 0, 0]])


def test_text_states_are_those_of_the_restatement():
    w, params = _text()
    got, states = _jitted(apply_clip_text, TEXT)(params, IDS)
    name = "text_model.embeddings"
    for row, ids in enumerate(IDS):
        x = w[f"{name}.token_embedding.weight"][ids] + w[f"{name}.position_embedding.weight"]
        x = _layers(w, TEXT, x, "text_model", causal=True)
        np.testing.assert_allclose(states[-1][row], x, atol=1e-5)
        np.testing.assert_allclose(got[row], _norm(w, "text_model.final_layer_norm", x), atol=1e-5)


def test_text_states_depend_on_earlier_tokens_only():
    _, params = _text()
    before, _ = _jitted(apply_clip_text, TEXT)(params, IDS)
    changed = IDS.copy()
    changed[0, 4] = 11
    after, _ = _jitted(apply_clip_text, TEXT)(params, changed)
    difference = np.abs(np.asarray(after - before)).max(-1)
    assert difference[0, :4].max() == 0 and difference[1].max() == 0
    assert difference[0, 4:].min() > 1e-4  # also over padding, which is not masked


def test_text_longer_than_the_positions_is_refused():
    _, params = _text()
    with pytest.raises(ValueError, match=r"ids: expected \[N, at most 9\]"):
        apply_clip_text(TEXT, params, np.zeros((1, 10), np.int32))


def test_official_text_states(shared):
    folder = shared / "goldens/release_tiny/text_encoder"
    config = read_text_config(json.loads((folder / "config.json").read_text()))
    params = clip_text_params_from_torch(load_file(folder / "model.safetensors"), config)
    io = load_file(shared / "goldens/clip/text.safetensors")
    got, states = _jitted(apply_clip_text, config)(params, io["ids"])
    np.testing.assert_allclose(got, io["last_hidden_state"], atol=1e-5)
    for index, state in enumerate(states):
        np.testing.assert_allclose(state, io[f"hidden_{index}"], atol=1e-5)


# --- image ----------------------------------------------------------------------------------------


def _vision(seed=0, config=VISION):
    tensors = _random_tensors(abstract_clip_vision(config), seed)
    return tensors, clip_vision_params_from_torch(tensors, config)


def _pixels(count=2):
    return np.random.default_rng(5).standard_normal((count, 12, 12, 3), np.float32)


def test_image_embeddings_are_those_of_the_restatement():
    w, params = _vision()
    pixels = _pixels()
    got, tokens = _jitted(apply_clip_vision, VISION)(params, pixels)
    name = "vision_model.embeddings"
    kernel = w[f"{name}.patch_embedding.weight"].transpose(2, 3, 1, 0).reshape(-1, 12)
    for row, picture in enumerate(pixels):
        patches = [
            picture[i : i + 4, j : j + 4].ravel() @ kernel for i in (0, 4, 8) for j in (0, 4, 8)
        ]
        x = np.stack([w[f"{name}.class_embedding"], *patches])
        x = _norm(w, "vision_model.pre_layrnorm", x + w[f"{name}.position_embedding.weight"])
        x = _layers(w, VISION, x, "vision_model", causal=False)
        np.testing.assert_allclose(tokens[row], x, atol=1e-5)
        x = _norm(w, "vision_model.post_layernorm", x[0])
        np.testing.assert_allclose(got[row], w["visual_projection.weight"] @ x, atol=1e-5)


def test_without_positions_the_order_of_patches_does_not_matter():
    tensors, params = _vision()
    name = "vision_model.embeddings.position_embedding.weight"
    blind = clip_vision_params_from_torch({**tensors, name: np.zeros_like(tensors[name])}, VISION)
    pixels = _pixels()
    blocks = pixels.reshape(2, 3, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 9, 4, 4, 3)
    blocks = blocks[:, np.random.default_rng(0).permutation(9)]
    shuffled = blocks.reshape(2, 3, 3, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(pixels.shape)
    apply = _jitted(apply_clip_vision, VISION)
    np.testing.assert_allclose(apply(blind, pixels)[0], apply(blind, shuffled)[0], atol=1e-5)
    assert np.abs(apply(params, pixels)[0] - apply(params, shuffled)[0]).max() > 1e-3


def test_half_precision_still_returns_float32():
    config = ClipVisionConfig(**SMALL, image_size=12, patch_size=4, dtype="bfloat16")
    out = jax.eval_shape(
        functools.partial(apply_clip_vision, config), abstract_clip_vision(config), _pixels()
    )
    assert {x.dtype for x in out} == {np.dtype("float32")}


def test_official_image_embeddings(shared):
    folder = shared / "goldens/release_tiny/CLIP-ViT-H-14-laion2B-s32B-b79K"
    config = read_vision_config(json.loads((folder / "config.json").read_text()))
    params = clip_vision_params_from_torch(load_file(folder / "model.safetensors"), config)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings = read_preprocessing(settings)
    io = load_file(shared / "goldens/clip/vision.safetensors")
    for index in range(4):
        pixels = preprocess(io[f"{index}.u8"][None], settings, official=True)
        official = np.moveaxis(io[f"{index}.pixel_values_tiny_pipeline"], 1, -1)
        np.testing.assert_allclose(pixels, official, atol=1e-5)
        embeds, tokens = _jitted(apply_clip_vision, config)(params, pixels)
        np.testing.assert_allclose(embeds, io[f"{index}.image_embeds"], atol=1e-5)
        np.testing.assert_allclose(tokens, io[f"{index}.last_hidden_state"], atol=1e-5)
    full = preprocess(io["0.u8"][None], official=True)
    np.testing.assert_allclose(
        full, np.moveaxis(io["0.pixel_values_224_pipeline"], 1, -1), atol=1e-5
    )
    plain = preprocess(io["3.u8"][None])
    np.testing.assert_allclose(
        plain, np.moveaxis(io["3.pixel_values_224_plain_u8"], 1, -1), atol=1e-5
    )


# --- preparing pictures ---------------------------------------------------------------------------

PLAIN = Preprocessing(16, (16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_every_byte_value_survives_unless_officially_truncated():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    as_floats = values.astype(np.float32) / 127.5 - 1
    for images in (values, as_floats):
        exact = preprocess(images, PLAIN)[0, ..., 0].ravel() * 255
        np.testing.assert_allclose(exact, np.arange(256), atol=1e-4)
        official = preprocess(images, PLAIN, official=True)[0, ..., 0].ravel() * 255
        darker = (np.arange(256) > 0) & (np.arange(256) < 64)
        np.testing.assert_allclose(official, np.arange(256) - darker, atol=1e-4)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_middle_of_a_long_picture_is_kept(axis):
    ramp = np.broadcast_to(np.linspace(0, 255, 48), (32, 48)).round().astype(np.uint8)
    ramp = ramp if axis == 2 else ramp.T
    cut = preprocess(ramp[None, ..., None].repeat(3, -1), PLAIN)
    assert cut.shape == (1, 16, 16, 3)
    profile = cut.mean((0, 3)).mean(0 if axis == 2 else 1)
    assert profile.mean() == pytest.approx(0.5, abs=0.005)
    assert profile[-1] - profile[0] == pytest.approx(15 / 24, abs=0.02)  # 24 × 16 after resizing


@pytest.mark.parametrize("bad", [1.1, np.nan])
def test_floats_outside_the_range_are_refused(bad):
    images = np.zeros((1, 8, 8, 3), np.float32)
    images[0, 3, 3, 1] = bad
    with pytest.raises(ValueError, match="expected floats in"):
        preprocess(images)


def test_old_and_new_forms_of_the_preprocessor_file_mean_the_same():
    new = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "resample": 3}
    assert read_preprocessing(new) == read_preprocessing({"size": 56, "crop_size": 56})
    with pytest.raises(InputError, match="resample must be 3"):
        read_preprocessing({**new, "resample": 2})
    with pytest.raises(InputError, match="size"):
        read_preprocessing({"size": {"height": 56, "width": 56}})


# --- configurations and names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "abstract, count",
    [
        (abstract_clip_text(ClipTextConfig()), 340_387_840),
        (abstract_clip_vision(ClipVisionConfig()), 632_076_800),
        (abstract_clip_vision(ClipVisionConfig(projection_dim=None)), 630_766_080),
    ],
    ids=["text", "image", "image_without_projection"],
)
def test_full_towers_have_exactly_the_official_size(abstract, count):
    assert parameter_count(abstract) == count


@pytest.mark.parametrize(
    "name, kind",
    [
        ("diffusers.text_encoder", "text"),
        ("clip_h.vision_with_projection", "vision"),
        ("mvdream_diffusers.image_encoder", "bare vision"),
    ],
)
def test_names_and_shapes_are_the_published_ones(shared, name, kind):
    file = json.loads((shared / f"goldens/keys/{name}.json").read_text())
    if kind == "text":
        abstract = abstract_clip_text(read_text_config(file["config"]))
    else:
        config = read_vision_config(file["config"])
        if kind == "bare vision":
            config = ClipVisionConfig(projection_dim=None)
        abstract = abstract_clip_vision(config)
    assert {key: list(shape) for key, shape in _torch_shapes(abstract).items()} == file["keys"]


def test_each_tower_is_found_in_a_file_of_both():
    text, vision = _text()[0], _vision()[0]
    extra = {
        "logit_scale": np.float32(1),
        "text_projection.weight": np.ones((7, 12), np.float32),
        "text_model.embeddings.position_ids": np.arange(9)[None],
        "vision_model.embeddings.position_ids": np.arange(10)[None],
    }
    both = {**text, **vision, **extra}
    for kind, apart, whole in (
        ("text", _text()[1], clip_text_params_from_torch(both, TEXT)),
        ("vision", _vision()[1], clip_vision_params_from_torch(both, VISION)),
    ):
        same = jax.tree.map(np.array_equal, apart, whole)
        assert all(jax.tree.leaves(same)), kind


def test_missing_and_left_over_weights_are_named():
    tensors, _ = _text()
    tensors["text_model.encoder.layers.2.layer_norm1.bias"] = tensors.pop(
        "text_model.final_layer_norm.bias"
    )
    with pytest.raises(InputError) as caught:
        clip_text_params_from_torch(tensors, TEXT)
    assert "1 missing [text_model.final_layer_norm.bias]" in str(caught.value)
    assert "1 left over [text_model.encoder.layers.2.layer_norm1.bias]" in str(caught.value)


def test_configurations_are_read_alone_or_out_of_a_file_of_both():
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14, "hidden_act": "gelu"}
    vision |= {"intermediate_size": 5120, "num_attention_heads": 16, "unknown": 1}
    both = {"projection_dim": 1024, "vision_config": {**vision, "projection_dim": 512}}
    assert read_vision_config(both) == ClipVisionConfig()
    assert read_vision_config({**vision, "projection_dim": 1024}) == ClipVisionConfig()
    # What a file leaves out has the values of transformers, not ours.
    assert read_text_config({}).hidden_act == "quick_gelu"
    with pytest.raises(InputError, match="hidden_act: expected one of"):
        read_text_config({"hidden_act": "relu"})
    with pytest.raises(InputError, match="5 heads do not divide"):
        read_vision_config({**vision, "num_attention_heads": 5, "hidden_size": 12})
