#!/usr/bin/env bash
# Make the next model that ships, from nothing: bash weights/make_nano.sh [SEED [SPLIT]]
# Needs data/CVC-ClinicDB and data/Kvasir-SEG. Writes runs/nano-SPLIT-SEED/nano.safetensors.
# SPLIT is random, or sequence for whole videos held out. On a GPU; two CPU cores take more than a day.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0} split=${2:-random}
out=runs/nano-$split-$seed
data="--data kvasir+cvc --split $split"
compile=$(python -c "import torch; print('--compile' * torch.cuda.is_available())")

# 1. The autoencoder: images, masks, and drawn maps of up to 14 classes
python -m tools.train_vae $data --seed "$seed" --size 256 --batch-size 8 --steps "${VAE_STEPS:-2000}" \
    --out "$out/vae.safetensors"
# 2. tau and the U-Net, at a quarter of the pixels, where a step costs a quarter
python train.py $data --seed "$seed" --init "$out/vae.safetensors" --size 128 --batch-size 64 --lr 8e-4 \
    --steps "${SMALL_STEPS:-3000}" --eval-every "${EVERY:-1000}" $compile --out "$out/128"
# 3. The same at the full size
python train.py $data --seed "$seed" --init "$out/128/model.safetensors" --size 256 --batch-size 48 --lr 6e-4 \
    --steps "${FULL_STEPS:-2500}" --eval-every "${EVERY:-500}" $compile --out "$out/256"
# 4. The threshold and the smallest region, chosen on validation images; stored as float16
python -m tools.calibrate $data --model "$out/256/model.safetensors" --out "$out/nano.safetensors"
