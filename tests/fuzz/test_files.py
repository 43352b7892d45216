"""Every file that is read, damaged and made up: an error of freqopt in one line, or a good value.

Bytes are flipped, cut, doubled and exchanged; values are put where others belong, hashes made
right again, so that what is behind them is reached. Long with `-m slow`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_plans import full_plan

from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.samples_file import load_samples, save_samples
from freqopt.errors import FreqoptError
from freqopt.exporters.manifest import Artifact, write_manifest
from freqopt.plan.file_text import content_hash
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans

FEW, MANY = 250, 20_000

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    -(10**400),
    1e308,
    "",
    "x" * 10_000,
    "\x1b[2J\x07",
    "\ud800",
    "a\nb",
    [],
    {},
    [[]],
    [1] * 100,
    {"x": 1},
    [None],
    "../x",
    "/etc/passwd",
    "$\\frac{$",
    "\u202e",
)
"""Values that belong nowhere, or may do harm where a name or a number does."""


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four changes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(len(found), 1))
        match chance.randrange(6):
            case 0:
                found[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del found[at:]
            case 2:
                del found[at : at + chance.randint(1, 64)]
            case 3:
                found[at:at] = found[at : at + chance.randint(1, 64)]
            case 4:
                found[at:at] = bytes(chance.choices(b'[]{}",:0123456789eE-+.\\u\x00\xff', k=8))
            case 5:
                found[at : at + 8] = chance.choice([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])
    return bytes(found)


def altered(value: Any, chance: random.Random) -> Any:
    """A JSON value with something else at one place of it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        match chance.randrange(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, str(chance.choice(ODD)): value[key]}
        return {**value, key: altered(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        match chance.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
        return [*value[:at], altered(value[at], chance), *value[at + 1 :]]
    if isinstance(value, (int, float)) and chance.random() < 0.3:
        return chance.choice([-value, value * 10**9, value + 1, value / 7, float(value)])
    return chance.choice(ODD)


def tried(attempt: Callable[[], object]) -> bool:
    """Whether it went well; what goes wrong must be said in an error of ours, without control."""
    try:
        attempt()
    except FreqoptError as error:
        assert str(error)
        return False
    return True


def use_plan(found: Plan) -> None:
    """What is done with any plan that was loaded."""
    assert "\x1b" not in str(found) and "\x07" not in str(found)
    str(found).encode("utf-8")
    for name in found.sites:
        budgets = found.budgets(name)
        assert budgets.dtype == torch.float32 and not budgets.isnan().any()
        found.largest_chunk(name)
        found.known(name)
    assert Plan.parse(found.text()) == found


numbers = pytest.mark.parametrize(
    "count", [pytest.param(FEW), pytest.param(MANY, marks=pytest.mark.slow)]
)


def test_the_plan_is_good() -> None:
    use_plan(full_plan())


@numbers
def test_damaged_plans(tmp_path: Path, count: int) -> None:
    chance, path = random.Random(0), tmp_path / "plan.json"
    good = full_plan().text().encode()
    for _ in range(count):
        path.write_bytes(damaged(good, chance))
        tried(lambda: use_plan(Plan.load(path)))
        tried(lambda: Plans.load(path))


@numbers
def test_plans_with_other_values_and_right_hashes(count: int) -> None:
    chance, loaded = random.Random(1), 0
    content = json.loads(full_plan().text())
    content.pop("hash")
    for _ in range(count):
        changed = altered(content, chance)
        if not isinstance(changed, dict):
            continue
        changed["hash"] = content_hash(changed)
        text = json.dumps(changed)
        loaded += tried(lambda text=text: use_plan(Plan.parse(text)))  # type: ignore[misc]
    assert loaded > count // 50, "some of them must get past the checks"


@numbers
def test_damaged_samples(tmp_path: Path, count: int) -> None:
    chance, path = random.Random(2), tmp_path / "samples.safetensors"
    call = {"x": torch.arange(3), "y": {"z": (torch.ones(2, dtype=torch.complex64), 1)}}
    save_samples(path, [call, call])
    good = path.read_bytes()
    assert len(load_samples(path)) == 2
    for _ in range(count):
        path.write_bytes(damaged(good, chance))
        tried(lambda: load_samples(path))


@numbers
def test_samples_with_other_entries(tmp_path: Path, count: int) -> None:
    chance, path = random.Random(3), tmp_path / "samples.safetensors"
    names = [
        "0/x",
        "0/0",
        "0/00",
        "00/x",
        "1/x",
        "0/y/0",
        "0",
        "/",
        "0/",
        "0/y/z/w",
        "\u0660/x",
        "-1/x",
    ]
    texts = ["1", "[", "[" * 5000, "NaN", "null", '"float32"', "1" * 5000]
    trees = [("tuple", ["0"]), ("dict", ["z", "z"]), ([], 3), ("list", [None]), ("tuple", [])]
    texts += [json.dumps({"kind": kind, "items": items}) for kind, items in trees]
    for _ in range(count):
        tensors = {n: torch.ones(chance.choice([0, 1, 2])) for n in chance.sample(names, k=2)}
        keys = [chance.choice(["", "tree:", "complex:"]) + chance.choice(names) for _ in range(3)]
        save_file(tensors, path, metadata={key: chance.choice(texts) for key in keys})
        tried(lambda: load_samples(path))


@numbers
def test_damaged_checkpoints(tmp_path: Path, count: int) -> None:
    """Never other numbers than those that were kept."""
    chance, path = random.Random(4), tmp_path / "kept"
    kept = Checkpoint(path, "identity")
    kept.keep("a|1", {"x": [1.5, None]}, {"t": torch.arange(4.0)})
    kept.write()
    good = path.read_bytes()

    def resume() -> None:
        entry = Checkpoint(path, "identity").find("a|1")
        if entry is not None:
            assert entry.facts == {"x": [1.5, None]}
            assert torch.equal(entry.tensors["t"], torch.arange(4.0))

    resume()
    assert Checkpoint(path, "identity").find("a|1") is not None
    for _ in range(count):
        path.write_bytes(damaged(good, chance))
        tried(resume)


@numbers
def test_manifests_with_other_values(tmp_path: Path, count: int) -> None:
    chance = random.Random(5)
    (tmp_path / "model.onnx").write_bytes(b"model")
    site = {"budget": "b", "heads": 2}
    write_manifest(
        tmp_path,
        kind="onnx",
        model="model.onnx",
        files=["model.onnx"],
        content={
            "sites": {"a": site},
            "dense_sites": {"b": "short"},
            "opset": 20,
            "plan": {"model": "M", "model_fingerprint": "f"},
        },
    )
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    content = json.loads(good)
    for _ in range(count):
        if chance.random() < 0.5:
            path.write_text(json.dumps(altered(content, chance)))
        else:
            path.write_bytes(damaged(good, chance))

        def use() -> None:
            found = Artifact.load(tmp_path)
            assert "\x1b" not in str(found)
            assert found.model_path.parent == tmp_path and found.kind in ("onnx", "tensorrt")

        tried(use)
