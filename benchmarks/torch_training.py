"""One training step in PyTorch, as a peer to measure against: the loss of the paper, AdamW, EMA.

Written the way a torch user would: autograd, `clip_grad_norm_`, the stock AdamW, an average moved
by `_foreach_lerp_`. Latents are NCHW with views folded into the batch. Needs torch, which the
project does not install by itself.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.torch_unet import TorchUNet
from see3d_jax.training.settings import TrainSpec


@dataclasses.dataclass(frozen=True)
class TorchBatch:
    """One sample of V views.

    Attributes:
      x_0, condition: [V, c, h, w] clean latents, latents of the masked views.
      mask: [V, 1, h, w], 1 = known.
      is_reference: [V] bool.
      context: [V, L, context_dim].
    """

    x_0: torch.Tensor
    condition: torch.Tensor
    mask: torch.Tensor
    is_reference: torch.Tensor
    context: torch.Tensor


@dataclasses.dataclass(frozen=True)
class TorchNoise:
    """What is random in a step: t, whether the condition is dropped, ε and ε'."""

    t: int
    dropped: bool
    eps: torch.Tensor
    eps_condition: torch.Tensor


class TorchTrainer:
    """Network, optimizer and average; v prediction, W_t of the released code."""

    def __init__(
        self,
        network: TorchUNet,
        spec: TrainSpec,
        alphas_cumprod: torch.Tensor,
        weights: torch.Tensor,
        condition_steps: torch.Tensor,
    ) -> None:
        """`weights` and `condition_steps` are W_t and t' of every t."""
        self.network, self.spec = network, spec
        self.alphas, self.weights, self.steps = alphas_cumprod, weights, condition_steps
        optimizer = spec.optimizer
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            optimizer.learning_rate,
            (optimizer.b1, optimizer.b2),
            optimizer.eps,
            optimizer.weight_decay,
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.taken = 0

    def draw(self, batch: TorchBatch) -> TorchNoise:
        """Fresh noise for a step."""
        eps, eps_condition = torch.randn(2, *batch.x_0.shape)
        t = int(torch.randint(len(self.alphas), ()))
        dropped = bool(torch.rand(()) < self.spec.objective.drop_probability)
        return TorchNoise(t, dropped, eps, eps_condition)

    def loss(self, batch: TorchBatch, noise: TorchNoise) -> torch.Tensor:
        """Mean squared error of v over the target views."""
        signal, sigma = self.alphas[noise.t].sqrt(), (1 - self.alphas[noise.t]).sqrt()
        x_t = signal * batch.x_0 + sigma * noise.eps
        early = self.alphas[self.steps[noise.t]]
        c_t = early.sqrt() * batch.condition + (1 - early).sqrt() * noise.eps_condition
        weight = self.weights[noise.t]
        v_t = weight * c_t + (1 - weight) * x_t
        reference = batch.is_reference[:, None, None, None]
        keep = 0.0 if noise.dropped else 1.0
        inputs = [
            torch.where(reference, batch.x_0, x_t),
            torch.where(reference, batch.x_0, keep * v_t),
            torch.where(reference, torch.ones(()), keep * batch.mask),
        ]
        views = len(batch.x_0)
        times = torch.full((views,), noise.t)
        output = self.network(torch.cat(inputs, 1), times, batch.context, views)
        error = (output - (signal * noise.eps - sigma * batch.x_0)).square()
        return error[~batch.is_reference].mean()

    def gradient(self, batch: TorchBatch, noise: TorchNoise) -> torch.Tensor:
        """Leaves the gradients in the parameters; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch, noise)
        loss.backward()
        return loss.detach()

    def step(self, batch: TorchBatch, noise: TorchNoise | None = None) -> torch.Tensor:
        """One whole training step; returns the loss before it."""
        loss = self.gradient(batch, self.draw(batch) if noise is None else noise)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.optimizer.clip_norm)
        self.optimizer.step()
        decay = min(self.spec.ema_decay, (1 + self.taken) / (10 + self.taken))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.taken += 1
        return loss
