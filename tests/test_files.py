"""Files of every kind: read right, or refused in one line. Images, masks, volumes."""

import contextlib
import gzip
import itertools
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageFilter, PngImagePlugin

from data import find, load_case
from support.cli import UserError
from support.folders import PARTS, Case, DatasetSpec, mask_to_class_ids
from support.images import compare_exif, intensity_window, read_image, read_mask
from support.volumes import (
    PLANES,
    choose_plane,
    compare_grids,
    grid_in_space,
    read_volume,
    slices_of,
    slices_to_uint8,
    volume_of,
)

NOISE = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)


# ---- images ----

MODES = "1.png L.png L.bmp LA.png RGBA.png P.png P.gif CMYK.jpg CMYK.tif F.tif RGB.webp".split()


@pytest.mark.parametrize("name", MODES)
def test_images_of_every_kind_are_read(name, tmp_path):
    """Grey, alpha, palette, CMYK, float: uint8 (H, W, 3), and the range is used."""
    Image.fromarray(NOISE).convert(name.split(".")[0]).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8 and np.ptp(image) > 150


@pytest.mark.parametrize("name, kind, odd, grey", [
    ("x.png", np.uint16, 65535, 255), ("x.tif", np.float32, np.nan, 0),
    ("x.tif", np.float32, np.inf, 255), ("x.tif", np.float32, -np.inf, 0),
])  # fmt: skip
def test_a_mark_does_not_change_the_rest_of_a_deep_image(name, kind, odd, grey, tmp_path):
    """12-bit values fill the grey range, with a burnt-in mark or values that are not finite too."""
    values, images = np.linspace(2000, 4095, 10_000).reshape(100, 100).astype(kind), []
    for value in (values[:, 40:44], odd):
        values[:, 40:44] = value
        Image.fromarray(values).save(tmp_path / name)
        images.append(read_image(tmp_path / name).astype(int))
    clean, marked = images
    assert clean.min() == 0 and clean.max() == 255 and (marked[:, 40:44] == grey).all()
    assert np.abs(clean - marked)[:, 44:].max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_turns_upright_and_one_sided_exif_is_said(mode, tmp_path):
    """Images are turned; where EXIF turns image or mask alone, a remark says so. Pillow 13
    scrambles turned grey TIFFs that it maps into memory, and turns their size.
    """
    image, exif = Image.fromarray(NOISE).convert(mode), Image.Exif()
    exif[0x0112] = 6
    turned = [tmp_path / f"x.{ending}" for ending in ("tif", "png", "jpg")]
    for path in turned:
        image.save(path, exif=exif)
    assert np.array_equal(*map(read_image, turned[:2]))
    exif[0x0112] = 1  # as stored
    image.save(tmp_path / "as stored.png", exif=exif)
    assert read_image(tmp_path / "as stored.png").shape == (20, 30, 3)
    Image.new("L", (20, 30)).save(tmp_path / "drawn upright.png")
    for path in turned:
        assert read_image(path).shape == (30, 20, 3) and compare_exif(path, path) is None
        assert "6 in the image, 1 in its mask" in compare_exif(path, tmp_path / "as stored.png")
        assert compare_exif(path, tmp_path / "drawn upright.png") is None


def test_large_metadata_and_an_unused_alpha_channel_change_nothing(tmp_path):
    """Megabytes of metadata in a PNG; an alpha channel that is zero everywhere is not in use."""
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "a" * 3_000_000, zip=True)
    Image.fromarray(NOISE).save(tmp_path / "text.png", pnginfo=text)
    Image.fromarray(np.dstack([NOISE, NOISE[..., 0] * 0])).save(tmp_path / "alpha.png")
    for name in ("text.png", "alpha.png"):
        assert np.array_equal(read_image(tmp_path / name), NOISE)


def test_tiffs_that_pillow_would_read_wrong(tmp_path):
    """White as 0: deep images are inverted, masks refused. Planes of 16 bits, 8 bits with sign and
    more than 31 bits are refused.
    """
    path, values = tmp_path / "x.tif", np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(values).save(path)
    plain, content = read_image(path), path.read_bytes()
    photometric = struct.pack("<HHIH", 262, 3, 1, 1)
    assert photometric in content
    path.write_bytes(content.replace(photometric, struct.pack("<HHIH", 262, 3, 1, 0)))
    assert np.abs(255 - plain.astype(int) - read_image(path)).max() <= 1
    with pytest.raises(UserError, match="0 is white"):
        read_mask(path)
    Image.fromarray(values).save(path, tiffinfo={284: 2})
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match="one plane for each colour"):
            read(path)
    sample_format = struct.Struct("<HHIH")
    for kind, written, meant in (np.uint8, 1, 2), (np.int32, 2, 1):
        Image.fromarray(values.astype(kind) - kind(9)).save(path, tiffinfo={339: written})
        content, old = path.read_bytes(), sample_format.pack(339, 3, 1, written)
        assert old in content
        path.write_bytes(content.replace(old, sample_format.pack(339, 3, 1, meant)))
        with pytest.raises(UserError, match="8 bits with sign"):
            read_image(path)


def test_the_first_of_several_frames_is_used(tmp_path, capsys):
    """Animated GIF, multi-page TIFF: the first frame, and a line that says so."""
    frames = [Image.fromarray(NOISE[..., 0] // (i + 1)) for i in range(3)]
    for name in ("x.gif", "x.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.abs(read_image(tmp_path / name)[..., 0].astype(int) - NOISE[..., 0]).max() < 2
        assert "3 frames; the first is used" in capsys.readouterr().err


def cut_short(path):
    Image.fromarray(np.tile(NOISE, (20, 20, 1))).save(path)
    path.write_bytes(path.read_bytes()[:3000])


BAD_IMAGES = {  # name: how to make it, the words of the refusal
    "bomb.png": (lambda p: Image.new("1", (20_000, 20_000)).save(p), "limit of 100000000 pixels"),
    "cut.png": (cut_short, "not a readable image"),
    "empty.png": (lambda p: p.touch(), "empty file"),
    "postscript.png": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot identify"),
    "NaN.tif": (lambda p: Image.fromarray(NOISE[..., 0] * np.float32(np.nan)).save(p), "is finite"),
    "missing.png": (lambda p: None, "No such file"),
    "scan.nrrd": (lambda p: p.write_bytes(b"NRRD0004"), "dcm2niix"),
    "IM0001": (lambda p: p.write_bytes(bytes(128) + b"DICM" + bytes(9)), "dcm2niix"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_in_one_line(name, tmp_path):
    """Bombs, damaged and empty files, PostScript, other formats: one line that names the file."""
    make, words = BAD_IMAGES[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=words) as error:
        read_image(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# ---- masks of images ----

Y, X = np.mgrid[:48, :40]
R = [np.hypot(Y - 20 - i, X - 18) for i in range(6)]  # distances from the middle of six discs
DISC = [r < 12 for r in R]  # the foreground of six masks
IDS = [d + ((Y > 30) & (X > 20)).astype(np.uint8) * (2 - d) for d in DISC]  # 0, 1, 2
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # the palette of PASCAL VOC begins so


def grey(i, one=255, two=0):
    """Class ids -> an image: 1 and 2 become these greys, 0 is black."""
    ids = IDS[i] if two else DISC[i].astype(int)
    return Image.fromarray(np.array([0, one, two], np.uint8)[ids])


def coloured(i, colour):
    return Image.fromarray(DISC[i][..., None] * np.array(colour, np.uint8))


def cutout(i, colour, mode="RGBA"):
    """A disc of one colour, the rest transparent and white."""
    image = Image.new("RGBA", DISC[i].shape[::-1], (255, 255, 255, 0))
    image.paste((*colour, 255), mask=Image.fromarray(DISC[i]))
    return image.convert(mode)


def indexed(ids, palette):
    image = Image.frombytes("P", ids.shape[::-1], ids.astype(np.uint8).tobytes())
    image.putpalette(palette)
    return image


def cut_out_by_index(i):
    """Two indices, both white, of which the first is transparent."""
    image = indexed(DISC[i], [255] * 6)
    image.info["transparency"] = 0
    return image


def white_transparent(i):
    """A black disc on white; the colour white stands for transparency."""
    image = grey(i).point(lambda v: 255 - v)
    image.info["transparency"] = 255
    return image


RIGHT = {  # what, ending: how to make mask i, its class ids
    "0 and 255.png": (grey, DISC),
    "0 and 1.png": (lambda i: grey(i, 1), DISC),
    "class ids.png": (lambda i: grey(i, 1, 2), IDS),
    "1 bit.png": (lambda i: Image.fromarray(DISC[i]), DISC),
    "16-bit ids.png": (lambda i: Image.fromarray(IDS[i].astype(np.uint16)), IDS),
    "NaN.tif": (lambda i: Image.fromarray(np.where(DISC[i], np.float32(1), np.nan)), DISC),
    "smooth edges.png": (lambda i: grey(i).filter(ImageFilter.GaussianBlur(0.7)), DISC),
    "0, 1 or 255.png": (lambda i: grey(i, 1 if i == 2 else 255), DISC),
    "grey.jpg": (grey, DISC),
    "0 and 65535.png": (lambda i: Image.fromarray(DISC[i].astype(np.uint16) * 65535), DISC),
    "grey cut out.png": (lambda i: cutout(i, (128, 128, 128)), DISC),
    "white cut out.png": (lambda i: cutout(i, (255, 255, 255), "LA"), DISC),
    "red cut out.png": (lambda i: cutout(i, (255, 0, 0)), DISC),
    "alpha unused.png": (lambda i: Image.merge("LA", (grey(i), grey(i).point(lambda v: 0))), DISC),
    "VOC palette.png": (lambda i: indexed(IDS[i], VOC), IDS),
    "white cut out, indexed.png": (cut_out_by_index, DISC),
    "white first.png": (lambda i: indexed(~DISC[i], [255] * 3 + [0] * 3), DISC),
}


def folder_of_masks(root, ending, make):
    for i, disc in enumerate(DISC):
        for name, image in (("images", Image.fromarray(NOISE[: i + 1]).resize(disc.shape[::-1])),
                            ("masks", make(i))):  # fmt: skip
            (root / name).mkdir(parents=True, exist_ok=True)
            image.save(root / name / f"{i}.{'png' if name == 'images' else ending}")
    return root


def all_ids(root):
    """{case's name: class ids} of a whole folder."""
    spec = find(str(root))
    return {c.name: load_case(c, spec)[1] for part in PARTS for c in spec.splits[part]}


@pytest.mark.parametrize("what", RIGHT)
def test_masks_that_are_read_right(what, tmp_path):
    """Whatever the file: the class ids that were meant, to a few edge pixels for smooth edges."""
    make, truth = RIGHT[what]
    for name, ids in all_ids(folder_of_masks(tmp_path / "own", what.split(".")[-1], make)).items():
        assert (ids != truth[int(name)]).sum() <= (30 if "smooth" in what else 0)


REFUSED = {  # what, ending: how to make mask i, the words of the refusal
    "red.png": (lambda i: coloured(i, (255, 0, 0)), "a mask in colours"),
    "green.jpg": (lambda i: coloured(i, (0, 255, 0)), "a mask in colours"),
    "0 and 1.jpg": (lambda i: grey(i, 1), "black and white, with greys at the edges only"),
    "0, 128 and 255.jpg": (lambda i: grey(i, 128, 255), "black and white, with greys"),
    "VOC and void.png": (lambda i: indexed(np.where(abs(R[i] - 13) < 1, 255, IDS[i]),
                                           VOC + [9] * 756), "0, 1, 2, 255"),
    "ids with a gap.png": (lambda i: grey(i, 1, 3), "no training mask holds class id 2"),
    "void of one pixel.png": (lambda i: Image.fromarray(  # no smooth edge is so even
        np.uint8([255, 128, 0])[np.digitize(R[i], (12, 13))]), "mask values 0, 128, 255"),
    "0.7.tif": (lambda i: Image.fromarray(DISC[i] * np.float32(0.7)), "whole numbers"),
    "red is index 0.png": (lambda i: indexed(~DISC[i], [255, 0, 0] + [0] * 3), "must be black"),
    "black is also index 2.png": (lambda i: indexed(IDS[i], VOC[:6] + [0] * 3), "must be black"),
    "two palettes.png": (lambda i: indexed(IDS[i], VOC if i else VOC[:3] + VOC[6:9] + VOC[3:6]),
                         "use one palette"),
    "black cut out.png": (lambda i: cutout(i, (0, 0, 0)), "a dark shape on transparency"),
    "white is transparent.png": (white_transparent, "a dark shape on transparency"),
    "1 and 2.png": (lambda i: Image.fromarray(DISC[i] + np.uint8(1)), "holds class id 0"),
    "thin lines.png": (lambda i: Image.fromarray(np.uint8(  # two classes, one and two pixels wide
        np.where(Y % 9 == 4, 100, np.where(X % 11 < 2, 200, 0)))), "mask values 0, 100, 200"),
    "all NaN.tif": (lambda i: Image.fromarray(DISC[i] * np.float32(np.nan)), "is finite"),
    "255 among class ids.png": (lambda i: grey(i, 1, 2 if i else 255), "mask values 0, 1, 255"),
    "another size.png": (lambda i: grey(i).resize((48, 48)), "a mask of .48, 48., but"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_masks_that_do_not_say_what_they_mean_are_refused(what, tmp_path):
    """Never silently empty, inverted or merged: one line with the values and the way out."""
    make, words = REFUSED[what]
    root = folder_of_masks(tmp_path / "own", what.split(".")[-1], make)
    with pytest.raises(UserError, match=words) as error:
        all_ids(root)
    assert str(root) in str(error.value) and "\n" not in str(error.value)


def test_each_part_is_compared_with_the_colour_of_the_training_masks(tmp_path):
    """A shape of another colour in a test mask alone: it may be another class."""
    root = folder_of_masks(tmp_path / "own", "png", lambda i: cutout(i, (255, 0, 0)))
    mask = find(str(root)).splits["test"][0].mask
    cutout(int(mask.stem), (0, 255, 0)).save(mask)
    with pytest.raises(UserError, match="use one palette") as error:
        all_ids(root)
    assert str(mask) in str(error.value)


def test_real_masks_pass_as_jpeg(real_data, tmp_path):
    """Real polyp outlines saved as JPEG, at full and at half size, are black and white."""
    path, spec = tmp_path / "mask.jpg", DatasetSpec("binary", {})
    for file in sorted((real_data / "CVC-ClinicDB/masks").iterdir())[::25]:
        for quality, size in ((50, (192, 144)), (75, (384, 288)), (95, (192, 144))):
            mask = Image.open(file).resize(size)
            mask.save(path, quality=quality)
            ids = mask_to_class_ids(read_mask(path), spec, path)
            assert ((ids > 0) != (np.asarray(mask) > 127)).mean() < 0.005


# ---- volumes ----

GRID = np.diag([1.5, 1.5, 4.0, 1.0])  # an affine without rotation
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, 0.2, 0.05) @ np.diag([1, 2, 3]), [1, 2, 3]
)


def save_volume(path, values, affine=GRID):
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def test_the_slices_of_each_plane_are_upright():
    """Columns run to the right or to anterior, rows to posterior or to inferior; and back."""
    values = np.arange(24).reshape(2, 3, 4)  # to the right, anterior, superior
    axial, coronal, sagittal = (slices_of(values, plane) for plane in PLANES)
    for x, y, z in np.ndindex(values.shape):
        same = {axial[z, 2 - y, x], coronal[y, 3 - z, x], sagittal[x, 3 - z, y]}
        assert same == {values[x, y, z]}
    for slices, plane in zip((axial, coronal, sagittal), PLANES):
        assert np.array_equal(volume_of(slices, plane), values)


def test_a_slice_has_itself_or_its_neighbours_as_channels():
    """The slice three times, or those before, at and after it; the ends stand in at the ends."""
    values = np.array([0, 50, 100, 255]).reshape(1, 4, 1).repeat(2, axis=2)
    repeat, neighbours = (slices_to_uint8(values, (0, 255), "coronal", context)
                          for context in ("repeat", "neighbours"))  # fmt: skip
    assert repeat.shape == neighbours.shape == (4, 2, 1, 3)
    assert repeat[:, 1, 0].tolist() == [[v] * 3 for v in (0, 50, 100, 255)]
    expected = [[0, 0, 50], [0, 50, 100], [50, 100, 255], [100, 255, 255]]
    assert neighbours[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("plane, spacings", [
    ("axial", [(1, 1, 5)]), ("coronal", [(1, 5, 1)]), ("sagittal", [(5, 1, 1)]),
    ("axial", [(1.4, 1, 1)]), ("axial", [(5, 5, 1)]),
    ("sagittal", [(5, 1, 1), (5, 1, 1), (1, 1, 9)]),
])  # fmt: skip
def test_slices_are_cut_across_the_widest_spacing(plane, spacings, tmp_path):
    """Across the widest spacing in space, however the files are stored; else axial."""
    paths = []
    for spacing, code in itertools.product(spacings, ("RAS", "IPL", "ASR")):
        volume = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.diag([*spacing, 1]))
        volume = volume.as_reoriented(nib.orientations.axcodes2ornt(code))
        paths.append(tmp_path / f"{len(paths)}.nii.gz")
        nib.save(volume, paths[-1])
    (tmp_path / "bad.nii").write_bytes(b"reported where it is read")
    assert choose_plane([*paths, tmp_path / "bad.nii"]) == plane


def test_a_single_slice_is_cut_as_it_lies(tmp_path):
    """An axis of one voxel is the slicing axis, whatever its spacing."""
    for axis, plane in enumerate(("sagittal", "coronal", "axial")):
        shape = np.insert([20, 6], axis, 1)
        assert choose_plane([save_volume(tmp_path / f"{plane}.nii", np.zeros(shape))]) == plane


def test_the_grey_values_come_from_all_slices():
    """The percentiles of a million voxels anywhere in the volume; where these are equal, as around
    a small vessel, the extremes.
    """
    volume = np.full((1000, 1000, 4), 900, np.float32)
    volume[..., 0] = np.linspace(0, 10, 1000)
    low, high = intensity_window(volume)
    assert low < 1 and high == 900  # every fourth voxel would be of slice 0 and end at 10
    vessel = np.zeros((50, 50, 20), np.float32)
    vessel[:5, :5, :4] = np.linspace(100, 900, 100).reshape(5, 5, 4)
    assert len(np.unique(slices_to_uint8(vessel, None, "axial", "repeat"))) > 50


def test_distances_are_in_millimetres(tmp_path):
    """Headers may give the spacing in metres or in microns."""
    for unit, factor in (("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)):
        volume = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), GRID)
        volume.header.set_xyzt_units(unit)
        nib.save(volume, tmp_path / "v.nii")
        assert grid_in_space(tmp_path / "v.nii")[1] == pytest.approx(factor * GRID.diagonal()[:3])


def test_odd_volumes_are_read(tmp_path):
    """NaN, infinity, a last axis of 1, no affine, a slope, a wrong ending: they are read."""
    values = np.array([1, np.nan, np.inf, -np.inf, 5, 2], np.float32).reshape(1, 2, 3)
    got, _ = read_volume(save_volume(tmp_path / "a.nii", values))
    assert sorted(got.ravel()) == [1, 1, 1, 2, 5, 5]
    got, geometry = read_volume(save_volume(tmp_path / "b.nii", np.zeros((4, 5, 1, 1), np.int16)))
    assert got.shape == (4, 5, 1) and geometry.shape == (4, 5, 1, 1)
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), None)
    image.header.set_slope_inter(2, -5)
    nib.save(image, tmp_path / "c.nii")
    content = (tmp_path / "c.nii").read_bytes()
    (tmp_path / "d.nii").write_bytes(gzip.compress(content))
    (tmp_path / "e.nii.gz").write_bytes(content)
    for name in ("c.nii", "d.nii", "e.nii.gz"):
        assert np.array_equal(np.unique(read_volume(tmp_path / name)[0]), np.arange(120) * 2 - 5)


def test_labels_of_a_volume_are_whole_numbers(tmp_path):
    """NaN is background, a number within 0.001 of a whole one is that; other values are named."""
    values = np.array([np.nan, 0.99999994, 2.0009, 0], np.float32).reshape(1, 2, 2)
    got, _ = read_volume(save_volume(tmp_path / "v.nii", values), labels=True)
    assert got.dtype == np.uint8 and sorted(got.ravel()) == [0, 0, 1, 2]
    for odd in (0.99, 300, np.inf):
        values[0, 0, 0] = odd
        with pytest.raises(UserError, match=f"mask values 0, .*{odd}"):
            read_volume(save_volume(tmp_path / "v.nii", values), labels=True)


def broken_header(path, offset, kind, *values):
    """A small volume with other values at one place of its header."""
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), GRID).to_bytes())
    struct.pack_into(kind, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


BAD_VOLUMES = {  # the words of the refusal: how to make it
    "at most 8 GB": lambda p: broken_header(p, 40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1),
    "affine holds NaN": lambda p: broken_header(p, 280, "<f", float("nan")),
    "not a readable NIfTI volume": lambda p: broken_header(p, 70, "<h", 999),
    "4-D": lambda p: save_volume(p, np.zeros((4, 4, 4, 3), np.int16)),
    "begin inside of it": lambda p: broken_header(p, 108, "<f", 0),
    "give numbers": lambda p: save_volume(p, np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"])),
    "no value is finite": lambda p: save_volume(p, np.full((4, 4, 4), np.nan, np.float32)),
    "empty file": lambda p: p.touch(),
    "Compressed file ended": lambda p: p.write_bytes(
        save_volume(p, np.arange(64, dtype=np.int16).reshape(4, 4, 4)).read_bytes()[:-8]
    ),
}


@pytest.mark.parametrize("words", BAD_VOLUMES)
def test_bad_volumes_are_refused_in_one_line(words, tmp_path, capfd):
    """One line that names the file; nibabel's own complaints do not reach the terminal."""
    BAD_VOLUMES[words](tmp_path / "v.nii.gz")
    for labels in (False, True):
        with pytest.raises(UserError, match=words) as error:
            read_volume(tmp_path / "v.nii.gz", labels)
        assert "v.nii.gz" in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_damaged_gzip_is_noticed(tmp_path):
    """A bit changed anywhere: refused, or the voxels are right all the same."""
    values = np.random.default_rng(0).integers(0, 9, (9, 8, 7)).astype(np.int16)
    path = save_volume(tmp_path / "v.nii.gz", values)
    content, right = path.read_bytes(), read_volume(path)[0]
    for place in range(10, len(content), 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with contextlib.suppress(UserError):
            assert np.array_equal(read_volume(path)[0], right)


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path):
    """Nothing far behind a small volume is decompressed: here a bomb that ends half-way."""
    header = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), GRID).to_bytes()
    bomb = gzip.compress(header + bytes(20_000_000), 1)
    (tmp_path / "v.nii.gz").write_bytes(bomb[: len(bomb) // 2])
    assert read_volume(tmp_path / "v.nii.gz")[0].shape == (4, 4, 4)


@pytest.mark.parametrize("x, spacing, angle, remark", [
    (0.1, 1.5, 0, None), (0.3, 1.5, 0, "origin (0.3, 0, 0) mm, spacing (1.5, 1.5, 4) mm"),
    (0, 2, 0, "spacing (2, 1.5, 4) mm, its image"), (0, 1.5, 0.3, "voxel by voxel"),
])  # fmt: skip
def test_a_mask_in_another_grid_is_said(x, spacing, angle, remark, tmp_path):
    """Origin, spacing or direction that differ by a tenth of a voxel: a remark with both."""
    voxels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    rotation = nib.eulerangles.euler2mat(angle, 0, 0)
    moved = nib.affines.from_matvec(rotation @ np.diag([spacing, 1.5, 4]), [x, 0, 0])
    image, mask = (read_volume(save_volume(tmp_path / "v.nii", voxels, affine))[1]
                   for affine in (GRID, moved))  # fmt: skip
    said = compare_grids(image, mask, "mask.nii")
    assert remark in said if remark else said is None


def test_a_mask_in_another_orientation_is_placed_by_its_affine(tmp_path):
    """Stored in another orientation, it is turned; without the image's affine it is refused."""
    path, affine = tmp_path / "v.nii", OBLIQUE @ np.diag([-1, 1, 1, 1])
    voxels = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 2, affine)
    other = voxels.as_reoriented(nib.orientations.axcodes2ornt("PIR"))
    nib.save(voxels, path), nib.save(other, tmp_path / "other.nii")
    save_volume(tmp_path / "lost.nii", np.asarray(voxels.dataobj), np.eye(4))
    spec = DatasetSpec("volumes", {}, label_format="ids", volumes=True)
    image, ids = load_case(Case("a", path, tmp_path / "other.nii"), spec)
    assert np.array_equal(image[..., 0] > 127, ids > 0)
    with pytest.raises(UserError, match="lost.nii: lies elsewhere in space"):
        load_case(Case("a", path, tmp_path / "lost.nii"), spec)
