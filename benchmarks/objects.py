"""Do all objects of a clip stay? They are counted by colour, and looked for in another clip.

A clip of the zoo shows textured objects before a background: each surface has the colours between
two, from dark to light. The surface that most pixels have is the background; an object is a region
of one of the others, a strongly striped one maybe several. PSNR and SSIM tell how far pixels
are off; this tells what is missing.
Clips are (3, T, H, W) float tensors in [-1, 1], on the CPU.
"""

from __future__ import annotations

from statistics import median_low
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LIGHT = 0.5
"""What a difference in lightness counts beside one in hue: light falls unevenly on an object."""

NEAR = 0.2
"""Distance from a surface's colours up to which a colour is one of them; [-1, 1] is 2 wide."""

STEP, GAP = 0.1, 0.002
"""Surfaces end where a step between two colours has a smaller share of the clip's pixels: two flat
surfaces have nothing between them."""

FEWEST, MOST = 0.008, 8
"""Share of the clip's pixels that a surface has at least, and surfaces of a clip."""

LOOKED_AT, TRIES = 4000, 200
"""Pixels that surfaces are found in, and pairs of them that are tried for each."""

SMALLEST = 0.02
"""Share of the frame that an object has at least; those that the zoo learnt from have 0.035."""

REACH = 1 / 12
"""Of the frame's height: parts of one colour that are no farther apart are one object, as stripes
of another colour may lie between them."""

OVERLAP = 1 / 3
"""Intersection over union from which on two regions are the same object: parts of a texture that
come and go are not the object."""


class Surface(NamedTuple):
    """Colours between two, (3,) each, as `seen` has them."""

    dark: Tensor
    light: Tensor

    def distance(self, colours: Tensor) -> Tensor:
        """From colours (.., 3) to the nearest of its own."""
        along = self.light - self.dark
        length = along.square().sum().clamp(min=1e-12)
        share = ((colours - self.dark) @ along / length).clamp(0, 1)
        distance: Tensor = (colours - self.dark - share[..., None] * along).norm(dim=-1)
        return distance


class Found(NamedTuple):
    """The objects of a clip.

    places: (S, T, H, W) int64, for each surface but the background's the numbers of its regions in
    each frame, -1 elsewhere. sizes: for each frame the pixels of each region that is large enough
    to be an object, by surface and number.
    """

    places: Tensor
    sizes: list[dict[tuple[int, int], int]]


def seen(video: Tensor) -> Tensor:
    """Colours (T, H, W, 3) float32 whose distances tell objects apart."""
    colours = video.to(torch.float32).permute(1, 2, 3, 0)
    light = colours.mean(-1, keepdim=True)
    return colours - (1 - LIGHT) * light


def surfaces_of(video: Tensor) -> list[Surface]:
    """The surfaces of a clip by the share of pixels that they take, the background first."""
    generator = torch.Generator().manual_seed(0)
    pixels = seen(video).flatten(0, 2)
    pixels = pixels[torch.randperm(len(pixels), generator=generator)[:LOOKED_AT]]
    total, found = len(pixels), list[Surface]()
    while len(pixels) >= FEWEST * total and len(found) < MOST:
        surface, count = _largest(pixels, total, generator)
        if count < FEWEST * total and found:
            break
        found.append(surface)
        pixels = pixels[surface.distance(pixels) > NEAR]
    return found


def _largest(pixels: Tensor, total: int, generator: torch.Generator) -> tuple[Surface, int]:
    """The surface that most of the pixels (n, 3) have, and how many."""
    best, most = Surface(pixels[0], pixels[0]), 0
    pairs = torch.randint(len(pixels), (TRIES, 2), generator=generator)
    for start, end in pixels[pairs]:
        along = F.normalize(end - start, dim=0)
        offset = pixels - start
        at = offset @ along
        near = (offset - at[:, None] * along).norm(dim=-1) < NEAR
        steps = (at[near] / STEP).round().to(torch.int64)
        if not len(steps):
            continue
        first = int(steps.min())
        counts = torch.bincount(steps - first)
        low, high = _run(counts >= max(GAP * total, 1), -first)
        if (count := int(counts[low:high].sum())) > most:
            ends = [start + (first + step) * STEP * along for step in (low, high - 1)]
            best, most = Surface(*ends), count
    return best, most


def _run(filled: Tensor, at: int) -> tuple[int, int]:
    """First and last but one of the filled steps in a row around one; none where it is empty."""
    if not filled[at]:
        return at, at
    empty = (~filled).nonzero().flatten().tolist()
    low = max((step for step in empty if step < at), default=-1)
    high = min((step for step in empty if step > at), default=len(filled))
    return low + 1, high


def regions(mask: Tensor) -> Tensor:
    """Numbers of the connected regions of a mask (T, H, W) in each frame, -1 outside; int64."""
    numbers = torch.arange(mask.numel(), dtype=torch.int64, device=mask.device).view(mask.shape)
    pairs = [
        (mask[:, 1:] & mask[:, :-1], (slice(None), slice(1, None)), (slice(None), slice(-1))),
        (
            mask[..., 1:] & mask[..., :-1],
            (slice(None), slice(None), slice(1, None)),
            (slice(None), slice(None), slice(-1)),
        ),
    ]
    while True:
        # Every pixel takes the largest number beside it, and then the one of the pixel it names.
        grown = numbers.clone()
        for both, after, before in pairs:
            larger = torch.maximum(grown[after], grown[before])
            grown[after] = torch.where(both, larger, grown[after])
            grown[before] = torch.where(both, larger, grown[before])
        grown = grown.flatten()[grown]
        if torch.equal(grown, numbers):
            return torch.where(mask, numbers, -1)
        numbers = grown


def find(video: Tensor, surfaces: list[Surface]) -> Found:
    """The objects of a clip that have one of the surfaces, but for the first, the background."""
    colours, (height, width) = seen(video), video.shape[2:]
    distances = torch.stack([surface.distance(colours) for surface in surfaces])
    nearest = distances.min(0)
    reach = int(height * REACH / 2)
    places = torch.full((len(surfaces) - 1, *video.shape[1:]), -1, dtype=torch.int64, device="cpu")
    sizes: list[dict[tuple[int, int], int]] = [{} for _ in range(video.shape[1])]
    for number, place in enumerate(places):
        mask = (nearest.indices == number + 1) & (nearest.values <= NEAR)
        grown = F.max_pool2d(mask[:, None].to(torch.float32), 2 * reach + 1, 1, reach)[:, 0] > 0
        place.copy_(torch.where(mask, regions(grown), -1))
        for frame, found in zip(place, sizes, strict=True):
            names, counts = frame[frame >= 0].unique(return_counts=True)
            for name, size in zip(names.tolist(), counts.tolist(), strict=True):
                if size >= SMALLEST * height * width:
                    found[number, name] = size
    return Found(places, sizes)


def count(found: Found) -> tuple[int, float]:
    """The number of objects of a clip, the median over its frames; the share that has it."""
    counts = [len(sizes) for sizes in found.sizes]
    number = median_low(counts)
    return number, counts.count(number) / len(counts)


class Kept(NamedTuple):
    """What became of the objects of one clip in another.

    objects, frames_of_as_many: of the other, see `count`. objects_kept: share of the one's objects,
    frame by frame, that the other has in that place and colour. frames_with_all: share of frames in
    which it has all of them.
    """

    objects: int
    frames_of_as_many: float
    objects_kept: float
    frames_with_all: float


class Objects:
    """Those of a clip that others are compared with, which is looked at once."""

    def __init__(self, video: Tensor) -> None:
        self.surfaces = surfaces_of(video)
        self.found = find(video, self.surfaces)

    def kept(self, video: Tensor) -> Kept:
        """What a clip of the same shape kept of them."""
        other = find(video, self.surfaces)
        kept = [
            [self._is_kept(other, frame, *name) for name in sizes]
            for frame, sizes in enumerate(self.found.sizes)
        ]
        flat = [each for frame in kept for each in frame]
        return Kept(
            *count(other),
            sum(flat) / len(flat) if flat else 1.0,
            sum(map(all, kept)) / len(kept),
        )

    def _is_kept(self, other: Found, frame: int, surface: int, name: int) -> bool:
        """Whether there is something of the object's colour in its place, about as large."""
        mine = self.found.places[surface, frame] == name
        there = other.places[surface, frame]
        names, counts = there[mine & (there >= 0)].unique(return_counts=True)
        size = self.found.sizes[frame][surface, name]
        return any(
            shared >= OVERLAP * (size + int((there == theirs).sum()) - shared)
            for theirs, shared in zip(names.tolist(), counts.tolist(), strict=True)
        )
