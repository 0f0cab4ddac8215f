"""What the backward pass keeps of the forward pass, and what it computes again.

Left alone, a block of the UNet keeps every intermediate value for its gradient. Here it keeps its
input, what attention needs, and either its matrix products (norms and activations are cheap and are
computed again) or nothing else (the whole block is). XLA's CPU backend undoes both unless it is
stopped: it drops the barriers that hold the copies apart and merges them, and puts weight gradients
off to the end of the step, which keeps what they are made of. There each block therefore becomes a
call that may not be inlined, forward and backward: copies stay apart, and gradients are finished
block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from see3d_jax.models.attention import SAVED_NAMES, platform, sees_one_device

# Operations whose results are kept unless whole blocks are recomputed: these take the time.
PRODUCTS = ("dot_general", "conv_general_dilated", "all_gather")
# cuDNN's attention in a trace. JAX wraps it whole, so that its output and log-sum-exp cannot be
# given the names of `SAVED_NAMES`.
FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"


def recomputed(
    block: Callable[[jax.Array], jax.Array], *, whole: bool
) -> Callable[[jax.Array], jax.Array]:
    """The same function; its gradient keeps less, see above.

    Args:
      block: may close over traced values (its weights), which count as inputs.
      whole: recompute the matrix products too, all but attention's.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    policy = jax.checkpoint_policies.save_from_both_policies(policy, _is_fused_attention)
    if not whole:
        policy = jax.checkpoint_policies.save_from_both_policies(policy, _is_product)
    block = jax.checkpoint(block, policy=policy)
    # Where XLA is to split arrays over devices it has to see into the blocks.
    return _kept_apart(block) if platform() == "cpu" and sees_one_device() else block


def _is_product(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name in PRODUCTS


def _is_fused_attention(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name == FUSED_ATTENTION


def _kept_apart(block: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The same function as a call that XLA does not inline; its gradient is another."""

    def call(x: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(block)(x)

    return call
