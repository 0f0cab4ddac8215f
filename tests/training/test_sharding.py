"""Placement: rules do what they say, and the layout of devices does not change what is learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import tiny
from see3d_jax.errors import InputError
from see3d_jax.training.sharding import make_mesh

HERE = Path(__file__).parent

# Runs with 8 pretended devices, in a process of its own because their number is fixed at start.
SCRIPT = """
import json, sys
import jax, numpy as np
sys.path[:0] = sys.argv[1:3]
from jax.sharding import PartitionSpec as P
from test_training import minuscule
from see3d_jax.models.weights import init_unet
from see3d_jax.training import settings, sharding, state, step

def run(**mesh):
    config = minuscule("unused", batch_size=8, **{f"mesh.{k}": v for k, v in mesh.items()})
    spec = settings.train_spec(config)
    made = sharding.make_mesh(config)
    fresh = state.init_state(init_unet(spec.unet, 0), step.make_optimizer(spec.optimizer))
    sharding.MIN_SPLIT_BYTES = 1024
    placed = jax.device_put(fresh, sharding.state_shardings(fresh, made))
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(2):
        batch = {
            "image": rng.uniform(-1, 1, (8, 3, 16, 16, 3)).astype(np.float32),
            "mask": (rng.random((8, 3, 16, 16, 1)) < 0.7).astype(np.float32),
            "is_reference": np.tile([True, False, False], (8, 1)),
            "frame": np.tile(np.arange(3), (8, 1)),
        }
        placed, metrics = step.train_step(
            placed, sharding.put_batch(batch, made),
            state.Frozen(settings.codec(config, spec.unet)),
            settings.noise_schedule(config), jax.random.key(0), spec=spec, mesh=made,
        )
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves(placed)
    split = sum("fsdp" in str(x.sharding.spec) for x in leaves)
    whole = leaves[0].sharding.num_devices
    return losses, split, whole

print(json.dumps([run(data=8), run(data=2, fsdp=4)]))
"""


@pytest.fixture(scope="module")
def layouts():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(HERE), str(HERE.parent)],
        capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_splitting_weights_over_devices_gives_the_same_losses(layouts):
    (data_losses, _, _), (fsdp_losses, _, _) = layouts
    assert data_losses == pytest.approx(fsdp_losses, rel=1e-5)  # sums in another order


def test_the_new_state_stays_where_the_rules_put_it(layouts):
    (_, split_without, devices), (_, split_with, _) = layouts
    assert devices == 8 and split_without == 0
    assert split_with > 20  # weights, averages and both moments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.fsdp": 3}, r"config\.mesh .*fsdp=3.* does not fit 1 device"),
        ({"mesh.data": -1, "mesh.view": -1}, r"at most one may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_says_what_to_change(changes, message):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        make_mesh(config)
