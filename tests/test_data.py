"""The data sets: layouts, splits that never overlap, image and mask that move together, files
that lie."""

import gzip
import json
import os
import struct
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import Refusal
from data import PARTS, SegmentationData, find, load_case
from demo import draw_demo
from files import read_image, read_mask, read_volume, slices_of, volume_of, write_volume


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path / "cache"))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii.gz", ".nii")):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1.0, 2.0, 1.0])), path)
    else:
        Image.fromarray(array).save(path)


def grey(values, shape=(24, 32)):
    return np.resize(np.array(values, np.uint8), shape)


def folder(root, n=10, masks=(0, 255), ending=".png", image_ending=".png"):
    for i in range(n):
        save(root / f"images/case{i}{image_ending}", np.full((24, 32, 3), i, np.uint8))
        save(root / f"masks/case{i}{ending}", grey(masks))
    return root


def volumes(root, images, masks, names, values=(0, 1)):
    rng = np.random.default_rng(0)
    for image, mask in names:
        save(root / images / image, rng.integers(-1000, 1000, (12, 10, 3)).astype(np.int16))
        save(root / masks / mask, np.resize(np.array(values, np.uint8), (12, 10, 3)))


CVC = [("Original", "Ground Truth", "tif"), ("PNG/Original", "PNG/Ground Truth", "png"),
       ("TIF/Original", "TIF/Ground Truth", "tif"), ("images", "masks", "png")]  # fmt: skip


@pytest.mark.parametrize("images, masks, ending", CVC)
def test_cvc_layouts(images, masks, ending, tmp_path):
    """Every layout of CVC-ClinicDB is read, 488 / 62 / 62 of 612 frames, junk files ignored."""
    base = tmp_path / "CVC-ClinicDB"
    for i in range(1, 613):
        for f in (images, masks):
            (base / f).mkdir(parents=True, exist_ok=True)
            (base / f / f"{i}.{ending}").touch()
    (base / images / ".DS_Store").touch()
    (base / images / f"._1.{ending}").touch()
    (base / images / "Thumbs.db").touch()
    found = find("cvc", tmp_path)
    assert [len(found.parts[p]) for p in PARTS] == [488, 62, 62]
    assert [c.name for c in found.parts["test"][:4]] == FIRST_OF_TEST
    by_video = find("cvc", tmp_path, "sequence")
    sizes = [len(by_video.parts[p]) for p in PARTS]
    assert sum(sizes) == 612 and all(abs(n - 62) <= 12 for n in sizes[1:])
    videos = [{data.bisect(data.SEQUENCES, int(c.name)) for c in by_video.parts[p]} for p in PARTS]
    assert not (videos[0] & videos[1] | videos[0] & videos[2] | videos[1] & videos[2])


FIRST_OF_TEST = ["2", "15", "42", "64"]


def disjoint(found):
    names = [c.name for p in PARTS for c in found.parts[p]]
    return len(names) == len(set(names))


def test_kvasir_is_800_100_100(tmp_path):
    """Kvasir-SEG, and its other name."""
    for i in range(1000):
        for f in ("images", "masks"):
            (tmp_path / "Kvasir-SEG" / f).mkdir(parents=True, exist_ok=True)
            (tmp_path / "Kvasir-SEG" / f / f"x{i}.jpg").touch()
    found = find("kvasir", tmp_path)
    assert [len(found.parts[p]) for p in PARTS] == [800, 100, 100] and disjoint(found)
    assert find("kseg", tmp_path) == found


def test_refuge2_cup_and_disc_crop(tmp_path):
    """0 is the cup; a full fundus is cut to its disc, a disc crop is left as it is."""
    mask = np.full((200, 240), 255, np.uint8)
    mask[80:120, 100:140] = 128
    mask[90:110, 110:130] = 0
    for part, n in (("train", 8), ("val", 4), ("test", 4)):
        for i in range(n):
            save(tmp_path / f"refuge2/{part}/images/{i}.jpg", np.zeros((200, 240, 3), np.uint8))
            save(tmp_path / f"refuge2/{part}/masks/{i}.bmp", mask)
    found = find("refuge2", tmp_path)
    assert [len(found.parts[p]) for p in PARTS] == [11, 1, 4] and disjoint(found)
    image, ids = load_case(found.parts["test"][0], found)
    assert ids.sum() == 20 * 20 and ids.shape == (80, 80) == image.shape[:2]
    for turned in (mask[::-1, ::-1], np.roll(mask, (78, 98), (0, 1))):  # the second in a corner
        save(found.parts["test"][0].mask, turned)
        image, ids = load_case(found.parts["test"][0], found)
        assert ids.sum() == 20 * 20 and ids.shape == (80, 80) == image.shape[:2]


def test_btcv_and_sts3d(tmp_path):
    """BTCV by the published list, organs as one target or thirteen; STS-3D 9 / 3; the windows."""
    names = [
        (f"img{i:04d}.nii.gz", f"label{i:04d}.nii.gz") for i in (*range(1, 11), *range(21, 41))
    ]
    volumes(tmp_path / "BTCV", "img", "label", names, values=range(14))
    found = find("btcv", tmp_path)
    assert [len(found.parts[p]) for p in PARTS] == [15, 3, 12] and disjoint(found)
    assert [int(c.name[3:]) for c in found.parts["test"]] == list(data.BTCV_TEST)
    image, ids = load_case(found.parts["test"][0], found)
    assert image.shape == (3, 10, 12, 3) and set(np.unique(ids)) == {0, 1}
    assert found.window == (-125, 275)
    organs = find("btcv-organs", tmp_path)
    assert len(organs.classes) == 14 and organs.parts == found.parts
    assert set(np.unique(load_case(organs.parts["test"][0], organs)[1])) == set(range(14))
    volumes(tmp_path / "STS-3D", "image", "label", [(f"{i}.nii.gz",) * 2 for i in range(12)])
    teeth = find("sts3d", tmp_path)
    assert [len(teeth.parts[p]) for p in PARTS] == [8, 1, 3] and teeth.window == (-100, 1100)


def test_joined_data_sets(tmp_path):
    """a+b joins the parts of both, names kept apart."""
    for name, ending in (("CVC-ClinicDB", "png"), ("Kvasir-SEG", "jpg")):
        for i in range(10):
            save(tmp_path / name / f"images/{i}.{ending}", np.zeros((8, 8, 3), np.uint8))
            save(tmp_path / name / f"masks/{i}.{ending}", grey([0, 255], (8, 8)))
    found = find("kvasir+cvc", tmp_path)
    assert [len(found.parts[p]) for p in PARTS] == [16, 2, 2] and disjoint(found)
    assert {c.name.split("/")[0] for c in found.parts["train"]} == {"kvasir", "cvc"}


@pytest.mark.parametrize("values, rule, k", [((0, 255), "binary", 2), ((0, 1), "binary", 2),
                                             ((0, 1, 2), "ids", 3)])  # fmt: skip
def test_own_folder_finds_its_classes(values, rule, k, tmp_path):
    """Masks of 0 and 255, of 0 and 1, or of ids; 80 / 10 / 10."""
    found = find(str(folder(tmp_path / "own", masks=values)))
    assert found.rule == rule and len(found.classes) == k
    assert [len(found.parts[p]) for p in PARTS] == [8, 1, 1] and disjoint(found)
    assert set(np.unique(load_case(found.parts["test"][0], found)[1])) == set(range(k))


def test_own_folder_names_and_split(tmp_path):
    """classes.json names the classes, split.json says who is where."""
    root = folder(tmp_path / "own", masks=(0, 1, 2))
    (root / "classes.json").write_text('["tissue", "front", "back"]')
    parts = {"train": ["case1", "case2"], "val": ["case3"], "test": ["case0"]}
    (root / "split.json").write_text(json.dumps(parts))
    found = find(str(root))
    assert found.classes == ("tissue", "front", "back")
    assert {p: [c.name for c in found.parts[p]] for p in PARTS} == parts


def test_own_volumes(tmp_path):
    """NIfTI in images/ and masks/ or imagesTr/ and labelsTr/: split by volume, cut into slices."""
    volumes(
        tmp_path / "own",
        "imagesTr",
        "labelsTr",
        [(f"{i}.nii.gz",) * 2 for i in range(5)],
        (0, 1, 2),
    )
    found = find(str(tmp_path / "own"))
    assert found.volumes and len(found.classes) == 3 and found.window is None
    items = SegmentationData(found, "train", 16)
    assert len(items) == 9 and items[4]["name"].endswith(":001")
    assert items[0]["image"].shape == (3, 16, 16) and set(items[0]["mask"].unique().tolist()) <= {
        0,
        1,
        2,
    }


BAD = {
    "no file for case3": lambda r: (r / "masks/case3.png").unlink(),
    "same name": lambda r: save(r / "masks/case3.jpg", grey([0, 255])),
    "pictures and volumes": lambda r: [
        save(r / f"{f}/v.nii.gz", np.zeros((4, 4, 2), np.uint8)) for f in ("images", "masks")
    ],
    "not valid JSON": lambda r: (r / "split.json").write_text("{"),
    "not the name of an image": lambda r: (r / "split.json").write_text(
        '{"train": ["../../etc/passwd"], "val": ["case1"], "test": ["case2"]}'
    ),
    "listed twice": lambda r: (r / "split.json").write_text(
        '{"train": ["case1"], "val": ["case1"], "test": ["case2"]}'
    ),
    "none empty": lambda r: (r / "split.json").write_text('{"train": ["case1"]}'),
    "list of 2 to 14 names": lambda r: (r / "classes.json").write_text('["one"]'),
    "holds class id 2": lambda r: [
        save(r / f"masks/case{i}.png", grey([0, 1, 3])) for i in range(10)
    ],
    "have the values": lambda r: [
        save(r / f"masks/case{i}.png", grey([0, 70, 90])) for i in range(10)
    ],
}


@pytest.mark.parametrize("words", BAD)
def test_a_folder_that_does_not_fit_is_refused(words, tmp_path):
    """One line that names the file and what is wrong."""
    root = folder(tmp_path / "own")
    BAD[words](root)
    with pytest.raises(Refusal, match=words) as error:
        find(str(root))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_mask_of_another_size_is_refused(tmp_path):
    """Image and mask of different sizes are named, not stretched onto each other."""
    root = folder(tmp_path / "own")
    save(root / "masks/case3.png", grey([0, 255], (10, 10)))
    found = find(str(root))
    with pytest.raises(Refusal, match="case3.png: a mask of"):
        for part in PARTS:
            SegmentationData(found, part, 16)


def test_missing_data_says_where_it_looked(tmp_path):
    """No data set at --root, or an unknown name: the line says what would have been found."""
    with pytest.raises(Refusal, match="expected CVC-ClinicDB/Original"):
        find("cvc", tmp_path)
    with pytest.raises(Refusal, match="neither a folder nor one of cvc"):
        find("nowhere", tmp_path)


@pytest.fixture
def drawn(drawn_once):
    """The first 20 pictures of the demo set's validation part."""
    found = find("demo")
    return replace(found, parts={"val": found.parts["val"][:20]})


@pytest.mark.parametrize("augment", ["flip", "full"])
def test_image_and_mask_move_together(augment, drawn):
    """The mask drawn into the image stays the mask, whatever the augmentation."""
    items = SegmentationData(drawn, "val", 64, augment)
    items.images = np.repeat(items.masks[..., None] * np.uint8(255), 3, axis=3)
    batch = items.batch([(e, i) for e in range(2) for i in range(20)])
    grey = batch["image"].mean(1)
    middle = (grey.amax((1, 2)) + grey.amin((1, 2))) / 2
    agree = ((grey > middle[:, None, None]) == (batch["mask"] > 0)).float()
    filled = batch["mask"].flatten(1).any(1)
    assert agree[filled].mean() > (0.999 if augment == "flip" else 0.97)
    if augment == "flip":
        assert torch.equal(batch["image"][:, 0] > 0, batch["mask"] > 0)
    assert not torch.equal(batch["mask"][:20], batch["mask"][20:])


def test_volumes_of_several_classes_keep_their_sides(drawn, monkeypatch):
    """A left kidney stays left: "flip" changes nothing where sides tell classes apart."""
    plain = SegmentationData(drawn, "val", 64)
    monkeypatch.setattr(data, "cached", lambda *_: (plain.images, plain.masks, plain.names))
    for several in (False, True):
        classes = ("background", "left", "right") if several else drawn.classes
        items = SegmentationData(replace(drawn, volumes=True, classes=classes), "val", 64, "flip")
        changed = [
            not torch.equal(items.batch([(0, i)])["image"], items.batch([(None, i)])["image"])
            for i in range(10)
        ]
        assert any(changed) != several


def test_augmentation_is_a_function_of_seed_epoch_and_index(drawn):
    """The same three numbers give the same picture, in any batch; no epoch: the original."""
    items = SegmentationData(drawn, "val", 64, "full", seed=3)
    a, b = items.batch([(1, 5), (1, 6)]), items.batch([(1, 6)])
    torch.testing.assert_close(a["image"][1:], b["image"])
    plain = items.batch([(None, 6)])["image"][0]
    assert torch.equal(plain, items[6]["image"]) and not torch.equal(plain, b["image"][0])


def test_the_cache_returns_the_same_items(tmp_path, monkeypatch):
    """A second reading decodes nothing; an unwritable cache costs time and nothing else."""
    found = find(str(folder(tmp_path / "own")))
    first = SegmentationData(found, "train", 16)
    monkeypatch.setattr(data, "decode", None)
    second = SegmentationData(found, "train", 16)
    assert np.array_equal(first.images, second.images) and first.names == second.names
    monkeypatch.undo()
    monkeypatch.setenv("SDSEG_CACHE", "/proc/nowhere")
    third = SegmentationData(found, "train", 16)
    assert np.array_equal(first.images, third.images)


def test_demo_is_seeded_and_no_threshold_finds_it():
    """Same seed, same picture; the best of many thresholds stays under Dice 0.5."""
    a, b = draw_demo(7, 64), draw_demo(7, 64)
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
    pictures = [draw_demo(seed, 64) for seed in range(30)]
    greys = [image.mean(2) for image, _ in pictures]
    truth = [mask > 0 for _, mask in pictures]

    def mean_dice(sign, level):
        found = [sign * g > sign * level for g in greys]
        return np.mean(
            [2 * (p & t).sum() / max(p.sum() + t.sum(), 1) for p, t in zip(found, truth)]
        )

    assert max(mean_dice(s, level) for s in (-1, 1) for level in range(5, 255, 10)) < 0.5
    lesions = np.array([t.mean() for t in truth])
    assert (lesions == 0).any() and 0.02 < lesions.mean() < 0.3


# ---- files ----

NOISE = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
PICTURES = {
    "1 bit.png": Image.fromarray(NOISE[..., 0] > 127),
    "grey.png": Image.fromarray(NOISE[..., 0]),
    "grey.bmp": Image.fromarray(NOISE[..., 0]),
    "16 bit.png": Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200),
    "16 bit.tif": Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200),
    "float.tif": Image.fromarray(NOISE[..., 0].astype(np.float32) / 7),
    "rgba.png": Image.fromarray(NOISE).convert("RGBA"),
    "grey alpha.png": Image.fromarray(NOISE[..., 0]).convert("LA"),
    "palette.png": Image.fromarray(NOISE).quantize(16),
    "palette.gif": Image.fromarray(NOISE).quantize(16),
    "cmyk.jpg": Image.fromarray(NOISE).convert("CMYK"),
    "cmyk.tif": Image.fromarray(NOISE).convert("CMYK"),
    "rgb.webp": Image.fromarray(NOISE),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind(name, tmp_path):
    """1 to 16 bits, grey, alpha, palette, CMYK: uint8 (H, W, 3), and the range is used."""
    PICTURES[name].save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8 and np.ptp(image) > 150


def test_sixteen_bits_use_their_own_range(tmp_path):
    """A 12-bit scan in a 16-bit file is not black."""
    Image.fromarray(np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)).save(
        tmp_path / "x.png"
    )
    image = read_image(tmp_path / "x.png")
    assert image.min() == 0 and image.max() == 255


def test_one_infinite_pixel_changes_no_other(tmp_path):
    """NaN and infinities become the nearest finite extreme, as in volumes."""
    values = np.linspace(1000, 1100, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "f.tif")
    clean = read_image(tmp_path / "f.tif")
    for odd, expected in ((np.inf, 255), (np.nan, 0), (-np.inf, 0)):
        values[3, 3] = odd
        Image.fromarray(values).save(tmp_path / "f.tif")
        image = read_image(tmp_path / "f.tif")
        assert (image[3, 3] == expected).all()
        image[3, 3] = clean[3, 3]
        assert np.array_equal(image, clean)


def test_a_mask_with_a_palette(tmp_path):
    """Black and white are what they look like, whatever their indices; other indices are ids."""
    ids = np.eye(6, dtype=np.uint8)
    for palette, k in (([255] * 3 + [0] * 3, 1), ([0] * 3 + [255] * 3, 0), ([9, 0, 0, 0, 9, 0], 0)):
        image = Image.frombytes("P", ids.shape, (ids ^ k).tobytes())
        image.putpalette(palette)
        for ending in ("png", "gif"):
            image.save(tmp_path / f"m.{ending}")
            assert np.array_equal(read_mask(tmp_path / f"m.{ending}") > 0, ids)
    # One palette, one meaning, whichever of its colours a file happens to use
    for used in ([0, 0], [0, 2], [0, 1, 2]):
        image = Image.fromarray(np.array([used], np.uint8)).convert("P")
        image.putpalette([255] * 3 + [255, 0, 0] + [0] * 3)
        image.save(tmp_path / "m.png")
        assert read_mask(tmp_path / "m.png").tolist() == [used]


def test_a_mask_cut_out_by_transparency(tmp_path):
    """White that is clear outside of a shape is the shape; alpha changes no id, and if all is
    clear it is unused.
    """
    ids = np.eye(6, dtype=np.uint8)
    for mode, value in (("RGBA", 255), ("LA", 255), ("RGBA", 3)):
        image = Image.new(mode, ids.shape, (value,) * (len(mode) - 1) + (0,))
        image.save(tmp_path / "m.png")
        assert (read_mask(tmp_path / "m.png") == value).all()
        image.putalpha(Image.fromarray(200 * ids))
        image.save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png"), value * ids)


def test_only_pictures_are_opened(tmp_path):
    """PostScript, which Pillow would hand to another program, is refused under any name."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(Refusal, match="cannot identify"):
        read_image(tmp_path / "x.png")


def test_exif_orientation_turns_the_picture(tmp_path):
    """A photograph taken upright comes out upright, and the mask beside it likewise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (30, 20, 3)
    assert read_mask(tmp_path / "x.jpg").shape == (30, 20)


def test_the_first_of_several_frames_is_used(tmp_path, capsys):
    """Animated GIF, multi-page TIFF: the first frame, and a line that says so."""
    frames = [Image.fromarray(NOISE[..., 0] // (i + 1)) for i in range(3)]
    for name in ("x.gif", "x.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.abs(read_image(tmp_path / name)[..., 0].astype(int) - NOISE[..., 0]).max() < 2
        assert "3 frames; the first is used" in capsys.readouterr().err


def bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


def cut_short(path):
    Image.fromarray(np.tile(NOISE, (20, 20, 1))).save(path)
    path.write_bytes(path.read_bytes()[:3000])


REFUSED = {"bomb.png": bomb, "cut.png": cut_short, "empty.png": lambda p: p.touch(),
           "text.png": lambda p: p.write_text("hello"), "folder.png": lambda p: p.mkdir(),
           "missing.png": lambda p: None}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_pictures_are_refused_in_one_line(name, tmp_path):
    """Bombs, truncated and empty files, folders: a Refusal that names the file."""
    REFUSED[name](tmp_path / name)
    with pytest.raises(Refusal, match=name) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


CODES = ("RAS", "LPS", "PIR", "ASL", "IPL")


@pytest.mark.parametrize("codes", CODES)
def test_a_volume_comes_back_where_it_was(codes, tmp_path):
    """Read into RAS, written back: the file's own array, affine and spacing; slices invert."""
    affine = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.05) @ np.diag([1, 2, 3]), [1, 2, 3]
    )
    original = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), affine)
    stored = original.as_reoriented(nib.orientations.axcodes2ornt(codes))
    nib.save(stored, tmp_path / "v.nii.gz")
    values, geometry = read_volume(tmp_path / "v.nii.gz")
    expected = nib.as_closest_canonical(stored)
    assert np.array_equal(values, np.asarray(expected.dataobj))
    assert np.array_equal(volume_of(slices_of(values)), values)
    write_volume(tmp_path / "w.nii.gz", values.astype(np.uint8), geometry)
    again = nib.load(tmp_path / "w.nii.gz")
    assert np.array_equal(np.asarray(again.dataobj), np.asarray(stored.dataobj))
    np.testing.assert_allclose(again.affine, stored.affine, atol=1e-5)
    np.testing.assert_allclose(again.header.get_zooms(), stored.header.get_zooms(), atol=1e-5)


TYPES = (
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
)


@pytest.mark.parametrize("dtype", TYPES)
def test_voxels_of_every_type(dtype, tmp_path):
    """Every integer and float type, with a slope and an intercept."""
    image = nib.Nifti1Image(np.arange(24).reshape(2, 3, 4).astype(dtype), np.eye(4), dtype=dtype)
    image.header.set_slope_inter(2, -5)
    nib.save(image, tmp_path / "v.nii")
    values, _ = read_volume(tmp_path / "v.nii")
    np.testing.assert_allclose(values, np.asarray(nib.load(tmp_path / "v.nii").dataobj), rtol=1e-6)


def test_odd_volumes(tmp_path):
    """NaN and infinity become finite; one slice, a last axis of 1, no affine: they are read."""
    values = np.array([1, np.nan, np.inf, -np.inf, 5, 2], np.float32).reshape(1, 2, 3)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    got = read_volume(tmp_path / "a.nii")[0]
    assert np.isfinite(got).all() and got.min() == 1 and got.max() == 5
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 1, 1), np.int16), np.eye(4)), tmp_path / "b.nii")
    got, geometry = read_volume(tmp_path / "b.nii")
    assert got.shape == (4, 5, 1) and geometry.shape == (4, 5, 1, 1)
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None), tmp_path / "c.nii")
    assert read_volume(tmp_path / "c.nii")[0].shape == (4, 5, 6)


def lying_header(path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path.with_suffix(""))
    content = bytearray(path.with_suffix("").read_bytes())
    struct.pack_into("<8h", content, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(content)))


def zip_bomb(path):
    header = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(header + b"\0" * 200_000_000, 1))


def cut_volume(path):
    nib.save(nib.Nifti1Image(NOISE.astype(np.int16), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:-300])


def four_d(path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), path)


def colours(path):
    nib.save(
        nib.Nifti1Image(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)),
        path,
    )


@pytest.mark.parametrize("make", [lying_header, cut_volume, four_d, colours])
def test_bad_volumes_are_refused_in_one_line(make, tmp_path):
    """A header that lies about its size, a truncated file, 4-D, colours."""
    path = tmp_path / "v.nii.gz"
    make(path)
    with pytest.raises(Refusal, match="v.nii.gz") as error:
        read_volume(path)
    assert "\n" not in str(error.value)


def test_a_damaged_gzip_is_noticed(tmp_path):
    """Any of its bits turned, or its end cut off: refused, or the voxels are right all the same."""
    values = np.random.default_rng(0).integers(0, 9, (9, 8, 7)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    content, right = (tmp_path / "v.nii.gz").read_bytes(), read_volume(tmp_path / "v.nii.gz")[0]
    damaged = [bytearray(content) for _ in range(40)]
    for copy, place in zip(damaged, np.linspace(10, len(content) - 1, len(damaged)).astype(int)):
        copy[place] ^= 16
    refused = 0
    for copy in (*damaged, content[:-8]):
        (tmp_path / "v.nii.gz").write_bytes(copy)
        try:
            assert np.array_equal(read_volume(tmp_path / "v.nii.gz")[0], right)
        except Refusal:
            refused += 1
    assert refused > 35


def test_half_of_a_pair_is_refused(tmp_path):
    """A .hdr renamed to .nii would be segmented from its own header on."""
    header = nib.nifti1.Nifti1PairHeader()
    header.set_data_shape((4, 4, 4))
    (tmp_path / "v.nii").write_bytes(header.structarr.tobytes() + bytes(600))
    with pytest.raises(Refusal, match="half of a pair"):
        read_volume(tmp_path / "v.nii")


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path):
    """200 MB of zeros behind a small volume are never unpacked."""
    zip_bomb(tmp_path / "v.nii.gz")
    assert read_volume(tmp_path / "v.nii.gz")[0].shape == (4, 4, 4)


def test_checking_a_data_set(tmp_path, capsys):
    """`python data.py` counts, measures, finds the same image in two parts, draws a sheet."""
    root = folder(tmp_path / "own", n=12)
    found = find(str(root))
    twin = found.parts["test"][0].image
    twin.write_bytes(found.parts["train"][0].image.read_bytes())
    sheet = tmp_path / "sheet.png"
    assert data.main(data.parse(["--data", str(root), "--out", str(sheet)])) == 1
    printed = capsys.readouterr().out
    assert "10 cases, 32 x 24" in printed and "foreground 50.00 %" in printed
    assert "1 images stand in two parts" in printed and twin.stem in printed
    assert Image.open(sheet).size == (8 * 112, 6 * 112)
    data.main(data.parse(["--data", str(root), "--list", "test"]))
    assert capsys.readouterr().out.split() == [c.name for c in found.parts["test"]]


@pytest.mark.parametrize("name, ending", [("cvc", "png"), ("kvasir", "jpg")])
def test_a_few_pictures_still_fill_every_part(name, ending, tmp_path):
    """Four pictures of a published data set: none of the three parts is empty."""
    folder(tmp_path / {"cvc": "CVC-ClinicDB", "kvasir": "Kvasir-SEG"}[name], 4)
    assert [len(find(name, tmp_path).parts[p]) for p in PARTS] == [2, 1, 1]


def test_videos_that_cannot_fill_three_parts_are_refused(tmp_path):
    """Two videos leave a part empty, which would only be found after training."""
    for i in range(1, 31):
        for f in ("images", "masks"):
            save(tmp_path / f"CVC-ClinicDB/{f}/{i}.png", grey([0, 255]))
    with pytest.raises(Refusal, match="2 videos cannot fill three parts"):
        find("cvc", tmp_path, "sequence")
    with pytest.raises(Refusal, match="named twice"):
        find("cvc+cvc", tmp_path)
    with pytest.raises(Refusal, match="only cvc has video sequences"):
        find(str(tmp_path / "CVC-ClinicDB"), tmp_path, "sequence")  # as a folder of one's own


def test_names_that_only_look_like_numbers_are_sorted():
    """A superscript two counts as a digit for str.isdigit and not for int."""
    assert sorted(["²", "b10", "b9", "1"], key=data.natural) == ["1", "b9", "b10", "²"]


def test_an_id_outside_the_classes_is_refused_not_emptied(tmp_path):
    """Ids 0 1 2 in a two-class set are no black and white picture; what JPEG leaves of 0 is."""
    root = folder(tmp_path / "own")
    found = find(str(root))
    case = found.parts["test"][0]
    save(case.mask, grey([0, 1, 2]))
    with pytest.raises(Refusal, match="mask values 0, 1, 2"):
        load_case(case, found)
    assert not data.class_ids(np.array([0, 3]), "binary", 2, "mask.jpg").any()


def test_one_dark_grey_is_no_black_and_white_mask():
    """0 and 100 were meant as two classes, so refused; greys of a smooth edge are cut at 127."""
    with pytest.raises(Refusal, match="mask values 0, 100"):
        data.class_ids(np.array([0, 100]), "binary", 2, "mask.png")
    assert not data.class_ids(np.array([0, 40, 100]), "binary", 2, "mask.png").any()
    assert data.class_ids(np.array([0, 128]), "binary", 2, "mask.png").tolist() == [0, 1]


def test_json_files_as_editors_write_them(tmp_path):
    """A byte order mark is read over; null is no split, and two equal names no classes."""
    root = folder(tmp_path / "own")
    (root / "classes.json").write_bytes('["a", "ü"]'.encode("utf-8-sig"))
    assert find(str(root)).classes == ("a", "ü")
    (root / "split.json").write_text("null")
    with pytest.raises(Refusal, match="none empty"):
        find(str(root))
    (root / "split.json").unlink()
    (root / "classes.json").write_text('["a", "a"]')
    with pytest.raises(Refusal, match="all different"):
        find(str(root))


def test_the_check_overwrites_no_input(tmp_path):
    """`--out` may not be a file of the data set."""
    root = folder(tmp_path / "own")
    with pytest.raises(Refusal, match="another --out"):
        data.main(data.parse(["--data", str(root), "--out", str(root / "masks/case1.png")]))


def test_the_cache_goes_by_content(tmp_path):
    """Same names, sizes and times but other bytes are other items; the same bytes are the same."""
    first, second = (find(str(folder(tmp_path / where / "own"))) for where in "pq")
    for case in second.parts["train"]:
        save(case.image, 255 - np.asarray(Image.open(case.image)))
    for a, b in zip(first.parts["train"], second.parts["train"]):
        for file in (a.image, a.mask, b.image, b.mask):
            os.utime(file, (0, 0))
    a, b = (SegmentationData(found, "train", 16) for found in (first, second))
    assert a.key != b.key and not np.array_equal(a.images, b.images)
    for case in first.parts["train"]:
        os.utime(case.image, (1, 1))
    assert SegmentationData(first, "train", 16).key == a.key


def test_a_damaged_cache_is_made_anew(tmp_path):
    """Each of the three files, cut short or overwritten: the items are those of the originals."""
    found = find(str(folder(tmp_path / "own")))
    first = np.array(SegmentationData(found, "train", 16).images)
    for file in sorted((tmp_path / "cache").iterdir()):
        for content in (b"", b"5", file.read_bytes()[:-1]):
            file.unlink()
            file.write_bytes(content)
            assert np.array_equal(SegmentationData(found, "train", 16).images, first)


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path):
    """Turned and in the same place: compared in space. Without the image's affine: refused."""
    affine = np.array([[-1, 0.1, 0, 3], [0.1, 2, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    voxels = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 2, affine)
    turned = voxels.as_reoriented(nib.orientations.axcodes2ornt("PIR"))
    lost = nib.Nifti1Image(np.asarray(voxels.dataobj), np.eye(4))
    for name, mask in (("turned", turned), ("lost", lost)):
        for i in range(3):
            for f, image in (("images", voxels), ("masks", mask)):
                (tmp_path / name / f).mkdir(parents=True, exist_ok=True)
                nib.save(image, tmp_path / name / f / f"{i}.nii.gz")
    found = find(str(tmp_path / "turned"))
    image, ids = load_case(found.parts["test"][0], found)
    assert np.array_equal(image[..., 0] > 127, ids > 0)
    found = find(str(tmp_path / "lost"))
    with pytest.raises(Refusal, match="lies elsewhere in space"):
        load_case(found.parts["test"][0], found)


def test_the_check_names_every_bad_file(tmp_path, capsys):
    """Two damaged files are both named, the others counted, and the status says so."""
    pictures = folder(tmp_path / "own", n=12)
    names = [(f"{i}.nii.gz",) * 2 for i in range(12)]
    volumes(tmp_path / "scans", "images", "masks", names)
    for root, kind in ((pictures, "picture"), (tmp_path / "scans", "NIfTI volume")):
        for case in find(str(root)).parts["train"][:2]:
            case.image.write_bytes(b"x")
        sheet = tmp_path / f"{kind}.png"
        assert data.main(data.parse(["--data", str(root), "--out", str(sheet)])) == 1
        printed = capsys.readouterr().out
        assert printed.count(f"not a readable {kind}") == 2 and "2 cases cannot be used" in printed
        assert sheet.exists()


def test_a_header_of_nonsense_is_one_line(tmp_path, capfd):
    """NaN in the affine is a Refusal; nibabel's own complaints do not reach the terminal."""
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes())
    for where, kind, value in ((280, "<f", float("nan")), (70, "<h", 999)):
        broken = bytearray(content)
        struct.pack_into(kind, broken, where, value)
        (tmp_path / "v.nii").write_bytes(broken)
        with pytest.raises(Refusal, match="v.nii"):
            read_volume(tmp_path / "v.nii")
    assert capfd.readouterr().err == ""


def test_a_mask_of_fractions_is_refused(tmp_path):
    """Scores are no class ids: 0.7 does not silently become 0."""
    save(tmp_path / "m.tif", np.array([[0, 0.7], [0.2, 1]], np.float32))
    with pytest.raises(Refusal, match="whole numbers"):
        read_mask(tmp_path / "m.tif")


def test_real_data_has_the_papers_counts(real_data):
    """The real CVC-ClinicDB and Kvasir-SEG: counts, alignment, and masks that are masks."""
    for name, counts in (("cvc", [488, 62, 62]), ("kvasir", [800, 100, 100])):
        found = find(name, real_data)
        assert [len(found.parts[p]) for p in PARTS] == counts
        for case in found.parts["test"][:5]:
            image, mask = load_case(case, found)
            assert image.shape[:2] == mask.shape and set(np.unique(mask)) == {0, 1}
