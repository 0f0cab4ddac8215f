"""The viewer as it is used: in a browser, over its server, and from disk without one."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from browser import chromium_page
from PIL import Image

from see3d_jax import html
from see3d_jax.errors import InputError
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.geometry.scene_files import PosedImages, read_transforms, write_transforms
from see3d_jax.media import data_uri, write_image
from see3d_jax.pipelines.generation import _camera_path
from see3d_jax.pipelines.scene_export import write_cameras
from see3d_jax.pipelines.scene_page import splat_bytes, viewer_data, viewer_section
from see3d_jax.splatting.formats import write_ply, write_splat
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.render import render
from see3d_jax.viewer_server import find_scene, open_server, save_path

WIDTH, HEIGHT = 96, 72


@pytest.fixture(scope="module")
def cameras() -> list[Camera]:
    lens = intrinsics_matrix(90.0, 90.0, WIDTH / 2, HEIGHT / 2)
    eyes = ([0.5, -0.3, -3.0], [-0.8, -0.2, -2.8], [0.0, 0.4, -3.4])
    return [
        Camera(lens, np.asarray(look_at(np.array(eye), np.zeros(3), np.array([0, -1.0, 0])),
                                np.float32), WIDTH, HEIGHT)
        for eye in eyes
    ]  # fmt: skip


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    rng = np.random.default_rng(4)
    count = 300
    return Gaussians(
        means=rng.normal(0, 0.5, (count, 3)).astype(np.float32),
        log_scales=rng.uniform(-3.2, -1.8, (count, 3)).astype(np.float32),
        quaternions=rng.normal(size=(count, 4)).astype(np.float32),
        opacity_logits=rng.uniform(-1, 3, count).astype(np.float32),
        sh=rng.uniform(-1.2, 1.6, (count, 1, 3)).astype(np.float32),
    )


@pytest.fixture
def folder(tmp_path, cameras, gaussians) -> Path:
    """What `see3d create` leaves, as far as the viewer looks at it."""
    views = tmp_path / "out" / "views"
    write_ply(tmp_path / "out/gaussians/point_cloud.ply", gaussians)
    picture = skimage.data.astronaut()[:288:4, :384:4]
    files = ("views/00000.png", "views/00001.png", "references/photo.png")
    for name in (*files, "warps/00000.png", "masks/00000.png"):
        write_image(views / name, picture)
    write_transforms(views / "transforms.json", PosedImages(files, tuple(cameras)))
    return tmp_path / "out"


@pytest.fixture
def server(folder):
    with open_server(find_scene(folder), port=0) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_address[1]}"
        opened.shutdown()


def pixels(page) -> np.ndarray:
    """What the canvas of the scene shows, [h, w, 3] in [0, 1]; the lines over it left out."""
    page.wait_for_timeout(300)
    page.eval_on_selector(".lines", "lines => lines.hidden = true")
    page.add_style_tag(content=".lines[hidden],.message{display:none!important}")
    shot = page.locator("canvas").first.screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")) / 255.0


def drawn(page, camera: Camera, gaussians: Gaussians) -> tuple[np.ndarray, np.ndarray]:
    """The picture in the page within the camera's frame, and our own rendering at its size."""
    seen = pixels(page)
    height, width = seen.shape[:2]
    scale = min(width / camera.width, height / camera.height)
    inner = round(camera.width * scale), round(camera.height * scale)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    ours = np.asarray(render(gaussians, camera.resized(*inner)).rgb).clip(0, 1)
    return seen[top : top + inner[1], left : left + inner[0]], ours


def test_the_page_shows_the_scene_and_saves_a_path(folder, server, cameras, gaussians) -> None:
    with chromium_page(width=900, height=700) as page:
        page.goto(server)
        page.wait_for_selector("[data-ready=yes]")
        root = page.locator("#see3d-viewer")
        seen, ours = drawn(page, cameras[0], gaussians)
        assert 10 * np.log10(1 / np.mean((seen - ours) ** 2)) > 28  # dB: 8 bits, another blending
        assert page.locator(".pictures img").count() == 3  # result, warp, mask
        assert page.locator("figcaption", has_text="mask (white = known)").count() == 1
        page.keyboard.press("Tab")  # the scene is the first thing to be reached by keyboard
        page.keyboard.press("k")
        start = root.get_attribute("data-eye")
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        page.keyboard.press("k")
        assert root.get_attribute("data-eye") != start
        turned = pixels(page)
        assert np.abs(turned - pixels(page)).max() == 0 and turned.std() > 0.05
        box = page.locator("canvas").first.bounding_box()
        page.mouse.move(box["x"] + 200, box["y"] + 150)
        page.mouse.down()
        page.mouse.move(box["x"] + 260, box["y"] + 150)
        page.mouse.up()
        assert np.abs(pixels(page) - turned).mean() > 0.01
        page.locator("[data-toggle=gaussians]").uncheck()
        assert pixels(page)[10:-10, 10:-10].max() < 0.02  # without the rounded corners
        page.locator("[data-toggle=gaussians]").check()
        page.get_by_role("button", name="photo").click()
        assert root.get_attribute("data-selected") == "2"
        assert page.locator(".pictures img").count() == 1
        page.get_by_label("Name", exact=True).fill("my-path")
        page.locator("[data-action=save]").click()
        page.wait_for_function("document.querySelector('output').textContent.includes('my-path')")
    path = folder / "paths" / "my-path.json"
    kept = read_transforms(path).cameras
    np.testing.assert_allclose(kept[0].world_to_camera, cameras[0].world_to_camera, atol=1e-5)
    assert np.abs(kept[1].world_to_camera - kept[0].world_to_camera).max() > 0.05
    depth = np.full((HEIGHT, WIDTH), 3.0, np.float32)
    taken = _camera_path(str(path), [cameras[0]], depth, [], 5)  # what generate makes of it
    assert len(taken.intrinsics) == 5


def test_a_page_opens_from_disk_and_is_readable_in_any_width(
    folder, cameras, gaussians, tmp_path
) -> None:
    data = viewer_data(folder / "views", gaussians, data_uri)
    html.write_page(tmp_path / "p.html", "A scene", viewer_section(data, splat_bytes(gaussians)))
    for width, scheme in ((400, "dark"), (1600, "light")):
        with chromium_page(width=width, height=900, scheme=scheme) as page:
            page.goto((tmp_path / "p.html").as_uri())
            page.wait_for_selector("[data-ready=yes]")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            dark = page.evaluate("getComputedStyle(document.body).color").startswith("rgb(255")
            assert dark == (scheme == "dark")
            if width == 1600:
                seen, ours = drawn(page, cameras[0], gaussians)
                assert 10 * np.log10(1 / np.mean((seen - ours) ** 2)) > 28
                page.get_by_role("button", name="Keep this view (K)").click()
                with page.expect_download() as download:
                    page.locator("[data-action=save]").click()
                content = json.loads(Path(download.value.path()).read_text())
                assert len(content["frames"]) == 1 and content["w"] == WIDTH


def test_colours_change_with_the_direction_as_in_our_renderer(cameras, gaussians, tmp_path) -> None:
    """Strong harmonics, seen from two sides; without them the pictures differ clearly."""
    cameras = cameras[:2]
    sh = np.random.default_rng(3).normal(0, 0.6, (gaussians.count, 16, 3)).astype(np.float32)
    sh[:, 0] = gaussians.sh[:, 0]
    scene, plain = (dataclasses.replace(gaussians, sh=part) for part in (sh, sh[:, :1]))
    entries = tmp_path / "cameras"
    files = tuple(f"{i}.png" for i in range(len(cameras)))
    for name in files:
        write_image(entries / name, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_transforms(entries / "transforms.json", PosedImages(files, tuple(cameras)))
    data = viewer_data(entries, scene, data_uri)
    html.write_page(tmp_path / "p.html", "A scene", viewer_section(data, splat_bytes(scene)))
    with chromium_page(width=500, height=450) as page:
        page.goto((tmp_path / "p.html").as_uri())
        page.wait_for_selector("[data-ready=yes]")
        for i, camera in enumerate(cameras):
            page.get_by_role("button", name=str(i), exact=True).click()
            seen, ours = drawn(page, camera, scene)
            lens = camera.resized(*ours.shape[1::-1])
            flat = np.asarray(render(plain, lens).rgb).clip(0, 1)
            psnr, without = (10 * np.log10(1 / np.mean((a - ours) ** 2)) for a in (seen, flat))
            assert psnr > max(27, without + 5), (i, psnr, without)


def answer(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, body, headers={k.replace("_", "-"): v for k, v in
                                                         headers.items()})  # fmt: skip
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_only_the_page_itself_may_save_and_only_paths(folder, server) -> None:
    assert answer(server)[0] == 200 and answer(f"{server}/../secret")[0] == 404
    good = (folder / "views/transforms.json").read_bytes()
    assert answer(f"{server}/path?name=a", good)[0] == 403  # a form of another site
    assert answer(server, Host="evil.example")[0] == 403  # a name that was bent to this machine
    code, text = answer(f"{server}/path?name=../a", good, X_See3d="path")
    assert code == 400 and "a name takes letters" in text
    code, text = answer(f"{server}/path?name=a", b'{"frames": []}', X_See3d="path")
    assert code == 400 and "frames" in text
    assert not (folder / "paths").exists()
    code, text = answer(f"{server}/path?name=a", good, X_See3d="path")
    assert code == 200 and Path(json.loads(text)["path"]).read_bytes() == good


def test_a_taken_port_is_one_line_that_says_what_to_do(folder, server) -> None:
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(InputError, match=rf"--port {port}: is taken.*--port 0"):
        open_server(find_scene(folder), port=port)
    with pytest.raises(InputError, match=r"--host 203\.0\.113\.1: cannot listen there"):
        open_server(find_scene(folder), host="203.0.113.1", port=0)


def test_scenes_are_found_in_whatever_holds_them(folder, tmp_path, gaussians) -> None:
    views, ply = folder / "views", folder / "gaussians/point_cloud.ply"
    assert dataclasses.astuple(find_scene(folder)) == (folder, views, ply)
    assert find_scene(folder / "gaussians").cameras == views
    assert dataclasses.astuple(find_scene(views)) == (views, views, None)
    write_splat(tmp_path / "a.splat", gaussians)
    found = find_scene(tmp_path / "a.splat")
    assert found.cameras is None
    with open_server(found, port=0) as opened:
        assert opened.server_address[1] > 0
    (tmp_path / "empty").mkdir()
    assert find_scene(tmp_path / "empty") is None
    with pytest.raises(InputError, match="no such file or folder"):
        find_scene(tmp_path / "nowhere")


def test_a_fitted_scene_comes_with_its_cameras_and_photos(
    folder, cameras, gaussians, tmp_path
) -> None:
    """What `see3d reconstruct` leaves; the photos are where it found them, or gone."""
    fitted = tmp_path / "fitted"
    write_ply(fitted / "point_cloud.ply", gaussians)
    names = ("00000", "photo")
    write_cameras(fitted / "cameras.json", dict(zip(names, cameras[::2], strict=True)))
    write_image(fitted / "renders/photo.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_json(fitted / "metrics.json", {"input": "../out/views"})
    for place in (fitted, fitted / "point_cloud.ply"):
        assert find_scene(place).cameras == fitted
    entries = viewer_data(fitted, gaussians, data_uri)["cameras"]
    assert [(e["name"], e["kind"]) for e in entries] == [("00000", "view"), ("photo", "photo")]
    labels = [[picture["label"] for picture in entry["pictures"]] for entry in entries]
    assert labels == [["view"], ["photo", "scene (held out)"]]
    np.testing.assert_allclose(entries[1]["world_to_camera"], cameras[2].world_to_camera, atol=1e-5)
    shutil.rmtree(folder / "views")
    entries = viewer_data(fitted, gaussians, data_uri)["cameras"]
    assert [len(entry["pictures"]) for entry in entries] == [0, 1]


def test_a_path_is_checked_before_it_is_written(tmp_path) -> None:
    with pytest.raises(InputError):
        save_path(tmp_path, "p", "no json")
    assert list(tmp_path.iterdir()) == []


def test_stack_of_cameras_is_what_the_page_gets(folder, cameras) -> None:
    entries = viewer_data(folder / "views", None, data_uri)["cameras"]
    given = np.asarray(stack(cameras).world_to_camera)
    np.testing.assert_allclose([e["world_to_camera"] for e in entries], given, atol=1e-6)
    assert [e["kind"] for e in entries] == ["view", "view", "photo"]
    assert {e["fx"] for e in entries} == {90.0}
