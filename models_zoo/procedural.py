"""Procedural video: textured objects that move, turn and occlude before a panning camera.

Scenes are drawn in normalised coordinates, so one seed shows the same scene at every resolution and
length; everything is computed on the device, a whole batch at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OBJECTS = 6
"""Objects in a scene; some leave the view, later ones occlude earlier ones."""

WAVES = 5
"""Oriented gratings that make up one texture, an octave apart on average."""


class Texture(NamedTuple):
    """Sum of gratings over two colours: direction (.., W, 2) in radians per unit, phase and weight
    (.., W), and the colours (.., 3) at either end, in [-1, 1]."""

    direction: Tensor
    phase: Tensor
    weight: Tensor
    dark: Tensor
    light: Tensor


class Scene(NamedTuple):
    """A batch of scenes; lengths in units of the frame's height, times in units of the clip.

    position, velocity (B, O, 2); radius, angle, spin, aspect, petals (B, O); pan (B, 2) and
    zoom (B,) of the camera over the clip; background and surface textures.
    """

    position: Tensor
    velocity: Tensor
    radius: Tensor
    angle: Tensor
    spin: Tensor
    aspect: Tensor
    petals: Tensor
    pan: Tensor
    zoom: Tensor
    background: Texture
    surface: Texture


def make_scenes(batch: int, seed: int, device: torch.device | str) -> Scene:
    """Draw `batch` scenes from a seed; the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    def texture(*shape: int, coarse: float) -> Texture:
        turn = uniform(*shape, WAVES, high=2 * math.pi)
        octave = torch.arange(WAVES) + uniform(*shape, WAVES, low=-0.5, high=0.5)
        frequency = coarse * 2.0 ** (0.8 * octave)
        direction = frequency[..., None] * torch.stack([turn.cos(), turn.sin()], -1)
        weight = uniform(*shape, WAVES, low=0.3) / frequency.sqrt()
        weight = weight / weight.sum(-1, keepdim=True)
        phase = uniform(*shape, WAVES, high=2 * math.pi)
        dark = uniform(*shape, 3, low=-1.0, high=0.3)
        return Texture(direction, phase, weight, dark, dark + uniform(*shape, 3, low=0.2, high=1.1))

    speed = uniform(OBJECTS, 1) ** 2 * 1.6
    heading = uniform(OBJECTS, high=2 * math.pi)
    scene = Scene(
        position=uniform(OBJECTS, 2, low=-0.7, high=0.7) * torch.tensor([0.6, 1.1]),
        velocity=speed * torch.stack([heading.cos(), heading.sin()], -1),
        radius=uniform(OBJECTS, low=0.1, high=0.32),
        angle=uniform(OBJECTS, high=2 * math.pi),
        spin=uniform(OBJECTS, low=-4.0, high=4.0),
        aspect=uniform(OBJECTS, low=0.6, high=1.6),
        petals=torch.randint(0, 6, (batch, OBJECTS), generator=generator).float(),
        pan=uniform(2, low=-0.5, high=0.5),
        zoom=uniform(low=-0.25, high=0.35),
        background=texture(coarse=2.5),
        surface=texture(OBJECTS, coarse=8.0),
    )
    return _to(scene, device)


def _to(scene: Scene, device: torch.device | str) -> Scene:
    def move(x: Tensor | Texture) -> Tensor | Texture:
        return x.to(device) if isinstance(x, Tensor) else Texture(*(y.to(device) for y in x))

    return Scene(*(move(x) for x in scene))  # type: ignore[arg-type]


def shade(texture: Texture, point: Tensor) -> Tensor:
    """Colour (.., 3) of a texture at points (.., 2); leading dims of the texture broadcast."""
    angle = (point.unsqueeze(-2) * texture.direction).sum(-1) + texture.phase
    mix = 0.5 + 0.5 * (angle.sin() * texture.weight).sum(-1, keepdim=True)
    return texture.dark + (texture.light - texture.dark) * mix


def render_frame(scene: Scene, time: float, height: int, width: int) -> Tensor:
    """One frame of every scene at a time in [0, 1]: (B, 3, height, width) in [-1, 1]."""
    device = scene.position.device
    rows = (torch.arange(height, device=device) + 0.5) / height - 0.5
    columns = ((torch.arange(width, device=device) + 0.5) - width / 2) / height
    view = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    scale = torch.exp(scene.zoom * time)[:, None, None, None]
    world = view / scale + (scene.pan * time)[:, None, None]
    background = Texture(*(x[:, None, None] for x in scene.background))
    image = shade(background, world)
    edge = 1.5 / height
    for index in range(OBJECTS):
        centre = scene.position[:, index] + scene.velocity[:, index] * (time - 0.5)
        turn = scene.angle[:, index] + scene.spin[:, index] * time
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        offset = world - centre[:, None, None]
        local = torch.stack(
            [
                cos * offset[..., 0] + sin * offset[..., 1],
                cos * offset[..., 1] - sin * offset[..., 0],
            ],
            -1,
        )
        local = (
            local
            * torch.stack([scene.aspect[:, index], 1 / scene.aspect[:, index]], -1)[:, None, None]
        )
        radius = scene.radius[:, index, None, None]
        petals = scene.petals[:, index, None, None]
        angle = torch.atan2(local[..., 0], local[..., 1])
        rim = radius * (1 + 0.25 * (petals > 1) * torch.cos(petals * angle))
        round_distance = local.norm(dim=-1) - rim
        box_distance = local.abs().amax(-1) - 0.8 * radius
        distance = torch.where(petals == 1, box_distance, round_distance)
        cover = (0.5 - distance / edge).clamp(0, 1)[..., None]
        surface = Texture(*(x[:, index][:, None, None] for x in scene.surface))
        light = 1 - 0.35 * ((local[..., 0:1] + local[..., 1:2]) / radius[..., None]).clamp(-1, 1)
        colour = (shade(surface, local / radius[..., None].clamp(min=0.1)) + 1) * light - 1
        image = image + cover * (colour - image)
    return image.clamp(-1, 1).permute(0, 3, 1, 2)


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
    times = [index / max(frames - 1, 1) for index in range(frames)]
    return torch.stack([render_frame(scene, time, height, width) for time in times], 2)
