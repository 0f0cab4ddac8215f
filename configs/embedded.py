"""The model that ships with the package: what `see3d generate` uses when no checkpoint is given.

    python -m data_prep.synthetic --output data/posed --clips 80 --seed 100
    python -m see3d_jax.main --config=configs/embedded.py --workdir=runs/embedded \\
        --config.data.path=data/posed/records
    python -m tools.export_tiny --workdir=runs/embedded --output=see3d_jax/assets/tiny

Four times the pixels of configs/tiny.py for the same work: blocks of 8² pixels are one latent. Its
condition is the one of use, references warped through a depth that is a few percent wrong, as it is
(the paper's MV-Posed): a model this small has nothing left to spend on undoing the noise that keeps
a large one from trusting warps too much. LPIPS keeps the holes from being a blurred mean.
docs/evidence.md has what it can do.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.num_steps = 20_000
    config.condition = "posed"
    config.data.image_size = 128
    config.data.views = 5
    config.data.references = (1, 2, 3)
    config.data.depth_noise = 0.02
    config.data.stride = (2, 6)
    config.data.held_out = 8
    config.codec.factor = 8
    config.codec.channels = 32
    config.model.model_channels = 48
    config.model.head_dim = 48
    config.objective.drop_probability = 0.0  # no guidance: it hurts a model this small
    config.objective.preconditioning = "filled"
    config.objective.lpips = 8.0  # with 2.0 holes stayed worse than Telea's by LPIPS
    config.optimizer.learning_rate = 1e-3
    config.ema_decay = 0.999
    config.evaluation.sampler_steps = 1  # more steps: livelier, and further from the truth
    config.evaluation.lpips = "alex"
    return config
