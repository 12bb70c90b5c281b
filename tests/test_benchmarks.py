"""The options that benchmarks have in common."""

import pytest

from benchmarks import bench_dynamics, bench_editor, bench_noise, profile_step
from utils.errors import UserError


@pytest.mark.parametrize(
    "benchmark, option",
    [
        (bench_dynamics, "batch_size"),
        (bench_dynamics, "alone_batch_size"),
        (bench_dynamics, "rounds"),
        (bench_dynamics, "threads"),
        (bench_editor, "drags"),
        (bench_editor, "threads"),
        (bench_noise, "steps"),
        (bench_noise, "threads"),
        (profile_step, "batch_size"),
    ],
)
def test_benchmarks_refuse_counts_below_1(benchmark, option):
    with pytest.raises(UserError, match=f"--{option} is 0; legal: at least 1"):
        benchmark.main([f"--{option}=0"])
