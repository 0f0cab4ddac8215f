"""Attention backends against the textbook formula, and memory that grows with tokens only."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from see3d_jax.models import attention as attention_module
from see3d_jax.models.attention import attention, choose_backend

QUICK = {"xla_backend_optimization_level": 0}


def _reference(q, k, v):
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)


def _inputs(queries, keys, heads=3, width=16):
    keys_ = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, n, heads, width) for n in (queries, keys, keys, queries)]
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys_, shapes)]


def _value_and_gradients(function, q, k, v, d_out):
    def run(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    return jax.jit(run, compiler_options=QUICK)(q, k, v, d_out)


@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("queries, keys", [(70, 50), (5, 77)])
def test_backends_agree_with_the_formula_in_values_and_gradients(backend, queries, keys):
    q, k, v, d_out = _inputs(queries, keys)

    chunked = lambda *x: attention(*x, backend=backend, block=(32, 24))  # noqa: E731
    out, *gradients = _value_and_gradients(chunked, q, k, v, d_out)
    expected, *expected_gradients = _value_and_gradients(_reference, q, k, v, d_out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("keys", [1024, 77])
def test_the_gpu_kernel_lowers_for_cuda_forward_and_backward_on_a_machine_without(
    monkeypatch, keys
):
    # JAX asks the installed cuDNN for its version while tracing.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((1, n, 5, 64), jnp.bfloat16) for n in (1024, keys))
    loss = lambda *x: attention(*x, backend="cudnn").astype(jnp.float32).sum()  # noqa: E731
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"@__cudnn\$(\w+)", text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert f"1024x{keys}x" not in text  # no logits outside of the kernel


def test_odd_numbers_of_tokens_are_padded_for_the_gpu_kernel_without_being_seen(monkeypatch):
    def kernel(*x, implementation, **options):
        assert implementation == "cudnn" and all(y.shape[1] % 2 == 0 for y in x)
        return dot_product_attention(*x, **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v, d_out = _inputs(5, 77)
    found = _value_and_gradients(lambda *x: attention(*x, backend="cudnn"), q, k, v, d_out)
    for got, wanted in zip(found, _value_and_gradients(_reference, q, k, v, d_out)):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("partial_bytes", [2**29, 1], ids=["all heads", "head by head"])
def test_the_tpu_kernel_agrees_with_the_formula_in_values_and_gradients(monkeypatch, partial_bytes):
    monkeypatch.setattr(attention_module, "SPLASH_PARTIAL_BYTES", partial_bytes)
    q, k, v, d_out = (x[:1] / 2 for x in _inputs(256, 384, heads=2, width=64))
    expected = _value_and_gradients(_reference, q, k, v, d_out)
    with pltpu.force_tpu_interpret_mode():
        found = _value_and_gradients(lambda *x: attention(*x, backend="splash"), q, k, v, d_out)
    for got, wanted in zip(found, expected):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_ragged_lengths_are_refused_by_the_tpu_kernel_with_the_way_out():
    q, k, v, _ = _inputs(256, 77)
    with pytest.raises(ValueError, match=r"77 tokens are not a multiple of 128.*'auto'"):
        attention(q, k, v, backend="splash")


@pytest.mark.parametrize(
    "device, shape, dtype, chosen",
    [
        ("tpu", (1024, 1024), jnp.bfloat16, "splash"),
        ("tpu", (1024, 77), jnp.bfloat16, "plain"),
        ("tpu", (1000, 1000), jnp.bfloat16, "chunked"),
        ("tpu", (1024, 1024, 512), jnp.bfloat16, "chunked"),
        ("gpu", (1024, 1024), jnp.bfloat16, "cudnn"),
        ("gpu", (1024, 1024), jnp.float32, "chunked"),
        ("gpu", (1024, 1024, 512), jnp.bfloat16, "chunked"),
        ("gpu", (1024, 1024, 4), jnp.bfloat16, "chunked"),
        ("cpu", (1024, 1024), jnp.bfloat16, "chunked"),
        ("cpu", (64, 64), jnp.float32, "plain"),
    ],
)
def test_the_backend_follows_device_shape_and_dtype(monkeypatch, device, shape, dtype, chosen):
    monkeypatch.setattr(attention_module, "platform", lambda: device)
    queries, keys, width = (*shape, 64)[:3]
    q, k = (jax.ShapeDtypeStruct((1, n, 2, width), dtype) for n in (queries, keys))
    assert choose_backend(q, k) == chosen


def test_the_backend_follows_the_mesh_that_is_compiled_for_not_the_machine_that_compiles():
    chip = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh(
        (8,), ("data",), axis_types=(AxisType.Manual,), abstract_device=chip
    )
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose_backend(x, x) == "splash"


def test_a_kernel_that_xla_cannot_split_is_not_chosen_on_many_devices(monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    assert choose_backend(x, x) == "chunked"
    inside = []
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def note(y):
        inside.append(choose_backend(x, x))
        return y

    jax.eval_shape(jax.shard_map(note, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones(1))
    assert inside == ["splash"]


COMPILE_FOR_TPU = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from see3d_jax.models.attention import SAVED_NAMES, attention
chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct(
    (1, 65536, 5, 64), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(chip)
)
loss = lambda q, k, v: attention(q, k, v, backend="splash").astype(jnp.float32).sum()
policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
loss = jax.checkpoint(loss, policy=policy)
compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()
print(compiled.as_text().count('custom_call_target="tpu_custom_call"'))
print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_the_tpu_kernel_compiles_for_a_real_chip_at_full_size():
    """16 views of 64² latents; needs libtpu (installed, or at TPU_LIBRARY_PATH), not a TPU."""
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library is None:
        spec = importlib.util.find_spec("libtpu")
        if spec is None:
            pytest.skip("libtpu is not installed and TPU_LIBRARY_PATH is not set")
        library = str(Path(spec.origin).parent / "libtpu.so")
    settings = {"TPU_LIBRARY_PATH": library, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU],
        env={**os.environ, **settings, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels, temporary = map(int, run.stdout.split())
    # Forward and backward: recomputing a block does not run its attention again.
    assert kernels == 2
    assert temporary < 1.25 * 2**30  # the logits alone would be 40 GiB


def test_large_logits_do_not_overflow():
    q, k, v, _ = _inputs(40, 40)
    out = attention(100 * q, 100 * k, v, backend="chunked", block=(16, 16))
    np.testing.assert_allclose(out, _reference(100 * q, 100 * k, v), atol=1e-4)


def test_half_precision_keeps_softmax_in_float32():
    q, k, v, _ = _inputs(64, 512)
    half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), backend="chunked")
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - _reference(q, k, v)).max() < 0.1


def test_half_precision_has_gradients_on_every_device():
    q, k, v, d_out = _inputs(40, 50)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v, d_out)]
    run = lambda *x: attention(*x, backend="chunked", block=(16, 16))  # noqa: E731
    expected = _value_and_gradients(_reference, q, k, v, d_out)
    for found, wanted in zip(_value_and_gradients(run, *half), expected):
        assert np.abs(found.astype(jnp.float32) - wanted).max() < 0.02 * np.abs(wanted).max()


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
