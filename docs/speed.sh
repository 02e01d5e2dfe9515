#!/usr/bin/env bash
# Measure speed and memory on one GPU in about 10 minutes: bash docs/speed.sh FOLDER [STEP ..]
# The steps run in this order, each with a time limit, and leave FOLDER/STEP.txt. The most important
# come first, so the script may be cut short. PRESET and OTHER name other presets, for a rehearsal.
set -u
cd "$(dirname "$0")/.."
folder=${1:?give a folder for the results}
chosen=" ${*:2} "
preset=${PRESET:-sd-v1}
other=${OTHER:-ldm-kl-8}
mkdir -p "$folder"

step() {  # name, limit in seconds, command
    [[ $chosen == "  " || $chosen == *" $1 "* ]] || return 0
    echo "== $1: ${*:3}"
    timeout -k 5 "$2" "${@:3}" 2>&1 | tee "$folder/$1.txt"
    echo "== $1: exit status ${PIPESTATUS[0]}, $SECONDS s since the start" | tee -a "$folder/$1.txt"
}

bench="python3 -m tools.benchmark"
small="--precision fp16 --train --small-gpu --batch-sizes= --seconds 2"
step parity 90 python3 -m pytest -q -rs tests/test_networks.py
step memory 60 $bench --preset "$preset" $small
step memory-other 45 $bench --preset "$other" $small
step inference 280 $bench --preset "$preset" --compile --diffusers --batch-sizes 1,64 --seconds 1
step train 230 $bench --preset "$preset" --train --compile --batch-sizes= --seconds 3
step train-other 230 $bench --preset "$other" --train --compile --batch-sizes= --seconds 3
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True step memory-env 60 $bench --preset "$preset" $small
