"""see3d_jax: See3D (CVPR 2025) in JAX: curation, training, generation and Gaussian splatting.

What a notebook needs, imported when first used:

    create(photos, output)          photos → a scene on disk: views, Gaussians, report.html
    generate(source, trajectory=…)  → Generated: new views of a photo as arrays
    reconstruct(folder, output)     posed views → a scene of Gaussians on disk, with its scores
    load_scene(folder)              → Scene: posed images, cameras, depth
    load_gaussians(file)            → Gaussians
    render(gaussians, camera)       → Rendering: rgb [h, w, 3], alpha, depth
    load_model(checkpoint)          → See3DModel; None is the small one inside the package
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "create": "see3d_jax.pipelines.create",
    "generate": "see3d_jax.pipelines.generation",
    "reconstruct": "see3d_jax.pipelines.reconstruct",
    "load_scene": "see3d_jax.pipelines.inputs",
    "load_gaussians": "see3d_jax.splatting.formats:read_ply",
    "render": "see3d_jax.splatting.render",
    "load_model": "see3d_jax.pipelines.pretrained",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import see3d_jax` touches no heavy library and no device."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), original or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
