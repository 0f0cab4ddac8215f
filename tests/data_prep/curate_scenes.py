"""Small videos with known truth for the curation tests: textured planes at different depths."""

import functools

import cv2
import numpy as np
import skimage.data

from see3d_jax.media import write_mp4

WIDTH, HEIGHT, FOCAL = 320, 240, 300.0
# (texture, depth, left, top, width, height) in pixels at depth 1; far to near
BLOCKS = (("brick", 2.2, -40, 40, 200, 150), ("coffee", 1.6, 180, 10, 150, 120),
          ("grass", 1.2, 60, 120, 130, 110), ("gravel", 1.0, 230, 140, 110, 90))  # fmt: skip


@functools.cache
def texture(name, width, height):
    image = getattr(skimage.data, name)()
    image = image if image.ndim == 3 else np.stack([image] * 3, -1)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def scene(shift=0.0, mover=None):
    """The scene from a camera moved `shift` to the right (a plane moves by FOCAL·shift/depth)."""
    back = texture("rocket", 560, 340)
    offset = 60 + FOCAL * shift / 6.0
    matrix = np.float32([[1, 0, -offset], [0, 1, -40]])
    frame = cv2.warpAffine(back, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
    for name, depth, left, top, width, height in BLOCKS:
        paste(frame, texture(name, width, height), left - FOCAL * shift / depth, top)
    if mover is not None:
        paste(frame, texture("chelsea", 110, 90), *mover)
    return frame


def paste(frame, patch, x, y):
    matrix = np.float32([[1, 0, x], [0, 1, y]])
    inside = cv2.warpAffine(np.full(patch.shape[:2], 255, np.uint8), matrix, (WIDTH, HEIGHT))
    moved = cv2.warpAffine(patch, matrix, (WIDTH, HEIGHT))
    frame[inside > 127] = moved[inside > 127]


def rotated(image, degrees, zoom=1.0):
    """What the same camera sees after a turn to the right and a zoom."""
    angle = np.deg2rad(degrees)
    k = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1.0]])
    k_zoom = np.diag([zoom, zoom, 1.0]) @ np.array(
        [[FOCAL, 0, WIDTH / 2 / zoom], [0, FOCAL, HEIGHT / 2 / zoom], [0, 0, 1.0]]
    )
    turn = np.array(
        [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
    )
    matrix = k_zoom @ turn @ np.linalg.inv(k)
    return cv2.warpPerspective(image, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)


def noisy(frames, seed=0, sigma=2.0):
    generator = np.random.default_rng(seed)
    return [
        np.clip(frame + generator.normal(0, sigma, frame.shape), 0, 255).astype(np.uint8)
        for frame in frames
    ]


def make(kind, count=14):
    """Frames of one kind of video."""
    steps = np.linspace(0, 1, count)
    if kind == "parallax":
        return noisy([scene(0.16 * s) for s in steps])
    if kind == "static":
        return noisy([scene()] * count)
    if kind == "rotation":
        return noisy([rotated(scene(), 12 * s) for s in steps])
    if kind == "zoom":
        return noisy([rotated(scene(), 0, 1 + 0.5 * s) for s in steps])
    if kind == "mover":  # camera travels as in parallax, an object goes down
        return noisy([scene(0.16 * s, (90 + 20 * s, 50 + 70 * s)) for s in steps])
    if kind == "mover_static_camera":
        return noisy([scene(0, (90 * s, 40 + 60 * s)) for s in steps])
    if kind == "cut":
        return make("parallax", count) + [frame[:, ::-1] for frame in make("static", count)]
    raise ValueError(kind)


def write(path, kind, fps=12.0):
    write_mp4(path, make(kind), fps)
    return path
