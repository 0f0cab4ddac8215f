"""FLOPs: the analytic count is what the real network does, and the published figures come out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import abstract_unet, apply_unet
from see3d_jax.training.flops import forward_flops, model_flops, peak_flops
from tools.plan_jaxpr import executed_flops

FULL = UNetConfig()
# Plain attention everywhere: the chunked form pads its last chunk, which is work beyond the model.
SMALL = UNetConfig(
    model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=1, attention_strides=(1, 2),
    head_dim=16, context_dim=24, norm_groups=16, attention_backend="plain",
)  # fmt: skip


def shapes(config, views, height, width, tokens):
    """Abstract parameters and inputs of one sample."""
    x = jax.ShapeDtypeStruct((1, views, height, width, config.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1, views), jnp.int32)
    context = jax.ShapeDtypeStruct((1, views, tokens, config.context_dim), jnp.float32)
    inputs = [abstract_unet(config), x, t, context]
    if config.camera_dim is not None:
        inputs.append(jax.ShapeDtypeStruct((1, views, config.camera_dim), jnp.float32))
    return inputs


def traced_flops(config, *size, backward=False):
    run = functools.partial(apply_unet, config)
    if backward:
        run = jax.grad(lambda *inputs: apply_unet(config, *inputs).sum())
    return executed_flops(jax.make_jaxpr(run)(*shapes(config, *size))).total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_mult": (1, 2), "num_res_blocks": 2, "attention_strides": (2,)},
        {"channel_mult": (1, 1, 2), "attention_strides": (), "context_dim": 40},
        {"in_channels": 4, "camera_dim": 16},
    ],
)
@pytest.mark.parametrize("size", [(3, 16, 8, 5), (1, 8, 8, 1)])
def test_the_forward_count_is_that_of_the_traced_network(changes, size):
    config = UNetConfig(**{**vars(SMALL), **changes})
    assert forward_flops(config, *size).total == traced_flops(config, *size)


def test_the_full_network_is_counted_exactly_and_as_published():
    # without remat, XLA's softmax: nothing but the model
    plain = UNetConfig(attention_backend="plain")
    assert forward_flops(FULL, 16, 64, 64, 77).total == traced_flops(plain, 16, 64, 64, 77)
    assert forward_flops(FULL, 16, 64, 64, 77).total == pytest.approx(42.2e12, rel=0.005)
    assert forward_flops(FULL, 5, 64, 64, 77).total == pytest.approx(6.46e12, rel=0.005)
    for views, share in ((1, 0.15), (5, 0.47), (16, 0.74), (25, 0.82)):
        count = forward_flops(FULL, views, 64, 64, 77)
        assert count.self_attention / count.total == pytest.approx(share, abs=0.005)


def test_backward_costs_two_forward_passes():
    # The first convolution and the context have no gradient to send further back.
    traced = traced_flops(SMALL, 3, 16, 16, 5, backward=True)
    assert model_flops(SMALL, 3, 16, 16, 5) == pytest.approx(traced, rel=0.005)


def test_self_attention_alone_grows_with_the_square_of_the_views():
    one, two = (forward_flops(FULL, views, 64, 64, 77) for views in (4, 8))
    assert two.self_attention == 4 * one.self_attention
    for part in ("convolution", "linear", "cross_attention"):
        assert getattr(two, part) == 2 * getattr(one, part)


@pytest.mark.parametrize("size", [(0, 64, 64, 77), (4, 60, 64, 77), (4, 64, 4, 77), (4, 64, 64, 0)])
def test_sizes_that_the_network_does_not_take_are_refused(size):
    with pytest.raises(ValueError, match="size"):
        forward_flops(FULL, *size)


def test_devices_have_a_peak_where_it_is_known():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
