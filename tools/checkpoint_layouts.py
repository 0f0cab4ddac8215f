"""Names of the same weights in the layouts they are published in, and what each must contain.

Targets are the names of the See3D release: LDM names for the UNet, diffusers names for the VAE,
Hugging Face names for CLIP. `pieces` maps every tensor of a source to its targets or to the reason
why it has none; `check` compares with what a configuration needs. Both work on names and shapes
alone, so a mistake is reported before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from see3d_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
Cut = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A target tensor and how it is cut from its source tensor."""

    source: str
    target: str
    cut: Cut = lambda x: x


Rule = Callable[[str], list[tuple[str, Cut]] | str | None]  # source name → targets | reason | ?


def pieces(shapes: Shapes, rule: Rule, prefix: str = "") -> tuple[list[Piece], dict[str, str]]:
    """All targets of the names under a prefix, and the names left out with the reason why.

    Where the rule gives None the name stays, so that `check` lists what nobody knows as left over.
    """
    found: list[Piece] = []
    dropped: dict[str, str] = {}
    for source in shapes:
        if not source.startswith(prefix):
            continue
        name = source.removeprefix(prefix)
        targets = rule(name)
        if isinstance(targets, str):
            dropped[source] = targets
        else:
            targets = [(name, lambda x: x)] if targets is None else targets
            found += [Piece(source, target, cut) for target, cut in targets]
    return found, dropped


def check(found: list[Piece], shapes: Shapes, wanted: Shapes, what: str) -> None:
    """Every wanted tensor once and nothing else, each in its shape; else InputError with a list."""
    by_target: dict[str, Piece] = {}
    twice = []
    for piece in found:
        if piece.target in by_target:
            twice.append(f"{piece.source} and {by_target[piece.target].source}")
        by_target[piece.target] = piece
    missing = sorted(wanted.keys() - by_target.keys())
    extra = sorted({by_target[name].source for name in by_target.keys() - wanted.keys()})
    wrong = []
    for name in wanted.keys() & by_target.keys():
        got = result_shape(by_target[name], shapes)
        if got != tuple(wanted[name]):
            wrong.append(f"{by_target[name].source} {got} instead of {tuple(wanted[name])}")
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:40])}{', …' if len(names) > 40 else ''}"
        for kind, names in (
            ("missing", missing),
            ("left over", extra),
            ("of the wrong shape", sorted(wrong)),
            ("given twice", twice),
        )
        if names
    ]
    if problems:
        raise InputError(f"{what} does not fit its configuration: {'; '.join(problems)}")


def result_shape(piece: Piece, shapes: Shapes) -> tuple[int, ...]:
    """Shape of a piece after cutting, found on an array without memory."""
    dummy = np.broadcast_to(np.zeros((), np.float16), shapes[piece.source])
    try:
        return piece.cut(dummy).shape
    except ValueError:  # cannot be cut at all: report it as it is
        return shapes[piece.source]


def unet_rule(keep_camera: bool, channels: int | None = None) -> Rule:
    """LDM, mvdream_diffusers and See3D name the UNet's tensors alike.

    Args:
      keep_camera: keep the camera embedding, if there is one.
      channels: input channels of the result; the new ones start with zero weights.
    """

    def widen(kernel: np.ndarray) -> np.ndarray:
        more = 0 if channels is None else channels - kernel.shape[1]
        return np.pad(kernel, ((0, 0), (0, more), (0, 0), (0, 0))) if more > 0 else kernel

    def rule(name: str) -> list[tuple[str, Cut]] | str | None:
        if name.startswith("camera_embed.") and not keep_camera:
            return "camera embedding"
        if name.startswith("image_embed.") or re.search(r"\.to_[kv]_ip\.weight$", name):
            return "ImageDream's image prompt"
        return [(name, widen)] if name == "input_blocks.0.0.weight" else None

    return rule


def vae_rule(name: str) -> list[tuple[str, Cut]] | str | None:
    """diffusers names, also those from before 2023 (`query` for `to_q`)."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    match = re.fullmatch(r"(.*attentions\.0\.)(\w+)\.(weight|bias)", name)
    if match and match[2] in old:
        name = f"{match[1]}{old[match[2]]}.{match[3]}"
    return [(name, _as_linear if ".attentions." in name else lambda x: x)]


def ldm_vae_rule(levels: int) -> Rule:
    """LDM names, whose decoder counts its levels from the other end."""
    middle = {
        "block_1": "resnets.0", "block_2": "resnets.1",
        "attn_1.norm": "attentions.0.group_norm", "attn_1.q": "attentions.0.to_q",
        "attn_1.k": "attentions.0.to_k", "attn_1.v": "attentions.0.to_v",
        "attn_1.proj_out": "attentions.0.to_out.0",
    }  # fmt: skip

    def rule(name: str) -> list[tuple[str, Cut]] | str | None:
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        name = name.replace("coder.norm_out.", "coder.conv_norm_out.")
        if match := re.fullmatch(r"(encoder|decoder)\.mid\.(block_\d|attn_1\.\w+)\.(.+)", name):
            if match[2] not in middle:
                return None
            target = f"{match[1]}.mid_block.{middle[match[2]]}.{match[3]}"
            return [(target, _as_linear if ".attentions." in target else lambda x: x)]
        if match := re.fullmatch(r"encoder\.down\.(\d+)\.(block|downsample)\.(.+)", name):
            part = {"block": "resnets", "downsample": "downsamplers.0"}[match[2]]
            return [(f"encoder.down_blocks.{match[1]}.{part}.{match[3]}", lambda x: x)]
        if match := re.fullmatch(r"decoder\.up\.(\d+)\.(block|upsample)\.(.+)", name):
            part = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
            level = levels - 1 - int(match[1])
            return [(f"decoder.up_blocks.{level}.{part}.{match[3]}", lambda x: x)]
        return [(name, lambda x: x)]

    return rule


def text_rule(name: str) -> list[tuple[str, Cut]] | str | None:
    """Hugging Face names; older files also store the positions 0, 1, 2, …"""
    return "constant" if name.endswith("position_ids") else None


def open_clip_text_rule(layers: int) -> Rule:
    """OpenCLIP names; queries, keys and values come in one tensor. `layers` of them are kept.

    SD 2.1 reads the last-but-one layer, so the last one and what follows it have no use.
    """
    block = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    outside = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }

    def third(index: int) -> Cut:
        return lambda x: np.split(x, 3)[index]

    def rule(name: str) -> list[tuple[str, Cut]] | str | None:
        if name in outside:
            return [(outside[name], lambda x: x)]
        if name in ("text_projection", "logit_scale"):
            return "unused head of the text encoder"
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if not match:
            return None
        if int(match[1]) >= layers:
            return "last layer of the text encoder, which SD 2.1 does not run"
        layer = f"text_model.encoder.layers.{match[1]}"
        if match[2] == "attn.in_proj":
            return [
                (f"{layer}.self_attn.{part}_proj.{match[3]}", third(i))
                for i, part in enumerate("qkv")
            ]
        if match[2] not in block:
            return None
        return [(f"{layer}.{block[match[2]]}.{match[3]}", lambda x: x)]

    return rule


def vision_rule(name: str) -> list[tuple[str, Cut]] | str | None:
    """Hugging Face names; the published file holds the text half of CLIP as well."""
    if name.startswith("text_model.") or name in ("text_projection.weight", "logit_scale"):
        return "text half of CLIP"
    return "constant" if name.endswith("position_ids") else None


def schedule_rule(name: str) -> list[tuple[str, Cut]] | str | None:
    """The buffers of a noise schedule in LDM checkpoints; they follow from its settings."""
    known = r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
    return "schedule table" if re.fullmatch(known, name) else None


def _as_linear(x: np.ndarray) -> np.ndarray:
    """A 1×1 convolution [out, in, 1, 1] is a linear layer [out, in]."""
    return x.reshape(x.shape[:2]) if x.ndim == 4 else x


def unet_spec(shapes: Shapes, head_dim: int) -> dict[str, object]:
    """The config.json that LDM checkpoints lack, read off the UNet's shapes (prefix removed).

    Head width is the one setting that no shape shows.
    """
    width = shapes["time_embed.0.weight"][1]
    mult: list[int] = []
    blocks = stride = 1
    strides, per_level = set(), [0]
    while any(name.startswith(f"input_blocks.{blocks}.") for name in shapes):
        block = f"input_blocks.{blocks}"
        if f"{block}.0.op.weight" in shapes:
            per_level.append(0)
            stride *= 2
        else:
            per_level[-1] += 1
            if per_level[-1] == 1:
                mult.append(shapes[f"{block}.0.in_layers.2.weight"][0] // width)
            if f"{block}.1.proj_in.weight" in shapes:
                strides.add(stride)
        blocks += 1
    spec = {
        "_class_name": "MultiViewUNetModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "attention_resolutions": sorted(strides, reverse=True),
        "num_res_blocks": max(per_level),
        "channel_mult": mult,
        "num_head_channels": head_dim,
        "transformer_depth": 1,
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    }
    if "camera_embed.0.weight" in shapes:
        spec["camera_dim"] = shapes["camera_embed.0.weight"][1]
    return spec


def ldm_vae_spec(shapes: Shapes) -> dict[str, object]:
    """The diffusers config.json of an LDM autoencoder, read off its shapes (prefix removed)."""
    widths = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in shapes:
        widths.append(shapes[name][0])
    layers = sum(
        re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None
        for name in shapes
    )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def open_clip_text_spec(shapes: Shapes, head_dim: int) -> dict[str, object]:
    """The Hugging Face config.json of an OpenCLIP text tower without its last layer."""
    tokens, width = shapes["positional_embedding"]
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": tokens,
        "num_attention_heads": width // head_dim,
        "num_hidden_layers": len(layers) - 1,
        "vocab_size": shapes["token_embedding.weight"][0],
    }
