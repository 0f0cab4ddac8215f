"""How much of a target can be read from its condition V_t alone, as a function of t.

V_t = W_t·C_t + (1 − W_t)·X_t holds the target twice: in C_t, where pixels are known, and in X_t,
everywhere. For latents of the test views, the share of the variance of x_0 that a linear estimate
from V_t explains (R², per channel, weighted by variance), in known pixels and in holes. What holes
tell is what the paper's mixing lets through by design; a condition without mixing tells nothing
there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.data.pipeline import Batch
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import mix_condition
from see3d_jax.models.codec import Codec
from see3d_jax.training.inputs import encode_batch

TIMESTEPS = (0, 50, 100, 150, 200, 250, 300, 350, 400, 500, 600, 700, 800, 900, 999)
CHOICES = (("code", 0.2), ("paper", 0.2), ("code", 0.05), ("code", 1.0), ("clean", 0.2))


def readable_share(
    latents: tuple[jax.Array, jax.Array, jax.Array], is_reference: np.ndarray, schedule: Schedule,
    form: str, beta: float, t: int,
) -> dict[str, float]:  # fmt: skip
    """R² of x_0 given V_t at timestep t: {"known", "hole"} in [0, 1].

    `latents`: clean ones, those of the condition, and the mask, as of `encode_batch`.
    """
    x_0, condition, mask = latents
    keys = jax.random.split(jax.random.key(t), 2)
    eps, eps_c = (jax.random.normal(key, x_0.shape) for key in keys)
    times = jnp.full(x_0.shape[:2], t)
    x_t = schedule.add_noise(x_0, eps, times)
    v_t = mix_condition(schedule, x_t, condition, eps_c, times, form=form, beta=beta)
    truth, shown = np.asarray(x_0)[~is_reference], np.asarray(v_t)[~is_reference]
    known = np.asarray(mask)[~is_reference][..., 0] > 0.5
    return {
        name: _explained(truth[where], shown[where])
        for name, where in (("known", known), ("hole", ~known))
    }


def _explained(truth: np.ndarray, shown: np.ndarray) -> float:
    """Squared correlation of each channel [n, c], averaged with its variance as weight."""
    truth, shown = truth - truth.mean(0), shown - shown.mean(0)
    variance = (truth**2).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (truth * shown).mean(0) ** 2 / (variance * (shown**2).mean(0))
    return float((np.nan_to_num(share) * variance).sum() / variance.sum())


def curves(batch: Batch, codec: Codec, schedule: Schedule) -> list[dict[str, Any]]:
    """R² over t for every choice of W_t and β: [{"form", "beta", "t", "known", "hole"}]."""
    found = []
    latents = encode_batch(codec, {name: jnp.asarray(batch[name]) for name in ("image", "mask")})
    for form, beta in CHOICES:
        shares = [
            readable_share(latents, batch["is_reference"], schedule, form, beta, t)
            for t in TIMESTEPS
        ]
        columns = {name: [round(s[name], 4) for s in shares] for name in ("known", "hole")}
        found.append({"form": form, "beta": beta, "t": list(TIMESTEPS), **columns})
    return found


def plot(found: list[dict[str, Any]], path: str) -> None:
    """Draws the curves, holes and known pixels beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("hole", "known")):
        for curve in found:
            label = f"{curve['form']}, β = {curve['beta']}"
            axes.plot(curve["t"], curve[name], label=label, marker=".")
        axes.set(
            title={"hole": "holes", "known": "known pixels"}[name], xlabel="t", ylim=(-0.02, 1.02)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of x₀ readable from V_t (R²)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
