"""The command line: every mistake is one clear line on stderr, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from see3d_jax.errors import InputError
from see3d_jax.main import parse_arguments

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.py")


def arguments(*extra, config=TINY, workdir="run"):
    return ["main", f"--config={config}", f"--workdir={workdir}", *extra]


def test_overrides_reach_the_config_with_their_types():
    parsed = parse_arguments(
        arguments("--config.num_steps=7", "--config.data.path=a b", "--config.data.stride=(2,3)")
    )
    config = parsed.config
    assert (config.num_steps, config.data.path, config.data.stride) == (7, "a b", (2, 3))
    assert parsed.workdir == Path("run") and config.is_locked


def test_options_may_be_given_as_two_words():
    parsed = parse_arguments(["main", "--config", TINY, "--workdir", "run"])
    assert parsed.config.seed == 0 and parsed.workdir == Path("run")


def test_a_bucket_stays_a_bucket():
    parsed = parse_arguments(arguments(workdir="gs://bucket/runs/a"))
    assert str(parsed.workdir / "config.json") == "gs://bucket/runs/a/config.json"


def test_processes_are_named_by_flags_or_by_the_environment(monkeypatch):
    flags = arguments("--coordinator=host:1", "--num_processes=2", "--process_id=1")
    parsed = parse_arguments(flags)
    assert (parsed.coordinator, parsed.num_processes, parsed.process_id) == ("host:1", 2, 1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    parsed = parse_arguments(arguments("--process_id=3"))
    assert (parsed.coordinator, parsed.num_processes, parsed.process_id) == ("other:2", 8, 3)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(InputError, match=r"JAX_NUM_PROCESSES: want a number, got 'many'"):
        parse_arguments(arguments())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["main", "--workdir=run"], "--config is missing"),
        (["main", f"--config={TINY}"], "--workdir is missing"),
        (["main", "--config=nowhere.py", "--workdir=run"], "nowhere.py.*no such config file"),
        (arguments("--config.stepz=3"), r"unknown config key --config\.stepz; .* lists the keys"),
        (arguments("--config.data.pth=x"), r"--config\.data\.pth; .* --config\.data\.path\?$"),
        (arguments("--config.dat.views=3"), r"--config\.dat\.views; .* --config\.data\.views\?$"),
        (arguments("--config.num_steps=many"), "num_steps=many"),
        (arguments("--wrokdir=x"), "unknown flag --wrokdir; did you mean --workdir"),
        (arguments("stray"), "unexpected argument 'stray'"),
        (arguments("--num_processes=two"), "num_processes=two"),
    ],
)
def test_a_mistake_is_named(argv, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(argv)


@pytest.mark.parametrize("text", ["import nowhere_to_be_found", "x = 1", "def get_config(): 1 / 0"])
def test_a_broken_config_file_is_named(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.py: not a usable config file"):
        parse_arguments(arguments(config=path))


def run_main(*argv):
    return subprocess.run(
        [sys.executable, "-m", "see3d_jax.main", *argv], capture_output=True, text=True, check=False
    )


def test_help_shows_examples():
    done = run_main("--help")
    assert done.returncode == 0 and "Examples:" in done.stdout and "--config=" in done.stdout


def test_a_missing_data_folder_ends_with_one_line_and_a_code(tmp_path):
    workdir = tmp_path / "run"
    done = run_main(*arguments(f"--config.data.path={tmp_path / 'nowhere'}", workdir=workdir)[1:])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "nowhere" in done.stderr and not workdir.exists()
