"""Score a trained model: `python -m tools.evaluate --data cvc --model runs/cvc/model.safetensors`.

Every image (2-D) or volume (3-D) is a case, scored at the file's own resolution: cases.csv,
gallery.png, summary.json and a table with 95 % intervals. Cases that the model was trained on are
left out. On request also the difference from another run, the paper's stability (Table 5),
efficiency (Table 4), and Dice against DDIM steps (Figure 3).
Letters: N runs from different noise, K classes.
"""

import csv
import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import ImageDraw

from data import find, load_case, print_remarks
from infer import segment_images
from sdseg import SDSeg
from support import metrics
from support.cli import (
    ArgumentParser,
    Progress,
    UserError,
    atomic_write,
    positive_int,
    run_command,
    seed_int,
)
from support.device import device_name, find_device
from support.folders import PARTS, file_hash, image_hashes
from support.images import write_image
from support.panels import fit_tile, grid, overlay, plot_lines
from support.volumes import PLANES, grid_in_space
from tools import stability

TITLES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "benchmark_dice": "PraNet's mDice"}
REGIONS = ("lesions", "found", "missed", "false")
CURVE = (1, 2, 3, 5, 10, 20, 50)  # DDIM steps of Figure 3
TILE = 192  # pixels a side in the gallery
# How to open a .csv file: the names of files may hold bytes that are not UTF-8
CSV = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


def parse_args(argv=None):
    parser = ArgumentParser("Score a trained model on a data set; see also the README.")
    add = parser.add_argument_group("what is scored").add_argument
    add("--data", required=True, help="a data set as in train.py")
    add("--model", required=True, metavar="FILE", help="weights that train.py wrote")
    add("--root", default="data", help="the folder that holds the data sets")
    add("--part", default="test", choices=PARTS, help="the part to score")
    add("--split", choices=["random", "sequence"], help="default: as in the model's training")
    add("--limit", type=positive_int, metavar="N", help="only the first N cases")
    add("--against", metavar="CSV", help="another run's cases.csv, to compare with case by case")
    add("--out", metavar="DIR", help="where the results go (default: beside the model)")

    add = parser.add_argument_group("how it is segmented").add_argument
    add("--steps", type=positive_int, default=1, help="DDIM steps: network calls per sample")
    add("--samples", type=positive_int, default=1, help="samples per image, averaged")
    spacing = "of the DDIM steps; leading is the published code's, for comparison"
    add("--spacing", default="trailing", choices=["trailing", "leading"], help=spacing)
    add("--seed", type=seed_int, default=0, help="of the noise; repeats use the seeds after it")

    add = parser.add_argument_group("further measurements").add_argument
    add("--stability", type=positive_int, metavar="N", help="compare N seeds (Table 5)")
    add("--efficiency", action="store_true", help="measure speed and memory (Table 4)")
    add("--curve", action="store_true", help=f"Dice against {CURVE} DDIM steps (Figure 3)")

    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=positive_int, default=8, help="images or slices at a time")
    precision = "of the networks; auto: the fastest that keeps the masks"
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help=precision)
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    args = parser.parse_args(argv)
    if args.stability == 1:
        parser.error("--stability 1: one run has nothing to be compared with; give 2 or more")
    return args


# ---- cases ----


def find_as_trained(args, config):
    """The data set `args.data`, split and sliced as for the model's training, unless `args.split`
    says otherwise -> DatasetSpec. Raises UserError if its classes are not the model's.
    """
    if args.split is None:
        args.split = config.split if "cvc" in args.data.split("+") else "random"
    spec = replace(find(args.data, args.root, args.split), window=config.window,
                   plane=config.plane, context=config.context)  # fmt: skip
    classes = spec.classes
    if len(classes) != len(config.classes) or (len(classes) > 2 and classes != config.classes):
        ours, theirs = ", ".join(config.classes), ", ".join(classes)
        raise UserError(f"{args.model}: segments {ours}; {spec.name} has {theirs}")
    return spec


def cases_to_score(args, config, spec):
    """The part's cases without those that the model was trained on. Raises UserError if none is
    left. The training part is scored whole, to compare it with the others.
    """
    cases = spec.splits[args.part]
    trained_on = set(config.trained_on)
    hashes = zip(cases, image_hashes(cases))
    unseen = tuple(case for case, digest in hashes if digest not in trained_on)
    seen = len(cases) - len(unseen)
    if args.part == "train":
        print(f"the model was trained on {seen} of these {len(cases)} cases")
        return cases[: args.limit]
    if not trained_on:
        print("the model does not say which images it was trained on; some of these may be among "
              "them")  # fmt: skip
    if seen:
        print(f"left out {seen} of {len(cases)} cases: the model, or the weights that it started "
              "from, saw them in training")  # fmt: skip
    if not unseen:
        raise UserError(f"{args.model}: no case is left to score; choose another --part or --data")
    return unseen[: args.limit]


def items_of(spec, cases, remarks=None):
    """The images of the cases, or the slices of the volumes -> the case's number, the image
    (H, W, 3) uint8 and its truth (H, W), class ids. See `load_case` for the remarks.
    """
    for number, case in enumerate(cases):
        image, truth = load_case(case, spec, remarks)
        for pair in zip(image, truth) if spec.volumes else [(image, truth)]:
            yield number, *pair


# ---- scores ----


def segmented(model, spec, cases, args, steps, seeds, remarks):
    """Of each item yield the case's number, the truth and N probability tensors (C, H, W)."""
    stream = items_of(spec, cases, remarks)
    while batch := list(itertools.islice(stream, args.batch_size)):
        numbers, images, truths = zip(*batch)
        runs = [segment_images(model, images, steps, args.samples, seed, args.spacing)
                for seed in seeds]  # fmt: skip
        yield from zip(numbers, truths, zip(*runs))


def score(model, spec, cases, args, steps, seeds, similarity=None):
    """Segment every case once per seed -> pixel counts (N, cases, K - 1, 3), and a list of what
    `case_details` says of each case in the first run.
    """
    k, counts, details, remarks = len(spec.classes), [], [], []
    progress = Progress(len(cases), "cases")
    results = segmented(model, spec, cases, args, steps, seeds, remarks)
    for number, items in itertools.groupby(results, lambda result: result[0]):
        maps = []  # of each item the truth and the N predictions
        for _, truth, probs in items:
            ids = [model.class_ids(p).numpy() for p in probs]
            if similarity:
                similarity.add(number, ids, probs)
            maps.append((truth, *ids))
        truth, *predictions = np.stack(maps, 1) if spec.volumes else maps[0]
        counts.append([metrics.pixel_counts(ids, truth, k) for ids in predictions])
        voxel_size = (1, 1)
        if spec.volumes:  # the millimetres between slices, rows and columns
            voxel_size = grid_in_space(cases[number].image)[1][list(PLANES[spec.plane])]
        details.append(case_details(predictions[0], truth, k, voxel_size))
        if k == 2 and not spec.volumes:
            details[-1]["benchmark_dice"] = metrics.benchmark_dice(probs[0][0].numpy(), truth)
        progress.step()
    print_remarks(remarks)
    return np.stack(counts, 1), details


def case_details(prediction, truth, k, spacing):
    """What pixel counts do not tell about two maps of class ids: HD95 of each class, connected
    regions of all classes, and the share of the pixels that is marked as foreground.
    """
    pairs = [metrics.crop_to_both(prediction == c, truth == c) for c in range(1, k)]
    count = metrics.count_components
    regions = np.sum([count(t, p) + count(p, t) for p, t in pairs], 0)
    lesions, found, predicted, true = regions.tolist()
    return {
        "hd95": [metrics.hd95(p, t, spacing) for p, t in pairs],
        **dict(zip(REGIONS, (lesions, found, lesions - found, predicted - true))),
        "marked": np.count_nonzero(prediction) / prediction.size,
    }


def case_columns(counts, details, classes):
    """Counts (cases, K - 1, 3) and details of the cases -> {column of cases.csv: (cases,)}.

    nan where a number is undefined, and for a class that no truth holds. A case's Dice, IoU and
    HD95 are means over the other classes; hd95_undefined counts the classes without HD95.
    """
    held = counts[..., 2].any(0)
    columns = {name: np.array([case[name] for case in details]) for name in details[0]}
    scores = {
        "dice": metrics.dice_from_counts(counts),
        "iou": metrics.iou_from_counts(counts),
        "hd95": columns.pop("hd95"),
    }
    scores = {name: np.ma.masked_invalid(np.where(held, s, np.nan)) for name, s in scores.items()}
    undefined = scores["hd95"].mask.sum(1)
    means = {name: s.mean(1).filled(np.nan) for name, s in scores.items()}
    columns = means | {"hd95_undefined": undefined} | columns
    for i, c in enumerate(classes[1:] if len(classes) > 2 else []):
        columns |= {f"{name} {c}": s[:, i].filled(np.nan) for name, s in scores.items()}
    return columns


def summarise(values, groups):
    """(cases,) with nan where undefined -> {"mean", "std", "low", "high", "n"} of the others;
    low and high are the ends of the mean's 95 % interval.
    """
    defined = ~np.isnan(values)
    low, high = metrics.bootstrap_interval(values[defined], groups[defined])
    return stability.mean_std(values) | {"low": low, "high": high, "n": int(defined.sum())}


# ---- results ----


def read_against(path):
    """Another run's cases.csv -> {name: Dice}. Raises UserError."""
    try:
        with open(path, **CSV | {"encoding": "utf-8-sig"}) as file:
            return {row["case"]: float(row["dice"] or "nan") for row in csv.DictReader(file)}
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path}: not a cases.csv; it needs the columns case and dice") from None


def compare(path, other, cases, dice, groups):
    """Print and return the summary of our Dice minus the other run's, case by case."""
    theirs = np.array([other.get(case.name, np.nan) for case in cases])
    if np.isnan(theirs).all():
        raise UserError(f"{path}: holds none of the {len(cases)} cases that are scored here")
    s = summarise(dice.round(6) - theirs, groups)  # rounded as in the file
    s |= {"file": path, "only_here": len(cases) - s["n"], "only_there": len(other) - s["n"]}
    alone = f"{s['only_here']} are only here, {s['only_there']} only there"
    print(f"Dice minus that of {path}: mean {text(s['mean'])}, 95 % interval {span(s)},")
    print(f"over {s['n']} cases that both runs hold; {alone}.")
    return s


def gallery(model, spec, cases, dice, args):
    """The four worst cases, then four in the middle, each a row: image | truth | prediction.

    dice (cases,). A volume shows the slice with the most foreground.
    """
    order, middle = np.argsort(dice, kind="stable"), max(len(dice) // 2 - 2, 0)
    tiles = []
    for number in dict.fromkeys([*order[:4], *order[middle : middle + 4]]):
        items = items_of(spec, [cases[number]])
        _, image, truth = max(items, key=lambda item: np.count_nonzero(item[2]))
        prob = segment_images(model, [image], args.steps, args.samples, args.seed, args.spacing)[0]
        ids = model.class_ids(prob).numpy()
        if spec.volumes:
            image = image[..., [1, 1, 1]]  # without the neighbours
        row = [fit_tile(x, TILE) for x in (image, overlay(image, truth), overlay(image, ids))]
        name = cases[number].name.encode("ascii", "replace").decode()[-30:]
        ImageDraw.Draw(row[0]).text((4, 4), f"Dice {text(dice[number])}  {name}")
        tiles += map(np.asarray, row)
    return grid(tiles, 3)


def write_csv(path, header, rows):
    """Numbers are rounded to 6 digits, nan is an empty cell."""
    rows = [["" if v != v else round(v, 6) if isinstance(v, float) else v for v in r] for r in rows]
    with atomic_write(path) as temporary, open(temporary, "w", **CSV) as file:
        csv.writer(file).writerows([header, *rows])


def table(*rows):
    """Print rows of texts and numbers in aligned columns."""
    rows = [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("   ".join(word.ljust(n) for word, n in zip(row, widths)).rstrip())
    print()


def text(value):
    """A number with 4 digits, {"mean", "std"} as mean (std), "-" for None and nan."""
    if isinstance(value, dict):
        return f"{text(value['mean'])} ({text(value['std'])})"
    if value is None or value != value:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def span(summary):
    """The ends of a 95 % interval."""
    if summary["low"] is None:
        return "-"
    return f"{text(summary['low'])} to {text(summary['high'])}"


def results_folder(args, name):
    """--out, or a folder beside the model that says what differs from the usual evaluation."""
    if args.out:
        return Path(args.out)
    settings = "" if args.steps == args.samples == 1 else f"-{args.steps}x{args.samples}"
    settings += "-leading" if args.spacing == "leading" else ""
    settings += "-sequence" if args.split == "sequence" else ""
    for flag in ("limit", "seed", "stability", "curve", "efficiency"):
        value = getattr(args, flag)
        settings += f"-{flag}{'' if value is True else value}" if value else ""
    stem = "" if Path(args.model).stem == "model" else f"-{Path(args.model).stem}"
    return Path(args.model).parent / f"eval{stem}-{name.replace('+', '-')}-{args.part}{settings}"


def print_scores(spec, summary, columns):
    """Print the table of a run, and what its numbers leave out."""
    scores, n, groups = summary["scores"], summary["n"], summary["groups"]
    unit = summary["unit"] + "s"
    settings = "{part} part, {split} split, DDIM steps {steps}, samples {samples}"
    print(f"{spec.name}, {settings.format(**summary)}: {n} {unit} in {groups} groups")
    rows = []
    for name, s in scores.items():
        kind = name.split()[0]
        title = TITLES[kind] + name.removeprefix(kind)
        rows.append((title, s["mean"], s["std"], span(s), s["n"]))
    table((", ".join(spec.classes[1:]), "mean", "std", "95 % interval", unit), *rows)
    few = " With fewer than 10 it is too narrow; with one there is none." if groups < 10 else ""
    print(f"Interval of the mean: bootstrap over groups (videos, patients or single {unit}).{few}")
    absent = [c for c in spec.classes[1:] if not scores.get(f"dice {c}", scores["dice"])["n"]]
    if absent:
        print(f"Left out, because no truth of this part holds it: {', '.join(absent)}.")
    length, undefined = "millimetres" if spec.volumes else "pixels", columns["hd95_undefined"]
    where = f"where a class is empty, in {np.count_nonzero(undefined)} of {n} {unit}"
    print(f"HD95 is in {length}; it is undefined {where}.")
    regions = "{lesions} in the truth, {found} found, {missed} missed; {false} false ones predicted"
    print(f"Connected regions: {regions.format(**summary['regions'])}.")
    empty = columns["marked"][columns["lesions"] == 0]
    if len(empty):
        marked = f"{np.count_nonzero(empty)} of them are marked, {empty.mean():.2%} of their pixels"
        print(f"{len(empty)} {unit} have an empty truth: {marked} on average.")


def main(args, model=None):
    # 1. The model, the cases, and where the results go
    device = find_device(args.device)
    model = model or SDSeg.load(args.model, device, args.precision)
    config = model.config
    spec = find_as_trained(args, config)
    classes = spec.classes
    cases = cases_to_score(args, config, spec)
    groups = np.array([case.group for case in cases])
    other = read_against(args.against) if args.against else {}
    out = results_folder(args, spec.name)
    out.mkdir(parents=True, exist_ok=True)
    settings = ("data", "part", "split", "model", "steps", "samples", "spacing", "seed")
    summary = {
        **{k: getattr(args, k) for k in (*settings, "batch_size", "precision")},
        "sha256": file_hash(args.model),
        "unit": "volume" if spec.volumes else "image",
        "n": len(cases),
        "groups": len(set(groups)),
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }

    # 2. Efficiency, first because the peak of a process's memory never falls again
    if args.efficiency:
        runs = dict.fromkeys([(1, 1), (10, 1), (args.steps, args.samples)])
        rows = [stability.efficiency(model, device, args.batch_size, *run) for run in runs]
        summary["efficiency"] = rows
        table(rows[0], *(row.values() for row in rows))

    # 3. Dice and the other scores, with one seed or several
    seeds = range(args.seed, args.seed + (args.stability or 1))
    similarity = stability.Similarity(len(cases), device) if args.stability else None
    totals, details = score(model, spec, cases, args, args.steps, seeds, similarity)
    columns = case_columns(totals[0], details, classes)
    scored = [name for name in columns if name.split()[0] in TITLES]
    summary["scores"] = {name: summarise(columns[name], groups) for name in scored}
    summary["regions"] = {name: int(columns[name].sum()) for name in REGIONS}
    rows = zip(cases, *(column.tolist() for column in columns.values()))
    rows = [(case.name, case.group, *numbers) for case, *numbers in rows]
    write_csv(out / "cases.csv", ("case", "group", *columns), rows)
    write_image(out / "gallery.png", gallery(model, spec, cases, columns["dice"], args))
    print_scores(spec, summary, columns)
    if args.against:
        summary["against"] = compare(args.against, other, cases, columns["dice"], groups)

    # 4. Stability and curve
    if similarity:
        dice = np.array([case_columns(counts, details, classes)["dice"] for counts in totals])
        spread, levels = stability.dice_spread(dice), similarity.summary()
        summary["stability"] = {"dice": spread, **levels}
        mean, deviation = text(spread["data_set"]), text(spread["instance"])
        print(f"{args.stability} seeds: mean Dice {mean}, deviation of one case's Dice {deviation}")
        rows = [(name, *level.values()) for name, level in levels.items()]
        table(("between seeds", "data set", "instance", "pairs", "left out"), *rows)
        print("Left out: pairs of identical images, because their PSNR is infinite.")
    if args.curve and summary["scores"]["dice"]["n"]:
        header, rows = ("steps", "dice", "dice std", "iou", "iou std"), []
        for steps in CURVE:
            totals, details = score(model, spec, cases, args, steps, [args.seed])
            columns = case_columns(totals[0], details, classes)
            dice, iou = (stability.mean_std(columns[name]) for name in ("dice", "iou"))
            rows.append((steps, *dice.values(), *iou.values()))
        summary["curve"] = [dict(zip(header, row)) for row in rows]
        x, y = np.log10(CURVE), [row[1] for row in rows]
        ticks = dict(zip(map(str, CURVE), x))
        plot = plot_lines("mean Dice by DDIM steps", {"Dice": (x, y)}, ticks, (min(y), max(y)))
        write_image(out / "curve.png", plot)
        table(header, *rows)
    with atomic_write(out / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1, allow_nan=False))
    print(f"results in {out}")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
