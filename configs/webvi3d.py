"""The paper's first training stage at full size: 866 M parameters, 512² images, 5 views.

    python -m tools.convert_mvdream --input sd-v2.1-base-4view.pt --output weights/mvdream \\
        --tokenizer stable-diffusion-2-1/tokenizer --image-encoder CLIP-ViT-H-14-laion2B-s32B-b79K
    python -m see3d_jax.main --config=configs/webvi3d.py --workdir=runs/stage1 \\
        --config.data.path=WEBVI3D --config.init_from=weights/mvdream --config.mesh.fsdp=8

UNet, autoencoder and CLIP start from the converted MVDream; only the UNet is trained. Then
configs/webvi3d_stage2.py (16 views) and configs/superres.py (1024²) continue. Hardware in the
paper: 114 × A100-40GB, 25 days over all stages; memory and time per step on other machines:
docs/scaling.md. Nobody has published results of stage 1 alone, and we have not trained it.

Values are marked [paper], [code] (official release) or [ours] (nobody published it).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 120_000  # [paper] stage 1
    config.batch_size = 560  # clips, over all devices [paper]
    config.init_from = ""  # folder of tools.convert_mvdream, --config.init_from=…
    config.init_unet = ""  # which UNet of that folder, if it holds several
    config.trainable = "all"  # [paper]; or a regex over parameter paths
    config.condition = "unposed_t"  # [paper]; or "unposed_m", "posed", "superres"

    config.data = ml_collections.ConfigDict()
    config.data.path = ""  # folder of shards, --config.data.path=…
    config.data.mixture = ()  # instead: (("folder", weight, "unposed" or "posed"), …)
    config.data.image_size = 512  # pixels, square [paper]
    config.data.aspects = ()  # instead: ((height, width), …), one of them per step
    config.data.views = 5  # references and targets [paper]
    config.data.references = (1,)  # [paper]
    config.data.stride = (1, 12)  # frames between neighbouring views [ours]
    config.data.hole_range = (0.1, 0.9)  # share of missing pixels on targets [ours]
    config.data.depth_noise = 0.0  # deviation of log depth that posed clips are warped through
    config.data.latents = False  # True: read clean latents of tools.encode_latents
    config.data.held_out = 8  # source videos kept for evaluation [ours]
    config.data.threads = 16  # decoding threads
    config.data.workers = 8  # decoding processes

    config.codec = ml_collections.ConfigDict()
    config.codec.kind = "vae"  # the SD autoencoder of init_from, factor 8, frozen [code]
    config.codec.dtype = "bfloat16"  # compute [ours]; see docs/training.md for its error
    config.codec.slicing = True  # image by image, to save memory [ours]

    config.model = ml_collections.ConfigDict()  # models.unet.UNetConfig; SD-2.1 / MVDream [code]
    config.model.in_channels = 9  # X_t (4), V_t (4), mask [paper, code]
    config.model.out_channels = 4
    config.model.model_channels = 320
    config.model.channel_mult = (1, 2, 4, 4)
    config.model.num_res_blocks = 2
    config.model.attention_strides = (1, 2, 4)
    config.model.head_dim = 64
    config.model.context_dim = 1024
    config.model.norm_groups = 32
    config.model.dtype = "bfloat16"  # compute; parameters stay float32 [paper]
    config.model.remat = True
    config.model.view_exchange = "gather"  # "ring": less memory for very many tokens
    config.model.attention_backend = "auto"  # the device's best; see models/attention.py

    config.context = ml_collections.ConfigDict()  # what cross-attention reads
    config.context.tokens = 77  # [code]
    config.context.image = True  # text("") + 0.2 · CLIP of the first reference [code]
    config.context.dtype = "bfloat16"  # what CLIP computes in [ours]

    config.schedule = ml_collections.ConfigDict()  # diffusion.schedule.make_schedule
    config.schedule.kind = "linear"  # [paper]
    config.schedule.beta_start = 0.00085  # [code]
    config.schedule.beta_end = 0.012  # [code]
    config.schedule.zero_snr = True  # [code]
    config.schedule.prediction = "v"  # epsilon is undefined at zero SNR

    config.objective = ml_collections.ConfigDict()  # diffusion.loss.diffusion_loss
    config.objective.drop_probability = 0.1  # [paper]
    config.objective.weight_form = "code"  # W_t [code]
    config.objective.beta = 0.2  # t' = ⌊0.2·t⌋ [paper, code]
    config.objective.weighting = "prediction"  # or "sample", "min_snr"; diffusion.loss
    config.objective.preconditioning = "none"  # as released; or "gaussian", diffusion.precondition
    config.objective.lpips = 0.0  # weight of LPIPS in the holes, needs '.[metrics]' [ours]

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-5  # [paper]
    config.optimizer.warmup_steps = 1000  # [ours]
    config.optimizer.b1 = 0.9  # [ours]
    config.optimizer.b2 = 0.999  # [ours]
    config.optimizer.eps = 1e-8  # [ours]
    config.optimizer.weight_decay = 1e-2  # [ours]
    config.optimizer.clip_norm = 1.0  # [ours]
    config.ema_decay = 0.9999  # EMA weights are released [code], decay [ours]
    config.accumulate = 1  # parts that a batch is taken in, one after the other
    config.max_skipped_in_row = 20  # steps without a finite gradient, then the run stops [ours]

    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "view": 1, "tensor": 1})

    config.log_every = 50  # steps
    config.checkpoint_every = 1000  # steps
    config.keep_checkpoints = 3
    config.keep_every = 0  # steps; multiples of it are kept for ever; 0 = none
    config.sample_every = 5000  # steps; 0 = never
    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.loss_buckets = 10  # held-out loss is reported per range of timesteps
    config.evaluation.lpips = "alex"  # needs pip install '.[metrics]'; "" leaves it out
    config.evaluation.sampler_steps = 50
    config.evaluation.guidance = 2.0  # [code]
    config.wandb_project = ""  # also log to Weights & Biases; needs pip install '.[log]'
    return config
