"""A trained model, read from the workdir of a training run, ready to sample from.

Reads workdir/config.json and the moving average (EMA) of the newest complete checkpoint; knows
nothing of how they were made. Sampling code should take `params` as an argument of what it jits
(`apply` does), because a closed-over array becomes a constant of the compiled program.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import Schedule, make_schedule
from see3d_jax.diffusion.visual_condition import condition_form
from see3d_jax.errors import InputError
from see3d_jax.models.codec import Codec, build_codec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params, abstract_unet, apply_unet


@dataclasses.dataclass(frozen=True)
class See3DModel:
    """Everything that sampling needs.

    Attributes:
      config: the whole training config, as plain values.
      step: training step of the weights.
      unet: architecture.
      params: EMA weights, nested dict.
      codec: image ↔ latent codec.
      schedule: noise schedule the weights were trained for.
      image_size: side of the training images, pixels.
      views: views per training example, references included.
    """

    config: dict[str, Any]
    step: int
    unet: UNetConfig
    params: Params
    codec: Codec
    schedule: Schedule
    image_size: int
    views: int

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return self.codec.factor * self.unet.stride

    def apply(self, params: Params, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        """The network: x [B, V, h, w, 2c+1], t [B, V], context → [B, V, h, w, c]."""
        return apply_unet(self.unet, params, x, t, context)

    def null_context(self, batch: int, views: int) -> jax.Array:
        """[B, V, L, context_dim] zeros, what the model was given in training."""
        return jnp.zeros((batch, views, self.config["context"]["tokens"], self.unet.context_dim))

    def sampler_config(self, num_steps: int, guidance: float, **options: Any) -> SamplerConfig:
        """A sampler that mixes the condition as training did."""
        objective = self.config["objective"]
        form = condition_form(self.config["condition"], objective["weight_form"])
        mixing = {"weight_form": form, "beta": objective["beta"]}
        return SamplerConfig(num_steps=num_steps, guidance=guidance, **(mixing | options))


def load_model(workdir: str | os.PathLike[str], step: int | None = None) -> See3DModel:
    """Reads the newest (or the given) checkpoint of a training run.

    Raises InputError naming what is missing: the folder, its config, a complete checkpoint.
    """
    workdir = Path(workdir)
    config = _read_config(workdir)
    steps = _complete_steps(workdir)
    if not steps:
        raise InputError(
            f"{workdir}: has no complete checkpoint; train until the first one is saved "
            "(config.checkpoint_every)"
        )
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise InputError(f"{workdir}: has no checkpoint of step {step}; it has {steps}")
    try:
        unet = UNetConfig(**config["model"])
        return See3DModel(
            config=config,
            step=step,
            unet=unet,
            params=_restore_ema(workdir / "checkpoints" / str(step), unet),
            codec=build_codec(config["codec"]),
            schedule=make_schedule(**config["schedule"]),
            image_size=config["data"]["image_size"],
            views=config["data"]["views"],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{workdir / 'config.json'}: does not describe a model of this release ({error})"
        ) from error


def _read_config(workdir: Path) -> dict[str, Any]:
    if not workdir.is_dir():
        raise InputError(f"{workdir}: no such training folder (--workdir of see3d_jax.main)")
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: holds no config.json, so it is no training folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not a config")
    return config


def _complete_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _restore_ema(folder: Path, unet: UNetConfig) -> Params:
    """Reads the moving average only: a quarter of what a checkpoint holds."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = {
        "ema_params": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            abstract_unet(unet),
        )
    }
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore((folder / "state").absolute(), args=args)["ema_params"]
    except Exception as error:  # tensorstore and Orbax raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot be restored ({reason})") from error
