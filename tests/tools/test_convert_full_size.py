"""MVDream's checkpoint at its full size, in random values: what converting it takes."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from see3d_jax.models.release import load_release
from see3d_jax.models.weights import parameter_count

MOST_GIB, MOST_SECONDS = 8, 180


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_whole_checkpoint_converts_within_8_gib_and_3_minutes(shared, tmp_path, kind):
    if kind == "pt" and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch (extra `convert`) is not installed")
    keys = shared / "goldens/keys/mvdream_ldm.sd-v2.1-base-4view.json"
    rng = np.random.default_rng(0)
    weights = {
        name: np.asarray(rng.random(shape, np.float32) - np.float32(0.5), np.float16)
        for name, shape in json.loads(keys.read_text())["keys"].items()
    }
    count = sum(x.size for x in weights.values())
    assert count == 1_305_270_668
    kernel = weights["model.diffusion_model.input_blocks.0.0.weight"].copy()
    source = tmp_path / f"sd-v2.1-base-4view.{kind}"
    if kind == "pt":
        import torch

        torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, source)
    else:
        save_file(weights, source)
    del weights

    tool = [sys.executable, "-m", "tools.convert_mvdream", "--input", source]
    began = time.perf_counter()
    process = subprocess.Popen([*tool, "--output", tmp_path / "out"])
    _, status, usage = os.wait4(process.pid, 0)
    seconds, gib = time.perf_counter() - began, usage.ru_maxrss / 2**20
    print(f"{count} numbers in {seconds:.1f} s, peak {gib:.2f} GiB")
    assert status == 0
    assert seconds < MOST_SECONDS and gib < MOST_GIB
    config, params = load_release(tmp_path / "out").unet("mvdream")
    grown = np.asarray(params["input_blocks"]["0"]["0"]["weight"])
    assert config.in_channels == 9 and parameter_count(params) == 865_925_124
    np.testing.assert_array_equal(grown[:, :, :4], kernel.transpose(2, 3, 1, 0))
    assert not grown[:, :, 4:].any()
