"""The data sets: where they lie, how they are split, and batches of them, augmented.

    python data.py --data cvc          checks a data set before anyone trains on it
    python data.py --data cvc --list test

Every data set yields the same: image float32 (3, S, S) in [-1, 1], mask int64 (S, S) of class
ids, name. Splits depend on sorted names and a fixed seed alone. Volumes are split by volume and
cut into axial slices. This module and `files.py`, `demo.py` know nothing of the model.
"""

from common import MAX_CLASSES, PARTS, Parser, Progress, Refusal, run, whole_file


def parse(argv=None):
    parser = Parser("Check a data set: counts, sizes, class shares, duplicates, a contact sheet.")
    add = parser.add_argument
    add("--data", required=True, help="cvc, kvasir, refuge2, btcv, sts3d, demo, a+b, or a folder")
    add("--root", default="data", help="where the data sets lie")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--list", choices=PARTS, help="only print the names of this part")
    add("--out", default="contact_sheet.png", help="the contact sheet")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import hashlib
import json
import os
import random
import re
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from demo import draw_demo
from files import (
    IMAGE_ENDINGS,
    VOLUME_ENDINGS,
    is_volume,
    pictures_of,
    read_image,
    read_mask,
    read_volume,
    resize_image,
    resize_mask,
    slices_of,
    stem,
    write_image,
)

VERSION = 6  # of what the cache holds; raise it when reading or resizing changes


@dataclass(frozen=True)
class Case:
    """One picture or one volume with its mask."""

    name: str
    image: Path | None = None
    mask: Path | None = None
    seed: int | None = None  # of a drawn picture, which has no files


@dataclass(frozen=True)
class Found:
    """A data set: its classes, how to read it, and its cases by part."""

    name: str
    parts: dict  # "train", "val", "test" -> tuple of Case
    classes: tuple = ("background", "foreground")  # a class's id is its place
    rule: str = "binary"  # how mask values become class ids; see `class_ids`
    window: tuple | None = None  # (low, high) intensities of volumes; None: each volume's own
    volumes: bool = False


# ---- reading one case ----


def is_jpeg(path):
    return str(path).lower().endswith((".jpg", ".jpeg"))


def class_ids(values, rule, k, path):
    """Mask values -> uint8 class ids. Raises Refusal for values that are none.

    "binary": 0 and 1, or 0 and 255 with what compression left between; "any": all above 0 is
    one class; "cup": 0 is the optic cup; "ids": the ids themselves.
    """
    top = int(values.max())
    if rule == "any":
        return (values > 0).astype(np.uint8)
    if rule == "cup":
        return (values < 64).astype(np.uint8)
    # Small values are ids that the data set does not have, but for what JPEG leaves of 0; and one
    # dark grey alone, as 100, was meant to be white.
    dark = MAX_CLASSES <= top <= 127 and len(np.unique(values)) == 2
    if rule == "binary" and (top > 1 if is_jpeg(path) else top >= MAX_CLASSES and not dark):
        return (values > 127).astype(np.uint8)
    if top >= k or values.min() < 0 or (values % 1).any():
        seen = ", ".join(f"{v:g}" for v in np.unique(values)[:20])
        raise Refusal(f"{path}: mask values {seen}; {k} classes have the ids 0 to {k - 1}")
    return values.astype(np.uint8)


def load_case(case, found):
    """-> image uint8 (H, W, 3), mask uint8 (H, W); a volume: (Z, H, W, 3), (Z, H, W).

    At the file's own size; a volume's intensities through the window. Raises Refusal.
    """
    if case.seed is not None:
        return draw_demo(case.seed, 256)
    if found.volumes:
        (volume, there), (ids, here) = read_volume(case.image), read_volume(case.mask)
        if not same_place(there, here):
            raise Refusal(f"{case.mask}: lies elsewhere in space than {case.image.name}, and is "
                          "turned differently; save both with the same affine")  # fmt: skip
        image, values = pictures_of(volume, found.window), slices_of(ids)
    else:
        image, values = read_image(case.image), read_mask(case.mask)
    if image.shape[: values.ndim] != values.shape:
        raise Refusal(
            f"{case.mask}: a mask of {values.shape}, but {case.image.name} is "
            f"{image.shape[: values.ndim]}; they must match"
        )
    ids = class_ids(values, found.rule, len(found.classes), case.mask)
    return crop_to_disc(image, values, ids) if found.rule == "cup" else (image, ids)


def same_place(a, b):
    """Whether two volumes' voxels can be compared: stored alike, or turned to the same place.

    A mask saved without its image's affine would otherwise be mirrored without a word.
    """
    if np.array_equal(a.turns, b.turns):
        return True
    from nibabel.orientations import inv_ornt_aff

    corners = [g.affine @ inv_ornt_aff(g.turns, (*g.shape, 1)[:3]) @ (0, 0, 0, 1) for g in (a, b)]
    return np.abs(corners[0] - corners[1]).max() <= max(a.spacing)


def crop_to_disc(image, values, ids):
    """REFUGE: a full fundus is cut to a square of twice the optic disc; a disc crop stays.

    The paper segments the cup in disc crops; the disc is found by the mask, so this is a crop
    with knowledge of the truth, as in the published protocol.
    """
    rows, columns = np.nonzero(values < 192)
    if not len(rows):
        return image, ids
    side = 2 * max(np.ptp(rows), np.ptp(columns)) + 2
    if side > 0.7 * min(ids.shape):
        return image, ids
    begins = [(int(x.min() + x.max()) - side) // 2 for x in (rows, columns)]
    begins = [min(max(begin, 0), n - side) for begin, n in zip(begins, ids.shape)]
    square = tuple(slice(begin, begin + side) for begin in begins)
    return image[square], ids[square]


# ---- finding files ----


def natural(name):
    """Sort key: img2 before img10."""
    return [(0, int(p)) if i % 2 else (1, p) for i, p in enumerate(re.split(r"(\d+)", name))]


def listing(folder, endings):
    """{stem: path} of a folder's files. Raises Refusal for two files of one stem."""
    paths = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(endings):
            continue  # hidden, ._resource forks, Thumbs.db and the like
        if stem(path) in paths:
            raise Refusal(f"{path}: {paths[stem(path)].name} has the same name; keep one of them")
        paths[stem(path)] = path
    return paths


def pairs(images, masks, mask_name=str):
    """The cases of two folders, by stem, in natural order. Raises Refusal naming a lone file."""
    endings = (*IMAGE_ENDINGS, *VOLUME_ENDINGS)
    left = {mask_name(name): path for name, path in listing(images, endings).items()}
    right = listing(masks, endings)
    for lone, folder in ((left.keys() - right, masks), (right.keys() - left, images)):
        if lone:
            more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
            name = min(lone, key=natural)
            raise Refusal(f"{folder}: no file for {name}{more}; every image needs its mask")
    if not left:
        raise Refusal(f"{images}: holds no pictures ({', '.join(endings)})")
    return [Case(stem(left[n]), left[n], right[n]) for n in sorted(left, key=natural)]


def first_folder(root, layouts, name):
    """The first of several layouts, pairs of folders, that exists. Raises Refusal saying where."""
    for images, masks in layouts:
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    wanted = " or ".join(f"{a} + {b}" for a, b in layouts)
    where = "" if name == "data set" else " (--root says where to look)"
    raise Refusal(f"{root}: no {name} in it; expected {wanted}{where}")


def shuffled(cases):
    """Cases in an order that depends on their number alone, the same everywhere."""
    cases = list(cases)
    random.Random(0).shuffle(cases)
    return cases


def cut(cases, val, test):
    """A list -> parts: the last `test`, the `val` before them, the rest for training."""
    n = len(cases) - val - test
    ends = {"train": cases[:n], "val": cases[n : n + val], "test": cases[n + val :]}
    return {part: tuple(sorted(c, key=lambda case: natural(case.name))) for part, c in ends.items()}


def three_parts(cases, share, where):
    """Training, and `share` each for validation and test, at least one. Refuses under 3 cases."""
    if len(cases) < 3:
        raise Refusal(f"{where}: {len(cases)} cases; training, validation and test need 3 or more")
    n = max(1, round(len(cases) * share))
    return cut(shuffled(cases), n, n)


# ---- the data sets of the paper ----

# First frames of CVC-ClinicDB's 29 sequences, from the data set's own README.
SEQUENCES = (1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364,
             384, 409, 429, 448, 467, 479, 504, 529, 547, 572, 592)  # fmt: skip
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)  # the list of TransUNet
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
          "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
          "right adrenal gland", "left adrenal gland")  # fmt: skip


def find_cvc(root, split):
    folders = [("Original", "Ground Truth"), ("PNG/Original", "PNG/Ground Truth"),
               ("TIF/Original", "TIF/Ground Truth"), ("images", "masks")]  # fmt: skip
    layouts = [tuple(f"CVC-ClinicDB/{f}" for f in pair) for pair in folders]
    cases = pairs(*first_folder(root, layouts, "CVC-ClinicDB"))
    parts = by_sequence(cases) if split == "sequence" else three_parts(cases, 62 / 612, root)
    return Found("cvc", parts, ("background", "polyp"))


def by_sequence(cases):
    """CVC by video: shuffled sequences fill test, then validation, up to 62 frames each."""
    videos = {}
    for case in cases:
        digits = re.sub(r"\D", "", case.name)
        if not digits:
            raise Refusal(f"{case.image}: --split sequence needs the frame number as its name")
        videos.setdefault(bisect(SEQUENCES, int(digits)), []).append(case)
    parts, limit = {part: [] for part in PARTS}, round(len(cases) * 62 / 612) + 6
    for video in shuffled(videos.values()):
        room = (p for p in ("test", "val") if len(parts[p]) + len(video) <= limit)
        parts[next(room, "train")] += video
    if not all(parts.values()):
        raise Refusal(f"{cases[0].image.parent}: {len(videos)} videos cannot fill three parts; "
                      "use --split random")  # fmt: skip
    return {part: tuple(parts[part]) for part in PARTS}


def find_kvasir(root, split):
    layouts = [("Kvasir-SEG/images", "Kvasir-SEG/masks"), ("kvasir-seg/images", "kvasir-seg/masks")]
    cases = pairs(*first_folder(root, layouts, "Kvasir-SEG"))
    return Found("kvasir", three_parts(cases, 0.1, root), ("background", "polyp"))


def find_refuge2(root, split):
    found = {}
    for part in PARTS:
        layout = (f"refuge2/{part}/images", f"refuge2/{part}/masks")
        if part != "val" or (root / layout[0]).is_dir():
            cases = pairs(*first_folder(root, [layout], "REFUGE2"))
            found[part] = [replace(c, name=f"{part}/{c.name}") for c in cases]
    training = shuffled([*found["train"], *found.get("val", [])])
    if len(training) < 2:
        raise Refusal(f"{root}: one picture of REFUGE2 to train on; validation needs another")
    parts = cut(training, max(1, len(training) // 10), 0) | {"test": tuple(found["test"])}
    return Found("refuge2", parts, ("background", "optic cup"), "cup")


def find_btcv(root, split, organs=False):
    layouts = [("BTCV/img", "BTCV/label"), ("BTCV/imagesTr", "BTCV/labelsTr")]
    folders = first_folder(root, layouts, "BTCV")
    cases = pairs(*folders, lambda name: name.replace("img", "label"))
    held = [c for c in cases if int(re.sub(r"\D", "", c.name) or 0) in BTCV_TEST]
    rest = [c for c in cases if c not in held]
    if not held or len(rest) < 2:
        raise Refusal(
            f"{folders[0]}: needs imgNNNN.nii.gz of the published test list and of others"
        )
    parts = cut(shuffled(rest), max(1, len(rest) // 6), 0) | {"test": tuple(held)}
    name, classes, rule = "btcv", ("background", "organ"), "any"
    if organs:
        name, classes, rule = "btcv-organs", ("background", *ORGANS), "ids"
    return Found(name, parts, classes, rule, (-125.0, 275.0), True)


def find_sts3d(root, split):
    folders = first_folder(root, [("STS-3D/image", "STS-3D/label")], "STS-3D")
    cases = pairs(*folders)
    if len(cases) < 3:
        raise Refusal(f"{folders[0]}: {len(cases)} volumes; needs 3 or more")
    test = max(1, len(cases) // 4)
    parts = cut(shuffled(cases), max(1, len(cases) // 12), test)
    return Found("sts3d", parts, ("background", "tooth"), "any", (-100.0, 1100.0), True)


def find_demo(root, split):
    cases = [Case(f"demo{i:03d}", seed=i) for i in range(760)]
    return Found("demo", cut(cases, 60, 100), ("background", "lesion"))


# ---- a folder of one's own ----


def find_own(folder):
    """DIR/{images,masks}/, or imagesTr and labelsTr; DIR/split.json and DIR/classes.json."""
    layouts = [("images", "masks"), ("imagesTr", "labelsTr")]
    cases = pairs(*first_folder(folder, layouts, "data set"))
    volumes = is_volume(cases[0].image)
    odd = next((c for c in cases if is_volume(c.image) != volumes), None)
    if odd:
        raise Refusal(f"{odd.image}: pictures and volumes in one data set; keep them apart")
    parts = own_split(folder, cases) or three_parts(cases, 0.1, folder)
    name = folder.resolve().name
    rule, classes = own_classes(folder, parts["train"], volumes)
    return Found(name, parts, classes, rule, None, volumes)


def read_json(path):
    try:
        if path.stat().st_size > 10_000_000:
            raise Refusal(f"{path}: larger than 10 MB; it should be a short list of names")
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a mark
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise Refusal(f"{path}: not valid JSON") from None


def own_split(folder, cases):
    """split.json {"train": [stems], "val": [..], "test": [..]} -> parts; None if there is none."""
    path = folder / "split.json"
    if not path.exists():
        return None
    listed = read_json(path)
    named, used, parts = {c.name: c for c in cases}, set(), {}
    for part in PARTS:
        names = listed.get(part) if isinstance(listed, dict) else None
        if not isinstance(names, list) or not names:
            raise Refusal(f'{path}: needs {{"train": [..], "val": [..], "test": [..]}}, none empty')
        for name in names:
            if not isinstance(name, str) or name not in named:
                raise Refusal(f"{path}: {name!r:.80} is not the name of an image in {folder}")
            if name in used:
                raise Refusal(f"{path}: {name} is listed twice")
            used.add(name)
        parts[part] = tuple(named[name] for name in names)
    return parts


def own_classes(folder, cases, volumes):
    """-> rule, class names: from classes.json, or else from the values of the training masks."""
    path = folder / "classes.json"
    names = read_json(path)
    if names is not None:
        good = isinstance(names, list) and all(
            isinstance(n, str) and n and n.isprintable() for n in names
        )
        if not good or not 2 <= len(names) == len(set(names)) <= MAX_CLASSES:
            raise Refusal(f"{path}: needs a list of 2 to {MAX_CLASSES} names, all different, the "
                          "background first")  # fmt: skip
        return ("binary" if len(names) == 2 else "ids"), tuple(names)
    values = set()
    for case in cases:
        mask = read_volume(case.mask)[0] if volumes else read_mask(case.mask)
        values |= set(np.unique(mask).tolist())
        if len(values) > MAX_CLASSES:
            break
    jpeg = all(is_jpeg(c.mask) for c in cases)
    if jpeg or values <= {0, 1} or values <= {0, 255}:
        return "binary", ("background", "foreground")
    if max(values) < MAX_CLASSES and all(v == int(v) >= 0 for v in values):
        unused = [i for i in range(1, int(max(values))) if i not in values]
        if unused:  # found by no model, missed by none: its Dice would be 1
            raise Refusal(f"{folder}: no training mask holds class id {unused[0]}; number the "
                          "classes without gaps, or name all in classes.json")  # fmt: skip
        return "ids", ("background", *(f"class {i}" for i in range(1, int(max(values)) + 1)))
    seen = ", ".join(f"{v:g}" for v in sorted(values)[:16])
    raise Refusal(f"{cases[0].mask.parent}: masks have the values {seen}; wanted 0 and 255, or ids "
                  f"0 to {MAX_CLASSES - 1}")  # fmt: skip


FINDERS = {
    "cvc": find_cvc,
    "kvasir": find_kvasir,
    "kseg": find_kvasir,
    "refuge2": find_refuge2,
    "btcv": find_btcv,
    "btcv-organs": lambda root, split: find_btcv(root, split, organs=True),
    "sts3d": find_sts3d,
    "demo": find_demo,
}


def find(data, root="data", split="random"):
    """A data set's name, several joined by "+", or a folder -> Found. Raises Refusal."""
    names = data.split("+")
    own = data not in FINDERS and Path(data).is_dir()
    if not own and not FINDERS.keys() >= set(names):
        raise Refusal(f"--data {data}: neither a folder nor one of {', '.join(FINDERS)}")
    if split != "random" and (own or "cvc" not in names):
        raise Refusal(f"--split {split}: only cvc has video sequences")
    if own:
        return find_own(Path(data))
    sets = [FINDERS[name](Path(root), split) for name in names]
    if len(sets) == 1:
        return sets[0]
    if len({(s.classes, s.rule, s.volumes) for s in sets}) > 1:
        raise Refusal(f"--data {data}: these have different classes and cannot be joined")
    if len({s.name for s in sets}) < len(sets):
        raise Refusal(f"--data {data}: a data set is named twice")
    parts = {
        p: tuple(replace(c, name=f"{s.name}/{c.name}") for s in sets for c in s.parts[p])
        for p in PARTS
    }
    return replace(sets[0], name=data, parts=parts)


# ---- items and batches ----


class SegmentationData(torch.utils.data.Dataset):
    """The items of one part, resized to (size, size), decoded once and memory-mapped after that.

    `augment`: None, "flip" (flips and quarter turns, exact) or "full" (with scale, shift, rotation,
    shear and colour). Augmentation is a function of (seed, epoch, index). Volumes of several
    classes are never flipped: often their side is what tells two organs apart.
    """

    def __init__(self, found, part, size, augment=None, seed=0):
        self.augment, self.seed = augment, seed
        self.flip = not (found.volumes and len(found.classes) > 2)
        self.key = fingerprint(found, part, size)
        self.images, self.masks, self.names = cached(found, part, size, self.key)
        self.cases = self.names
        if found.volumes:  # each slice's volume
            self.cases = [name.rpartition(":")[0] for name in self.names]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        batch = self.batch([(None, index)])
        return {"image": batch["image"][0], "mask": batch["mask"][0], "name": self.names[index]}

    def views(self, samples):
        """[(epoch, index)] -> an int a sample, the same for the same mask; None if all differ."""
        if self.augment == "full":
            return None
        turned = self.augment and self.flip
        return [8 * i + (turn_of(self.draw(e, i)) if turned else 0) for e, i in samples]

    def draw(self, epoch, index):
        """The 16 numbers in [0, 1) that decide an item's augmentation."""
        return np.random.default_rng([self.seed, epoch, index]).random(16)

    def batch(self, samples):
        """[(epoch, index)] -> {"image" (B, 3, S, S), "mask" (B, S, S)}; epoch None: as they are."""
        images = [np.asarray(self.images[i]) for _, i in samples]
        masks = [np.asarray(self.masks[i]) for _, i in samples]
        augment = self.augment if samples[0][0] is not None else None
        draws = [self.draw(e, i) for e, i in samples] if augment else []
        if augment and self.flip:
            turned = [turn(x, y, turn_of(d)) for x, y, d in zip(images, masks, draws)]
            images, masks = zip(*turned)
        image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        mask = torch.from_numpy(np.stack(masks)).long()
        if augment == "full":
            image, mask = warp(image, mask, torch.from_numpy(np.stack(draws)).float())
        return {"image": image, "mask": mask}


def turn_of(draw):
    """Which of the 8 symmetries of a square an item is seen in; a Python int, for a DataLoader
    would turn NumPy's into a tensor.
    """
    return 4 * int(draw[0] < 0.5) + int(draw[1] * 4)


def turn(image, mask, view):
    """Flip left to right or not, and a number of quarter turns: image and mask alike."""
    flip, quarters = divmod(view, 4)
    return tuple(np.rot90(x[:, :: -1 if flip else 1], quarters).copy() for x in (image, mask))


def warp(image, mask, draw):
    """One affine map for image and mask, then colour for the image. draw (B, 16) in [0, 1)."""
    signed = 2 * draw - 1  # (B, 16) in [-1, 1)
    angle, scale = 0.5 * signed[:, 2], 1.35 ** signed[:, 3]
    matrix = torch.zeros(len(draw), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() / scale, -angle.sin() / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    matrix[:, 0, 1] += 0.15 * signed[:, 4]
    matrix[:, :, 2] = 0.2 * signed[:, 5:7]
    grid = F.affine_grid(matrix, image.shape, align_corners=False)
    image = F.grid_sample(image, grid, "bilinear", "reflection", align_corners=False)
    mask = F.grid_sample(mask[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    contrast, light, saturation = (signed[:, i].view(-1, 1, 1, 1) for i in (7, 8, 9))
    image = (image * (1 + 0.3 * contrast) + 0.2 * light) * (1 + 0.12 * signed[:, 10:13, None, None])
    grey = image.mean(1, keepdim=True)
    return (grey + (image - grey) * (1 + 0.4 * saturation)).clamp(-1, 1), mask[:, 0].long()


def digest(path):
    """SHA-256 of a file, read in blocks: a model's gigabytes never lie in memory."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def fingerprint(found, part, size):
    """A hash of all that decides what a part's items look like, the files' bytes among it."""
    facts = [VERSION, found.name, part, size, found.classes, found.rule, found.window]
    for case in found.parts[part]:
        digests = [digest(path) for path in (case.image, case.mask) if path]
        facts.append((case.name, case.seed, digests))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def cached(found, part, size, key):
    """-> images (N, S, S, 3) uint8, masks (N, S, S) uint8, names; memory-mapped from the cache."""
    folder = Path(os.environ.get("SDSEG_CACHE") or os.path.expanduser("~/.cache/sdseg"))
    files = [folder / f"{key}-{kind}" for kind in ("images.npy", "masks.npy", "names.json")]
    try:
        images, masks = (np.load(file, mmap_mode="r") for file in files[:2])
        names = json.loads(files[2].read_text())
        if len(images) == len(masks) == len(names):
            return images, masks, names
    except (OSError, ValueError, EOFError, TypeError):
        pass  # not there yet, or damaged
    images, masks, names = decode(found, part, size)
    try:
        for file, array in zip(files[:2], (images, masks)):
            with whole_file(file) as temporary:
                np.save(temporary, array)
        with whole_file(files[2]) as temporary:
            temporary.write_text(json.dumps(names))
    except OSError:
        pass  # an unwritable cache costs time, no more
    return images, masks, names


def decode(found, part, size):
    """Read and resize a part's items, one a picture or one a slice."""

    def items_of(case):
        image, mask = load_case(case, found)
        if not found.volumes:
            image, mask = image[None], mask[None]
        return [resize_image(x, size) for x in image], [resize_mask(x, size) for x in mask]

    images, masks, names = [], [], []
    cases = found.parts[part]
    progress = Progress(len(cases), f"{part} files read")
    with ThreadPoolExecutor(1 if found.volumes else 4) as pool:  # one volume in memory
        for case, (image, mask) in zip(cases, pool.map(items_of, cases)):
            images += image
            masks += mask
            slices = [f"{case.name}:{i:03d}" for i in range(len(image))]
            names += slices if found.volumes else [case.name]
            progress.step()
    return np.stack(images), np.stack(masks), names


# ---- the check ----


def duplicates(found):
    """[(name, name)]: images with the same bytes in two different parts."""
    seen, same = {}, []
    for part in PARTS:
        for case in found.parts[part]:
            if case.image is None:
                continue
            other, name = seen.setdefault(digest(case.image), (part, case.name))
            if other != part:
                same.append((f"{other} {name}", f"{part} {case.name}"))
    return same


def describe(found, part):
    """Print a part's sizes, class shares, empty and bad cases; -> pictures, number of bad ones."""
    pixels, sizes, empty, sheet, bad = np.zeros(len(found.classes)), set(), [], [], []
    cases = found.parts[part]
    progress = Progress(len(cases), f"{part} cases checked")
    for n, case in enumerate(cases):
        progress.step()
        try:
            image, mask = load_case(case, found)
        except Refusal as error:
            bad.append(error)
            continue
        pixels += np.bincount(mask.ravel(), minlength=len(pixels))
        sizes.add(mask.shape[::-1])
        if not mask.any():
            empty.append(case.name)
        if n % max(1, len(cases) // 8) == 0 and len(sheet) < 8:
            middle = mask.reshape(len(mask), -1).any(1).nonzero()[0] if found.volumes else []
            z = middle[len(middle) // 2] if len(middle) else len(mask) // 2
            image, mask = (image[z], mask[z]) if found.volumes else (image, mask)
            sheet.append((resize_image(image, 112), resize_mask(mask, 112)))
    for error in bad:
        print(error)
    if not sizes:
        raise Refusal(f"{found.name}: none of the {len(cases)} {part} cases can be read")
    shares = ", ".join(f"{c} {100 * p:.2f} %" for c, p in zip(found.classes, pixels / pixels.sum()))
    low, high = min(sizes), max(sizes)
    span = " x ".join(map(str, low)) + ("" if low == high else " to " + " x ".join(map(str, high)))
    which = f": {', '.join(empty[:5])}{' ..' if len(empty) > 5 else ''}" if empty else ""
    print(f"{part:5}  {len(cases)} cases, {span}; {shares}; {len(empty)} empty masks{which}")
    return sheet, len(bad)


def contact_sheet(rows, k):
    """[[(image, mask)]] -> one picture: a row of images over a row of masks for every part."""
    blank = np.zeros((112, 112, 3), np.uint8)
    lines = []
    for row in rows:
        masks = [np.repeat((m * (255 // (k - 1)))[..., None], 3, 2) for _, m in row]
        for tiles in ([image for image, _ in row], masks):
            lines.append(np.concatenate([*tiles, *[blank] * (8 - len(tiles))], axis=1))
    return np.concatenate(lines, axis=0)


def main(args):
    found = find(args.data, args.root, args.split)
    inputs = (p for cases in found.parts.values() for c in cases for p in (c.image, c.mask) if p)
    if os.path.realpath(args.out) in map(os.path.realpath, inputs):
        raise Refusal(f"{args.out}: is one of the data set's files; choose another --out")
    if args.list:
        print("\n".join(case.name for case in found.parts[args.list]))
        return
    window = ", intensity window {:g} to {:g}".format(*found.window) if found.window else ""
    crop = ", cut to twice the optic disc that the mask shows" if found.rule == "cup" else ""
    print(f"{found.name}: {len(found.classes)} classes ({', '.join(found.classes)}){window}{crop}")
    rows, bad = zip(*(describe(found, part) for part in PARTS))
    if found.volumes and not bad[0]:
        first = read_volume(found.parts["train"][0].image)[1]
        print(f"spacing of {found.parts['train'][0].name}: {first.spacing} mm")
    print(f"{sum(bad)} cases cannot be used")
    same = duplicates(found)
    for a, b in same[:10]:
        print(f"same image bytes: {a} and {b}")
    print(f"{len(same)} images stand in two parts")
    write_image(args.out, contact_sheet(rows, len(found.classes)))
    print(f"contact sheet: {args.out}")
    return 1 if same or any(bad) else 0


if __name__ == "__main__":
    run(lambda: main(ARGS))
