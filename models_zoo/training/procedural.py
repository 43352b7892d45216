"""Procedural video: textured objects that move, turn and occlude before a moving camera.

Scenes are drawn in normalised coordinates, so one seed shows the same scene at every resolution and
length. A batch is one set of tensor operations over all objects, frames and pixels, on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OBJECTS = 4
"""Objects in a scene; some leave the view, later ones occlude earlier ones."""

WAVES = 5
"""Oriented gratings that make up one texture, 0.8 octaves apart on average."""

PETALS = (0.0, 1.0, 3.0, 4.0, 5.0, 6.0)
"""Shapes, equally likely: 0 is a disc, 1 a box, more are stars with that many arms."""


class Texture(NamedTuple):
    """Gratings mixed over two colours.

    across, down: (.., WAVES) in radians per unit; phase and weight (.., WAVES); sharpness (..),
    from soft shades to flat patches; checker (..), 1 for squares made of the first two gratings;
    the colours (.., 3) at either end, in [-1, 1].
    """

    across: Tensor
    down: Tensor
    phase: Tensor
    weight: Tensor
    sharpness: Tensor
    checker: Tensor
    dark: Tensor
    light: Tensor


class Scene(NamedTuple):
    """A batch of scenes; lengths in units of the frame's height, times in units of the clip.

    position, velocity, acceleration (B, O, 2) as x, y; radius, angle, spin, aspect, petals (B, O);
    pan (B, 2), zoom (B,) and roll (B,) of the camera over the clip; sun (B, 2), where light comes
    from; textures of the background (B, ..) and of the objects (B, O, ..).
    """

    position: Tensor
    velocity: Tensor
    acceleration: Tensor
    radius: Tensor
    angle: Tensor
    spin: Tensor
    aspect: Tensor
    petals: Tensor
    pan: Tensor
    zoom: Tensor
    roll: Tensor
    sun: Tensor
    background: Texture
    surface: Texture


class _Draws:
    """Uniform numbers made on the CPU in one go, moved to the device once, handed out in order."""

    COUNT = 5 + OBJECTS * 11 + (OBJECTS + 1) * (4 * WAVES + 9)

    def __init__(self, batch: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.rand(batch, self.COUNT, generator=generator)
        if device.type == "cuda":
            numbers = numbers.pin_memory()
        self.numbers = numbers.to(device, non_blocking=True)
        self.used = 0

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        count = math.prod(shape)
        self.used += count
        taken = self.numbers[:, self.used - count : self.used]
        return taken.reshape(-1, *shape) * (high - low) + low


def _draw_texture(draw: _Draws, shape: tuple[int, ...], coarse: float) -> Texture:
    turn = draw(*shape, WAVES, high=2 * math.pi)
    spread = draw(*shape, WAVES, low=-0.5, high=0.5)
    octave = torch.arange(WAVES, device=turn.device) + spread
    frequency = coarse * 2.0 ** (0.8 * octave)
    across, down = frequency * turn.cos(), frequency * turn.sin()
    checker = (draw(*shape) < 0.2).to(turn.dtype)
    square = checker[..., None] > 0
    # A checker's second grating crosses the first at a right angle and has its frequency.
    across = torch.where(square, _second(across, -down), across)
    down = torch.where(square, _second(down, frequency * turn.cos()), down)
    weight = draw(*shape, WAVES, low=0.2) ** (1 + 3 * draw(*shape, 1)) / frequency.sqrt()
    dark = draw(*shape, 3, low=-1.0, high=0.2)
    return Texture(
        across=across,
        down=down,
        phase=draw(*shape, WAVES, high=2 * math.pi),
        weight=weight / weight.sum(-1, keepdim=True),
        sharpness=draw(*shape, low=1.0, high=4.0),
        checker=checker,
        dark=dark,
        light=dark + draw(*shape, 3, low=0.3, high=1.2),
    )


def _second(kept: Tensor, crossing: Tensor) -> Tensor:
    """`kept` with its second wave replaced by the first of `crossing`."""
    return torch.cat([kept[..., :1], crossing[..., :1], kept[..., 2:]], -1)


def make_scenes(batch: int, seed: int, device: torch.device | str = "cpu") -> Scene:
    """Draw `batch` scenes from a seed; the same, to rounding, on every device."""
    draw = _Draws(batch, seed, torch.device(device))
    speed = draw(OBJECTS, 1) ** 2 * 1.6
    heading = draw(OBJECTS, high=2 * math.pi)
    sun = draw(1, high=2 * math.pi)
    kind = (draw(OBJECTS) * len(PETALS)).long().clamp(max=len(PETALS) - 1)
    # Positions are at the middle of the clip, in a frame of about 16:9.
    position = torch.stack(
        [draw(OBJECTS, low=-0.85, high=0.85), draw(OBJECTS, low=-0.45, high=0.45)], -1
    )
    return Scene(
        position=position,
        velocity=speed * torch.stack([heading.cos(), heading.sin()], -1),
        acceleration=draw(OBJECTS, 2, low=-1.0, high=1.0),
        radius=draw(OBJECTS, low=0.14, high=0.36),
        angle=draw(OBJECTS, high=2 * math.pi),
        spin=draw(OBJECTS, low=-4.0, high=4.0),
        aspect=draw(OBJECTS, low=0.65, high=1.5),
        petals=torch.tensor(PETALS, device=kind.device)[kind],
        pan=draw(2, low=-0.6, high=0.6),
        zoom=draw(1, low=-0.3, high=0.4)[:, 0],
        roll=draw(1, low=-0.35, high=0.35)[:, 0],
        sun=torch.cat([sun.cos(), sun.sin()], 1),
        background=_draw_texture(draw, (), coarse=4.5),
        surface=_draw_texture(draw, (OBJECTS,), coarse=2.5),
    )


def shade(texture: Texture, x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """Mix in [0, 1] between a texture's two colours at points.

    Args:
        x, y: (.., T, H, W), with the texture's leading dims.
        pixel: (..), size of a pixel in the points' units; gratings it cannot resolve fade out.
    """
    wavelength = 2 * math.pi / (texture.across.square() + texture.down.square()).sqrt()
    visible = (wavelength / pixel[..., None] / 2 - 1).clamp(0, 1)
    across, down, phase, weight = (
        part[..., None, None, None, :]
        for part in (texture.across, texture.down, texture.phase, texture.weight * visible)
    )
    angle = torch.addcmul(torch.addcmul(phase, x[..., None], across), y[..., None], down)
    wave = angle.sin_()
    sharpness, checker = (
        part[..., None, None, None] for part in (texture.sharpness, texture.checker)
    )
    squares = wave[..., 0] * wave[..., 1] * visible[..., None, None, None, :2].prod(-1)
    level = torch.lerp((wave * weight).sum(-1), squares, checker)
    return 0.5 + 0.5 * torch.tanh(sharpness * level) / torch.tanh(sharpness)


def render_videos(
    batch: int,
    frames: int,
    height: int,
    width: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render a batch of videos, (B, 3, frames, height, width) float32 in [-1, 1].

    The clip spans the same time and the same scene whatever its length and resolution.
    """
    scene = make_scenes(batch, seed, device)
    device = scene.position.device
    time = torch.linspace(0, 1, frames, device=device)[:, None, None] - 0.5
    down = ((torch.arange(height, device=device) + 0.5) / height - 0.5)[None, :, None]
    across = ((torch.arange(width, device=device) + 0.5 - width / 2) / height)[None, None, :]

    def per_scene(part: Tensor) -> Tensor:
        return part[..., None, None, None]

    roll, scale = per_scene(scene.roll) * time, torch.exp(-per_scene(scene.zoom) * time)
    cos, sin = roll.cos() * scale, roll.sin() * scale
    x = cos * across - sin * down + per_scene(scene.pan[:, 0]) * time
    y = sin * across + cos * down + per_scene(scene.pan[:, 1]) * time
    pixel = torch.full((batch,), 1 / height, device=device)
    ground = shade(scene.background, x, y, pixel)

    # Every object's own coordinates: (B, O, T, H, W), in units of its radius.
    motion = torch.stack([scene.velocity, scene.acceleration], -1)
    centre_x, centre_y = (
        per_scene(scene.position[..., i])
        + per_scene(motion[..., i, 0]) * time
        + per_scene(motion[..., i, 1]) * time.square()
        for i in range(2)
    )
    radius, aspect, petals = (per_scene(p) for p in (scene.radius, scene.aspect, scene.petals))
    offset_x, offset_y = (x[:, None] - centre_x) / radius, (y[:, None] - centre_y) / radius
    turn = per_scene(scene.angle) + per_scene(scene.spin) * time
    cos, sin = turn.cos(), turn.sin()
    local_x = (cos * offset_x + sin * offset_y) * aspect
    local_y = (cos * offset_y - sin * offset_x) / aspect
    length = torch.sqrt(local_x.square() + local_y.square() + 1e-12)
    arms = torch.cos(petals * torch.atan2(local_y, local_x))
    rim = 1 + 0.3 * (petals > 1) * arms
    box = torch.maximum(local_x.abs(), local_y.abs()) - 0.8
    distance = torch.where(petals == 1, box, length - rim)
    cover = (0.5 - distance * radius * (height / 1.5)).clamp(0, 1)

    # Light falls on a dome over each object, from the scene's sun.
    sun_x, sun_y = (part[:, None, None, None, None] for part in scene.sun.unbind(1))
    light = (0.85 + 0.35 * (offset_x * sun_x + offset_y * sun_y)).clamp(0.35, 1.15)
    mix = shade(scene.surface, local_x, local_y, pixel[:, None] / scene.radius)

    # Later objects lie on top: what an object shows is what all later ones leave uncovered.
    uncovered = torch.cumprod((1 - cover).flip(1), 1).flip(1)
    seen = cover * torch.cat([uncovered[:, 1:], torch.ones_like(cover[:, :1])], 1)
    lit = seen * light
    mixed = lit * mix
    channels = []
    for channel in range(3):
        dark, bright = scene.background.dark[:, channel], scene.background.light[:, channel]
        image = uncovered[:, 0] * (per_scene(dark) + per_scene(bright - dark) * ground)
        dark, bright = scene.surface.dark[..., channel], scene.surface.light[..., channel]
        colour = lit * per_scene(dark + 1) + mixed * per_scene(bright - dark) - seen
        channels.append(image + colour.sum(1))
    return torch.stack(channels, 1).clamp(-1, 1)
