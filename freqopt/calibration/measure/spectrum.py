"""Spectra of keys over the token lattice, for the report: what share the low band can carry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import head_chunks
from freqopt.config import KEY_BLOCK
from freqopt.grid import Grid

SPECTRUM_BINS = 32


def band_cutoff(grid: Grid) -> float:
    """Highest frequency, in cycles per token, that the means of blocks carry.

    A block of n tokens is a cube of side n**(1/dims): its means sample the lattice at that pitch.
    """
    return float(0.5 * KEY_BLOCK ** (-1.0 / _dims(grid)))


def spectrum_axes(grid: Grid) -> tuple[list[float], float]:
    """Upper edges of the radial bins, and `band_cutoff`, in cycles per token."""
    top = 0.5 * math.sqrt(_dims(grid))
    return [top * (i + 1) / SPECTRUM_BINS for i in range(SPECTRUM_BINS)], band_cutoff(grid)


def key_spectrum(key: Tensor, grid: Grid, text_before: int) -> tuple[Tensor, Tensor]:
    """Power of each head's keys over the token lattice, without its constant part.

    key: (B, H, N, D). Returns shares of 1 as float64 on the CPU: power (H, SPECTRUM_BINS) per
    radial bin, and (H,) what lies below `band_cutoff`.
    """
    t, h, w = grid
    axes = [torch.fft.fftfreq(extent, device=key.device) for extent in (t, h, w)]
    f_t, f_h, f_w = (axis.square() for axis in axes)
    radius = (f_t[:, None, None] + f_h[:, None] + f_w).sqrt().flatten()
    top = 0.5 * math.sqrt(_dims(grid))
    bins = (radius / top * SPECTRUM_BINS).long().clamp(max=SPECTRUM_BINS - 1)
    video = key[:, :, text_before : text_before + t * h * w]
    powers = []
    for part in head_chunks(video):
        lattice = video[:, part].float()
        lattice = lattice.reshape(*lattice.shape[:2], t, h, w, -1)
        lattice = lattice - lattice.mean((2, 3, 4), keepdim=True)
        power = torch.fft.fftn(lattice, dim=(2, 3, 4)).abs().square().sum((0, -1)).flatten(1)
        powers.append(power / power.sum(1, keepdim=True).clamp(min=1e-30))
    power = torch.cat(powers)
    binned = power.new_zeros(power.shape[0], SPECTRUM_BINS).index_add_(1, bins, power)
    low = power[:, radius <= band_cutoff(grid)].sum(1)
    return binned.cpu().double(), low.cpu().double()


def _dims(grid: Grid) -> int:
    return max(1, sum(extent > 1 for extent in grid))
