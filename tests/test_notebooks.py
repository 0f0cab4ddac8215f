"""Each notebook runs from its first cell to its last on a CPU, and is small as committed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from weight_fixtures import random_run, see3d_release

nbformat = pytest.importorskip("nbformat", reason="pip install nbformat nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbformat nbclient ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000


def execute(name: str, folder: Path, monkeypatch, **environment: str) -> str:
    """Runs a notebook in `folder`; everything it printed, without the bars on stderr."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # The kernel that is asked for is called python3; this one is the interpreter of the tests.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    client = nbclient.NotebookClient(
        notebook, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_begins_with_the_installation(path) -> None:
    assert path.stat().st_size < MOST_BYTES, f"{path.name}: smaller pictures, please"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown" and "pip" in code[0].source
    for cell in code:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert str(ROOT) not in str(cell.outputs)


def test_there_are_four() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_videos_are_curated(tmp_path, monkeypatch) -> None:
    said = execute("2_curate_videos", tmp_path, monkeypatch)
    assert "clip_00000.mp4 → keep" in said and "still.mp4 → reject" in said


@pytest.mark.slow
def test_photos_become_a_scene(tmp_path, monkeypatch) -> None:
    checkpoint = random_run(tmp_path / "run")
    said = execute("1_photos_to_scene", tmp_path, monkeypatch, SEE3D_CHECKPOINT=str(checkpoint))
    assert "known from the photo" in said and (tmp_path / "scene/point_cloud.ply").is_file()


@pytest.mark.slow
def test_a_run_is_resumed(tmp_path, monkeypatch) -> None:
    said = execute("3_finetune_and_resume", tmp_path, monkeypatch)
    assert "\n  20  " in said and "\n  10  " in said


@pytest.mark.slow
def test_weights_are_converted_and_sampled(tmp_path, monkeypatch) -> None:
    see3d_release(tmp_path / "published")
    said = execute("4_convert_official_weights", tmp_path, monkeypatch,
                   SEE3D_OFFICIAL=str(tmp_path / "published"), SEE3D_SIZE="64",
                   SEE3D_STEPS="2")  # fmt: skip
    assert "official 53 calls" in said and "ddim 50 calls" in said and said.endswith("True\n")
