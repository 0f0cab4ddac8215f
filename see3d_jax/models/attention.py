"""Softmax attention behind one function, with memory linear in the number of tokens.

Self-attention runs over all views × pixels jointly: at 16 views of 64² latents that is 65,536
tokens, and a logits matrix would need 16 GiB per head. `attention` picks a backend while tracing:
- "plain": the textbook form; the reference of the tests, and used where the logits are small;
- "chunked": one block of queries × keys at a time, with its own backward pass that keeps only the
  output and the log-sum-exp per query (no logits are stored), on any device;
- "cudnn": fused flash attention on NVIDIA GPUs, half precision and heads of up to 128 only;
- "splash": the Pallas flash kernel on TPUs, without a mask; numbers of tokens must be multiples of
  128. XLA cannot split it over devices by itself, so "auto" takes it on one device or inside
  `jax.shard_map`, and "chunked" elsewhere.
Softmax and log-sum-exp are float32 whatever the inputs are. Axes: [B, tokens, heads, head_dim].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

BACKENDS = ("auto", "plain", "chunked", "cudnn", "splash")
# Names under which the chunked form marks what a remat policy should keep, so that recomputing a
# block does not recompute its attention.
SAVED_NAMES = ("attention_output", "attention_lse")
# Queries × keys of a block: 2 MiB of logits stay in the caches of two cores between the products.
BLOCK = (512, 1024)
# Below this many logits per head and sample, storing them is cheaper than computing them again.
PLAIN_LOGITS = 128 * 1024
# Tokens per block of the TPU kernel: 2048 queries do not fit the VMEM of v5e and v5p, nor do 4096
# keys. Its backward pass keeps one partial dQ per block of keys, hence its larger blocks.
SPLASH_BLOCK, SPLASH_BACKWARD_KEYS, SPLASH_INNER, SPLASH_UNIT = 1024, 2048, 640, 128
# Head widths for which those blocks were tried; the autoencoder's 512 is none.
SPLASH_WIDTH = 128
# What cuDNN takes on every GPU with flash attention: widths of heads up to this, in eights.
CUDNN_WIDTH, CUDNN_UNIT = 128, 8
# Partial dQ that may exist at once: heads are taken in groups that keep within it.
SPLASH_PARTIAL_BYTES = 2**29


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    backend: str = "auto",
    block: tuple[int, int] = BLOCK,
) -> jax.Array:
    """softmax(q·kᵀ/√head_dim)·v.

    Args:
      q: [B, N, heads, head_dim] queries.
      k, v: [B, M, heads, head_dim] keys and values.
      backend: one of `BACKENDS`; "auto" chooses by device, dtype and size at trace time.
      block: queries and keys handled at once by the chunked form.

    Returns:
      [B, N, heads, head_dim] in q's dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        backend = choose_backend(q, k)
    if backend == "cudnn":
        return _cudnn_attention(q, k, v)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads first
    if backend == "splash":
        out = _splash_attention(q, k, v)
    elif backend == "plain":
        out = _plain_attention(q, k, v)
    else:
        out = _blockwise_attention(q, k, v, block)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def choose_backend(q: jax.Array, k: jax.Array) -> str:
    """What "auto" means for queries [B, N, heads, d] and keys [B, M, heads, d]."""
    device = platform()
    width = q.shape[-1]
    if device == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        if width <= CUDNN_WIDTH and width % CUDNN_UNIT == 0:
            return "cudnn"
    if q.shape[1] * k.shape[1] <= PLAIN_LOGITS:
        return "plain"
    fits = all(x.shape[1] % SPLASH_UNIT == 0 and x.shape[-1] <= SPLASH_WIDTH for x in (q, k))
    if device == "tpu" and fits and sees_one_device():
        return "splash"
    return "chunked"


def platform() -> str:
    """What the code being traced is for: the devices of its mesh, else the default ones.

    They differ when a program is compiled on a machine that does not have the devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def sees_one_device() -> bool:
    """Whether the code being traced runs on each device by itself."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    return jax.device_count() == 1 or (bool(axes) and all(a == AxisType.Manual for a in axes))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., i, j] × [..., j, k] with a float32 result.

    Every product below is brought into this one form: XLA's CPU backend is several times slower
    when it has to contract over leading axes, and knows no half-precision product of some of them.
    """
    if platform() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _scaled(q: jax.Array) -> jax.Array:
    return q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)


def _plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B, heads, N, d], k and v [B, heads, M, d] → [B, heads, N, d] float32."""
    logits = _matmul(_scaled(q), jnp.swapaxes(k, 2, 3))
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    # Divide after the product: d numbers per query instead of M.
    return _matmul(weights.astype(v.dtype), v) / weights.sum(-1, keepdims=True)


def _blocks(x: jax.Array, most: int) -> jax.Array:
    """[N, ...] → [blocks, up to `most`, ...]: few and equal, zero-padded at the end."""
    count = -(-len(x) // most)
    size = -(-len(x) // count)
    x = jnp.pad(x, ((0, count * size - len(x)),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


def _joined(x: jax.Array, n: int) -> jax.Array:
    """Inverse of `_blocks`, dropping the padding."""
    return x.reshape(-1, *x.shape[2:])[:n]


def _hidden(blocks: int, size: int, n: int) -> jax.Array | None:
    """What to add to the logits of [blocks, size] keys: −∞ where padding is; None without any."""
    if blocks * size == n:
        return None
    return jnp.where(jnp.arange(blocks * size) < n, 0.0, -jnp.inf).reshape(blocks, size)


def _logits(k: jax.Array, q_transposed: jax.Array, hidden: jax.Array | None) -> jax.Array:
    logits = _matmul(k, q_transposed)
    return logits if hidden is None else logits + hidden[:, None]


def _each_head(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function` of one head's arrays, for arrays [B, heads, ...].

    On a CPU one head after the other: a block of logits is then no larger than the caches are.
    """
    if platform() != "cpu":
        return jax.vmap(jax.vmap(function))(*arrays)
    rows = arrays[0].shape[:2]
    flat = tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
    results = jax.lax.map(lambda head: function(*head), flat)
    return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), results)


def softmax_by_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, block: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Chunks of queries, and for each the keys block by block; no gradient of its own.

    The softmax is carried along (Milakov & Gimelshein 2018): where a block raises the largest
    logit so far, what was summed before is scaled down. All is held transposed, [keys, queries], so
    that every product is a plain row-by-column one.

    q [B, heads, N, d], k and v [B, heads, M, d] → output [B, heads, N, d] and log-sum-exp
    [B, heads, N], both float32.
    """
    return _each_head(functools.partial(_softmax_of_head, block=block), q, k, v)


def _softmax_of_head(
    q: jax.Array, k: jax.Array, v: jax.Array, block: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    k_blocks, v_blocks = (_blocks(x, block[1]) for x in (k, v))
    hidden = _hidden(*k_blocks.shape[:2], len(k))
    keys = (k_blocks, jnp.swapaxes(v_blocks, 1, 2), hidden)

    def one_chunk(q_rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_transposed = _scaled(q_rows).T

        def one_block(carry: tuple, keys: tuple) -> tuple[tuple, None]:
            peak, total, out = carry
            k_rows, v_transposed, hidden = keys
            logits = _logits(k_rows, q_transposed, hidden)
            new_peak = jnp.maximum(peak, logits.max(0))
            weights, shrink = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(0)
            out = out * shrink + _matmul(v_transposed, weights.astype(v.dtype))
            return (new_peak, total, out), None

        n, d = len(q_rows), v.shape[1]
        start = (jnp.full(n, -jnp.inf), jnp.zeros(n), jnp.zeros((d, n)))
        (peak, total, out), _ = jax.lax.scan(one_block, start, keys)
        return (out / total).T, peak + jnp.log(total)

    out, lse = jax.lax.map(one_chunk, _blocks(q, block[0]))
    return _joined(out, len(q)), _joined(lse, len(q))


def gradients_by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    block: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dQ, dK, dV) in float32: the softmax weights come back from the log-sum-exp.

    With P = exp(S − lse): dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)). Padded queries
    have dO = 0, hence dS = 0 and no share in dK or dV; padded keys have P = 0. Where k and v are
    only a part of the keys that `out` and `lse` were made with, dQ is that part's share.
    """
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    of_head = functools.partial(_gradients_of_head, block=block)
    return _each_head(of_head, q, k, v, lse, row, d_out.astype(q.dtype))


def _gradients_of_head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    row: jax.Array,
    d_out: jax.Array,
    block: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    scale = 1 / math.sqrt(q.shape[-1])
    k_blocks, v_blocks = (_blocks(x, block[1]) for x in (k, v))
    hidden = _hidden(*k_blocks.shape[:2], len(k))
    keys = (jnp.arange(len(k_blocks)), k_blocks, jnp.swapaxes(k_blocks, 1, 2), v_blocks, hidden)

    def one_chunk(carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]) -> tuple:
        q_rows, d_rows, lse_rows, row_rows = rows
        q_transposed, d_transposed = _scaled(q_rows).T, d_rows.T

        def one_block(carry: tuple, keys: tuple) -> tuple[tuple, None]:
            d_q, d_k, d_v = carry
            number, k_rows, k_transposed, v_rows, hidden = keys
            weights = jnp.exp(_logits(k_rows, q_transposed, hidden) - lse_rows)
            d_weights = _matmul(v_rows, d_transposed)
            d_logits = (weights * (d_weights - row_rows) * scale).astype(q.dtype)
            d_q = d_q + _matmul(k_transposed, d_logits)
            d_k = d_k.at[number].add(_matmul(d_logits, q_rows))
            d_v = d_v.at[number].add(_matmul(weights.astype(q.dtype), d_rows))
            return (d_q, d_k, d_v), None

        d_q = jnp.zeros(q_rows.shape[::-1], jnp.float32)
        (d_q, d_k, d_v), _ = jax.lax.scan(one_block, (d_q, *carry), keys)
        return (d_k, d_v), d_q.T

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_blocks, v_blocks))
    rows = tuple(_blocks(x, block[0]) for x in (q, d_out, lse, row))
    (d_k, d_v), d_q = jax.lax.scan(one_chunk, zeros, rows)
    return _joined(d_q, len(q)), _joined(d_k, len(k)), _joined(d_v, len(k))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, block: tuple[int, int]
) -> jax.Array:
    return _blockwise_forward(q, k, v, block)[0]


def _blockwise_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, block: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = name_for_remat(*softmax_by_blocks(q, k, v, block), q.dtype)
    return out, (q, k, v, out, lse)


def _blockwise_backward(
    block: tuple[int, int], saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, lse = saved
    d_q, d_k, d_v = gradients_by_blocks(q, k, v, out, lse, d_out, block)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)


def name_for_remat(out: jax.Array, lse: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The output in `dtype` and the log-sum-exp, marked as what a remat policy should keep."""
    return checkpoint_name(out.astype(dtype), SAVED_NAMES[0]), checkpoint_name(lse, SAVED_NAMES[1])


def _cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The fused GPU kernel; q [B, N, heads, d], k and v [B, M, heads, d] → [B, N, heads, d].

    JAX refuses odd numbers of tokens where a gradient is taken, and a text context has 77: such
    arrays get a token more, which as a key is beyond the length that the kernel is given.
    """
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
    keys = jnp.full(k.shape[0], k.shape[1], jnp.int32) if k.shape[1] % 2 else None
    out = jax.nn.dot_product_attention(
        even(q), even(k), even(v), key_value_seq_lengths=keys, implementation="cudnn"
    )
    return out[:, : q.shape[1]]


def _splash_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The Pallas TPU kernel; q [B, heads, N, d], k and v [B, heads, M, d] → [B, heads, N, d].

    One kernel computes all gradients. Two of the library's, for dQ and for dK and dV, would need no
    partial dQ but make the logits and their gradient twice: 9 products in all instead of 7.
    """
    # Imported here: it takes a second and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask

    rows, columns = (_splash_block(x.shape[2], SPLASH_BLOCK) for x in (q, k))
    back = _splash_block(k.shape[2], SPLASH_BACKWARD_KEYS)
    kernel = splash.SplashAttentionKernel(
        # Without any mask arrays the kernel visits every block and masks none; a "full" mask would
        # be built block by block in Python, only to say the same.
        *[mask.MaskInfo(None, None, None, None, None)] * 3,
        block_sizes=splash.BlockSizes(
            rows, columns, _splash_block(columns, SPLASH_INNER),
            rows, back, _splash_block(back, SPLASH_INNER), use_fused_bwd_kernel=True,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED_NAMES[0],
        mask_function=None,
        interpret=False,
    )  # fmt: skip
    partial = k.shape[2] // back * q.shape[2] * max(q.shape[3], 128) * q.dtype.itemsize
    count = q.shape[0] * q.shape[1]  # samples are as independent as heads
    most = max(1, SPLASH_PARTIAL_BYTES // partial)
    group = next(g for g in range(min(most, count), 0, -1) if count % g == 0)
    groups = [x.reshape(count // group, group, *x.shape[2:]) for x in (_scaled(q), k, v)]
    if count == group:
        return kernel(*(x[0] for x in groups)).reshape(q.shape)
    return jax.lax.map(lambda x: kernel(*x), tuple(groups)).reshape(q.shape)


def _splash_block(tokens: int, most: int) -> int:
    """The largest block of up to `most` that the kernel takes and that divides the tokens."""
    if tokens % SPLASH_UNIT:
        raise ValueError(
            f"attention backend 'splash': {tokens} tokens are not a multiple of {SPLASH_UNIT}; "
            "use 'auto', which falls back to 'chunked'"
        )
    blocks = range(most, 0, -SPLASH_UNIT)
    return next(block for block in blocks if tokens % block == 0)
