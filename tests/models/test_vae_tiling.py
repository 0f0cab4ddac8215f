"""Tiled and sliced autoencoding: the official numerics, restated plainly, and the golden runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from see3d_jax.models.tiling import map_tiles
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import decode_vae, encode_vae, init_vae, vae_params_from_torch

QUICK = {"xla_backend_optimization_level": 0}
TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def _plain_tiles(network, x, size_in, size_out):
    """The released pipeline's loop with its in-place blending, pixel row by pixel row."""
    step, blend = int(size_in * 0.75), int(size_out * 0.25)
    rows = [
        [
            np.array(network(x[:, i : i + size_in, j : j + size_in]))
            for j in range(0, x.shape[2], step)
        ]
        for i in range(0, x.shape[1], step)
    ]
    result = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                above = rows[i - 1][j]
                extent = min(above.shape[1], tile.shape[1], blend)
                for y in range(extent):
                    a = above[:, y - extent]
                    tile[:, y] = a * (1 - y / extent) + tile[:, y] * (y / extent)
            if j > 0:
                left = row[j - 1]
                extent = min(left.shape[2], tile.shape[2], blend)
                for c in range(extent):
                    a = left[:, :, c - extent]
                    tile[:, :, c] = a * (1 - c / extent) + tile[:, :, c] * (c / extent)
        kept = size_out - blend
        result.append(np.concatenate([tile[:, :kept, :kept] for tile in row], 2))
    return np.concatenate(result, 1)


@pytest.mark.parametrize("shape", [(2, 20, 28, 3), (1, 8, 33, 3)])
def test_tiles_are_blended_as_officially(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def double(tile):  # depends on the tile as a whole, as group norms do
        return (tile - tile.mean((1, 2), keepdims=True)).repeat(2, 1).repeat(2, 2)

    out = map_tiles(double, x, 8, 16)
    assert out.shape == (shape[0], 2 * shape[1], 2 * shape[2], 3)
    np.testing.assert_allclose(out, _plain_tiles(double, x, 8, 16), atol=1e-6)


def test_a_network_without_memory_of_its_tile_gives_no_seams():
    x = np.random.default_rng(0).standard_normal((1, 21, 30, 2)).astype(np.float32)
    np.testing.assert_allclose(map_tiles(lambda tile: 3 * tile, x, 8, 8), 3 * x, atol=1e-5)


def test_small_images_and_slices_are_what_they_are_without():
    params = init_vae(TINY, 0)
    tiled = dataclasses.replace(TINY, tile_size=16, slicing=True)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)

    def both(config):
        mean, logvar = encode_vae(config, params, images)
        return mean, logvar, decode_vae(config, params, mean)

    plain, sliced = (jax.jit(lambda c=c: both(c), compiler_options=QUICK)() for c in (TINY, tiled))
    for a, b in zip(plain, sliced):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tiles_that_would_not_meet_are_refused():
    with pytest.raises(ValueError, match=r"tiles of 10 .* do not meet"):
        map_tiles(lambda tile: tile, np.zeros((1, 20, 20, 1)), 10, 5)
    with pytest.raises(ValueError, match="tile_size: must be at least 8"):
        VaeConfig(tile_size=4)


@pytest.mark.parametrize("case", ["tiled_ragged", pytest.param("tiled", marks=pytest.mark.slow)])
def test_tiled_outputs_are_the_official_ones(shared, case):
    folder = shared / "goldens/release_tiny/vae"
    spec = json.loads((folder / "config.json").read_text())
    config = VaeConfig(
        block_out_channels=spec["block_out_channels"],
        layers_per_block=spec["layers_per_block"],
        norm_num_groups=spec["norm_num_groups"],
        tile_size=spec["sample_size"],
        slicing=True,
    )
    params = vae_params_from_torch(
        load_file(folder / "diffusion_pytorch_model.safetensors"), config
    )
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
