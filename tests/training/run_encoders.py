"""The first gradient with a small autoencoder and image tower, on one device and split over eight.

Run by test_sharding.py, as run_layouts.py is. Prints JSON: {"split", "loss", "gradient"}: how many
arrays of the frozen networks no device holds whole, and relative differences from one device.
"""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import run_layouts as layouts

from see3d_jax.models.clip_vision import ClipVisionConfig
from see3d_jax.models.codec import VaeCodec
from see3d_jax.models.context import ImageContext
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import init_clip_vision, init_vae
from see3d_jax.training import gradient, settings, sharding
from see3d_jax.training.state import Frozen

VAE = VaeConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
VISION = ClipVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4, projection_dim=8,
)  # fmt: skip


def run(*layout):
    config = layouts.config_of(layout)
    spec, schedule = settings.train_spec(config), settings.noise_schedule(config)
    mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod(layout))])

    def put(tree):
        return sharding.put_whole(tree, sharding.state_shardings(tree, mesh))

    context = ImageContext(np.ones((1, 8), np.float32), init_clip_vision(VISION, 0), VISION)
    frozen = put(Frozen(VaeCodec(init_vae(VAE, 0), VAE), context))
    pixels = np.random.default_rng(0).standard_normal((layouts.ROWS, 8, 8, 3), np.float32)
    batch = sharding.put_batch(next(layouts.batches()) | {"clip_pixels": pixels}, mesh)
    step = jax.jit(functools.partial(gradient.loss_and_gradient, spec=spec, mesh=mesh))
    result = step(put(layouts.awake(spec.unet)), batch, frozen, schedule, jax.random.key(0))
    return frozen, *jax.tree.map(np.asarray, result)


if __name__ == "__main__":
    _, loss, grads = run(1, 1, 1, 1)
    frozen, loss_split, grads_split = run(1, 2, 4, 1)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(frozen))
    gradient_difference = layouts.difference(grads_split, grads)
    loss_difference = abs(float(loss_split / loss) - 1)
    print(json.dumps({"split": split, "loss": loss_difference, "gradient": gradient_difference}))
