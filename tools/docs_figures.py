"""Draws the figures of the documentation's conventions and method, from the code they explain.

    python -m tools.docs_figures --output docs/images

camera_axes.svg (whose axes point where), pixels_and_depth.svg (pixel centres, planar depth),
mixing_weight.svg (W_t and what is left of the condition). Needs matplotlib: pip install '.[plots]'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.diffusion.visual_condition import condition_timestep, mixing_weight
from see3d_jax.errors import InputError, run_command
from see3d_jax.files import atomic_path

_RED, _GREEN, _BLUE, _GREY = "#c0392b", "#1e8449", "#1f5fa8", "#777777"
# Axes of a camera that looks to the right of the drawing (into the scene), as (right, down,
# forward) components: what each convention calls x, y and z.
_CONVENTIONS = {
    "OpenCV, COLMAP, here": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "OpenGL, nerfstudio, Blender": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "PyTorch3D, CO3D": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "LLFF's poses_bounds.npy": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
}
# Where right, down and forward go in the oblique drawing.
_OBLIQUE = np.array([[0.55, 0.45], [0.0, -1.0], [1.0, -0.12]])


@click.command(epilog="\b\nExamples:\n  python -m tools.docs_figures --output docs/images\n")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder, written into."
)
def app(output: Path) -> None:
    """Draws the three figures."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figures need matplotlib: pip install '.[plots]'") from None
    matplotlib.use("Agg")
    # The same bytes each time: fixed ids, no date. Text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "see3d", "svg.fonttype": "none", "font.size": 10})
    for name, draw in (
        ("camera_axes", camera_axes), ("pixels_and_depth", pixels_and_depth),
        ("mixing_weight", mixing_weights),
    ):  # fmt: skip
        figure = draw()
        with atomic_path(output / f"{name}.svg") as temporary:
            figure.savefig(temporary, metadata={"Date": None}, bbox_inches="tight")
        click.echo(f"wrote {output / name}.svg")


def camera_axes() -> Any:
    """One camera per convention, looking the same way."""
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(1, 4, figsize=(11.5, 3.1))
    for plot, (title, axes) in zip(plots, _CONVENTIONS.items(), strict=True):
        corners = np.array([[-1, -0.7], [1, -0.7], [1, 0.7], [-1, 0.7]]) * 0.55
        image = np.array([[x, y, 0.75] for x, y in corners]) @ _OBLIQUE
        plot.fill(*image.T, color="#f2d98b", alpha=0.6, zorder=0)
        for corner in image:
            plot.plot([0, corner[0]], [0, corner[1]], color=_GREY, lw=0.8, zorder=0)
        plot.text(*(image.mean(0) + [0.5, -0.62]), "looks this way", color=_GREY, ha="center")
        for name, axis, colour in zip("xyz", axes, (_RED, _GREEN, _BLUE), strict=True):
            tip = np.array(axis) @ _OBLIQUE * 0.9
            plot.annotate(
                "", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2}
            )
            plot.text(*(tip * 1.22), name, color=colour, ha="center", va="center", size=13)
        plot.set_title(title, fontsize=11)
        plot.set(xlim=(-1.3, 1.6), ylim=(-1.4, 1.3), aspect="equal")
        plot.axis("off")
    return figure


def pixels_and_depth() -> Any:
    """Left: the pixel grid. Right: planar depth beside distance along the ray."""
    import matplotlib.pyplot as plt

    figure, (pixels, depth) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    for i in range(5):
        pixels.plot([i, i], [0, 3], color=_GREY, lw=0.8)
    for i in range(4):
        pixels.plot([0, 4], [i, i], color=_GREY, lw=0.8)
    x, y = np.meshgrid(np.arange(4) + 0.5, np.arange(3) + 0.5)
    pixels.plot(x.ravel(), y.ravel(), ".", color=_BLUE)
    pixels.plot(0, 0, "o", color=_RED)
    pixels.text(-0.1, -0.25, "(0, 0): the corner", color=_RED)
    pixels.text(0.55, 0.42, " (0.5, 0.5)", color=_BLUE, size=8)
    pixels.plot(2, 1.5, "+", color=_GREEN, ms=12, mew=2)
    pixels.text(2.08, 1.68, "centre\n(w/2, h/2)", color=_GREEN, size=8, va="top")
    pixels.set(xlim=(-0.4, 4.4), ylim=(3.4, -0.6), aspect="equal", title="4 × 3 pixels")
    pixels.set_xlabel("x →")
    pixels.set_ylabel("← y")
    pixels.set(xticks=range(5), yticks=range(4))

    point = np.array([2.0, 1.1])
    depth.plot([0, 3], [0, 0], "--", color=_GREY, lw=0.8)
    depth.plot([0, point[0]], [0, point[1]], color=_RED, lw=1.6)
    depth.plot([point[0], point[0]], [-0.3, 1.5], color=_GREY, lw=0.8, ls=":")
    depth.annotate(
        "", (point[0], -0.2), (0, -0.2), arrowprops={"arrowstyle": "<->", "color": _BLUE, "lw": 2}
    )
    depth.plot(*point, "o", color="black")
    depth.plot([0, -0.35, -0.35, 0], [0, 0.25, -0.25, 0], color="black")
    depth.text(1.0, -0.42, "depth (planar z): what is meant here", color=_BLUE, ha="center")
    depth.text(0.62, 0.66, "distance along the ray: is not", color=_RED, rotation=28.8, ha="left")
    depth.set(xlim=(-0.6, 3.2), ylim=(-0.7, 1.7), aspect="equal", title="Depth")
    depth.axis("off")
    return figure


def mixing_weights() -> Any:
    """W_t of code and paper, and the share of the condition's signal left in V_t."""
    import matplotlib.pyplot as plt

    t = np.arange(1000)
    alpha_bar = np.asarray(make_schedule("linear", zero_snr=True, prediction="v").alphas_cumprod)
    left = np.sqrt(alpha_bar[np.asarray(condition_timestep(t))])
    figure, (weight, signal) = plt.subplots(1, 2, figsize=(9.5, 3.0), sharex=True)
    for form, colour in (("code", _BLUE), ("paper", _RED)):
        w = np.asarray(mixing_weight(t, form))
        weight.plot(t, w, color=colour, label=form)
        signal.plot(t, w * left, color=colour, label=form)
    weight.set(title="W$_t$: share of the condition in V$_t$", ylim=(0, 1.02))
    signal.set(title="W$_t$·√ᾱ$_{t'}$: signal of C in V$_t$", ylim=(0, 1.02))
    for plot in (weight, signal):
        plot.set_xlabel("t (0 = clean, 999 = pure noise)")
        plot.legend(title="weight_form")
        plot.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
