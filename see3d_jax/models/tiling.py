"""Large images through a network tile by tile, blended as the released pipeline does it.

Tiles overlap by a quarter and are cut at fixed offsets from the top left, so those at the right and
bottom may be small. Each tile is blended linearly into its upper, then its left neighbour, and that
neighbour is taken *as already blended* (the original blends in place, and its result depends on
it). A tile's normalisation statistics are its own: the result is close to the untiled one, not the
same. Memory is that of one tile; tiles of equal size share one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

OVERLAP = 0.25

Network = Callable[[jax.Array], jax.Array]


def map_rows(network: Network, x: jax.Array) -> jax.Array:
    """network(x) for x [N, ...], one row after the other, in the memory of one row."""
    if x.shape[0] == 1:
        return network(x)
    return jax.lax.map(lambda row: network(row[None])[0], x)


def map_tiles(network: Network, x: jax.Array, size_in: int, size_out: int) -> jax.Array:
    """Runs a network over overlapping tiles and blends the results.

    Args:
      network: [N, h, w, c] → [N, h·s, w·s, c'] with s = size_out / size_in.
      x: [N, H, W, c].
      size_in, size_out: side of a full tile before and after the network.

    Returns:
      [N, H·s, W·s, c'].

    Raises:
      ValueError: tiles of this size cannot be laid edge to edge.
    """
    step = int(size_in * (1 - OVERLAP))
    blend = int(size_out * OVERLAP)
    kept = size_out - blend
    if not step or step * size_out != kept * size_in:
        raise ValueError(
            f"tile_size: tiles of {size_in} (after the network {size_out}) do not meet when they "
            "overlap by a quarter; use a multiple of 32 pixels"
        )
    tops, lefts = range(0, x.shape[1], step), range(0, x.shape[2], step)
    tiles = {(i, j): x[:, i : i + size_in, j : j + size_in] for i in tops for j in lefts}
    tiles = _run_by_shape(network, tiles)
    rows = []
    for i in tops:
        row = []
        for j in lefts:
            if i > 0:
                tiles[i, j] = _blend(tiles[i - step, j], tiles[i, j], blend, axis=1)
            if j > 0:
                tiles[i, j] = _blend(tiles[i, j - step], tiles[i, j], blend, axis=2)
            row.append(tiles[i, j][:, :kept, :kept])
        rows.append(jnp.concatenate(row, 2))
    return jnp.concatenate(rows, 1)


def _run_by_shape(
    network: Network, tiles: dict[tuple[int, int], jax.Array]
) -> dict[tuple[int, int], jax.Array]:
    """The network's result for every tile; at most four shapes occur, so four traces."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, tile in tiles.items():
        groups.setdefault(tile.shape, []).append(place)
    done = {}
    for places in groups.values():
        results = jax.lax.map(network, jnp.stack([tiles[place] for place in places]))
        done.update(zip(places, results))
    return done


def _blend(before: jax.Array, tile: jax.Array, extent: int, axis: int) -> jax.Array:
    """Fades from the end of `before` into the start of `tile` along an axis; returns the tile."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if not extent:
        return tile
    share = jnp.arange(extent, dtype=tile.dtype) / extent
    share = share.reshape([-1 if a == axis else 1 for a in range(tile.ndim)])
    length = before.shape[axis]
    end = jax.lax.slice_in_dim(before, length - extent, length, axis=axis)
    start = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(tile, extent, tile.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - share) + start * share, rest], axis)
