"""Noise schedules: the official tables, and conversions that invert each other."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from see3d_jax.diffusion.schedule import make_schedule


def test_tables_are_the_official_ones(shared):
    tables = load_file(shared / "goldens/sampler/scheduler_tables.safetensors")
    plain, rescaled = make_schedule(), make_schedule(zero_snr=True)
    np.testing.assert_allclose(plain.alphas_cumprod, tables["alphas_cumprod"], rtol=1e-6)
    np.testing.assert_allclose(
        rescaled.alphas_cumprod, tables["alphas_cumprod_zero_snr"], rtol=1e-6
    )


def test_noise_is_added_as_officially(shared):
    tables = load_file(shared / "goldens/sampler/scheduler_tables.safetensors")
    schedule = make_schedule(zero_snr=True)
    for t in (0, 2, 60, 199, 999):
        noisy = schedule.add_noise(tables["step.x"], tables["add_noise.noise"], jnp.asarray(t))
        np.testing.assert_allclose(noisy, tables[f"add_noise.{t}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_signal_only_fades(kind):
    alphas = make_schedule(kind).alphas_cumprod
    assert alphas.shape == (1000,) and alphas.dtype == np.float32
    assert np.all(np.diff(alphas) < 0) and 0 < alphas[-1] < alphas[0] < 1


def test_zero_snr_keeps_the_start_and_ends_in_pure_noise():
    plain, rescaled = make_schedule().alphas_cumprod, make_schedule(zero_snr=True).alphas_cumprod
    assert rescaled[-1] == 0
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-6)
    assert np.all(np.diff(rescaled) < 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 950), st.sampled_from(["epsilon", "v", "sample"]), st.integers(0, 2**31))
def test_the_target_leads_back_to_image_and_noise(t, prediction, seed):
    schedule = make_schedule(prediction=prediction)
    x_0, eps = np.random.default_rng(seed).standard_normal((2, 2, 3, 2, 2, 4), np.float32)
    steps = np.array([[t, t + 1, t + 49], [0, t, 0]])
    x_t, output = schedule.add_noise(x_0, eps, steps), schedule.target(x_0, eps, steps)
    found = schedule.to_x0_eps(x_t, output, steps)
    np.testing.assert_allclose(found[0], x_0, atol=2e-4)
    np.testing.assert_allclose(found[1], eps, atol=2e-4)
    # one t per sample means the same t for all its views
    one = schedule.add_noise(x_0, eps, np.array([t, 0]))
    np.testing.assert_array_equal(one[0], schedule.add_noise(x_0, eps, np.full((2, 3), t))[0])


def test_predicting_noise_where_nothing_else_is_left_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"divided by zero.*prediction='v'"):
        make_schedule(zero_snr=True, prediction="epsilon")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="kind"):
        make_schedule("cosine")
    with pytest.raises(ValueError, match="prediction"):
        make_schedule(prediction="v_prediction")
