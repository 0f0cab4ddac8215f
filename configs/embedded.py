"""The model that ships with the package: what `see3d generate` uses when no checkpoint is given.

    python -m data_prep.synthetic --output data/posed --clips 240 --seed 100
    POSED=data/posed/records
    python -m see3d_jax.main --config=configs/embedded.py --workdir=runs/embedded \\
        --config.data.mixture="(('$POSED', 1.0, 'unposed'), ('$POSED', 1.0, 'posed'))"
    python -m tools.export_tiny --workdir=runs/embedded --output=see3d_jax/assets/tiny

Four times the pixels of configs/tiny.py for the same work: blocks of 8² pixels are one latent. Half
of the clips are shown behind random masks, as in the paper; half as their references warped through
a depth that is a few percent wrong, as `see3d generate` will. docs/evidence.md has what it can do.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.num_steps = 20_000
    config.data.image_size = 128
    config.data.views = 5
    config.data.references = (1, 2, 3)
    config.data.depth_noise = 0.02
    config.data.held_out = 8
    config.codec.factor = 8
    config.codec.channels = 32
    config.model.model_channels = 48
    config.model.head_dim = 48
    config.objective.drop_probability = 0.0  # no guidance: it hurts a model this small
    config.objective.preconditioning = "filled"
    config.optimizer.learning_rate = 1e-3
    config.ema_decay = 0.999
    config.evaluation.sampler_steps = 4
    config.evaluation.lpips = "alex"
    return config
