"""MV-Posed of the paper's Table 3, in small: warped references as the condition.

    python -m see3d_jax.main --config=configs/ablations/table3_posed.py \\
        --workdir=runs/posed --config.data.path=POSED_CLIPS

Targets are shown as the references seen through true depth and poses: what the method does without.
Needs posed clips, e.g. of `python -m data_prep.synthetic`. Paper, in full: 26.21 dB, 0.822, 0.182.
Like configs/tiny.py in everything else: minutes on two CPU cores. Train the three on the same clips
and compare them on the same warps (docs/training.md); the curves of one run alone say nothing.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.condition = "posed"
    return config
