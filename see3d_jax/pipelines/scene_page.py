"""Scenes to turn around in, as web pages: what `see3d create` writes and `see3d view` serves.

A page holds all it needs: the scripts in `assets/viewer`, pictures and Gaussians as data. So it
opens from disk, without a server, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax import html
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.scene_files import read_inria_cameras
from see3d_jax.media import data_uri, read_image
from see3d_jax.pipelines.inputs import has_cameras, load_depth_file, load_scene
from see3d_jax.pipelines.scene_export import CAMERAS_FILE
from see3d_jax.splatting.formats import most_visible_first, read_ply, write_splat
from see3d_jax.splatting.gaussians import Gaussians

_ASSETS = Path(__file__).parents[1] / "assets" / "viewer"
_STAGES = {  # folder of a generated view → what the page calls it
    "views": "result", "generated": "as generated", "warps": "warp",
    "masks": "mask (white = known)", "inpainted": "inpainted (Telea)",
}  # fmt: skip
_PICTURE_SIDE = 320
Link = Callable[[np.ndarray], str]  # uint8 picture → address of it


def viewer_data(
    cameras: Path | None, gaussians: Gaussians | None, link: Link, **more: Any
) -> dict[str, Any]:
    """What the script needs to know of a scene, as JSON values.

    Args:
      cameras: folder of `see3d generate` or `reconstruct`, or any posed scene; None: no cameras
        are known.
      gaussians: the scene, for its size and the kind of its colours; None: there is none.
      link: gives the pictures an address: data, or a place on the server.
      **more: further fields: `splats` and `save`, addresses on the server.
    """
    entries = []
    if cameras is not None:
        entries = (_cameras if has_cameras(cameras) else _fitted_cameras)(cameras, link)
    radius, focus, harmonics = 1.0, 3.0, 1
    if gaussians is not None:
        means, harmonics = np.asarray(gaussians.means), int(gaussians.sh.shape[1])
        middle = np.median(means, 0)
        radius = float(np.quantile(np.linalg.norm(means - middle, axis=1), 0.8))
        focus = 2.5 * radius
        if entries:
            pose = np.array(entries[0]["world_to_camera"])
            depth = (means @ pose[2, :3]) + pose[2, 3]
            if (depth > 0).any():
                focus = float(np.median(depth[depth > 0]))
    elif entries:
        centres = [-np.array(e["world_to_camera"])[:3, :3].T @ np.array(e["world_to_camera"])[:3, 3]
                   for e in entries]  # fmt: skip
        focus = max(1e-3, 1.5 * float(np.ptp(np.array(centres), axis=0).max())) or 3.0
    return {
        "cameras": entries, "radius": radius, "focus": focus, "harmonics": harmonics, **more,
    }  # fmt: skip


def viewer_section(data: dict[str, Any], splats: bytes | None = None) -> str:
    """The viewer as HTML for the body of a page; `splats` are embedded."""
    parts = [
        f"<style>{_asset('viewer.css')}</style>",
        '<div id="see3d-viewer" class="see3d"></div>',
        f'<script type="application/json" id="see3d-data">{_json(data)}</script>',
    ]
    if splats is not None:
        text = base64.b64encode(splats).decode("ascii")
        parts.append(f'<script type="text/plain" id="see3d-splats">{text}</script>')
    parts += [f"<script>{_asset(name)}</script>" for name in ("splats.js", "viewer.js")]
    return "\n".join(parts)


def splat_bytes(gaussians: Gaussians) -> bytes:
    """The scene as the page reads it: a .splat file, and then the harmonics of its Gaussians.

    These are [N, 3·K] float16, K colours after one another, padded to a multiple of four numbers
    per Gaussian: texels of a texture. A .splat file alone has no colours that change with the
    direction.
    """
    scene = most_visible_first(gaussians)
    harmonics = np.asarray(scene.sh).reshape(scene.count, -1)
    limit = float(np.finfo(np.float16).max)
    padded = np.pad(harmonics.clip(-limit, limit), ((0, 0), (0, -harmonics.shape[1] % 4)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scene.splat"
        write_splat(file, scene)
        return file.read_bytes() + padded.astype("<f2").tobytes()


def write_scene_page(output: Path) -> dict[str, Any]:
    """Writes OUTPUT/report.html of a folder of `see3d create`; returns the scores of the fit."""
    gaussians = read_ply(output / "gaussians" / "point_cloud.ply")
    metrics = json.loads((output / "gaussians" / "metrics.json").read_text(encoding="utf-8"))
    made = json.loads((output / "create.json").read_text(encoding="utf-8"))
    depth_from = json.loads((output / "scene" / "made.json").read_text(encoding="utf-8"))
    run = json.loads((output / "views" / "run.json").read_text(encoding="utf-8"))
    data = viewer_data(output / "views", gaussians, data_uri)
    count = len(made["photos"])
    notes = [*made["notes"], *run["warnings"]]
    rows = [
        ("photos", ", ".join(made["photos"])),
        ("new views", f"{run['num_views']}, {run['width']}×{run['height']} pixels"),
        ("model", run["model"]),
        ("depth from", depth_from["depth_from"]),
        ("known before the model", f"{run['known_share']:.0%} of the pixels"),
        ("Gaussians", f"{metrics['num_gaussians']:,}, started from {metrics['starting_points']}"),
        ("held-out generated views", f"{metrics['psnr']:.1f} dB PSNR, {metrics['ssim']:.3f} SSIM"),
        ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in made["seconds"].items())),
    ]
    files = [
        ("gaussians/point_cloud.ply", "the scene; any 3DGS viewer opens it"),
        ("gaussians/orbit.mp4", "a flight around it"),
        ("views/video.mp4", "the generated views as a video"),
        ("views/", "views, warps, masks; cameras as transforms.json and as a COLMAP model"),
    ]
    commands = f"see3d view {output}\nsee3d info {output}/gaussians/point_cloud.ply"
    html.write_page(
        output / "report.html",
        f"A scene made from {count} photo{'s' * (count != 1)}",
        viewer_section(data, splat_bytes(gaussians)),
        *(
            [html.folded(f"Notes ({len(notes)})", "".join(map(html.paragraph, notes)))]
            * bool(notes)
        ),
        html.section(
            "A flight around it",
            html.video(output / "gaussians/orbit.mp4", "Along the path of the cameras, and back"),
        ),
        html.section(
            "Views, stage by stage",
            html.scrolling(html.image(output / "views/contact_sheet.png", "Stages as rows")),
        ),
        html.section(
            "Where the cameras are",
            html.image(output / "views/cameras.png", "From above and from the side; photos in red"),
        ),
        html.section("Numbers", html.table(("what", "value"), rows)),
        html.section("Files beside this page", html.table(("file", "what"), files)),
        html.section("Go on", html.code(commands)),
    )
    return metrics


def _cameras(folder: Path, link: Link) -> list[dict[str, Any]]:
    scene = load_scene(folder)
    entries = []
    for i, (name, path, camera) in enumerate(
        zip(scene.names, scene.image_paths, scene.cameras, strict=True)
    ):
        generated = path.parent.name == "views" and (scene.root / "warps").is_dir()
        pictures = [{"label": "result" if generated else "photo", "src": link(_small(path))}]
        if generated:
            for stage, label in _STAGES.items():
                file = scene.root / stage / path.name
                if stage != "views" and file.is_file():
                    pictures.append({"label": label, "src": link(_small(file))})
        if scene.depth_paths is not None:
            depth = _depth_picture(scene.depth_paths[i], scene.depth_unit)
            if depth is not None:
                pictures.append({"label": "depth (near is light)", "src": link(depth)})
        entries.append(
            {
                "name": name, "kind": "view" if generated else "photo", "pictures": pictures,
                **_camera_fields(camera),
            }
        )  # fmt: skip
    return entries


def _fitted_cameras(folder: Path, link: Link) -> list[dict[str, Any]]:
    """Of a folder of `see3d reconstruct`: its cameras, and the photos if they are still there."""
    posed = read_inria_cameras(folder / CAMERAS_FILE)
    photos: dict[str, Path] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, InputError):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        scene = load_scene(folder / metrics["input"])
        photos = dict(zip(scene.names, scene.image_paths, strict=True))
    entries = []
    for name, camera in zip(posed.files, posed.cameras, strict=True):
        file = photos.get(name)
        kind = "view" if file is not None and file.parent.name == "views" else "photo"
        held_out = folder / "renders" / f"{name}.png"
        pictures = [
            {"label": label, "src": link(_small(picture))}
            for label, picture in ((kind, file), ("scene (held out)", held_out))
            if picture is not None and picture.is_file()
        ]
        fields = {"name": name, "kind": kind, "pictures": pictures}
        entries.append(fields | _camera_fields(camera))
    return entries


def _camera_fields(camera: Camera) -> dict[str, Any]:
    matrix = np.asarray(camera.intrinsics, np.float64)
    return {
        "width": int(camera.width), "height": int(camera.height),
        "fx": matrix[0, 0], "fy": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2],
        "world_to_camera": np.asarray(camera.world_to_camera, np.float64).tolist(),
    }  # fmt: skip


def _small(path: Path) -> np.ndarray:
    picture = read_image(path)
    step = max(1, max(picture.shape[:2]) // _PICTURE_SIDE)
    return picture if step == 1 else read_image(
        path, (picture.shape[1] // step, picture.shape[0] // step)
    )  # fmt: skip


def _depth_picture(path: Path, unit: float) -> np.ndarray | None:
    """Inverse depth as grey, uint8 [H, W]; unknown is black. None where nothing is known."""
    try:
        depth = load_depth_file(path, unit)
    except InputError:
        return None
    inverse = np.where(depth > 0, 1 / np.maximum(depth, 1e-9), 0)
    low, high = np.quantile(inverse[depth > 0], [0.02, 0.98])
    grey = 40 + 215 * np.clip((inverse - low) / max(high - low, 1e-12), 0, 1)
    step = max(1, max(depth.shape) // _PICTURE_SIDE)
    return np.where(depth > 0, grey, 0).astype(np.uint8)[::step, ::step]


def _json(value: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").replace("</script", "<\\/script")
