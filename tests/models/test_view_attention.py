"""Attention over the views of several devices: the answer of one device, either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from see3d_jax.models.view_attention import view_attention

# Runs with 4 pretended devices, in a process of its own because their number is fixed at start.
SCRIPT = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from see3d_jax.models.attention import attention
from see3d_jax.models.view_attention import view_attention

mesh = jax.make_mesh((4,), ("view",), axis_types=(jax.sharding.AxisType.Auto,))
tokens = P(None, "view")
q, k, v, d_out = (2 * jax.random.normal(key, (2, 40, 3, 16)) for key in
                  jax.random.split(jax.random.key(0), 4))

def value_and_gradients(function):
    def run(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)
    return run

def spread(exchange, wrap=lambda f: f):
    function = wrap(functools.partial(view_attention, axis="view", exchange=exchange, block=(4, 3)))
    return jax.jit(jax.shard_map(value_and_gradients(function), mesh=mesh, in_specs=(tokens,) * 4,
                                 out_specs=tokens, check_vma=False))

def difference(found, wanted):
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, wanted))

whole = value_and_gradients(functools.partial(attention, backend="plain"))(q, k, v, d_out)
half = [x.astype(jnp.bfloat16) for x in (q, k, v, d_out)]

def collectives(exchange):
    text = spread(exchange).lower(q, k, v, d_out).as_text()
    return {name: text.count(f"stablehlo.{name}") for name in ("all_gather", "collective_permute")}

policy = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
remat = spread("ring", functools.partial(jax.checkpoint, policy=policy))
print(json.dumps({
    "gather": difference(spread("gather")(q, k, v, d_out), whole),
    "ring": difference(spread("ring")(q, k, v, d_out), whole),
    "remat": difference(remat(q, k, v, d_out), whole),
    "half": difference(spread("ring")(*half), whole),
    "collectives": {name: collectives(name) for name in ("gather", "ring")},
}))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("exchange", ["gather", "ring", "remat"])
def test_values_and_gradients_are_those_of_one_device(found, exchange):
    assert found[exchange] < 1e-5


def test_the_ring_keeps_its_sums_in_float32(found):
    assert found["half"] < 0.02


def test_the_ring_never_gathers(found):
    assert found["collectives"]["ring"]["all_gather"] == 0
    assert found["collectives"]["ring"]["collective_permute"] > 0
    assert found["collectives"]["gather"]["collective_permute"] == 0


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match=r"view exchange: expected one of .*'ring'.*got 'mail'"):
        view_attention(*[None] * 3, "view", exchange="mail")
