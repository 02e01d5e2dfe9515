"""Folders of images and masks: which files belong together, what masks mean, the parts.

The rule for masks: where the values do not say plainly what they mean, the file is refused, with
its values and the way out. A user's own folder is split by the images' bytes alone, unless it has
a split.json, a groups.json or folders for its parts.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from support import images, volumes
from support.cli import Progress, UserError, print0

PARTS = ("train", "val", "test")
FOLDER_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val",
                "validation": "val", "test": "test", "testing": "test"}  # fmt: skip
MAX_CLASSES = 14  # background included; `sdseg.class_colours` keeps as many colours apart
TWO_CLASSES = ("background", "foreground")
ENDINGS = (*images.IMAGE_ENDINGS, *volumes.VOLUME_ENDINGS)
# What file systems, Synology, Windows and macOS put beside files: thumbnails, deleted files
SYSTEM_NAMES = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
                "__MACOSX", "Thumbs.db")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One image or one volume with its mask."""

    name: str  # its path below the images' folder, without the ending
    image: Path | None = None
    mask: Path | None = None
    seed: int | None = None  # of a drawn image, which has no files
    group: str = ""  # the same for all cases of one video or one patient


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: its cases by part, its classes, and how its files are read."""

    name: str
    splits: dict  # "train", "val", "test" -> tuple of Case
    classes: tuple = TWO_CLASSES  # the class id is the index
    label_format: str = "binary"  # how mask values become class ids, see `mask_to_class_ids`
    window: tuple | None = None  # (low, high) intensities of volumes; None: each volume's own
    volumes: bool = False
    palette: dict = field(default_factory=dict)  # class id -> colour, where masks have a palette
    not_read: str = ""  # files of other kinds in its folders, counted
    plane: str = "axial"  # of the slices of volumes, see `volumes.choose_plane`
    context: str = "repeat"  # their three channels, see `volumes.slices_to_uint8`


# ---- files ----


def file_stem(path):
    """The file's name without its ending: scan.nii.gz -> scan."""
    name = Path(path).name
    endings = (e for e in volumes.VOLUME_ENDINGS if name.lower().endswith(e))
    return name[: len(name) - len(next(endings, Path(name).suffix))]


def natural_sort_key(name):
    """img2 comes before img10."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", name))]


def walk(folder):
    """-> the readable files below a folder, sorted, and the others. Hidden files are left out.

    Links to folders are followed, except a link to a folder that it lies in, because the walk would
    never end. Raises UserError for a folder that may not be opened.
    """

    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}")

    def visible(names):
        return sorted(n for n in names if not n.startswith(".") and n not in SYSTEM_NAMES)

    readable, others = [], []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = visible(folders)
        above = [os.path.realpath(p) for p in Path(os.path.abspath(where)).parents]
        if os.path.realpath(where) in above:
            folders.clear()
            continue
        for name in visible(names):
            found = readable if name.lower().endswith(ENDINGS) else others
            found.append(Path(where, name))
    return readable, others


def count_kinds(paths):
    """Files that are not read, by kind: "not read: 3 .txt, 1 .xlsx"; "" for none."""
    kinds = Counter(path.suffix.lower() or "without an ending" for path in paths)
    text = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    note = f" ({images.CONVERT})" if any(map(images.is_other_volume, paths)) else ""
    return f"not read: {text}{note}" if text else ""


def nothing_in_it(others):
    kinds = count_kinds(others)
    return f"no image and no volume in it ({', '.join(ENDINGS)}){'; ' if kinds else ''}{kinds}"


def find_inputs(paths, skip):
    """Yield (source, folder) for files and folders; folder is relative to the one that was given.

    In folders, names that end with one of the tuple `skip` are left out, and a printed line counts
    the files of other kinds. Raises UserError for a folder without an image or a volume.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path, Path()
            continue
        readable, others = walk(path)
        sources = [source for source in readable if not source.name.endswith(skip)]
        if len(sources) < len(readable):
            left_out = len(readable) - len(sources)
            print0(f"{path}: left out {left_out} files that are named like results of this program")
        if not sources:
            raise UserError(f"{path}: {nothing_in_it(others)}")
        if others:
            print0(f"{path}: {count_kinds(others)}")
        yield from ((source, source.parent.relative_to(path)) for source in sources)


@functools.cache
def hash_unless_changed(path, changed):
    """SHA-256 of a file. `changed`, the time of its last change, makes a changed file a new one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path):
    return hash_unless_changed(path, os.stat(path).st_mtime_ns)


def text_hash(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def image_hashes(cases):
    """16 hex digits per case: of SHA-256 of its image's bytes, or of a drawn image's seed."""
    hashes = (file_hash(c.image) if c.image else text_hash(f"demo {c.seed}") for c in cases)
    return tuple(digits[:16] for digits in hashes)


# ---- pairs ----


def nfc(name):
    """macOS stores an accent as a character of its own, other systems as a part of the letter."""
    return unicodedata.normalize("NFC", name)


def files_by_name(folder):
    """{name: path} of the readable files below a folder. Raises UserError for equal names."""
    paths = {}
    for path in walk(folder)[0]:
        name = nfc(path.relative_to(folder).with_name(file_stem(path)).as_posix())
        if name in paths:
            raise UserError(f"{path}: {paths[name].name} has the same name; keep one of them")
        paths[name] = path
    return paths


def find_folders(root, layouts, source=None):
    """The first of several layouts, pairs of folders, that exists. Raises UserError naming all."""
    for pair in layouts:
        if all((root / folder).is_dir() for folder in pair):
            return [root / folder for folder in pair]
    expected = " or ".join(f"{a} + {b}" for a, b in layouts)
    hint = f"; --root says where to look; download: {source}, see docs/data.md" if source else ""
    raise UserError(f"{root}: no data set in it; expected {expected}{hint}")


def pairs(image_folder, mask_folder, image_name=str):
    """The cases of two folders, by name, in natural order. `image_name` turns a mask's name into
    its image's. Raises UserError that names a file without its partner.
    """
    left = files_by_name(image_folder)
    right = {image_name(name): path for name, path in files_by_name(mask_folder).items()}
    for paths, folder in ((left, image_folder), (right, mask_folder)):
        if not paths:
            raise UserError(f"{folder}: {nothing_in_it(walk(folder)[1])}")
    lone = left.keys() - right.keys(), right.keys() - left.keys()
    for names, folder in zip(lone, (mask_folder, image_folder)):
        if names:
            first, more = min(names, key=natural_sort_key), len(names) - 1
            raise UserError(f"{folder}: no file for {first}{f' and {more} more' if more else ''}; "
                            f"every image needs its mask, of the same name{suffix_note(*lone)}"
                            )  # fmt: skip
    return [Case(n, left[n], right[n], group=n) for n in sorted(left, key=natural_sort_key)]


def suffix_note(lone_images, lone_masks):
    """What to do where names without a partner differ by a suffix, such as _mask or _0000."""
    for short, long in itertools.pairwise(sorted(lone_images | lone_masks)):
        suffix = long.removeprefix(short)
        partners = (short in lone_images) != (long in lone_images)
        if partners and suffix != long and not suffix[0].isalnum():
            kind = "images" if long in lone_images else "masks"
            return f"; the {kind}' names end in {suffix}: rename them"
    return ""


def read_pair(case, spec, remarks):
    """-> image uint8 (H, W, 3) and its Mask (H, W); of a volume (Z, H, W, 3) and (Z, H, W).

    What may be wrong without being an error is appended to `remarks`. Raises UserError.
    """
    mask, mask_geometry = load_mask(case)
    if mask_geometry:
        volume, geometry = volumes.read_volume(case.image)
        image = volumes.slices_to_uint8(volume, spec.window, spec.plane, spec.context)
        mask = mask._replace(values=volumes.slices_of(mask.values, spec.plane))
        remark = volumes.compare_grids(geometry, mask_geometry, case.mask)
    else:
        image = images.read_image(case.image)
        remark = images.compare_exif(case.image, case.mask)
    if remark:
        remarks.append(f"{case.name}: {remark}")
    if image.shape[:-1] != mask.values.shape:
        note = f" ({remark})" if remark else ""
        raise UserError(f"{case.mask}: a mask of {mask.values.shape}, but {case.image.name} is "
                        f"{image.shape[:-1]}; they must match{note}")  # fmt: skip
    return image, mask


# ---- what mask values mean ----


def load_mask(case):
    """-> Mask of an image or of a volume, and the volume's Geometry or None. Raises UserError."""
    if volumes.is_volume(case.mask):
        values, geometry = volumes.read_volume(case.mask, labels=True)
        return images.Mask(values, {}, False), geometry
    return images.read_mask(case.mask), None


def mask_to_class_ids(mask, spec, path):
    """Mask -> uint8 class ids. Raises UserError for values that do not belong to the data set.

    `label_format`: "binary" is black and white, or 0 and 1; "nonzero" makes one class of all values
    above 0; "cup" takes 0 as the optic cup; "ids" are the class ids themselves.
    """
    check_palette(mask, spec.palette, path)
    if spec.label_format == "nonzero":
        return (mask.values > 0).astype(np.uint8)
    if spec.label_format == "cup":
        if mask.values[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 192:  # no corner is background
            raise UserError(f"{path}: mask values {images.format_values(mask.values)}; REFUGE has "
                            "0 for the cup, 128 for the rest of the disc, 255 outside")  # fmt: skip
        return (mask.values < 64).astype(np.uint8)
    if spec.label_format == "binary":
        if not mask.lossy and mask.values.max() == 1:
            return mask.values
        check_black_and_white(mask, path)
        return (mask.values > 127).astype(np.uint8)
    if mask.lossy or mask.values.max() >= len(spec.classes):
        raise UserError(f"{path}: mask values {images.format_values(mask.values)}; the training "
                        f"masks hold the class ids 0 to {len(spec.classes) - 1}: save this one the "
                        "same way, without loss, or name all classes in classes.json")  # fmt: skip
    return mask.values


def check_black_and_white(mask, path):
    """Raises UserError unless a mask is black and white, with other greys at its edges only."""
    seen = np.unique(mask.values).tolist()
    others, top = [v for v in seen if v not in (0, 255)], seen[-1]
    # Smooth edges have many greys; a single one, or any in a volume, is a class
    third = others and (len(others) == 1 or mask.values.ndim == 3 or max(others) < MAX_CLASSES)
    if 1 < len(others) <= 4:  # if a third class is thin lines, more pixels are grey than white
        counts = np.bincount(mask.values.ravel(), minlength=256)
        third = third or counts[1:255].sum() > counts[255]
    black = top == 0 or mask.lossy and len(seen) == 1 and top <= 3  # JPEG may round 0 to 1
    plain = not (third and not mask.lossy) and (top > 127 or black)
    if not plain or images.has_flat_grey(mask.values):
        raise UserError(f"{path}: mask values {images.format_values(seen)}; wanted is black and "
                        "white, with greys at the edges only, or PNG with the class ids 0, 1, 2 "
                        f"and so on up to {MAX_CLASSES - 1}")  # fmt: skip


def check_palette(mask, palette, path):
    """Raises UserError where a mask gives a value another colour than `palette`."""
    for i, colour in mask.palette.items():
        if palette.get(i, colour) != colour:
            raise UserError(f"{path}: {i} has the colour {colour}, in other masks {palette[i]}; "
                            f"use one palette, or {images.SAVE_GREY}")  # fmt: skip


def find_label_format(cases, names):
    """-> label_format, class names, palette: what all training masks together say.

    `names` are those of classes.json, or None. Raises UserError where the values are not plain.
    """
    values, palette, lossy, ids, odd = set(), {}, False, None, None
    progress = Progress(len(cases), "training masks read")
    for case in cases:
        mask, _ = load_mask(case)
        check_palette(mask, palette, case.mask)
        values.update(np.unique(mask.values).tolist())
        palette.update(mask.palette)
        lossy |= mask.lossy
        top = mask.values.max()
        if mask.lossy or top >= MAX_CLASSES:
            odd = odd or (case.mask, mask)
        ids = ids or 1 < top < MAX_CLASSES and not mask.lossy
        progress.step()
    if ids and odd:
        raise UserError(f"{odd[0]}: mask values {images.format_values(odd[1].values)}, and others "
                        "have class ids; save all as PNG with class ids")  # fmt: skip
    top = max(values)
    if (lossy or top >= MAX_CLASSES) and len(names or TWO_CLASSES) == 2:
        return "binary", names or TWO_CLASSES, palette
    unused = sorted(set(range(top)) - values)
    if unused and not names:
        raise UserError(f"{cases[0].mask.parent}: no training mask holds class id {unused[0]}; "
                        "number the classes without gaps, or name all of them in classes.json"
                        )  # fmt: skip
    several = ("background", *(f"class {i}" for i in range(1, top + 1)))
    return "ids", names or (several if top > 1 else TWO_CLASSES), palette


# ---- a folder of one's own ----


def find_own(folder):
    """DIR/{images,masks}/ or imagesTr and labelsTr, with DIR/split.json, classes.json, groups.json
    and window.json where they exist -> DatasetSpec. Raises UserError.
    """
    folders = find_folders(folder, [("images", "masks"), ("imagesTr", "labelsTr")])
    cases = pairs(*folders)
    kinds = {volumes.is_volume(path): path for case in cases for path in (case.image, case.mask)}
    if len(kinds) > 1:
        raise UserError(f"{kinds[True]}: a volume, {kinds[False]} is an image; keep them apart")
    cases = read_groups(folder / "groups.json", cases)
    splits = (read_split(folder / "split.json", cases) or split_by_folder(cases, folders[0])
              or split_by_hash(cases, folder))  # fmt: skip
    names = read_classes(folder / "classes.json")
    label_format, classes, palette = find_label_format(splits["train"], names)
    not_read = count_kinds([path for where in folders for path in walk(where)[1]])
    unlisted = len(cases) - sum(map(len, splits.values()))
    if unlisted:
        not_read = f"in no part of split.json: {unlisted} cases\n{not_read}".rstrip()
    window = read_window(folder / "window.json")
    if window and True not in kinds:
        raise UserError(f"{folder / 'window.json'}: only volumes have an intensity window")
    return DatasetSpec(folder.resolve().name, splits, classes, label_format, window, True in kinds,
                       palette, not_read)  # fmt: skip


def read_json(path, is_valid, needs):
    """-> what a file holds, or None where there is no file. Raises UserError."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, RecursionError, OverflowError):
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a mark
        if is_valid(value):
            return value
    raise UserError(f"{path}: needs, as JSON, {needs}")


def are_names(value):
    return isinstance(value, list) and all(isinstance(n, str) and n.strip() for n in value)


def read_classes(path):
    """classes.json: a list of names, background first -> tuple, or None without a file."""
    names = read_json(path, lambda names: are_names(names)
                      and 2 <= len(names) == len(set(names)) <= MAX_CLASSES,
                      f"a list of 2 to {MAX_CLASSES} different names, the background first",
                      )  # fmt: skip
    return names and tuple(names)


def read_window(path):
    """window.json: [low, high], the intensities that become black and white -> tuple, or None."""
    window = read_json(path, lambda w: isinstance(w, list) and len(w) == 2
                       and all(type(x) in (int, float) and math.isfinite(x) for x in w)
                       and w[0] < w[1], "[low, high], two intensities such as [-160, 240]",
                       )  # fmt: skip
    return window and tuple(map(float, window))


def read_groups(path, cases):
    """groups.json {"name": "group"}: the cases with their groups; unchanged without a file."""
    groups = read_json(path, lambda groups: isinstance(groups, dict), '{"image name": "group", ..}')
    if groups is None:
        return cases
    groups = {nfc(name): str(group) for name, group in groups.items()}
    lone = sorted(groups.keys() ^ {case.name for case in cases})
    if lone:
        what = "is not the name of an image" if lone[0] in groups else "has no group"
        raise UserError(f"{path}: {lone[0]!r:.80} {what}; names are like {cases[0].name!r:.80}")
    return [replace(case, group=groups[case.name]) for case in cases]


def read_split(path, cases):
    """split.json {"train": [names], "val": [..], "test": [..]} -> splits; None without a file."""
    parts = read_json(path, lambda parts: isinstance(parts, dict)
                      and all(are_names(parts.get(part)) and parts[part] for part in PARTS),
                      '{"train": [..], "val": [..], "test": [..]}, none empty')  # fmt: skip
    if parts is None:
        return None
    left, splits = {case.name: case for case in cases}, {part: [] for part in PARTS}
    for part in PARTS:
        for name in map(nfc, parts[part]):
            if name not in left:
                raise UserError(f"{path}: {name!r:.80} is not the name of an image, or it is "
                                f"listed twice; names are like {cases[0].name!r:.80}")  # fmt: skip
            splits[part].append(left.pop(name))
    return keep_groups({part: tuple(splits[part]) for part in PARTS}, path)


def keep_groups(splits, where):
    """The splits. Raises UserError where a group is in two parts."""
    part_of = {}
    for part in PARTS:
        for case in splits[part]:
            first = part_of.setdefault(case.group, part)
            if first != part:
                raise UserError(f"{where}: the group {case.group} is in {first} and in {part}")
    return splits


def split_by_folder(cases, where):
    """images/{train,val,test}/ -> splits; None if no image lies in a folder with such a name.

    Raises UserError if only some images do, or if one of the parts is missing.
    """
    tops = [case.name.rpartition("/")[0].partition("/")[0] for case in cases]  # "": in no folder
    parts = [FOLDER_PARTS.get(top.lower()) for top in tops]
    if not any(parts):
        return None
    if None in parts:
        outside = cases[parts.index(None)].image
        raise UserError(f"{outside}: some of the folders beside it are parts, such as train or "
                        "test, and its own is not; move it, or write split.json")  # fmt: skip
    splits = {part: tuple(c for c, p in zip(cases, parts) if p == part) for part in PARTS}
    if not all(splits.values()):
        missing = ", ".join(part for part in PARTS if not splits[part])
        raise UserError(f"{where}: its folders are parts, but there is none for {missing}; add it, "
                        "or write split.json")  # fmt: skip
    return keep_groups(splits, where)


def split_by_hash(cases, where):
    """About 80 / 10 / 10 by a hash of the image's bytes, or of the group's name -> splits.

    The k lowest hashes are the test part, the k highest the validation part; k is the number of
    low hashes or of high ones, whichever is smaller. So adding or removing a file moves at most one
    other: at its own end, or at the other end if k changes. (It may be two if no hash lies in
    between, as in about one of 1,000 sets of four.) Equal images stay together. Raises UserError.
    """
    grouped = any(case.group != case.name for case in cases)
    hashes = [text_hash(c.group)[:16] for c in cases] if grouped else image_hashes(cases)
    order = sorted(set(hashes))
    if len(order) < 3:
        raise UserError(f"{where}: {len(order)} different {'groups' if grouped else 'images'}; "
                        "training, validation and test need 3 or more")  # fmt: skip
    fractions = [int(h, 16) / 2**64 for h in order]
    # 12 %, because the smaller of the two numbers then is about a tenth
    low, high = sum(u < 0.12 for u in fractions), sum(u >= 0.88 for u in fractions)
    k = max(1, min(low, high, (len(order) - 1) // 2))  # at least one is left to train on
    part_of = dict.fromkeys(order[:k], "test") | dict.fromkeys(order[-k:], "val")
    parts = [part_of.get(h, "train") for h in hashes]
    return {part: tuple(c for c, p in zip(cases, parts) if p == part) for part in PARTS}
