"""Train the small autoencoder of nano: `python -m tools.train_vae --data kvasir+cvc`.

The paper takes Stable Diffusion's autoencoder; this command shows how one is made. It learns to
rebuild images, masks, and drawn maps of 2 to 14 classes. The loss is L1, a small KL term, and for
masks and maps the cross-entropy of their classes. Batches alternate between --size, a half and a
quarter of it. It writes a `.safetensors` of the autoencoder alone, which `train.py --init` accepts.
Letters: n images of a batch, k classes of a map, S the side of the current batch.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import SegmentationData, find
from sdseg import PRESETS, SDSeg, class_colours, colour_logits, from_pretrained, validate_config
from support.cli import ArgumentParser, UserError, bounded, positive_int, run_command, seed_int
from support.device import choose_dtype, find_device, loader_workers
from support.folders import MAX_CLASSES
from support.metrics import dice, latent_std, vae_dice
from support.weights import write_weights
from train import remember_images

KL_WEIGHT, CLASS_WEIGHT = 1e-4, 0.2
CH_MULT = {4: PRESETS["nano"].vae.ch_mult, 8: (1, 1, 2, 2)}  # --factor: channels of the levels


def parse_args(argv=None):
    parser = ArgumentParser("Train the small autoencoder; the paper takes Stable Diffusion's.")
    add = parser.add_argument
    add("--data", required=True, help="a data set as in train.py; its training part is used")
    add("--root", default="data", help="where the data sets are")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--init", metavar="FILE", help="weights with the autoencoder to start from (else: random)")
    add("--out", default="runs/vae/vae.safetensors", help="the file to write")
    add("--steps", type=positive_int, default=2000, help="optimiser steps")
    add("--factor", type=int, default=4, choices=[4, 8], help="image side / latent side")
    batch = "at --size, a multiple of 4; of smaller images more"
    add("--batch-size", type=bounded(int, 4), default=8, help=batch)
    add("--lr", type=bounded(float, 0), default=1e-3, help="peak rate; it falls linearly to zero")
    add("--size", type=positive_int, default=128, help="pixels, H = W, of the largest batches")
    add("--seed", type=seed_int, default=0, help="seed of everything random")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"],
        help="number format of autocast")  # fmt: skip
    return parser.parse_args(argv)


def draw_maps(n, k, size, generator):
    """n maps of class ids 0 to k - 1, (n, size, size) int64: regions of many sizes and shapes.

    A map is the argmax of k fields of smooth noise, coarse or fine. Each field has a bias, so some
    classes cover much and others little. Up to six ellipses and boxes lie on top of it.
    """

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    fields = []
    for fineness in uniform(n).tolist():
        cells = 2 + int((size / 10) ** fineness)  # bumps a side
        grid = torch.randn(1, k, cells, cells, generator=generator)
        fields.append(F.interpolate(grid, (size, size), mode="bicubic", align_corners=True))
    bias = 0.5 * torch.randn(n, k, 1, 1, generator=generator)
    maps = (torch.cat(fields) + bias).argmax(1)
    y = torch.linspace(0, 1, size)[:, None]
    for _ in range(6):
        centre_y, centre_x, angle, height, width, kind, covers = uniform(7, n, 1, 1)
        dy, dx, cos, sin = y - centre_y, y.T - centre_x, (6.3 * angle).cos(), (6.3 * angle).sin()
        u = (dy * cos + dx * sin).abs() / (0.02 * 15**height)  # radii: 2 to 30 % of the side
        v = (dx * cos - dy * sin).abs() / (0.02 * 15**width)
        inside = torch.where(kind < 0.5, u.square() + v.square(), u.maximum(v)) < 1
        drawn = (k * uniform(n, 1, 1)).long()
        maps = torch.where(inside & (covers < 0.4), drawn, maps)
    return maps


def sizes_of(size, levels):
    """The sides that training alternates between: `size`, and a half and a quarter of it where
    these are at least 32 and the levels can halve them.
    """
    unit = 2 ** (levels - 1)
    return [s for s in (size, size // 2, size // 4) if s == size or s >= 32 and s % unit == 0]


class ColourBatches(torch.utils.data.Dataset):
    """[step] -> rgb (n, 3, S, S) in [-1, 1]: a quarter images, a quarter masks of other cases, both
    augmented, and half drawn maps; then masks and maps as class ids, [(ids (m, S, S), k)].

    S goes through `sizes`; a batch of the largest S has n = `batch_size`, and of S / 2 twice that.
    """

    def __init__(self, data, classes, sizes, batch_size):
        self.data, self.colours = data, class_colours(classes)
        self.sizes, self.batch_size = sizes, batch_size

    def __getitem__(self, step):
        side = self.sizes[step % len(self.sizes)]
        quarter = self.batch_size * self.sizes[0] // side // 4
        rng = np.random.default_rng([self.data.seed, step])
        batch = self.data.batch([(step, i) for i in rng.integers(len(self.data), size=2 * quarter)])
        image = F.interpolate(batch["image"][:quarter], (side, side), mode="area")
        mask = F.interpolate(batch["mask"][quarter:, None].float(), (side, side))[:, 0].long()
        k = int(rng.integers(2, MAX_CLASSES + 1))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        maps = draw_maps(2 * quarter, k, side, generator)
        rgb = torch.cat([self.colours[mask], class_colours(k)[maps]])
        return torch.cat([image, rgb.permute(0, 3, 1, 2)]), [(mask, len(self.colours)), (maps, k)]


def reconstruction_loss(vae, x, labels):
    """What `ColourBatches` yields -> loss, L1, KL(posterior || standard normal), all means.

    L1 alone lets an edge between two classes pass through the colour of a third. The cross-entropy
    of the classes punishes that.
    """
    mean, logvar = (y.float() for y in vae.encode(x))
    rgb = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)).float()
    l1 = F.l1_loss(rgb, x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    parts = rgb[len(rgb) // 4 :].split([len(ids) for ids, _ in labels])
    cross_entropy = sum(
        F.cross_entropy(colour_logits(part, class_colours(k).to(part.device)), ids)
        for part, (ids, k) in zip(parts, labels)
    )
    return l1 + KL_WEIGHT * kl + CLASS_WEIGHT * cross_entropy, l1, kl


@torch.no_grad()
def worst_class_dice(vae, k, size, n=16):
    """Dice of the worst of k classes, over n drawn maps (size, size) that are encoded and decoded.

    It says how many classes the autoencoder carries. The maps are always the same.
    """
    maps, found = draw_maps(n, k, size, torch.Generator().manual_seed(0)), []
    colours = class_colours(k).to(next(vae.parameters()).device)
    for some in maps.split(4):
        rgb = colours[some.to(colours.device)].permute(0, 3, 1, 2)
        found.append(colour_logits(vae.decode(vae.encode(rgb)[0]), colours).argmax(1).cpu())
    found = torch.cat(found)
    return min(dice((found == c).numpy(), (maps == c).numpy()).item() for c in range(k))


def main(args):
    if Path(args.out).suffix != ".safetensors" or Path(args.out).is_dir():
        raise UserError(f"{args.out}: give the file to write a name that ends in .safetensors")
    if args.batch_size % 4:
        raise UserError(f"--batch-size {args.batch_size}: give a multiple of 4")
    torch.manual_seed(args.seed)
    device = find_device()
    bf16 = choose_dtype(device, args.precision) == torch.bfloat16

    # 1. Model and optimiser; of the model only the autoencoder trains
    spec = find(args.data, args.root, args.split)
    if args.init:
        changes = dict(classes=spec.classes, image_size=args.size)
        model = from_pretrained(args.init, vae_only=True, **changes)
    else:
        preset = PRESETS["nano"]
        vae = replace(preset.vae, ch_mult=CH_MULT[args.factor])
        config = replace(preset, vae=vae, classes=spec.classes, image_size=args.size)
        validate_config(config)
        model = SDSeg(config)
    model.config = remember_images(model.config, spec, args.split)
    vae = model.to(device).vae.requires_grad_()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0,
                                  fused=True)  # fmt: skip

    # 2. Data
    train_data = SegmentationData(spec, "train", args.size, "full", args.seed)
    val_data = SegmentationData(spec, "val", args.size)
    sizes = sizes_of(args.size, len(model.config.vae.ch_mult))
    batches = ColourBatches(train_data, len(spec.classes), sizes, args.batch_size)
    loader = DataLoader(batches, batch_size=None, sampler=range(args.steps),
                        num_workers=loader_workers(device),
                        pin_memory=device.type == "cuda")  # fmt: skip
    print(f"{spec.name}: {len(train_data)} training items; autoencoder of "
          f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M on {device}, "
          f"{'bf16' if bf16 else 'fp32'}, {args.steps} steps of {args.batch_size}")  # fmt: skip

    # 3. The loop
    began, log_every = time.monotonic(), max(50, args.steps // 20)
    for step, (x, labels) in enumerate(loader):
        warm = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = args.lr * warm * (1 - step / args.steps)
        x = x.to(device, non_blocking=True)
        labels = [(ids.to(device, non_blocking=True), k) for ids, k in labels]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, l1, kl = reconstruction_loss(vae, x, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. Log and save
        done = step + 1
        if done % log_every == 0 or done == args.steps:
            if not l1.isfinite():
                raise UserError(f"the loss is not finite at step {done}; use a lower --lr")
            left = (time.monotonic() - began) / done * (args.steps - done)
            kept, std = vae_dice(model, val_data, 64), latent_std(model, val_data, 64)
            print(f"step {done}  l1 {l1.item():.4f}  kl {kl.item():.2f}  rebuilt masks: Dice "
                  f"{kept:.4f}  latents: std {std:.2f}  {left:.0f} s left", flush=True)  # fmt: skip
    worst = (f"{k} classes {worst_class_dice(vae, k, args.size):.3f}" for k in (2, 4, 9, 14))
    print(f"rebuilt drawn maps, Dice of the worst class: {', '.join(worst)}")
    write_weights(args.out, {f"vae.{k}": v for k, v in vae.state_dict().items()}, model.config)
    print(f"done: {args.out}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
