#!/usr/bin/env bash
# What a GPU machine is asked first, in at most 6 minutes: the tests that need a GPU, a training step and a roll-out by
# configuration and precision, and a profile of a step.
#   benchmarks/gpu.sh OUT_DIR [BASELINE]     BASELINE: another checkout, which is measured in turn with this one
# Uses `python3` of the environment, which needs the packages of requirements.txt and pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?benchmarks/gpu.sh OUT_DIR [BASELINE]}
baseline=${2:+--baseline $2}
mkdir -p "$out"
# run SECONDS NAME COMMAND...: into OUT_DIR/NAME.txt; what takes longer is ended, and the rest goes on.
run() {
	echo "$2"
	timeout "$1" "${@:3}" >"$out/$2.txt" 2>&1 || echo "  ended with status $?; see $out/$2.txt"
	tail -n 3 "$out/$2.txt" | cut -c1-160
}
nvidia-smi >"$out/machine.txt"
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" | tee -a "$out/machine.txt"
run 90 tests python3 -m pytest --gpu -q -p no:cacheprovider tests/test_devices.py tests/test_compositing.py tests/test_golden.py
for precision in float32 bfloat16; do
	options="--device cuda --precision $precision --rounds 1 --repeats 3"
	# shellcheck disable=SC2086
	run 60 "train_$precision" python3 benchmarks/bench_train.py -d shapes balls obj3d128 $options $baseline
	# shellcheck disable=SC2086
	run 40 "sample_$precision" python3 benchmarks/bench_sample.py -d balls obj3d128 $options $baseline
done
run 60 profile python3 benchmarks/profile_step.py -d balls --device cuda
