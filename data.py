"""The data sets: where their files are, how they are split, items, augmentation, batches.

Every data set yields the same: image float32 (3, S, S) in [-1, 1], mask int64 (S, S) of class ids,
name. Volumes are split by volume and cut into slices of one plane. `support/` reads the files,
refuses damaged ones, and interprets the masks of a user's own folder. Nothing here knows the model.

Letters: H W the size of a file, Z slices, S the side that the model sees, B batch, u an item's 16
random numbers in [0, 1).
"""

import json
import random
import re
import sys
from bisect import bisect
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import folders
from support.cache import load_or_decode
from support.cli import UserError, print0, rank_and_world_size
from support.demo_data import draw_demo
from support.folders import PARTS, Case, DatasetSpec
from support.images import resize_image, resize_mask
from support.volumes import choose_plane

# The test images of the public polyp benchmark: {"cvc": 62 names, "kvasir": 100 names}
POLYP_TEST = json.loads((Path(__file__).parent / "support/polyp_test.json").read_text())
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)  # the list of TransUNet
STS3D_TEST = (10, 11, 12)  # the published list
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
          "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
          "right adrenal gland", "left adrenal gland")  # fmt: skip
# First frames of CVC-ClinicDB's 29 videos, from the data set's own README
VIDEOS = (1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364,
          384, 409, 429, 448, 467, 479, 504, 529, 547, 572, 592)  # fmt: skip


# ---- the data sets of the paper, in the folder `root`; only `find_cvc` uses `split` ----


def find_cvc(root, split):
    layouts = [(f"CVC-ClinicDB/{kind}Original", f"CVC-ClinicDB/{kind}Ground Truth")
               for kind in ("", "PNG/", "TIF/")]  # fmt: skip
    layouts.append(("CVC-ClinicDB/images", "CVC-ClinicDB/masks"))
    source = "https://polyp.grand-challenge.org/CVCClinicDB/"
    cases = folders.pairs(*folders.find_folders(root, layouts, source))
    cases = [replace(c, group=f"video {bisect(VIDEOS, number_of(c))}") for c in cases]
    if split == "sequence":
        splits = split_by_video(cases)
    else:
        test = [case for case in cases if case.name in POLYP_TEST["cvc"]]
        splits = split_by_list(cases, test, 62, 550)
    return DatasetSpec("cvc", splits, ("background", "polyp"))


def find_kvasir(root, split):
    layouts = [(f"{name}/images", f"{name}/masks") for name in ("Kvasir-SEG", "kvasir-seg")]
    source = "https://datasets.simula.no/kvasir-seg/"
    cases = folders.pairs(*folders.find_folders(root, layouts, source))
    test = [case for case in cases if case.name in POLYP_TEST["kvasir"]]
    return DatasetSpec("kvasir", split_by_list(cases, test, 100, 900), ("background", "polyp"))


def find_refuge2(root, split):
    cases, source = [], "https://www.kaggle.com/datasets/victorlemosml/refuge2"
    for part in PARTS:  # validation and training together are the published training images
        layouts = [(f"refuge2/{part}/images", f"refuge2/{part}/masks"),
                   (f"REFUGE2/{part}/images", f"REFUGE2/{part}/mask")]  # fmt: skip
        if part == "val" and not any((root / images).is_dir() for images, _ in layouts):
            continue
        found = folders.find_folders(root, layouts, source)
        cases += [prefixed(case, part) for case in folders.pairs(*found)]
    test = [case for case in cases if case.name.startswith("test/")]
    splits = split_by_list(cases, test, 1, 10)
    return DatasetSpec("refuge2", splits, ("background", "optic cup"), "cup")


def find_btcv(root, split):
    layouts = [("BTCV/img", "BTCV/label"), ("BTCV/imagesTr", "BTCV/labelsTr")]
    source = "https://www.synapse.org/#!Synapse:syn3193805 (Abdomen/RawData.zip)"
    images, masks = folders.find_folders(root, layouts, source)
    cases = folders.pairs(images, masks, lambda mask_name: mask_name.replace("label", "img"))
    test = [case for case in cases if number_of(case) in BTCV_TEST]
    splits = split_by_list(cases, test, 3, 18)
    classes, window = ("background", "organ"), (-125.0, 275.0)
    return DatasetSpec("btcv", splits, classes, "nonzero", window, volumes=True)


def find_btcv_organs(root, split):
    classes = ("background", *ORGANS)
    return replace(find_btcv(root, split), name="btcv-organs", classes=classes, label_format="ids")


def find_sts3d(root, split):
    source = "https://toothfairychallenges.github.io/ (labelled.zip)"
    cases = folders.pairs(*folders.find_folders(root, [("STS-3D/image", "STS-3D/label")], source))
    test = [case for case in cases if number_of(case) in STS3D_TEST]
    splits = split_by_list(cases, test, 1, 9)
    classes, window = ("background", "tooth"), (-100.0, 1100.0)
    return DatasetSpec("sts3d", splits, classes, "nonzero", window, volumes=True)


def find_demo(root, split):
    """Drawn images: nothing is read from a disk."""
    cases = tuple(Case(f"demo{i:03d}", seed=i, group=f"demo{i:03d}") for i in range(760))
    splits = {"train": cases[:600], "val": cases[600:660], "test": cases[660:]}
    return DatasetSpec("demo", splits, ("background", "lesion"))


FINDERS = {
    "cvc": find_cvc,
    "kvasir": find_kvasir,
    "kseg": find_kvasir,
    "refuge2": find_refuge2,
    "btcv": find_btcv,
    "btcv-organs": find_btcv_organs,
    "sts3d": find_sts3d,
    "demo": find_demo,
}


def find(data, root="data", split="random"):
    """A data set's name, several joined by "+", or a folder -> DatasetSpec. Raises UserError.

    Named data sets are in the folder `root`. `split`: "random" is the published test list, the
    rest by a hash; "sequence" keeps each video of cvc in one part.
    """
    names, is_folder = data.split("+"), Path(data).is_dir()
    known = all(name in FINDERS for name in names)
    if not known and not is_folder:
        raise UserError(f"--data {data}: neither a folder nor one of {', '.join(FINDERS)}")
    if split != "random" and not (known and "cvc" in names):
        raise UserError(f"--split {split}: only cvc has video sequences")
    if not known:
        return with_plane(folders.find_own(Path(data)))
    if is_folder and rank_and_world_size()[0] == 0:
        print(f"--data {data}: reads the data set {data}, not the folder; for that write ./{data}",
              file=sys.stderr)  # fmt: skip
    specs = [FINDERS[name](Path(root), split) for name in names]
    return with_plane(specs[0] if len(specs) == 1 else join(data, specs))


def with_plane(spec):
    """The training volumes decide how all volumes are sliced."""
    if not spec.volumes:
        return spec
    return replace(spec, plane=choose_plane(case.image for case in spec.splits["train"]))


def join(data, specs):
    """Several DatasetSpecs -> one, with their names before the names of their cases."""
    if len({(s.classes, s.label_format, s.volumes) for s in specs}) > 1:
        raise UserError(f"--data {data}: these have different classes and cannot be joined")
    if len({s.name for s in specs}) < len(specs):
        raise UserError(f"--data {data}: a data set is named twice")
    splits = {part: tuple(prefixed(case, s.name) for s in specs for case in s.splits[part])
              for part in PARTS}  # fmt: skip
    return replace(specs[0], name=data, splits=splits)


def prefixed(case, name):
    return replace(case, name=f"{name}/{case.name}", group=f"{name}/{case.group}")


def number_of(case):
    """The last number in the case's name: img0012 -> 12; 0 without a number."""
    return int((re.findall(r"\d+", case.name) or [0])[-1])


def split_by_list(cases, test, n_val, n_total):
    """`test` as published. The others are ordered by a hash of their names, so a case that comes
    or goes moves at most one other; n_val of every n_total of them are for validation.
    """
    rest = sorted(set(cases) - set(test), key=lambda case: folders.text_hash(case.name))
    n = max(1, len(rest) * n_val // n_total)
    if not test or len(rest) <= n:
        raise UserError(f"{cases[0].image.parent}: {len(test)} cases of the published test part "
                        f"and {len(rest)} others; needs 1 and 2 or more, with their published "
                        "names")  # fmt: skip
    part_of = dict.fromkeys(test, "test") | dict.fromkeys(rest[:n], "val")
    return {p: tuple(c for c in cases if part_of.get(c, "train") == p) for p in PARTS}


def split_by_video(cases):
    """CVC by video: shuffled videos fill test, then validation, with about 62 frames each."""
    videos = {}
    for case in cases:
        videos.setdefault(case.group, []).append(case)
    order = list(videos.values())
    random.Random(0).shuffle(order)
    splits, limit = {part: [] for part in PARTS}, round(len(cases) * 62 / 612) + 6
    for video in order:
        room = (p for p in ("test", "val") if len(splits[p]) + len(video) <= limit)
        splits[next(room, "train")] += video
    if not all(splits.values()):
        raise UserError(f"{cases[0].image.parent}: {len(videos)} videos cannot fill three parts; "
                        "use --split random")  # fmt: skip
    return {part: tuple(splits[part]) for part in PARTS}


# ---- items ----


def load_case(case, spec, remarks=None):
    """-> image uint8 (H, W, 3), class ids uint8 (H, W); of a volume (Z, H, W, 3), (Z, H, W).

    At the file's own size; the intensities of volumes go through the window. Remarks on what may
    be wrong are appended to the list `remarks`. Raises UserError.
    """
    if case.seed is not None:
        return draw_demo(case.seed, 256)
    image, mask = folders.read_pair(case, spec, [] if remarks is None else remarks)
    ids = folders.mask_to_class_ids(mask, spec, case.mask)
    return crop_to_disc(image, mask.values, ids) if spec.label_format == "cup" else (image, ids)


def print_remarks(remarks):
    """The first remark on a data set's files, and how many more there are."""
    if remarks:
        more = f", and {len(remarks) - 1} more" if len(remarks) > 1 else ""
        print0(f"{remarks[0]}{more}")


def crop_to_disc(image, values, ids):
    """REFUGE: a full fundus is cut to a square of twice the optic disc; a disc crop stays.

    The paper segments the cup in disc crops. Here the disc is found in the true mask; the published
    data are cut by a predicted disc.
    """
    rows, columns = np.nonzero(values < 192)  # 0 is the cup, 128 the rest of the disc
    if not len(rows):
        return image, ids
    side = 2 * max(np.ptp(rows), np.ptp(columns)) + 2
    if side > 0.7 * min(ids.shape):
        return image, ids
    begins = [(int(x.min() + x.max()) - side) // 2 for x in (rows, columns)]
    begins = [min(max(begin, 0), n - side) for begin, n in zip(begins, ids.shape)]
    square = tuple(slice(begin, begin + side) for begin in begins)
    return image[square], ids[square]


class SegmentationData(torch.utils.data.Dataset):
    """The items of one part, resized to (size, size), decoded once and memory-mapped after that.

    `augment`: None, "flip" (flips and quarter turns, exact) or "full" (with crops, scale, shift,
    rotation, shear and colour). Augmentation is a function of (seed, epoch, index). Volumes are
    grey, and their channels may be three slices: they are not cropped, and only contrast and
    brightness change. Those of several classes are not flipped, because the side tells two organs
    apart.
    """

    def __init__(self, spec, part, size, augment=None, seed=0):
        self.augment, self.seed = augment, seed
        self.flips = not (spec.volumes and len(spec.classes) > 2)
        self.crops = augment == "full" and not spec.volumes
        self.grey = spec.volumes
        items = load_or_decode(spec, part, size, load_case)
        self.fingerprint, self.images, self.masks, self.names, remarks = items
        named = {case.name: case for case in spec.splits[part]}
        # The Case that each item belongs to; a slice is called "volume:number"
        self.cases = [named[n.rpartition(":")[0] if spec.volumes else n] for n in self.names]
        print_remarks(remarks)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        batch = self.batch([(None, index)])
        return {"image": batch["image"][0], "mask": batch["mask"][0], "name": self.names[index]}

    def has_foreground(self):
        return any(mask.any() for mask in self.masks)

    def uniform(self, epoch, index):
        """16 numbers in [0, 1): 0, 1 for the symmetry, 2 to 6 the affine map, 7 to 12 colours,
        13 to 15 the crop.
        """
        return np.random.default_rng([self.seed, epoch, index]).random(16)

    def symmetry_ids(self, samples):
        """[(epoch, index)] -> ints; equal ints mean equal masks. None if every mask is new."""
        if self.augment == "full":
            return None
        flips = self.augment and self.flips
        return [8 * i + (symmetry_of(self.uniform(e, i)) if flips else 0) for e, i in samples]

    def batch(self, samples):
        """[(epoch, index)] -> {"image" (B, 3, S, S), "mask" (B, S, S)}; epoch None: unchanged."""
        images = [np.asarray(self.images[i]) for _, i in samples]
        masks = [np.asarray(self.masks[i]) for _, i in samples]
        augment = self.augment if samples[0][0] is not None else None
        u = [self.uniform(e, i) for e, i in samples] if augment else []
        if augment and self.crops:
            images, masks = zip(*map(random_crop, images, masks, u))
        if augment and self.flips:
            flipped = [symmetry(x, y, symmetry_of(v)) for x, y, v in zip(images, masks, u)]
            images, masks = zip(*flipped)
        image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        mask = torch.from_numpy(np.stack(masks)).long()
        if augment == "full":
            u = torch.from_numpy(np.stack(u)).float()
            image, mask = random_affine(image, mask, u)
            image = colour_jitter(image, u, self.grey)
        return {"image": image, "mask": mask}


# ---- augmentation: image and mask move together ----


def random_crop(image, mask, u):
    """Three of ten images become a square crop, and two of the three crops avoid the foreground.

    Most medical data sets hold no image without a lesion, so a network learns to mark something
    everywhere. Enlarged crops are blurred, and one of three lies anywhere, so that the network
    does not learn that a blurred image holds nothing.
    """
    if u[13] > 0.3:
        return image, mask
    side = int(len(mask) * (0.3 + 0.4 * u[14]))
    return square_crop(image, mask, side, u[15], u[13] < 0.2) or (image, mask)


def square_crop(image, mask, side, position, avoid_foreground):
    """A square of image (S, S, 3) and mask (S, S), enlarged to S. `position` is in [0, 1).

    With `avoid_foreground` the square holds none, and less than a tenth of it is black; None if
    there is no such square.
    """
    size, n = len(mask), len(mask) - side + 1
    spots = np.arange(n * n)  # where the top left corner may be
    if avoid_foreground:
        cost = np.where(mask > 0, side**2, 10 * (image.max(2) < 20))
        total = np.pad(cost.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        total = total[side:] - total[:-side]
        spots = np.flatnonzero(total[:, side:] - total[:, :-side] < side**2)
        if not len(spots):
            return None
    top, left = divmod(int(spots[int(position * len(spots))]), n)
    square = np.s_[top : top + side, left : left + side]
    return resize_image(image[square], size), resize_mask(mask[square], size)


def symmetry_of(u):
    """Which of the 8 symmetries of a square, 0 to 7."""
    return 4 * int(u[0] < 0.5) + int(u[1] * 4)


def symmetry(image, mask, i):
    """Flip left to right or not, then a number of quarter turns."""
    flip, quarters = divmod(i, 4)
    return tuple(np.rot90(x[:, :: -1 if flip else 1], quarters).copy() for x in (image, mask))


def random_affine(image, mask, u):
    """Rotation by at most 0.5 rad, scale 1 / 1.35 to 1.35, shear to 0.15, shift to a tenth of the
    side, of image (B, 3, S, S) and mask (B, S, S); u (B, 16). Outside, the image is mirrored.
    """
    signed = 2 * u - 1  # (B, 16) in [-1, 1)
    angle, scale = 0.5 * signed[:, 2], 1.35 ** signed[:, 3]
    matrix = u.new_zeros(len(u), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() / scale, -angle.sin() / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    matrix[:, 0, 1] += 0.15 * signed[:, 4]
    matrix[:, :, 2] = 0.2 * signed[:, 5:7]
    grid = F.affine_grid(matrix, image.shape, align_corners=False)
    image = F.grid_sample(image, grid, "bilinear", "reflection", align_corners=False)
    mask = F.grid_sample(mask[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    return image, mask[:, 0].long()


def colour_jitter(image, u, grey=False):
    """Contrast, brightness and, unless it is `grey`, tint and saturation of image (B, 3, S, S) in
    [-1, 1]; u (B, 16).
    """
    signed = 2 * u - 1
    contrast, light, saturation = (signed[:, i].view(-1, 1, 1, 1) for i in (7, 8, 9))
    image = image * (1 + 0.3 * contrast) + 0.2 * light
    if not grey:
        image = image * (1 + 0.12 * signed[:, 10:13, None, None])
        mean = image.mean(1, keepdim=True)
        image = mean + (image - mean) * (1 + 0.4 * saturation)
    return image.clamp(-1, 1)


# ---- batches ----


class TrainingBatches(torch.utils.data.Dataset):
    """[step] -> image (b, 3, S, S), mask (b, S, S), symmetry_ids: this process's share of a batch,
    b = batch_size / world_size.

    Each epoch is a new permutation; an incomplete last batch is filled from the next epoch. The
    batch depends on (seed, step) alone, so a resumed run goes on with the same items.
    """

    def __init__(self, data, batch_size, seed, rank=0, world_size=1):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __getitem__(self, step):
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        samples = [self.sample(position) for position in positions[self.share]]
        batch = self.data.batch(samples)
        return batch["image"], batch["mask"], self.data.symmetry_ids(samples)

    def sample(self, position):
        """The position-th sample of the whole run -> (epoch, index)."""
        epoch, i = divmod(position, len(self.data))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        return epoch, int(order[i])
