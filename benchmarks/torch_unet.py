"""The multi-view UNet in PyTorch, as a peer to measure against (NCHW, like the released network).

Ordinary torch blocks under the released names, with `scaled_dot_product_attention`, so that torch
runs on the kernels its own users get. Weights come from our parameter tree. Needs torch, which the
project does not install by itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from see3d_jax.models.unet import UNetConfig


class ResBlock(nn.Module):
    """Two convolutions around an added time embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inputs), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, outputs), nn.SiLU(), nn.Identity(), conv
        )
        if inputs != outputs:
            self.skip_connection = nn.Conv2d(inputs, outputs, 1)
        else:
            self.skip_connection = nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x [N, inputs, h, w], embedding [N, embedding] → [N, outputs, h, w]."""
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention to `context`'s tokens."""

    def __init__(self, width: int, context: int, head_dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x [N, tokens, width], context [N, tokens', context width] → like x."""
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GatedUnit(nn.Module):
    """value · gelu(gate)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] → [..., hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated two-layer network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = GatedUnit(width, 4 * width)
        self.net = nn.Sequential(hidden, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] → [..., width]."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Joint self-attention over views, attention to the context per view, feed-forward."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, config.head_dim)
        self.attn2 = Attention(width, config.context_dim, config.head_dim)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor, views: int) -> torch.Tensor:
        """x [N, tokens, width], context [N, L, context_dim] → like x."""
        joint = self.norm1(x).reshape(x.shape[0] // views, -1, x.shape[2])
        x = x + self.attn1(joint, joint).reshape(x.shape)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block over pixels, with a residual path."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, views: int) -> torch.Tensor:
        """x [N, width, h, w] → like x."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        tokens = self.proj_out(self.transformer_blocks[0](tokens, context, views))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, width, h, w] → [N, width, h/2, w/2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, width, h, w] → [N, width, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class TorchUNet(nn.Module):
    """The whole network, without a camera input."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, embedding = config.model_channels, 4 * config.model_channels
        self.width = width
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        def layers(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            made = [ResBlock(inputs, outputs, embedding, config.norm_groups)]
            if stride in config.attention_strides:
                made.append(SpatialTransformer(outputs, config))
            return made

        blocks = [nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])]
        skips, channels, levels = [width], width, len(config.channel_mult)
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                blocks.append(nn.ModuleList(layers(channels, multiple * width, 2**level)))
                channels = multiple * width
                skips.append(channels)
            if level < levels - 1:
                blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(blocks)

        middle = [ResBlock(channels, channels, embedding, config.norm_groups) for _ in range(2)]
        attention = SpatialTransformer(channels, config)
        self.middle_block = nn.ModuleList([middle[0], attention, middle[1]])

        blocks = []
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                made = layers(channels + skips.pop(), multiple * width, 2**level)
                channels = multiple * width
                if level > 0 and index == config.num_res_blocks:
                    made.append(Upsample(channels))
                blocks.append(nn.ModuleList(made))
        self.output_blocks = nn.ModuleList(blocks)
        last = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(config.norm_groups, width), nn.SiLU(), last)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, views: int
    ) -> torch.Tensor:
        """x [B·V, in, h, w], t [B·V], context [B·V, L, context_dim] → [B·V, out, h, w]."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))

        def run(stage: nn.ModuleList, h: torch.Tensor) -> torch.Tensor:
            for layer in stage:
                if isinstance(layer, ResBlock):
                    h = layer(h, embedding)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, views)
                else:
                    h = layer(h)
            return h

        skips = []
        for stage in self.input_blocks:
            x = run(stage, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for stage in self.output_blocks:
            x = run(stage, torch.cat([x, skips.pop()], 1))
        return self.out(x)


def torch_unet(config: UNetConfig, tensors: dict[str, np.ndarray]) -> TorchUNet:
    """The network with our weights, given under their torch names and in torch's layouts."""
    network = TorchUNet(config)
    state: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()
    }
    network.load_state_dict(state, strict=True)
    return network
