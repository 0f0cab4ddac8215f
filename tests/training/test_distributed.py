"""Start-up of many processes, and two real ones that train as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import differences, losses_of

from see3d_jax.errors import InputError
from see3d_jax.training import distributed

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coordinator": "host:1"}, "belong together"),
        ({"num_processes": 2}, "belong together"),
        ({"process_id": 0}, "belong together"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, r"want host:port .* 'host'"),
        ({"coordinator": "h:x", "num_processes": 2, "process_id": 0}, r"want host:port .* 'h:x'"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "want host:port"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            r"between 0 and .* = 1, got 2",
        ),
        ({"num_processes": 0}, "at least 1, got 0"),
        ({"join_seconds": 0}, "at least 1, got 0"),
    ],
)
def test_values_that_do_not_fit_are_named(options, message):
    with pytest.raises(InputError, match=message):
        distributed.start(**options)


def test_one_process_agrees_with_itself():
    assert distributed.is_lead() and distributed.everywhere(True) and distributed.total(3) == 3
    assert not distributed.everywhere(False)


def environment(devices):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}",
    }


def launch(workdir, data, environment, join=None, **overrides):
    """Starts one process of a run on 8 devices: 2 × 2 × 2 over data, fsdp and view."""
    values = {
        "batch_size": 8, "data.views": 4, "num_steps": 4, "checkpoint_every": 2, "log_every": 1,
        "mesh.data": 2, "mesh.fsdp": 2, "mesh.view": 2, **overrides,
    }  # fmt: skip
    options = {"workdir": str(workdir), "data": str(data), "overrides": values}
    if join:
        options["join"] = join
    return subprocess.Popen(
        [sys.executable, str(HERE / "run_process.py"), json.dumps(options)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*processes, code=0):
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == code, errors[-3000:]
    return outputs


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch_two(workdir, data, environment, **overrides):
    address = f"localhost:{free_port()}"
    return [
        launch(workdir, data, environment, join=[address, 2, index], **overrides)
        for index in range(2)
    ]


@pytest.fixture(scope="module")
def one_process(clip_folder, tmp_path_factory):
    """The run of one process with 8 devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(launch(workdir, clip_folder, environment(8)))
    return workdir


def test_a_process_that_waits_in_vain_says_so_in_one_line(tmp_path):
    options = json.dumps({
        "workdir": str(tmp_path / "run"), "data": "unused", "overrides": {},
        "join": [f"localhost:{free_port()}", 2, 1, 1],
    })  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "run_process.py"), options],
        env=environment(1), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: process 1 of 2 waited 1 s in vain"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


SLURM_TASK = """
import jax
from see3d_jax.training import distributed
distributed.start(join_seconds=60)
print(jax.process_index(), jax.process_count(), distributed.total(1), distributed.is_lead())
"""


def test_the_tasks_of_a_slurm_job_find_each_other():
    """What srun sets for two tasks; JAX takes one of the last 4096 ports by the job's number."""
    job = next(job for job in range(4096) if is_free(61440 + job))
    common = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM_TASK],
            env=environment(1) | common | {"SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for task in "01"
    ]  # fmt: skip
    last_lines = [output.splitlines()[-1] for output, _ in finish(*processes)]
    assert last_lines == ["0 2 2 True", "1 2 2 False"]


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


@pytest.mark.slow
def test_two_processes_train_as_one_does(one_process, clip_folder, tmp_path):
    outputs = finish(*launch_two(tmp_path / "run", clip_folder, environment(4)))
    expected, losses = losses_of(one_process), losses_of(tmp_path / "run")
    assert list(losses) == list(expected)
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert "step 4/4" in outputs[0][0] and "step" not in outputs[1][0], "only the lead may log"


@pytest.mark.slow
def test_checkpoints_move_between_numbers_of_processes_and_meshes(
    one_process, clip_folder, tmp_path
):
    """Two steps by two processes, one by one process on another mesh, one by two on a third."""
    workdir = tmp_path / "run"
    finish(*launch_two(workdir, clip_folder, environment(4), num_steps=2))
    other = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.view": 1}
    finish(launch(workdir, clip_folder, environment(8), num_steps=3, **other))
    third = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.view": 4}
    finish(*launch_two(workdir, clip_folder, environment(4), **third))
    expected, losses = losses_of(one_process), losses_of(workdir)
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(clip_folder, tmp_path):
    workdir = tmp_path / "run"
    long = {"num_steps": 100_000, "checkpoint_every": 100_000}
    processes = launch_two(workdir, clip_folder, environment(4), **long)
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(*processes)
    assert outputs[0][0].splitlines()[-1].startswith("stopped by a signal at step ")
    (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert max(losses_of(workdir)) == saved
    # The same number of steps without a signal ends in the same state.
    finish(*launch_two(tmp_path / "straight", clip_folder, environment(4),
                       num_steps=saved, checkpoint_every=saved))  # fmt: skip
    assert differences(workdir, tmp_path / "straight") == []
