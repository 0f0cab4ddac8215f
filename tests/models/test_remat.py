"""Recomputing saves memory, on the CPU too, and changes no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from see3d_jax.models import layers, remat
from see3d_jax.models.attention import attention
from see3d_jax.models.remat import recomputed
from tools.plan_jaxpr import executed_flops

BLOCKS, ROWS, WIDTH = 6, 512, 64


def _block(weights, x):
    hidden = jax.nn.gelu(x @ weights["in"], approximate=False)
    return x + jax.nn.silu(hidden) @ weights["out"]


def _compiled(wrap):
    """The gradient of a chain of blocks, compiled, and its arguments."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    def loss(weights, x):
        for block_weights in weights:
            x = wrap(lambda y, w=block_weights: _block(w, y))(x)
        return jnp.square(x).mean()

    weights = [{"in": draw(WIDTH, WIDTH), "out": draw(WIDTH, WIDTH)} for _ in range(BLOCKS)]
    arguments = weights, draw(ROWS, WIDTH)
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def plain():
    return _compiled(lambda block: block)


@pytest.mark.parametrize("whole, share", [(False, 0.6), (True, 0.45)])
def test_the_backward_pass_keeps_less_and_finds_the_same_gradient(plain, whole, share):
    program, arguments = plain
    economical, _ = _compiled(lambda block: recomputed(block, whole=whole))
    used, before = (p.memory_analysis().temp_size_in_bytes for p in (economical, program))
    assert used < share * before, f"{used / before:.2f} of the memory without recomputing"
    for a, b in zip(jax.tree.leaves(program(*arguments)), jax.tree.leaves(economical(*arguments))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_block_runs_outside_of_any_compiled_function():
    block = recomputed(lambda x: jnp.sin(x), whole=False)
    np.testing.assert_allclose(block(jnp.arange(3.0)), np.sin(np.arange(3.0)), rtol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_the_attention_of_a_gpu_is_not_computed_again(monkeypatch, whole):
    monkeypatch.setattr(remat, "platform", lambda: "gpu")
    # JAX asks the installed cuDNN for its version while tracing.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def block(x):
        q = jnp.sin(x)
        return x + attention(q, q, q, backend="cudnn")

    def loss(x):
        return recomputed(block, whole=whole)(x).astype(jnp.float32).sum()

    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    product = 2 * 2 * 256 * 256 * 64
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(x)
    assert executed_flops(traced).kernel == (2 + 5) * product


@pytest.mark.parametrize(
    "kernel, padding", [(3, ((1, 1), (1, 1))), (3, ((0, 1), (2, 0))), (1, ((0, 0), (0, 0)))]
)
def test_convolutions_have_the_gradient_that_jax_finds(kernel, padding):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 6, 3), np.float32)
    weight = rng.standard_normal((kernel, kernel, 3, 4), np.float32)
    ours, pull = jax.vjp(lambda x, w: layers._plain_gradient_convolution(x, w, padding), x, weight)
    theirs, reference = jax.vjp(lambda x, w: layers._convolution(x, w, padding), x, weight)
    np.testing.assert_array_equal(ours, theirs)
    d_y = rng.standard_normal(ours.shape, np.float32)
    for a, b in zip(pull(d_y), reference(d_y)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_convolutions_of_kept_apart_blocks_stay_on_the_fast_path():
    conv = layers.Conv(32, 32)
    run = recomputed(lambda x: jax.nn.silu(conv(jax.nn.silu(x))), whole=False)
    x = jnp.ones((4, 16, 16, 32))
    program = jax.jit(jax.grad(lambda x: jnp.square(run(run(x))).sum())).lower(x).compile()
    # XLA's CPU backend has fast convolutions in this layout only.
    convolutions = [line for line in program.as_text().splitlines() if " convolution(" in line]
    assert convolutions
    assert all("dim_labels=b01f_01io->b01f" in line for line in convolutions)
