"""A small multi-view model that trains on two CPU cores in minutes.

    python -m see3d_jax.main --config=configs/tiny.py --workdir=DIR --config.data.path=CLIPS

Everything of the paper's training at a size that fits: 64² images, a fixed DCT codec instead of the
VAE, 4 views of which 1 or 2 are references, no text or image embedding. It learns to fill masked
views from their references. docs/training.md ("What the tiny config learns") has what 5,400 steps,
34 CPU minutes, give: 1.9 dB more than copying the nearest reference, patches of the right colour in
the holes.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 1500
    config.batch_size = 4  # small for the sake of more steps; not compared with others
    config.init_from = ""  # converted weights, earlier workdir, packed model; "": scratch
    config.init_unet = ""  # which UNet of converted weights, if they hold several
    config.trainable = "all"  # or a regex over parameter paths: only what it matches is trained
    config.condition = "unposed_t"  # or "unposed_m", "posed", "superres"; see docs/training.md

    config.data = ml_collections.ConfigDict()
    config.data.path = ""  # folder of shards, --config.data.path=…
    config.data.mixture = ()  # instead: (("folder", weight, "unposed" or "posed"), …)
    config.data.image_size = 64  # pixels, square
    config.data.aspects = ()  # instead: ((height, width), …), one of them per step
    config.data.views = 4  # references and targets
    config.data.references = (1, 2)  # numbers to draw from
    config.data.stride = (3, 8)  # frames between neighbouring views; near ones are easily copied
    config.data.hole_range = (0.1, 0.9)  # share of missing pixels on targets
    config.data.depth_noise = 0.0  # deviation of log depth that posed clips are warped through
    config.data.latents = False  # True: read clean latents of tools.encode_latents
    config.data.held_out = 4  # source videos kept for evaluation
    config.data.threads = 2  # decoding threads
    config.data.workers = 0  # decoding processes instead, if > 0

    # 6 coefficients can show 26.1 dB and got 14.4 in 110 s; 12 can show 30.5 and got 13.5.
    config.codec = ml_collections.ConfigDict({"kind": "dct", "factor": 4, "channels": 8})
    channels = config.codec.get_ref("channels")

    config.model = ml_collections.ConfigDict()  # models.unet.UNetConfig
    config.model.in_channels = 2 * channels + 1  # X_t, V_t, mask
    config.model.out_channels = channels
    config.model.model_channels = 32  # 1.0 M parameters: more steps beat more width here
    config.model.channel_mult = (1, 2)  # two levels compile faster; quality not compared
    config.model.num_res_blocks = 1
    config.model.attention_strides = (2,)
    config.model.head_dim = 32
    config.model.context_dim = 8
    config.model.norm_groups = 16
    config.model.dtype = "float32"
    config.model.remat = False
    config.model.view_exchange = "gather"  # "ring": less memory for very many tokens
    config.model.attention_backend = "auto"  # the device's best; see models/attention.py

    config.context = ml_collections.ConfigDict()  # what cross-attention reads
    config.context.tokens = 1
    config.context.image = False  # zeros; True: CLIP of "" and the first reference
    config.context.dtype = "float32"  # what CLIP computes in

    config.schedule = ml_collections.ConfigDict()  # diffusion.schedule.make_schedule
    config.schedule.kind = "linear"  # the paper's choice for training
    config.schedule.beta_start = 0.00085
    config.schedule.beta_end = 0.012
    config.schedule.zero_snr = True
    config.schedule.prediction = "v"

    config.objective = ml_collections.ConfigDict()  # diffusion.loss.diffusion_loss
    config.objective.drop_probability = 0.1  # paper
    config.objective.weight_form = "code"  # W_t of the released code
    config.objective.beta = 0.2  # t' = ⌊0.2·t⌋, paper
    config.objective.weighting = "sample"  # or "prediction", "min_snr"; diffusion.loss
    config.objective.preconditioning = "gaussian"  # or "none"; diffusion.precondition
    config.objective.lpips = 0.0  # weight of LPIPS in the holes; ours, needs '.[metrics]'

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.998
    config.accumulate = 1  # parts that a batch is taken in, one after the other
    config.max_skipped_in_row = 20  # steps without a finite gradient, then the run stops

    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "view": 1, "tensor": 1})

    config.log_every = 50  # steps
    config.checkpoint_every = 500  # steps
    config.keep_checkpoints = 2
    config.keep_every = 0  # steps; multiples of it are kept for ever; 0 = none
    config.sample_every = 500  # steps; 0 = never
    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.loss_buckets = 10  # held-out loss is reported per range of timesteps
    config.evaluation.lpips = ""  # "alex" or "vgg" needs pip install '.[metrics]'
    config.evaluation.sampler_steps = 2  # of a model this young, few steps score highest
    config.evaluation.guidance = 0.0  # guidance hurts a model this undertrained
    config.wandb_project = ""  # also log to Weights & Biases; needs pip install '.[log]'
    return config
