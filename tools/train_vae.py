"""Train the small autoencoder of nano: `python -m tools.train_vae --data kvasir+cvc`.

The paper takes Stable Diffusion's autoencoder; this command shows how one is made. It learns to
reconstruct images and masks, which have their own colours or random ones, by L1 and a light KL
penalty. It writes a `.safetensors` of the autoencoder alone, which `train.py --init` accepts.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import SegmentationData, find
from sdseg import PRESETS, SDSeg, class_colours, from_pretrained, validate_config
from support.cli import ArgumentParser, UserError, bounded, positive_int, run_command, seed_int
from support.device import find_device, has_fast_bf16
from support.folders import MAX_CLASSES
from support.metrics import latent_std, vae_dice
from support.weights import write_weights
from train import remember_images

KL_WEIGHT = 1e-4


def parse_args(argv=None):
    parser = ArgumentParser("Train the small autoencoder; the paper takes Stable Diffusion's.")
    add = parser.add_argument
    add("--data", required=True, help="a data set as in train.py; its training part is used")
    add("--root", default="data", help="where the data sets are")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--init", metavar="FILE", help="weights with the autoencoder to start from (else: random)")
    add("--out", default="runs/vae/vae.safetensors", help="the file to write")
    add("--steps", type=positive_int, default=2000, help="optimiser steps")
    add("--batch-size", type=bounded(int, 2), default=8, help="a quarter images, the rest masks")
    add("--lr", type=bounded(float, 0), default=1e-3, help="peak rate; it falls linearly to zero")
    add("--size", type=positive_int, default=128, help="pixels, H = W")
    add("--seed", type=seed_int, default=0, help="of everything random")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of autocast")
    return parser.parse_args(argv)


def colour_masks(mask, colours, generator):
    """mask (B, H, W) class ids, `colours` (K, 3) of the classes -> rgb (B, 3, H, W) in [-1, 1].

    A third of the masks keep their classes and colours. Each of the others is overlaid with the
    mask before it, shifted: up to four regions, in colours drawn from the 2 to 14 of a data set.
    """
    unchanged = len(mask) // 3
    k = int(torch.randint(2, MAX_CLASSES + 1, (), generator=generator))
    foreground = (mask > 0).long()
    region = foreground + 2 * foreground.roll((1, 20, -20), (0, 1, 2))  # 0, 1, 2 or 3
    order = torch.rand(len(mask), k, generator=generator).argsort(1)
    class_of_region = order[:, torch.arange(4) % k]  # (B, 4)
    ids = class_of_region.gather(1, region.flatten(1)).view_as(mask)
    rgb = torch.cat([colours[mask[:unchanged]], class_colours(k)[ids[unchanged:]]])
    return rgb.permute(0, 3, 1, 2).contiguous()


def reconstruction_loss(vae, x, noise):
    """L1 + KL_WEIGHT * KL(posterior || standard normal), both means -> loss, L1, KL."""
    mean, logvar = (y.float() for y in vae.encode(x))
    z = mean + (logvar / 2).exp() * noise
    l1 = F.l1_loss(vae.decode(z).float(), x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + KL_WEIGHT * kl, l1, kl


def main(args):
    if Path(args.out).suffix != ".safetensors" or Path(args.out).is_dir():
        raise UserError(f"{args.out}: give the file to write a name that ends in .safetensors")
    torch.manual_seed(args.seed)
    device = find_device()
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_fast_bf16(device))

    # 1. Model and optimiser; of the model only the autoencoder trains
    spec = find(args.data, args.root, args.split)
    if args.init:
        model = from_pretrained(args.init, True, classes=spec.classes, image_size=args.size)
    else:
        config = replace(PRESETS["nano"], classes=spec.classes, image_size=args.size)
        validate_config(config)
        model = SDSeg(config)
    model.config = remember_images(model.config, spec, args.split)
    vae = model.to(device).vae.requires_grad_()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)

    # 2. Data
    train_data = SegmentationData(spec, "train", args.size, "full", args.seed)
    val_data = SegmentationData(spec, "val", args.size)
    print(f"{spec.name}: {len(train_data)} training items; autoencoder of "
          f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M on {device}, "
          f"{'bf16' if bf16 else 'fp32'}, {args.steps} steps of {args.batch_size}")  # fmt: skip

    # 3. The loop: a quarter images, the rest masks, because their colours are harder to learn
    generator = torch.Generator().manual_seed(args.seed)
    began = time.monotonic()
    for step in range(args.steps):
        warm = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = args.lr * warm * (1 - step / args.steps)
        indices = torch.randint(len(train_data), (args.batch_size,), generator=generator).tolist()
        batch = train_data.batch([(step, i) for i in indices])
        images = max(1, args.batch_size // 4)
        masks = colour_masks(batch["mask"][images:], model.colours.cpu(), generator)
        x = torch.cat([batch["image"][:images], masks]).to(device)
        noise = torch.randn(len(x), *model.latent_shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, l1, kl = reconstruction_loss(vae, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. Log and save
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            if not l1.isfinite():
                raise UserError(f"the loss is not finite at step {done}; use a lower --lr")
            left = (time.monotonic() - began) / done * (args.steps - done)
            dice, std = vae_dice(model, val_data, 64), latent_std(model, val_data, 64)
            print(f"step {done}  l1 {l1.item():.4f}  kl {kl.item():.2f}  rebuilt masks: Dice "
                  f"{dice:.4f}  latents: std {std:.2f}  {left:.0f} s left", flush=True)  # fmt: skip
    write_weights(args.out, {f"vae.{k}": v for k, v in vae.state_dict().items()}, model.config)
    print(f"done: {args.out}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
