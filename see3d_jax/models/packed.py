"""One trained model as two small files, complete in themselves; one such folder is in the package.

    config.json          what sampling needs of the run's config, and how it was trained
    model.safetensors    the moving average, float16, PyTorch names and layouts

`tools.export_tiny` makes them of the workdir of a training run. Only models that need nothing else
can be packed: a codec without weights, a context without CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.models.release import WEIGHTS, read_json, read_tensors, to_torch
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params, unet_params_from_torch

FORMAT = "see3d_jax packed model 1"
CONFIG = "config.json"
EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
# Fields of a run's config that say what its weights are; the others say how they came about.
_KEPT = {
    "condition": None,
    "data": ("image_size", "views", "references"),
    "codec": None,
    "model": None,
    "context": ("tokens", "image"),
    "schedule": None,
    "objective": ("weight_form", "beta", "preconditioning"),
    "evaluation": ("sampler_steps", "guidance"),
}


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a packed model."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def pack(
    config: Mapping[str, Any], params: Params, training: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of both files: config.json, and float16 tensors by name in a stable order.

    Args:
      config: config.json of a training run.
      params: the parameters to keep.
      training: facts about the training, for people.
      where: what an error calls the run.

    Raises InputError when the model needs other weights, or has one that float16 cannot hold.
    """
    kind = config["codec"].get("kind")
    if kind != "dct" or config["context"]["image"]:
        raise InputError(
            f"{where}: needs the weights of {'CLIP' if kind == 'dct' else 'an autoencoder'} as "
            "well, so it cannot be packed alone; only runs with config.codec.kind='dct' and "
            "config.context.image=False can"
        )
    content: dict[str, Any] = {"format": FORMAT, "training": dict(training)}
    for section, fields in _KEPT.items():
        values = config[section]
        content[section] = values if fields is None else {name: values[name] for name in fields}
    tensors = {}
    for name, value in sorted(to_torch(params).items()):
        if not np.abs(value).max() <= np.finfo(np.float16).max:
            raise InputError(f"{where}: {name} holds a value that float16 cannot")
        tensors[name] = np.asarray(value, np.float16)
    return content, tensors


def read_packed_config(folder: Path) -> dict[str, Any]:
    """config.json of a packed model; InputError when it is another file."""
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(
            f"{folder / CONFIG}: is not of the format {FORMAT!r} (made by tools.export_tiny)"
        )
    return config


def read_packed_params(folder: Path, unet: UNetConfig) -> Params:
    """The weights, widened to float32; InputError when they do not fit the architecture."""
    return unet_params_from_torch(read_tensors(folder / WEIGHTS), unet)
