"""MV-UnposeM of the paper's Table 3, in small: masked targets as they are.

    python -m see3d_jax.main --config=configs/ablations/table3_unposed_m.py \\
        --workdir=runs/unposed_m --config.data.path=POSED_CLIPS

Neither noise nor mixing: the network learns to copy what a mask leaves, and warps do not look like
that. Paper, at full size: 16.14 dB, 0.521, 0.443.
Like configs/tiny.py in everything else: minutes on two CPU cores. Train the three on the same clips
and compare them on the same warps (docs/training.md); the curves of one run alone say nothing.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.condition = "unposed_m"
    return config
