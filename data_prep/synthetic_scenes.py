"""Random scenes and camera paths for synthetic clips: furnished rooms and outdoor yards.

Everything is drawn from one NumPy generator, so a seed names a scene for good. Surfaces carry
crops of the photos inside scikit-image's wheel (read from there, never copied into this project)
and procedural materials (planks, tiles, plaster). Photos of people are left out: curation would
rightly take them for people. World axes: z up, metres, floor at z = 0.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.raytrace import Primitive, Texture, World, clearance, depth
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import look_at
from see3d_jax.media import read_image

PATHS = ("orbit", "spiral", "walk")
_PICTURES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png",
             "motorcycle_right.png", "ihc.png", "retina.jpg", "coins.png", "page.png",
             "hubble_deep_field.jpg", "moon.png", "text.png")  # fmt: skip
_NEAREST_SURFACE = 0.35  # metres between any camera and any surface


@dataclasses.dataclass(frozen=True)
class SyntheticScene:
    """A world, the point that cameras look at, and where they may stand.

    `reach` is the distance of an orbit from `focus` (smallest, largest), `heights` the camera
    heights that suit the scene.
    """

    world: World
    focus: np.ndarray
    reach: tuple[float, float]
    heights: tuple[float, float]


# ------------------------------------------------------------------------------------- textures


@functools.cache
def _photo(name: str) -> np.ndarray:
    """A photo of scikit-image's wheel, float32 [h, w, 3] in [0, 1], longer side at most 512."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise InputError("scikit-image is not installed; its photos are the textures")
    path = Path(spec.origin).parent / "data" / name
    image = read_image(path)
    scale = 512 / max(image.shape[:2])
    if scale < 1:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        image = read_image(path, size)
    return image.astype(np.float32) / 255


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A photo, cropped a little, sometimes mirrored."""
    image = _photo(str(rng.choice(_PICTURES)))
    height, width = image.shape[:2]
    h, w = int(height * rng.uniform(0.6, 1)), int(width * rng.uniform(0.6, 1))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    image = image[top : top + h, left : left + w]
    return image[:, ::-1] if rng.random() < 0.5 else image


def _noise(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0) -> np.ndarray:
    """Tileable 1/f^slope noise [size, size], zero mean, unit deviation; stretched along x."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius = np.sqrt(fy**2 + (fx * stretch) ** 2)
    radius[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) / radius**slope
    field = np.fft.ifft2(spectrum).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _tinted(gray: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Gray [h, w] of mean 0.5 → that colour, brightness kept."""
    return np.clip(gray[..., None] * 2 * np.asarray(colour, np.float32), 0, 1)


def _colour(rng: np.random.Generator, low: float = 0.25, high: float = 0.8) -> tuple:
    """A muted random colour: gray plus a little hue, as most real surfaces are."""
    value, hue = rng.uniform(low, high), rng.normal(size=3) * 0.05
    return tuple(np.clip(value + hue - hue.mean(), 0.05, 0.95))


def _planks(rng: np.random.Generator) -> np.ndarray:
    size, count = 384, int(rng.integers(5, 9))
    tone = 0.5 + 0.10 * _noise(rng, size, 1.2, stretch=12.0)
    rows = np.arange(size) * count // size
    tone += rng.uniform(-0.12, 0.12, count)[rows][:, None]
    gap = (np.arange(size) * count % size) < count * 2
    tone[gap] *= 0.45
    for plank in range(count):  # butt joints
        joint = int(rng.integers(0, size))
        tone[rows == plank, joint : joint + 2] *= 0.5
    browns = [(0.55, 0.38, 0.24), (0.42, 0.27, 0.16), (0.66, 0.53, 0.38), (0.45, 0.41, 0.37)]
    return _tinted(tone, browns[rng.integers(len(browns))])


def _tiles(rng: np.random.Generator) -> np.ndarray:
    size, count = 384, int(rng.integers(3, 7))
    cell = np.arange(size) * count // size
    tone = 0.55 + 0.04 * _noise(rng, size, 1.0)
    tone += rng.uniform(-0.1, 0.1, (count, count))[cell[:, None], cell[None, :]]
    image = _tinted(tone, _colour(rng, 0.4, 0.75))
    if rng.random() < 0.5:  # chequered
        dark = (cell[:, None] + cell[None, :]) % 2 == 0
        image[dark] *= np.asarray(_colour(rng, 0.3, 0.6), np.float32)
    grout = (np.arange(size) * count % size) < count * 3
    image[grout], image[:, grout] = 0.3, 0.3
    return image


def _plaster(rng: np.random.Generator) -> np.ndarray:
    tone = 0.5 + 0.035 * _noise(rng, 384, 1.5) + 0.05 * _noise(rng, 384, 0.5)
    return _tinted(tone, _colour(rng, 0.6, 0.85))


def _mineral(rng: np.random.Generator, name: str, colour: tuple) -> np.ndarray:
    """One of the gray texture photos (brick, grass, gravel) in a colour."""
    gray = _photo(f"{name}.png")[..., 0]
    gray = 0.5 + (gray - gray.mean()) * rng.uniform(0.8, 1.2)
    return _tinted(gray, colour)


def _brick(rng: np.random.Generator) -> np.ndarray:
    reds = [(0.55, 0.30, 0.22), (0.50, 0.42, 0.34), (0.62, 0.58, 0.52), (0.40, 0.26, 0.22)]
    # the photo's courses run upright: turn them level
    return np.ascontiguousarray(
        _mineral(rng, "brick", reds[rng.integers(len(reds))]).swapaxes(0, 1)
    )


def _gravel(rng: np.random.Generator) -> np.ndarray:
    return _mineral(rng, "gravel", _colour(rng, 0.35, 0.6))


def _grass(rng: np.random.Generator) -> np.ndarray:
    greens = [(0.30, 0.42, 0.16), (0.38, 0.45, 0.20), (0.22, 0.34, 0.14)]
    return _mineral(rng, "grass", greens[rng.integers(len(greens))])


def _sky(rng: np.random.Generator) -> np.ndarray:
    clouds = np.clip(0.5 + 0.35 * _noise(rng, 256, 1.7, stretch=1.6), 0, 1)[..., None]
    blue = np.array([0.42, 0.60, 0.86], np.float32)
    return blue * (1 - clouds) + np.float32(0.95) * clouds


# --------------------------------------------------------------------------------------- scenes


class _Builder:
    """Collects primitives and textures while a scene is put together."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.primitives, self.textures = rng, [], []

    def texture(self, image: np.ndarray, scale: float = 1.0) -> int:
        self.textures.append(Texture(image, scale))
        return len(self.textures) - 1

    def add(
        self, kind: str, centre: Iterable[float], half: Iterable[float],
        textures: int | tuple[int, int, int, int], **more: float,
    ) -> None:  # fmt: skip
        if isinstance(textures, int):
            textures = (textures,) * 4
        self.primitives.append(Primitive(kind, tuple(centre), tuple(half), textures, **more))

    def solid(self) -> int:
        """A material for furniture and objects."""
        kinds = (_planks, _tiles, _brick, _gravel, _picture)
        return self.texture(kinds[self.rng.integers(len(kinds))](self.rng))

    def thing(self, x: float, y: float, floor: float, size: float) -> None:
        """A box, sphere or cylinder standing on `floor`, within `size` of (x, y)."""
        rng = self.rng
        kind = rng.choice(["box", "box", "sphere", "cylinder"])
        if kind == "box":
            half = size * rng.uniform(0.4, 0.68, 2)
            height = size * rng.uniform(0.4, 1.2)
            texture = self.texture(_picture(rng)) if rng.random() < 0.6 else self.solid()
            self.add("box", (x, y, floor + height), (*half, height), texture,
                     yaw=rng.uniform(0, np.pi))  # fmt: skip
        elif kind == "sphere":
            radius = size * rng.uniform(0.55, 0.85)
            image = _picture(rng) if rng.random() < 0.5 else _tiles(rng)
            self.add("sphere", (x, y, floor + radius), (radius,) * 3, self.texture(image),
                     yaw=rng.uniform(0, 6))  # fmt: skip
        else:
            radius, height = size * rng.uniform(0.35, 0.6), size * rng.uniform(0.6, 1.3)
            self.add("cylinder", (x, y, floor + height), (radius, radius, height),
                     self.texture(_picture(rng)), yaw=rng.uniform(0, 6))  # fmt: skip


def furnished_room(rng: np.random.Generator) -> SyntheticScene:
    """A room with a table of objects in the middle, furniture along the walls, pictures on them."""
    build = _Builder(rng)
    hx, hy, hz = rng.uniform(2.4, 3.4), rng.uniform(2.2, 3.0), rng.uniform(1.3, 1.6)
    floors = (_planks, _planks, _tiles, _gravel)
    wall = build.texture((_plaster if rng.random() < 0.7 else _brick)(rng))
    other = build.texture((_plaster if rng.random() < 0.6 else _brick)(rng))
    # repeated over few metres a floor matches itself, which misleads trackers as it would people
    floor = build.texture(floors[rng.integers(len(floors))](rng), scale=2.0)
    ceiling = build.texture(_plaster(rng))
    build.add("room", (0, 0, hz), (hx, hy, hz), (wall, other, ceiling, floor), repeat=1.6)
    _hang_pictures(build, hx, hy, hz)

    top = rng.uniform(0.6, 0.8)
    table = rng.uniform(0.5, 0.8, 2)
    wood = build.texture(_planks(rng))
    yaw = rng.uniform(0, np.pi)
    build.add("box", (0, 0, top - 0.03), (*table, 0.03), wood, yaw=yaw, repeat=0.8)
    c, s = np.cos(yaw), np.sin(yaw)
    if rng.random() < 0.5:
        for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            lx, ly = sx * (table[0] - 0.06), sy * (table[1] - 0.06)
            build.add("box", (c * lx - s * ly, s * lx + c * ly, top / 2 - 0.03),
                      (0.035, 0.035, top / 2 - 0.03), wood, yaw=yaw, repeat=0.8)  # fmt: skip
    else:  # a pedestal
        build.add("cylinder", (0, 0, top / 2 - 0.03), (0.14, 0.14, top / 2 - 0.03), wood,
                  repeat=0.8)  # fmt: skip
    count = int(rng.integers(3, 6))
    turn = rng.uniform(0, 2 * np.pi)
    for i in range(count):
        angle, far = turn + 2 * np.pi * i / count, 0.62 * min(table)
        build.thing(far * np.cos(angle), far * np.sin(angle), top, rng.uniform(0.13, 0.2))

    sides = rng.permutation(4)
    for side in sides[: rng.integers(2, 5)]:  # cupboards, crates and columns along the walls
        along = rng.uniform(-0.7, 0.7)
        size, height = rng.uniform(0.2, 0.4, 2), rng.uniform(0.3, 0.95)
        x = along * hx if side < 2 else (hx - size[0] - 0.02) * (1 if side == 2 else -1)
        y = along * hy if side >= 2 else (hy - size[1] - 0.02) * (1 if side == 0 else -1)
        build.add("box", (x, y, height), (*size, height), build.solid(), repeat=0.9)
        if rng.random() < 0.7:
            build.thing(x, y, 2 * height, 0.17)
    light = (rng.uniform(-0.5, 0.5) * hx, rng.uniform(-0.5, 0.5) * hy, 2 * hz - 0.15)
    world = World(tuple(build.primitives), tuple(build.textures), light, 0.16, 3.2,
                  light_power=rng.uniform(0.95, 1.2), ambient=rng.uniform(0.42, 0.55))  # fmt: skip
    return SyntheticScene(world, np.array([0, 0, top + 0.1]), (1.15, min(hx, hy) - 0.4), (1.0, 1.9))


def _hang_pictures(build: _Builder, hx: float, hy: float, hz: float) -> None:
    """Framed photos on the four walls."""
    rng = build.rng
    frame = build.texture(_planks(rng))
    for side in range(4):
        wall = hx if side < 2 else hy  # half the wall's length
        slots = rng.permutation(np.linspace(-0.62, 0.62, 3))[: rng.integers(1, 4)]
        for slot in slots:
            image = _picture(rng)
            half_z = rng.uniform(0.22, 0.42)
            half_u = min(half_z * image.shape[1] / image.shape[0], 0.27 * wall)
            half_z = min(half_z, half_u * image.shape[0] / image.shape[1])
            z = hz + rng.uniform(0.0, 0.3)
            sign = 1 if side % 2 else -1
            picture = build.texture(image)
            for grow, thick, texture in ((0.035, 0.02, frame), (0.0, 0.026, picture)):
                along, half_v = half_u + grow, half_z + grow
                if side < 2:
                    place, half = (slot * hx, sign * (hy - thick), z), (along, thick, half_v)
                else:
                    place, half = (sign * (hx - thick), slot * hy, z), (thick, along, half_v)
                build.add("box", place, half, texture, casts_shadow=False)


def yard(rng: np.random.Generator) -> SyntheticScene:
    """Outdoors: ground, walls and houses around, crates, columns and trees, under a sky."""
    build = _Builder(rng)
    half, high = rng.uniform(11, 14), 7.0
    sky = build.texture(_sky(rng), scale=7.0)
    grounds = (_grass, _gravel, _tiles)
    ground = build.texture(grounds[rng.integers(len(grounds))](rng), scale=3.0)
    build.add("room", (0, 0, high), (half, half, high), (sky, sky, sky, ground), repeat=2.2)
    for side in range(4):  # houses and walls in front of the horizon
        height, far = rng.uniform(1.0, 2.4), half - rng.uniform(1.5, 4.0)
        texture = build.texture((_brick if rng.random() < 0.7 else _plaster)(rng))
        long, deep, shift = rng.uniform(4.5, 7.0), rng.uniform(0.3, 1.2), rng.uniform(-2, 2)
        sign = 1 if side % 2 else -1
        place = (shift, sign * far) if side < 2 else (sign * far, shift)
        size = (long, deep) if side < 2 else (deep, long)
        build.add("box", (*place, height), (*size, height), texture, repeat=2.0,
                  yaw=rng.normal() * 0.06)  # fmt: skip
        for slot in rng.permutation(np.linspace(-0.6, 0.6, 4))[: rng.integers(1, 4)]:
            image, half_z = _picture(rng), 0.3 * height  # a billboard on the wall
            half_u = half_z * image.shape[1] / image.shape[0]
            inner = far - deep - 0.25
            at = (shift + slot * long, sign * inner) if side < 2 else (
                sign * inner, shift + slot * long)  # fmt: skip
            thin = (half_u, 0.05) if side < 2 else (0.05, half_u)
            build.add("box", (*at, height * rng.uniform(0.7, 1.2)), (*thin, half_z),
                      build.texture(image))  # fmt: skip
    base = rng.uniform(0.15, 0.5)
    build.add("cylinder", (0, 0, base), (1.0, 1.0, base), build.texture(_brick(rng)), repeat=1.2)
    count, turn = int(rng.integers(3, 5)), rng.uniform(0, 6)
    for i in range(count):
        angle = turn + 2 * np.pi * i / count
        build.thing(0.55 * np.cos(angle), 0.55 * np.sin(angle), 2 * base, rng.uniform(0.26, 0.38))
    bark, leaves = build.texture(_planks(rng)), build.texture(_grass(rng))
    for i in range(int(rng.integers(4, 7))):  # trees and crates in a ring
        angle, far = turn + i * 1.1 + rng.uniform(-0.2, 0.2), rng.uniform(5.2, 7.5)
        x, y = far * np.cos(angle), far * np.sin(angle)
        if rng.random() < 0.5:
            trunk, crown = rng.uniform(0.7, 1.1), rng.uniform(0.7, 1.2)
            build.add("cylinder", (x, y, trunk), (0.13, 0.13, trunk), bark, repeat=0.6)
            build.add("sphere", (x, y, 2 * trunk + 0.7 * crown), (crown,) * 3, leaves, repeat=1.1)
        else:
            build.thing(x, y, 0, rng.uniform(0.5, 0.9))
    angle = rng.uniform(0, 2 * np.pi)
    light = (40 * np.cos(angle), 40 * np.sin(angle), 55.0)
    # far outside the sky: shadow rays ask the objects only
    world = World(tuple(build.primitives), tuple(build.textures), light, 0.5, 1e3,
                  light_power=rng.uniform(0.75, 0.95), ambient=rng.uniform(0.42, 0.52))  # fmt: skip
    return SyntheticScene(world, np.array([0, 0, 2 * base + 0.2]), (2.4, 4.2), (1.2, 2.8))


SCENES = (furnished_room, furnished_room, yard)  # two rooms for each yard


# ---------------------------------------------------------------------------------------- paths


def camera_path(
    scene: SyntheticScene, kind: str, frames: int, intrinsics: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray | None:  # fmt: skip
    """World→camera [frames, 4, 4] of a smooth path that stays clear of every surface.

    `kind` is one of PATHS. Paths are drawn until one keeps its distance and no view is blocked by
    something near; later draws are shorter. None when the scene is too crowded for that.
    """
    for attempt in range(200):
        extent = max(0.25, 1 - attempt / 120)
        eyes, targets = _draw_path(scene, kind, frames, extent, rng)
        if min(clearance(scene.world, eye) for eye in eyes) < _NEAREST_SURFACE:
            continue
        poses = np.stack(
            [look_at(e, t, up=(0.0, 0.0, 1.0)) for e, t in zip(eyes, targets, strict=True)]
        )
        if all(_sees_enough(scene.world, intrinsics, pose) for pose in poses[::4]):
            return poses
    return None


def _sees_enough(world: World, intrinsics: np.ndarray, pose: np.ndarray) -> bool:
    """False when something near fills a good part of the view."""
    size = 24
    shrink = size / (2 * intrinsics[:2, 2])
    seen = depth(world, intrinsics * np.array([*shrink, 1.0])[:, None], pose, size, size)
    return bool(np.quantile(seen, 0.1) > 0.5 and np.median(seen) > 0.9)


def _draw_path(
    scene: SyntheticScene, kind: str, frames: int, extent: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Camera positions and the points looked at, [frames, 3] each."""
    s = np.linspace(0, 1, frames)
    low, high = scene.reach
    start, turn = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    # at most 1.7° a frame about the focus: what a calm hand does at 10 frames a second. Faster
    # ones lose so many tracks at 192 pixels that curation takes them for moving scenes.
    arc = min(rng.uniform(0.8, 1.3) * extent, np.radians(1.7) * frames)
    radius, height = rng.uniform(low, high), rng.uniform(*scene.heights)
    target = scene.focus + rng.normal(size=3) * [0.12, 0.12, 0.06]
    if kind == "orbit":
        angle = start + turn * arc * s
        lift = height + 0.12 * np.sin(2 * np.pi * s * rng.uniform(0.4, 1) + start)
        eyes = np.stack([radius * np.cos(angle), radius * np.sin(angle), lift], -1)
        targets = np.broadcast_to(target, eyes.shape)
    elif kind == "spiral":
        angle = start + turn * arc * s
        distance = np.linspace(high, low + 0.2 * (high - low), frames)
        distance = distance if rng.random() < 0.5 else distance[::-1]
        heights = rng.permutation(scene.heights)
        lift = heights[0] + (heights[1] - heights[0]) * s * extent
        eyes = np.stack([distance * np.cos(angle), distance * np.sin(angle), lift], -1)
        targets = np.broadcast_to(target, eyes.shape)
    else:  # walk past the focus while the gaze drifts from one side of it to the other
        side = np.array([np.cos(start), np.sin(start), 0.0])
        ahead = np.array([-np.sin(start), np.cos(start), 0.0]) * turn
        length = extent * rng.uniform(0.7, 1.0) * high
        eyes = side * radius + ahead * (length * (2 * s - 1))[:, None]
        eyes[:, 2] = height + 0.02 * np.sin(2 * np.pi * s * 3 + start)
        gaze = target - side * rng.uniform(0.3, 1.2)
        targets = gaze + ahead * (rng.uniform(0.3, 0.7) * length * (2 * s - 1))[:, None]
    # a hand's slow sway
    for amplitude, cycles in ((0.012, 1.3), (0.006, 2.9)):
        phase = rng.uniform(0, 2 * np.pi, 3)
        eyes = eyes + amplitude * np.sin(2 * np.pi * cycles * s[:, None] + phase)
    return eyes, targets
