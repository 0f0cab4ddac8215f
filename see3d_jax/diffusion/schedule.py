"""The noise schedule: how much of the image is left at each of 1000 timesteps.

With ᾱ_t = prod(1 − β), x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (1). Networks predict ε ("epsilon"), x_0
("sample") or v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 ("v") (2). See3D (App. C; reference form) samples with
betas rescaled to zero terminal SNR: ᾱ_999 = 0 exactly, x_999 is pure noise. Tables are computed on
the host in the float32 steps PyTorch takes, so that they agree with the released pipeline to the
last bits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = ("epsilon", "v", "sample")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table of ᾱ and what the network predicts; passes through jit as a pytree.

    Attributes:
      alphas_cumprod: [timesteps] float32, ᾱ_t, falling.
      prediction: "epsilon", "v" or "sample" (static).
      set_alpha_to_one: whether "official" sampling ends at ᾱ = 1 instead of ᾱ_0 (static).
    """

    alphas_cumprod: jax.Array | np.ndarray
    prediction: str = dataclasses.field(metadata={"static": True})
    set_alpha_to_one: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the table has (1000 in every released model)."""
        return self.alphas_cumprod.shape[0]

    def coefficients(self, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """√ᾱ_t and √(1 − ᾱ_t) with trailing axes added, ready to scale arrays of `ndim` axes."""
        alpha_bar = jnp.asarray(self.alphas_cumprod)[t]
        return signal_and_noise(alpha_bar, ndim)

    def add_noise(self, x_0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Eq. (1). x_0, eps [B, V, ...]; t [B] or [B, V] integers."""
        signal, noise = self.coefficients(t, x_0.ndim)
        return signal * x_0 + noise * eps

    def target(self, x_0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should output for add_noise(x_0, eps, t): eps, x_0, or v by eq. (2)."""
        if self.prediction != "v":
            return eps if self.prediction == "epsilon" else x_0
        signal, noise = self.coefficients(t, x_0.ndim)
        return signal * eps - noise * x_0

    def to_x0_eps(
        self, x_t: jax.Array, output: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The clean latents and the noise that a network output implies. Shapes as x_t."""
        signal, noise = self.coefficients(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - noise * output) / signal, output
        if self.prediction == "sample":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, signal * output + noise * x_t

    def from_x0(self, x_t: jax.Array, x_0: jax.Array, t: jax.Array) -> jax.Array:
        """The network output that implies these clean latents: `to_x0_eps` backwards."""
        if self.prediction == "sample":
            return x_0
        signal, noise = self.coefficients(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - signal * x_0) / noise
        return (signal * x_t - x_0) / noise


def signal_and_noise(alpha_bar: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """√ᾱ and √(1 − ᾱ) with trailing axes added until they have `ndim` axes."""
    alpha_bar = jnp.asarray(alpha_bar)
    alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - alpha_bar.ndim))
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def make_schedule(
    kind: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_timesteps: int = 1000,
    zero_snr: bool = False,
    prediction: str = "v",
    set_alpha_to_one: bool = False,
) -> Schedule:
    """Builds a schedule.

    Args:
      kind: "linear" (betas linear) or "scaled_linear" (their square roots linear; SD, MVDream).
      beta_start, beta_end: first and last beta.
      num_timesteps: length of the table.
      zero_snr: rescale so that nothing of the image is left at the last timestep (See3D samples
        this way).
      prediction: "epsilon", "v" or "sample" (x_0).
      set_alpha_to_one: see `Schedule`.

    Raises:
      ValueError: an unknown kind or prediction, or epsilon together with zero_snr.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    if zero_snr and prediction == "epsilon":
        raise ValueError(
            "prediction 'epsilon' cannot be combined with zero_snr: at the last timestep nothing "
            "of the image is left, so predicting the noise there says nothing about it (x_0 would "
            "be divided by zero); use prediction='v', or zero_snr=False"
        )
    if kind == "scaled_linear":
        betas = _linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    elif kind == "linear":
        betas = _linspace(beta_start, beta_end, num_timesteps)
    else:
        raise ValueError(f"kind: expected 'linear' or 'scaled_linear', got {kind!r}")
    alphas_cumprod = _cumprod(1 - betas)
    if zero_snr:
        alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
    return Schedule(alphas_cumprod, prediction, set_alpha_to_one)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """float32 linspace as PyTorch's: walks in from both ends, rounding once per value."""
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    forward, backward = start + step * index, stop - step * index[::-1]
    return np.where(index < count // 2, forward, backward).astype(np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    """Cumulative product, accumulated in float64 and rounded to float32."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _rescale_to_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts √ᾱ to end at 0 and scales it to keep its first value (Lin et al. 2023, Alg. 1).

    Goes through betas and back, because that is where the released pipeline keeps its state.
    """
    root = np.sqrt(alphas_cumprod)
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    betas = 1 - alphas
    return _cumprod(1 - betas)
