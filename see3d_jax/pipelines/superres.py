"""Views at twice their size: the super-resolution pass over what was generated.

The model's condition is each view, enlarged by two, as clean latents. Views go through in groups;
the references and the last two views of the group before are the clean views of the next, so that
detail agrees along the path and memory does not grow with it. A view keeps its own mask: the mask
of another view would declare the wrong pixels known. A model that was trained here saw coarse
views as known everywhere, the released one is given the masks of the warps.
Images uint8 RGB [h, w, 3], masks bool with True = known.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import cv2
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.pipelines.group_sampling import group_targets, sample_groups
from see3d_jax.pipelines.pretrained import See3DModel, load_model

FACTOR = 2
_CARRIED = 2  # views of a group that are clean in the next
_RELEASED = "SR"  # name of the released UNet


def load_superres(folder: str | os.PathLike[str], sampler: str) -> tuple[See3DModel, bool]:
    """The super-resolution model in a folder, and whether it wants the masks of the warps.

    `folder` is the workdir of a training run with the condition "superres", or converted released
    weights. Raises InputError when it holds another kind of model.
    """
    released = (Path(folder) / "release.json").is_file()
    model = load_model(folder, unet=_RELEASED if released else None, sampler=sampler)
    if model.sampling.weight_form != "clean":
        raise InputError(
            f"--sr {folder}: was not trained for super-resolution; give a training run of "
            f"configs/superres.py, or released weights with the UNet {_RELEASED}"
        )
    # The released pass takes half a sequence at a time: a view has four times the pixels.
    return (dataclasses.replace(model, views=model.views // 2) if released else model), released


def enlarge_views(
    model: See3DModel, references: np.ndarray, views: np.ndarray, masks: np.ndarray | None,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Enlarges N views by two.

    Args:
      model: trained for super-resolution.
      references: [R, 2h, 2w, 3] uint8, the given views in full detail.
      views: [N, h, w, 3] uint8.
      masks: [N, h, w] bool, known pixels of the views; None = all.
      seed: of the sampler.

    Returns [N, 2h, 2w, 3] uint8. Raises ValueError for shapes that do not fit.
    """
    count, height, width = views.shape[:3]
    size = height * FACTOR, width * FACTOR
    if references.shape[1:3] != size or (masks is not None and masks.shape != views.shape[:3]):
        raise ValueError(
            f"enlarge_views: expected references [R, {size[0]}, {size[1]}, 3] and masks "
            f"{views.shape[:3]}, got {references.shape} and {np.shape(masks)}"
        )
    coarse = np.stack([cv2.resize(v, size[::-1], interpolation=cv2.INTER_CUBIC) for v in views])
    if masks is None:
        masks = np.ones((count, height, width), bool)
    known = masks.repeat(FACTOR, 1).repeat(FACTOR, 2)
    carried = min(_CARRIED, max(0, model.views - len(references) - 1))
    # Nothing is carried into the first group: the references stand there twice, so that all groups
    # have one shape and one compiled program.
    per_group = max(1, model.views - len(references) - carried)
    result = np.empty_like(coarse)
    last = references[np.arange(carried) % len(references)]
    for number, group in enumerate(group_targets(count, per_group)):
        clean = np.concatenate([references, last])
        result[group] = sample_groups(
            dataclasses.replace(model, views=len(clean) + len(group)), clean, coarse[group],
            known[group], seed, number,
        )  # fmt: skip
        if carried:
            last = result[group][np.arange(-carried, 0) % len(group)]
    return result
