"""The values of a ConfigDict, checked once and turned into what the other modules take.

`TrainSpec` holds everything that is baked into the compiled step; it is hashable, so that runs with
equal values share one compilation. Mistakes in a config surface here as InputErrors that name the
key, before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections

from see3d_jax.data.examples import ExampleSpec, LatentSpec
from see3d_jax.data.mixture import DataSource
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import Schedule, make_schedule
from see3d_jax.diffusion.visual_condition import condition_form
from see3d_jax.errors import InputError
from see3d_jax.models.codec import Codec, build_codec, fingerprint
from see3d_jax.models.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with linear warm-up to a constant rate, behind global-norm clipping.

    A rate that depended on the number of steps would make a run that is continued differ from one
    that was planned longer, so there is no decay; the moving average does its work.
    """

    learning_rate: float
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """The loss; see `diffusion.loss` for most of it.

    Attributes:
      condition: key of `visual_condition.CONDITIONS`.
      drop_probability: share of samples that go without the visual condition.
      weight_form: form of W_t that `condition` is mixed with.
      beta: t' = ⌊beta·t⌋ of the condition's noise.
      min_snr_gamma: cap of the loss weight; None: all timesteps count alike.
    """

    condition: str
    drop_probability: float
    weight_form: str
    beta: float
    min_snr_gamma: float | None


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """What the compiled training step depends on.

    Attributes:
      unet: architecture.
      optimizer: optimizer constants.
      objective: loss constants.
      trainable: regex over parameter paths; what it does not match keeps its value. None: all.
      accumulate: parts that a batch is taken in.
      ema_decay: decay of the moving average once it is warm.
      context_tokens: length of the context; see `inputs.batch_context`.
    """

    unet: UNetConfig
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    trainable: str | None
    accumulate: int
    ema_decay: float
    context_tokens: int


def train_spec(config: ml_collections.ConfigDict) -> TrainSpec:
    """Static part of the training step."""
    return TrainSpec(
        unet=_build("model", UNetConfig, config.model),
        optimizer=_build("optimizer", OptimizerSpec, config.optimizer),
        objective=_build(
            "objective",
            ObjectiveSpec,
            {
                **config.objective,
                "condition": config.condition,
                "weight_form": _condition_form(config),
            },
        ),
        trainable=None if config.trainable == "all" else config.trainable,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        context_tokens=config.context.tokens,
    )


def _condition_form(config: ml_collections.ConfigDict) -> str:
    try:
        return condition_form(config.condition, config.objective.weight_form)
    except ValueError as error:
        section = "config" if str(error).startswith("condition") else "config.objective"
        raise InputError(f"{section}.{error}") from None


def example_spec(config: ml_collections.ConfigDict, codec: Codec | None = None) -> ExampleSpec:
    """What one training example looks like; `codec` says which precomputed latents are meant."""
    names = ("views", "references", "stride", "hole_range", "depth_noise")
    values = {name: config.data[name] for name in names} | {"sizes": view_sizes(config)}
    if config.data.latents and codec is not None:
        values["latents"] = LatentSpec(fingerprint(codec), codec.factor, codec.channels)
    return _build("data", ExampleSpec, values)


def view_sizes(config: ml_collections.ConfigDict) -> tuple[tuple[int, int], ...]:
    """Heights and widths that views can have, pixels."""
    sizes = config.data.aspects or ((config.data.image_size,) * 2,)
    return tuple(tuple(size) for size in sizes)


def data_sources(config: ml_collections.ConfigDict) -> tuple[DataSource, ...]:
    """The folders of clips, each with its weight and with what its targets are conditioned on."""
    kinds = {"posed": "posed", "superres": "superres"}
    kind = kinds.get(config.condition, "unposed")
    if not config.data.mixture:
        return (DataSource(config.data.path, kind=kind),)
    if config.data.path:
        raise InputError("config.data: give either path or mixture, not both")
    try:
        sources = tuple(DataSource(*entry) for entry in config.data.mixture)
    except TypeError:
        raise InputError(
            'config.data.mixture: want (("folder", weight, "unposed" or "posed"), …), got '
            f"{config.data.mixture}"
        ) from None
    if kind == "superres":
        return tuple(dataclasses.replace(source, kind=kind) for source in sources)
    unposed = [source.path for source in sources if source.kind != "posed"]
    if kind == "posed" and unposed:
        raise InputError(
            f"config.condition is 'posed', but {unposed[0]!r} in config.data.mixture is not: warps "
            "need depth and poses; use condition 'unposed_t', or posed folders only"
        )
    return sources


def noise_schedule(config: ml_collections.ConfigDict) -> Schedule:
    """The noise schedule."""
    return _build("schedule", make_schedule, config.schedule)


def sampler_config(config: ml_collections.ConfigDict) -> SamplerConfig:
    """How held-out targets are sampled during training."""
    return _build(
        "evaluation",
        SamplerConfig,
        {
            "num_steps": config.evaluation.sampler_steps,
            "guidance": config.evaluation.guidance,
            "weight_form": _condition_form(config),
            "beta": config.objective.beta,
        },
    )


def codec(config: ml_collections.ConfigDict, unet: UNetConfig) -> Codec:
    """The image ↔ latent codec, checked against the network and the image size."""
    if config.codec.kind == "vae" or config.init_from:
        raise InputError(
            f"config.codec.kind is {config.codec.kind!r} and config.init_from is "
            f"{config.init_from!r}: training cannot start from converted weights in this release; "
            "configs/tiny.py trains without any"
        )
    made = _build("codec", build_codec, {"spec": config.codec.to_dict()})
    wanted = (2 * made.channels + 1, made.channels)
    if (unet.in_channels, unet.out_channels) != wanted:
        raise InputError(
            f"config.model: in_channels and out_channels must be {wanted[0]} and {wanted[1]} for a "
            f"codec of {made.channels} channels, got {unet.in_channels} and {unet.out_channels}"
        )
    multiple = made.factor * unet.stride
    key = "aspects" if config.data.aspects else "image_size"
    for side in (side for size in view_sizes(config) for side in size):
        if side % multiple:
            raise InputError(
                f"config.data.{key}: {side} is not a multiple of {multiple} (codec factor × UNet "
                "stride)"
            )
    return made


def check_counts(config: ml_collections.ConfigDict) -> None:
    """Refuses numbers that make no sense, by name."""
    for key in (
        "num_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints",
        "accumulate", "max_skipped_in_row",
    ):  # fmt: skip
        if config[key] < 1:
            raise InputError(f"config.{key}: must be at least 1, got {config[key]}")
    for key in ("sample_every", "keep_every", "seed"):
        if config[key] < 0:
            raise InputError(f"config.{key}: must not be negative, got {config[key]}")
    if not (config.data.path or config.data.mixture):
        raise InputError("config.data.path is empty: give a folder of shards, --config.data.path=…")
    for key in ("held_out", "threads"):
        if config.data[key] < 1:
            raise InputError(f"config.data.{key}: must be at least 1, got {config.data[key]}")


def _build(section: str, make: Callable[..., Any], values: Any) -> Any:
    """make(**values) with errors that name the section of the config."""
    plain = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in dict(values).items()
    }
    try:
        return make(**plain)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"config.{section}: {error}") from error
