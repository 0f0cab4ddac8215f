"""Checkpoints on their own: a small state in, damage of every kind, the last good state out."""

from __future__ import annotations

import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from see3d_jax.errors import InputError, WorkError
from see3d_jax.training import checkpoint
from see3d_jax.training.checkpoint import Checkpoints
from see3d_jax.training.state import as_dict, init_state


@pytest.fixture(autouse=True)
def no_tracebacks_of_abandoned_reads():
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    yield
    gc.collect()  # they are printed when their task is thrown away
    logging.getLogger("asyncio").setLevel(logging.NOTSET)


def state_of(number, width=40):
    """A state whose every value depends on `number`; incompressible, as trained weights are."""
    key = jax.random.key(number)
    params = {"block": {"weight": jax.random.normal(key, (30, width))}, "bias": jnp.full(3, number)}
    return init_state(jax.tree.map(jnp.float32, params), optax.adam(1e-3))


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"next_step": step})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, like=None):
    with Checkpoints(workdir, keep=2) as checkpoints:
        return checkpoints.restore(state_of(0) if like is None else like)


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip_one_bit(folder):
    file = largest_file(folder / "state")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(folder):
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def wrong_checksum(folder):
    file = folder / "checksums" / "metadata"
    file.write_text(file.read_text().replace("1", "2"))


DAMAGES = {
    "one flipped bit": flip_one_bit,
    "a truncated file": truncate,
    "a missing file": lambda folder: largest_file(folder / "state").unlink(),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "no position": lambda folder: shutil.rmtree(folder / "input"),
    "half a position": lambda folder: (folder / "input" / "metadata").write_text('{"next'),
    "wrong checksums": wrong_checksum,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def test_a_save_is_read_back(workdir):
    restored = restore(workdir)
    assert (restored.step, restored.position) == (2, {"next_step": 2})
    assert_same(restored.state, state_of(2))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_set_aside_loudly_for_the_one_before(workdir, caplog, damage):
    newest = workdir / "checkpoints" / "2"
    DAMAGES[damage](newest)
    restored = restore(workdir)
    assert (restored.step, restored.position) == (1, {"next_step": 1})
    assert_same(restored.state, state_of(1))
    (warning,) = [line for line in caplog.messages if "continuing from step 1" in line]
    assert f"{newest} is damaged (" in warning
    assert (workdir / "damaged" / "2").is_dir() and not newest.exists()
    with Checkpoints(workdir, keep=2) as checkpoints:  # step 2 can be saved again
        checkpoints.save(2, state_of(7), {"next_step": 2})
    assert_same(restore(workdir).state, state_of(7))


def test_when_all_steps_are_damaged_nothing_is_moved_or_started_anew(workdir):
    for step in (1, 2):
        flip_one_bit(workdir / "checkpoints" / str(step))
    with pytest.raises(
        InputError, match=r"none of its 2 checkpoint.* can be read \(2: checksum of"
    ):
        restore(workdir)
    assert (workdir / "checkpoints" / "2").is_dir() and not (workdir / "damaged").exists()


def test_a_checkpoint_of_another_model_is_named_and_left_alone(workdir):
    with pytest.raises(
        InputError, match=r"2: is a checkpoint of another model: .*weight is \(30, 40"
    ):
        restore(workdir, like=state_of(0, width=41))
    assert restore(workdir).step == 2


def test_a_fresh_workdir_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "run") is None


def test_the_newest_and_every_fourth_step_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state_of(step), {})
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 6, 7]


def test_a_save_holds_the_state_of_its_moment_although_the_next_step_reuses_the_memory(
    tmp_path, monkeypatch
):
    go_on = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_of(1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state = go_on(state)
    assert_same(restore(tmp_path).state, state_of(1))


def test_a_failed_save_is_told_once_and_leaves_the_one_before(workdir, monkeypatch):
    async def fails(self, item, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fails)
    with (
        pytest.raises(WorkError, match=r"step 3 could not be saved .*No space left.* is step 2"),
        Checkpoints(workdir, keep=1) as checkpoints,
    ):
        checkpoints.save(3, state_of(3), {})
        checkpoints.save(4, state_of(4), {})
    monkeypatch.undo()
    assert restore(workdir).step == 2


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8"])
def test_any_flipped_bit_changes_the_checksum(dtype):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.integers(0, 200, (5, 7, 3))).astype(dtype))
    before = checkpoint.checksums({"x": array})["x"]
    for _ in range(50):
        other = bytearray(array.tobytes())
        other[rng.integers(len(other))] ^= 1 << rng.integers(8)
        changed = np.frombuffer(other, array.dtype).reshape(array.shape)
        assert checkpoint.checksums({"x": changed})["x"] != before
    assert checkpoint.checksums({"x": array[::-1]})["x"] != before


def test_checksums_name_every_array_of_a_state():
    names = checkpoint.checksums(as_dict(state_of(1))).keys()
    assert {"step", "params/bias", "ema_params/bias", "opt_state/0/mu/block/weight"} <= names
