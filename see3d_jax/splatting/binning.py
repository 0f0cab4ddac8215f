"""Which Gaussians touch which 8×8 tile, front to back: lists of fixed capacity, never truncated.

Every (tile, Gaussian) candidate gets one integer key `tile | depth rank`; sorting the keys alone
(no payload) yields all lists at once. Array sizes are static, so the caller chooses a capacity;
the true number of pairs is returned, and a result with `pair_count > capacity` must be thrown away
and computed again with a larger capacity (`render.render` and `fit` do).

An image may be split into bands for several devices: band b of B holds the tile rows b, b + B,
b + 2B, … Interleaved rows share the work evenly, whether the sky is above or the floor below.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from see3d_jax.splatting.projection import MIN_ALPHA, Projected

TILE = 8
# Shares of a generous capacity for which code is compiled: the least that suffices is worked off.
ROOMS = (0.375, 0.5, 0.625, 1.0)
# With more Gaussians than this at exactly one depth, depths are sorted the slower way.
MAX_TWINS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """Depth-ordered lists of Gaussians per tile (tiles row by row, T of them).

    Attributes:
      gaussian: [capacity] int32, the lists of all tiles one after the other.
      start, length: [T] int32, where a tile's list begins and how long it is.
      pair_count: [] int32, capacity that was needed; the lists are valid only if it sufficed.
    """

    gaussian: jax.Array
    start: jax.Array
    length: jax.Array
    pair_count: jax.Array


def tile_grid(width: int, height: int) -> tuple[int, int]:
    """Image size → (tiles across, tiles down)."""
    return -(-width // TILE), -(-height // TILE)


def band_rows(height: int, bands: int) -> int:
    """Tile rows that each band holds, the ones below the image of the last bands included."""
    return -(-tile_grid(1, height)[1] // bands)


def bin_gaussians(
    projected: Projected,
    width: int,
    height: int,
    capacity: int,
    band: jax.Array | int = 0,
    bands: int = 1,
    generous: bool = False,
) -> TileLists:
    """Builds the tile lists of one band of an image (by default all of it).

    `capacity`, `bands` and `generous` are static, `band` is not; see the module docstring.
    A generous capacity is expected to be far more than is needed: sorting then takes as long as
    the pairs ask for (by `ROOMS`), and compiling longer.
    """
    projected = jax.lax.stop_gradient(projected)
    across = tile_grid(width, height)[0]
    tiles, number = across * band_rows(height, bands), projected.depths.shape[0]
    drawn, first, span, pair_count = _tile_spans(projected, width, height, band, bands)
    count = span[0] * span[1]
    offset = jnp.cumsum(count) - count

    rank = _depth_ranks(drawn, projected.depths)
    order = jnp.zeros(number, jnp.int32).at[rank].set(jnp.arange(number, dtype=jnp.int32))

    def lists(room: int) -> tuple[jax.Array, jax.Array]:
        # Pair p belongs to the Gaussian whose range [offset, offset + count) holds p.
        pair = jnp.arange(room, dtype=jnp.int32)
        owner = jnp.repeat(jnp.arange(number, dtype=jnp.int32), count, total_repeat_length=room)
        within = pair - offset[owner]
        across_owner = jnp.maximum(span[0][owner], 1)
        tile_x = first[0][owner] + within % across_owner
        tile_y = first[1][owner] + within // across_owner
        kept = (pair < pair_count) & _touches(projected, owner, tile_x, band + bands * tile_y)
        tile = jnp.where(kept, tile_y * across + tile_x, tiles)
        tile, sorted_rank = _sort_pairs(tile, rank[owner], tiles, number)
        edges = jnp.searchsorted(tile, jnp.arange(tiles + 1, dtype=tile.dtype)).astype(jnp.int32)
        return jnp.pad(order[sorted_rank], (0, capacity - room)), edges

    rooms = [int(share * capacity) for share in ROOMS] if generous else [capacity]
    level = sum(pair_count > room for room in rooms[:-1])
    gaussian, edges = jax.lax.switch(level, [partial(lists, room) for room in rooms])
    return TileLists(gaussian, edges[:-1], jnp.diff(edges), pair_count)


def count_pairs(projected: Projected, width: int, height: int, bands: int = 1) -> jax.Array:
    """[] int32: the capacity that the fullest of an image's bands needs."""
    counts = [_tile_spans(projected, width, height, b, bands)[-1] for b in range(bands)]
    return jnp.stack(counts).max()


def _depth_ranks(drawn: jax.Array, depths: jax.Array) -> jax.Array:
    """[N] int32: place of every drawn Gaussian in the order of depth (> 0), nearest first.

    Of equal depths the lower index comes first. Gaussians that are not drawn share the place N.
    """
    number = depths.shape[0]
    index = jnp.arange(number, dtype=jnp.int32)
    # Positive floats sort like their bits, and bare uint32 sort five times faster than floats.
    bits = jax.lax.bitcast_convert_type(jnp.where(drawn, depths, jnp.inf), jnp.uint32)
    place = jnp.searchsorted(jnp.sort(bits), bits).astype(jnp.int32)

    # Equal depths share their first place: all but the lowest index move on by one, and again.
    def beaten(place: jax.Array) -> jax.Array:
        lowest = jnp.full(number, number, jnp.int32).at[place].min(jnp.where(drawn, index, number))
        return drawn & (lowest[place] != index)

    def move_on(state: tuple) -> tuple:
        turn, place, moving = state
        place = place + moving
        return turn + 1, place, beaten(place)

    start = (jnp.int32(0), place, beaten(place))
    _, place, moving = jax.lax.while_loop(
        lambda state: state[-1].any() & (state[0] < MAX_TWINS), move_on, start
    )

    def by_order(bits: jax.Array) -> jax.Array:
        return jnp.zeros_like(index).at[jnp.argsort(bits)].set(index)

    place = jax.lax.cond(moving.any(), by_order, lambda _: place, bits)
    return jnp.where(drawn, place, number)


def _tile_spans(
    projected: Projected, width: int, height: int, band: jax.Array | int, bands: int
) -> tuple[jax.Array, ...]:
    """→ drawn [N], first tile and number of tiles [2, N] (x; rows of the band), pair count []."""
    across, down = tile_grid(width, height)
    limit = jnp.array([[across], [down]], jnp.int32)
    lower, upper = projected.means - projected.extents, projected.means + projected.extents
    first = jnp.clip(_floor_to_tile(lower, limit), 0, limit)
    last = jnp.clip(_floor_to_tile(upper, limit) + 1, 0, limit)
    # ⌈(row − band) / bands⌉ of the band's rows lie above a row.
    first, last = (x.at[1].set((x[1] - band + bands - 1) // bands) for x in (first, last))
    drawn = projected.extents.min(0) > 0
    span = jnp.where(drawn, jnp.maximum(last - first, 0), 0)  # [2, N] tiles across, down
    count = span[0] * span[1]
    # Sums of int32 wrap silently; a float sum tells an absurd scene from a small one.
    pair_count = jnp.where(
        count.astype(jnp.float32).sum() > 2.0**30, jnp.int32(2**30), count.sum(dtype=jnp.int32)
    )
    return drawn, first, span, pair_count


def _floor_to_tile(pixels: jax.Array, limit: jax.Array) -> jax.Array:
    # Clip as floats first: a huge or infinite coordinate has no int32.
    return jnp.clip(jnp.floor(pixels / TILE), -1.0, limit.astype(pixels.dtype)).astype(jnp.int32)


def _touches(
    projected: Projected, owner: jax.Array, tile_x: jax.Array, tile_y: jax.Array
) -> jax.Array:
    """Whether any pixel centre of the tile can reach MIN_ALPHA (conservative by a rounding hair).

    The bounding box of a slanted, thin Gaussian holds mostly tiles it never touches. The smallest
    z1² + z2² over the tile lies at the mean or on one of the two edges that face the mean.
    """
    mean_x, mean_y = projected.means[0][owner], projected.means[1][owner]
    l11, l21, l22 = (row[owner] for row in projected.cholesky)
    left, top = tile_x * TILE + 0.5 - mean_x, tile_y * TILE + 0.5 - mean_y
    right, bottom = left + (TILE - 1), top + (TILE - 1)
    edge_x, edge_y = jnp.clip(0.0, left, right), jnp.clip(0.0, top, bottom)

    def squared(x: jax.Array, y: jax.Array) -> jax.Array:
        return (l11 * x + l21 * y) ** 2 + (l22 * y) ** 2

    best_y = jnp.clip(-l11 * l21 * edge_x / (l21 * l21 + l22 * l22), top, bottom)
    best_x = jnp.clip(-l21 * edge_y / l11, left, right)
    nearest = jnp.minimum(squared(edge_x, best_y), squared(best_x, edge_y))
    reach = 2.0 * jnp.log(jnp.maximum(projected.opacities[owner] / MIN_ALPHA, 1.0))
    return nearest <= reach * 1.001 + 1e-3


def _sort_pairs(
    tile: jax.Array, rank: jax.Array, tiles: int, number: int
) -> tuple[jax.Array, jax.Array]:
    """Sorts pairs by tile, then depth rank; one key where both fit 32 bits."""
    rank_bits = max(1, (number - 1).bit_length())
    if tiles.bit_length() + rank_bits > 32:
        tile, rank = jax.lax.sort((tile, rank), num_keys=2)
        return tile, rank
    # A stable sort of bare uint32 is the fast path of XLA on CPU, 3× over the unstable one.
    key = jax.lax.sort((tile.astype(jnp.uint32) << rank_bits) | rank.astype(jnp.uint32))
    return (key >> rank_bits).astype(jnp.int32), (key & ((1 << rank_bits) - 1)).astype(jnp.int32)
