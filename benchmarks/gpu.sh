#!/usr/bin/env bash
# What a GPU machine is asked first, in at most 6 minutes: the tests that need a GPU, training steps and roll-outs by
# configuration and switch, the dynamics alone, and a profile of a step.
#   benchmarks/gpu.sh OUT_DIR [BASELINE]     BASELINE: another checkout, which is measured in turn with this one
# Uses $PYTHON (a command or an absolute path), by default python3; what of requirements.txt it lacks is installed where an index can be reached.
set -uo pipefail
out=$(realpath -m "${1:?benchmarks/gpu.sh OUT_DIR [BASELINE]}")
baseline=()
if [ $# -gt 1 ]; then baseline=(--baseline "$(realpath "$2")"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
mkdir -p "$out"
start=$SECONDS

# run SECONDS NAME COMMAND...: into OUT_DIR/NAME.txt; what takes longer is ended, nothing begins after 6 minutes.
run() {
	local left=$((360 - SECONDS + start))
	echo "$2"
	if [ "$left" -le 0 ]; then
		echo "  left out: the 6 minutes are over"
		return
	fi
	timeout "$(($1 < left ? $1 : left))" "${@:3}" >"$out/$2.txt" 2>&1 || echo "  ended with status $?; see $out/$2.txt"
	tail -n 3 "$out/$2.txt" | cut -c1-160
}

{
	nvidia-smi
	"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
} >"$out/machine.txt" 2>&1 || {
	cat "$out/machine.txt"
	echo "$python finds no GPU"
	exit 1
}
tail -n 1 "$out/machine.txt"
"$python" -c "import accelerate, av, cv2, diffusers, ema_pytorch, filelock, h5py, piqa, psutil, pytest, scipy, skimage" 2>"$out/packages.txt" ||
	timeout 60 "$python" -m pip install -q --retries 1 --timeout 10 -r requirements.txt pytest >>"$out/packages.txt" 2>&1 ||
	echo "  packages are missing and could not be installed; see $out/packages.txt"
train=("$python" benchmarks/bench_train.py --device cuda --rounds 1 --repeats 3)
sample=("$python" benchmarks/bench_sample.py --device cuda --rounds 1 --repeats 3)
run 50 train_float32 "${train[@]}" -d balls shapes obj3d128 "${baseline[@]}"
run 50 train_bfloat16 "${train[@]}" -d balls shapes obj3d128 --precision bfloat16
run 30 train_checkpointing "${train[@]}" -d balls obj3d128 --precision bfloat16 --checkpointing --per_sample
run 30 sample_float32 "${sample[@]}" -d balls obj3d128 "${baseline[@]}"
run 30 sample_bfloat16 "${sample[@]}" -d balls obj3d128 --precision bfloat16
run 20 dynamics "$python" benchmarks/bench_dynamics.py -d balls --batch_size 32 --alone_batch_size 32
run 30 profile "$python" benchmarks/profile_step.py -d balls
run 120 tests "$python" -m pytest --gpu -q -p no:cacheprovider tests/test_compositing.py tests/test_devices.py tests/test_golden.py
echo "everything is in $out"
