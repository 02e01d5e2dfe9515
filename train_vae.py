"""Train the small autoencoder of the model that ships: `python train_vae.py --data kvasir+cvc`.

The paper takes Stable Diffusion's; this shows how one is made. It learns to reconstruct images
(L1) and class maps, in their own and in random colours (L1), under a light KL penalty.
Writes a `.safetensors` of the autoencoder alone, which `train.py --init` accepts.
"""

from common import MAX_CLASSES, Parser, Refusal, any_seed, duration, positive, run, within


def parse(argv=None):
    parser = Parser("Train the small autoencoder; the paper takes Stable Diffusion's.")
    add, amount = parser.add_argument, within(float, 0)
    add("--data", required=True, help="a data set as in train.py; its training part is used")
    add("--root", default="data", help="where the data sets lie")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--init", metavar="FILE", help="weights whose autoencoder to go on with (default: random)")
    add("--out", default="runs/vae/vae.safetensors", help="the file to write")
    add("--steps", type=positive, default=2000, help="optimiser steps")
    add("--batch-size", type=within(int, 2), default=8,
        help="a quarter images, the rest class maps")  # fmt: skip
    add("--lr", type=amount, default=1e-3, help="peak learning rate, falling linearly to zero")
    add("--kl-weight", type=amount, default=1e-4, help="of the mean KL divergence a latent value")
    add("--size", type=positive, default=128, help="pixels, H = W")
    add("--log-every", type=positive, default=50, help="steps between lines of the log")
    add("--seed", type=any_seed, default=0, help="of everything random")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"],
        help="auto: bf16 autocast where the hardware has it")  # fmt: skip
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import write_weights
from data import SegmentationData, find, write_image
from sdseg import (
    PRESETS,
    SDSeg,
    check,
    class_colours,
    find_device,
    has_fast_bf16,
    start_from,
)
from train import mask_std, round_trip


def colour_maps(mask, own, generator):
    """mask (B, H, W) class ids, their colours `own` (K, 3) -> colours (B, 3, H, W).

    A third are the masks as they are; the others two masks laid over one another, so that up to
    four colours of a random palette of up to 14 meet.
    """
    two = len(mask) // 3
    k = int(torch.randint(2, MAX_CLASSES + 1, (), generator=generator))
    both = (mask > 0).long() + 2 * (mask > 0).long().roll((1, 20, -20), (0, 1, 2))
    names = torch.rand(len(mask), k, generator=generator).argsort(1)
    names = names[:, torch.arange(4) % k]  # which colour each of the four regions takes
    several = names.gather(1, both.flatten(1)).view_as(mask)
    colours = torch.cat([own[mask[:two]], class_colours(k)[several[two:]]])
    return colours.permute(0, 3, 1, 2).contiguous()


def reconstruction_loss(vae, x, kl_weight, noise):
    """L1 + kl_weight * KL(posterior || standard normal), a mean over latent values each."""
    mean, logvar = (y.float() for y in vae.encode(x))
    z = mean + (logvar / 2).exp() * noise
    l1 = F.l1_loss(vae.decode(z).float(), x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + kl_weight * kl, l1, kl


@torch.no_grad()
def pairs(vae, x):
    """uint8 picture: inputs above, reconstructions below."""
    y = torch.cat([x, vae.decode(vae.encode(x)[0]).float()], 2).clamp(-1, 1)
    return ((y + 1) * 127.5).byte().permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()


def main(args):
    if Path(args.out).suffix != ".safetensors" or Path(args.out).is_dir():
        raise Refusal(f"{args.out}: the file to write needs a name that ends in .safetensors")
    torch.manual_seed(args.seed)
    device = find_device(args.device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_fast_bf16(device))

    # 1. Data
    found = find(args.data, args.root, args.split)
    train_data = SegmentationData(found, "train", args.size, "full", args.seed)
    val_data = SegmentationData(found, "val", args.size)

    # 2. Model and optimiser; SDSeg lends the colours of its masks
    own = dict(classes=found.classes, image_size=args.size, data=found.name, split=args.split)
    if args.init:
        model = start_from(args.init, fresh=True, **own)
    else:
        config = replace(PRESETS["nano"], **own)
        check(config)
        model = SDSeg(config)
    model.to(device)
    vae = model.vae.requires_grad_()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    print(f"{found.name}: {len(train_data)} training items; autoencoder of "
          f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M on {device}, "
          f"{'bf16' if bf16 else 'fp32'}, {args.steps} steps of {args.batch_size}")  # fmt: skip

    # 3. The loop: a quarter images, the rest maps, whose colours are the harder part
    generator = torch.Generator().manual_seed(args.seed)
    began = time.monotonic()
    for step in range(args.steps):
        warm = min(1, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * warm * (1 - step / args.steps)
        chosen = torch.randint(len(train_data), (args.batch_size,), generator=generator)
        batch = train_data.batch([(step, int(i)) for i in chosen])
        images = max(1, args.batch_size // 4)
        maps = colour_maps(batch["mask"][images:], model.colours.cpu(), generator)
        x = torch.cat([batch["image"][:images], maps]).to(device)
        noise = torch.randn(len(x), *model.latent_shape(), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, l1, kl = reconstruction_loss(vae, x, args.kl_weight, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        # 4. Log and save
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            if not l1.isfinite():
                raise Refusal(f"the loss is not finite at step {done}; lower --lr")
            left = (time.monotonic() - began) / done * (args.steps - done)
            score, std = round_trip(model, val_data, 64), mask_std(model, val_data, 64)
            print(f"step {done}  l1 {l1.item():.4f}  kl {kl.item():.2f}  masks' round trip: Dice "
                  f"{score:.4f}, std {std:.2f}  {duration(left)} left", flush=True)  # fmt: skip
    names = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    write_weights(args.out, names, model.config)
    write_image(Path(args.out).with_suffix(".png"), pairs(vae, x))
    print(f"done: {args.out}, {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    run(lambda: main(ARGS))
