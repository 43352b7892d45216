"""Contact sheets: frames of a video side by side in one PNG, written with the standard library.

Training runs on machines that have torch and little else.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor


def write_contact_sheet(video: Tensor, path: Path, *, frames: int = 5, zoom: int = 2) -> None:
    """Write evenly spaced frames of a video (3, T, H, W) in [-1, 1], each pixel zoom x zoom."""
    count = min(frames, video.shape[1])
    picked = [round(i * (video.shape[1] - 1) / max(count - 1, 1)) for i in range(count)]
    row = torch.cat([video[:, i] for i in picked], -1)
    pixels = ((row.float().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    pixels = pixels.to("cpu", torch.uint8)
    pixels = pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    height, width = pixels.shape[:2]
    # Each line of a PNG starts with its filter; 0 is none.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(bytes(lines.numpy().data), 6)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)
