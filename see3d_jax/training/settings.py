"""The values of a ConfigDict, checked once and turned into what the other modules take.

`TrainSpec` holds everything that is baked into the compiled step; it is hashable, so that runs with
equal values share one compilation. Mistakes in a config surface here as InputErrors that name the
key, before anything is written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from see3d_jax.data.examples import ExampleSpec, LatentSpec
from see3d_jax.data.mixture import DataSource
from see3d_jax.diffusion.loss import WEIGHTINGS
from see3d_jax.diffusion.precondition import PRECONDITIONINGS
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import Schedule, make_schedule
from see3d_jax.diffusion.visual_condition import condition_form
from see3d_jax.errors import InputError
from see3d_jax.evaluation.lpips import MIN_SIDE, Lpips, load_lpips
from see3d_jax.models import clip_vision, origins
from see3d_jax.models.codec import Codec, fingerprint
from see3d_jax.models.context import ImageContext
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params, abstract_unet, init_unet
from see3d_jax.training.flops import model_flops
from see3d_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with linear warm-up to a constant rate, behind global-norm clipping.

    A rate that depended on the number of steps would make a run that is continued differ from one
    that was planned longer, so there is no decay; the moving average does its work.

    `trainable` is "all" or a regex, searched for in the paths of parameters as parameters.txt lists
    them ("input_blocks/1/1/transformer_blocks/0/attn1/to_q/weight"): what it does not match keeps
    its value and has no optimizer state.
    """

    learning_rate: float
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    trainable: str = "all"

    def trains(self, path: str) -> bool:
        """Whether the parameter at this path is trained."""
        return self.trainable == "all" or re.search(self.trainable, path) is not None


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """The loss; see `diffusion.loss` for most of it.

    Attributes:
      drop_probability: share of samples that go without the visual condition.
      weight_form: form of W_t that goes with `config.condition`.
      beta: t' = ⌊beta·t⌋ of the condition's noise.
      weighting: how timesteps count, see `diffusion.loss`.
      preconditioning: what the network corrects, see `diffusion.precondition`.
      lpips: weight of LPIPS (VGG) between the view that the prediction amounts to and the true one,
        in the pixels that the condition does not know. Ours, not See3D's.
    """

    drop_probability: float
    weight_form: str
    beta: float
    weighting: str
    preconditioning: str
    lpips: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weighting", WEIGHTINGS),
            ("preconditioning", PRECONDITIONINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.lpips < float("inf"):
            raise ValueError(f"lpips: expected a weight ≥ 0, got {self.lpips}")


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """What is measured on held-out clips.

    Attributes:
      sampler: how targets are sampled.
      loss_buckets: into how many ranges of timesteps the loss is split.
    """

    sampler: SamplerConfig
    loss_buckets: int


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """What the compiled training step depends on.

    Attributes:
      unet: architecture.
      optimizer: optimizer constants.
      objective: loss constants.
      accumulate: parts that a batch is taken in.
      ema_decay: decay of the moving average once it is warm.
      context_tokens: length of the context; see `inputs.batch_context`.
    """

    unet: UNetConfig
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    accumulate: int
    ema_decay: float
    context_tokens: int


def train_spec(config: ml_collections.ConfigDict) -> TrainSpec:
    """Static part of the training step."""
    unet = _build("model", UNetConfig, config.model)
    return TrainSpec(
        unet=unet,
        optimizer=_optimizer(config, unet),
        objective=_build(
            "objective",
            ObjectiveSpec,
            {**config.objective, "weight_form": _condition_form(config)},
        ),
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        context_tokens=config.context.tokens,
    )


def _optimizer(config: ml_collections.ConfigDict, unet: UNetConfig) -> OptimizerSpec:
    values = {**config.optimizer, "trainable": config.trainable}
    spec = _build("optimizer", OptimizerSpec, values)
    try:
        found = spec.trainable == "all" or any(map(spec.trains, _parameter_paths(unet)))
    except re.error as error:
        raise InputError(f"config.trainable: {spec.trainable!r} is no regex ({error})") from None
    if not found:
        raise InputError(
            f"config.trainable: {spec.trainable!r} matches no parameter; a run's parameters.txt "
            "lists their paths"
        )
    return spec


def _parameter_paths(unet: UNetConfig) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(abstract_unet(unet))[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


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


def evaluation(config: ml_collections.ConfigDict) -> EvaluationSpec:
    """What is measured on held-out clips during training; sampled as the condition is trained."""
    if not 1 <= config.evaluation.loss_buckets <= 100:
        raise InputError(
            f"config.evaluation.loss_buckets: want 1 to 100, got {config.evaluation.loss_buckets}"
        )
    values = {
        "num_steps": config.evaluation.sampler_steps,
        "guidance": config.evaluation.guidance,
        "weight_form": _condition_form(config),
        "beta": config.objective.beta,
    }
    sampler = _build("evaluation", SamplerConfig, values)
    return EvaluationSpec(sampler, config.evaluation.loss_buckets)


def perceptual(config: ml_collections.ConfigDict) -> Lpips | None:
    """The network of LPIPS that evaluation uses, if `config.evaluation.lpips` names one."""
    return _lpips(config, "evaluation.lpips", config.evaluation.lpips)


def loss_network(config: ml_collections.ConfigDict) -> Lpips | None:
    """The network of the loss's LPIPS term, which only training needs; None: it has none."""
    return _lpips(config, "objective.lpips", "vgg" if config.objective.get("lpips") else "")


def _lpips(config: ml_collections.ConfigDict, key: str, network: str) -> Lpips | None:
    if not network:
        return None
    made = _build(key, load_lpips, {"network": network})
    side = min(view_sizes(config)[0])
    if side < MIN_SIDE[network]:
        raise InputError(
            f"config.{key}: {network!r} needs views of at least {MIN_SIDE[network]} pixels, these "
            f"have {side}"
        )
    return made


def flops_per_sample(config: ml_collections.ConfigDict, spec: TrainSpec, codec: Codec) -> float:
    """FLOPs of a training step on one sample, averaged over the sizes that views can have."""
    counts = [
        model_flops(
            spec.unet, config.data.views, height // codec.factor, width // codec.factor,
            spec.context_tokens,
        )
        for height, width in view_sizes(config)
    ]  # fmt: skip
    return sum(counts) / len(counts)


def check_origin(config: ml_collections.ConfigDict, unet: UNetConfig) -> None:
    """Refuses a `config.init_from` that holds no weights for this network; reads none yet."""
    if config.init_from:
        origins.check_origin(config.init_from, config.init_unet, unet)
        origins.check_preconditioning(config.init_from, config.objective.preconditioning)
    elif config.init_unet:
        raise InputError("config.init_unet names a UNet, but config.init_from is empty")


def frozen_networks(config: ml_collections.ConfigDict, unet: UNetConfig) -> Frozen:
    """Autoencoder and CLIP, read from where `config.init_from` leads, and checked."""
    return Frozen(codec(config, unet), image_context(config, unet))


def image_context(config: ml_collections.ConfigDict, unet: UNetConfig) -> ImageContext | None:
    """What makes the context out of the first reference; None: the context is all zeros."""
    if not config.context.image:
        return None
    made = _build(
        "context",
        origins.load_context,
        {"init_from": config.init_from, "dtype": config.context.dtype},
    )
    wanted = (config.context.tokens, unet.context_dim)
    if made.text_states.shape != wanted:
        raise InputError(
            f"config.context.tokens and config.model.context_dim are {wanted}, but the CLIP of "
            f"config.init_from makes {made.text_states.shape}"
        )
    return made


def preprocess(frozen: Frozen) -> Callable[[np.ndarray], np.ndarray] | None:
    """What makes `clip_pixels` of pictures for the image context; None where there is none."""
    if frozen.context_encoder is None:
        return None
    return functools.partial(clip_vision.preprocess, settings=frozen.context_encoder.preprocessing)


def initial_params(config: ml_collections.ConfigDict, unet: UNetConfig) -> Params:
    """Parameters before the first step: those of `config.init_from`, or fresh ones."""
    if config.init_from:
        return origins.initial_unet(config.init_from, config.init_unet, unet)
    return init_unet(unet, config.seed)


def codec(config: ml_collections.ConfigDict, unet: UNetConfig) -> Codec:
    """The image ↔ latent codec, checked against the network and the image size."""
    made = _build(
        "codec", origins.load_codec, {"spec": config.codec.to_dict(), "init_from": config.init_from}
    )
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
