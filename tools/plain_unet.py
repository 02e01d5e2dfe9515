"""Train a plain U-Net on the batches that SDSeg sees, to compare both. Needs `pip install monai`.

`python -m tools.plain_unet --data kvasir+cvc --size 128 --score cvc --out runs/unet`

MONAI's BasicUNet goes from the image to the logits: no latent, no noise, no time step. Split,
items, augmentation, optimiser, moving average, validation and the loss, cross-entropy + Dice, are
those of nano's recipe in `train.py`; the peak learning rate is 1e-3 (nano: 5e-4). `--score`
evaluates a test part as `tools.evaluate` does.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import train
from data import SegmentationData, TrainingBatches, find
from sdseg import SDSeg, SDSegConfig
from support.cli import ArgumentParser, UserError, bounded, positive_int, run_command, seed_int
from support.device import choose_dtype, find_device, loader_workers
from support.weights import load_strict, read_weights, write_weights
from tools import evaluate

RECIPE = train.RECIPES["nano"]


def parse_args(argv=None):
    parser = ArgumentParser("Train and score a plain U-Net, to compare SDSeg with it.")
    add = parser.add_argument
    add("--data", required=True, help="a data set as in train.py")
    add("--root", default="data", help="where the data sets are")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--size", type=positive_int, default=128, help="pixels, H = W, a multiple of 16")
    add("--init", metavar="FILE", help="weights of an earlier run (default: random)")
    add("--steps", type=positive_int, default=RECIPE["steps"], help="optimiser steps")
    add("--batch-size", type=positive_int, default=RECIPE["batch_size"], help="images a step")
    add("--lr", type=bounded(float, 0), default=1e-3, help="peak rate; it falls linearly to zero")
    add("--warmup", type=bounded(int, 0), default=RECIPE["warmup"], help="steps of warm-up")
    add("--eval-every", type=positive_int, default=RECIPE["eval_every"],
        help="steps between two validations")  # fmt: skip
    add("--seed", type=seed_int, default=0, help="seed of everything random")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"],
        help="number format of autocast")  # fmt: skip
    add("--score", action="append", default=[], metavar="DATA", help="a data set to score; repeats")
    add("--out", default="runs/plain-unet", metavar="DIR", help="where the results go")
    return parser.parse_args(argv)


class MonaiUNet(nn.Module):
    """BasicUNet with the methods of SDSeg that validation and evaluation call."""

    class_ids = SDSeg.class_ids
    segment = SDSeg.segment

    def __init__(self, config):
        super().__init__()
        try:
            from monai.networks.nets import BasicUNet
        except ImportError:
            raise UserError("MONAI is not installed: pip install monai") from None
        self.config = config
        features = (48, 48, 96, 192, 384, 48)  # 4.4 M parameters
        # image (B, 3, H, W) in [-1, 1] -> logits (B, K, H, W)
        self.net = BasicUNet(2, 3, len(config.classes), features)

    @torch.no_grad()
    def sample(self, image, *_):
        """-> one tensor of probabilities, as `SDSeg.sample`; steps and noise mean nothing here."""
        prob = self.net(image).float().softmax(1)
        yield prob if prob.shape[1] > 2 else prob[:, 1:]

    @property
    def device(self):
        return next(self.parameters()).device


def main(args):
    # 1. Data and model
    torch.manual_seed(args.seed)
    device = find_device()
    bf16 = choose_dtype(device, args.precision) == torch.bfloat16
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    spec = find(args.data, args.root, args.split)
    train_set = SegmentationData(spec, "train", args.size, RECIPE["augment"], args.seed)
    val_set = SegmentationData(spec, "val", args.size)
    config, tensors = SDSegConfig("plain U-Net"), None
    if args.init:
        config, tensors = read_weights(args.init, SDSegConfig)
    config = replace(config, classes=spec.classes, image_size=args.size)
    model = MonaiUNet(train.remember_images(config, spec, args.split))
    if tensors:
        load_strict(model, tensors, args.init)
    model.to(device)

    # 2. The optimiser and the loop, as in train.py
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=args.lr, fused=True)
    ema, averages = train.make_ema(model)
    batches = TrainingBatches(train_set, args.batch_size, args.seed)
    loader = DataLoader(batches, batch_size=None, sampler=range(args.steps),
                        num_workers=loader_workers(device))  # fmt: skip
    best, began = -1.0, time.monotonic()
    file = Path(args.out) / "model.safetensors"
    for step, (image, mask, _) in enumerate(loader):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, args, decay=True)
        with autocast():
            logits = model.net(image.to(device)).float()
            loss = train.cross_entropy_and_dice(logits, mask.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train.update_ema(averages, trained, step, RECIPE["ema"])
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            with autocast():
                score = train.validate(ema.eval(), val_set)
            print(f"step {done}  loss {loss.item():.4f}  {train.in_words(score)}  "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
            if not score <= best:  # better, or undefined
                best = score
                write_weights(file, ema.state_dict(), ema.config)

    # 3. The test parts
    model.load_state_dict(read_weights(file, SDSegConfig)[1])
    for name in args.score:
        flags = ["--data", name, "--root", args.root, "--model", str(file)]
        evaluate.main(evaluate.parse_args(flags), model.eval())


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
