"""Released weights on disk: a folder with one sub-folder per component.

    release.json                what made the folder, and how many weights each part has
    unet/NAME/                  config.json, model.safetensors; single, sparse, SR, or mvdream
    vae/  text_encoder/  image_encoder/        the same two files each
    tokenizer/  scheduler/      small files as published

`tools/convert_see3d.py` and `tools/convert_mvdream.py` write it. Configurations are the published
ones; tensors keep the PyTorch names, layouts and precision, so that nothing is lost on the way
back (`tools/export_diffusers.py`); loading transposes them and widens them to float32. Components
are read when asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.models.clip_text import ClipTextConfig, read_text_config
from see3d_jax.models.clip_vision import (
    ClipVisionConfig,
    Preprocessing,
    read_preprocessing,
    read_vision_config,
)
from see3d_jax.models.context import ContextEncoder
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import (
    Params,
    abstract_clip_text,
    abstract_clip_vision,
    abstract_unet,
    abstract_vae,
    clip_text_params_from_torch,
    clip_vision_params_from_torch,
    unet_params_from_torch,
    vae_params_from_torch,
)

FORMAT = "see3d_jax weights 1"
WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Release:
    """A folder of weights; every method reads one component and returns its configuration with it.

    All raise InputError naming the file that is missing, broken, or does not fit.
    """

    folder: Path
    info: Mapping[str, Any]

    @property
    def unets(self) -> list[str]:
        """Names of the UNets in the folder."""
        return sorted(path.parent.name for path in self.folder.glob("unet/*/config.json"))

    def unet(self, name: str, **options: Any) -> tuple[UNetConfig, Params]:
        """A UNet by name; `options` are fields of UNetConfig, e.g. dtype or remat."""
        if name not in self.unets:
            raise InputError(f"{self.folder}: has no UNet {name!r}; it has {self.unets}")
        folder = self.folder / "unet" / name
        config = read_spec("unet", folder / "config.json", **options)
        return config, unet_params_from_torch(read_tensors(folder / WEIGHTS), config)

    def vae(self, *, tiled: bool = False, **options: Any) -> tuple[VaeConfig, Params]:
        """The autoencoder.

        Args:
          tiled: slice batches and tile large images as the released pipeline does.
          **options: fields of VaeConfig, e.g. dtype.
        """
        folder = self.folder / "vae"
        config = read_spec("vae", folder / "config.json", tiled=tiled, **options)
        return config, vae_params_from_torch(read_tensors(folder / WEIGHTS), config)

    def text_encoder(self) -> tuple[ClipTextConfig, Params]:
        """CLIP's text tower."""
        folder = self.folder / "text_encoder"
        config = read_spec("text_encoder", folder / "config.json")
        return config, clip_text_params_from_torch(read_tensors(folder / WEIGHTS), config)

    def image_encoder(self) -> tuple[ClipVisionConfig, Params, Preprocessing]:
        """CLIP's image tower, and how pictures are prepared for it."""
        folder = self.folder / "image_encoder"
        config = read_spec("image_encoder", folder / "config.json")
        preprocessing = read_preprocessing(read_json(folder / "preprocessor_config.json"))
        params = clip_vision_params_from_torch(read_tensors(folder / WEIGHTS), config)
        return config, params, preprocessing

    def context_encoder(self) -> ContextEncoder:
        """Both towers of CLIP, as the UNet's context needs them."""
        text, text_params = self.text_encoder()
        vision, vision_params, preprocessing = self.image_encoder()
        return ContextEncoder(text_params, vision_params, text, vision, preprocessing)

    def schedule_fields(self) -> dict[str, Any]:
        """Arguments of `diffusion.schedule.make_schedule` for these weights."""
        return read_spec("scheduler", self.folder / "scheduler" / "scheduler_config.json")


def load_release(folder: str | os.PathLike[str]) -> Release:
    """Opens a folder of converted weights without reading them; InputError if it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of weights")
    path = folder / "release.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no release.json; convert published weights with "
            "tools.convert_see3d or tools.convert_mvdream first"
        )
    info = read_json(path)
    if info.get("format") != FORMAT:
        raise InputError(f"{path}: format {info.get('format')!r}, expected {FORMAT!r}")
    return Release(folder, info)


def unet_config(spec: Mapping[str, Any], **options: Any) -> UNetConfig:
    """From the published config.json of MultiViewUNetModel; other keys are ignored."""
    if spec.get("transformer_depth", 1) != 1:
        raise ValueError(f"transformer_depth: expected 1, got {spec['transformer_depth']}")
    return UNetConfig(
        in_channels=spec["in_channels"],
        out_channels=spec["out_channels"],
        model_channels=spec["model_channels"],
        channel_mult=spec["channel_mult"],
        num_res_blocks=spec["num_res_blocks"],
        attention_strides=spec["attention_resolutions"],
        head_dim=spec["num_head_channels"],
        context_dim=spec["context_dim"],
        camera_dim=spec.get("camera_dim"),
        **options,
    )


def vae_config(spec: Mapping[str, Any], *, tiled: bool = False, **options: Any) -> VaeConfig:
    """From the published config.json of AutoencoderKL."""
    size = spec.get("sample_size", 512)
    size = size[0] if isinstance(size, list | tuple) else size
    if tiled:
        options = {"tile_size": size, "slicing": True, **options}
    return VaeConfig(
        in_channels=spec.get("in_channels", 3),
        out_channels=spec.get("out_channels", 3),
        latent_channels=spec["latent_channels"],
        block_out_channels=spec["block_out_channels"],
        layers_per_block=spec["layers_per_block"],
        norm_num_groups=spec.get("norm_num_groups", 32),
        scaling_factor=spec.get("scaling_factor", 0.18215),
        **options,
    )


def schedule_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """From the published scheduler_config.json of a DDIMScheduler.

    The released pipeline rescales to zero terminal SNR whatever the file says. That cannot be done
    to models of the noise (MVDream); for them the file's word is taken. What the file leaves out
    has the default of diffusers.
    """
    predictions = {"v_prediction": "v", "epsilon": "epsilon", "sample": "sample"}
    prediction = predictions.get(spec.get("prediction_type", "epsilon"))
    if prediction is None:
        raise ValueError(f"prediction_type {spec['prediction_type']!r} is not one of {predictions}")
    if spec.get("trained_betas") is not None:
        raise ValueError("trained_betas: a table of betas is not supported")
    for key in ("clip_sample", "thresholding"):
        if spec.get(key):
            raise ValueError(f"{key}: is for models of pixels; latents must not be clipped")
    return {
        "kind": spec["beta_schedule"],
        "beta_start": spec["beta_start"],
        "beta_end": spec["beta_end"],
        "num_timesteps": spec["num_train_timesteps"],
        "zero_snr": prediction != "epsilon" or bool(spec.get("rescale_betas_zero_snr", False)),
        "prediction": prediction,
        "set_alpha_to_one": bool(spec.get("set_alpha_to_one", True)),
    }


_READERS: dict[str, tuple[Callable[..., Any], Callable[..., Params] | None]] = {
    "unet": (unet_config, abstract_unet),
    "vae": (vae_config, abstract_vae),
    "text_encoder": (read_text_config, abstract_clip_text),
    "image_encoder": (read_vision_config, abstract_clip_vision),
    "scheduler": (schedule_fields, None),
}


def read_spec(kind: str, path: Path, **options: Any) -> Any:
    """A component's configuration from its published file; InputError names the file and why not.

    Args:
      kind: "unet", "vae", "text_encoder", "image_encoder" or "scheduler".
      path: the JSON file.
      **options: further arguments of the configuration.
    """
    spec = read_json(path)
    try:
        return _READERS[kind][0](spec, **options)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: describes no such {kind} ({_reason(error)})") from None


def torch_shapes(kind: str, spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and PyTorch shape of every tensor that a component must have. Kinds as in `read_spec`.

    Raises:
      KeyError, TypeError, ValueError: the configuration is not one of this kind.
    """
    configure, abstract = _READERS[kind]
    leaves = jax.tree_util.tree_flatten_with_path(abstract(configure(spec)))[0]
    return {
        ".".join(key.key for key in path): tuple(leaf.shape[axis] for axis in _axes(leaf.ndim))
        for path, leaf in leaves
    }


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """A parameter tree as PyTorch tensors by name: the inverse of `*_params_from_torch`."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        ".".join(key.key for key in path): np.asarray(leaf).transpose(_axes(leaf.ndim))
        for path, leaf in leaves
    }


def _axes(ndim: int) -> tuple[int, ...]:
    """[kh, kw, in, out] → [out, in, kh, kw]; fewer axes are reversed."""
    return (3, 2, 0, 1) if ndim == 4 else tuple(range(ndim))[::-1]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, in its stored precision."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path}: is no whole safetensors file ({_reason(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return " ".join(str(error).split())
