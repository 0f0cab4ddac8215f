"""The training loss: zero for a perfect network, blind to references, repeatable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.diffusion.loss import diffusion_loss, draw_loss_noise
from see3d_jax.diffusion.schedule import make_schedule

RNG = np.random.default_rng(0)
X_0, CONDITION = RNG.standard_normal((2, 64, 3, 2, 2, 5), np.float32)
MASK = np.ones((64, 3, 2, 2, 1), np.float32)
IS_REFERENCE = np.zeros((64, 3), bool)
IS_REFERENCE[:, 0] = True
CONTEXT = np.zeros((64, 3, 1, 2), np.float32)
SCHEDULE = make_schedule(zero_snr=True)


ROWS, VIEWS = np.arange(64), np.arange(3)


def _noise(key=0, rows=ROWS, views=VIEWS, drop_probability=0.1):
    return draw_loss_noise(
        jax.random.key(key), rows, views, X_0.shape[2:],
        num_timesteps=1000, drop_probability=drop_probability,
    )  # fmt: skip


def _loss(denoise, key=0, schedule=SCHEDULE, drop_probability=0.1, **settings):
    inputs = (X_0, CONDITION, MASK, IS_REFERENCE, CONTEXT)
    noise = _noise(key, drop_probability=drop_probability)
    return diffusion_loss(denoise, schedule, *inputs, noise, **settings)


def _oracle(schedule, wrong_by=0.0):
    """Knows X_0 and so the exact target; adds an error to reference views only."""

    def denoise(x, t, context):
        signal, noise = schedule.coefficients(t, 5)
        target = schedule.target(X_0, (x[..., :5] - signal * X_0) / noise, t)
        return target + wrong_by * IS_REFERENCE[..., None, None, None]

    return denoise


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_network_has_no_loss_however_wrong_on_references(prediction):
    schedule = make_schedule(prediction=prediction)
    loss, aux = _loss(_oracle(schedule, wrong_by=100.0), schedule=schedule)
    assert loss < 1e-4
    assert aux["loss"].shape == aux["t"].shape == aux["dropped"].shape == (64,)


def test_a_silent_network_scores_the_mean_square_of_the_target():
    loss, aux = _loss(lambda x, t, context: jnp.zeros_like(x[..., :5]))
    assert 0.85 < loss < 1.15  # v has unit variance
    np.testing.assert_allclose(aux["loss"].mean(), loss, rtol=1e-5)


def test_timesteps_cover_the_range_and_views_share_them():
    seen = []
    _, aux = _loss(lambda x, t, context: seen.append(t) or jnp.zeros_like(x[..., :5]))
    np.testing.assert_array_equal(seen[0], np.broadcast_to(aux["t"][:, None], (64, 3)))
    assert aux["t"].min() < 150 and aux["t"].max() > 850
    assert 0 < aux["dropped"].sum() < 24  # 6.4 expected


def test_dropping_hides_warp_and_mask_from_targets_only():
    seen = []
    _loss(lambda x, t, context: seen.append(x) or x[..., :5], drop_probability=1.0)
    assert not np.any(seen[0][:, 1:, ..., 5:])
    np.testing.assert_array_equal(seen[0][:, 0, ..., 5:10], X_0[:, 0])


def test_the_same_key_repeats_and_another_does_not():
    silent = lambda x, t, context: jnp.zeros_like(x[..., :5])  # noqa: E731
    assert _loss(silent)[0] == _loss(silent)[0] != _loss(silent, key=1)[0]


def test_noise_of_a_view_depends_on_its_row_and_place_only():
    whole = jax.tree.map(np.asarray, _noise())
    part = _noise(rows=ROWS[[7, 3]], views=VIEWS[[2]])
    np.testing.assert_array_equal(part.t, whole.t[[7, 3]])
    np.testing.assert_array_equal(part.dropped, whole.dropped[[7, 3]])
    np.testing.assert_array_equal(part.eps, whole.eps[[7, 3]][:, [2]])
    np.testing.assert_array_equal(part.eps_condition, whole.eps_condition[[7, 3]][:, [2]])


def test_all_noise_is_independent_and_of_unit_variance():
    noise = _noise()
    flat = np.stack([noise.eps, noise.eps_condition]).reshape(2 * 64 * 3, -1)
    assert len(np.unique(flat[:, 0])) == len(flat)
    assert abs(np.corrcoef(noise.eps.ravel(), noise.eps_condition.ravel())[0, 1]) < 0.05
    assert 0.95 < flat.std() < 1.05


def test_the_loss_of_a_batch_is_the_sum_over_its_parts():
    silent = lambda x, t, context: jnp.zeros_like(x[..., :5])  # noqa: E731
    reference = IS_REFERENCE.copy()
    reference[::3, 1] = True  # samples differ in their number of targets
    targets = (~reference).sum()

    def part(rows, views=VIEWS):
        cut = [x[rows][:, views] for x in (X_0, CONDITION, MASK, reference, CONTEXT)]
        noise = _noise(rows=ROWS[rows], views=views)
        return diffusion_loss(silent, SCHEDULE, *cut, noise, targets=targets)[0]

    whole = part(ROWS)
    np.testing.assert_allclose(part(ROWS[:20]) + part(ROWS[20:]), whole, rtol=1e-6)
    np.testing.assert_allclose(part(ROWS, VIEWS[:1]) + part(ROWS, VIEWS[1:]), whole, rtol=1e-6)


def test_min_snr_weighting_tames_clean_samples_under_epsilon():
    schedule = make_schedule(prediction="epsilon")
    silent = lambda x, t, context: jnp.zeros_like(x[..., :5])  # noqa: E731
    plain, _ = _loss(silent, schedule=schedule)
    weighted, aux = _loss(silent, schedule=schedule, weighting="min_snr")
    snr = schedule.alphas_cumprod[aux["t"]] / (1 - schedule.alphas_cumprod[aux["t"]])
    expected = (np.minimum(snr, 5) / snr * aux["loss"]).mean()
    np.testing.assert_allclose(weighted, expected, rtol=1e-4)
    assert weighted < plain


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_sample_weighting_counts_errors_of_the_clean_latents(prediction):
    schedule = make_schedule(prediction=prediction)

    def off_by_two(x, t, context):
        return schedule.from_x0(x[..., :5], X_0 + 2.0, t)

    loss, _ = _loss(off_by_two, schedule=schedule, weighting="sample")
    np.testing.assert_allclose(loss, 4.0, rtol=1e-3)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting: expected one of"):
        _loss(lambda x, t, context: x[..., :5], weighting="snr")
