"""Runs triton_checks.py: on the GPU here and now, or in Triton's interpreter in another process.

Triton decides between the two when it is imported, and other tests import it too; hence the process
of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import forks

pytest.importorskip("triton")
CHECKS = Path(__file__).parents[1] / "support" / "triton_checks.py"

if torch.cuda.is_available():
    from triton_checks import *  # noqa: F403
else:
    from triton_checks import (
        test_a_million_tokens_need_less_than_their_keys_and_values,  # noqa: F401
        test_cuda_graph_replays_with_other_content,  # noqa: F401
        test_every_head_dim_on_the_gpu,  # noqa: F401
        test_gradients_on_the_gpu_are_those_of_the_cpu,  # noqa: F401
        test_hopper_kernel_is_the_reference,  # noqa: F401
        test_hopper_preparation_is_the_portable_one,  # noqa: F401
        test_larger_grids_on_the_gpu,  # noqa: F401
        test_strides_that_no_wide_copy_takes_go_to_the_portable_kernels,  # noqa: F401
    )

    @pytest.mark.parametrize(
        ("name", "cases"),
        [
            ("test_kernels_are_the_reference", 9),
            ("test_the_update_is_the_reference_for_other_numbers_of_probes", 2),
            ("test_given_an_order_kernels_are_the_reference", 7),
            ("test_what_is_no_number_stays_in_its_row", 2),
            ("test_numbers_of_an_order_stay_among_the_tokens", 1),
            ("test_orders_", 4),
            ("test_the_threshold_of_a_density_is_the_definitions", 4),
            ("test_sampled_tiles_are_those_of_the_whole_call", 2),
            ("test_heads_are_measured_together_as_one_by_one", 1),
            ("test_a_density_is_reached_and_passed_by_a_twentieth_at_most", 3),
            ("test_threshold_zero_is_dense_attention", 4),
            ("test_same_input_same_bits", 1),
            ("test_heads_in_turns_are_heads_together", 3),
            ("test_chunks_of_tiles_are_all_tiles_together", 4),
            ("test_probes_beside_the_scores_are_probes_after_them", 4),
            ("test_random_calls_are_the_reference", 1),
            ("test_every_launch_candidate_gives_the_same_results", 1),
        ],
    )
    def test_in_the_interpreter(name: str, cases: int) -> None:
        interpreted(cases, "-k", name)

    @pytest.mark.slow
    def test_seldom_in_the_interpreter() -> None:
        interpreted(7, "-m", "slow")

    def interpreted(cases: int, *chosen: str) -> None:
        options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
        done = forks(interpret=True).run("-m", "pytest", *options, CHECKS, *chosen)
        assert done.returncode == 0, done.stdout[-4000:]
        assert f"{cases} passed" in done.stdout and "skipped" not in done.stdout


def test_keys_that_no_wide_copy_takes_are_gathered_from_a_copy() -> None:
    from freqopt.kernels.hopper import launch as hopper

    model = torch.randn(1, 5, 2, 128, dtype=torch.float16).transpose(1, 2)
    assert hopper.gatherable(model) is model
    odd = torch.randn(1, 2, 5, 136, dtype=torch.float16)[..., :128]
    found = hopper.gatherable(odd)
    assert torch.equal(found, odd) and found.stride() == (1280, 640, 128, 1)
