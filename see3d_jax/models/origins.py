"""Where the weights of a training run come from: `config.init_from`.

A folder of converted weights (see `release`), a packed model (see `packed`), or the workdir of an
earlier run, whose moving average it continues: stages of training are such a chain. Autoencoder and
CLIP, which no run changes and no checkpoint repeats, are those of the folder of converted weights
at its end.
`training` starts from here, `pipelines` sample what was trained.

    workdir/config.json                  the full config of the run
    workdir/checkpoints/<step>/state     parameters, moving average, optimizer (Orbax arrays)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from see3d_jax.errors import InputError
from see3d_jax.models.codec import Codec, VaeCodec, build_codec
from see3d_jax.models.context import ImageContext, fix_prompt
from see3d_jax.models.packed import is_packed, read_packed_config, read_packed_params
from see3d_jax.models.release import Release, load_release, read_spec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params, abstract_unet

# Fields of UNetConfig that decide which weights there are, and what they mean.
ARCHITECTURE = (
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks",
    "attention_strides", "head_dim", "context_dim", "camera_dim", "norm_groups",
)  # fmt: skip


def read_run_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a training run as plain values; InputError if the folder is no workdir."""
    workdir = epath.Path(workdir)
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


def complete_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in a workdir, ascending; at least one, else InputError."""
    folder = epath.Path(workdir) / "checkpoints"
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise InputError(
            f"{workdir}: has no complete checkpoint; train until the first one is saved "
            "(config.checkpoint_every)"
        )
    return steps


def read_average(workdir: str | os.PathLike[str], step: int, unet: UNetConfig) -> Params:
    """The moving average of a checkpoint, a quarter of what it holds, on the first device.

    Raises InputError naming the checkpoint when it is damaged or of another architecture.
    """
    folder = epath.Path(workdir) / "checkpoints" / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
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
            return checkpointer.restore((folder / "state").resolve(), args=args)["ema_params"]
    except Exception as error:  # tensorstore and Orbax raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot be restored ({reason})") from error


def check_origin(init_from: str, name: str, wanted: UNetConfig) -> None:
    """Refuses a start that cannot work, without reading weights; arguments as `initial_unet`."""
    if _is_release(init_from):
        release = load_release(init_from)
        name = _unet_name(release, name)
        found = read_spec("unet", release.folder / "unet" / name / "config.json")
        check_architecture(found, wanted, f"{init_from}: UNet {name!r}")
        return
    if name:
        raise InputError(
            f"config.init_unet is {name!r}, but {init_from} is a training run and has one UNet"
        )
    check_architecture(_run_unet(init_from), wanted, f"{init_from}: its UNet")
    if not is_packed(epath.Path(init_from)):
        complete_steps(init_from)


def check_preconditioning(init_from: str, wanted: str) -> None:
    """Refuses weights that correct something else than this run's do (`diffusion.precondition`)."""
    if _is_release(init_from):
        found = "none"
    else:
        objective = read_config(init_from).get("objective", {})
        found = objective.get("preconditioning", "none")
    if found != wanted:
        raise InputError(
            f"config.objective.preconditioning is {wanted!r}, but the weights of {init_from} were "
            f"trained with {found!r}; they must agree"
        )


def initial_unet(init_from: str, name: str, wanted: UNetConfig) -> Params:
    """The parameters that a run starts from.

    Args:
      init_from: folder of converted weights, packed model, or workdir of an earlier run.
      name: which UNet of a folder of converted weights; "" if it holds only one.
      wanted: architecture of the run.

    Raises:
      InputError: something is missing or damaged, or the architectures differ (names the field).
    """
    check_origin(init_from, name, wanted)
    if _is_release(init_from):
        release = load_release(init_from)
        return release.unet(_unet_name(release, name))[1]
    if is_packed(epath.Path(init_from)):
        return read_packed_params(epath.Path(init_from), wanted)
    return read_average(init_from, complete_steps(init_from)[-1], wanted)


def _unet_name(release: Release, name: str) -> str:
    if not name and len(release.unets) != 1:
        raise InputError(
            f"config.init_unet is empty: {release.folder} holds the UNets {release.unets}, name one"
        )
    if name and name not in release.unets:
        raise InputError(
            f"config.init_unet: {release.folder} has no UNet {name!r}; it has {release.unets}"
        )
    return name or release.unets[0]


def check_architecture(found: UNetConfig, wanted: UNetConfig, where: str) -> None:
    """InputError naming the first field in which weights and config differ."""
    for field in ARCHITECTURE:
        there, here = getattr(found, field), getattr(wanted, field)
        if field == "attention_strides":  # a set; some files name levels that do not exist
            there, here = (
                sorted(s for s in strides if s <= wanted.stride) for strides in (there, here)
            )
        if there != here:
            hint = ""
            if field == "in_channels" and there == wanted.out_channels:
                hint = "; convert again with tools.convert_mvdream --channels 9"
            elif field == "camera_dim":
                hint = "; convert again without --keep-camera"
            raise InputError(
                f"{where} has {field} {there}, config.model.{field} is {here}: they must agree"
                + hint
            )


def find_release(init_from: str) -> Release:
    """The converted weights at the end of a chain of runs; InputError if there are none."""
    place, seen = init_from, []
    while not _is_release(place):
        if place in seen:
            raise InputError(f"config.init_from: the runs {seen} start from each other")
        seen.append(place)
        place = read_config(place).get("init_from")
        if not place:
            raise InputError(
                f"{seen[-1]}: started from no converted weights, so there is no autoencoder and no "
                "CLIP; give config.init_from a folder of tools.convert_mvdream or convert_see3d"
            )
    return load_release(place)


def load_codec(spec: Mapping[str, Any], init_from: str) -> Codec:
    """The image ↔ latent codec of a run.

    Args:
      spec: `config.codec`: as for `codec.build_codec`; for kind "vae" only fields that say how it
        computes (dtype, slicing, tile_size).
      init_from: where kind "vae" finds its weights.

    Raises:
      InputError: there are none. ValueError: a field that does not exist.
    """
    if init_from and not _is_release(init_from):
        _check_same_latents(spec, init_from)
    if spec.get("kind") != "vae":
        return build_codec(spec)
    if not init_from:
        raise InputError(
            "config.codec.kind is 'vae', but config.init_from is empty: give the folder of "
            "tools.convert_mvdream or tools.convert_see3d, or an earlier run that began there"
        )
    options = {key: value for key, value in spec.items() if key != "kind"}
    allowed = {"dtype", "slicing", "tile_size"}
    if options.keys() - allowed:
        raise ValueError(f"fields {sorted(options.keys() - allowed)}: a VAE has {sorted(allowed)}")
    config, params = find_release(init_from).vae(**options)
    return VaeCodec(params, config)


def load_context(init_from: str, dtype: str = "float32") -> ImageContext:
    """The context encoder of the empty prompt; InputError where there are no CLIP weights.

    Args:
      init_from: where the weights are.
      dtype: what the image tower computes in; its matrices are kept in it, which changes nothing.
    """
    if not init_from:
        raise InputError(
            "config.context.image is True, but config.init_from is empty: give the folder of "
            "tools.convert_mvdream or tools.convert_see3d, or an earlier run that began there"
        )
    made = fix_prompt(find_release(init_from).context_encoder())
    compute = jnp.dtype(dtype)
    return dataclasses.replace(
        made,
        vision_params=jax.tree.map(
            lambda x: x.astype(compute) if x.ndim > 1 else x, made.vision_params
        ),
        vision=dataclasses.replace(made.vision, dtype=dtype),
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run or a packed model was trained with, as far as the folder says."""
    if is_packed(epath.Path(folder)):
        return read_packed_config(epath.Path(folder))
    return read_run_config(folder)


def _is_release(folder: str) -> bool:
    return (epath.Path(folder) / "release.json").is_file()


def _check_same_latents(spec: Mapping[str, Any], workdir: str) -> None:
    """Weights that were trained on one codec's latents are worth nothing on another's."""
    keys = ("kind", "factor", "channels")
    before = read_config(workdir).get("codec", {})
    there, here = ({key: values.get(key) for key in keys} for values in (before, spec))
    if there != here:
        raise InputError(
            f"config.codec is {here}, but the run {workdir} that config.init_from names was "
            f"trained with {there}; they must agree"
        )


def _run_unet(workdir: str) -> UNetConfig:
    try:
        return UNetConfig(**read_config(workdir)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{workdir}/config.json: does not describe a model of this release ({error})"
        ) from None
