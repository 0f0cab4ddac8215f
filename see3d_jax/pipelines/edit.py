"""3D editing: one photo of a posed scene is edited, the others follow.

    edited photo inside the region ─ warp ─► new content, in every other photo
    old surface of the region      ─ warp ─► what it replaces there
    photos + new content, holes where the old was and nothing new lands ─ model ─► views

Everything else is the photos' own pixels. What the edited photo does not show of an object, its
other side for one, is not changed. Where a photo has depth, what stands in front of the region
stays in front. Images uint8 RGB [h, w, 3], masks bool, depth planar z with 0 = unknown.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import cv2
import jax
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.media import image_size, read_image
from see3d_jax.pipelines.baselines import inpaint
from see3d_jax.pipelines.depth import reference_depths, stereo_references
from see3d_jax.pipelines.generation import Generated, choose_frames, working_size
from see3d_jax.pipelines.group_sampling import sample_groups
from see3d_jax.pipelines.inputs import Scene, load_depth, load_depth_file, load_images, load_scene
from see3d_jax.pipelines.path_checks import number_ranges
from see3d_jax.pipelines.pretrained import load_model
from see3d_jax.pipelines.warps import SUPERSAMPLE, View, resize_depth, resize_image, warp_references

_IN_FRONT = 0.05  # relative depth: nearer than the region by that much hides it
_MARGIN = 2  # pixels around the old surface that are mixed with it


@dataclasses.dataclass(frozen=True)
class Edit:
    """What was changed in one photo.

    Attributes:
      image: [h, w, 3] uint8, the photo as edited.
      region: [h, w] bool, True where it was edited.
      depth: [h, w] float32 before the edit; edited_depth: after it.
      camera: of this size.
    """

    image: np.ndarray
    region: np.ndarray
    depth: np.ndarray
    edited_depth: np.ndarray
    camera: Camera


def edit(
    source: str | os.PathLike[str],
    *,
    reference: int | str,
    edited: str | os.PathLike[str],
    region: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    edited_depth: str | os.PathLike[str] | None = None,
    views: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str = "ddim",
    unet: str | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Generated:
    """Carries the edit of one photo of a posed scene to the others.

    Args:
      source: a scene folder (see `pipelines.inputs.load_scene`).
      reference: index or name of the photo that was edited.
      edited: that photo after the edit, of the same size.
      region: image of that size, white where it was edited.
      checkpoint, unet, sampler, steps, guidance, size, seed: as in `generation.generate`.
      edited_depth: planar depth of the edited photo, if the edit changed the shape.
      views: how many of the other photos, evenly chosen; default all.

    Returns the edited views in place of the photos. Raises InputError naming what is wrong.
    """
    if views is not None and views < 1:
        raise InputError(f"--views must be at least 1, got {views}")
    scene = load_scene(source)
    (chosen,) = choose_frames(scene, (reference,))
    others = [i for i in range(len(scene)) if i != chosen]
    if not others:
        raise InputError(f"{source}: has no photo besides the edited one")
    if views is not None and views < len(others):
        others = [others[i] for i in np.linspace(0, len(others) - 1, views).round().astype(int)]
    model = load_model(checkpoint, unet=unet, references=1, sampler=sampler)
    model = model.sampled_with(steps, guidance)
    first = scene.cameras[chosen]
    width, height = working_size(
        first.width, first.height, size or model.image_size, model.size_multiple
    )
    change = load_edit(scene, chosen, edited, region, edited_depth, max(width, height))
    photos, depths, targets = _other_views(scene, others, width, height)
    warps, masks, z, touched = warp_edit(change, photos, depths, targets)
    given = resize_image(change.image, width, height)[None]
    generated = sample_groups(model, given, warps, masks, seed)
    result = np.where(masks[..., None], warps, generated)
    unseen = [i for i, mask in zip(others, touched, strict=True) if not mask.any()]
    warnings = []
    if unseen:
        warnings.append(
            f"frames {number_ranges(unseen)}: nothing of the edited region is visible there; they "
            "are the photos as they were"
        )
    small = change.camera.resized(width, height)
    return Generated(
        views=result, generated=generated, composited=result, cameras=targets, warps=warps,
        masks=masks, depths=z,
        inpainted=np.stack([inpaint(w, m) for w, m in zip(warps, masks, strict=True)]),
        references=given, reference_cameras=stack([small]),
        reference_depths=resize_depth(change.edited_depth, width, height)[None],
        reference_names=(f"{scene.names[chosen]}_edited",), enlarged=None, truth=None, metrics=None,
        run={
            "input": str(source), "edited": str(edited), "region": str(region),
            "edited_depth": edited_depth and str(edited_depth),
            "checkpoint": checkpoint and str(checkpoint),
            "model": model.name, "sampler": sampler, "references": [scene.names[chosen]],
            "frames": [scene.names[i] for i in others], "steps": model.sampling.num_steps,
            "guidance": model.sampling.guidance,
            "composite": True, "seed": seed, "width": width, "height": height,
            "num_views": len(others), "known_share": round(float(masks.mean()), 4),
            "warnings": warnings, "rounds": [], "jax_backend": jax.default_backend(),
        },
    )  # fmt: skip


def load_edit(
    scene: Scene, chosen: int, edited: str | os.PathLike[str], region: str | os.PathLike[str],
    edited_depth: str | os.PathLike[str] | None, side: int,
) -> Edit:  # fmt: skip
    """Reads the edit of frame `chosen`, at up to 4 times `side` pixels. Raises InputError."""
    camera = scene.cameras[chosen]
    for path in (edited, region):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such image")
        if image_size(path) != (camera.width, camera.height):
            found = "×".join(map(str, image_size(path)))
            raise InputError(
                f"{path}: is {found}, but frame {scene.names[chosen]} is "
                f"{camera.width}×{camera.height}"
            )
    frames = stereo_references(scene, chosen)
    images, cameras = load_images(scene, tuple(frames), side * SUPERSAMPLE)
    depths, _ = reference_depths(scene, frames, images, cameras, side * SUPERSAMPLE)
    depth, small = depths[0], cameras[0]
    inside = read_image(region, (small.width, small.height))[..., 0] > 127
    if not inside.any():
        raise InputError(f"{region}: no pixel is white, so nothing was edited")
    changed = depth
    if edited_depth is not None:
        unit = scene.depth_unit if Path(edited_depth).suffix.lower() == ".png" else 1.0
        values = load_depth_file(edited_depth, unit)
        if values.shape != (camera.height, camera.width):
            raise InputError(
                f"{edited_depth}: depth map is {values.shape[1]}×{values.shape[0]}, but frame "
                f"{scene.names[chosen]} is {camera.width}×{camera.height}"
            )
        changed = resize_depth(values, small.width, small.height)
    if not (changed > 0)[inside].any():
        raise InputError(f"{region}: no edited pixel has depth, so it cannot be carried anywhere")
    return Edit(read_image(edited, (small.width, small.height)), inside, depth, changed, small)


def warp_edit(
    change: Edit, photos: np.ndarray, depths: np.ndarray, targets: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The photos with the edit warped into them.

    photos [N, h, w, 3], depths [N, h, w] (0 = unknown), targets batch [N]. Returns images
    [N, h, w, 3] uint8, black in holes; known [N, h, w] bool; depths [N, h, w] of the new content;
    touched [N, h, w] bool, where the photo is no longer itself.
    """

    def seen(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = View(change.image, np.where(change.region, depth, 0), change.camera)
        images, known, z = warp_references([part], targets)
        hidden = (depths > 0) & (depths < z * (1 - _IN_FRONT))
        return images, known & ~hidden, z

    before = seen(change.depth)
    same_shape = change.edited_depth is change.depth
    new_images, new, z = before if same_shape else seen(change.edited_depth)
    old = before[1]
    # A warp leaves its edges open, and the old surface's colour is mixed into the pixels beside it.
    kernel = np.ones((2 * _MARGIN + 1,) * 2, np.uint8)
    touched = np.stack([cv2.dilate(mask.astype(np.uint8), kernel) > 0 for mask in old | new])
    known = ~touched | new
    images = np.where(new[..., None], new_images, np.where(known[..., None], photos, 0))
    return images, known, np.where(new, z, 0), touched


def _other_views(
    scene: Scene, frames: list[int], width: int, height: int
) -> tuple[np.ndarray, np.ndarray, Camera]:
    """Photos, depths (0 where the scene has none) and cameras of the frames, at one size."""
    images, cameras = load_images(scene, tuple(frames))
    photos = np.stack([resize_image(image, width, height) for image in images])
    depths = np.zeros(photos.shape[:3], np.float32)
    if scene.depth_paths is not None:
        depths = np.stack([resize_depth(load_depth(scene, i), width, height) for i in frames])
    return photos, depths, stack([camera.resized(width, height) for camera in cameras])
