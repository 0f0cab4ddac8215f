"""What goes where: the published layouts of See3D and MVDream as plans for a weights folder.

Three layouts are known: the See3D release, MVDream's single LDM checkpoint, and MVDream as a folder
of diffusers components. Each plan accounts for every tensor and checks every shape before anything
is written; an InputError lists what lacks, is left over or has the wrong shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from see3d_jax.errors import InputError
from see3d_jax.models.release import read_json, read_spec
from tools.checkpoint_files import PICKLES, Tensors, open_tensors
from tools.checkpoint_layouts import (
    ldm_vae_rule,
    ldm_vae_spec,
    open_clip_text_rule,
    open_clip_text_spec,
    pieces,
    schedule_rule,
    text_rule,
    unet_rule,
    unet_spec,
    vae_rule,
    vision_rule,
)
from tools.weight_folders import (
    Part,
    files_of,
    find_weights,
    folder_part,
    make_part,
    write_weights_folder,
)

UNETS = ("single", "sparse", "SR")
TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
IMAGE_ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
# What MVDream was trained with; its checkpoint only has the tables that follow from this.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}


def convert_release(
    source: Path, output: Path, *, keep_camera: bool = False, quiet: bool = False
) -> None:
    """Converts a published See3D folder into a weights folder."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    if not (source / "unet").is_dir():
        raise InputError(f"{source}: unknown layout: has no unet folder, so it is no See3D release")
    folders = {name: source / "unet" / name / "ema-checkpoint" for name in UNETS}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if not folders:
        raise InputError(
            f"{source}: unknown layout: expected unet/{{{','.join(UNETS)}}}/ema-checkpoint"
        )
    parts = [unet_part(f"unet/{name}", folders[name], keep_camera) for name in folders]
    parts.append(folder_part("vae", source / "vae", vae_rule))
    parts.append(folder_part("text_encoder", source / "text_encoder", text_rule))
    parts.append(image_encoder_part(source / IMAGE_ENCODER))
    copies: dict[str, Any] = files_of(source / "tokenizer", TOKENIZER, "tokenizer")
    read_spec("scheduler", source / "scheduler" / "scheduler_config.json")
    copies |= files_of(source / "scheduler", ("scheduler_config.json",), "scheduler")
    copies |= files_of(source / IMAGE_ENCODER, ("preprocessor_config.json",), "image_encoder")
    if (source / "model_index.json").is_file():
        copies["model_index.json"] = source / "model_index.json"
    write_weights_folder(output, "see3d", parts, copies, quiet=quiet)


def unet_part(name: str, folder: Path, keep_camera: bool, channels: int | None = None) -> Part:
    """Plans a UNet from its folder.

    Args:
      name: sub-folder of the result.
      folder: config.json and weights.
      keep_camera: keep the camera embedding, if there is one.
      channels: input channels of the result, at least those of the source; None: as many.
    """
    tensors = find_weights(folder)
    spec = read_json(folder / "config.json")
    change: dict[str, Any] = {}
    if channels is not None:
        if channels < spec.get("in_channels", 0):
            raise InputError(
                f"{folder}: has {spec['in_channels']} input channels, more than --channels"
            )
        change["in_channels"] = channels
    camera = tensors.shapes.get("camera_embed.0.weight")
    if keep_camera and camera is not None:
        change["camera_dim"] = camera[1]
    remove = ("ip_dim",) if keep_camera else ("ip_dim", "camera_dim")
    return folder_part(name, folder, unet_rule(keep_camera, channels), change, remove)


def image_encoder_part(folder: Path) -> Part:
    """Plans CLIP's image tower; the published file may hold all of CLIP."""
    spec = read_json(folder / "config.json")
    # transformers' class without projection still writes the width of one.
    bare = spec.get("architectures") == ["CLIPVisionModel"]
    change = {"projection_dim": None} if bare else {}
    return folder_part("image_encoder", folder, vision_rule, change)


def convert_mvdream(
    source: Path,
    output: Path,
    *,
    channels: int = 9,
    keep_camera: bool = False,
    tokenizer: Path | None = None,
    image_encoder: Path | None = None,
    head_dim: int = 64,
) -> None:
    """Converts MVDream's checkpoint or diffusers folder into a weights folder.

    Args:
      source: a .pt or .safetensors file in LDM layout, or a folder.
      output: the new folder.
      channels: input channels of the UNet; those it does not have start at zero.
      keep_camera: keep the camera embedding.
      tokenizer, image_encoder: published folders to add, or to take instead of the source's.
      head_dim: width of one attention head, which LDM checkpoints do not tell.
    """
    if source.is_dir():
        parts, copies = plan_diffusers(source, channels, keep_camera)
    elif source.suffix in (".safetensors", *PICKLES):
        parts, copies = plan_ldm(open_tensors(source), channels, keep_camera, head_dim)
    else:
        raise InputError(
            f"{source}: expected a checkpoint (.pt, .safetensors) or a folder in diffusers layout"
        )
    if image_encoder is not None:
        parts = [part for part in parts if part.name != "image_encoder"]
        parts.append(image_encoder_part(image_encoder))
        copies |= files_of(image_encoder, ("preprocessor_config.json",), "image_encoder")
    if tokenizer is not None:
        copies |= files_of(tokenizer, TOKENIZER, "tokenizer")
    write_weights_folder(output, "mvdream", parts, copies)


def plan_ldm(
    tensors: Tensors, channels: int, keep_camera: bool, head_dim: int = 64
) -> tuple[list[Part], dict[str, Any]]:
    """Plans the parts of one LDM checkpoint; InputError lists tensors that lack or do not fit."""
    sections = {prefix: _section(tensors, prefix) for prefix in (UNET, VAE, TEXT)}
    if not all(sections.values()):
        absent = [prefix for prefix, shapes in sections.items() if not shapes]
        raise InputError(
            f"{tensors.path}: unknown layout: has no tensors under {' or '.join(absent)}"
        )
    try:
        unet = unet_spec(sections[UNET], head_dim)
        vae = ldm_vae_spec(sections[VAE])
        text = open_clip_text_spec(sections[TEXT], head_dim)
    except (KeyError, IndexError) as error:
        raise InputError(f"{tensors.path}: 1 missing: {error.args[0]}") from None
    if channels < unet["in_channels"]:
        raise InputError(
            f"{tensors.path}: has {unet['in_channels']} input channels, more than --channels"
        )
    unet["in_channels"] = channels
    if not keep_camera:
        unet.pop("camera_dim", None)
    others = {name: x for name, x in tensors.shapes.items() if not name.startswith(tuple(sections))}
    left, tables = pieces(others, schedule_rule)
    if left:
        names = sorted(piece.source for piece in left)
        raise InputError(f"{tensors.path}: {len(names)} left over: {', '.join(names[:40])}")
    levels, layers = len(vae["block_out_channels"]), text["num_hidden_layers"]
    parts = [
        make_part("unet/mvdream", unet, tensors, unet_rule(keep_camera, channels), UNET),
        make_part("vae", vae, tensors, ldm_vae_rule(levels), VAE),
        make_part("text_encoder", text, tensors, open_clip_text_rule(layers), TEXT),
    ]
    parts[0] = dataclasses.replace(parts[0], dropped={**parts[0].dropped, **tables})
    return parts, {"scheduler/scheduler_config.json": SCHEDULER}


def plan_diffusers(
    source: Path, channels: int, keep_camera: bool
) -> tuple[list[Part], dict[str, Any]]:
    """Plans the parts of a folder in diffusers layout."""
    if not (source / "unet" / "config.json").is_file():
        raise InputError(
            f"{source}: unknown layout: has no unet/config.json, so it is no diffusers folder"
        )
    parts = [
        unet_part("unet/mvdream", source / "unet", keep_camera, channels),
        folder_part("vae", source / "vae", vae_rule),
        folder_part("text_encoder", source / "text_encoder", text_rule),
    ]
    copies: dict[str, Any] = {}
    if (source / "image_encoder").is_dir():
        parts.append(image_encoder_part(source / "image_encoder"))
        settings = source / "feature_extractor" / "preprocessor_config.json"
        copies["image_encoder/preprocessor_config.json"] = settings
    if (source / "tokenizer").is_dir():
        copies |= files_of(source / "tokenizer", TOKENIZER, "tokenizer")
    scheduler = source / "scheduler" / "scheduler_config.json"
    read_spec("scheduler", scheduler)
    copies["scheduler/scheduler_config.json"] = scheduler
    if (source / "model_index.json").is_file():
        copies["model_index.json"] = source / "model_index.json"
    return parts, copies


def _section(tensors: Tensors, prefix: str) -> Mapping[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): shape
        for name, shape in tensors.shapes.items()
        if name.startswith(prefix)
    }
