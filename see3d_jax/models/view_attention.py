"""Self-attention over the tokens of all devices along a mesh axis, inside `jax.shard_map`.

Every device holds the queries, keys and values of its own views. Queries stay; two ways to reach
the keys and values of the others, with the same answer up to rounding:
- "gather": everyone gets all of them (80 MiB per sample and layer in bfloat16 for 16 views of 64²
  latents of 320 channels), then any attention backend does the rest;
- "ring": they travel around the devices, one neighbour at a time, and partial results are merged by
  their log-sum-exp (Liu et al. 2023, "Ring Attention"). Memory does not grow with the number of
  devices: for 1024² images or very many views.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from see3d_jax.models.attention import (
    BLOCK,
    attention,
    gradients_by_blocks,
    name_for_remat,
    softmax_by_blocks,
)

EXCHANGES = ("gather", "ring")


def view_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    axis: str,
    *,
    exchange: str = "gather",
    backend: str = "auto",
    block: tuple[int, int] = BLOCK,
) -> jax.Array:
    """softmax(q·kᵀ/√head_dim)·v with the keys and values of all devices along `axis`.

    Args:
      q, k, v: [B, N, heads, head_dim], those of this device.
      axis: name of a manual mesh axis.
      exchange: one of `EXCHANGES`.
      backend: see `attention.attention`; the ring always goes by blocks.
      block: queries and keys that the ring handles at once.

    Returns:
      [B, N, heads, head_dim] in q's dtype.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"view exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if exchange == "gather":
        with jax.named_scope("keys_and_values"):  # tools.plan_aot tells gathers apart by it
            k, v = (_gather_tokens(x, axis) for x in (k, v))
        return attention(q, k, v, backend=backend)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads first
    return jnp.swapaxes(_ring_attention(q, k, v, axis, block), 1, 2)


def _gather_tokens(x: jax.Array, axis: str) -> jax.Array:
    """[B, N, heads, d] of each device → [B, devices · N, heads, d].

    Heads and width travel as one dimension: tokens are then rows of a TPU's tiles, without which
    the gradient would not be scattered but reduced everywhere, at twice the bytes.
    """
    flat = jax.lax.all_gather(x.reshape(*x.shape[:2], -1), axis, axis=1, tiled=True)
    return flat.reshape(*flat.shape[:2], *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, axis: str, block: tuple[int, int]
) -> jax.Array:
    return _ring_forward(q, k, v, axis, block)[0]


def _ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, axis: str, block: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The own keys first, then those of each other device as they come by."""

    def next_device(carry: tuple, _: None) -> tuple[tuple, None]:
        out, lse, k, v = carry
        k, v = _pass_on((k, v), axis)
        out, lse = _merge(out, lse, *softmax_by_blocks(q, k, v, block))
        return (out, lse, k, v), None

    start = (*softmax_by_blocks(q, k, v, block), k, v)
    others = jax.lax.axis_size(axis) - 1
    (out, lse, _, _), _ = jax.lax.scan(next_device, start, length=others)
    out, lse = name_for_remat(out, lse, q.dtype)
    return out, (q, k, v, out, lse)


def _ring_backward(
    axis: str, block: tuple[int, int], saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of keys and values travel with them and are home after a whole round."""
    q, k, v, out, lse = saved

    def one_device(carry: tuple, _: None) -> tuple[tuple, None]:
        d_q, d_k, d_v, k, v = carry
        more = gradients_by_blocks(q, k, v, out, lse, d_out, block)
        d_q, d_k, d_v = (total + part for total, part in zip((d_q, d_k, d_v), more))
        return (d_q, *_pass_on((d_k, d_v, k, v), axis)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    devices = jax.lax.axis_size(axis)
    (d_q, d_k, d_v, _, _), _ = jax.lax.scan(one_device, (*zeros, k, v), length=devices)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_ring_attention.defvjp(_ring_forward, _ring_backward)


def _pass_on(arrays: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    """Sends to the next device what this one holds, and returns what the one before held."""
    devices = jax.lax.axis_size(axis)
    return jax.lax.ppermute(arrays, axis, [(i, (i + 1) % devices) for i in range(devices)])


def _merge(
    out: jax.Array, lse: jax.Array, more_out: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over two sets of keys from attention over each; out [..., d], lse [...]."""
    total = jnp.logaddexp(lse, more_lse)
    share, more_share = (jnp.exp(x - total)[..., None] for x in (lse, more_lse))
    return out * share + more_out * more_share, total
