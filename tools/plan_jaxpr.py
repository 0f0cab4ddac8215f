"""FLOPs that a traced function really executes: recomputation, loops and kernels included.

Walks a jaxpr with liveness (what nothing reads is not counted: XLA drops it too) and adds up matrix
products and convolutions, two FLOPs per multiply-add. Loop bodies count once per trip, Pallas
kernels once per grid point, cuDNN's attention by its products, branches as the dearest one. Inside
`shard_map` shapes are those of one device, so its body counts per device; everything outside counts
for all devices together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.extend import core

# Where primitives that only wrap a function keep it; its outputs are those of the equation.
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Products of queries × keys × width inside JAX's calls of cuDNN: logits and output; backward the
# logits again, and dV, dP, dQ, dK.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


@dataclasses.dataclass(frozen=True)
class ExecutedFlops:
    """FLOPs by the kind of operation that does them.

    Attributes:
      convolution: XLA convolutions.
      matmul: XLA matrix products.
      kernel: matrix products inside Pallas kernels and cuDNN.
    """

    convolution: float = 0.0
    matmul: float = 0.0
    kernel: float = 0.0

    def __add__(self, other: ExecutedFlops) -> ExecutedFlops:
        return ExecutedFlops(
            self.convolution + other.convolution,
            self.matmul + other.matmul,
            self.kernel + other.kernel,
        )

    def __mul__(self, times: float) -> ExecutedFlops:
        return ExecutedFlops(self.convolution * times, self.matmul * times, self.kernel * times)

    @property
    def total(self) -> float:
        """All of it."""
        return self.convolution + self.matmul + self.kernel


def executed_flops(jaxpr: core.ClosedJaxpr, devices: int = 1) -> ExecutedFlops:
    """FLOPs of one call, on one of `devices` devices.

    What stands outside of every `shard_map` is taken to be spread evenly over the devices.

    Raises:
      NotImplementedError: a loop whose number of trips is not known before it runs.
    """
    return _count(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), 1 / devices)


def _count(jaxpr: core.Jaxpr, wanted: list[bool], share: float) -> ExecutedFlops:
    """FLOPs of the equations that the wanted outputs need; `share` of global shapes is ours."""
    live = {var for var, wants in zip(jaxpr.outvars, wanted) if wants and isinstance(var, core.Var)}
    total = ExecutedFlops()
    for equation in reversed(jaxpr.eqns):
        outputs = [var in live for var in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        live.update(var for var in equation.invars if isinstance(var, core.Var))
        total += _equation(equation, outputs, share)
    return total


def _equation(equation: Any, wanted: list[bool], share: float) -> ExecutedFlops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return ExecutedFlops(matmul=share * _dot_flops(equation))
    if name == "conv_general_dilated":
        return ExecutedFlops(convolution=share * _conv_flops(equation))
    if name == "scan":
        body = params["jaxpr"].jaxpr
        return _count(body, [True] * len(body.outvars), share) * params["length"]
    if name == "while":
        body = params["body_jaxpr"].jaxpr
        once = _count(body, [True] * len(body.outvars), share)
        if once.total:
            raise NotImplementedError("a while loop with matrix products: its trips are not known")
        return once
    if name == "cond":
        branches = [_count(branch.jaxpr, wanted, share) for branch in params["branches"]]
        return max(branches, key=lambda branch: branch.total)
    if name == "shard_map":
        return _count(params["jaxpr"], wanted, 1.0)
    if name == "pallas_call":
        kernel = params["jaxpr"]
        once = _count(kernel, [True] * len(kernel.outvars), share).total
        return ExecutedFlops(kernel=once * math.prod(params["grid_mapping"].grid))
    if name in _CUDNN_PRODUCTS:
        q, k = (var.aval for var in equation.invars[:2])  # [B, tokens, heads, width]
        product = 2 * q.size * k.shape[1]
        return ExecutedFlops(kernel=share * _CUDNN_PRODUCTS[name] * product)
    for key in _INNER:
        inner = params.get(key)
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            matches = len(inner.outvars) == len(wanted)
            return _count(inner, wanted if matches else [True] * len(inner.outvars), share)
    return ExecutedFlops()


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _conv_flops(equation: Any) -> float:
    """Zeros that a dilation puts between inputs (backward of a strided one) are not multiplied."""
    params = equation.params
    kernel = equation.invars[1].aval.shape
    rhs = params["dimension_numbers"].rhs_spec  # (output, input, spatial…)
    per_output = math.prod(kernel[i] for i in rhs[1:]) / math.prod(params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
