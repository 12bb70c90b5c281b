"""The options that benchmarks have in common."""

import pytest
import torch

from benchmarks import bench_data, bench_dynamics, bench_editor, bench_noise, bench_sample, bench_train, profile_step
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


@pytest.mark.parametrize("benchmark", [bench_train, bench_sample])
@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--threads=0"], "argument --threads: 0; legal: at least 1"),
        (["--rounds=-2"], "argument --rounds: -2; legal: at least 1"),
        (["--repeats=many"], "argument --repeats: invalid count value: 'many'"),
        (["--batch_size=0"], "argument --batch_size: 0; legal: at least 1"),
        (["--baseline=nowhere"], "argument --baseline: nowhere; legal: a folder with models.py"),
        (["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device=cuda"], "argument --device: cuda, but PyTorch finds no GPU; legal: cpu"),
    ],
)
def test_benchmarks_of_two_checkouts_refuse_by_one_line(benchmark, arguments, line, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "nan", "inf"])
def test_times_to_measure_for_are_finite(value):
    with pytest.raises(UserError, match=f"--seconds is {float(value)}; legal: above 0 and finite"):
        bench_data.main([f"--seconds={value}"])
