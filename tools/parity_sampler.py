"""The comparisons of schedules and whole sampling runs behind `tools.parity`.

A run starts from the pictures and masks that the official script was given and takes every stage of
ours, from the converted release: resizing, CLIP context, autoencoder (tiled as officially), sampler
in `official` mode with the recorded noise, decoder. Each stage is compared, the sampler after every
step.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.diffusion.guidance import guide
from see3d_jax.diffusion.sampler import SamplerConfig, SamplerNoise, sample, sampling_steps
from see3d_jax.diffusion.schedule import Schedule, make_schedule, signal_and_noise
from see3d_jax.diffusion.visual_condition import mixing_weight
from see3d_jax.models.clip_vision import preprocess
from see3d_jax.models.context import encode_context
from see3d_jax.models.release import read_tensors, schedule_fields
from see3d_jax.models.weights import apply_clip_vision, apply_unet, decode_vae, encode_vae
from tools.parity_cases import QUICK, TOLERANCE, Goldens, Result, max_error, nhwc

LATENTS, IMAGES, PIXELS = 5e-5, 1e-4, 1e-6
# Noise predictions without zero SNR reach latents of 48 instead of 7.
LATENTS_EPSILON = 5e-4
TABLES = 1e-6  # relative to the largest entry, as all of the schedule file


def run_sampler(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """One whole run; where the official one is not finite, ours must refuse the settings."""
    rescaled = spec["scheduler"]["rescale_betas_zero_snr"]
    fields = {**schedule_fields(spec["scheduler"]), "zero_snr": rescaled}
    if spec.get("first_nonfinite_step") is not None:
        try:
            make_schedule(**fields)
        except ValueError:
            note = "the official run divides by zero; these settings are refused"
            yield Result("", {"refused": (0.0, 0.0)}, note=note)
        else:
            yield Result("", {"refused": (float("inf"), 0.0)}, note="settings were not refused")
        return
    io = read_tensors(path.with_suffix(".safetensors"))
    io = {
        name: nhwc(x) if x.dtype == np.float32 and x.ndim >= 4 and "final" not in name else x
        for name, x in io.items()
    }
    found: dict[str, tuple[Any, float]] = {}  # quantity → ours, tolerance
    images, masks = _inputs(io, spec["height"], spec["width"])
    factor = spec["height"] // io["init_noise"].shape[-3]
    mask = masks[:, ::factor, ::factor]
    found |= {"image": (images, PIXELS), "masks": (masks, 0.0), "mask_latents": (mask, 0.0)}

    encoder = goldens.release.context_encoder()
    pixels = preprocess(images[:1], encoder.preprocessing, official=True)
    embeds, _ = apply_clip_vision(encoder.vision, encoder.vision_params, pixels)
    context = encode_context(encoder, images[:1], spec["num_frames"], official=True)
    # Only the first reference's embedding is used; all rows of the context are equal.
    io |= {"image_embeds": io["image_embeds"][:1], "unet_context": io["unet_context"][-1]}
    found |= {"image_embeds": (embeds, TOLERANCE["clip"])}
    found |= {"unet_context": (context[0, 0], TOLERANCE["clip"])}

    vae, vae_params = goldens.release.vae(tiled=True)
    encode = jax.jit(lambda p, x: encode_vae(vae, p, x), compiler_options=QUICK)
    mean, logvar = encode(vae_params, images)
    latents = (mean + jnp.exp(0.5 * logvar) * io["vae_noise"]) * vae.scaling_factor
    found |= {"posterior_mean": (mean, LATENTS), "posterior_logvar": (logvar, LATENTS)}
    found |= {"img_latents": (latents, LATENTS)}

    config = _config(spec)
    calls = sampling_steps(config, fields["num_timesteps"])[0]
    steps = _sample(spec, make_schedule(**fields), config, goldens, latents, mask, context, io)
    limit = LATENTS_EPSILON if fields["prediction"] == "epsilon" else LATENTS
    found |= {"timesteps": (calls, 0.0), "latents_after_step": (steps, limit)}
    if "final_image" in io:
        decode = jax.jit(lambda p, z: decode_vae(vae, p, z), compiler_options=QUICK)
        final = decode(vae_params, steps[-1] / vae.scaling_factor)
        found["final_image"] = (np.clip(final / 2 + 0.5, 0, 1), IMAGES)
    errors = {
        name: (max_error(x, io[name]), limit) for name, (x, limit) in found.items() if name in io
    }
    yield Result("", errors, note=f"{len(calls)} network calls")


def _config(spec: Mapping[str, Any]) -> SamplerConfig:
    return SamplerConfig(
        num_steps=spec["num_inference_steps"],
        timesteps="official",
        guidance=spec["guidance_scale"],
        guidance_rescale=spec["guidance_rescale"],
        weight_form="clean" if spec["super_resolution"] else "code",
    )


def _sample(
    spec: Mapping[str, Any],
    schedule: Schedule,
    config: SamplerConfig,
    goldens: Goldens,
    latents: jax.Array,
    mask: np.ndarray,
    context: jax.Array,
    io: Mapping[str, np.ndarray],
) -> jax.Array:
    """[calls, F, h, w, c]: latents after every step, with the recorded noise."""
    unet, params = goldens.release.unet(spec["unet"])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, *inputs: jax.Array) -> jax.Array:
        *inputs, initial, condition = inputs
        return sample(
            lambda x, t, c: apply_unet(unet, params, x, t, c),
            *(schedule, config, *inputs, jax.random.key(0)),
            noises=SamplerNoise(initial, condition),
            keep_steps=True,
        )[1]

    is_reference = (np.arange(spec["num_frames"]) < spec["gt_num"])[None]
    noises = io["init_noise"][None], io["warp_noise"][:, None]
    return run(params, latents[None], mask[None], is_reference, context, *noises)[:, 0]


def run_schedule(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """Tables, timesteps, single steps and the small formulas of the sampler."""
    io = read_tensors(path.with_suffix(".safetensors"))
    fields = schedule_fields(spec["scheduler_base"])
    plain = make_schedule(**{**fields, "zero_snr": False})
    zero = make_schedule(**{**fields, "zero_snr": True, "prediction": "v"})
    yield _tables(
        "/alphas_cumprod",
        {
            "alphas_cumprod": (plain.alphas_cumprod, io["alphas_cumprod"]),
            "alphas_cumprod_zero_snr": (zero.alphas_cumprod, io["alphas_cumprod_zero_snr"]),
        },
    )
    for name in sorted(io):
        if counted := re.fullmatch(r"timesteps_(\d+)", name):
            count = int(counted[1])
            calls, landings = sampling_steps(SamplerConfig(num_steps=count, timesteps="official"))
            before = np.maximum(io[f"prev_timesteps_{count}"], -1)  # below 0 all mean the end
            errors = {"timesteps": (max_error(calls, io[name]), 0.0)}
            errors["prev_timesteps"] = (max_error(landings, before), 0.0)
            yield Result(f"/{name}", errors)
    times = io["weight_t"].astype(int)
    inside = 5 * times < fields["num_timesteps"]  # W is a function of t' = t // 5 here
    yield _tables("/weight", {"weight": (mixing_weight(5 * times[inside]), io["weight"][inside])})
    noisy = {
        name: (
            zero.add_noise(io["step.x"], io["add_noise.noise"], jnp.asarray(int(t))),
            io[name],
        )
        for name in sorted(io)
        if (t := name.removeprefix("add_noise.")).isdigit()
    }
    yield _tables("/add_noise", noisy)
    yield from _single_steps(io, zero)
    for name in sorted(io):
        if name.startswith("rescale_cfg.out_"):
            text, cfg = nhwc(io["rescale_cfg.in_text"]), nhwc(io["rescale_cfg.in_cfg"])
            # guide() forms cfg itself: with guidance 1 it is 2·cond − uncond
            out = guide(text[None], (2 * text - cfg)[None], 1.0, float(name.split("out_")[1]))[0]
            yield _tables(f"/{name}", {"guided": (out, nhwc(io[name]))})


def _single_steps(io: Mapping[str, np.ndarray], zero: Schedule) -> Iterator[Result]:
    """DDIM steps of "50": t to t − 20, on the zero-SNR table."""
    alphas = np.asarray(zero.alphas_cumprod)
    for name in sorted(io):
        match = re.fullmatch(r"step\.(\w+)\.(\d+)", name)
        if not match:
            continue
        prediction, t = match[1].removesuffix("_prediction"), int(match[2])
        if not np.isfinite(io[name]).all():
            yield Result(
                f"/{name}", skipped="not finite officially; make_schedule refuses the settings"
            )
            continue
        schedule = Schedule(zero.alphas_cumprod, prediction)
        x_0, noise = schedule.to_x0_eps(io["step.x"], io["step.model_output"], jnp.asarray(t))
        landing = t - zero.num_timesteps // 50
        end = 1.0 if zero.set_alpha_to_one else alphas[0]
        signal, deviation = signal_and_noise(alphas[landing] if landing >= 0 else end, 4)
        yield _tables(f"/{name}", {"x": (signal * x_0 + deviation * noise, io[name])})


def _tables(case: str, pairs: Mapping[str, tuple[Any, np.ndarray]]) -> Result:
    """Errors relative to the largest entry of each table, where that exceeds 1."""
    errors = {}
    for name, (found, wanted) in pairs.items():
        errors[name] = (max_error(found, wanted) / max(float(np.abs(wanted).max()), 1.0), TABLES)
    return Result(case, errors)


def _inputs(io: Mapping[str, np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [F, H, W, 3] in [−1, 1] and masks [F, H, W, 1], from the raw bytes where stored."""
    from PIL import Image

    def resize(raw: np.ndarray) -> np.ndarray:
        bicubic = Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(raw).resize((width, height), bicubic), np.float32)

    if "raw_images_u8" not in io:
        return io["image"], io["masks"]
    images = np.stack([resize(raw) for raw in io["raw_images_u8"]]) / np.float32(127.5) - 1
    masks = np.stack([resize(raw) for raw in io["raw_masks_u8"]]) / np.float32(255) > 0.9
    return images, masks[..., None].astype(np.float32)
