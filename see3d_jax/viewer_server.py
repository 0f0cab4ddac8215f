"""`see3d view`: a page for this machine's browser, and the place its camera paths are saved to.

A small server of the standard library: the page of `pipelines.scene_page`, the pictures, the
Gaussians, and one address that takes a path (a transforms.json) and writes it to FOLDER/paths. It
answers only those who ask for it by its own name, so that no page elsewhere can.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from see3d_jax import html
from see3d_jax.errors import InputError
from see3d_jax.files import write_text
from see3d_jax.geometry.scene_files import read_transforms
from see3d_jax.media import image_bytes
from see3d_jax.pipelines.inputs import has_cameras
from see3d_jax.pipelines.scene_export import CAMERAS_FILE
from see3d_jax.pipelines.scene_page import splat_bytes, viewer_data, viewer_section
from see3d_jax.splatting.formats import FORMATS, read_gaussians

_MAX_BODY = 1 << 20  # bytes of a path; a keyframe takes some hundred


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is to show.

    Attributes:
      folder: where paths are saved (in `paths/`).
      cameras: folder of a posed scene or of `see3d reconstruct`, or None.
      gaussians: .ply, .splat or .spz file, or None.
    """

    folder: Path
    cameras: Path | None
    gaussians: Path | None


def find_scene(path: Path) -> Found | None:
    """The cameras and Gaussians in a file or folder, None when it holds neither.

    Raises InputError for a missing path.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() in FORMATS:
            return Found(path.parent, _cameras_beside(path.parent), path)
        return Found(path.parent, path.parent, None) if path.name == "transforms.json" else None
    for gaussians, cameras in (
        (path / "gaussians/point_cloud.ply", path / "views"),
        (path / "point_cloud.ply", path),
    ):
        if gaussians.is_file():
            known = cameras if has_cameras(cameras) else _cameras_beside(gaussians.parent)
            return Found(path, known, gaussians)
    return Found(path, path, None) if has_cameras(path) else None


def _cameras_beside(folder: Path) -> Path | None:
    """Of a fitted scene: the views that `see3d create` fitted it to, else its own cameras."""
    views = folder.parent / "views"
    if folder.name == "gaussians" and has_cameras(views):
        return views
    return folder if (folder / CAMERAS_FILE).is_file() else None


def open_server(found: Found, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server of the scene, listening but not yet answering (`serve_forever`).

    Raises InputError when the port is taken or the host is none of this machine's addresses.
    """
    handler = _make_handler(found)
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port {port}: is taken, perhaps by another `see3d view`; give another one, or "
                "--port 0 for any that is free"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise InputError(f"--port {port}: is not yours to use; give one above 1023") from None
        raise InputError(f"--host {host}: cannot listen there ({error.strerror})") from None


def _make_handler(found: Found) -> type[BaseHTTPRequestHandler]:
    contents: dict[str, tuple[str, bytes]] = {}

    def link(picture: np.ndarray) -> str:
        address = f"/picture/{len(contents)}"
        contents[address] = ("image/jpeg", image_bytes(picture))
        return address

    more, gaussians = {"save": "/path"}, None
    if found.gaussians is not None:
        more["splats"], gaussians = "/splats", read_gaussians(found.gaussians)
        contents["/splats"] = ("application/octet-stream", splat_bytes(gaussians))
    data = viewer_data(found.cameras, gaussians, link, **more)
    page = html.page(found.folder.resolve().name, viewer_section(data))
    contents["/"] = ("text/html; charset=utf-8", page.encode())

    class Handler(BaseHTTPRequestHandler):
        """Answers from memory; only paths are written."""

        def do_GET(self) -> None:
            address = urlsplit(self.path).path
            if not self._is_ours():
                return
            kind, body = contents.get(address, ("text/plain", b"no such page"))
            self._answer(200 if address in contents else 404, kind, body)

        def do_POST(self) -> None:
            parts = urlsplit(self.path)
            if not self._is_ours() or parts.path != "/path" or not self.headers.get("X-See3d"):
                return self._answer(403, "text/plain", b"not allowed")
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= _MAX_BODY:
                    raise InputError("the path is empty or too large")
                name = parse_qs(parts.query).get("name", [""])[0]
                path = save_path(found.folder, name, self.rfile.read(length).decode())
                return self._answer_json(200, {"path": str(path)})
            except (InputError, ValueError) as error:
                return self._answer_json(400, {"error": str(error)})
            except OSError as error:
                return self._answer_json(500, {"error": f"{error.filename}: {error.strerror}"})

        def _is_ours(self) -> bool:
            name = self.headers.get("Host", "").rsplit(":", 1)[0]
            local = self.server.server_address[0] in ("127.0.0.1", "::1")
            if local and name not in ("127.0.0.1", "localhost", "[::1]"):
                self._answer(403, "text/plain", b"not allowed")
                return False
            return True

        def _answer_json(self, code: int, value: dict[str, str]) -> None:
            self._answer(code, "application/json", json.dumps(value).encode())

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing: a page that is looked at is no news."""

    return Handler


def save_path(folder: Path, name: str, text: str) -> Path:
    """Writes a path that was checked to FOLDER/paths/NAME.json; InputError when it is none."""
    if not re.fullmatch(r"[\w-]{1,64}", name):
        raise InputError(f"{name!r}: a name takes letters, digits, - and _")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "transforms.json"
        file.write_text(text, encoding="utf-8")
        read_transforms(file)
    target = folder / "paths" / f"{name}.json"
    write_text(target, text)
    return target
