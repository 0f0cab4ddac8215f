"""Front-to-back blending of 2D Gaussians, tile by tile, with a hand-written gradient (3DGS Sec. 6).

  alpha_i = min(0.99, opacity_i · exp(−½|z_i|²)), 0 below 1/255;   w_i = T_i · alpha_i
  T_{i+1} = T_i · (1 − alpha_i);                                   out = Σ w_i · feature_i

Tiles of 8×8 pixels, sorted by list length, are worked off in blocks of `BLOCK`; a block walks its
lists in segments of `SEGMENT` Gaussians until the longest list ends or no pixel lets light
through. The backward pass walks the same way again, front to back, from the outputs alone: what
lies behind Gaussian i is the total minus what has been blended so far, so nothing is stored per
(pixel, Gaussian) pair and memory does not grow with depth complexity.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from see3d_jax.splatting.binning import TILE, TileLists
from see3d_jax.splatting.projection import MIN_ALPHA

MAX_ALPHA = 0.99
# A pixel is finished when less than this share of the light behind could still arrive.
MIN_TRANSMITTANCE = 1e-6
BLOCK = 64  # tiles per block
SEGMENT = 8  # Gaussians per tile between two checks for the end
PIXELS = TILE * TILE
LANES = 32  # pixels per vector while summing over pixels
SHAPE_COLUMNS = 6  # mean x, y; l11, l21, l22; opacity. The features follow.


class _Block(NamedTuple):
    """`BLOCK` tiles: [BLOCK] list start and length, [2, BLOCK] corner pixel."""

    start: jax.Array
    length: jax.Array
    corner: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def rasterize(
    table: jax.Array, lists: TileLists, band: jax.Array, across: int, bands: int
) -> tuple[jax.Array, jax.Array]:
    """Blends Gaussians into the tiles of one band of an image.

    Args:
      table: [N, 6 + C] per Gaussian: mean x, y (pixels); l11, l21, l22; opacity; C features.
      lists: lists of the band's T tiles; must not have overflowed.
      band: [] int32, which band (see `binning`).
      across: tiles in a row (static).
      bands: number of bands (static).

    Returns:
      [T, C, 64] blended features (premultiplied: nothing is added for the background) and
      [T, 64] transmittance left for the background; pixels row by row in each tile.
    """
    return _forward(table, lists, band, across, bands)


def _rasterize_forward(
    table: jax.Array, lists: TileLists, band: jax.Array, across: int, bands: int
):
    outputs, transmittance = _forward(table, lists, band, across, bands)
    return (outputs, transmittance), (table, lists, band, outputs, transmittance)


def _rasterize_backward(across: int, bands: int, residuals, gradients):  # noqa: ANN001
    table, lists, band, outputs, transmittance = residuals
    total = (outputs * gradients[0]).sum(1) + transmittance * gradients[1]
    scheduled = _schedule(lists, band, across, bands)
    return _backward(table, lists, scheduled, gradients[0], total), None, None


rasterize.defvjp(_rasterize_forward, _rasterize_backward)


def _forward(
    table: jax.Array, lists: TileLists, band: jax.Array, across: int, bands: int
) -> tuple[jax.Array, jax.Array]:
    """→ outputs [T, C, 64] and transmittance [T, 64], tiles row by row."""
    features = table.shape[1] - SHAPE_COLUMNS
    pairs = _take(table, lists.gaussian)
    blocks, order = _schedule(lists, band, across, bands)

    def draw(block: _Block) -> tuple[jax.Array, jax.Array]:
        def segment(state):  # noqa: ANN001
            step, transmittance, output = state
            rows, opacity, _ = _segment_rows(pairs, block, step)

            def blend(transmittance, row):  # noqa: ANN001
                weight = _alpha(*row, block.corner)[-1] * transmittance
                return transmittance - weight, weight

            transmittance, weight = jax.lax.scan(blend, transmittance, (rows, opacity))
            output += sum(w[:, None] * row[:, SHAPE_COLUMNS:, None] for w, row in zip(weight, rows))
            return step + 1, transmittance, output

        start = (
            jnp.int32(0),
            jnp.ones((BLOCK, PIXELS), table.dtype),
            jnp.zeros((BLOCK, features, PIXELS), table.dtype),
        )
        _, transmittance, output = jax.lax.while_loop(partial(_unfinished, block), segment, start)
        return output, transmittance

    outputs, transmittance = jax.lax.map(draw, blocks)
    tiles = lists.length.shape[0]
    return tuple(_unschedule(leaf, order)[:tiles] for leaf in (outputs, transmittance))


def _backward(
    table: jax.Array,
    lists: TileLists,
    schedule: tuple[_Block, jax.Array],
    grad_outputs: jax.Array,
    total: jax.Array,
) -> jax.Array:
    """Gradient of the table. grad_outputs [T, C, 64]; total [T, 64] = Σ outputs · gradient."""
    blocks, order = schedule
    pairs = _take(table, lists.gaussian)
    scheduled = _reschedule(grad_outputs, order), _reschedule(total, order)

    def accumulate(sums: jax.Array, work):  # noqa: ANN001
        block, grad_output, total = work

        def segment(state):  # noqa: ANN001
            step, transmittance, remaining, sums = state
            rows, opacity, place = _segment_rows(pairs, block, step)

            def unblend(carry, now):  # noqa: ANN001
                transmittance, remaining = carry
                falloff, raw, alpha = _alpha(*now, block.corner)
                row = now[0]
                # This Gaussian's own value and all that lies behind it, as seen by the loss.
                value = sum(
                    row[:, SHAPE_COLUMNS + channel, None] * grad_output[:, channel]
                    for channel in range(grad_output.shape[1])
                )
                weight = alpha * transmittance
                remaining = remaining - weight * value
                grad_alpha = transmittance * value - remaining / (1.0 - alpha)
                moved = (raw >= MIN_ALPHA) & (raw < MAX_ALPHA)
                grad_opacity = jnp.where(moved, grad_alpha * falloff, 0.0)
                return (transmittance - weight, remaining), (weight, grad_opacity)

            (transmittance, remaining), (weight, grad_opacity) = jax.lax.scan(
                unblend, (transmittance, remaining), (rows, opacity)
            )
            moments = _moments_about_means(grad_opacity, rows, block.corner)
            colour = _sum_over_pixels(weight, grad_output)
            moments = jnp.concatenate([moments, colour], -1)
            # Past the end of a list nothing is added: with opacity 0 both factors are 0.
            index = _take(lists.gaussian, place)
            sums = sums.at[index].add(moments, mode="promise_in_bounds")
            return step + 1, transmittance, remaining, sums

        start = (jnp.int32(0), jnp.ones_like(total), total, sums)
        return jax.lax.while_loop(partial(_unfinished, block), segment, start)[-1], None

    sums = jax.lax.scan(accumulate, jnp.zeros_like(table), (blocks, *scheduled))[0]
    gradient = [_shape_gradient(sums.T, table.T), sums[:, SHAPE_COLUMNS:].T]
    return jnp.concatenate(gradient).T


def _sum_over_pixels(weight: jax.Array, grad_output: jax.Array) -> jax.Array:
    """Σ weight · gradient: [SEGMENT, BLOCK, 64], [BLOCK, C, 64] → [SEGMENT, BLOCK, C]."""
    # In two stages: XLA's batched products and sums are slow at such small sizes.
    parts = [slice(k, k + LANES) for k in range(0, PIXELS, LANES)]
    lanes = sum(weight[:, :, None, part] * grad_output[:, :, part] for part in parts)
    return jnp.matmul(lanes, jnp.ones(LANES, weight.dtype), precision="highest")


def _moments_about_means(grad_opacity: jax.Array, rows: jax.Array, corner: jax.Array) -> jax.Array:
    """[SEGMENT, BLOCK, 64] → its sums times 1, dx, dy, dx², dx·dy, dy²: [SEGMENT, BLOCK, 6].

    d = pixel − mean. Taken about the tile's centre first, so that one small matrix does for all
    tiles; pixels are at most 4 away from there, which costs no accuracy that matters.
    """
    x, y = (offset - TILE / 2 for offset in _pixel_offsets(rows.dtype))
    powers = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], -1)
    sums = jnp.matmul(grad_opacity.reshape(-1, PIXELS), powers, precision="highest")
    one, x, y, xx, xy, yy = jnp.moveaxis(sums.reshape(*grad_opacity.shape[:2], 6), -1, 0)
    u, v = rows[..., 0] - corner[0] - TILE / 2, rows[..., 1] - corner[1] - TILE / 2
    moments = [
        one,
        x - u * one,
        y - v * one,
        xx - 2 * u * x + u * u * one,
        xy - u * y - v * x + u * v * one,
        yy - 2 * v * y + v * v * one,
    ]
    return jnp.stack(moments, -1)


def _shape_gradient(moments: jax.Array, table: jax.Array) -> jax.Array:
    """Sums of moments over all pixels [6 …, N] → gradient of the shape columns [6, N]."""
    one, x, y, xx, xy, yy = moments[:SHAPE_COLUMNS]
    _, _, l11, l21, l22, opacity = table[:SHAPE_COLUMNS]
    along = l11 * x + l21 * y
    return jnp.stack(
        [
            opacity * l11 * along,
            opacity * (l21 * along + l22 * l22 * y),
            -opacity * (l11 * xx + l21 * xy),
            -opacity * (l11 * xy + l21 * yy),
            -opacity * l22 * yy,
            one,
        ]
    )


def _alpha(row: jax.Array, opacity: jax.Array, corner: jax.Array) -> tuple[jax.Array, ...]:
    """Rows [BLOCK, 6 + C], opacity [BLOCK] → falloff, raw alpha, alpha [BLOCK, 64] at pixels."""
    x, y = _pixel_offsets(row.dtype)
    l11, l21, l22 = row[:, 2], row[:, 3], row[:, 4]
    to_x, to_y = corner[0] - row[:, 0], corner[1] - row[:, 1]
    z1 = (l11 * to_x + l21 * to_y)[:, None] + l11[:, None] * x + l21[:, None] * y
    z2 = (l22 * to_y)[:, None] + l22[:, None] * y
    falloff = jnp.exp(-0.5 * (z1 * z1 + z2 * z2))
    raw = opacity[:, None] * falloff
    return falloff, raw, jnp.where(raw >= MIN_ALPHA, jnp.minimum(raw, MAX_ALPHA), 0.0)


def _segment_rows(
    pairs: jax.Array, block: _Block, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segment `step` of every list in the block, from rows in the order of the lists.

    → rows [SEGMENT, BLOCK, 6 + C], opacity [SEGMENT, BLOCK] (0 past the end of a list) and place
    in the lists [SEGMENT, BLOCK].
    """
    position = step * SEGMENT + jnp.arange(SEGMENT, dtype=jnp.int32)[:, None]
    place = jnp.minimum(block.start + position, pairs.shape[0] - 1)
    rows = _take(pairs, place)
    return rows, jnp.where(position < block.length, rows[..., 5], 0.0), place


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")


def _unfinished(block: _Block, state: tuple) -> jax.Array:
    step, transmittance = state[0], state[1]
    return (step * SEGMENT < block.length.max()) & (transmittance.max() > MIN_TRANSMITTANCE)


def _pixel_offsets(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x and y of a tile's 64 pixel centres, from its corner."""
    pixel = jnp.arange(PIXELS, dtype=jnp.int32)
    return (pixel % TILE).astype(dtype) + 0.5, (pixel // TILE).astype(dtype) + 0.5


def _schedule(
    lists: TileLists, band: jax.Array, across: int, bands: int
) -> tuple[_Block, jax.Array]:
    """Blocks of tiles of like list length [n, BLOCK], and the tile order they came from."""
    missing = -lists.length.shape[0] % BLOCK
    length = jnp.pad(lists.length, (0, missing))
    start = jnp.pad(lists.start, (0, missing))
    order = jnp.argsort(-length)
    corner = jnp.stack([order % across, band + bands * (order // across)])
    corner = (corner.astype(jnp.float32) * TILE).reshape(2, -1, BLOCK).swapaxes(0, 1)
    return _Block(start[order].reshape(-1, BLOCK), length[order].reshape(-1, BLOCK), corner), order


def _reschedule(tiles: jax.Array, order: jax.Array) -> jax.Array:
    """[T, …] in image order → [n, BLOCK, …] in block order."""
    padded = jnp.pad(tiles, [(0, order.shape[0] - tiles.shape[0])] + [(0, 0)] * (tiles.ndim - 1))
    return padded[order].reshape(-1, BLOCK, *tiles.shape[1:])


def _unschedule(blocks: jax.Array, order: jax.Array) -> jax.Array:
    """Inverse of `_reschedule`, padding still at the end."""
    return (
        jnp.zeros((order.shape[0], *blocks.shape[2:]), blocks.dtype)
        .at[order]
        .set(blocks.reshape(-1, *blocks.shape[2:]), unique_indices=True)
    )
