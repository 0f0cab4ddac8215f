"""The visual condition: how far the network is told to trust the warp, and what it gets to see."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.diffusion.visual_condition import (
    condition_form,
    condition_timestep,
    mix_condition,
    mixing_weight,
    network_input,
)


def test_weights_are_the_official_ones(shared):
    weight = load_file(shared / "goldens/sampler/scheduler_tables.safetensors")["weight"]
    ours = mixing_weight(jnp.arange(0, 1000, 5))
    np.testing.assert_allclose(ours, weight[:200], rtol=1e-6, atol=1e-7)


def test_code_and_paper_forms_agree_above_300_and_differ_below():
    t = jnp.arange(0, 1000, 5)
    code, paper = mixing_weight(t, "code"), mixing_weight(t, "paper")
    np.testing.assert_allclose(code[60:], paper[60:], atol=1e-6)
    np.testing.assert_allclose(mixing_weight(jnp.array(250), "code"), 0.378, atol=5e-4)
    np.testing.assert_allclose(mixing_weight(jnp.array(250), "paper"), 0.019, atol=5e-4)
    for weight in (code, paper):
        assert np.all(np.diff(weight) >= 0) and weight[0] < 0.01 and 0.99 < weight[-1] <= 1
    with pytest.raises(ValueError, match="weight form"):
        mixing_weight(t, "linear")


def test_condition_timestep_is_exact_division():
    np.testing.assert_array_equal(condition_timestep(jnp.arange(1000)), np.arange(1000) // 5)


def test_targets_trust_the_condition_early_and_their_own_state_late():
    rng = np.random.default_rng(0)
    x_t, condition, eps = rng.standard_normal((3, 2, 3, 4, 4, 5), np.float32)
    schedule = make_schedule(zero_snr=True)
    early = mix_condition(schedule, x_t, condition, eps, jnp.array([999, 999]))
    noisy = schedule.add_noise(condition, eps, jnp.array([199, 199]))
    np.testing.assert_allclose(early, noisy, atol=0.01)
    late = mix_condition(schedule, x_t, condition, eps, jnp.array([0, 0]))
    np.testing.assert_allclose(late, x_t, atol=0.05)
    clean = mix_condition(schedule, x_t, condition, eps, jnp.array([500, 0]), form="clean")
    np.testing.assert_array_equal(clean, condition)


def test_references_are_clean_and_known_whatever_is_dropped():
    rng = np.random.default_rng(0)
    x_t, v_t, x_0 = rng.standard_normal((3, 2, 3, 2, 2, 5), np.float32)
    mask = np.zeros((2, 3, 2, 2, 1), np.float32)
    mask[:, 1, 0] = 1
    is_reference = np.array([[True, False, False], [True, False, True]])
    out = network_input(x_t, v_t, mask, x_0, is_reference, drop=np.array([False, True]))
    assert out.shape == (2, 3, 2, 2, 11)
    for sample, view in zip(*np.nonzero(is_reference)):
        np.testing.assert_array_equal(out[sample, view, ..., :5], x_0[sample, view])
        np.testing.assert_array_equal(out[sample, view, ..., 5:10], x_0[sample, view])
        assert np.all(out[sample, view, ..., 10] == 1)
    np.testing.assert_array_equal(out[0, 1, ..., 5:10], v_t[0, 1])
    np.testing.assert_array_equal(out[0, 1, ..., 10:], mask[0, 1])
    assert not out[1, 1, ..., 5:].any(), "a dropped sample must not see warp or mask"
    np.testing.assert_array_equal(out[1, 1, ..., :5], x_t[1, 1])


def test_every_condition_has_its_form_of_the_mixing_weight():
    assert condition_form("unposed_t", "code") == "code"
    assert condition_form("unposed_t", "paper") == "paper"
    for condition in ("unposed_m", "posed", "superres"):
        assert condition_form(condition, "code") == "clean"
    with pytest.raises(ValueError, match="condition: expected one of"):
        condition_form("unposed", "code")
    with pytest.raises(ValueError, match="weight_form: expected 'code' or 'paper', got 'clean'"):
        condition_form("unposed_t", "clean")
