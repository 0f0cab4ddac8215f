"""Small random checkpoints in every published layout, for the tests of the converters."""

from __future__ import annotations

import json
import re

import numpy as np
from safetensors.numpy import save_file

from see3d_jax.models.release import torch_shapes

UNET = {
    "_class_name": "MultiViewUNetModel",
    "in_channels": 9,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "transformer_depth": 1,
    "context_dim": 16,
}
MVDREAM = {**UNET, "in_channels": 4, "camera_dim": 16}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
}
TEXT = {
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 77,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 50,
}
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 24,
    "image_size": 28,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "projection_dim": 16,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
}
BUFFERS = ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1")


def random_tensors(shapes, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def component(folder, kind, spec, file, seed=0, dtype=np.float16):
    """Writes config.json and random weights; returns the tensors."""
    tensors = random_tensors(torch_shapes(kind, spec), seed, dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(spec))
    save_file(tensors, folder / file)
    return tensors


def small_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def tokenizer_folder(folder):
    small_files(
        folder,
        {
            "vocab.json": {"!": 0, "a": 1},
            "merges.txt": "#version: 0.2\n",
            "special_tokens_map.json": {"pad_token": "!"},
            "tokenizer_config.json": {"model_max_length": 77},
        },
    )


def see3d_release(folder):
    """The See3D release in small, in mixed precision; returns the tensors by file."""
    weights = {}
    for seed, name in enumerate(("single", "sparse", "SR")):
        place = f"unet/{name}/ema-checkpoint"
        file = "diffusion_pytorch_model.safetensors"
        weights[f"{place}/{file}"] = component(folder / place, "unet", UNET, file, seed)
    file = "diffusion_pytorch_model.safetensors"
    weights[f"vae/{file}"] = component(folder / "vae", "vae", VAE, file, 3, np.float32)
    place = "text_encoder"
    weights[f"{place}/model.safetensors"] = component(
        folder / place, "text_encoder", TEXT, "model.safetensors", 4
    )
    place = "CLIP-ViT-H-14-laion2B-s32B-b79K"
    weights[f"{place}/model.safetensors"] = component(
        folder / place, "image_encoder", VISION, "model.safetensors", 5, np.float32
    )
    small_files(folder / place, {"preprocessor_config.json": {"size": 28, "crop_size": 28}})
    small_files(folder / "scheduler", {"scheduler_config.json": SCHEDULER})
    tokenizer_folder(folder / "tokenizer")
    return weights


def ldm_checkpoint():
    """MVDream's checkpoint in small: all tensors under their LDM and OpenCLIP names."""
    state = {
        f"model.diffusion_model.{name}": x
        for name, x in random_tensors(torch_shapes("unet", MVDREAM), 1).items()
    }
    for name, x in random_tensors(torch_shapes("vae", VAE), 2).items():
        state[f"first_stage_model.{ldm_vae_name(name)}"] = (
            x[..., None, None] if ".attentions." in name and x.ndim == 2 else x
        )
    rng = np.random.default_rng(3)
    width, hidden = TEXT["hidden_size"], TEXT["intermediate_size"]
    text = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (50, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for layer in range(TEXT["num_hidden_layers"] + 1):
        block = f"transformer.resblocks.{layer}"
        text |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        for name, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (hidden, width),
            "mlp.c_proj": (width, hidden),
        }.items():
            text |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for name, shape in text.items():
        state[f"cond_stage_model.model.{name}"] = np.asarray(rng.standard_normal(shape), np.float16)
    return state | {name: np.zeros(1000, np.float32) for name in BUFFERS}


def ldm_vae_name(name):
    """diffusers → LDM, written down the other way round than the converter's rule."""
    levels = len(VAE["block_out_channels"])
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.(.*)", name):
        part = {"resnets": "block", "upsamplers.0": "upsample"}[match[2]]
        name = f"decoder.up.{levels - 1 - int(match[1])}.{part}.{match[3]}"
    for here, there in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(here, there)
    return name


def random_run(workdir, step: int = 5, **overrides):
    """The workdir of a training run with random weights: configs/tiny.py made smaller."""
    import orbax.checkpoint as ocp

    from configs import tiny
    from see3d_jax.models.unet import UNetConfig
    from see3d_jax.models.weights import init_unet

    config = tiny.get_config()
    config.update_from_flattened_dict(
        {
            "data.path": "/somewhere/clips", "data.image_size": 32, "codec.channels": 6,
            "model.model_channels": 16, "model.head_dim": 16, "model.norm_groups": 8,
            "evaluation.sampler_steps": 3, "evaluation.guidance": 0.5, **overrides,
        }
    )  # fmt: skip
    workdir.mkdir(parents=True)
    content = json.loads(config.to_json())
    (workdir / "config.json").write_text(json.dumps(content))
    params = init_unet(UNetConfig(**content["model"]), 3)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(
            (workdir / "checkpoints" / str(step) / "state").resolve(), {"ema_params": params}
        )
    return workdir
