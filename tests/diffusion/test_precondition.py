"""The head start: the posterior mean of Gaussian latents, whatever the network is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.diffusion.precondition import gaussian_estimate, precondition
from see3d_jax.diffusion.sampler import SamplerConfig, sample
from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.diffusion.visual_condition import mix_condition, network_input

SCHEDULE = make_schedule(kind="linear", zero_snr=True)
DEVIATION = np.array([3.0, 1.0, 0.3], np.float32)
SHAPE = (1, 2, 64, 64, 3)  # 4096 draws of each channel and view
W_T = {"form": "code", "beta": 0.2}


def _draw(t, known, form="code"):
    """Gaussian latents and the network's input at timestep t; view 0 is the reference."""
    keys = jax.random.split(jax.random.key(t), 3)
    x_0, eps, eps_c = (jax.random.normal(key, SHAPE) for key in keys)
    x_0 = x_0 * DEVIATION
    times = jnp.full(SHAPE[:2], t)
    x_t = SCHEDULE.add_noise(x_0, eps, times)
    mask = jnp.full((*SHAPE[:-1], 1), float(known))
    v_t = mix_condition(SCHEDULE, x_t, x_0 * mask, eps_c, times, form=form)
    is_reference = jnp.array([[True, False]])
    return x_0, network_input(x_t, v_t, mask, x_0, is_reference), times


@pytest.mark.parametrize("t", [0, 20, 250, 700, 999])
@pytest.mark.parametrize("known", [False, True])
def test_its_error_is_what_it_says_and_no_linear_estimate_beats_it(t, known, monkeypatch):
    monkeypatch.setattr("see3d_jax.diffusion.precondition._DISTRUST", 0.0)
    x_0, x, times = _draw(t, known)
    mean, spread = gaussian_estimate(x, times, SCHEDULE, DEVIATION, **W_T)
    error = np.asarray(mean - x_0)[:, 1]
    measured, stated = error.std((0, 1, 2)), np.asarray(spread)[0, 1, 0, 0]
    np.testing.assert_allclose(measured, stated, rtol=0.05)
    looks = np.asarray(x)[:, 1, ..., :6].reshape(-1, 6)
    for channel in range(3):
        pair = looks[:, [channel, channel + 3]]
        truth = np.asarray(x_0)[:, 1, ..., channel].ravel()
        best = truth - pair @ np.linalg.lstsq(pair, truth, rcond=None)[0]
        assert measured[channel] <= 1.05 * best.std() + 1e-4


@pytest.mark.parametrize("t", [100, 700, 999])
def test_what_a_hole_was_filled_with_is_trusted_as_far_as_it_deserves(t):
    """x_0 in holes is C plus an error of the stated deviation: the estimate is the posterior."""
    times = jnp.full(SHAPE[:2], t)
    fill, error = jax.random.normal(jax.random.key(5), (2, *SHAPE)) * DEVIATION
    fill, error = fill * 0.8, error * 0.6
    x_0 = fill + error
    eps, eps_c = jax.random.normal(jax.random.key(6), (2, *SHAPE))
    x_t = SCHEDULE.add_noise(x_0, eps, times)
    v_t = mix_condition(SCHEDULE, x_t, fill, eps_c, times)
    hole, reference = jnp.zeros((*SHAPE[:-1], 1)), jnp.array([[True, False]])
    x = network_input(x_t, v_t, hole, x_0, reference)
    mean, spread = gaussian_estimate(x, times, SCHEDULE, DEVIATION, **W_T, filled=True)
    measured = np.asarray(mean - x_0)[:, 1].std((0, 1, 2))
    np.testing.assert_allclose(measured, spread[0, 1, 0, 0], rtol=0.05)

    dropped = network_input(x_t, v_t, hole, x_0, reference, jnp.array([True]))
    without = gaussian_estimate(dropped, times, SCHEDULE, DEVIATION, **W_T)
    ignored = gaussian_estimate(dropped, times, SCHEDULE, DEVIATION, **W_T, filled=True)
    np.testing.assert_array_equal(without[0][:, 1], ignored[0][:, 1])


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_a_silent_network_copies_what_is_known(prediction):
    schedule = make_schedule(kind="linear", zero_snr=True, prediction=prediction)
    x_0 = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 3)) * DEVIATION
    silent = lambda x, t, context: jnp.zeros_like(x[..., :3])  # noqa: E731
    denoise = precondition(silent, "gaussian", schedule, DEVIATION, **W_T)
    mask = jnp.ones((1, 2, 8, 8, 1)).at[:, :, :4].set(0)
    made = sample(
        denoise, schedule, SamplerConfig(num_steps=8, guidance=0.0), x_0 * mask, mask,
        jnp.array([[True, False]]), jnp.zeros((1, 2, 1, 4)), jax.random.key(1),
    )  # fmt: skip
    error = np.abs(made - x_0)[0, 1] / DEVIATION
    assert error[4:, :, 0].mean() < 0.1 < 0.5 < error[:4, :, 0].mean()


def test_none_is_the_network_itself_and_others_are_refused():
    network = lambda x, t, context: x  # noqa: E731
    assert precondition(network, "none", SCHEDULE, DEVIATION, **W_T) is network
    with pytest.raises(ValueError, match="preconditioning: expected one of"):
        precondition(network, "edm", SCHEDULE, DEVIATION, **W_T)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_outputs_made_from_clean_latents_lead_back_to_them(prediction):
    schedule = make_schedule(prediction=prediction)
    t = jnp.array([[0, 1, 500, 999]])
    x_0, x_t = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 2, 3))
    back, _ = schedule.to_x0_eps(x_t, schedule.from_x0(x_t, x_0, t), t)
    np.testing.assert_allclose(back, x_0, atol=1e-4)
