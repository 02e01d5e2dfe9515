#!/usr/bin/env bash
# Make the model that ships, from nothing: bash weights/make_nano.sh [SEED [SPLIT]]
# Needs data/CVC-ClinicDB and data/Kvasir-SEG. Writes runs/nano-SPLIT-SEED/nano.safetensors.
# SPLIT is random, or sequence for whole videos held out. It takes less than 7 minutes of one H100 (make_nano.log).
# Without a GPU it makes a weak version at 128 px, in about 35 minutes of two cores (README.md).
# VAE, SMALL and FULL replace the flags below: FULL="--size 128 --steps 9" bash weights/make_nano.sh
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0} split=${2:-random}
out=runs/nano-$split-$seed
data="--data kvasir+cvc --root ${ROOT:-data} --split $split"

if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    train="python train.py"  # without --compile, which takes longer than it saves here
    vae="--size 256 --batch-size 8 --steps 1500"
    small="--size 128 --batch-size 64 --lr 8e-4 --steps 900 --eval-every 450"
    full="--size 256 --batch-size 48 --lr 6e-4 --steps 1100 --eval-every 220"
else
    train="torchrun --nproc_per_node=2 train.py"
    vae="--size 128 --batch-size 4 --steps 2000"
    small="--size 64 --batch-size 16 --steps 600 --eval-every 300"
    full="--size 128 --batch-size 16 --steps 100 --warmup 20 --eval-every 100"
fi

# 1. The autoencoder: images, masks, and drawn maps of up to 14 classes
python -m tools.train_vae $data --seed "$seed" ${VAE:-$vae} --out "$out/vae.safetensors"
# 2. tau and the U-Net at half the size, where an image costs less
$train $data --seed "$seed" --init "$out/vae.safetensors" ${SMALL:-$small} --out "$out/small"
# 3. The same at the final size
$train $data --seed "$seed" --init "$out/small/model.safetensors" ${FULL:-$full} --out "$out/full"
# 4. The threshold and the smallest region, chosen on validation images; stored as float16
python -m tools.calibrate $data --model "$out/full/model.safetensors" --out "$out/nano.safetensors"
