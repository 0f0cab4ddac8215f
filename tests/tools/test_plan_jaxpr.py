"""The FLOP count of a traced function: exactly what would be executed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from tools.plan_jaxpr import executed_flops

A, B = jnp.zeros((4, 8)), jnp.zeros((8, 16))
PRODUCT = 2 * 4 * 8 * 16


def count(function, *arguments, **options):
    return executed_flops(jax.make_jaxpr(function)(*arguments), **options)


def test_products_count_two_per_multiply_add_whatever_the_layout():
    batched = jnp.zeros((3, 4, 8)), jnp.zeros((3, 16, 8))
    assert count(jnp.matmul, A, B).matmul == PRODUCT
    assert count(lambda a, b: jnp.einsum("nij,nkj->nik", a, b), *batched).matmul == 3 * PRODUCT


def test_loops_count_every_trip_and_branches_the_dearest():
    def loop(a, b):
        return jax.lax.scan(lambda carry, _: (carry, (carry @ b).sum()), a, None, length=7)[1]

    def branch(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: a.sum())

    assert count(loop, A, B).matmul == 7 * PRODUCT
    assert count(jax.jit(branch), A, B).matmul == PRODUCT


def test_a_loop_of_unknown_length_is_refused_rather_than_counted_once():
    def loop(a, b):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ b @ b.T, a)

    with pytest.raises(NotImplementedError, match="while"):
        count(loop, A, B)


def test_what_nothing_reads_is_not_counted():
    def wasteful(a, b):
        kept, dropped = jax.jit(lambda: (a @ b, b.T @ a.T))()
        del dropped
        return kept

    assert count(wasteful, A, B).matmul == PRODUCT


def test_recomputation_counts():
    def loss(a, b):
        return jnp.sin(jnp.sin(a @ b) @ b.T).sum()

    plain = count(jax.value_and_grad(loss), A, B).total
    assert count(jax.value_and_grad(jax.checkpoint(loss)), A, B).total == plain + 2 * PRODUCT


def test_a_strided_convolution_costs_twice_as_much_backward_as_forward():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = count(conv, x, kernel).convolution
    assert forward == 2 * 2 * 4 * 4 * 5 * 9 * 3
    both = jax.grad(lambda *inputs: conv(*inputs).sum(), argnums=(0, 1))
    gradients = count(lambda *inputs: both(*inputs), x, kernel).convolution
    assert gradients == 2 * forward  # a sum needs no forward result


def test_kernels_count_once_per_grid_point():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def product(a, b):
        blocks = [pl.BlockSpec((2, 8), lambda i: (i, 0)), pl.BlockSpec((8, 16), lambda i: (0, 0))]
        return pl.pallas_call(
            kernel, jax.ShapeDtypeStruct((4, 16), a.dtype), grid=(2,), in_specs=blocks,
            out_specs=pl.BlockSpec((2, 16), lambda i: (i, 0)), interpret=True,
        )(a, b)  # fmt: skip

    assert count(product, A, B).kernel == PRODUCT


def test_shard_map_counts_per_device_and_the_rest_evenly():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))

    def both(a, b):
        inner = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P()))
        mapped = inner(jnp.matmul, out_specs=P("data"))
        return mapped(a, b) + a @ b

    assert count(both, A, B, devices=4).matmul == PRODUCT / 4 + PRODUCT / 4


def test_the_attention_of_cudnn_counts_its_products(monkeypatch):
    # JAX asks the installed cuDNN for its version while tracing.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = jnp.zeros((2, 8, 3, 16), jnp.bfloat16), jnp.zeros((2, 12, 3, 16), jnp.bfloat16)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    loss = lambda *x: fused(*x).astype(jnp.float32).sum()  # noqa: E731
    product = 2 * 2 * 3 * 8 * 12 * 16
    assert count(fused, q, k, k).kernel == 2 * product
    assert count(jax.grad(loss, (0, 1, 2)), q, k, k).kernel == 7 * product
