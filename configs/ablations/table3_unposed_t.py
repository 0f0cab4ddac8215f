"""MV-UnposeT of the paper's Table 3, in small: the method itself.

    python -m see3d_jax.main --config=configs/ablations/table3_unposed_t.py \\
        --workdir=runs/unposed_t --config.data.path=POSED_CLIPS

Targets are shown behind random masks, noised and mixed with X_t, so that the network cannot lean on
the shape of the corruption. Paper, at full size: 25.56 dB, 0.811, 0.194.
Like configs/tiny.py in everything else: minutes on two CPU cores. Train the three on the same clips
and compare them on the same warps (docs/training.md); the curves of one run alone say nothing.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.condition = "unposed_t"
    return config
