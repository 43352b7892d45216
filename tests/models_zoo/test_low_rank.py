"""Adapters begin as nothing, train alone, and come back from a file as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from freqopt.models_zoo.low_rank import LowRank, adapt, add_adapter, merge, save_adapter
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

CONFIG = VideoDiTConfig(width=32, layers=2, heads=2, mlp_width=48, rope_axes=(4, 6, 6))


def made() -> tuple[VideoDiT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = VideoDiT(CONFIG).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)  # untrained models end in zeros
    return model, torch.randn(2, 3, 3, 12, 20), torch.tensor([0.3, 0.8])


def test_an_adapter_begins_as_nothing_and_only_it_is_trained() -> None:
    model, video, t = made()
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = model(video, t)
    layers = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    parameters = adapt(model, 3)
    assert len(parameters) == 2 * layers == 2 * (4 * 2 + 4)
    torch.testing.assert_close(model(video, t), wanted, atol=0, rtol=0)
    optimiser = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(3):
        model(video, t).square().mean().backward()
        optimiser.step()
    off = (model(video, t) - wanted).detach()
    assert off.norm() > 0.1 * wanted.norm()
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        parent, _, leaf = name.rpartition(".")
        own = f"{parent}.base.{leaf}"
        assert torch.equal(after[own if own in after else name], parameter), name


def test_merged_saved_and_read_again_it_is_the_same_model(tmp_path: Path) -> None:
    model, video, t = made()
    plain = copy.deepcopy(model)
    adapt(model, 4)
    for module in model.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.up, std=0.1)
            module.up.data = module.up.data.bfloat16().float()  # as files hold them
            module.down.data = module.down.data.bfloat16().float()
    wanted = model(video, t)
    assert (plain(video, t) - wanted).detach().norm() > 0.05 * wanted.detach().norm()
    save_adapter(model, tmp_path / "adapter.safetensors", steps="4")
    names = list(dict(plain.named_parameters()))
    assert add_adapter(plain, tmp_path / "adapter.safetensors")["steps"] == "4"
    torch.testing.assert_close(plain(video, t), wanted, atol=1e-5, rtol=1e-5)
    merge(model)
    assert list(dict(model.named_parameters())) == names
    torch.testing.assert_close(model(video, t), wanted, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model, *_ = made()
    with pytest.raises(ValueError, match="rank 0"):
        adapt(model, 0)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold an adapter"):
        add_adapter(model, path)
    other = VideoDiT(VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=48))
    adapt(other, 2)
    save_adapter(other, path)
    with pytest.raises(ValueError, match="does not hold an adapter"):
        add_adapter(model, path)
