"""A small ray tracer for textured scenes with exact depth, in plain NumPy.

Made for synthetic training clips: boxes, spheres, upright cylinders and one enclosing room, photo
textures with mip levels, one light with soft shadows. Shading is view-independent (no highlights),
so that every view shows the same surface colours. Light is added up in linear colour.

World axes: x, y horizontal, z up, metres. Rays are arrays of separate x, y, z components, because
NumPy is fastest on contiguous ones. A ray direction has camera z = 1, so that the ray parameter t
is the planar depth.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]
_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True)
class Primitive:
    """One object.

    Attributes:
      kind: "box", "sphere", "cylinder" (upright) or "room" (a box seen from inside).
      centre: (x, y, z).
      half: half extents (x, y, z) of a box or room; (radius, radius, half height) of a cylinder;
        (radius, radius, radius) of a sphere.
      yaw: rotation about z in radians.
      textures: indices into World.textures for the (±x sides, ±y sides, top, bottom).
      repeat: metres covered by one texture height; 0 stretches the texture over each face.
      casts_shadow: flat things on walls need none, and it saves time.
    """

    kind: str
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    textures: tuple[int, int, int, int]
    yaw: float = 0.0
    repeat: float = 0.0
    casts_shadow: bool = True


class Texture:
    """An image in linear colour with its mip levels, sampled with mirrored repetition."""

    def __init__(self, image: np.ndarray, scale: float = 1.0) -> None:
        """`image` is [h, w, 3] float32 in [0, 1], sRGB; `scale` multiplies Primitive.repeat."""
        self.scale = scale
        level = np.asarray(image, np.float32) ** 2.2
        levels = [level]
        while min(level.shape[:2]) >= 4:
            level = _block_mean(level[: level.shape[0] // 2 * 2, : level.shape[1] // 2 * 2], 2)
            levels.append(level)
        self.height, self.width = image.shape[:2]
        self._sizes = np.array([lv.shape[:2] for lv in levels], np.int32)
        counts = self._sizes.prod(1)
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
        self._texels = np.concatenate([lv.reshape(-1, 3) for lv in levels]).astype(np.float32)

    def sample(self, u: np.ndarray, v: np.ndarray, texels_per_sample: np.ndarray) -> np.ndarray:
        """Colours [N, 3] at u, v [N] (1 = one repetition) from the level fitting the footprint."""
        level = np.log2(np.maximum(texels_per_sample, 1.0))
        level = np.minimum((level + 0.5).astype(np.int32), len(self._sizes) - 1)
        height, width = self._sizes[level, 0], self._sizes[level, 1]
        x = _mirror(u) * width - np.float32(0.5)
        y = _mirror(v) * height - np.float32(0.5)
        x = np.clip(x, 0, width - 1).astype(np.float32)
        y = np.clip(y, 0, height - 1).astype(np.float32)
        column, row = x.astype(np.int32), y.astype(np.int32)
        fx, fy = (x - column)[:, None], (y - row)[:, None]
        right = np.minimum(column + 1, width - 1)
        upper = self._starts[level] + row * width
        lower = self._starts[level] + np.minimum(row + 1, height - 1) * width
        take = self._texels.take
        top = take(upper + column, 0) * (1 - fx) + take(upper + right, 0) * fx
        bottom = take(lower + column, 0) * (1 - fx) + take(lower + right, 0) * fx
        return top * (1 - fy) + bottom * fy


@dataclasses.dataclass(frozen=True)
class World:
    """A scene: primitives (the first is the enclosing room), textures and one light.

    `light` is its position; `light_radius` its size (softness of shadows); light falls off beyond
    `light_reach` metres; `ambient` is the light that reaches shadowed surfaces too.
    """

    primitives: tuple[Primitive, ...]
    textures: tuple[Texture, ...]
    light: tuple[float, float, float]
    light_radius: float
    light_reach: float
    light_power: float = 1.0
    ambient: float = 0.4


def render(
    world: World, intrinsics: np.ndarray, world_to_camera: np.ndarray, width: int, height: int,
    supersample: int = 2,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One view → uint8 RGB [height, width, 3] and planar depth [height, width] float32.

    Colour is the mean of supersample² rays per pixel; depth is that of the ray through the pixel
    centre. OpenCV axes, world→camera [4, 4], intrinsics [3, 3] in pixels.
    """
    scale = supersample
    origin, rays = _camera_rays(intrinsics, world_to_camera, width, height, scale)
    t, hit = _trace(world, origin, rays, intrinsics, world_to_camera, scale)
    colour = _shade(world, origin, rays, t, hit, 1.0 / (intrinsics[0, 0] * scale), scale)
    image = np.clip(_block_mean(colour, scale), 0, 1) ** np.float32(1 / 2.2)
    return np.round(image * 255).astype(np.uint8), depth(
        world, intrinsics, world_to_camera, width, height
    )


def depth(
    world: World, intrinsics: np.ndarray, world_to_camera: np.ndarray, width: int, height: int
) -> np.ndarray:
    """Planar depth [height, width] float32 of the rays through the pixel centres."""
    origin, rays = _camera_rays(intrinsics, world_to_camera, width, height, 1)
    return _trace(world, origin, rays, intrinsics, world_to_camera, 1)[0]


def clearance(world: World, point: np.ndarray) -> float:
    """Distance in metres from a point to the nearest surface; negative inside an object."""
    distances = []
    for primitive in world.primitives:
        x, y, z = (float(v) for v in _to_local(primitive, tuple(np.asarray(point, np.float32))))
        hx, hy, hz = primitive.half
        if primitive.kind == "sphere":
            distances.append(np.sqrt(x * x + y * y + z * z) - hx)
        elif primitive.kind == "cylinder":
            distances.append(_outside(np.array([np.hypot(x, y) - hx, abs(z) - hz])))
        else:
            distance = _outside(np.array([abs(x) - hx, abs(y) - hy, abs(z) - hz]))
            distances.append(-distance if primitive.kind == "room" else distance)
    return float(min(distances))


def _outside(excess: np.ndarray) -> float:
    """Signed distance from how far a point exceeds each extent."""
    return float(np.linalg.norm(np.maximum(excess, 0)) + min(excess.max(), 0.0))


def _block_mean(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over size × size blocks; strided sums are several times faster than a 5-D mean."""
    blocks = [image[r::size, c::size] for r in range(size) for c in range(size)]
    return sum(blocks[1:], blocks[0]) / np.float32(len(blocks))


def _mirror(u: np.ndarray) -> np.ndarray:
    """Folds any coordinate into [0, 1], mirrored at every whole number, so tiles have no seams."""
    folded = np.abs(u) % np.float32(2)
    return np.where(folded > 1, 2 - folded, folded)


def _camera_rays(
    intrinsics: np.ndarray, world_to_camera: np.ndarray, width: int, height: int, scale: int
) -> tuple[tuple[np.float32, ...], Vector]:
    """Camera centre and ray directions (each [height·scale, width·scale], camera z = 1)."""
    k = np.asarray(intrinsics, np.float64)
    x = ((np.arange(width * scale) + 0.5) / scale - k[0, 2]) / k[0, 0]
    y = ((np.arange(height * scale) + 0.5) / scale - k[1, 2]) / k[1, 1]
    rotation = np.asarray(world_to_camera, np.float64)[:3, :3]
    origin = -rotation.T @ np.asarray(world_to_camera, np.float64)[:3, 3]
    rays = tuple(
        (rotation[0, a] * x[None, :] + (rotation[1, a] * y + rotation[2, a])[:, None]).astype(
            np.float32
        )
        for a in range(3)
    )
    return tuple(np.float32(v) for v in origin), rays


def _trace(
    world: World, origin: tuple, rays: Vector, intrinsics: np.ndarray,
    world_to_camera: np.ndarray, scale: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Nearest hit of every camera ray: t (planar depth) and the primitive's index."""
    t = np.full(rays[0].shape, np.inf, np.float32)
    hit = np.zeros(rays[0].shape, np.uint8)
    for index, primitive in enumerate(world.primitives):
        rows, columns = _screen_bounds(primitive, intrinsics, world_to_camera, scale, t.shape)
        part = tuple(r[rows, columns] for r in rays)
        if not part[0].size:
            continue
        found = _intersect(primitive, _to_local(primitive, origin), _turn(primitive, part))
        nearer = found < t[rows, columns]
        t[rows, columns][nearer] = found[nearer]
        hit[rows, columns][nearer] = index
    return t, hit


def _screen_bounds(
    primitive: Primitive, intrinsics: np.ndarray, world_to_camera: np.ndarray, scale: int,
    shape: tuple[int, ...],
) -> tuple[slice, slice]:  # fmt: skip
    """Rows and columns that the primitive's bounding sphere can touch."""
    whole = slice(0, shape[0]), slice(0, shape[1])
    if primitive.kind == "room":
        return whole
    radius = primitive.half[0] if primitive.kind == "sphere" else np.linalg.norm(primitive.half)
    centre = np.asarray(world_to_camera, np.float64) @ np.array([*primitive.centre, 1.0])
    near, far = centre[2] - radius, centre[2] + radius
    if far <= 0:
        return slice(0, 0), slice(0, 0)
    if near < 0.01:
        return whole
    bounds = []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        low, high = centre[axis] - radius, centre[axis] + radius
        k = np.asarray(intrinsics, np.float64)[axis]
        first = min(low / near, low / far) * k[axis] + k[2]
        last = max(high / near, high / far) * k[axis] + k[2]
        start = int(np.clip(np.floor(first * scale), 0, size))
        bounds.append(slice(start, int(np.clip(np.ceil(last * scale) + 1, start, size))))
    return bounds[0], bounds[1]


def _turn(primitive: Primitive, vector: Vector) -> Vector:
    """Rotates a direction into the primitive's axes."""
    if primitive.yaw == 0:
        return vector
    c, s = np.float32(np.cos(primitive.yaw)), np.float32(np.sin(primitive.yaw))
    x, y, z = vector
    return c * x + s * y, c * y - s * x, z


def _to_local(primitive: Primitive, point: Vector) -> Vector:
    return _turn(
        primitive, tuple(p - np.float32(c) for p, c in zip(point, primitive.centre, strict=True))
    )


def _intersect(primitive: Primitive, origin: Vector, direction: Vector) -> np.ndarray:
    """Smallest t > 0 at which local rays meet the surface, infinity where they miss."""
    if primitive.kind == "sphere":
        near, far = _quadric(origin, direction, primitive.half[0], 3)
    elif primitive.kind == "cylinder":
        near, far = _quadric(origin, direction, primitive.half[0], 2)
        low, high = _slab(origin[2], direction[2], primitive.half[2])
        near, far = np.maximum(near, low), np.minimum(far, high)
    else:
        near, far = _slab(origin[0], direction[0], primitive.half[0])
        for axis in (1, 2):
            low, high = _slab(origin[axis], direction[axis], primitive.half[axis])
            near, far = np.maximum(near, low), np.minimum(far, high)
        if primitive.kind == "room":
            return far
    return np.where((near < far) & (near > _EPSILON), near, np.float32(np.inf))


def _slab(origin: np.ndarray, direction: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of t between the planes ±half."""
    inverse = 1 / np.where(np.abs(direction) < 1e-9, np.float32(1e-9), direction)
    middle, reach = -origin * inverse, np.abs(np.float32(half) * inverse)
    return middle - reach, middle + reach


def _quadric(
    origin: Vector, direction: Vector, radius: float, axes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of t inside a sphere (3 axes) or an infinite upright cylinder (2 axes)."""
    a = sum(direction[i] * direction[i] for i in range(axes))
    b = sum(origin[i] * direction[i] for i in range(axes))
    c = sum(origin[i] * origin[i] for i in range(axes)) - np.float32(radius * radius)
    a = np.maximum(a, np.float32(1e-12))
    root = b * b - a * c
    missed = root < 0
    root = np.sqrt(np.maximum(root, 0))
    inverse = 1 / a
    near = np.where(missed, np.float32(np.inf), (-b - root) * inverse)
    return near, np.where(missed, -np.float32(np.inf), (-b + root) * inverse)


def _shade(
    world: World, origin: tuple, rays: Vector, t: np.ndarray, hit: np.ndarray,
    sample_angle: float, scale: int,
) -> np.ndarray:  # fmt: skip
    """Linear colour [rows, columns, 3] of the hits: texture × (ambient + shadowed light)."""
    shape = t.shape
    points = tuple((o + t * r).ravel() for o, r in zip(origin, rays, strict=True))
    t, hit = t.ravel(), hit.ravel()
    albedo = np.empty((t.size, 3), np.float32)
    normal = np.empty((3, t.size), np.float32)
    for index in np.flatnonzero(np.bincount(hit)):
        primitive = world.primitives[index]
        chosen = np.flatnonzero(hit == index)
        local = _to_local(primitive, tuple(p[chosen] for p in points))
        local_normal, u, v, face = _surface(primitive, local)
        c, s = np.cos(primitive.yaw), np.sin(primitive.yaw)
        normal[0, chosen] = c * local_normal[0] - s * local_normal[1]
        normal[1, chosen] = s * local_normal[0] + c * local_normal[1]
        normal[2, chosen] = local_normal[2]
        footprint = t[chosen] * np.float32(sample_angle * 1.4)
        for number in set(primitive.textures):
            texture = world.textures[number]
            if primitive.textures.count(number) == 4:
                on = slice(None)
            else:
                on = np.flatnonzero(np.array(primitive.textures)[face] == number)
            if primitive.repeat:
                repeat = primitive.repeat * texture.scale
                uu, vv = u[on] / (repeat * texture.width / texture.height), v[on] / repeat
                texels_per_metre = texture.height / repeat
            else:
                uu, vv = _stretched(primitive, u[on], v[on], face[on])
                texels_per_metre = texture.height / (2 * primitive.half[2])
            albedo[chosen[on]] = texture.sample(uu, vv, footprint[on] * texels_per_metre)
    light = _received_light(world, points, normal, shape, scale)
    return (albedo * light[:, None]).reshape(*shape, 3)


def _surface(
    primitive: Primitive, local: Vector
) -> tuple[Vector, np.ndarray, np.ndarray, np.ndarray]:
    """Local normals, texture coordinates in metres (v downward) and face (0 ±x, 1 ±y, 2 +z, 3 −z).

    u runs to the right for someone who looks at the face, so that pictures are not mirrored.
    """
    x, y, z = local
    hx, hy, hz = (np.float32(h) for h in primitive.half)
    zero = np.zeros_like(x)
    if primitive.kind == "sphere":
        normal = (x / hx, y / hx, z / hx)
        u, v = np.arctan2(y, x) * hx, -np.arcsin(np.clip(z / hx, -1, 1)) * hx
        return normal, u, v, np.zeros(x.shape, np.uint8)
    inside = np.float32(-1 if primitive.kind == "room" else 1)
    if primitive.kind == "cylinder":
        across = np.hypot(x, y)
        cap = np.abs(z) / hz > across / hx
        safe = np.maximum(across, 1e-9)
        normal = (np.where(cap, 0, x / safe), np.where(cap, 0, y / safe),
                  np.where(cap, np.sign(z), 0))  # fmt: skip
        u = np.where(cap, x, np.arctan2(y, x) * hx)
        face = np.where(cap, np.where(z > 0, 2, 3), 0).astype(np.uint8)
        return normal, u, np.where(cap, y, -z), face
    ax, ay, az = np.abs(x) / hx, np.abs(y) / hy, np.abs(z) / hz
    on_x = (ax >= ay) & (ax >= az)
    on_y = ~on_x & (ay >= az)
    on_z = ~(on_x | on_y)
    normal = tuple(
        np.where(on, np.sign(c) * inside, zero) for on, c in ((on_x, x), (on_y, y), (on_z, z))
    )
    u = np.where(on_x, np.sign(x) * inside * y, np.where(on_y, -np.sign(y) * inside * x, x))
    v = np.where(on_z, y, -z)
    face = np.where(on_x, 0, np.where(on_y, 1, np.where(z > 0, 2, 3))).astype(np.uint8)
    return normal, u, v, face


def _stretched(
    primitive: Primitive, u: np.ndarray, v: np.ndarray, face: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Metres on a face → [0, 1] over that face."""
    hx, hy, hz = (np.float32(h) for h in primitive.half)
    if primitive.kind == "sphere":
        return u / (np.pi * hx) + 1, v / (np.pi * hx) + np.float32(0.5)
    if primitive.kind == "cylinder":
        side = face == 0
        return (
            np.where(side, u / (np.pi * hx) + 1, (u / hx + 1) / 2),
            np.where(side, (v / hz + 1) / 2, (v / hx + 1) / 2),
        )
    half_u = np.where(face == 0, hy, hx)
    half_v = np.where(face >= 2, hy, hz)
    return (u / half_u + 1) / 2, (v / half_v + 1) / 2


def _received_light(
    world: World, points: Vector, normal: np.ndarray, shape: tuple[int, ...], scale: int
) -> np.ndarray:
    """[N] light on each hit. Each ray of a pixel asks another spot of the light: soft shadows."""
    position = _light_spots(world, shape, scale)
    to_light = tuple(np.float32(c) + s - p for c, s, p in zip(world.light, position, points))
    distance = np.sqrt(sum(c * c for c in to_light))
    facing = sum(n * c for n, c in zip(normal, to_light)) / distance
    lit = np.flatnonzero(facing > 0)
    start = tuple(p[lit] + n[lit] * np.float32(2e-3) for p, n in zip(points, normal))
    direction = tuple(c[lit] for c in to_light)
    blocked = np.zeros(lit.size, bool)
    for primitive in world.primitives:
        if primitive.casts_shadow and primitive.kind != "room":
            near = _in_shadow_cone(world, primitive, direction, distance[lit])
            found = _intersect(
                primitive,
                _to_local(primitive, tuple(c[near] for c in start)),
                _turn(primitive, tuple(c[near] for c in direction)),
            )
            blocked[near[found < 1]] = True
    fall_off = 1 / (1 + (distance[lit] / np.float32(world.light_reach)) ** 2)
    light = world.ambient * (0.85 + 0.15 * normal[2])  # a little more from above
    light[lit] += np.where(blocked, 0, world.light_power * facing[lit] * fall_off)
    return light


def _in_shadow_cone(
    world: World, primitive: Primitive, direction: Vector, distance: np.ndarray
) -> np.ndarray:
    """Indices of the rays to the light that may meet the primitive's bounding sphere.

    A cheap test that spares most points the full one: seen from the light, they must lie in the
    cone around the sphere, widened by the size of the light.
    """
    axis = np.asarray(primitive.centre) - np.asarray(world.light)
    radius = primitive.half[0] if primitive.kind == "sphere" else np.linalg.norm(primitive.half)
    far = np.linalg.norm(axis)
    sine = (radius + 2 * world.light_radius) / far
    if sine >= 1:
        return np.arange(distance.size)
    axis = (axis / far * -1).astype(np.float32)
    along = sum(a * c for a, c in zip(axis, direction))
    return np.flatnonzero(along > np.float32(np.sqrt(1 - sine * sine)) * distance)


def _light_spots(world: World, shape: tuple[int, ...], scale: int) -> Vector:
    """Offsets [N] of the light spot asked by each ray: a scale × scale grid over the light."""
    steps = ((np.arange(scale) + 0.5) / scale * 2 - 1) * world.light_radius
    rows = np.tile(steps, shape[0] // scale).astype(np.float32)
    columns = np.tile(steps, shape[1] // scale).astype(np.float32)
    y, x = np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None, :], shape)
    return x.ravel(), y.ravel(), np.zeros(y.size, np.float32)
