"""A workdir in a bucket, as far as that goes without one: everything but Orbax's own files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorboardX.record_writer
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from configs import tiny
from see3d_jax.errors import InputError
from see3d_jax.files import write_text
from see3d_jax.media import write_image
from see3d_jax.training import checkpoint
from see3d_jax.training.metrics_log import MetricsLog


class Bucket(MemoryFileSystem):
    """Stands for gs:// in this process."""

    protocol = "gs"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: Bucket())
    opened = []

    class Factory:
        def open(self, path):
            opened.append(path)
            return (tmp_path / "events").open("wb")

        def directory_check(self, path):
            pass

    factories = tensorboardX.record_writer.REGISTERED_FACTORIES
    monkeypatch.setitem(factories, "gs", Factory())
    yield epath.Path("gs://bucket/runs/a")
    assert all(path.startswith("gs://bucket/runs/a/events") for path in opened)


def test_config_metrics_and_pictures_go_to_the_bucket(bucket):
    config = tiny.get_config()
    checkpoint.check_workdir(bucket, config)
    checkpoint.write_config(bucket, config)
    assert json.loads((bucket / "config.json").read_text())["data"]["views"] == 4
    for first, last in ((0, 3), (2, 4)):  # the second run continues from step 2
        with MetricsLog(bucket, first) as log:
            for step in range(first + 1, last + 1):
                log.scalars(step, {"loss": float(first)})
            log.flush()
    rows = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0), (2, 0), (3, 2), (4, 2)]
    write_image(bucket / "samples" / "step.png", np.zeros((4, 4, 3), np.uint8))
    assert (bucket / "samples" / "step.png").read_bytes().startswith(b"\x89PNG")
    config.seed = 5
    with pytest.raises(InputError, match=r"gs://bucket/runs/a: was trained with another config"):
        checkpoint.check_workdir(bucket, config)


def test_a_missing_client_is_named(monkeypatch):
    def missing(self, name):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", missing)
    with pytest.raises(InputError, match=r"gs://other/run: cannot be reached: .* install gcsfs"):
        checkpoint.check_workdir("gs://other/run", tiny.get_config())


def test_a_local_file_is_not_a_bucket(tmp_path):
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
