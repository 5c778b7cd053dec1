#!/usr/bin/env bash
# What can be measured on a GPU alone, in order of what matters, for a machine that may have no network.
#
#   bash benchmarks/on_gpu.sh [FOLDER of results] [FOLDER of golden cases]
#
# Needs this package importable, one CUDA GPU with 80 GB or more, and no model: weights are random and made on the GPU. Every
# step has ten minutes, its own file of results, and fails for itself. First what is right, then what is fast:
# kernels against plain loops and golden cases; selection times; one recalibration step of the 7B shape in bfloat16 and
# float8 with every saving in turn, MFU, memory and the time that whole recipes would take; larger token budgets; what
# inference costs at 2,880, 640, 320, 160 and at 576, 192, 128, 64, 32 visual tokens, alone, in batches and under load, and
# with pruning inside the LLM; the backends of evaluations.
set -u
results=${1:-gpu-results}
golden=${2:-}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
mkdir -p "$results"

step() {
    local name=$1
    shift
    echo "== $name: $*"
    timeout 600 "$@" >"$results/$name.txt" 2>&1
    echo "   exit $?, $(wc -l <"$results/$name.txt") lines in $results/$name.txt"
}

step environment python -m prunetune env
[ -n "$golden" ] && step golden python -m prunetune.scripts.check_golden "$golden" --device cuda
step float8 python benchmarks/float8.py --device cuda
step pruners python benchmarks/pruners.py --device cuda
profile="python -m prunetune profile --random-weights --sizes 1,16 --clients 32 --at-most 16 --requests 96 --rounds 3"
few='["vispruner", "divprune"]'
step profile-next $profile --config tables/vispruner_llava16_7b --output "$results/profile-next"
step profile-15 $profile --config tables/vispruner_llava15_7b --methods "$few" --budgets "[192, 128, 64, 32]" \
    --output "$results/profile-15"
inside='[{stages: [{name: fastv}]}, {stages: [{name: pyramiddrop}]}, {stages: [{name: dart}]}, {stages: [{name: sparsevlm}]}, divprune]'
step profile-inside $profile --config tables/vispruner_llava15_7b --methods "$inside" --budgets "[192]" \
    --output "$results/profile-inside"
step backends python benchmarks/backends.py --device cuda --dtype bfloat16
engine="python benchmarks/recalibration.py --shape 7b --device cuda --dtype bfloat16 --samples 64"
step engine $engine --budget 10240 --float8
for budget in 5120 20480 40960; do
    step "engine-$budget" $engine --budget "$budget" --float8 --only 1 8 9
done
