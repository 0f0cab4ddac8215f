"""Where numbers go: the log, the optional W&B, and the speed of training."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from see3d_jax.errors import InputError
from see3d_jax.training import metrics_log
from see3d_jax.training.metrics_log import Console, MetricsLog


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers what it is told."""
    told = types.SimpleNamespace(starts=[], rows=[], finished=0)
    module = types.ModuleType("wandb")
    module.Image = lambda image: ("image", image.shape)

    class Run:
        def log(self, values, step):
            told.rows.append((step, values))

        def finish(self):
            told.finished += 1

    def init(**options):
        told.starts.append(options)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_gets_what_the_files_get(wandb, tmp_path):
    for first in (0, 2):
        with MetricsLog(tmp_path / "run", first, wandb_project="see3d") as log:
            log.scalars(first + 1, {"loss": 0.5})
            log.image(first + 1, "samples", np.zeros((4, 6, 3), np.uint8))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.5}]
    assert wandb.rows == [
        (1, {"loss": 0.5}), (1, {"samples": ("image", (4, 6, 3))}),
        (3, {"loss": 0.5}), (3, {"samples": ("image", (4, 6, 3))}),
    ]  # fmt: skip
    first, again = wandb.starts
    assert first == again, "a run that is continued has the same name and id"
    assert first["project"] == "see3d" and first["name"] == "run" and wandb.finished == 2


def test_wandb_is_neither_imported_nor_started_without_a_project(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    with MetricsLog(tmp_path, 0) as log:
        log.scalars(1, {"loss": 0.5})
    with MetricsLog(tmp_path / "other", 0, writes=False, wandb_project="see3d") as log:
        log.scalars(1, {"loss": 0.5})
    assert not (tmp_path / "other").exists()


def test_a_missing_wandb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"config\.wandb_project is 'p'.*pip install '\.\[log\]'"):
        metrics_log.import_wandb("p")


def test_the_speed_is_also_told_in_model_flops(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics_log, "peak_flops", lambda kind: 8e12)
    with Console(0, 10, batch_size=4, flops_per_sample=1e12) as console:
        console.step_done()  # compiles
        for _ in range(2):
            now[0] += 2.0
            console.step_done()
        speed = console.report(3, 0.5)
    assert speed["samples_per_second"] == pytest.approx(2.0)
    assert speed["model_tflops_per_second"] == pytest.approx(2.0)
    assert speed["model_flops_utilisation"] == pytest.approx(0.25)
    assert "2.0 samples/s" in capsys.readouterr().out
