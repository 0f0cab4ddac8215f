"""One clip → one training example: V frames in shuffled order, references first, targets masked.

The first S frames are references (S drawn per example), the rest targets. What the condition shows
of a target depends on the kind of data: it is the target behind a random mask ("unposed", the
paper's Sec. 3.2), the references warped into its camera through depth and poses, with holes
("posed"), or the whole target at half its resolution ("superres"). Examples are written straight
into the rows of a batch:

    image         [V, h, w, 3] float32 in [−1, 1]
    mask          [V, h, w, 1] float32, 1 = known; all ones on references
    is_reference  [V] bool, references first
    frame         [V] int32, frame number within the clip (views close in time look alike)
    warped        [V, h, w, 3] float32: what the condition shows, −1 in holes; the image itself for
                  references. Not present where all data is unposed: it is the masked image then
    latent        [V, h/f, w/f, c] float32, clean latents out of the records, if wanted
    clip_pixels   [p, p, 3] float32, the first reference as CLIP's image tower wants it, if wanted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from see3d_jax.data import records
from see3d_jax.data.masks import random_mask
from see3d_jax.data.transforms import Crop, Size, centre_crop, choose_frames, to_model_range
from see3d_jax.data.warping import PosedView, Warper
from see3d_jax.errors import InputError

Arrays = dict[str, np.ndarray]
# uint8 [1, h, w, 3] → float32 [1, p, p, 3]; see `models.clip_vision.preprocess`
Preprocess = Callable[[np.ndarray], np.ndarray]
EMPTY = -1.0  # holes of `warped`: black, as in the masked images
_NOISE_CELLS = 4  # depth errors vary over about a quarter of the view


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Which precomputed latents are wanted: those of this codec, of `channels` channels.

    Attributes:
      codec: fingerprint of the codec with its weights.
      factor: pixels per latent along each side.
      channels: latent channels.
    """

    codec: str
    factor: int
    channels: int


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """What one training example looks like.

    Attributes:
      sizes: heights and widths of views, pixels; every batch has one of them.
      views: V, references and targets together.
      references: numbers of reference views to draw from, evenly.
      stride: smallest and widest step between neighbouring frames drawn from a clip.
      hole_range: smallest and largest share of missing pixels on targets.
      depth_noise: deviation of the logarithm of the depth that posed clips are warped through, a
        smooth field per reference; 0 = exact depth.
      latents: precomputed latents to read from the records, if any.
    """

    sizes: tuple[Size, ...]
    views: int
    references: tuple[int, ...]
    stride: tuple[int, int]
    hole_range: tuple[float, float]
    depth_noise: float = 0.0
    latents: LatentSpec | None = None

    def __post_init__(self) -> None:
        if not self.sizes or not all(len(size) == 2 and min(size) > 0 for size in self.sizes):
            raise InputError(
                f"config.data.aspects: want pairs (height, width) in pixels, got {self.sizes}"
            )
        if not self.references or not all(1 <= s < self.views for s in self.references):
            raise InputError(
                f"config.data.references: {self.references} must lie between 1 and views − 1 "
                f"= {self.views - 1}"
            )
        if not 1 <= self.stride[0] <= self.stride[1]:
            raise InputError(f"config.data.stride: want 1 ≤ low ≤ high, got {self.stride}")
        if not 0.0 < self.hole_range[0] <= self.hole_range[1] < 1.0:
            raise InputError(
                f"config.data.hole_range: want 0 < low ≤ high < 1, got {self.hole_range}"
            )
        if self.depth_noise < 0:
            raise InputError(f"config.data.depth_noise: must not be negative: {self.depth_noise}")
        if self.latents and len(self.sizes) > 1:
            raise InputError(
                "config.data.latents: records hold latents of one size, but config.data.aspects "
                f"has {len(self.sizes)}; keep one, or encode while training"
            )


def empty_batch(spec: ExampleSpec, rows: int, size: Size, warped: bool) -> Arrays:
    """Arrays for `rows` examples with views of `size`, to be written by `fill_example`.

    `warped` says whether there is such an array: data of other kinds than "unposed" needs it.
    """
    lead = (rows, spec.views)
    batch = {
        "image": np.empty((*lead, *size, 3), np.float32),
        "mask": np.empty((*lead, *size, 1), np.float32),
        "is_reference": np.empty(lead, bool),
        "frame": np.empty(lead, np.int32),
    }
    if warped:
        batch["warped"] = np.empty_like(batch["image"])
    if spec.latents:
        shape = (*(side // spec.latents.factor for side in size), spec.latents.channels)
        batch["latent"] = np.empty((*lead, *shape), np.float32)
    return batch


def fill_example(
    row: Arrays,
    record: records.ClipRecord,
    rng: np.random.Generator,
    spec: ExampleSpec,
    kind: str = "unposed",
    preprocess: Preprocess | None = None,
) -> None:
    """Writes one example of `record` into `row`, the arrays of the module docstring.

    Args:
      row: views into a batch of `empty_batch`; `clip_pixels` is added to it if `preprocess` is
        given. After an exception its contents mean nothing.
      record: the clip.
      rng: the row's random numbers.
      spec: what the example is to look like.
      kind: what to show of the targets.
      preprocess: makes `clip_pixels`.

    Raises ValueError when the clip is too short, a drawn frame does not decode, or the record lacks
    the depth, poses or latents that are wanted.
    """
    frames = choose_frames(rng, len(record.images), spec.views, spec.stride)
    references = int(rng.choice(spec.references))
    size = row["image"].shape[1:3]
    crop = centre_crop((record.height, record.width), size)
    images = [crop.image(record.images[frame]) for frame in frames]
    for view, image in enumerate(images):
        to_model_range(image, out=row["image"][view])
    row["frame"][:] = frames
    row["is_reference"][:] = np.arange(spec.views) < references
    row["mask"][:references] = 1.0
    if kind == "posed":
        _fill_warps(row, record, rng, spec, crop, frames, images[:references])
    elif kind == "superres":
        _fill_coarse(row, images, references)
    else:
        for view in range(references, spec.views):
            row["mask"][view] = random_mask(rng, *size, spec.hole_range)
        if "warped" in row:
            row["warped"][:] = np.where(row["mask"] > 0.5, row["image"], np.float32(EMPTY))
    if spec.latents:
        _fill_latents(row["latent"], record, frames, size, spec.latents)
    if preprocess is not None:
        row["clip_pixels"] = preprocess(images[0][None])[0]


def _fill_warps(
    row: Arrays,
    record: records.ClipRecord,
    rng: np.random.Generator,
    spec: ExampleSpec,
    crop: Crop,
    frames: np.ndarray,
    images: list[np.ndarray],
) -> None:
    """Condition and mask of the targets: the reference images, warped into their cameras."""
    if not (record.posed and len(record.depth)):
        raise ValueError("the clip has no depth or no poses, but its folder is of kind 'posed'")
    intrinsics = crop.intrinsics(record.intrinsics)
    sources = [
        PosedView(
            image,
            _disturbed(crop.depth(_depth(record, frame)), rng, spec.depth_noise),
            intrinsics[frame],
            record.world_to_camera[frame],
        )
        for image, frame in zip(images, frames)
    ]
    row["warped"][: len(images)] = row["image"][: len(images)]
    warp = Warper(sources)
    for view in range(len(images), spec.views):
        pose = record.world_to_camera[frames[view]]
        image, known = warp(intrinsics[frames[view]], pose, crop.size)
        to_model_range(image, out=row["warped"][view])
        row["mask"][view] = known[..., None]


def _fill_coarse(row: Arrays, images: list[np.ndarray], references: int) -> None:
    """Condition of super-resolution: everything is known, targets at half their resolution."""
    row["mask"][:] = 1.0
    row["warped"][:] = row["image"]
    for view in range(references, len(images)):
        height, width = images[view].shape[:2]
        half = (max(1, width // 2), max(1, height // 2))
        coarse = cv2.resize(images[view], half, interpolation=cv2.INTER_AREA)
        coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        to_model_range(coarse, out=row["warped"][view])


def _depth(record: records.ClipRecord, frame: int) -> np.ndarray:
    return records.decode_depth(record.depth[frame], record.depth_unit)


def _disturbed(depth: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """Depth as if estimated: times a smooth random factor, wrong by about `deviation`."""
    if not deviation:
        return depth
    cells = rng.normal(0, deviation, (_NOISE_CELLS, _NOISE_CELLS)).astype(np.float32)
    field = cv2.resize(cells, depth.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return depth * np.exp(field)


def _fill_latents(
    out: np.ndarray,
    record: records.ClipRecord,
    frames: np.ndarray,
    size: Size,
    wanted: LatentSpec,
) -> None:
    if not len(record.latents):
        raise ValueError("the record has no latents; make them with tools.encode_latents")
    if record.latent_codec != wanted.codec or tuple(record.latent_size) != tuple(size):
        raise ValueError(
            f"its latents are of {record.latent_size} pixels by codec {record.latent_codec!r}, "
            f"wanted are {tuple(size)} by {wanted.codec!r}; encode again with tools.encode_latents"
        )
    for view, frame in enumerate(frames):
        out[view] = record.latent(frame)
