"""Curves of a training run are drawn from its metrics alone, and broken ones are named."""

import json

import pytest

from see3d_jax.errors import InputError
from tools.plot_run import draw, read_metrics

ENTRIES = [{"step": step, "loss": 1 / step} for step in range(1, 30)] + [
    {"step": step, "heldout_psnr": 10.0 + step, "heldout_psnr_copy": 12.0, "heldout_psnr_hole": 9.0}
    for step in (10, 20)
]


def test_the_picture_names_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'plots')")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, ENTRIES)) + "\n")
    draw(read_metrics(tmp_path), tmp_path / "run.svg")
    assert [path.name for path in tmp_path.glob("run*")] == ["run.svg"]
    picture = (tmp_path / "run.svg").read_text()
    # Text is drawn as outlines, with the words beside them as comments.
    assert "nearest reference" in picture and "held-out PSNR" in picture
    assert "Telea" not in picture


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="wants the folder of a training run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_metrics(tmp_path)
