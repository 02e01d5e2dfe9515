"""Score a trained model: `python evaluate.py --data cvc --model runs/cvc/model.safetensors`.

Dice and IoU of every image (2-D) or volume (3-D), class by class, at the files' own resolution:
cases.csv, gallery.png, summary.json and a table. On request also the paper's stability (Table 5),
efficiency (Table 4) and Dice against DDIM steps (Figure 3). Standard deviations are those of a
sample (n - 1). Letters: N repeats, P = N (N - 1) / 2 pairs of them, K classes.
"""

from common import PARTS, Parser, Progress, Refusal, positive, run, whole_file

CURVE = (1, 2, 3, 5, 10, 20, 50)  # DDIM steps of Figure 3


def parse(argv=None):
    parser = Parser("Score a trained model on a data set; see also the README.")
    add = parser.group("what is scored")
    add("--data", required=True, help="cvc, kvasir, refuge2, btcv, sts3d, demo, a+b, or a folder")
    add("--model", required=True, metavar="FILE", help="weights that train.py wrote")
    add("--root", default="data", help="where the data sets lie")
    add("--part", default="test", choices=PARTS, help="the cases to score")
    add("--split", choices=["random", "sequence", *PARTS], help="random, sequence: as in train.py "
        "(default: that of the run); train, val, test: another way to say --part")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="only the first N cases")
    add("--out", metavar="DIR", help="where the results go (default: beside the model)")

    add = parser.group("how it is segmented")
    add("--steps", type=positive, default=1, help="network calls a sample: DDIM steps")
    add("--samples", type=positive, default=1, help="samples a picture; their scores are averaged")
    add("--spacing", default="trailing", choices=["trailing", "leading"], help="of the DDIM steps; "
        "leading is the published code's, for comparison")  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise; repeats use the seeds that follow")

    add = parser.group("further measurements")
    add("--stability", type=positive, metavar="N", help="repeat with N seeds and compare (Table 5)")
    add("--efficiency", action="store_true", help="measure speed and memory (Table 4)")
    add("--curve", action="store_true", help=f"Dice against {CURVE} DDIM steps (Figure 3)")

    add = parser.group("machine")
    add("--batch-size", type=positive, default=8, help="pictures or slices at a time")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of the networks; auto: the fastest that keeps the masks")  # fmt: skip
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    if args.stability == 1:
        parser.error("--stability 1: one run has nothing to be compared with; give 2 or more")
    if args.split in PARTS:
        args.part, args.split = args.split, None
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import csv
import functools
import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from data import digest, find, load_case
from files import write_image
from infer import class_ids, segment_images
from metrics import areas, dice_of, iou_of
from sdseg import SDSeg, find_device, split_seen
from studies import Similarity, dice_spread, efficiency, mean_std, plot

TILE = 192  # pixels a side in the gallery


class Picture(NamedTuple):
    case: int  # its number; the slices of a volume share one
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) class ids
    last: bool  # of its case


def pictures(found, cases):
    """Yield the images, or the slices of the volumes, of cases [(number, case), ...]."""
    for number, case in cases:
        image, truth = load_case(case, found)
        if not found.volumes:
            image, truth = image[None], truth[None]
        for i in range(len(image)):
            yield Picture(number, image[i], truth[i], i == len(image) - 1)


def score(model, found, cases, batch_size, spacing, steps, samples, seeds, collect=None):
    """Segment every case once a seed -> (N, cases, K - 1, 3) pixels; see metrics.areas.

    `collect(case, ids, scores)` is shown the N repeats of each picture.
    """
    k = len(found.classes)
    total = np.zeros((len(seeds), len(cases), k - 1, 3), np.int64)
    progress, stream = Progress(len(cases), "cases"), pictures(found, enumerate(cases))
    while batch := list(itertools.islice(stream, batch_size)):
        images = [p.image for p in batch]
        runs = [segment_images(model, images, steps, samples, s, spacing) for s in seeds]
        for picture, *scores in zip(batch, *runs):
            ids = [class_ids(s) for s in scores]
            total[:, picture.case] += [areas(i, picture.truth, k) for i in ids]
            if collect:
                collect(picture.case, ids, scores)
            if picture.last:
                progress.step()
    return total


def by_class(total, classes):
    """(cases, K - 1, 3) pixels -> {"dice": mean and std over cases, "iou": .., "classes": ..}.

    The first two are of a case's mean over the foreground classes; "classes" has each class alone.
    """
    scores = {"dice": dice_of(total), "iou": iou_of(total)}
    columns = enumerate(classes[1:])
    each = {c: {n: mean_std(s[:, i]) for n, s in scores.items()} for i, c in columns}
    return {n: mean_std(s.mean(1)) for n, s in scores.items()} | {"classes": each}


def tile(picture, method):
    """Fit (H, W, 3) uint8 into a square; what lies outside is grey."""
    grey = (96, 96, 96)
    return ImageOps.pad(Image.fromarray(picture), (TILE, TILE), method, color=grey)


def gallery(model, found, cases, dice, args):
    """The four worst cases and four in the middle: image | truth | prediction. -> (H, W, 3) uint8.

    dice (cases,). Of a volume, the slice with the most foreground.
    """
    colours = ((model.colours.cpu() + 1) * 127.5).byte().numpy()
    canvas = Image.new("RGB", (6 * TILE + 32, 4 * (TILE + 20) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    order, middle = np.argsort(dice, kind="stable"), max(len(dice) // 2 - 2, 0)
    settings = args.steps, args.samples, args.seed, args.spacing
    for half, title, begin in ((0, "worst", 0), (3 * TILE + 28, "median", middle)):
        draw.text((half + 4, 4), f"{title}: image | truth | prediction", fill="black")
        for row, number in enumerate(order[begin : begin + 4]):
            of_case = pictures(found, [(number, cases[number])])
            p = max(of_case, key=lambda picture: np.count_nonzero(picture.truth))
            scores = segment_images(model, [p.image], *settings)[0]
            y = 20 + row * (TILE + 20)
            name = cases[number].name.encode("ascii", "replace").decode()[-60:]
            draw.text((half + 4, y + 4), f"{name}  Dice {dice[number]:.3f}", fill="black")
            canvas.paste(tile(p.image, Image.Resampling.BICUBIC), (half, y + 20))
            for i, mask in enumerate((p.truth, class_ids(scores)), 1):
                mask = tile(colours[mask], Image.Resampling.NEAREST)
                canvas.paste(mask, (half + i * (TILE + 2), y + 20))
    return np.asarray(canvas)


def write_csv(path, header, rows):
    with (
        whole_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([header, *rows])


def write_cases(path, cases, total, classes):
    """A row a case: Dice and IoU, means over the classes and, if there are several, of each."""
    dice, iou = dice_of(total), iou_of(total)
    header, columns = ["case", "dice", "iou"], [dice.mean(1), iou.mean(1)]
    if len(classes) > 2:
        header += [f"{n} {c}" for n in ("dice", "iou") for c in classes[1:]]
        columns += [*dice.T, *iou.T]
    rows = zip(*(column.round(6).tolist() for column in columns))
    write_csv(path, header, [[case.name, *row] for case, row in zip(cases, rows)])


def table(*rows):
    """Print rows of texts and numbers in aligned columns; {"mean", "std"} as mean (std)."""
    rows = [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("   ".join(word.ljust(n) for word, n in zip(row, widths)).rstrip())
    print()


def text(value):
    if isinstance(value, dict):
        return f"{text(value['mean'])} ({text(value['std'])})"
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def device_name(device):
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}"


def settle_split(args, config):
    """By default the split is the model's own, so that no test case was trained on."""
    own = split_seen(config, args.data)
    if args.split and own and args.split != own:
        print(f"beware: trained on the {own} split, so on some of the cases scored here")
    args.split = args.split or own or "random"


def results_folder(args, name):
    if args.out:
        return Path(args.out)
    runs = "" if args.steps == args.samples == 1 else f"-{args.steps}x{args.samples}"
    runs += "-leading" if args.spacing == "leading" else ""
    runs += "-sequence" if args.split == "sequence" else ""
    runs += f"-first{args.limit}" if args.limit else ""
    return Path(args.model).parent / f"eval-{name.replace('+', '-')}-{args.part}{runs}"


def main(args):
    # 1. The model, the cases, and where the results go
    device = find_device(args.device)
    model = SDSeg.load(args.model, device, args.precision)
    settle_split(args, model.config)
    found = find(args.data, args.root, args.split)
    found = replace(found, window=model.config.window)
    cases, classes = found.parts[args.part][: args.limit], found.classes
    names = model.config.classes
    if len(classes) != len(names) or (len(classes) > 2 and classes != names):
        raise Refusal(f"{args.model}: segments {', '.join(names)}; "
                      f"{found.name} has {', '.join(classes)}")  # fmt: skip
    if not cases:
        raise Refusal(f"{found.name}: its {args.part} part is empty")
    out = results_folder(args, found.name)
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        **{k: getattr(args, k) for k in ("data", "part", "split", "model")},
        "sha256": digest(args.model),
        "unit": "volume" if found.volumes else "image",
        "n": len(cases),
        **{k: getattr(args, k) for k in ("steps", "samples", "spacing", "seed", "batch_size")},
        "precision": args.precision,
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    scored = functools.partial(score, model, found, cases, args.batch_size, args.spacing)

    # 2. Efficiency, first: a process's peak of memory never falls again
    if args.efficiency:
        runs = dict.fromkeys([(1, 1), (10, 1), (args.steps, args.samples)])
        summary["efficiency"] = rows = [
            efficiency(model, device, args.batch_size, *r) for r in runs
        ]
        table(rows[0], *(r.values() for r in rows))

    # 3. Dice and IoU, with one seed or several
    seeds = range(args.seed, args.seed + (args.stability or 1))
    similarity = Similarity(len(cases), device) if args.stability else None
    totals = scored(args.steps, args.samples, seeds, similarity)
    dice = dice_of(totals[0]).mean(1)
    write_cases(out / "cases.csv", cases, totals[0], classes)
    write_image(out / "gallery.png", gallery(model, found, cases, dice, args))
    summary["scores"] = by_class(totals[0], classes)
    print(f"{found.name}, {args.part} part, {args.split} split, {len(cases)} {summary['unit']}(s), "
          f"{args.steps} x {args.samples} steps x samples: mean (standard deviation)")  # fmt: skip
    rows = [*summary["scores"]["classes"].items(), ("mean", summary["scores"])]
    rows = rows if len(classes) > 2 else rows[:1]
    table(("class", "Dice", "IoU"), *((name, s["dice"], s["iou"]) for name, s in rows))

    # 4. Stability and curve
    if args.stability:
        spread, identical = dice_spread(totals), similarity.identical()
        levels = similarity.summary()
        summary["stability"] = {"dice": spread, "identical_masks": identical, **levels}
        print(f"{args.stability} seeds: mean Dice {text(spread['data_set'])}, "
              f"deviation of one {summary['unit']}'s Dice {text(spread['instance'])}, "
              f"{100 * identical:.1f} % of the pairs of masks identical")  # fmt: skip
        rows = [(name, *level.values()) for name, level in levels.items()]
        table(("between seeds", "data set", "instance"), *rows)
    if args.curve:
        curve = [by_class(scored(n, args.samples, [args.seed])[0], classes) for n in CURVE]
        summary["curve"] = [{"steps": n, **c} for n, c in zip(CURVE, curve)]
        header = ("steps", "dice", "dice std", "iou", "iou std")
        rows = [(n, *c["dice"].values(), *c["iou"].values()) for n, c in zip(CURVE, curve)]
        write_csv(out / "curve.csv", header, rows)
        write_image(out / "curve.png", plot(CURVE, [c["dice"]["mean"] for c in curve]))
        table(header, *rows)
    with whole_file(out / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1, allow_nan=False))
    print(f"results in {out}")


if __name__ == "__main__":
    run(lambda: main(ARGS))
