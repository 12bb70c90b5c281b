"""Training on two processes, as `accelerate launch` starts one per device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dlp
from tests.test_training import SMALL
from utils import checkpoints
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
# Trains as train_dlp_accelerate.py does, and writes what each process ends with.
SCRIPT = """
import sys
import torch
from train_dlp import main
from utils.training import Trainer

fit = Trainer.fit

def fit_and_keep(trainer, run):
    fit(trainer, run)
    torch.save(trainer.bare_model.state_dict(), f"weights_{trainer.accelerator.process_index}.pth")

Trainer.fit = fit_and_keep
main(sys.argv[1:])
"""


def test_two_processes_train_one_model_in_one_run_directory(tmp_path):
    config = {**SMALL, "root": str(tmp_path / "data"), "num_epochs": 2, "batch_size": 3, "eval_epoch_freq": 2}
    (tmp_path / "small.json").write_text(json.dumps(config))
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, "script.py", "-d", "small.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (checkpoints.load(tmp_path / f"weights_{process}.pth") for process in (0, 1))
    (run,) = tmp_path.glob("*_shapes_dlp")
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = checkpoints.load(run / "saves" / "shapes_dlp.pth")
    assert all(torch.equal(first[name], saved[name]) for name in first)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [4, 8]  # 24 images, 2 processes of 3 images
    assert (run / "log.txt").read_text().count("epoch 0 iteration 4 ") == 1
    states = checkpoints.load(run / "saves" / "training_state.pt")["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    with pytest.raises(UserError, match=r"was trained by 2 process\(es\); it can only go on with as many"):
        train_dlp.main(["--resume", str(run)])
