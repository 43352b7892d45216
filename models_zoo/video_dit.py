"""A small video diffusion transformer of current design, for calibration, the demo and benchmarks.

Pixel space, patches of 1 x 4 x 4, 3-D rotary positions, QK-norm, one shared adaLN projection with a
table per block, flow matching. The trained weights ship with the package, in at most 16 MB.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "video_dit.safetensors"

MAX_BYTES = 16_000_000
"""Largest weights that may ship with the package: bfloat16, so 8 million parameters."""


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of the model.

    rope_axes: rotary channels of each head given to t, h and w.
    data_std: standard deviation of the videos, by which the output is preconditioned
        (`precondition`); 0 for a network whose output is the velocity itself.
    """

    width: int = 256
    layers: int = 12
    heads: int = 2
    mlp_width: int = 640
    channels: int = 3
    patch: tuple[int, int, int] = (1, 4, 4)
    rope_axes: tuple[int, int, int] = (32, 48, 48)
    rope_base: float = 100.0
    data_std: float = 0.0

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads


def rotary_table(
    grid: tuple[int, int, int], config: VideoDiTConfig, device: torch.device
) -> Tensor:
    """Cosine and sine of the rotary angles, (2, t*h*w, head_dim / 2) float32, raster order.

    Positions are counted from the middle of each axis, in tokens, so that clips of any size share
    their centre ("RoFormer", arXiv 2104.09864, one set of frequencies per axis).
    """
    t, h, w = grid
    angles = []
    for axis, (extent, channels) in enumerate(zip((t, h, w), config.rope_axes, strict=True)):
        step = torch.arange(channels // 2, device=device, dtype=torch.float32) / (channels // 2)
        frequency = config.rope_base**-step
        position = torch.arange(extent, device=device, dtype=torch.float32) - (extent - 1) / 2
        shape = [1, 1, 1, channels // 2]
        shape[axis] = extent
        angle = (position[:, None] * frequency).view(shape)
        angles.append(angle.expand(t, h, w, channels // 2))
    table = torch.cat(angles, -1).reshape(t * h * w, config.head_dim // 2)
    return torch.stack([table.cos(), table.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply rotary positions to (B, H, N, D); channel pairs are (i, i + D/2)."""
    cos, sin = table[0], table[1]
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over all video tokens, with normalised queries and keys."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x: (B, N, width); table as from `rotary_table`."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        query = rotate(self.query_norm(query), table).to(value.dtype)
        key = rotate(self.key_norm(key), table).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and MLP, modulated by the timestep."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, config.width) / config.width**0.5)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_width, config.width),
        )

    def forward(self, x: Tensor, modulation: Tensor, table: Tensor) -> Tensor:
        """x: (B, N, width); modulation: (B, 6, width), shared by all blocks."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            (modulation + self.table).unsqueeze(2).unbind(1)
        )
        width = x.shape[-1:]
        x = x + gate_a * self.attn(F.layer_norm(x, width) * (1 + scale_a) + shift_a, table)
        mixed: Tensor = self.mlp(F.layer_norm(x, width) * (1 + scale_m) + shift_m)
        return x + gate_m * mixed


class VideoDiT(nn.Module):
    """Flow-matching velocity: x_t = (1 - t) * video + t * noise, output = noise - video."""

    def __init__(self, config: VideoDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VideoDiTConfig()
        width = config.width
        self.patchify = nn.Conv3d(config.channels, width, config.patch, stride=config.patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = nn.Linear(width, config.channels * math.prod(config.patch))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patchify.weight.flatten(1))
        if self.patchify.bias is not None:
            nn.init.zeros_(self.patchify.bias)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        """Velocity at a noisy video.

        Args:
            video: (B, 3, T, H, W), H and W multiples of 4.
            timestep: (B,) in [0, 1]; 1 is pure noise.

        Returns:
            (B, 3, T, H, W) of the video's dtype.
        """
        x = self.patchify(video)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        # In the dtype and strides that blocks return, so that one compiled block serves all layers.
        x = x.flatten(2).transpose(1, 2).contiguous().to(self.final_table.dtype)
        table = rotary_table(grid, self.config, x.device)
        condition = F.silu(self.time(self._embed_time(timestep).to(x.dtype)))
        modulation = self.modulation(condition).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, modulation, table)
        shift, scale = (condition.unsqueeze(1) + self.final_table).chunk(2, 1)
        x = self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        pt, ph, pw = self.config.patch
        x = x.unflatten(2, (self.config.channels, pt, ph, pw)).unflatten(1, grid)
        patches: Tensor = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
        output = patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        if self.config.data_std == 0:
            return output
        kept, scaled = precondition(timestep.float().view(-1, 1, 1, 1, 1), self.config.data_std)
        return (kept * video + scaled * output).to(video.dtype)

    def _embed_time(self, timestep: Tensor) -> Tensor:
        """Sinusoidal embedding of (B,) timesteps, (B, width) float32."""
        half = self.config.width // 2
        step = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angle = timestep.float()[:, None] * 1000.0 * 10000.0**-step
        return torch.cat([angle.cos(), angle.sin()], -1)


def precondition(t: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    """Factors (kept, scaled) of velocity = kept * input + scaled * output, at times t.

    kept * input is the best linear guess of the velocity, for video of that standard deviation and
    noise of one; scaled is that guess's error, so that the network aims at unit variance at every
    time ("Elucidating the Design Space", arXiv 2206.00364, carried over to flow matching).
    """
    variance = (1 - t).square() * data_std**2 + t.square()
    return (t - (1 - t) * data_std**2) / variance, data_std / variance.sqrt()


def save_weights(model: VideoDiT, path: Path, **metadata: str) -> None:
    """Write the weights as bfloat16 safetensors with the config in the file's metadata."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()
    }
    save_file(tensors, path, {"config": json.dumps(asdict(model.config)), **metadata})


def load_pretrained(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    path: Path = WEIGHTS,
) -> VideoDiT:
    """The trained model, in evaluation mode.

    Raises:
        FileNotFoundError: no weights at `path`.
        ValueError: the file at `path` is damaged, or was not written by that command.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(
            f"no weights at {path}; they ship with freqopt, so install it again, or train them in "
            f"a checkout with `python -m freqopt.models_zoo.training.train --out {path.parent}` "
            "(about 10 minutes on a data-centre GPU)"
        )
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {})["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name in ("patch", "rope_axes"):
            fields[name] = tuple(fields[name])
        model = VideoDiT(VideoDiTConfig(**fields))
        model.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold weights of this model ({type(error).__name__}: {error}); "
            "supported is a file written by `python -m freqopt.models_zoo.training.train`: get it "
            "again, or train anew"
        ) from error
    return model.to(device=device, dtype=dtype).eval()
