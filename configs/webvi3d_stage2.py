"""The paper's second stage: 16 views, 1 or 3 of them references, continuing stage 1.

    python -m see3d_jax.main --config=configs/webvi3d_stage2.py --workdir=runs/stage2 \\
        --config.data.path=WEBVI3D --config.init_from=runs/stage1 --config.mesh.fsdp=8

Starts from the moving average of stage 1's newest checkpoint (configs/webvi3d.py); autoencoder and
CLIP are read from the converted weights that stage 1 started from. Hardware, memory and time per
step: docs/scaling.md; in the paper part of 25 days on 114 × A100-40GB. Expected there after this
stage, on views of real scenes it never saw (Table 3, MV-UnposeT): 25.56 dB PSNR, 0.811 SSIM, 0.194
LPIPS. Not yet trained by us. Marks as in configs/webvi3d.py.
"""

import ml_collections

from configs import webvi3d


def get_config() -> ml_collections.ConfigDict:
    config = webvi3d.get_config()
    config.num_steps = 200_000  # [paper]
    config.batch_size = 228  # [paper]
    config.data.views = 16  # [paper]
    config.data.references = (1, 3)  # [paper]
    config.data.stride = (1, 6)  # so a sample spans up to 90 frames, in stage 1 up to 48 [ours]
    return config
