"""Weights folders and training runs back into the layouts that PyTorch code loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.models.release import WEIGHTS, Release, to_torch
from see3d_jax.pipelines.pretrained import load_model
from tools.checkpoint_files import open_tensors, write_safetensors
from tools.checkpoint_layouts import Piece
from tools.weight_folders import Part, check_new, copy_files
from tools.weight_plans import IMAGE_ENCODER, TOKENIZER

UNET_FILE = "diffusion_pytorch_model.safetensors"


def export_release(release: Release, output: Path) -> None:
    """Writes all components of a weights folder in the layout they came from."""
    check_new(output)
    see3d = release.info.get("layout") == "see3d"
    places = {
        "vae": f"vae/{UNET_FILE}",
        "text_encoder": "text_encoder/model.safetensors",
        "image_encoder": f"{IMAGE_ENCODER if see3d else 'image_encoder'}/model.safetensors",
    }
    for name in release.unets:
        folder = f"unet/{name}/ema-checkpoint" if see3d else "unet"
        places[f"unet/{name}"] = f"{folder}/{UNET_FILE}"
    parts: dict[str, Part] = {}
    copies: dict[str, Any] = {}
    for name in release.info.get("components", {}):
        if name not in places:
            raise InputError(f"{release.folder / 'release.json'}: unknown component {name!r}")
        tensors = open_tensors(release.folder / name / WEIGHTS)
        found = [Piece(tensor, tensor) for tensor in tensors.shapes]
        parts[places[name]] = Part(name, {}, tensors, found, {})
        config = str(Path(places[name]).with_name("config.json"))
        copies[config] = release.folder / name / "config.json"
    settings = release.folder / "image_encoder" / "preprocessor_config.json"
    others = {
        "model_index.json": release.folder / "model_index.json",
        "scheduler/scheduler_config.json": release.folder / "scheduler/scheduler_config.json",
        **{f"tokenizer/{name}": release.folder / "tokenizer" / name for name in TOKENIZER},
        f"{IMAGE_ENCODER if see3d else 'feature_extractor'}/preprocessor_config.json": settings,
    }
    copies |= {place: path for place, path in others.items() if path.is_file()}
    total = sum(len(part.pieces) for part in parts.values())
    with atomic_path(output) as temporary, tqdm(total=total, unit="tensor") as bar:
        for place, part in parts.items():
            bar.set_description(part.name)
            part.write(temporary / place, bar.update)
        copy_files(temporary, copies)


def export_training(workdir: Path, output: Path) -> None:
    """Writes the moving average of the newest checkpoint as config.json and float32 weights."""
    check_new(output)
    model = load_model(workdir)
    unet = model.unet
    if model.preconditioning != "none":
        raise InputError(
            f"{workdir}: was trained with config.objective.preconditioning="
            f"{model.preconditioning!r}, which the PyTorch network knows nothing of"
        )
    if unet.norm_groups != 32:
        raise InputError(
            f"{workdir}: the network has {unet.norm_groups} norm groups; the PyTorch one has 32"
        )
    spec = {
        "_class_name": "MultiViewUNetModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "attention_resolutions": sorted(unet.attention_strides, reverse=True),
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "num_head_channels": unet.head_dim,
        "transformer_depth": 1,
        "context_dim": unet.context_dim,
    }
    if unet.camera_dim is not None:
        spec["camera_dim"] = unet.camera_dim
    tensors = to_torch(model.params)
    plan = {name: (np.dtype(x.dtype), x.shape) for name, x in tensors.items()}
    with atomic_path(output) as temporary:
        write_json(temporary / "config.json", spec)
        write_safetensors(temporary / UNET_FILE, plan, iter(tensors.items()))
