"""The parity tool: finds cases by what files hold, measures, and fails when anything differs."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from weight_fixtures import MVDREAM, UNET, VAE, random_tensors, small_files

from see3d_jax.errors import InputError
from see3d_jax.models.release import torch_shapes, unet_config
from see3d_jax.models.weights import apply_unet, unet_params_from_torch
from tools import parity, parity_flow

SMALL = {**UNET, "channel_mult": [1], "attention_resolutions": []}


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """A folder as goldens are kept, recorded from this implementation."""
    folder = tmp_path_factory.mktemp("goldens")
    tensors = random_tensors(torch_shapes("unet", SMALL))
    tensors = {name: (0.1 * x).astype(np.float16) for name, x in tensors.items()}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 4, 2)).astype(np.float32)
    t, context = np.float32([7, 500, 999]), rng.standard_normal((3, 77, 16)).astype(np.float32)
    config = unet_config(SMALL)
    inputs = np.moveaxis(x, 1, -1)[None], t[None], context[None]
    out = apply_unet(config, unet_params_from_torch(tensors, config), *inputs)
    out = np.ascontiguousarray(np.moveaxis(np.asarray(out[0]), -1, 1))
    (folder / "deep").mkdir()
    io = {"mine.x": x, "mine.timesteps": t, "mine.context": context, "mine.out": out}
    save_file(io, folder / "deep/some.io.safetensors")
    save_file(tensors, folder / "deep/some.weights.safetensors")
    spec = {"config": SMALL, "weights": "some.weights.safetensors"}
    keys = {name: list(shape) for name, shape in torch_shapes("vae", VAE).items()}
    small_files(
        folder / "deep", {"some.json": {**spec, "cases": {"mine": {"B": 1, "num_frames": 3}}}}
    )
    small_files(folder, {"vae.json": {"config": VAE, "n_tensors": len(keys), "keys": keys}})
    small_files(folder, {"odd.json": {"what": "nobody knows"}})
    save_file({"a": x}, folder / "odd.safetensors")
    return folder


def _run(*arguments):
    result = CliRunner().invoke(parity.app, [str(x) for x in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def test_cases_are_found_and_pass(goldens, tmp_path):
    code, output = _run(goldens, "--json", tmp_path / "p.json", "--markdown", tmp_path / "p.md")
    assert code == 0 and "2 ok, 0 FAIL, 1 skipped" in output
    report = json.loads((tmp_path / "p.json").read_text())
    by_name = {case["case"]: case for case in report["cases"]}
    assert by_name["deep/some/mine"]["errors"]["out"]["error"] < 2e-5
    assert by_name["vae"]["status"] == "ok" and by_name["odd"]["status"] == "skipped"
    page = (tmp_path / "p.md").read_text()
    assert "| deep/some/mine | out |" in page and "FAIL" not in page


def test_the_table_replaces_only_itself_in_a_page(goldens, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{parity.MARKERS[0]}\nold\n{parity.MARKERS[1]}\nafter\n")
    _run(goldens, "--only", "keys", "--markdown", page)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "old" not in text
    page.write_text("no place")
    with pytest.raises(InputError, match="has no place for the table"):
        _run(goldens, "--only", "keys", "--markdown", page)


@pytest.mark.parametrize("change", ["out", "nan", "shape", "weights", "gone"])
def test_whatever_differs_fails(goldens, tmp_path, change):
    import shutil

    shutil.copytree(goldens / "deep", tmp_path / "deep")
    path = tmp_path / "deep/some.io.safetensors"
    io = load_file(path)
    if change == "out":
        io["mine.out"][1, 2, 3, 1] += 1e-4
    elif change == "nan":
        io["mine.out"][0, 0, 0, 0] = np.nan
    elif change == "shape":
        io["mine.out"] = io["mine.out"][:, :, :2]
    elif change == "weights":
        weights = load_file(tmp_path / "deep/some.weights.safetensors")
        weights.pop("out.0.bias")
        save_file(weights, tmp_path / "deep/some.weights.safetensors")
    else:
        (tmp_path / "deep/some.weights.safetensors").unlink()
    save_file({k: np.ascontiguousarray(x) for k, x in io.items()}, path)
    code, output = _run(tmp_path)
    assert code == 1 and "FAIL  deep/some" in output
    if change == "weights":
        assert "missing [out.0.bias]" in output
    if change == "gone":
        assert "no such file" in output


def test_a_damaged_file_fails_alone(goldens, tmp_path):
    import shutil

    shutil.copytree(goldens, tmp_path / "copy")
    path = tmp_path / "copy/odd.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    code, output = _run(tmp_path / "copy", "--only", "odd")
    assert code == 1 and "is no whole safetensors file" in output
    (tmp_path / "copy/vae.json").write_text("{")
    assert _run(tmp_path / "copy", "--only", "odd")[0] == 1


def test_a_layout_with_a_stray_tensor_fails(tmp_path):
    keys = {name: list(shape) for name, shape in torch_shapes("unet", MVDREAM).items()}
    keys["surplus.weight"] = [3]
    small_files(tmp_path, {"x.json": {"config": MVDREAM, "n_tensors": 1, "keys": keys}})
    code, output = _run(tmp_path)
    assert code == 1 and "1 left over: surplus.weight" in output


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no goldens"):
        _run(tmp_path)
    with pytest.raises(InputError, match="no such folder of goldens"):
        _run(tmp_path / "none")


def test_published_layouts_are_consumed_whole(shared):
    code, output = _run(shared / "goldens/keys", "--only", "mvdream_")  # all of them: below
    assert code == 0 and "3 ok, 0 FAIL, 0 skipped" in output


@pytest.mark.slow
def test_all_official_outputs_are_matched(shared):
    code, output = _run(shared / "goldens")
    assert code == 0, output


def test_flow_weights_that_only_torch_reads_are_skipped_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(parity_flow.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "raft-small.pth").touch()
    (result,) = parity_flow.run_flow(tmp_path / "clip.json", {}, None)
    assert result.skipped == "raft-small.pth needs torch: pip install torch"
