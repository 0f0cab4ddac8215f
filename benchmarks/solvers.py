"""How close few sampling steps come to many: DDIM against DPM-Solver++(2M), by spacing and calls.

    python -m benchmarks.solvers [--case SAMPLER_CASE.json] [--json FILE]

Two problems. "gaussian": independent Gaussian latents of widths 0.05 to 1.6, where the exact end of
the ODE is known. "network" (with --case): the network and inputs of a recorded sampler run, against
999 DDIM steps, with the condition noise ε' held fixed over the steps ("fixed": what remains is the
solver's error) and drawn anew at every step as in use ("fresh": includes the randomness that any
two runs differ by). Prints root mean square errors over the target views.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json

# (solver, timesteps, nominal steps); the last is what the released pipeline does.
RUNS = [
    (solver, timesteps, steps)
    for steps in (10, 20, 53)
    for solver, timesteps in (
        ("ddim", "spaced"), ("ddim", "quadratic"), ("dpmpp_2m", "spaced"), ("dpmpp_2m", "quadratic")
    )
] + [("ddim", "official", 50)]  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.solvers
  python -m benchmarks.solvers --case shared/goldens/sampler/single_50.json --json solvers.json
"""
)
@click.option(
    "--case",
    type=click.Path(path_type=Path),
    help="Recorded run, sampler/NAME.json beside release_tiny/ and NAME.safetensors.",
)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(case: Path | None, output: Path | None) -> None:
    """Prints the error of every solver, spacing and number of calls."""
    rows = gaussian()
    if case is not None:
        for row, more in zip(rows, network(case)):
            row.update(more)
    columns = [key for key in rows[0] if key not in ("solver", "timesteps", "calls")]
    click.echo(f"{'solver':10}{'timesteps':11}{'calls':>6}" + "".join(f"{c:>16}" for c in columns))
    for row in rows:
        click.echo(
            f"{row['solver']:10}{row['timesteps']:11}{row['calls']:6d}"
            + "".join(f"{row[column]:16.5f}" for column in columns)
        )
    if output is not None:
        write_json(output, {"case": None if case is None else case.stem, "rows": rows})


def gaussian() -> list[dict[str, Any]]:
    """Errors on Gaussian latents: x_0 ~ N(μ, s²), where the ODE takes the noise z to μ + s·z."""
    import jax
    import jax.numpy as jnp

    from see3d_jax.diffusion.sampler import SamplerConfig, SamplerNoise, sample, sampling_steps
    from see3d_jax.diffusion.schedule import make_schedule

    schedule = make_schedule(zero_snr=True)
    rng = np.random.default_rng(0)
    shape = (1, 2, 16, 16, 4)
    mean, z = rng.standard_normal((2, *shape)).astype(np.float32)
    width = np.exp(rng.uniform(-3, 0.5, shape)).astype(np.float32)

    def denoise(x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        x = x[..., :4]
        signal, noise = schedule.coefficients(t, 5)
        share = signal * width**2 / (signal**2 * width**2 + noise**2)
        x_0 = mean + share * (x - signal * mean)
        return schedule.target(x_0, (x - signal * x_0) / noise, t)

    rows = []
    for solver, timesteps, steps in RUNS:
        config = SamplerConfig(steps, timesteps, solver, guidance=0.0)
        calls = len(sampling_steps(config)[0])
        noises = SamplerNoise(z, jnp.zeros((calls, *shape)))
        is_reference = jnp.array([[True, False]])
        inputs = (jnp.zeros(shape), jnp.ones((*shape[:-1], 1)), is_reference, jnp.zeros((1, 2, 1)))
        out = sample(denoise, schedule, config, *inputs, jax.random.key(0), noises=noises)
        error = _rms(out[:, 1] - (mean + width * z)[:, 1])
        rows.append({"solver": solver, "timesteps": timesteps, "calls": calls, "gaussian": error})
    return rows


def network(case: Path, seeds: int = 4) -> list[dict[str, float]]:
    """Errors of a real network on recorded inputs, against 999 DDIM steps; rows as `RUNS`."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from see3d_jax.diffusion.sampler import SamplerConfig, SamplerNoise, sample, sampling_steps
    from see3d_jax.diffusion.schedule import make_schedule
    from see3d_jax.models.unet import UNetConfig
    from see3d_jax.models.weights import apply_unet, unet_params_from_torch

    if not case.is_file():
        raise InputError(f"--case {case}: no such file")
    spec = json.loads(case.read_text())
    folder = case.parent.parent / "release_tiny/unet" / spec["unet"] / "ema-checkpoint"
    official = json.loads((folder / "config.json").read_text())
    same = ("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks")
    unet = UNetConfig(
        **{name: official[name] for name in (*same, "context_dim")},
        attention_strides=official["attention_resolutions"],
        head_dim=official["num_head_channels"],
    )
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    params = unet_params_from_torch(tensors, unet)
    schedule = make_schedule(zero_snr=True)
    io = load_file(case.with_suffix(".safetensors"))
    latents, mask = (np.moveaxis(io[k], -3, -1)[None] for k in ("img_latents", "mask_latents"))
    views = latents.shape[1]
    is_reference = (np.arange(views) < spec["gt_num"])[None]
    context = np.broadcast_to(io["unet_context"][0], (1, views, *io["unet_context"].shape[1:]))

    def run(config: SamplerConfig, seed: int, fixed: bool) -> np.ndarray:
        calls = len(sampling_steps(config)[0])
        initial, condition = jax.random.normal(jax.random.key(seed), (2, *latents.shape))
        shape = (calls, *latents.shape)
        keys = jax.random.key(seed + 1000 * calls)
        fresh = jnp.broadcast_to(condition, shape) if fixed else jax.random.normal(keys, shape)
        return np.asarray(jitted(config, params, SamplerNoise(initial, fresh)))

    def once(config: SamplerConfig, params: dict, noises: SamplerNoise) -> jax.Array:
        denoise = lambda *inputs: apply_unet(unet, params, *inputs)  # noqa: E731
        inputs = (latents, mask, is_reference, context, jax.random.key(0))
        return sample(denoise, schedule, config, *inputs, noises=noises)[~is_reference]

    jitted = jax.jit(once, static_argnums=0)
    fine = [run(SamplerConfig(999), seed, True) for seed in range(seeds)]
    rows = []
    for solver, timesteps, steps in RUNS:
        config = SamplerConfig(steps, timesteps, solver)
        errors = [
            [_rms(run(config, seed, fixed) - fine[seed]) for seed in range(seeds)]
            for fixed in (True, False)
        ]
        rows.append(
            {"network fixed": float(np.mean(errors[0])), "fresh": float(np.mean(errors[1]))}
        )
    return rows


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
