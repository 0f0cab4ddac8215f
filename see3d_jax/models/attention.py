"""Softmax attention behind one function, with memory linear in the number of tokens.

Self-attention runs over all views × pixels jointly: at 16 views of 64² latents that is 65,536
tokens, and a logits matrix would need 16 GiB per head. `attention` picks a backend while tracing:
- "plain": the textbook form; the reference of the tests, and used where the logits are small;
- "chunked": softmax over one chunk of queries at a time, with its own backward pass that keeps
  only the output and the log-sum-exp per query (no logits are stored), on any device;
- "cudnn": fused flash attention on NVIDIA GPUs, half precision only.
Softmax and log-sum-exp are float32 whatever the inputs are. Axes: [B, tokens, heads, head_dim].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BACKENDS = ("auto", "plain", "chunked", "cudnn")
# Names under which the chunked form marks what a remat policy should keep, so that recomputing a
# block does not recompute its attention.
SAVED_NAMES = ("attention_output", "attention_lse")
# Below this many logits per head and sample, storing them is cheaper than computing them again.
PLAIN_LOGITS = 512 * 1024


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str = "auto", chunk: int = 256
) -> jax.Array:
    """softmax(q·kᵀ/√head_dim)·v.

    Args:
      q: [B, N, heads, head_dim] queries.
      k, v: [B, M, heads, head_dim] keys and values.
      backend: one of `BACKENDS`; "auto" chooses by device, dtype and size at trace time.
      chunk: queries handled at once by the chunked form.

    Returns:
      [B, N, heads, head_dim] in q's dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if half and jax.default_backend() == "gpu":
            backend = "cudnn"
        else:
            backend = "plain" if q.shape[1] * k.shape[1] <= PLAIN_LOGITS else "chunked"
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    if backend == "plain":
        out, _ = _softmax_attention(*heads_first)
    else:
        out = _chunked_attention(*heads_first, min(chunk, q.shape[1]))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, heads, n, d] × [B, heads, M, d] → [B, heads, n, M] float32, scaled."""
    scaled = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    return jnp.einsum("bhnd,bhmd->bhnm", scaled, k, preferred_element_type=jnp.float32)


def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [B, heads, n, d] float32 and log-sum-exp [B, heads, n, 1] float32."""
    logits = _logits(q, k)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    # Divide after the product: d numbers per query instead of M.
    out = jnp.einsum(
        "bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out / total, peak + jnp.log(total)


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, heads, N, d] → [chunks, B, heads, chunk, d], zero-padded at the end."""
    b, h, n, d = x.shape
    chunks = -(-n // chunk)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * chunk - n), (0, 0)))
    return jnp.moveaxis(x.reshape(b, h, chunks, chunk, d), 2, 0)


def _join(x: jax.Array, n: int) -> jax.Array:
    """Inverse of `_split`, dropping the padding."""
    chunks, b, h, chunk, d = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, h, chunks * chunk, d)[:, :, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    return _chunked_forward(q, k, v, chunk)[0]


def _chunked_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = jax.lax.map(lambda rows: _softmax_attention(rows, k, v), _split(q, chunk))
    out = checkpoint_name(_join(out, q.shape[2]).astype(q.dtype), SAVED_NAMES[0])
    lse = checkpoint_name(_join(lse, q.shape[2]), SAVED_NAMES[1])
    return out, (q, k, v, out, lse)


def _chunked_backward(
    chunk: int, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients chunk by chunk: the softmax weights come back from logits and log-sum-exp.

    With P = exp(S − lse): dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)).
    Padded queries have dO = 0, hence dS = 0 and no share in dK or dV.
    """
    q, k, v, out, lse = saved
    scale = 1 / math.sqrt(q.shape[-1])
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def one_chunk(carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]) -> tuple:
        q_rows, d_rows, lse_rows, row_rows = rows
        weights = jnp.exp(_logits(q_rows, k) - lse_rows)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_weights = product("bhnd,bhmd->bhnm", d_rows, v)
        d_logits = (weights * (d_weights - row_rows) * scale).astype(q.dtype)
        d_k = carry[0] + product("bhnm,bhnd->bhmd", d_logits, q_rows)
        d_v = carry[1] + product("bhnm,bhnd->bhmd", weights.astype(q.dtype), d_rows)
        return (d_k, d_v), product("bhnm,bhmd->bhnd", d_logits, k)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    rows = tuple(_split(x, chunk) for x in (q, d_out.astype(q.dtype), lse, row))
    (d_k, d_v), d_q = jax.lax.scan(one_chunk, zeros, rows)
    return _join(d_q, q.shape[2]).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_chunked_attention.defvjp(_chunked_forward, _chunked_backward)
