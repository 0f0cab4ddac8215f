"""Placement: rules do what they say, and the layout of devices does not change what is learnt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import tiny
from see3d_jax.errors import InputError
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import abstract_unet
from see3d_jax.training import sharding
from see3d_jax.training.sharding import make_mesh

HERE = Path(__file__).parent


def run_on_devices(script, *arguments):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))),
    }
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def layouts():
    return run_on_devices("run_layouts.py", "1,1,1,1", "8,1,1,1", "1,1,8,1", "2,2,2,1", "--plain")


def test_every_layout_gives_the_losses_of_one_device(layouts):
    one_device = layouts["1,1,1,1"]["losses"]
    assert len(one_device) == 20 and one_device[-1] != one_device[0]
    for name in ("8,1,1,1", "1,1,8,1", "2,2,2,1"):
        assert layouts[name]["losses"] == pytest.approx(one_device, rel=1e-5), name


@pytest.mark.slow
def test_every_layout_evaluates_alike(layouts):
    first = next(iter(layouts.values()))["errors"]
    for found in layouts.values():
        assert found["errors"] == pytest.approx(first, rel=1e-4)
    assert len(set(first)) == len(first) == 16


def test_views_are_sampled_on_a_mesh(layouts):
    *_, last = layouts.values()
    assert last["sampled"] and last["references"] < 1e-5


def test_every_layout_gives_the_gradient_of_the_formula(layouts):
    for name, result in layouts.items():
        assert result["gradient"] < 1e-5, name
    assert layouts["2,2,2,1"]["plain"] < 1e-5  # and so does leaving the formula to XLA


def test_weights_averages_and_moments_are_split_over_fsdp_and_view(layouts):
    assert layouts["8,1,1,1"]["split"] == 0
    assert layouts["1,1,8,1"]["split"] == layouts["2,2,2,1"]["split"] > 80


@pytest.mark.slow
def test_frozen_networks_are_split_too_and_encode_the_same():
    found = run_on_devices("run_encoders.py")
    assert found["split"] > 20
    assert found["loss"] < 1e-6 and found["gradient"] < 1e-5


@pytest.mark.slow
def test_tensor_parallelism_and_the_ring_change_nothing_either():
    others = ("1,8,1,1", "1,2,2,2", "2,2,2,1,ring", "1,1,8,1,ring")
    found = run_on_devices("run_layouts.py", "1,1,1,1", *others)
    one_device = found["1,1,1,1"]["losses"]
    for result in found.values():
        assert result["losses"] == pytest.approx(one_device, rel=1e-5)
        assert result["gradient"] < 1e-5
    assert found["1,2,2,2"]["split"] > 80


@pytest.mark.parametrize("parts", [{"fsdp": 8}, {"fsdp": 2, "view": 4}, {"data": 32, "fsdp": 8}])
def test_no_device_holds_more_than_its_share_of_the_full_model(parts):
    sizes = [parts.get(axis, 1) for axis in sharding.AXES]
    mesh = AbstractMesh(tuple(sizes), sharding.AXES)
    params = abstract_unet(UNetConfig())
    placed = sharding.state_shardings(params, mesh)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True))
    held = sum(np.prod(s.shard_shape(x.shape)) for x, s in pairs)
    assert held < 1.01 * 865_925_124 / 8
    assert max(x.size for x, s in pairs if s.spec == P()) * 4 < sharding.MIN_SPLIT_BYTES


def test_tensor_splits_the_outer_ends_of_a_pair_of_matrices():
    mesh = AbstractMesh((1, 2, 1, 2), sharding.AXES)
    wide = jax.ShapeDtypeStruct((1280, 1280), jnp.float32)
    state = {"to_q": {"weight": wide}, "to_out": {"0": {"weight": wide}}, "other": wide}
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(state, mesh))
    assert specs["to_q"]["weight"] == P(("fsdp", "view"), "tensor")
    assert specs["to_out"]["0"]["weight"] == P("tensor", ("fsdp", "view"))
    assert specs["other"] == P(("fsdp", "view"), None)


def test_a_large_weight_that_does_not_divide_is_named(caplog):
    mesh = AbstractMesh((1, 7, 1, 1), sharding.AXES)
    state = {"params": {"lonely": {"weight": jax.ShapeDtypeStruct((320, 640), jnp.float32)}}}
    with caplog.at_level("WARNING"):
        placed = sharding.state_shardings(state, mesh)
    assert placed["params"]["lonely"]["weight"].is_fully_replicated
    assert "params/lonely/weight" in caplog.text and "7" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.fsdp": 3}, r"config\.mesh .*fsdp=3.* does not fit 1 device"),
        ({"mesh.data": -1, "mesh.view": -1}, r"at most one may be -1"),
        ({"accumulate": 3}, r"config\.batch_size=4 is not a multiple .*config\.accumulate = 3"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_says_what_to_change(changes, message):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        make_mesh(config)


ROWS_OF_TWO_PROCESSES = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import Mesh
from see3d_jax.training.sharding import AXES, local_rows, put_batch
# as on a pod, where the chips of one host need not be neighbours in the mesh
devices = np.array(jax.devices()).reshape(2, 2, 2, 1).transpose(1, 0, 2, 3)
mesh = Mesh(devices, AXES)
rows = local_rows(mesh, 8)
whole = {"image": np.arange(8 * 4 * 3.0).reshape(8, 4, 3), "clip_pixels": np.arange(8.0)[:, None]}
placed = put_batch({key: value[list(rows)] for key, value in whole.items()}, mesh, 8)
for key, value in placed.items():
    assert value.shape == whole[key].shape
    for shard in value.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[key][shard.index])
print(*rows)
"""


def test_each_process_needs_only_the_rows_of_its_devices():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ROWS_OF_TWO_PROCESSES, address, str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output for output, _ in outputs] == ["0 1 4 5\n", "2 3 6 7\n"]
