"""The UNet's context: text plus the first reference, the same for every view."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from see3d_jax.models.clip_text import ClipTextConfig, read_text_config
from see3d_jax.models.clip_vision import (
    ClipVisionConfig,
    Preprocessing,
    preprocess,
    read_preprocessing,
    read_vision_config,
)
from see3d_jax.models.context import ContextEncoder, combine_context, encode_context
from see3d_jax.models.weights import (
    apply_clip_text,
    apply_clip_vision,
    clip_text_params_from_torch,
    clip_vision_params_from_torch,
    init_clip_text,
    init_clip_vision,
)

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_context_is_text_plus_a_fifth_of_the_image_on_every_token_and_view():
    text = ClipTextConfig(**SIZES, vocab_size=10, max_position_embeddings=4)
    vision = ClipVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=8)
    encoder = ContextEncoder(
        init_clip_text(text, 0), init_clip_vision(vision, 1), text, vision, Preprocessing(8, (8, 8))
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 14, 3), np.uint8)
    ids = [3, 9, 0, 0]
    context = np.asarray(encode_context(encoder, images, 3, ids=ids))
    assert context.shape == (2, 3, 4, 8)
    states, _ = jax.jit(functools.partial(apply_clip_text, text))(
        encoder.text_params, np.array([ids])
    )
    pixels = preprocess(images, encoder.preprocessing)
    embeds, _ = jax.jit(functools.partial(apply_clip_vision, vision))(encoder.vision_params, pixels)
    for scene in range(2):
        for view in range(3):
            wanted = np.asarray(states[0]) + 0.2 * np.asarray(embeds[scene])
            np.testing.assert_allclose(context[scene, view], wanted, atol=1e-5)
    assert np.abs(context[0] - context[1]).max() > 1e-4


def test_no_image_weight_leaves_the_text():
    states, embeds = np.ones((4, 8), np.float32), np.full((1, 8), 7, np.float32)
    np.testing.assert_array_equal(combine_context(states, embeds, 2, 0.0), np.ones((1, 2, 4, 8)))


@pytest.fixture(scope="module")
def official_encoder(shared):
    folder = shared / "goldens/release_tiny"

    def read(path):
        return json.loads((folder / path).read_text())

    image_folder = "CLIP-ViT-H-14-laion2B-s32B-b79K"
    text = read_text_config(read("text_encoder/config.json"))
    vision = read_vision_config(read(f"{image_folder}/config.json"))
    return ContextEncoder(
        clip_text_params_from_torch(load_file(folder / "text_encoder/model.safetensors"), text),
        clip_vision_params_from_torch(
            load_file(folder / image_folder / "model.safetensors"), vision
        ),
        text,
        vision,
        read_preprocessing(read(f"{image_folder}/preprocessor_config.json")),
    )


@pytest.mark.parametrize("case", ["single_10", "single_50", "sparse_50_nonsquare", "sr_30"])
def test_official_context(shared, official_encoder, case):
    folder = shared / "goldens/sampler"
    spec = json.loads((folder / f"{case}.json").read_text())
    io = load_file(folder / f"{case}.safetensors")
    if "image" in io:
        image = np.moveaxis(io["image"][0], 0, -1)
    else:
        image = Image.fromarray(io["raw_images_u8"][0])
        image = image.resize((spec["width"], spec["height"]), Image.Resampling.BICUBIC)
        image = np.asarray(image, np.float32) / 127.5 - 1
    views = spec["num_frames"]
    context = encode_context(official_encoder, image[None], views, official=True)
    assert context.shape == (1, views, *io["unet_context"].shape[1:])
    # Rows 0 and 1 of the golden are the two branches of guidance; both are the same.
    for row in range(2):
        wanted = np.broadcast_to(io["unet_context"][row], context[0].shape)
        np.testing.assert_allclose(context[0], wanted, atol=1e-5)
    # Without the official truncation the picture differs by 1/255 at most, the context hardly.
    plain = encode_context(official_encoder, image[None], views)
    assert 0 < np.abs(plain - context).max() < 5e-3
