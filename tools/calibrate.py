"""Choose the threshold and the smallest region of a two-class model, and store them with it.

`python -m tools.calibrate --data cvc --model runs/cvc/model.safetensors` sees validation data only:
the images, and square crops of them without foreground, on which every mark is a false alarm. Of
the settings that cost at most half a point of Dice it takes the one with the fewest false alarms.
It writes the model, with float16 weights, beside the old one or to `--out`.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from data import SegmentationData, square_crop
from infer import mean_and_std
from sdseg import SDSeg
from support.cli import ArgumentParser, Progress, UserError, run_command
from support.device import find_device
from support.metrics import mean_dice, pixel_counts
from tools.evaluate import find_as_trained

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST_AREAS = (0.0, 0.001, 0.002, 0.004, 0.008)  # shares of the image
DICE_COST = 0.005  # at most
FALSE_ALARM = 0.001  # an image without foreground of which more than this share is marked


def parse_args(argv=None):
    parser = ArgumentParser("Choose a two-class model's threshold and smallest region.")
    add = parser.add_argument
    add("--data", required=True, help="a data set as in train.py; its validation part is used")
    add("--root", default="data", help="where the data sets are")
    add("--split", choices=["random", "sequence"], help="of the data set (default: as in training)")
    add("--model", required=True, metavar="FILE", help="the weights to calibrate")
    add("--out", metavar="FILE",
        help="where to write (default: calibrated.safetensors beside them)")  # fmt: skip
    return parser.parse_args(argv)


def crops_without_foreground(data, n=4):
    """About n square crops of each image, 30 to 70 % of its side -> uint8 (S, S, 3) each."""
    rng = np.random.default_rng(0)
    for image, mask in zip(data.images, data.masks):
        for share, position in rng.random((n, 2)):
            side = int(len(mask) * (0.3 + 0.4 * share))
            crop = square_crop(np.asarray(image), np.asarray(mask), side, position, True)
            if crop:
                yield crop[0]


def probabilities(model, images, batch_size=16):
    """Images uint8 (S, S, 3) -> a tensor (N, 1, S, S), single step, noise of seed 0."""
    result, progress = [], Progress(len(images), "images")
    for i in range(0, len(images), batch_size):
        result.append(mean_and_std(model, images[i : i + batch_size])[0])
        progress.step(len(result[-1]))
    return torch.cat(result)


def measure(model, prob, masks, cases, free_prob):
    """-> mean Dice of `prob` against `masks`, per image or volume as `cases` says; the share of
    `free_prob` with a false alarm.
    """
    counts = {}
    for case, ids, mask in zip(cases, model.class_ids(prob), masks):
        counts[case] = counts.get(case, 0) + pixel_counts(ids, mask)
    marked = model.class_ids(free_prob).float().mean((1, 2))
    dice = mean_dice(np.stack(list(counts.values())))
    return dice, (marked > FALSE_ALARM).float().mean().item()


def main(args):
    # 1. The model and its validation images
    model = SDSeg.load(args.model, find_device())
    config = model.config
    if len(config.classes) > 2:
        raise UserError(f"{args.model}: has {len(config.classes)} classes; a threshold needs two")
    data = SegmentationData(find_as_trained(args, config), "val", config.image_size)
    free = list(crops_without_foreground(data))
    if not (free and data.has_foreground()):
        raise UserError(f"--data {args.data}: needs validation images with and without foreground")
    prob, free_prob = probabilities(model, list(data.images)), probabilities(model, free)
    masks = torch.from_numpy(np.array(data.masks))
    n = len(set(data.cases))
    few = "; that is few for a choice" if n < 20 else ""
    print(f"{args.data}: {n} validation images or volumes, {len(free)} crops without "
          f"foreground{few}")  # fmt: skip

    # 2. Each setting
    results = {}
    for setting in product(THRESHOLDS, SMALLEST_AREAS):
        names = dict(zip(("threshold", "smallest_area"), setting))
        model.config = replace(config, **names)
        results[setting] = measure(model, prob, masks, data.cases, free_prob)

    # 3. The fewest false alarms among those that cost little; of equals the best Dice
    enough = results[0.5, 0.0][0] - DICE_COST
    best = min((s for s in results if results[s][0] >= enough),
               key=lambda s: (results[s][1], -results[s][0]))  # fmt: skip
    for when, setting in (("before: ", (0.5, 0.0)), ("stored: ", best)):
        dice, alarms = results[setting]
        print(f"{when}threshold {setting[0]}, regions from {setting[1]:.1%} of the image: "
              f"validation Dice {dice:.4f}, false alarms on {alarms:.1%} of the crops")  # fmt: skip
    model.config = replace(config, threshold=best[0], smallest_area=best[1])
    out = args.out or Path(args.model).with_name("calibrated.safetensors")
    model.save(out, half=True)
    print(f"done: {out}")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
