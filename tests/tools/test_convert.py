"""Converters: nothing is lost or invented on the way in and out, and bad input is named."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from weight_fixtures import (
    BUFFERS,
    MVDREAM,
    TEXT,
    UNET,
    VAE,
    VISION,
    component,
    ldm_checkpoint,
    see3d_release,
    small_files,
    tokenizer_folder,
)

from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.errors import InputError
from see3d_jax.models.release import load_release, to_torch, unet_config
from see3d_jax.models.weights import init_unet, unet_params_from_torch
from tools import (
    convert_mvdream,
    convert_see3d,
    export_diffusers,
    weight_exports,
    weight_plans,
)
from tools.checkpoint_files import open_tensors

FILE = "diffusion_pytorch_model.safetensors"


def _run(tool, *arguments):
    """Runs a command line; returns its output, raises its error."""
    result = CliRunner().invoke(tool.app, [str(x) for x in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(published folder, its tensors, converted folder)."""
    folder = tmp_path_factory.mktemp("release")
    weights = see3d_release(folder / "published")
    _run(convert_see3d, "--input", folder / "published", "--output", folder / "converted")
    return folder / "published", weights, folder / "converted"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm") / "mvdream.safetensors"
    save_file(ldm_checkpoint(), path)
    return path


def test_a_release_comes_back_bit_for_bit(release, tmp_path):
    published, weights, converted = release
    _run(export_diffusers, "--input", converted, "--output", tmp_path / "back")
    for place, tensors in weights.items():
        _same(load_file(tmp_path / "back" / place), tensors)
    files = {path.relative_to(published) for path in published.rglob("*") if path.is_file()}
    back = {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.*")}
    assert files == {path for path in back if (tmp_path / "back" / path).is_file()}
    for path in files:
        if path.suffix == ".json":
            assert json.loads((tmp_path / "back" / path).read_text()) == json.loads(
                (published / path).read_text()
            )


def test_a_converted_release_loads_component_by_component(release):
    _, weights, converted = release
    opened = load_release(converted)
    assert opened.unets == ["SR", "single", "sparse"]
    config, params = opened.unet("sparse", dtype="bfloat16")
    assert (config.in_channels, config.camera_dim, config.dtype) == (9, None, "bfloat16")
    stored = weights[f"unet/sparse/ema-checkpoint/{FILE}"]
    back = to_torch(params)
    assert back.keys() == stored.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, stored[name].astype(np.float32))
    assert opened.vae()[0].tile_size is None
    assert opened.vae(tiled=True)[0].tile_size == VAE["sample_size"]
    encoder = opened.context_encoder()
    assert encoder.text.num_hidden_layers == 2 and encoder.preprocessing.crop == (28, 28)
    schedule = make_schedule(**opened.schedule_fields())
    assert schedule.prediction == "v" and schedule.alphas_cumprod[-1] == 0
    with pytest.raises(InputError, match="has no UNet 'large'"):
        opened.unet("large")


def test_the_official_tiny_release_comes_back_bit_for_bit(shared, tmp_path):
    published = shared / "goldens/release_tiny"
    _run(convert_see3d, "--input", published, "--output", tmp_path / "converted")
    _run(export_diffusers, "--input", tmp_path / "converted", "--output", tmp_path / "back")
    files = [path.relative_to(published) for path in published.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".safetensors":
            _same(load_file(published / path), load_file(tmp_path / "back" / path))
        assert (tmp_path / "back" / path).is_file()


def test_an_ldm_checkpoint_grows_to_nine_channels_that_start_at_zero(checkpoint, tmp_path):
    tokenizer_folder(tmp_path / "tokenizer")
    component(tmp_path / "clip", "image_encoder", VISION, "model.safetensors", 5)
    small_files(tmp_path / "clip", {"preprocessor_config.json": {"size": 28, "crop_size": 28}})
    output = tmp_path / "out"
    said = _run(
        convert_mvdream, "--input", checkpoint, "--output", output, "--head-dim", 16,
        "--tokenizer", tmp_path / "tokenizer", "--image-encoder", tmp_path / "clip",
    )  # fmt: skip
    assert "4 tensors (camera embedding)" in said and "4 tensors (schedule table)" in said
    state, opened = ldm_checkpoint(), load_release(output)
    config, params = opened.unet("mvdream")
    assert (config.in_channels, config.camera_dim, config.head_dim) == (9, None, 16)
    kernel = np.asarray(params["input_blocks"]["0"]["0"]["weight"])  # [3, 3, in, out]
    source = state["model.diffusion_model.input_blocks.0.0.weight"].astype(np.float32)
    np.testing.assert_array_equal(kernel[:, :, :4], source.transpose(2, 3, 1, 0))
    assert not kernel[:, :, 4:].any()
    vae = load_file(output / "vae/model.safetensors")
    np.testing.assert_array_equal(
        vae["decoder.mid_block.attentions.0.to_q.weight"],
        state["first_stage_model.decoder.mid.attn_1.q.weight"][:, :, 0, 0],
    )
    text, text_params = opened.text_encoder()
    assert text.num_hidden_layers == TEXT["num_hidden_layers"]
    layer = text_params["text_model"]["encoder"]["layers"]["1"]["self_attn"]
    joint = state["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(np.asarray(layer["k_proj"]["weight"]).T, joint[16:32])
    assert (output / "tokenizer/merges.txt").is_file() and opened.image_encoder()
    assert opened.schedule_fields()["prediction"] == "epsilon"


def test_mvdream_itself_comes_back_bit_for_bit(tmp_path):
    source = tmp_path / "mvdream-sd2.1"
    wanted = component(source / "unet", "unet", MVDREAM, FILE)
    component(source / "vae", "vae", VAE, FILE)
    component(source / "text_encoder", "text_encoder", TEXT, "model.safetensors")
    small_files(source / "scheduler", {"scheduler_config.json": json.loads(json.dumps({
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon",
    }))})  # fmt: skip
    converted, back = tmp_path / "converted", tmp_path / "back"
    options = ("--channels", 4, "--keep-camera")
    _run(convert_mvdream, "--input", source, "--output", converted, *options)
    _run(export_diffusers, "--input", converted, "--output", back)
    _same(load_file(back / "unet" / FILE), wanted)
    assert json.loads((back / "unet/config.json").read_text()) == MVDREAM
    _run(convert_mvdream, "--input", source, "--output", tmp_path / "nine")
    assert "camera_dim" not in json.loads((tmp_path / "nine/unet/mvdream/config.json").read_text())


def test_a_trained_network_becomes_one_that_pytorch_code_loads(tmp_path, monkeypatch):
    spec = {**UNET, "in_channels": 25, "out_channels": 12, "channel_mult": [1]}
    config = unet_config({**spec, "attention_resolutions": [1]})
    params = init_unet(config, 0)

    def model(preconditioning="none", **changes):
        unet = dataclasses.replace(config, **changes)
        loaded = SimpleNamespace(unet=unet, params=params, preconditioning=preconditioning)
        monkeypatch.setattr(weight_exports, "load_model", lambda _: loaded)

    (tmp_path / "run/checkpoints").mkdir(parents=True)
    model()
    _run(export_diffusers, "--input", tmp_path / "run", "--output", tmp_path / "out")
    back = weight_plans.unet_part("unet/x", tmp_path / "out", keep_camera=False)  # checks shapes
    assert unet_config(back.spec) == config
    stored = load_file(tmp_path / "out" / FILE)
    jax.tree.map(np.testing.assert_array_equal, unet_params_from_torch(stored, config), params)
    model(norm_groups=16)
    with pytest.raises(InputError, match="16 norm groups; the PyTorch one has 32"):
        _run(export_diffusers, "--input", tmp_path / "run", "--output", tmp_path / "other")
    model(preconditioning="gaussian")
    with pytest.raises(InputError, match="'gaussian', which the PyTorch network knows nothing of"):
        _run(export_diffusers, "--input", tmp_path / "run", "--output", tmp_path / "other")


def test_older_names_of_the_autoencoder_and_whole_clip_files_are_understood(tmp_path):
    see3d_release(tmp_path / "in")
    path = tmp_path / "in/vae" / FILE
    tensors = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, x in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = x
    assert len(renamed.keys() - tensors.keys()) == 16
    save_file(renamed, path)
    path = tmp_path / "in/CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors"
    extra = {"logit_scale": np.zeros(()), "text_model.final_layer_norm.bias": np.zeros(3)}
    save_file({**load_file(path), **extra}, path)
    said = _run(convert_see3d, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "2 tensors (text half of CLIP)" in said
    _same(load_file(tmp_path / "out/vae/model.safetensors"), tensors)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("first_stage_model.encoder.conv_in.bias", None, "1 missing: encoder.conv_in.bias"),
        ("first_stage_model.surplus.weight", np.zeros(3), "1 left over: first_stage_model.surplus"),
        ("model_ema.decay", np.zeros(()), "1 left over: model_ema.decay"),
        ("model.diffusion_model.out.2.bias", np.zeros(5), r"out.2.bias \(5,\) instead of \(4,\)"),
        (
            "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias",
            np.zeros(47),
            r"in_proj_bias \(47,\) instead of \(16,\)",
        ),
    ],
)
def test_gaps_leftovers_and_wrong_shapes_are_listed(tmp_path, name, value, message):
    state = ldm_checkpoint()
    if value is None:
        del state[name]
    else:
        state[name] = value.astype(np.float16)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        _run(convert_mvdream, "--input", tmp_path / "x.safetensors", "--output", tmp_path / "out",
             "--head-dim", 16)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(checkpoint, release, tmp_path):
    published, _, converted = release

    def fails(tool, source, message, output="out"):
        with pytest.raises(InputError, match=message):
            _run(tool, "--input", source, "--output", tmp_path / output)

    fails(convert_mvdream, tmp_path / "none.safetensors", "no such file")
    fails(convert_mvdream, tmp_path / "none.txt", r"expected a checkpoint \(.pt, .safetensors\)")
    fails(convert_mvdream, published, "has no unet/config.json")
    fails(convert_see3d, tmp_path / "none", "no such folder")
    fails(convert_see3d, tmp_path, "has no unet folder, so it is no See3D release")
    fails(export_diffusers, published, "holds no release.json")
    fails(convert_see3d, published, "exists already", output="")
    small_files(tmp_path / "x", {"a.safetensors": "not a checkpoint"})
    fails(convert_mvdream, tmp_path / "x/a.safetensors", "is no whole safetensors file")
    whole = checkpoint.read_bytes()
    (tmp_path / "x/b.safetensors").write_bytes(whole[:-100])
    fails(convert_mvdream, tmp_path / "x/b.safetensors", "is no whole safetensors file")
    save_file({"betas": np.zeros(1000)}, tmp_path / "x/c.safetensors")
    fails(convert_mvdream, tmp_path / "x/c.safetensors", "unknown layout")
    (converted / "vae/model.safetensors").rename(tmp_path / "x/vae.safetensors")
    try:
        with pytest.raises(InputError, match=r"vae/model\.safetensors: no such file"):
            load_release(converted).vae()
    finally:
        (tmp_path / "x/vae.safetensors").rename(converted / "vae/model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_network_of_the_wrong_kind_is_refused_before_writing(release, tmp_path):
    published, _, _ = release
    import shutil

    shutil.copytree(published, tmp_path / "in")
    config = tmp_path / "in/unet/SR/ema-checkpoint/config.json"
    config.write_text(json.dumps({**UNET, "context_dim": 24}))
    with pytest.raises(InputError, match=r"unet/SR .* of the wrong shape: .*attn2\.to_k\.weight"):
        _run(convert_see3d, "--input", tmp_path / "in", "--output", tmp_path / "out")
    config.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is not valid JSON"):
        _run(convert_see3d, "--input", tmp_path / "in", "--output", tmp_path / "out")
    config.unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        _run(convert_see3d, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_need_pytorch_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs PyTorch .*see3d_jax\[convert\]"):
        _run(convert_mvdream, "--input", tmp_path / "x.pt", "--output", tmp_path / "out")


def test_a_pickle_is_read_like_safetensors_unless_it_brings_code(checkpoint, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch (extra `convert`) is not installed")
    state = {name: torch.from_numpy(x.copy()) for name, x in load_file(checkpoint).items()}
    half = next(iter(state))
    state[half] = state[half].to(torch.bfloat16)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    opened = open_tensors(tmp_path / "x.ckpt")
    assert opened.dtypes[half].name == opened.read(half).dtype.name == "bfloat16"
    for name in BUFFERS + ("model.diffusion_model.out.2.weight",):
        np.testing.assert_array_equal(opened.read(name), load_file(checkpoint)[name])
    _run(convert_mvdream, "--input", tmp_path / "x.ckpt", "--output", tmp_path / "out",
         "--head-dim", 16)  # fmt: skip
    assert load_release(tmp_path / "out").unets == ["mvdream"]

    class Code:
        def __reduce__(self):
            return print, ("this must never be printed",)

    torch.save({**state, "extra": Code()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="refused: besides tensors it holds objects"):
        open_tensors(tmp_path / "bad.pt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.pt", "empty.pt", "list.pt"):
        with pytest.raises(InputError, match=name):
            open_tensors(tmp_path / name)
