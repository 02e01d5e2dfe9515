"""Check a data set before anyone trains on it: `python -m tools.check_data --data cvc`.

Prints the size and the class shares of each part, and all that is odd: files that cannot be read,
masks that may lie elsewhere than their image, images in two parts, no foreground. The exit status
is 1 if anything is odd. A contact sheet shows some cases of each part under their masks, one part a
row. With `--list test`, it prints the names of that part only.
"""

from pathlib import Path

import numpy as np

from data import find, load_case
from support.cli import ArgumentParser, Progress, UserError, run_command
from support.folders import PARTS, image_hashes
from support.images import resize_image, resize_mask, write_image
from support.panels import grid, overlay


def parse_args(argv=None):
    parser = ArgumentParser("Check a data set: sizes, class shares, what is odd, a contact sheet.")
    add = parser.add_argument
    add("--data", required=True, help="cvc, kvasir, refuge2, btcv, btcv-organs, sts3d, demo, "
        "several as a+b, or a folder")  # fmt: skip
    add("--root", default="data", help="where the data sets are")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--list", choices=PARTS, help="only print the names of this part")
    add("--out", default="contact_sheet.png", help="the contact sheet")
    return parser.parse_args(argv)


def tile(image, ids, side=112):
    """A case's image under its mask, of a volume the middle slice with foreground, side x side."""
    if ids.ndim == 3:
        filled = np.flatnonzero(ids.any((1, 2)))
        z = filled[len(filled) // 2] if len(filled) else len(ids) // 2
        image, ids = image[z], ids[z]
    return overlay(resize_image(image, side), resize_mask(ids, side))


def describe(spec, part, problems):
    """Print a part's line and append what is odd to `problems` -> tiles of up to 8 cases."""
    pixels, sizes, empty, tiles = np.zeros(len(spec.classes)), set(), [], []
    inverted = 0  # masks with foreground in all four corners
    cases = spec.splits[part]
    progress = Progress(len(cases), f"{part} cases checked")
    for n, case in enumerate(cases):
        progress.step()
        try:
            image, ids = load_case(case, spec, problems)
        except UserError as error:
            problems.append(f"cannot be used: {error}")
            continue
        pixels += np.bincount(ids.ravel(), minlength=len(pixels))
        sizes.add(ids.shape[::-1])
        if not ids.any():
            empty.append(case.name)
        inverted += ids[..., [0, 0, -1, -1], [0, -1, 0, -1]].all()
        if n % max(1, len(cases) // 8) == 0 and len(tiles) < 8:
            tiles.append(tile(image, ids))
    if not sizes:
        print(f"{part:5}  {len(cases)} cases, none of them can be used")
        return tiles
    shares = ", ".join(f"{c} {100 * p:.2f} %" for c, p in zip(spec.classes, pixels / pixels.sum()))
    span = " to ".join(" x ".join(map(str, s)) for s in sorted({min(sizes), max(sizes)}))
    names = f": {', '.join(empty[:5])}{', ..' if len(empty) > 5 else ''}" if empty else ""
    print(f"{part:5}  {len(cases)} cases, {span}; {shares}; {len(empty)} empty masks{names}")
    absent = [name for name, n in zip(spec.classes[1:], pixels[1:]) if not n]
    if absent:
        problems.append(f"no mask of the {part} part holds {', '.join(absent)}")
    if inverted > len(cases) / 2:
        problems.append(f"{inverted} of {len(cases)} {part} masks are foreground in all four "
                        "corners: are they inverted?")  # fmt: skip
    return tiles


def duplicates(spec):
    """Lines on images with the same bytes in two different parts."""
    first = {}
    for part in PARTS:
        for case, digest in zip(spec.splits[part], image_hashes(spec.splits[part])):
            other, name = first.setdefault(digest, (part, case.name))
            if other != part:
                yield f"same image in two parts: {other} {name} and {part} {case.name}"


def divided_folders(spec):
    """A line on folders of images with cases in two parts: a folder may be a patient."""
    parts = {}
    for part in PARTS:
        for case in spec.splits[part]:
            if case.group == case.name and "/" in case.name:  # in no groups.json, in a subfolder
                parts.setdefault(case.image.parent, set()).add(part)
    divided = sorted(folder for folder, found in parts.items() if len(found) > 1)
    if divided:
        yield (f"{len(divided)} of {len(parts)} folders, such as {divided[0]}, have images in two "
               "parts: if a folder is a patient or a video, write groups.json")  # fmt: skip


def main(args):
    spec = find(args.data, args.root, args.split)
    cases = sum(spec.splits.values(), ())
    if Path(args.out).resolve() in {p.resolve() for c in cases for p in (c.image, c.mask) if p}:
        raise UserError(f"{args.out}: is one of the data set's files; choose another --out")
    if args.list:
        print("\n".join(case.name for case in spec.splits[args.list]))
        return 0
    window = ", intensity window {:g} to {:g}".format(*spec.window) if spec.window else ""
    plane = f", {spec.plane} slices" if spec.volumes else ""
    crop = ", cut to twice the optic disc of the mask" if spec.label_format == "cup" else ""
    classes = f"{len(spec.classes)} classes ({', '.join(spec.classes)})"
    print(f"{spec.name}: {classes}{window}{plane}{crop}")
    problems = []
    rows = [describe(spec, part, problems) for part in PARTS]
    problems += duplicates(spec)
    if Path(args.data).is_dir():
        problems += divided_folders(spec)
    if spec.not_read:
        print(spec.not_read)
    print("\n".join([*problems, f"odd: {len(problems) or 'nothing'}"]))
    if any(rows):
        blank = np.zeros((112, 112, 3), np.uint8)
        sheet = [tile for row in rows if row for tile in row + [blank] * (8 - len(row))]
        write_image(args.out, grid(sheet, 8))
        print(f"contact sheet: {args.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
