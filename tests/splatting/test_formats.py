"""Scene files: what plyfile reads of them, what comes back, what a broken one says."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plyfile import PlyData

from see3d_jax.errors import InputError
from see3d_jax.splatting import spz
from see3d_jax.splatting.formats import (
    read_gaussians,
    read_ply,
    read_splat,
    read_spz,
    write_gaussians,
    write_ply,
    write_splat,
    write_spz,
)
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians, from_points


def scene(number: int = 7, degree: int = 2, seed: int = 0) -> Gaussians:
    rng = np.random.default_rng(seed)
    quaternions = rng.normal(size=(number, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    leaves = (
        rng.normal(size=(number, 3)), rng.normal(size=(number, 3)), quaternions,
        rng.normal(size=number), rng.normal(size=(number, (degree + 1) ** 2, 3)),
    )  # fmt: skip
    return Gaussians(*(leaf.astype(np.float32) for leaf in leaves))


@settings(max_examples=12, deadline=None)
@given(number=st.integers(1, 20), degree=st.integers(0, 3), seed=st.integers(0, 999))
def test_round_trip_keeps_every_bit_but_quaternion_length(tmp_path_factory, number, degree, seed):
    path = tmp_path_factory.mktemp("ply") / "scene.ply"
    before = scene(number, degree, seed)
    write_ply(path, before)
    after = read_ply(path)
    assert after.sh_degree == degree
    for name in ("means", "log_scales", "opacity_logits", "sh"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_allclose(after.quaternions, before.quaternions, atol=1e-6)


def test_plyfile_finds_the_3dgs_properties_in_order(tmp_path):
    before = scene(degree=1)
    write_ply(tmp_path / "scene.ply", before)
    ply = PlyData.read(tmp_path / "scene.ply")
    assert not ply.text and ply.byte_order == "<"
    (vertex,) = ply.elements
    assert [p.name for p in vertex.properties] == [
        *("x", "y", "z", "nx", "ny", "nz"), *(f"f_dc_{k}" for k in range(3)),
        *(f"f_rest_{k}" for k in range(9)), "opacity", *(f"scale_{k}" for k in range(3)),
        *(f"rot_{k}" for k in range(4)),
    ]  # fmt: skip
    assert all(p.val_dtype == "f4" for p in vertex.properties)
    np.testing.assert_array_equal(vertex["z"], before.means[:, 2])
    # channel-major: f_rest_0..2 are the three degree-1 coefficients of red
    np.testing.assert_array_equal(vertex["f_rest_1"], before.sh[:, 2, 0])
    np.testing.assert_array_equal(vertex["f_rest_3"], before.sh[:, 1, 1])
    np.testing.assert_allclose(vertex["rot_0"], before.quaternions[:, 0], atol=1e-6)


def test_empty_slots_are_not_written(tmp_path):
    before = from_points(np.eye(3), np.full((3, 3), 0.5), capacity=10, sh_degree=0)
    assert (np.asarray(before.opacity_logits) == EMPTY_LOGIT).sum() == 7
    write_ply(tmp_path / "scene.ply", before)
    assert read_ply(tmp_path / "scene.ply").count == 3


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "cut short":
        return data[:-30]
    if kind == "cut in the header":
        return data[:100]
    if kind == "is missing":
        return data.replace(b"property float opacity\n", b"property float opaque\n")
    if kind == "not a PLY":
        return b"<html>404</html>"
    if kind == "binary_little_endian":
        return data.replace(b"binary_little_endian", b"ascii")
    if kind == "f_rest":
        return data.replace(b"property float f_rest_8\n", b"property float spare\n")
    if kind == "NaN":
        body = data.index(b"end_header\n") + 11
        return data[:body] + np.float32(np.nan).tobytes() + data[body + 4 :]
    if kind == "no Gaussians":
        return data[: data.index(b"end_header\n") + 11].replace(b"vertex 7", b"vertex 0")
    if kind == "plain number":
        return data.replace(b"property float nx\n", b"property list uchar int nx\n")
    return b""


@pytest.mark.parametrize(
    "kind",
    [
        "cut short", "cut in the header", "is missing", "not a PLY", "binary_little_endian",
        "f_rest", "NaN", "plain number", "no Gaussians", "empty",
    ],
)  # fmt: skip
def test_a_broken_file_is_named_in_one_line(tmp_path, kind):
    path = tmp_path / "scene.ply"
    write_ply(path, scene(degree=1))
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(InputError) as caught:
        read_ply(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if kind not in ("empty", "cut in the header"):
        assert kind in str(caught.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_ply(tmp_path / "absent.ply")


def test_splat_keeps_what_its_bytes_can_hold_and_puts_the_most_visible_first(tmp_path):
    before = scene(30, degree=2)
    path = tmp_path / "scene.splat"
    write_splat(path, before)
    assert path.stat().st_size == 32 * 30
    after = read_splat(path)
    opacity = 1 / (1 + np.exp(-before.opacity_logits))
    order = np.argsort(-opacity * np.exp(before.log_scales).prod(1))
    np.testing.assert_array_equal(after.means, before.means[order])
    np.testing.assert_allclose(after.log_scales, before.log_scales[order], atol=1e-5)
    np.testing.assert_allclose(after.quaternions, before.quaternions[order], atol=1 / 120)
    read_opacity = 1 / (1 + np.exp(-after.opacity_logits))
    np.testing.assert_allclose(read_opacity, opacity[order], atol=0.5 / 255 + 1e-3)
    color, found = (0.5 + 0.28209479 * x[:, 0] for x in (before.sh[order], after.sh))
    np.testing.assert_allclose(found, np.clip(color, 0, 1), atol=0.5 / 255 + 1e-6)
    write_splat(tmp_path / "again.splat", after)
    np.testing.assert_array_equal(read_splat(tmp_path / "again.splat").means, after.means)


@pytest.mark.parametrize("kind", ["cut short", "empty", "NaN"])
def test_a_broken_splat_is_named_in_one_line(tmp_path, kind):
    path = tmp_path / "scene.splat"
    write_splat(path, scene())
    data = path.read_bytes()
    broken = {"cut short": data[:-5], "empty": b"", "NaN": np.float32(np.nan).tobytes() + data[4:]}
    path.write_bytes(broken[kind])
    with pytest.raises(InputError, match=r"scene\.splat"):
        read_splat(path)


# Three Gaussians of degree 3 as gsply 0.4.6 wrote them, and what it read: axes as in the file.
SPZ_OF_GSPLY = base64.b64decode(
    "H4sIAGMHCGsA/wHTACz/TkdTUAMAAAADAAAAAwwAAKggABzX/7EGAOr2/8L4/438/67f/0r8/yjy/0pttJaDmROn"
    "W0CKmqV0amtlX2p4bHop8KShNWr4SEGJ5W9XgX62nYereFyWlnhiiSCbk0GCW50yXZusLW2Nab1Sjli2f3I+wZ2d"
    "rI1nYWG1SGl0iZZQPoCvnYh0i3efYYV8lYniurkyc2mUKK2pTlphgpnPeJ2GxJy1V3lhupl0b5NlXJLfd2tTTZSh"
    "gI2EhUVuhGJuYXOhcHqfmcEwoW2FoKqohr51e+NO2tPTAAAA"
)


def test_spz_of_another_program_is_read_with_its_axes_turned():
    read = spz.decode(SPZ_OF_GSPLY, "golden")
    assert read.count == 3 and read.sh_degree == 3
    np.testing.assert_allclose(read.means[0], [2.0410, 2.5557, -0.4182], atol=1e-4)
    np.testing.assert_allclose(read.log_scales[1], [-3.3125, -3.6875, -4.0625])
    np.testing.assert_allclose(read.quaternions[1], [0.5811, -0.5397, 0.1951, -0.5770], atol=1e-4)
    np.testing.assert_allclose(read.opacity_logits, [-0.8944, -0.2923, 0.8755], atol=1e-4)
    np.testing.assert_allclose(read.sh[2, 0], [-1.6601, 0.2745, 0.6928], atol=1e-4)
    np.testing.assert_allclose(read.sh[2, 5], [-0.1640625, -0.3515625, -0.3984375])  # yz: as is
    np.testing.assert_allclose(read.sh[0, 1:4, 0], [0.1328125, 0.015625, 0.0546875])  # y, z, x


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spz_keeps_what_its_bytes_can_hold(tmp_path, degree):
    before = scene(50, degree)
    before.sh[:, 1:] *= 0.3
    path = tmp_path / "scene.spz"
    write_spz(path, before)
    after = read_spz(path)
    np.testing.assert_allclose(after.means, before.means, atol=1e-6)
    np.testing.assert_allclose(after.log_scales, before.log_scales, atol=1 / 32 + 1e-6)
    sign = np.sign((after.quaternions * before.quaternions).sum(1, keepdims=True))
    np.testing.assert_allclose(after.quaternions * sign, before.quaternions, atol=2e-3)
    share = [1 / (1 + np.exp(-s.opacity_logits)) for s in (after, before)]
    np.testing.assert_allclose(*share, atol=0.5 / 255 + 1e-6)
    within = np.abs(before.sh[:, 0]) < 3.3
    np.testing.assert_allclose(
        after.sh[:, 0][within], before.sh[:, 0][within], atol=0.5 / 255 / 0.15 + 1e-5
    )
    expected = np.clip(before.sh[:, 1:], -1, 127 / 128)
    np.testing.assert_allclose(after.sh[:, 1:], expected, atol=1 / 128 + 1e-6)
    write_spz(tmp_path / "again.spz", before)
    assert (tmp_path / "again.spz").read_bytes() == path.read_bytes()


def test_spz_of_version_2_holds_three_bytes_of_rotation():
    before = scene(5, 0)
    data = bytearray(gzip.decompress(spz.encode(before)))
    rotations = np.round(before.quaternions * np.sign(before.quaternions[:, :1]), 6)
    turned = rotations[:, 1:] * [1, -1, -1]
    data[4] = 2
    data[-20:] = np.rint(turned * 127.5 + 127.5).astype(np.uint8).tobytes()
    read = spz.decode(gzip.compress(bytes(data)), "old")
    np.testing.assert_allclose(read.quaternions[:, 1:], rotations[:, 1:], atol=1 / 254)
    error = np.abs(read.quaternions[:, 0] - rotations[:, 0])
    assert (error < 0.02 + 0.01 / np.maximum(rotations[:, 0], 0.1)).all()


@pytest.mark.parametrize(
    "kind", ["cut short", "gzip", "NGSP", "version 9", "version 4", "no Gaussians", "extensions"]
)
def test_a_broken_spz_is_named_in_one_line(tmp_path, kind):
    path = tmp_path / "scene.spz"
    write_spz(path, scene())
    data = path.read_bytes()
    plain = gzip.decompress(data)
    broken = {
        "cut short": gzip.compress(plain[:-5]), "gzip": data[:-20],
        "NGSP": gzip.compress(b"PK" + plain[2:]),
        "version 9": gzip.compress(plain[:4] + b"\x09" + plain[5:]), "version 4": plain,
        "no Gaussians": gzip.compress(plain[:8] + bytes(4) + plain[12:16]),
        "extensions": gzip.compress(plain[:14] + b"\x02" + plain[15:]),
    }  # fmt: skip
    path.write_bytes(broken[kind])
    with pytest.raises(InputError, match=kind) as caught:
        read_spz(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_scene_too_large_for_spz_is_refused(tmp_path):
    before = scene()
    before.means[3, 1] = 1e8
    with pytest.raises(InputError, match="farther out"):
        write_spz(tmp_path / "scene.spz", before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".ply", ".splat", ".spz"])
def test_the_name_chooses_the_format(tmp_path, suffix):
    before = scene()
    write_gaussians(tmp_path / f"scene{suffix}", before)
    after = read_gaussians(tmp_path / f"scene{suffix}")
    np.testing.assert_allclose(np.sort(after.means, 0), np.sort(before.means, 0), atol=1e-6)
    with pytest.raises(InputError, match=r"\.ply, \.splat, \.spz"):
        write_gaussians(tmp_path / "scene.las", before)
