"""The sampler: the official runs step by step, and what must hold for any network."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from see3d_jax.diffusion.guidance import guide
from see3d_jax.diffusion.sampler import SamplerConfig, SamplerNoise, sample, sampling_steps
from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.diffusion.solvers import multistep_weights
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import apply_unet, unet_params_from_torch

QUICK = {"xla_backend_optimization_level": 0}
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 3, 4, 4, 5)).astype(np.float32)
MASK = np.ones((2, 3, 4, 4, 1), np.float32)
IS_REFERENCE = np.array([[True, False, False], [True, True, False]])
CONTEXT = np.zeros((2, 3, 1, 2), np.float32)
TRUTH = RNG.standard_normal(LATENTS.shape).astype(np.float32)
SCHEDULE = make_schedule(zero_snr=True)


def _oracle(x, t, context):
    """Knows the truth: the v that leads from X_t to it."""
    truth = jnp.tile(TRUTH, (x.shape[0] // 2, 1, 1, 1, 1))
    signal, noise = SCHEDULE.coefficients(t, 5)
    return SCHEDULE.target(truth, (x[..., :5] - signal * truth) / noise, t)


def test_official_sampling_ends_where_the_scheduler_file_says():
    official = {"config": {"timesteps": "official", "guidance": 0.0}, "keep_steps": True}
    target = ~IS_REFERENCE
    clean = dataclasses.replace(SCHEDULE, set_alpha_to_one=True)
    ends = [_sample(schedule=s, **official)[1][-1] for s in (SCHEDULE, clean)]
    np.testing.assert_allclose(ends[1][target], TRUTH[target], atol=1e-5)
    # ᾱ_0 = 0.99915 leaves a share of √(1 − ᾱ_0) = 0.029 of noise in the result
    assert 0.01 < np.std(np.asarray(ends[0] - ends[1])[target]) < 0.06


def _sample(denoise=_oracle, key=0, schedule=SCHEDULE, **settings):
    config = SamplerConfig(**{"num_steps": 8, **settings.pop("config", {})})
    inputs = (LATENTS, MASK, IS_REFERENCE, CONTEXT, jax.random.key(key))
    return sample(denoise, schedule, config, *inputs, **settings)


@pytest.mark.parametrize(
    "case",
    [
        "single_10",
        "sparse_50_nonsquare",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                "single_50",
                "single_10_guidance_rescale",
                "single_10_epsilon_no_zero_snr",
                "sr_30",
            )
        ),
    ],
)
def test_every_step_is_that_of_the_official_pipeline(shared, case):
    spec = json.loads((shared / f"goldens/sampler/{case}.json").read_text())
    io = load_file(shared / f"goldens/sampler/{case}.safetensors")
    io = {key: np.moveaxis(x, -3, -1) if x.ndim >= 4 else x for key, x in io.items()}
    folder = shared / "goldens/release_tiny/unet" / spec["unet"] / "ema-checkpoint"
    model = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, head_dim=16, context_dim=16
    )
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    params = unet_params_from_torch(tensors, model)
    official = spec["scheduler"]
    schedule = make_schedule(
        official["beta_schedule"],
        official["beta_start"],
        official["beta_end"],
        zero_snr=official["rescale_betas_zero_snr"],
        prediction={"v_prediction": "v", "epsilon": "epsilon"}[official["prediction_type"]],
    )
    config = SamplerConfig(
        num_steps=spec["num_inference_steps"],
        timesteps="official",
        guidance=spec["guidance_scale"],
        guidance_rescale=spec["guidance_rescale"],
        weight_form="clean" if spec["super_resolution"] else "code",
    )
    np.testing.assert_array_equal(sampling_steps(config)[0], io["timesteps"])
    views = spec["num_frames"]
    is_reference = (np.arange(views) < spec["gt_num"])[None]
    context = np.broadcast_to(io["unet_context"][0], (1, views, *io["unet_context"].shape[1:]))
    noises = SamplerNoise(io["init_noise"][None], io["warp_noise"][:, None])

    def run(params, latents, mask, is_reference, context, noises):
        return sample(
            lambda *inputs: apply_unet(model, params, *inputs),
            *(schedule, config, latents, mask, is_reference, context, jax.random.key(0)),
            noises=noises,
            keep_steps=True,
        )

    latents, mask = io["img_latents"][None], io["mask_latents"][None]
    run = jax.jit(run, compiler_options=QUICK)
    out, steps = run(params, latents, mask, is_reference, context, noises)
    # Without zero SNR the latents of an epsilon model reach 48 in size; see the README's tolerance.
    tolerance = 5e-4 if official["prediction_type"] == "epsilon" else 5e-5
    np.testing.assert_allclose(steps[:, 0], io["latents_after_step"], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(out[is_reference], latents[is_reference])


def test_official_50_steps_are_53_calls_with_its_quirks():
    calls, landings = sampling_steps(SamplerConfig(num_steps=50, timesteps="official"))
    assert len(calls) == 53 and list(calls[:3]) == [999, 980, 961] and calls[-1] == 11
    assert list(landings[:2]) == [979, 960] and landings[-1] == -1
    assert len(sampling_steps(SamplerConfig(num_steps=30, timesteps="official"))[0]) == 31


@pytest.mark.parametrize("count", [1, 2, 7, 50, 999])
def test_spaced_steps_are_as_many_as_asked_and_meet_each_other(count):
    calls, landings = sampling_steps(SamplerConfig(num_steps=count))
    assert len(calls) == count and calls[0] == 999 and landings[-1] == -1
    np.testing.assert_array_equal(landings[:-1], calls[1:])
    assert np.ptp(-np.diff(np.append(calls, -1))) <= 1


@pytest.mark.parametrize("count", [1, 2, 10, 53, 500, 999])
def test_quadratic_steps_shrink_towards_zero_without_repeating_any(count):
    calls, landings = sampling_steps(SamplerConfig(num_steps=count, timesteps="quadratic"))
    assert len(calls) == count and calls[0] == 999 and landings[-1] == -1
    assert calls[-1] == (0 if count > 1 else 999)
    np.testing.assert_array_equal(landings[:-1], calls[1:])
    assert np.all(np.diff(calls) < 0) and np.all(np.diff(calls, 2) >= -1)


@pytest.mark.parametrize(
    "guidance, solver, timesteps",
    [(0.0, "ddim", "spaced"), (2.0, "ddim", "spaced"), (2.0, "dpmpp_2m", "quadratic")],
)
def test_a_network_that_knows_the_truth_leads_to_it(guidance, solver, timesteps):
    config = {"guidance": guidance, "num_steps": 5, "solver": solver, "timesteps": timesteps}
    out = _sample(config=config)
    np.testing.assert_allclose(out[~IS_REFERENCE], TRUTH[~IS_REFERENCE], atol=1e-4)
    np.testing.assert_array_equal(out[IS_REFERENCE], LATENTS[IS_REFERENCE])


# Independent Gaussian latents N(μ, s²): the network that knows them is linear, and the ODE takes
# the noise z at ᾱ = 0 to μ + s·z, along x = √ᾱ·μ + √(ᾱ·s² + 1 − ᾱ)·z.
MEAN = RNG.standard_normal(LATENTS.shape).astype(np.float32)
WIDTH = np.exp(RNG.uniform(-3, 0.5, LATENTS.shape)).astype(np.float32)
NOISE = RNG.standard_normal(LATENTS.shape).astype(np.float32)


def _denoised(x, alpha_bar):
    signal, variance = np.sqrt(alpha_bar), alpha_bar * WIDTH**2 + 1 - alpha_bar
    return MEAN + signal * WIDTH**2 / variance * (x - signal * MEAN)


def _exact(alpha_bar):
    return np.sqrt(alpha_bar) * MEAN + np.sqrt(alpha_bar * WIDTH**2 + 1 - alpha_bar) * NOISE


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def test_the_multistep_solver_is_of_second_order_where_ddim_is_of_first():
    def error(steps, second_order):
        snr = np.exp(np.linspace(-5, 5, steps + 1))  # e^(2λ), even steps in λ
        levels = snr / (1 + snr)
        weights = np.asarray(multistep_weights(levels[:-1], levels[1:]), np.float64)
        if not second_order:
            weights[:, 1:] = np.stack([weights[:, 1:].sum(1), np.zeros(steps)], -1)
        x, before = _exact(levels[0]), 0.0
        for level, weight in zip(levels, weights):
            now = _denoised(x, level)
            x, before = weight[0] * x + weight[1] * now + weight[2] * before, now
        return _rms(x - _exact(levels[-1]))

    first, second = ([error(n, order) for n in (20, 40, 80)] for order in (False, True))
    assert 1.7 < first[0] / first[1] < 2.4 and 1.7 < first[1] / first[2] < 2.4
    assert 3.2 < second[0] / second[1] < 5.5 and 3.2 < second[1] / second[2] < 5.5
    assert second[0] < first[0] / 5


def test_multistep_starts_and_ends_as_ddim_does_at_zero_and_infinite_snr():
    levels = np.array([0.0, 0.01, 0.3, 0.9, 1.0])
    weights = multistep_weights(levels[:-1], levels[1:])
    assert np.all(np.isfinite(weights))
    np.testing.assert_allclose(weights[0], [np.sqrt(0.99), np.sqrt(0.01), 0], rtol=1e-6)
    np.testing.assert_allclose(weights[-1], [0, 1, 0], atol=1e-6)
    assert np.all(weights[1:-1, 2] < 0)  # all others extrapolate


def test_ten_second_order_calls_come_closer_than_53_official_ones():
    def denoise(x, t, context):
        x = x[..., :5]
        signal, noise = SCHEDULE.coefficients(t, 5)
        share = signal * WIDTH**2 / (signal**2 * WIDTH**2 + noise**2)
        x_0 = MEAN + share * (x - signal * MEAN)
        return SCHEDULE.target(x_0, (x - signal * x_0) / noise, t)

    def error(steps, timesteps, solver):
        config = {"num_steps": steps, "timesteps": timesteps, "solver": solver, "guidance": 0.0}
        calls = len(sampling_steps(SamplerConfig(**config))[0])
        noises = SamplerNoise(NOISE, np.zeros((calls, *NOISE.shape), np.float32))
        out = _sample(denoise, config=config, noises=noises)
        return _rms((out - MEAN - WIDTH * NOISE)[~IS_REFERENCE])

    official = error(50, "official", "ddim")
    ten, twenty = (error(n, "quadratic", "dpmpp_2m") for n in (10, 20))
    assert ten < official / 1.5 and twenty < ten / 2
    assert ten < error(10, "quadratic", "ddim") / 3 and ten < error(10, "spaced", "ddim") / 4


def test_guidance_doubles_the_batch_only_when_it_is_on():
    sizes = []

    def denoise(x, t, context):
        assert x.shape[:2] == t.shape == context.shape[:2] and x.shape[-1] == 11
        sizes.append(x.shape[0])
        return x[..., :5]

    _sample(denoise, config={"guidance": 0.0})
    _sample(denoise, config={"guidance": 2.0})
    assert set(sizes[: len(sizes) // 2]) == {2} and set(sizes[len(sizes) // 2 :]) == {4}


def test_guidance_compares_with_no_warp_rather_than_no_reference():
    seen = []

    def denoise(x, t, context):
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), x)
        return x[..., :5]

    jax.block_until_ready(_sample(denoise, config={"num_steps": 1}))
    jax.effects_barrier()
    cond, uncond = np.split(seen[0], 2)
    np.testing.assert_array_equal(cond[..., :5], uncond[..., :5])
    np.testing.assert_array_equal(cond[IS_REFERENCE], uncond[IS_REFERENCE])
    assert not uncond[~IS_REFERENCE][..., 5:].any() and cond[~IS_REFERENCE][..., 5:].any()


def test_super_resolution_sees_the_condition_itself_and_given_noise_replaces_the_key():
    seen = []

    def denoise(x, t, context):
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), x)
        return x[..., :5]

    noises = SamplerNoise(NOISE, np.ones((1, *NOISE.shape), np.float32))
    for form in ("clean", "code"):
        config = {"num_steps": 1, "guidance": 0.0, "weight_form": form}
        runs = [_sample(denoise, key, config=config, noises=noises) for key in (0, 1)]
        np.testing.assert_array_equal(*runs)
    jax.effects_barrier()
    clean, _, mixed, _ = (x[~IS_REFERENCE] for x in seen)
    np.testing.assert_array_equal(clean[..., :5], NOISE[~IS_REFERENCE])
    np.testing.assert_array_equal(clean[..., 5:10], LATENTS[~IS_REFERENCE])
    assert np.abs(mixed[..., 5:10] - LATENTS[~IS_REFERENCE]).min() > 0  # ε' = 1 everywhere


def test_rescaled_guidance_restores_each_views_contrast(shared):
    tables = load_file(shared / "goldens/sampler/scheduler_tables.safetensors")
    text, cfg = (np.moveaxis(tables[f"rescale_cfg.in_{k}"], 1, -1)[None] for k in ("text", "cfg"))
    # guide() forms cfg itself: with guidance 1, cfg = 2·cond − uncond
    out = guide(text, 2 * text - cfg, 1.0, 0.7)
    expected = np.moveaxis(tables["rescale_cfg.out_0.7"], 1, -1)[None]
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_full_rescaling_gives_each_view_the_contrast_of_its_conditional_prediction():
    cond, uncond = TRUTH, LATENTS
    out = guide(cond, uncond, 3.0, 1.0)
    wanted = np.std(cond, axis=(2, 3, 4), ddof=1)
    np.testing.assert_allclose(np.std(out, axis=(2, 3, 4), ddof=1), wanted, rtol=1e-5)
    plain = guide(cond, uncond, 3.0)
    np.testing.assert_allclose(plain, 4 * cond - 3 * uncond, rtol=1e-6)
    half = guide(cond, uncond, 3.0, 0.5)
    np.testing.assert_allclose(half, (out + plain) / 2, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_runs_repeat_under_jit_and_report_progress(solver):
    done = []

    def run(key, progress=None):
        fade = lambda x, t, context: 0.5 * x[..., :5]  # noqa: E731
        return _sample(fade, key, progress=progress, config={"solver": solver})

    plain = jax.jit(run, compiler_options=QUICK)
    first, again, other = plain(0), plain(0), plain(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other)[~IS_REFERENCE].max() > 0.1
    reported = jax.jit(lambda key: run(key, lambda i, n: done.append((i, n))))(0)
    jax.effects_barrier()
    assert sorted(done) == [(i + 1, 8) for i in range(8)]
    np.testing.assert_allclose(reported, first, atol=1e-5)


def test_impossible_settings_are_refused():
    refused = (
        {"timesteps": "leading"},
        {"num_steps": 0},
        {"weight_form": "none"},
        {"solver": "euler"},
        {"solver": "dpmpp_2m", "timesteps": "official"},
    )
    for settings in refused:
        with pytest.raises(ValueError, match=next(iter(settings))):
            SamplerConfig(**settings)
