"""The data sets: layouts, splits that never overlap, items, image and mask that move together."""

import json
import os
import random
import unicodedata
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import SegmentationData, TrainingBatches, find, load_case, square_crop
from support import cache
from support.cli import UserError
from support.demo_data import draw_demo
from support.folders import PARTS, Case, image_hashes, natural_sort_key, split_by_hash
from tools import check_data

CASES = [f"case{i}" for i in range(10)]
BOTH = ("images", "masks")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii.gz", ".nii")):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1.0, 2.0, 1.0])), path)
    else:
        Image.fromarray(array).save(path)


def folder(root, names=CASES, masks=(0, 255)):
    """Images of different greys, and masks with rows that hold the values in turn."""
    for i, name in enumerate(names):
        save(root / f"images/{name}.png", np.full((24, 32, 3), i, np.uint8))
        rows = np.resize(np.array(masks, np.uint8), (24, 1))
        save(root / f"masks/{name}.png", np.repeat(rows, 32, axis=1))
    return root


def touch(root, folders, names):
    for path in (root / f / name for f in folders for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def volumes(root, images, masks, names, k=2):
    rng = np.random.default_rng(0)
    for image, mask in names:
        save(root / images / image, rng.integers(-1000, 1000, (12, 10, 3)).astype(np.int16))
        save(root / masks / mask, np.resize(np.arange(k, dtype=np.uint8), (12, 10, 3)))


def sizes(spec):
    """[train, val, test]; no case is in two parts."""
    names = [c.name for part in PARTS for c in spec.splits[part]]
    assert len(names) == len(set(names))
    return [len(spec.splits[part]) for part in PARTS]


def names_of(spec):
    return {part: [c.name for c in spec.splits[part]] for part in PARTS}


def whole_groups(spec):
    """-> the number of groups, none of which is in two parts."""
    groups = [{case.group for case in spec.splits[part]} for part in PARTS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    return sum(map(len, groups))


# ---- published data sets ----


@pytest.mark.parametrize("folders, ending", [
    (("Original", "Ground Truth"), "tif"), (("PNG/Original", "PNG/Ground Truth"), "png"),
    (("TIF/Original", "TIF/Ground Truth"), "tif"), (("images", "masks"), "png"),
])  # fmt: skip
def test_every_layout_of_cvc_is_found(folders, ending, tmp_path):
    """Every layout of CVC-ClinicDB; the benchmark's 62 test frames, or whole videos held out."""
    base = tmp_path / "CVC-ClinicDB"
    touch(base, folders, [f"{i}.{ending}" for i in range(1, 613)])
    touch(base, folders[:1], [".DS_Store", f"._1.{ending}", "Thumbs.db"])
    spec, by_video = find("cvc", tmp_path), find("cvc", tmp_path, "sequence")
    assert sizes(spec) == [488, 62, 62] and names_of(spec)["test"] == data.POLYP_TEST["cvc"]
    assert sum(sizes(by_video)) == 612 and all(abs(n - 62) <= 12 for n in sizes(by_video)[1:])
    assert whole_groups(by_video) == 29


def test_validation_of_a_published_set_does_not_move(tmp_path):
    """A training image that is missing moves no other, but for one that leaves validation."""
    names = [f"{name}.jpg" for name in (*data.POLYP_TEST["kvasir"], *range(900))]
    touch(tmp_path / "Kvasir-SEG", BOTH, names)
    spec = find("kvasir", tmp_path)
    assert sizes(spec) == [800, 100, 100] and names_of(find("kseg", tmp_path)) == names_of(spec)
    spec.splits["train"][0].image.unlink(), spec.splits["train"][0].mask.unlink()
    fewer = find("kvasir", tmp_path)
    moved = set(spec.splits["val"]) - set(fewer.splits["val"])
    assert sizes(fewer) == [800, 99, 100] and moved < set(fewer.splits["train"])


def test_refuge2_is_cut_to_the_disc(tmp_path):
    """0 is the cup; a full fundus is cut to its disc, a disc crop is left as it is."""
    mask = np.full((200, 240), 255, np.uint8)
    mask[80:120, 100:140] = 128
    mask[90:110, 110:130] = 0
    for part, n in (("train", 8), ("val", 4), ("test", 4)):
        for i in range(n):
            save(tmp_path / f"REFUGE2/{part}/images/{i}.jpg", np.zeros((200, 240, 3), np.uint8))
            save(tmp_path / f"REFUGE2/{part}/mask/{i}.bmp", mask)
    assert sizes(find("refuge2", tmp_path)) == [11, 1, 4]  # as downloaded
    (tmp_path / "REFUGE2").rename(tmp_path / "refuge2")
    for part in PARTS:
        (tmp_path / f"refuge2/{part}/mask").rename(tmp_path / f"refuge2/{part}/masks")
    spec = find("refuge2", tmp_path)
    case = spec.splits["test"][0]
    assert sizes(spec) == [11, 1, 4] and case.name == "test/0"
    for moved in (mask, mask[::-1, ::-1], np.roll(mask, (78, 98), (0, 1))):  # the last: a corner
        save(case.mask, moved)
        image, ids = load_case(case, spec)
        assert ids.sum() == 20 * 20 and ids.shape == (80, 80) == image.shape[:2]
    save(case.mask, 255 - mask)  # 0 outside, as in other copies of REFUGE
    with pytest.raises(UserError, match="REFUGE has 0 for the cup"):
        load_case(case, spec)


def test_btcv_and_sts3d_have_the_published_lists(tmp_path):
    """The published lists and windows; BTCV's organs as one target or as thirteen."""
    numbers = (*range(1, 11), *range(21, 41))
    names = [(f"img{i:04d}.nii.gz", f"label{i:04d}.nii.gz") for i in numbers]
    volumes(tmp_path / "BTCV", "img", "label", names, k=14)
    spec, organs = find("btcv", tmp_path), find("btcv-organs", tmp_path)
    assert sizes(spec) == [15, 3, 12] and spec.window == (-125, 275)
    assert [int(name[3:]) for name in names_of(spec)["test"]] == list(data.BTCV_TEST)
    case = spec.splits["test"][0]
    image, ids = load_case(case, spec)
    assert image.shape == (3, 10, 12, 3) and set(np.unique(ids)) == {0, 1}
    assert len(organs.classes) == 14 and organs.splits == spec.splits
    assert set(np.unique(load_case(case, organs)[1])) == set(range(14))
    names = [(f"{i:04d}.nii.gz",) * 2 for i in range(1, 13)]
    volumes(tmp_path / "STS-3D", "image", "label", names)
    teeth = find("sts3d", tmp_path)
    assert sizes(teeth) == [8, 1, 3] and teeth.window == (-100, 1100)
    assert names_of(teeth)["test"] == ["0010", "0011", "0012"]


def test_joined_data_sets_keep_names_and_groups_apart(tmp_path):
    """a+b joins the parts of both, names and groups kept apart."""
    touch(tmp_path / "CVC-ClinicDB", BOTH, [f"{i}.png" for i in range(9, 29)])
    names = [f"{name}.jpg" for name in data.POLYP_TEST["kvasir"][:2] + ["x", "y"]]
    touch(tmp_path / "Kvasir-SEG", BOTH, names)
    spec = find("kvasir+cvc", tmp_path)
    assert sizes(spec) == [17, 2, 5]
    assert {case.group.split("/")[0] for case in spec.splits["train"]} == {"kvasir", "cvc"}
    with pytest.raises(UserError, match="named twice"):
        find("cvc+cvc", tmp_path)
    with pytest.raises(UserError, match="2 videos cannot fill three parts"):
        find("cvc", tmp_path, "sequence")


def test_missing_data_says_where_to_look(tmp_path, monkeypatch, capsys):
    """The layouts and the address of a missing data set, and which `demo` was taken."""
    with pytest.raises(UserError, match="CVC-ClinicDB/Original .* https://polyp.grand-challenge"):
        find("cvc", tmp_path)
    with pytest.raises(UserError, match="neither a folder nor one of cvc"):
        find("nowhere", tmp_path)
    folder(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert sizes(find("demo")) == [600, 60, 100] and sum(sizes(find("./demo"))) == 10
    assert "for that write ./demo" in capsys.readouterr().err
    with pytest.raises(UserError, match="only cvc has video sequences"):
        find("./demo", split="sequence")


def test_real_data_has_the_papers_counts(real_data):
    """The real CVC-ClinicDB and Kvasir-SEG: counts, alignment, and masks that are masks."""
    for name, counts in (("cvc", [488, 62, 62]), ("kvasir", [800, 100, 100])):
        spec = find(name, real_data)
        assert sizes(spec) == counts
        for case in spec.splits["test"][:5]:
            image, mask = load_case(case, spec)
            assert image.shape[:2] == mask.shape and set(np.unique(mask)) == {0, 1}


# ---- a folder of one's own ----


def write(root, name, value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    (root / f"{name}.json").write_text(text, "utf-8-sig")  # with a byte order mark, as on Windows


def test_json_files_name_classes_groups_and_splits(tmp_path):
    """classes.json names the classes, groups.json who stays together, split.json who is where."""
    root = folder(tmp_path / "own", masks=(0, 1, 2))
    assert find(str(root)).classes == ("background", "class 1", "class 2")
    write(root, "classes", ["tissue", "front", "ü"])
    write(root, "groups", {f"case{i}": i // 2 for i in range(10)})
    spec = find(str(root))
    assert spec.classes == ("tissue", "front", "ü")
    assert sum(sizes(spec)) == 10 and whole_groups(spec) == 5
    parts = {"train": ["case1", "case2"], "val": ["case4"], "test": ["case6"]}
    write(root, "split", parts)
    assert names_of(find(str(root))) == parts
    assert sorted(["²", "b10", "b9", "1"], key=natural_sort_key) == ["1", "b9", "b10", "²"]


def test_a_file_that_comes_or_goes_moves_at_most_one_other():
    """Splits by hash: each part holds a case; of 1500 random sets a new file moves one or none."""
    rng, shares = random.Random(0), []
    for trial in range(1500):
        *cases, new = [Case(str(i), seed=rng.getrandbits(40), group=str(i))
                       for i in range(4 + trial % 38)]  # fmt: skip
        before, after = split_by_hash(cases, ""), split_by_hash([*cases, new], "")
        assert all(before.values()) and sum(map(len, before.values())) == len(cases)
        moved = [c for part in PARTS for c in set(before[part]) - set(after[part])]
        middle = [h for h in image_hashes(cases) if 0.12 <= int(h, 16) / 2**64 < 0.88]
        assert len(moved) <= (1 if middle else 2)  # two of a few that lie at one end
        shares.append([len(before[part]) / len(cases) for part in PARTS])
    assert np.abs(np.mean(shares, axis=0) - (0.8, 0.1, 0.1)).max() < 0.07


def test_subfolders_and_links_are_read(tmp_path, monkeypatch):
    """Pairs by relative path, through links and in NFC or NFD; files of other kinds are counted."""
    root = folder(tmp_path / "own", ["a", "patient1/x", "patient2/x"])
    folder(tmp_path / "far", ["b", "c"])
    for f, form in (("images", "NFC"), ("masks", "NFD")):
        (root / f / "linked").symlink_to(tmp_path / "far" / f)
        (root / f / "patient1/circle").symlink_to(root / f)
        (root / f / "a.png").rename(root / f / unicodedata.normalize(form, "Müller.png"))
    touch(root, ("images",), ["a.txt", "b.txt", "scan.dcm", ".hidden", "._a.png", "Thumbs.db"])
    spec = find(str(root))
    names = sorted(name for part in names_of(spec).values() for name in part)
    assert names == ["Müller", "linked/b", "linked/c", "patient1/x", "patient2/x"]
    monkeypatch.chdir(root / "images")
    assert names_of(find("..")) == names_of(spec)
    assert spec.not_read.startswith("not read: 1 .dcm, 2 .txt (volumes are read as NIfTI; convert")


@pytest.mark.parametrize("k", [2, 3])
def test_own_volumes_are_split_whole_and_cut_into_slices(k, tmp_path):
    """NIfTI is split by volume, cut into slices, never cropped; several classes keep left left."""
    names = [(f"{i}.nii.gz",) * 2 for i in range(5)]
    volumes(tmp_path / "own", "imagesTr", "labelsTr", names, k)
    spec = find(str(tmp_path / "own"))
    assert spec.volumes and len(spec.classes) == k and spec.window is None
    items = SegmentationData(spec, "train", 16, "flip")
    assert items.cases == [case for case in spec.splits["train"] for _ in range(3)]
    assert items[4]["name"] == f"{items.cases[4].name}:001"
    assert items[0]["image"].shape == (3, 16, 16) and items[2]["mask"].max() == k - 1
    flipped, same = (items.batch([(e, i) for i in range(9)])["image"] for e in (0, None))
    assert torch.equal(flipped, same) == (k > 2)
    write(tmp_path / "own", "window", [-100, 100])
    windowed = SegmentationData(find(str(tmp_path / "own")), "train", 16)[0]["image"]
    assert windowed.eq(-1).sum() > same[0].eq(-1).sum()  # more voxels are below the window
    full = SegmentationData(spec, "train", 16, "full")
    grey = full.batch([(0, i) for i in range(9)])["image"]
    assert torch.equal(grey[:, 0], grey[:, 2]) and not torch.equal(grey, same) and not full.crops


def test_the_training_volumes_decide_how_all_are_sliced(tmp_path, capsys):
    """Sagittal stacks are cut into sagittal slices; another context is other items; it is said."""
    names = [f"{i}.nii" for i in range(4)]
    volumes(tmp_path, *BOTH, [(name, name) for name in names])
    for path in [tmp_path / f / name for f in BOTH for name in names[1:]]:
        values = np.asarray(nib.load(path).dataobj).copy()  # because the file is written again
        nib.save(nib.Nifti1Image(values, np.diag([3, 1, 1, 1])), path)
    write(tmp_path, "split", {"train": ["1", "2"], "val": ["3"], "test": ["0"]})
    spec = find(str(tmp_path))
    assert spec.plane == "sagittal" and load_case(spec.splits["test"][0], spec)[1].shape[0] == 12
    around = replace(spec, context="neighbours")
    repeat, three = (SegmentationData(s, "train", 16).images for s in (spec, around))
    assert not np.array_equal(repeat, three)
    check(tmp_path, "--out", tmp_path / "sheet.png")
    assert "2 classes (background, foreground), sagittal slices" in capsys.readouterr().out


def each(root, change, *folders):
    for path in [path for f in folders for path in (root / f).iterdir()]:
        change(path)


def by_part(root, *parts):
    """Sort the pairs into subfolders in turn."""
    for i, name in enumerate(CASES):
        for kind in BOTH:
            path = root / kind / parts[i % len(parts)] / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            (root / kind / f"{name}.png").rename(path)


def test_subfolders_may_be_the_parts(tmp_path):
    """images/{train,val,test} is the split, and `Validation` is val."""
    root = folder(tmp_path / "parts")
    by_part(root, "train", "Validation", "test")
    assert sizes(find(str(root))) == [4, 3, 3]
    assert find(str(root)).splits["val"][0].name == "Validation/case1"
    flat = folder(tmp_path / "flat", ["a", "b", "train", "test"])  # the names of files
    assert sum(sizes(find(str(flat)))) == 4


BAD = {  # the words of the refusal: what is done to a folder of 10 pairs
    "no file for case3; every": lambda r: (r / "masks/case3.png").unlink(),
    "same name": lambda r: save(r / "masks/case3.jpg", np.zeros((9, 9), np.uint8)),
    "end in _0000": lambda r: each(r, lambda p: p.rename(p.with_stem(p.stem + "_0000")), "images"),
    "keep them apart": lambda r: volumes(r, *BOTH, [("v.nii", "v.nii")]),
    "no volume in it .* 10 .txt": lambda r: each(r, lambda p: p.rename(f"{p}.txt"), *BOTH),
    "1 different images": lambda r: each(r, lambda p: p.write_bytes(b"x"), "images"),
    "split.json: needs": lambda r: write(r, "split", "{"),
    "'case1' .* listed twice": lambda r: write(r, "split", {p: ["case1"] for p in PARTS}),
    "2 to 14 different names": lambda r: write(r, "classes", ["a", "a"]),
    "'case1' has no group": lambda r: write(r, "groups", {"case0": "p"}),
    "window.json: needs": lambda r: write(r, "window", [240, -160]),
    "window.json: needs, as JSON": lambda r: write(r, "window", [0, 10**400]),
    "only volumes have": lambda r: write(r, "window", [-160, 240]),
    "names are like 'case0'": lambda r: write(r, "split", {p: ["case1.png"] for p in PARTS}),
    "there is none for test": lambda r: by_part(r, "train", "val"),
    "its own is not; move it": lambda r: by_part(r, "train", "val", "test", "test_external"),
    "is in train and in val": lambda r: [write(r, "groups", dict.fromkeys(CASES, "p")),
                                         write(r, "split", {p: [c] for p, c in zip(PARTS, CASES)})],
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_a_folder_that_does_not_fit_is_refused(words, tmp_path):
    """One line that names the file and what is wrong."""
    root = folder(tmp_path / "own")
    BAD[words](root)
    with pytest.raises(UserError, match=words) as error:
        find(str(root))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ---- items, augmentation, batches ----


@pytest.fixture
def drawn(drawn_once):
    """The first 20 images of the demo set's validation part."""
    spec = find("demo")
    return replace(spec, splits={"val": spec.splits["val"][:20]})


@pytest.mark.parametrize("augment, least", [("flip", 1), ("full", 0.97)])
def test_image_and_mask_move_together(augment, least, drawn):
    """The mask drawn into the image stays the mask; seed, epoch and index decide how it moves."""
    items = SegmentationData(drawn, "val", 64, augment)
    items.images = np.repeat(items.masks[..., None] * np.uint8(255), 3, axis=3)
    batch = items.batch([(e, i) for e in range(2) for i in range(20)])
    filled = batch["mask"].flatten(1).any(1)
    light, truth = batch["image"].mean(1)[filled], batch["mask"][filled] > 0
    middle = (light.amax((1, 2)) + light.amin((1, 2))) / 2
    assert ((light > middle[:, None, None]) == truth).float().mean() >= least
    assert not torch.equal(batch["mask"][:20], batch["mask"][20:])
    torch.testing.assert_close(items.batch([(1, 6)])["image"][0], batch["image"][26])
    assert torch.equal(items.batch([(None, 6)])["image"][0], items[6]["image"])


def test_some_images_of_a_full_augmentation_hold_no_foreground(drawn):
    """A fifth become crops that avoid it, wherever they lie; flips alone crop nothing."""
    items = SegmentationData(drawn, "val", 64, "full")
    kept = [i for i in range(20) if items.masks[i].any()]
    samples = [(epoch, i) for epoch in range(30) for i in kept]
    empty = ~items.batch(samples)["mask"].flatten(1).any(1)
    assert 0.12 < empty.float().mean() < 0.3
    flipped = SegmentationData(drawn, "val", 64, "flip").batch(samples)
    assert flipped["mask"].flatten(1).any(1).all()
    image, mask = np.asarray(items.images[kept[0]]), np.asarray(items.masks[kept[0]])
    for position in np.linspace(0, 0.999, 7):
        crop, ids = square_crop(image, mask, 20, position, avoid_foreground=True)
        assert crop.shape == (64, 64, 3) and ids.shape == (64, 64) and not ids.any()
    assert square_crop(image, mask | 1, 20, 0.5, True) is None
    assert square_crop(image, mask | 1, 20, 0.5, False)[1].all()


def test_batches_are_permutations_and_processes_share_them(drawn):
    """Each epoch holds every item once; two processes have the two halves of each batch."""
    items = SegmentationData(drawn, "val", 16, "flip")
    whole = TrainingBatches(items, 8, seed=1)
    for epoch in range(2):
        samples = [whole.sample(20 * epoch + i) for i in range(20)]
        assert sorted(samples) == [(epoch, i) for i in range(20)]
    halves = [TrainingBatches(items, 8, 1, rank, 2)[3] for rank in range(2)]
    image, mask, ids = whole[3]
    assert torch.equal(image, torch.cat([half[0] for half in halves])) and len(mask) == 8
    assert ids == halves[0][2] + halves[1][2] and {i // 8 for i in ids} <= set(range(20))


def test_demo_is_seeded_and_no_threshold_finds_it():
    """Same seed, same image; the best of many thresholds stays under Dice 0.5."""
    assert all(np.array_equal(x, y) for x, y in zip(draw_demo(7, 64), draw_demo(7, 64)))
    images, masks = zip(*(draw_demo(seed, 64) for seed in range(30)))
    greys, truth = np.mean(images, axis=3), np.array(masks) > 0
    for level in range(5, 255, 10):
        for found in (greys > level, greys < level):
            overlap, size = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
            assert (2 * overlap / (size + 1)).mean() < 0.5


# ---- the cache ----


def test_the_cache_returns_the_same_items(tmp_path, monkeypatch, capsys):
    """It decodes once and repeats the remarks, until a file changes; damage costs only time."""
    root, exif = folder(tmp_path / "own"), Image.Exif()
    exif[0x0112] = 3
    each(root, lambda path: Image.open(path).save(path, exif=exif), "images")
    spec = find(str(root))
    first = SegmentationData(spec, "train", 16)
    each(root, lambda path: os.utime(path, (1, 1)), "images")  # the content alone counts

    def same():
        return np.array_equal(SegmentationData(spec, "train", 16).images, first.images)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", None)
        assert same()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] and "EXIF orientation 3 in the image, 1 in its mask" in lines[0]
    each(tmp_path, lambda path: path.write_bytes(path.read_bytes()[:-1]), "cache")
    assert same()
    monkeypatch.setenv("SDSEG_CACHE", "/proc/nowhere")
    assert same()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDSEG_CACHE")
    monkeypatch.setattr(os.path, "expanduser", str)  # no home
    assert same() and not (tmp_path / "~").exists()
    each(root, lambda path: save(path, 255 - np.asarray(Image.open(path))), "images")
    assert not same()


# ---- the check ----


def check(root, *flags):
    return check_data.main(check_data.parse_args(["--data", str(root), *map(str, flags)]))


def test_the_check_counts_measures_and_finds_what_is_odd(tmp_path, capsys):
    """The check counts, measures, finds an image in two parts, lists a part, draws a sheet."""
    root, sheet = folder(tmp_path / "own"), tmp_path / "sheet.png"
    touch(root, ("images",), ["notes.txt"])
    write(root, "split", {"train": CASES[:8], "val": CASES[8:9], "test": CASES[9:]})
    assert check(root, "--out", sheet) == 0 and sheet.exists()
    printed = capsys.readouterr().out
    assert "train  8 cases, 32 x 24; background 50.00 %, foreground 50.00 %; 0 empty" in printed
    assert "not read: 1 .txt" in printed and "odd: nothing" in printed
    (root / "images/case9.png").write_bytes((root / "images/case1.png").read_bytes())
    assert check(root, "--out", sheet) == 1
    assert "same image in two parts: train case1 and test case9" in capsys.readouterr().out
    assert check(root, "--list", "train") == 0 and capsys.readouterr().out.split() == CASES[:8]
    with pytest.raises(UserError, match="another --out"):
        check(root, "--out", root / "masks/case1.png")


def test_the_check_asks_about_inverted_masks_and_divided_folders(tmp_path, capsys):
    """Foreground in all corners of most masks; a subfolder, perhaps a patient, in two parts."""
    root = folder(tmp_path / "own", masks=[255])
    by_part(root, "patient 1", "patient 2")
    assert check(root, "--out", tmp_path / "sheet.png") == 1
    printed = capsys.readouterr().out
    assert "train masks are foreground in all four corners: are they inverted?" in printed
    assert "2 of 2 folders" in printed and "write groups.json" in printed
    write(root, "groups", {f"patient {1 + i % 2}/{c}": f"p{i}" for i, c in enumerate(CASES)})
    check(root, "--out", tmp_path / "sheet.png")
    assert "groups.json" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["image", "NIfTI volume"])
def test_the_check_names_every_damaged_file(kind, tmp_path, capsys):
    """It goes on after one, counts them, and says so when no mask of a part holds foreground."""
    root, sheet = folder(tmp_path / "own", masks=[0]), tmp_path / "sheet.png"
    if kind != "image":
        root = tmp_path / "scans"
        volumes(root, *BOTH, [(f"{i}.nii.gz",) * 2 for i in range(10)], k=1)
    for case in find(str(root)).splits["train"][:2]:
        case.image.write_bytes(case.name.encode())
    assert check(root, "--out", sheet) == 1
    printed = capsys.readouterr().out
    assert printed.count(f"not a readable {kind}") == 2
    assert "no mask of the train part holds foreground" in printed
    assert f"odd: {2 + printed.count('no mask of the')}" in printed
