"""Codecs: what an image loses on the way to latents and back; the VAE against the official one."""

import json

import jax
import numpy as np
import pytest
import skimage.data
import skimage.transform
from safetensors.numpy import load_file

from see3d_jax.models.codec import DctCodec, VaeCodec, build_codec
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import (
    abstract_vae,
    decode_vae,
    encode_vae,
    init_vae,
    parameter_count,
    vae_params_from_torch,
)

QUICK = {"xla_backend_optimization_level": 0}
TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def _photos(size):
    """[3, size, size, 3] float32 in [−1, 1]: the middles of three photographs."""
    crops = []
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()):
        side = min(photo.shape[:2])
        top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
        crop = photo[top : top + side, left : left + side] / 255
        crops.append(skimage.transform.resize(crop, (size, size), anti_aliasing=True) * 2 - 1)
    return np.stack(crops).astype(np.float32)


def _psnr(a, b):
    return float(10 * np.log10(4 / np.mean(np.square(a - b), (1, 2, 3))).mean())


@pytest.mark.parametrize(
    "factor, channels, size, least",
    [(4, 12, 64, 30), (4, 12, 128, 32), (4, 8, 128, 29), (8, 24, 128, 28), (2, 6, 64, 34)],
)
def test_dct_keeps_photographs_recognisable(factor, channels, size, least):
    photos, codec = _photos(size), DctCodec(factor, channels)
    latents = codec.encode(photos)
    assert latents.shape == (3, size // factor, size // factor, channels)
    assert _psnr(codec.decode(latents), photos) > least


def test_dct_latents_outweigh_the_noise_of_the_condition_and_coarse_ones_most():
    deviation = np.asarray(DctCodec(4, 12).encode(_photos(128))).std((0, 1, 2))
    assert 2.0 < np.sqrt(np.mean(deviation**2)) < 3.0, deviation
    assert deviation.argmax() == 0 and deviation.min() > 0.58, deviation
    stated = DctCodec(4, 12).deviation
    assert np.abs(np.log(stated / deviation)).max() < np.log(1.6), stated / deviation


def test_dct_with_all_coefficients_is_lossless_and_energy_stays_local():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 12, 3)).astype(np.float32)
    codec = DctCodec(4, 48)
    latents = codec.encode(images)
    np.testing.assert_allclose(codec.decode(latents), images, atol=1e-5)
    # A latent pixel belongs to one block of image pixels: masks can be resized block by block.
    images[..., :4, :4, :] = 0
    changed = np.abs(codec.encode(images) - latents).max((0, 1, 4))
    assert changed[0, 0] > 0 and not changed[1:].any() and not changed[0, 1:].any()


def test_a_grey_image_has_only_its_mean():
    latents = np.asarray(DctCodec(4, 12).encode(np.full((8, 8, 3), 0.5, np.float32)))
    assert np.all(latents[..., 0] > 0.5) and np.abs(latents[..., 1:]).max() < 1e-5


def test_codecs_pass_through_jit():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    vae = VaeCodec(init_vae(TINY, 0), TINY)
    both = jax.jit(
        lambda codec, x, key: (
            codec.encode(x),
            codec.encode(x, key),
            codec.decode(codec.encode(x)),
        ),
        compiler_options=QUICK,
    )
    for codec, factor in ((DctCodec(4, 12), 4), (vae, 2)):
        assert codec.factor == factor
        mode, drawn, back = both(codec, images, jax.random.key(0))
        assert mode.shape == drawn.shape == (2, 8 // factor, 12 // factor, codec.channels)
        assert back.shape == images.shape
        assert np.array_equal(mode, drawn) == isinstance(codec, DctCodec)


def test_a_codec_is_built_from_its_description():
    assert build_codec({"kind": "dct", "factor": 8, "channels": 24}) == DctCodec(8, 24)
    with pytest.raises(ValueError, match=r"codec\.kind"):
        build_codec({"kind": "jpeg"})
    with pytest.raises(ValueError, match=r"unknown fields \['chanels'\]"):
        build_codec({"kind": "dct", "chanels": 24})
    with pytest.raises(ValueError, match="1 to 48"):
        build_codec({"kind": "dct", "factor": 4, "channels": 49})
    with pytest.raises(ValueError, match="weights"):
        build_codec({"kind": "vae"})
    with pytest.raises(ValueError, match="multiples of 4"):
        DctCodec(4, 12).encode(np.zeros((10, 8, 3)))


def test_the_full_vae_has_exactly_the_official_size():
    assert parameter_count(abstract_vae(VaeConfig())) == 83_653_863


@pytest.mark.parametrize(
    "case",
    ["nonsquare", *(pytest.param(c, marks=pytest.mark.slow) for c in ("square", "odd_latent"))],
)
def test_vae_outputs_are_the_official_ones(shared, case):
    folder = shared / "goldens/release_tiny/vae"
    spec = json.loads((folder / "config.json").read_text())
    config = VaeConfig(
        block_out_channels=spec["block_out_channels"],
        layers_per_block=spec["layers_per_block"],
        norm_num_groups=spec["norm_num_groups"],
    )
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    params = vae_params_from_torch(tensors, config)
    io = load_file(shared / "goldens/vae/vae4.safetensors")
    wanted = {
        name: np.moveaxis(io[f"{case}.{name}"], 1, -1)
        for name in ("image", "mean", "logvar", "z", "decoded")
    }
    encode = jax.jit(lambda p, x: encode_vae(config, p, x), compiler_options=QUICK)
    decode = jax.jit(lambda p, z: decode_vae(config, p, z), compiler_options=QUICK)
    mean, logvar = encode(params, wanted["image"])
    np.testing.assert_allclose(mean, wanted["mean"], rtol=0, atol=3e-5)
    np.testing.assert_allclose(logvar, wanted["logvar"], rtol=0, atol=3e-5)
    np.testing.assert_allclose(decode(params, wanted["z"]), wanted["decoded"], rtol=0, atol=3e-5)
