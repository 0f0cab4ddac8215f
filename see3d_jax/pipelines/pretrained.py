"""A model ready to sample from: a training run, converted weights, or what the package ships.

Of a run: config.json and the moving average (EMA) of the newest complete checkpoint. Of released
weights (`tools.convert_see3d`): one of the UNets, the autoencoder, both CLIP towers, the noise
schedule. A packed model (`tools.export_tiny`) is a run in two small files; the one inside the
package is taken when no other is given. Sampling code should take `params` as an argument of what
it jits (`apply` does), because a closed-over array becomes a constant of the compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.diffusion.loss import Denoise
from see3d_jax.diffusion.precondition import precondition
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import Schedule, make_schedule
from see3d_jax.diffusion.visual_condition import condition_form
from see3d_jax.errors import InputError
from see3d_jax.models import origins
from see3d_jax.models.codec import Codec, DctCodec, VaeCodec
from see3d_jax.models.context import ContextEncoder, encode_context
from see3d_jax.models.packed import EMBEDDED, is_packed, read_packed_config, read_packed_params
from see3d_jax.models.release import Release, load_release
from see3d_jax.models.tokenizer import EMPTY_PROMPT_IDS, load_tokenizer
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params, apply_unet

# Ways to sample, as settings of `SamplerConfig`; "official" repeats the released pipeline, its
# quirks included, and takes what else differs there (see `load_model`) along.
SAMPLERS = {
    "ddim": {},
    "fast": {"solver": "dpmpp_2m", "timesteps": "quadratic"},
    "official": {"timesteps": "official"},
}
# The released UNets: trained at 512² and 16 views (paper, App. C), sampled with g = 2 (code).
RELEASE_SIZE, RELEASE_VIEWS, RELEASE_GUIDANCE = 512, 16, 2.0
RELEASE_STEPS = 25


@dataclasses.dataclass(frozen=True)
class See3DModel:
    """Everything that sampling needs.

    Attributes:
      name: what the weights are, for people.
      unet: architecture.
      params: weights, nested dict.
      codec: image ↔ latent codec.
      schedule: noise schedule the weights were trained for.
      image_size: side of the training images, pixels.
      views: views per training example, references included.
      sampling: settings the weights want: steps, guidance, and how the condition is mixed.
      preconditioning: what the network corrects, see `diffusion.precondition`.
      context_tokens: length of the context.
      context_encoder: CLIP towers; None: the model was trained on a context of zeros.
      official: repeat the released pipeline where it differs from better practice.
      prompt_ids: [tokens] ids of the prompt; See3D's own is the empty one.
    """

    name: str
    unet: UNetConfig
    params: Params
    codec: Codec
    schedule: Schedule
    image_size: int
    views: int
    sampling: SamplerConfig
    preconditioning: str = "none"
    context_tokens: int = 1
    context_encoder: ContextEncoder | None = None
    official: bool = False
    prompt_ids: tuple[int, ...] = EMPTY_PROMPT_IDS

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return self.codec.factor * self.unet.stride

    @property
    def composite(self) -> bool:
        """Whether the known pixels of a warp are better than what the codec makes of them."""
        return isinstance(self.codec, DctCodec)

    def sampled_with(self, steps: int | None, guidance: float | None) -> See3DModel:
        """The same model with settings of the caller's; None keeps the model's own.

        Raises InputError for values that no sampler takes.
        """
        if steps is not None and steps < 1:
            raise InputError(f"--steps must be at least 1, got {steps}")
        if guidance is not None and not 0 <= guidance < math.inf:
            raise InputError(f"--guidance must be 0 or more, got {guidance}")
        given = {"num_steps": steps, "guidance": guidance}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **changes))

    def apply(self, params: Params, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        """The network: x [B, V, h, w, 2c+1], t [B, V], context → [B, V, h, w, c]."""
        denoise = denoiser(
            self.unet, params, self.preconditioning, self.schedule, self.codec, self.sampling
        )
        return denoise(x, t, context)

    def context(self, first_reference: np.ndarray, views: int) -> jax.Array:
        """[1, views, L, context_dim] for scenes whose first reference is uint8 [h, w, 3]."""
        if self.context_encoder is None:
            return jnp.zeros((1, views, self.context_tokens, self.unet.context_dim))
        return encode_context(
            self.context_encoder, first_reference[None], views, ids=self.prompt_ids,
            official=self.official,
        )  # fmt: skip


def denoiser(
    unet: UNetConfig, params: Params, preconditioning: str, schedule: Schedule, codec: Codec,
    sampler: SamplerConfig,
) -> Denoise:  # fmt: skip
    """The network with the head start it was trained with, as sampling calls it."""
    return precondition(
        functools.partial(apply_unet, unet, params), preconditioning, schedule, codec.deviation,
        form=sampler.weight_form, beta=sampler.beta,
    )  # fmt: skip


def load_model(
    folder: str | os.PathLike[str] | None,
    *,
    step: int | None = None,
    unet: str | None = None,
    references: int = 1,
    sampler: str = "ddim",
    prompt: str | None = None,
) -> See3DModel:
    """Reads the workdir of a training run, a folder of converted weights, or a packed model.

    Args:
      folder: any of the three; None: the packed model inside the package.
      step: of a training run, which checkpoint; default the newest.
      unet: of released weights, which UNet; default "single" for one reference, else "sparse".
      references: how many reference views will be given.
      sampler: key of `SAMPLERS`. "official" also tiles large images in the autoencoder, samples
        its posterior, and prepares pictures for CLIP as the released pipeline does.
      prompt: text for the context, where the model has CLIP's text tower; default: empty, as the
        model was trained and released.

    Raises InputError naming what is missing: the folder, its config, a complete checkpoint, a UNet.
    """
    folder = checkpoint_folder(folder)
    if sampler not in SAMPLERS:
        raise InputError(f"--sampler {sampler}: expected one of {', '.join(SAMPLERS)}")
    if (folder / "release.json").is_file():
        if step is not None:
            raise InputError(f"{folder}: released weights have no training steps to choose from")
        release = load_release(folder)
        model = _released_model(release, unet, references, sampler)
        return model if prompt is None else _with_prompt(model, release.folder, prompt)
    if (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder}: holds weights as published; convert them first: "
            f"python -m tools.convert_see3d --input {folder} --output DIR"
        )
    if unet is not None:
        raise InputError(f"--unet {unet}: {folder} is a training run and has only one UNet")
    if is_packed(folder):
        if step is not None:
            raise InputError(f"{folder}: a packed model has no training steps to choose from")
        model = _packed_model(folder, sampler)
    else:
        model = _trained_model(folder, step, sampler)
    if prompt is None:
        return model
    if model.context_encoder is None:
        raise InputError(
            f"--prompt: {folder} was trained without CLIP's text tower (config.context.image is "
            "off), so words have no effect; leave it out"
        )
    release = origins.find_release(origins.read_run_config(folder)["init_from"])
    return _with_prompt(model, release.folder, prompt)


def checkpoint_folder(checkpoint: str | os.PathLike[str] | None) -> Path:
    """The folder meant by --checkpoint; without one that of the weights inside the package."""
    if checkpoint is not None:
        return Path(checkpoint)
    if not is_packed(EMBEDDED):
        raise InputError(
            f"{EMBEDDED}: this installation came without its small weights; give --checkpoint "
            "with the workdir of a training run or converted released weights"
        )
    return EMBEDDED


def _with_prompt(model: See3DModel, release: Path, prompt: str) -> See3DModel:
    ids = load_tokenizer(release / "tokenizer")(prompt)[0]
    if max(ids) >= model.context_encoder.text.vocab_size:
        raise InputError(f"{release / 'tokenizer'}: knows words that the text tower does not")
    return dataclasses.replace(model, prompt_ids=tuple(int(i) for i in ids))


def released_unet(release: Release, references: int) -> str:
    """Which of the released UNets is meant when none is named."""
    wanted = "single" if references == 1 else "sparse"
    return wanted if wanted in release.unets else next(iter(release.unets), wanted)


def _released_model(
    release: Release, name: str | None, references: int, sampler: str
) -> See3DModel:
    name = name or released_unet(release, references)
    half = jax.default_backend() != "cpu"  # CPUs are slower in bfloat16, not faster
    unet, params = release.unet(name, dtype="bfloat16" if half else "float32")
    official = sampler == "official"
    vae, vae_params = release.vae(tiled=official, **({} if official else {"slicing": True}))
    codec = VaeCodec(vae_params, vae)
    spec = release.folder / "unet" / name / "config.json"
    if unet.camera_dim is not None:
        raise InputError(f"{spec}: expects cameras as input; convert without --keep-camera")
    if unet.in_channels != 2 * codec.channels + 1:
        raise InputError(
            f"{spec}: takes {unet.in_channels} channels; a model of See3D takes "
            f"{2 * codec.channels + 1} (X_t, V_t and the mask)"
        )
    # The super-resolution model is given its condition as it is.
    form = "clean" if name == "SR" else "code"
    return See3DModel(
        name=f"released UNet {name!r}", unet=unet, params=params, codec=codec,
        schedule=make_schedule(**release.schedule_fields()),
        image_size=RELEASE_SIZE, views=RELEASE_VIEWS,
        sampling=SamplerConfig(
            num_steps=RELEASE_STEPS, guidance=RELEASE_GUIDANCE, weight_form=form,
            **SAMPLERS[sampler],
        ),
        context_encoder=release.context_encoder(), official=official,
    )  # fmt: skip


def _trained_model(workdir: Path, step: int | None, sampler: str) -> See3DModel:
    config = origins.read_run_config(workdir)
    steps = origins.complete_steps(workdir)
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise InputError(f"{workdir}: has no checkpoint of step {step}; it has {steps}")
    return _model_of_run(
        f"training step {step}", config, workdir,
        lambda unet: origins.read_average(workdir, step, unet), sampler,
    )  # fmt: skip


def _packed_model(folder: Path, sampler: str) -> See3DModel:
    config = read_packed_config(folder)
    what = "the small model inside the package" if folder == EMBEDDED else "packed model"
    return _model_of_run(
        f"{what}, training step {config.get('training', {}).get('steps', '?')}",
        {**config, "init_from": ""}, folder,
        lambda unet: read_packed_params(folder, unet), sampler,
    )  # fmt: skip


def _model_of_run(
    name: str, config: Mapping[str, Any], folder: Path, read: Callable[[UNetConfig], Params],
    sampler: str,
) -> See3DModel:  # fmt: skip
    try:
        unet = UNetConfig(**config["model"])
        return See3DModel(
            name=name,
            unet=unet,
            params=read(unet),
            codec=origins.load_codec(config["codec"], config["init_from"]),
            schedule=make_schedule(**config["schedule"]),
            image_size=config["data"]["image_size"],
            views=config["data"]["views"],
            sampling=SamplerConfig(
                num_steps=int(config["evaluation"]["sampler_steps"]),
                guidance=float(config["evaluation"]["guidance"]),
                weight_form=condition_form(config["condition"], config["objective"]["weight_form"]),
                beta=config["objective"]["beta"],
                **SAMPLERS[sampler],
            ),
            preconditioning=config["objective"]["preconditioning"],
            context_tokens=config["context"]["tokens"],
            context_encoder=origins.find_release(config["init_from"]).context_encoder()
            if config["context"]["image"]
            else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder / 'config.json'}: does not describe a model of this release ({error})"
        ) from error
