"""Ray-traced clips of one known motion each: what curation has to keep, and what it must not.

A furnished room or a yard of data_prep.synthetic_scenes, seen by a camera that travels, turns,
zooms or stands, with or without something that moves by itself. 30 frames of 320 x 240 at 15 fps.
"""

import dataclasses
import functools

import cv2
import numpy as np
from curate_scenes import noisy

from data_prep.raytrace import Primitive, Texture, World, render
from data_prep.synthetic_scenes import _noise, _picture, camera_path, furnished_room, yard
from see3d_jax.geometry.cameras import look_at

WIDTH, HEIGHT, FRAMES, FPS = 320, 240, 30, 15.0
K = np.array([[280.0, 0, WIDTH / 2], [0, 280.0, HEIGHT / 2], [0, 0, 1]])
TIMES = np.linspace(0, 1, FRAMES)


def pose(eye, target):
    return look_at(np.array(eye, float), np.array(target, float), up=(0.0, 0.0, 1.0))


def travel(eyes, targets):
    """Camera from one place to another, looking from one point to another."""
    (a, b), (c, d) = np.array(eyes), np.array(targets)
    return [pose(a + (b - a) * t, c + (d - c) * t) for t in TIMES]


def shaken(poses, seed, shift=0.004, turn=0.004):
    """The same camera in a hand: smoothed noise of `shift` metres and `turn` radians."""
    noise = np.random.default_rng(seed).normal(size=(len(poses) + 2, 6))
    noise = (noise[:-2] + 2 * noise[1:-1] + noise[2:]) / 4
    moved = []
    for camera, value in zip(poses, noise, strict=True):
        step = np.eye(4)
        step[:3, :3] = cv2.Rodrigues(value[:3] * turn)[0]
        step[:3, 3] = value[3:] * shift
        moved.append(step @ camera)
    return moved


def with_things(world, things, textures):
    """The world with more primitives; their textures are counted from the new ones."""
    first = len(world.textures)
    things = tuple(
        dataclasses.replace(thing, textures=tuple(first + t for t in thing.textures))
        for thing in things
    )
    return dataclasses.replace(
        world, primitives=world.primitives + things, textures=world.textures + tuple(textures)
    )


def box(place, half, yaw=0.0, texture=0):
    return Primitive("box", tuple(place), half, (texture,) * 4, yaw=yaw)


def zoomed(factor):
    return K * np.array([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])


class Scenes:
    """Worlds as functions of time t in 0..1, and the cameras that look at them."""

    def __init__(self, seed):
        room, self.yard = (
            furnished_room(np.random.default_rng(seed)),
            yard(np.random.default_rng(seed + 100)),
        )
        self.scene, self.room, self.focus, self.seed = room, room.world, room.focus, seed
        self.skins = [Texture(_picture(np.random.default_rng(seed + i))) for i in (7, 8)]
        f, y = self.focus, self.yard.focus
        self.slide = travel(
            [f + [-0.45, -1.6, 0.5], f + [0.45, -1.6, 0.5]], [f - [0.2, 0, 0], f + [0.2, 0, 0]]
        )
        self.still = [pose(f + [0, -1.6, 0.5], f)] * FRAMES
        self.turn = [pose(f + [0, -1.6, 0.5], f + [0.8 * t - 0.4, 0, 0]) for t in TIMES]
        self.yard_slide = travel(
            [y + [-1.2, -5, 1.8], y + [1.2, -5, 1.8]], [y - [0.5, 0, 0.6], y + [0.5, 0, -0.6]]
        )

    def path(self, kind):
        return camera_path(self.scene, kind, FRAMES, K, np.random.default_rng(self.seed + 1))

    def turned_box(self, t, size=1.0):
        """Somebody turns a box in front of the camera."""
        f = self.focus
        place = (f[0] + 0.12 * np.sin(5 * t), f[1] - 0.7, f[2] + 0.25 + 0.05 * np.sin(7 * t))
        half = (0.26 * size, 0.1 * size, 0.16 * size)
        return with_things(self.room, [box(place, half, yaw=1.8 * t)], self.skins[:1])

    def passing_box(self, t):
        """Something walks by: not at an even speed."""
        f, along = self.focus, t + 0.12 * np.sin(3 * np.pi * t)
        place = (f[0] - 0.75 + 1.5 * along, f[1] - 0.7, f[2] + 0.2 + 0.03 * np.sin(14 * t))
        return with_things(
            self.room, [box(place, (0.2, 0.2, 0.3), 0.3 * np.sin(4 * t))], self.skins[1:]
        )

    def falling_box(self, t):
        place = self.focus + [0, -0.5, 0.8 - 0.7 * t]
        return with_things(self.room, [box(place, (0.2, 0.2, 0.22))], self.skins[1:])

    def tiny_mover(self, t):
        place = self.focus + [0.5 * t - 0.2, -0.2, 0.3]
        return with_things(self.room, [box(place, (0.03,) * 3)], self.skins[:1])

    @functools.cached_property
    def film(self):
        return cv2.resize(_picture(np.random.default_rng(self.seed + 3)), (512, 384))

    def screen(self, t):
        """A large screen shows another moving camera."""
        x = int(120 + 110 * np.sin(6.7 * t + 1))
        y = int(90 + 80 * np.sin(10 * t))
        picture = Texture(np.ascontiguousarray(self.film[y : y + 192, x : x + 256]))
        return with_things(
            self.room, [box(self.focus + [0.1, -0.1, 0.32], (0.55, 0.03, 0.4))], [picture]
        )

    @functools.cached_property
    def waves(self):
        generator = np.random.default_rng(self.seed + 4)
        return [_noise(generator, 256, 1.2) for _ in range(3)]

    def water(self, t):
        """The ground of the yard is a lake: three patterns drift through each other."""
        steps = round(t * (FRAMES - 1))
        a, b, c = self.waves
        height = np.roll(a, 3 * steps, 0) + np.roll(b, -4 * steps, 1) + np.roll(c, 5 * steps, 0)
        height = (height - height.min()) / (height.max() - height.min())
        colour = np.stack([height * 0.5 + 0.1, height * 0.6 + 0.2, height * 0.5 + 0.4], -1)
        world, last = self.yard.world, len(self.yard.world.textures)
        ground = world.primitives[0]
        ground = dataclasses.replace(ground, textures=(*ground.textures[:3], last))
        lake = Texture(colour.astype(np.float32), 2.0)
        return dataclasses.replace(
            world, primitives=(ground, *world.primitives[1:]), textures=(*world.textures, lake)
        )

    def twigs(self, t):
        """90 leafy twigs before the camera, each swaying in its own rhythm; calm at t = 0."""
        generator, focus, things = np.random.default_rng(self.seed + 5), self.yard.focus, []
        for index in range(90):
            x, z = generator.uniform(-1.6, 1.6), generator.uniform(0.3, 2.4)
            y, side = generator.uniform(-3.4, -2.2), generator.uniform(0.07, 0.16)
            phase, rate = generator.uniform(0, 6), generator.uniform(6, 13)
            sway = np.sin(rate * t + phase)
            place = (focus[0] + x + 0.1 * sway, focus[1] + y, z + 0.04 * np.cos(rate * t + phase))
            half = (side, 0.4 * side, side)
            things.append(box(place, half, phase + 0.6 * sway, texture=index % 2))
        return with_things(self.yard.world, things, self.skins)

    def wall(self):
        return World(
            (Primitive("room", (0, 0, 3), (20, 6, 4), (0, 0, 0, 0), repeat=2.5),),
            (self.skins[0],), (0, 0, 5), 0.1, 50.0,
        )  # fmt: skip

    def slideshow(self):
        """Three photos, each with a slow pan and zoom."""
        generator, frames = np.random.default_rng(self.seed + 6), []
        for _ in range(3):
            photo = cv2.resize((255 * _picture(generator)).astype(np.uint8), (480, 360))
            for t in np.linspace(0, 1, 12):
                w, h = int(WIDTH / (1 + 0.25 * t)), int(HEIGHT / (1 + 0.25 * t))
                x, y = int(20 + 60 * t), int(20 + 30 * t)
                frames.append(cv2.resize(photo[y : y + h, x : x + w], (WIDTH, HEIGHT)))
        return frames

    def clips(self):
        """name → (world of t, cameras, intrinsics of t); keep_* has to be kept, reject_* not."""
        room, y = lambda t: self.room, self.yard.focus
        forward = travel([y + [0, -7, 0.6], y + [0, -4, 0.6]], [y, y])
        past = travel([(-2, 1, 3), (1, 2, 3.2)], [(-1, 6, 3), (1.5, 6, 3)])
        plain, hand = lambda t: K, lambda poses: shaken(poses, self.seed)
        calm = lambda t: self.twigs(0)  # noqa: E731
        return {
            "keep_orbit": (room, lambda: self.path("orbit"), plain),
            "keep_walk": (room, lambda: self.path("walk"), plain),
            "keep_slide_in_hand": (room, hand(self.slide), plain),
            "keep_forward": (lambda t: self.yard.world, hand(forward), plain),
            "keep_past_a_flat_wall": (lambda t: self.wall(), hand(past), plain),
            "keep_tiny_mover": (self.tiny_mover, self.slide, plain),
            "keep_calm_twigs": (calm, self.yard_slide, plain),
            "reject_turn": (room, self.turn, plain),
            "reject_zoom": (room, self.still, lambda t: zoomed(1 + 0.6 * t)),
            "reject_turn_and_zoom": (room, self.turn, lambda t: zoomed(1 + 0.3 * t)),
            "reject_standing_in_hand": (room, hand(self.still), plain),
            "reject_box_turned_before_standing": (self.turned_box, self.still, plain),
            "reject_box_turned_before_hand": (
                lambda t: self.turned_box(t, 1.5), hand(self.still), plain),
            "reject_box_turned_before_slide": (self.turned_box, self.slide, plain),
            "reject_passing_before_hand": (self.passing_box, hand(self.still), plain),
            "reject_passing_before_turn": (self.passing_box, self.turn, plain),
            "reject_falling_before_slide": (self.falling_box, self.slide, plain),
            "reject_screen_before_slide": (self.screen, self.slide, plain),
            "reject_screen_before_standing": (self.screen, self.still, plain),
            "reject_water_before_slide": (self.water, self.yard_slide, plain),
            "reject_water_before_standing": (self.water, self.yard_slide[15:16] * FRAMES, plain),
            "reject_twigs_before_slide": (self.twigs, self.yard_slide, plain),
            "reject_twigs_before_standing": (self.twigs, self.yard_slide[15:16] * FRAMES, plain),
            "reject_light_before_standing": (self.moving_light, self.still, plain),
        }  # fmt: skip

    def moving_light(self, t):
        x, y, z = self.room.light
        return dataclasses.replace(self.room, light=(x - 1.2 + 2.4 * t, y, z), ambient=0.25)


def film(seed, name):
    """uint8 RGB frames of one clip, with a little sensor noise."""
    scenes = Scenes(seed)
    if name == "reject_slideshow":
        return noisy(scenes.slideshow())
    world, cameras, intrinsics = scenes.clips()[name]
    cameras = cameras() if callable(cameras) else cameras
    return noisy([
        render(world(t), intrinsics(t), camera, WIDTH, HEIGHT, 1)[0]
        for t, camera in zip(TIMES, cameras, strict=True)
    ])  # fmt: skip
