"""How much arithmetic the UNet needs, counted from its architecture, and what devices can do.

One multiply-add is two FLOPs. Matrix products and convolutions count (at every output pixel, the
zero padding included); norms, softmax and other element-wise work, below 1 %, does not. A training
step is three forward passes, the usual convention (one forward, two backward): recomputing blocks
to save memory is work, but not progress, and is left out. XLA's own count is of no use here: it
counts the body of a loop once and Pallas kernels not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from see3d_jax.models.unet import UNetConfig

# Part of `Device.device_kind` → dense bfloat16 FLOP/s of that device, as its maker states them
# (for GPUs in SXM form, without sparsity). The first match counts.
PEAK_BF16 = (
    ("TPU7x", 2307e12 / 2),  # two devices per chip
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 123e12 / 2),  # two devices per chip
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("V100", 125e12),  # float16; it has no bfloat16
)


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass of one sample, by what they are spent on.

    Attributes:
      convolution: all convolutions.
      linear: all linear layers, those around the attentions included.
      self_attention: logits and weighted sums over the tokens of all views.
      cross_attention: the same over the context tokens.
    """

    convolution: int = 0
    linear: int = 0
    self_attention: int = 0
    cross_attention: int = 0

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        fields = (field.name for field in dataclasses.fields(self))
        return ForwardFlops(*(getattr(self, name) + getattr(other, name) for name in fields))

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def model_flops(
    config: UNetConfig, views: int, height: int, width: int, context_tokens: int
) -> int:
    """FLOPs of one training step on one sample; arguments as for `forward_flops`.

    Divided by the time per sample and by `peak_flops` × devices this is the model FLOPs
    utilisation. Autoencoder and CLIP are not the model and not in here.
    """
    return 3 * forward_flops(config, views, height, width, context_tokens).total


def forward_flops(
    config: UNetConfig, views: int, height: int, width: int, context_tokens: int
) -> ForwardFlops:
    """FLOPs of the UNet on one sample.

    Args:
      config: architecture.
      views: views per sample.
      height, width: size of the *latents*, multiples of `config.stride`.
      context_tokens: tokens of context per view.

    Raises:
      ValueError: latents of a size that the network does not take.
    """
    if min(views, context_tokens) < 1 or min(height, width) < config.stride:
        raise ValueError("views, latent size and context tokens must be positive")
    if height % config.stride or width % config.stride:
        raise ValueError(f"latent size: {height} × {width} are not multiples of {config.stride}")
    parts = _parts(config, views, height * width, context_tokens)
    return sum(parts, start=ForwardFlops())


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device (`Device.device_kind`); None where we do not know it."""
    return next((peak for name, peak in PEAK_BF16 if name in device_kind), None)


def _parts(
    config: UNetConfig, views: int, pixels: int, context_tokens: int
) -> Iterator[ForwardFlops]:
    """The layers of `MultiViewUNet`, in its order; `pixels` per view at the finest level."""
    width, embedding = config.model_channels, 4 * config.model_channels

    def linear(rows: int, inputs: int, outputs: int) -> ForwardFlops:
        return ForwardFlops(linear=2 * views * rows * inputs * outputs)

    def conv(inputs: int, outputs: int, stride: int, kernel: int = 3) -> ForwardFlops:
        places = pixels // stride**2
        return ForwardFlops(convolution=2 * views * places * kernel**2 * inputs * outputs)

    def res(inputs: int, outputs: int, stride: int) -> Iterator[ForwardFlops]:
        yield conv(inputs, outputs, stride)
        yield linear(1, embedding, outputs)
        yield conv(outputs, outputs, stride)
        if inputs != outputs:
            yield conv(inputs, outputs, stride, kernel=1)

    def transformer(channels: int, stride: int) -> Iterator[ForwardFlops]:
        tokens = pixels // stride**2  # per view
        # proj_in and proj_out, four matrices of the self- and two of the cross-attention, and a
        # feed-forward of 8 + 4 times that size
        yield linear(tokens, channels, (2 + 4 + 2 + 12) * channels)
        yield linear(context_tokens, config.context_dim, 2 * channels)  # keys and values
        yield ForwardFlops(
            self_attention=4 * (views * tokens) ** 2 * channels,
            cross_attention=4 * views * tokens * context_tokens * channels,
        )

    yield linear(1, width, embedding)
    yield linear(1, embedding, embedding)
    if config.camera_dim is not None:
        yield linear(1, config.camera_dim, embedding)
        yield linear(1, embedding, embedding)

    yield conv(config.in_channels, width, 1)
    skips, channels, stride = [width], width, 1
    for level, multiple in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            yield from res(channels, multiple * width, stride)
            channels = multiple * width
            if stride in config.attention_strides:
                yield from transformer(channels, stride)
            skips.append(channels)
        if level < len(config.channel_mult) - 1:
            stride *= 2
            yield conv(channels, channels, stride)
            skips.append(channels)

    yield from res(channels, channels, stride)
    yield from transformer(channels, stride)
    yield from res(channels, channels, stride)

    for level, multiple in reversed(list(enumerate(config.channel_mult))):
        for _ in range(config.num_res_blocks + 1):
            yield from res(channels + skips.pop(), multiple * width, stride)
            channels = multiple * width
            if stride in config.attention_strides:
                yield from transformer(channels, stride)
        if level > 0:
            stride //= 2
            yield conv(channels, channels, stride)
    yield conv(width, config.out_channels, 1)
