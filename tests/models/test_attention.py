"""Attention backends against the textbook formula, and memory that grows with tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.models.attention import attention

QUICK = {"xla_backend_optimization_level": 0}


def _reference(q, k, v):
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)


def _inputs(queries, keys, heads=3, width=16):
    keys_ = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, n, heads, width) for n in (queries, keys, keys, queries)]
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys_, shapes)]


@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("queries, keys", [(70, 50), (5, 77)])
def test_backends_agree_with_the_formula_in_values_and_gradients(backend, queries, keys):
    q, k, v, d_out = _inputs(queries, keys)

    def value_and_gradients(function):
        def run(q, k, v, d_out):
            out, pull = jax.vjp(function, q, k, v)
            return out, pull(d_out)

        return jax.jit(run, compiler_options=QUICK)(q, k, v, d_out)

    out, gradients = value_and_gradients(lambda *x: attention(*x, backend=backend, chunk=32))
    expected, expected_gradients = value_and_gradients(_reference)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=3e-5)


def test_large_logits_do_not_overflow():
    q, k, v, _ = _inputs(40, 40)
    out = attention(100 * q, 100 * k, v, backend="chunked", chunk=16)
    np.testing.assert_allclose(out, _reference(100 * q, 100 * k, v), atol=1e-4)


def test_half_precision_keeps_softmax_in_float32():
    q, k, v, _ = _inputs(64, 512)
    half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), backend="chunked")
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - _reference(q, k, v)).max() < 0.1


def test_memory_of_forward_and_backward_is_linear_in_tokens():
    def temporary_bytes(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        gradient = jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2048), temporary_bytes(8192)
    assert large < 6 * small, (small, large)  # 4 times the tokens; the logits would be 16 times
    assert large < 8192 * 8192 * 4 / 4


def test_an_unknown_backend_is_refused():
    q, k, v, _ = _inputs(4, 4)
    with pytest.raises(ValueError, match="attention backend"):
        attention(q, k, v, backend="flash")
