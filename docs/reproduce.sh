#!/usr/bin/env bash
# The paper for one data set: bash docs/reproduce.sh cvc       (or kvasir, refuge2, btcv, sts3d, demo, a folder)
#
# It converts the checkpoint, trains by the paper's recipe, evaluates, and writes runs/reproduce-NAME/report.md: the
# paper's numbers beside ours. Call it again after an interruption: training goes on, and what is finished is skipped.
# docs/data.md says where the data set and the checkpoint come from. CHECKPOINT=FILE, if it is not in the repository's folder.
#
# By estimate (docs/speed.md: 13.6 GiB) it fits a GPU with 16 GB, such as the free T4 of a notebook service; it has not run
# on one yet. The paper used a V100 for about 12 hours.
# A rehearsal on drawn data, minutes on a CPU; the model learns nothing in it:
#   INIT=weights/nano.safetensors SIZE=64 STEPS=4 WARMUP=1 EVERY=2 LIMIT=2 bash docs/reproduce.sh demo
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?give a data set: cvc, kvasir, refuge2, btcv, sts3d, demo, or a folder}

# The choices; set one in front of the command, and another folder: LR=1e-5 OUT=runs/slow bash docs/reproduce.sh cvc
UNET=${UNET:-sd-v1}           # sd-v1: Stable Diffusion's, as the paper says; ldm-kl-8: LDM's, which its code trains
LR=${LR:-4e-5}                # the paper says 1e-5; its code multiplies that by the batch size
WARMUP=${WARMUP:-1000}        # steps; the paper says nothing, its code has 10000
STEPS=${STEPS:-100000}        # the paper's
BATCH=${BATCH:-4}             # the paper's
SIZE=${SIZE:-256}             # pixels; the paper's
PRECISION=${PRECISION:-auto}  # bf16 where the hardware has it, else fp16; on a CPU without it fp32
EVERY=${EVERY:-2000}          # steps between two validations; the best of them is kept
SEED=${SEED:-0}
ROOT=${ROOT:-data}            # where the data sets are
INIT=${INIT:-weights/$UNET.safetensors}
OUT=${OUT:-runs/reproduce-$(basename "$data" | tr + -)}
limit=${LIMIT:+--limit $LIMIT}  # for a rehearsal: only the first cases are scored

# 1. The data set. What is odd is printed; what is missing stops here, with its address
sheet=$OUT/contact_sheet.png
[ "$data" = demo ] || [ -e "$sheet" ] || python -m tools.check_data --data "$data" --root "$ROOT" --out "$sheet" ||
    [ $? = 1 ] || exit 2

# 2. The initial weights
case $UNET in
    sd-v1) checkpoint=${CHECKPOINT:-v1-5-pruned-emaonly.safetensors} ;;
    *) checkpoint=${CHECKPOINT:-kl-f8/model.ckpt lsun_churches/model.ckpt} ;;
esac
[ -e "$INIT" ] || python convert_sd_weights.py $checkpoint --out "$INIT"

# 3. Training: a run that has a state goes on; the log tells whether it is finished
trained=$(tail -n 1 "$OUT/log.csv" 2> /dev/null | cut -d, -f1) || true
if [ ! -e "$OUT/resume.pt" ]; then
    rm -f "$OUT/config.json"  # of a run that was killed before it saved anything
    compile=$(python -c "import torch; print('--compile' * torch.cuda.is_available())")
    python train.py --data "$data" --root "$ROOT" --init "$INIT" --size "$SIZE" --lr "$LR" --warmup "$WARMUP" \
        --steps "$STEPS" --batch-size "$BATCH" --precision "$PRECISION" --eval-every "$EVERY" --seed "$SEED" \
        $compile --out "$OUT"
elif [ "$trained" != "$STEPS" ]; then
    python train.py --resume "$OUT" --root "$ROOT" --steps "$STEPS"
fi

# 4. Scores and Table 5, Table 4, Figure 3, each in its folder; one that is newer than the model is finished
evaluate() {
    [ "$OUT/$1/summary.json" -nt "$OUT/model.safetensors" ] || python -m tools.evaluate --data "$data" \
        --root "$ROOT" --model "$OUT/model.safetensors" --out "$OUT/$1" $limit "${@:2}"
}
evaluate stability --stability 10
evaluate efficiency --efficiency
evaluate curve --curve

# 5. The page
python -m tools.report "$OUT"
