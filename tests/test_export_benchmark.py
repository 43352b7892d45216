"""What benchmarks/export.py prepares runs on the CPU too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("triton")

from attention_cases import relative

from benchmarks.export import DIM, PROBES, prepare, where_ran
from freqopt.grid import token_order


def test_prepared_file_is_the_op_with_and_without_the_library(tmp_path: Path) -> None:
    prepare(tmp_path, 90)
    grid = (4, 8, 9)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 288, DIM, generator=generator).half() for _ in range(3))
    budget = torch.full((2, 2), 1.0)
    given = {
        "query": query, "key": key, "value": value, "budget": budget,
        "key_mask": torch.ones(1, 1, dtype=torch.bool),
        "order": token_order(grid, query.device).long(), "text_before": torch.zeros(1).long(),
    }  # fmt: skip
    expected = torch.ops.freqopt.split_attention(
        query, key, value, budget, None, list(grid), 0, 0, DIM**-0.5, 0.0, False, PROBES
    )[0]
    for library in (tmp_path / "libfreqopt_ort.so", None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            str(tmp_path / "split.onnx"), options, providers=["CPUExecutionProvider"]
        )
        out: np.ndarray = session.run(None, {k: v.numpy() for k, v in given.items()})[0]
        assert relative(torch.from_numpy(out), expected) < 1e-2
        ran = where_ran(Path(session.end_profiling()))
        assert ran == ({"CPUExecutionProvider"} if library else set())
