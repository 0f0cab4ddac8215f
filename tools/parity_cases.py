"""The comparisons of networks behind `tools.parity`: golden files in, one result per case out.

Goldens are recorded outputs of the official PyTorch code, as NAME.json with NAME.safetensors beside
it (arrays NCHW). What a file holds is told by its content, never by its name; shapes, seeds and
configurations come from the files. Everything runs in float32 through the project's own public
functions and converters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.models.clip_text import read_text_config
from see3d_jax.models.clip_vision import preprocess, read_preprocessing
from see3d_jax.models.release import (
    Release,
    load_release,
    read_tensors,
    unet_config,
    vae_config,
)
from see3d_jax.models.tokenizer import START, load_tokenizer
from see3d_jax.models.weights import (
    apply_clip_text,
    apply_clip_vision,
    apply_unet,
    clip_text_params_from_torch,
    decode_vae,
    encode_vae,
    unet_params_from_torch,
    vae_params_from_torch,
)
from tools.checkpoint_files import Tensors, open_tensors
from tools.checkpoint_layouts import (
    ldm_vae_rule,
    ldm_vae_spec,
    text_rule,
    unet_rule,
    vae_rule,
    vision_rule,
)
from tools.weight_folders import Part, folder_part, make_part
from tools.weight_plans import UNET, VAE, convert_release, plan_ldm

Arrays = Mapping[str, np.ndarray]
# Each program runs once: compile fast rather than run fast.
QUICK = {"xla_backend_optimization_level": 0}
# Absolute, from the goldens' own description: several times their distance from float64.
TOLERANCE = {"unet": 2e-5, "vae": 3e-5, "clip": 1e-5}


@dataclasses.dataclass(frozen=True)
class Result:
    """How far one case is from its golden.

    Attributes:
      case: its name.
      errors: quantity → (max abs error, tolerance).
      skipped: why it did not run.
      note: what else there is to say.
    """

    case: str
    errors: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    skipped: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """All quantities within tolerance, and at least one."""
        return bool(self.errors) and all(error <= limit for error, limit in self.errors.values())

    @property
    def worst(self) -> tuple[str, float, float]:
        """The quantity closest to its tolerance (or furthest above), its error and tolerance."""

        def share(item: tuple[str, tuple[float, float]]) -> float:
            error, limit = item[1]
            return error / limit if limit else float("inf") * (error > 0 or -1)

        name, (error, limit) = max(self.errors.items(), key=share)
        return name, error, limit


@dataclasses.dataclass
class Goldens:
    """A folder of goldens, and the released weights in or beside it (converted when first used)."""

    root: Path
    scratch: Path

    @functools.cached_property
    def release(self) -> Release:
        """The released folder, taken through the converter."""
        for base in (self.root, *self.root.resolve().parents[:2]):
            inside = sorted(base.rglob("model_index.json")) if base == self.root else []
            for index in inside or sorted(base.glob("*/model_index.json")):
                convert_release(index.parent, self.scratch / "release", quiet=True)
                return load_release(self.scratch / "release")
        raise InputError(f"{self.root}: no release folder (with model_index.json) in or beside it")

    def folder(self, name: str, near: Path) -> Path:
        """A folder that a golden names, looked for upwards from it."""
        for base in (near.parent, *near.resolve().parents[1:4]):
            if (base / name).is_dir():
                return base / name
        raise InputError(f"{near}: names {name}, which is nowhere above it")


def run_unet(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """The multi-view UNet: every case of a file with its own configuration and weights."""
    config = unet_config(spec["config"])
    params = unet_params_from_torch(read_tensors(path.parent / spec["weights"]), config)
    run = jax.jit(functools.partial(apply_unet, config), compiler_options=QUICK)
    for case, io in _cases(read_tensors(path.with_suffix(".io.safetensors")), "out"):
        views = spec["cases"][case]["num_frames"]
        io = {name: x.reshape(-1, views, *x.shape[1:]) for name, x in io.items()}
        inputs = (nhwc(io["x"]), io["timesteps"], io["context"], io.get("camera"))
        out = run(params, *inputs)
        yield Result(f"/{case}", {"out": (max_error(out, nhwc(io["out"])), TOLERANCE["unet"])})


def run_vae(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """The autoencoder under its diffusers names, tiled where the case says so."""
    part = folder_part("vae", goldens.folder(spec["weights"], path), vae_rule)
    for case, io in _cases(read_tensors(path.with_suffix(".safetensors")), "decoded"):
        tiled = spec["cases"][case].get("tiling", False)
        yield _vae_case(case, io, part, vae_config(part.spec, tiled=tiled))


def run_vae_ldm(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """The autoencoder under its LDM names, configuration read off the shapes."""
    tensors = open_tensors(path.with_suffix(".weights.safetensors"))
    shapes = {name.removeprefix(VAE): shape for name, shape in tensors.shapes.items()}
    ldm = ldm_vae_spec(shapes)
    part = make_part("vae", ldm, tensors, ldm_vae_rule(len(ldm["block_out_channels"])), VAE)
    for case, io in _cases(read_tensors(path.with_suffix(".safetensors")), "decoded"):
        yield _vae_case(case, io, part, vae_config(ldm))


def _vae_case(case: str, io: Arrays, part: Part, config: Any) -> Result:
    params = vae_params_from_torch(_tensors(part), config)
    encode = jax.jit(functools.partial(encode_vae, config), compiler_options=QUICK)
    decode = jax.jit(functools.partial(decode_vae, config), compiler_options=QUICK)
    mean, logvar = encode(params, nhwc(io["image"]))
    found = {"mean": mean, "logvar": logvar, "decoded": decode(params, nhwc(io["z"]))}
    return Result(
        f"/{case}",
        {name: (max_error(x, nhwc(io[name])), TOLERANCE["vae"]) for name, x in found.items()},
    )


def run_text(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """CLIP's text tower: last states, pooled, and all states on the way."""
    part = folder_part("text_encoder", goldens.folder(spec["weights"], path), text_rule)
    config, tensors = read_text_config(part.spec), _tensors(part)
    io = read_tensors(path.with_suffix(".safetensors"))
    ids = io["ids"].astype(np.int32)
    last, states = apply_clip_text(config, clip_text_params_from_torch(tensors, config), ids)
    # The LDM form: all layers are stored, the last one does not run.
    layers = config.num_hidden_layers - 1
    shorter = dataclasses.replace(config, num_hidden_layers=layers)
    rest = {name: x for name, x in tensors.items() if f".layers.{layers}." not in name}
    found = {
        "last_hidden_state": last,
        "pooler_output": np.asarray(last)[np.arange(len(ids)), ids.argmax(1)],
        "penultimate_raw": states[-2],
        "penultimate_final_ln": apply_clip_text(
            shorter, clip_text_params_from_torch(rest, shorter), ids
        )[0],
        **{f"hidden_{i}": state for i, state in enumerate(states)},
    }
    yield Result(
        "", {k: (max_error(x, io[k]), TOLERANCE["clip"]) for k, x in found.items() if k in io}
    )


def run_vision(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """CLIP's image tower: preparing pictures, then their embeddings."""
    config, params, own = goldens.release.image_encoder()
    io = read_tensors(path.with_suffix(".safetensors"))
    run = jax.jit(functools.partial(apply_clip_vision, config))
    for index in sorted({name.split(".")[0] for name in io if name.endswith(".u8")}):
        errors, image = {}, io[f"{index}.u8"][None]
        for name in io:
            form = re.fullmatch(rf"{index}\.pixel_values_(\w+?)_(pipeline|plain_u8)", name)
            if not form:
                continue
            settings = spec.get(f"processor_{form[1]}", spec.get(f"processor{form[1]}"))
            pixels = preprocess(image, read_preprocessing(settings), official=form[2] == "pipeline")
            errors[name.split(".")[1]] = (max_error(pixels, nhwc(io[name])), TOLERANCE["clip"])
        embeds, tokens = run(params, preprocess(image, own, official=True))
        for name, x in (("image_embeds", embeds), ("last_hidden_state", tokens)):
            errors[name] = (max_error(x, io[f"{index}.{name}"]), TOLERANCE["clip"])
        yield Result(f"/{index}", errors)


def run_tokenizer(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """Ids of prompts in all forms of the tokenizer; they must be equal."""
    forms = {
        "ids_sd21": {},
        "ids_sd1": {},  # the same, padded with the end marker
        "ids_fast": {"cleaning": "none"},
        "ids_sd21_no_ftfy": {"cleaning": "basic"},
        "ids_openai": {"pad_token": START},
    }
    folder = goldens.release.folder / "tokenizer"
    for name, wanted in read_tensors(path.with_suffix(".safetensors")).items():
        if name not in forms:
            yield Result(f"/{name}", skipped="not a known form of the tokenizer")
            continue
        tokenizer = load_tokenizer(folder, **forms[name])
        if name == "ids_sd1":
            tokenizer = dataclasses.replace(tokenizer, pad=tokenizer.end)
        ids = tokenizer(spec["prompts"])
        if name == "ids_openai":  # pads with 0, which is also "!"
            padding = np.cumprod(ids[:, ::-1] == tokenizer.start, 1)[:, ::-1].astype(bool)
            ids = np.where(padding, 0, ids)
        same = ids.shape == wanted.shape and (ids == wanted).all(1)
        differing = {"prompts that differ": (float(len(wanted) - np.sum(same)), 0.0)}
        yield Result(f"/{name}", differing, note=f"{len(wanted)} prompts")


def run_keys(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """Every tensor of a published layout has its place: shapes only."""
    tensors = Tensors(path, {name: tuple(x) for name, x in spec["keys"].items()}, {}, _no_values)
    names, config = tensors.shapes.keys(), dict(spec.get("config") or {})
    if any(name.startswith(UNET) for name in names):
        parts, _ = plan_ldm(tensors, 4, keep_camera=True)
    elif "time_embed.0.weight" in names:
        parts = [make_part("unet/x", config, tensors, unet_rule(keep_camera=True))]
    elif "encoder.conv_in.weight" in names:
        parts = [make_part("vae", config, tensors, vae_rule)]
    elif any(name.startswith("vision_model.") for name in names):
        config = {**config, **_vision_defaults(tensors)}
        parts = [make_part("image_encoder", config, tensors, vision_rule)]
    else:
        parts = [make_part("text_encoder", config, tensors, text_rule)]
    used = {piece.source for part in parts for piece in part.pieces}
    left_out = {name for part in parts for name in part.dropped}
    unused = float(len(names - used - left_out))
    note = f"{len(used)} converted, {len(left_out)} left out on purpose"
    yield Result("", {"tensors without a place": (unused, 0.0)}, note=note)


def _no_values(name: str) -> np.ndarray:
    raise InputError(f"{name}: a list of keys holds no values")


def _vision_defaults(tensors: Tensors) -> dict[str, Any]:
    """What a list of keys shows of the image tower; its head width is not needed for shapes."""
    patch = tensors.shapes["vision_model.embeddings.patch_embedding.weight"]
    positions = tensors.shapes["vision_model.embeddings.position_embedding.weight"][0]
    layers = "vision_model.encoder.layers."
    numbers = {name.split(".")[3] for name in tensors.shapes if name.startswith(layers)}
    projection = tensors.shapes.get("visual_projection.weight")
    return {
        "hidden_size": patch[0],
        "patch_size": patch[2],
        "image_size": round((positions - 1) ** 0.5) * patch[2],
        "intermediate_size": tensors.shapes[f"{layers}0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": 1,
        "hidden_act": "gelu",
        "projection_dim": projection[0] if projection else None,
    }


def _tensors(part: Part) -> dict[str, np.ndarray]:
    return {piece.target: piece.cut(part.tensors.read(piece.source)) for piece in part.pieces}


def _cases(io: Arrays, output: str) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Cases of a file of CASE.QUANTITY arrays: those that have the output."""
    names = sorted(name.removesuffix(f".{output}") for name in io if name.endswith(f".{output}"))
    return [
        (
            name,
            {k.removeprefix(f"{name}."): x for k, x in io.items() if k.startswith(f"{name}.")},
        )
        for name in names
    ]


def nhwc(x: np.ndarray) -> np.ndarray:
    """[..., c, h, w] → [..., h, w, c]."""
    return np.moveaxis(x, -3, -1)


def max_error(found: Any, wanted: np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes differ or something is not finite."""
    found = np.asarray(found)
    if found.shape != wanted.shape:
        return float("inf")
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
