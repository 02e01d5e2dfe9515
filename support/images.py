"""Images and masks of images: reading, resizing, writing. No file is trusted.

Images are uint8 (H, W, 3). A mask file is decoded to one uint8 value per pixel; `folders.py`
decides what the values mean. Whatever a decoder raises becomes a UserError that names the file.
"""

import contextlib
import os
import sys
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFilter, ImageOps, PngImagePlugin

from support.cli import UserError, atomic_write, one_line

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")  # nothing else is opened under any name
LOSSLESS = ("PNG", "BMP", "TIFF", "GIF")
OTHER_VOLUMES = (".dcm", ".ima", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img")
SAVE_GREY = "save it as PNG with a grey value for each class: 0, 1, 2 and so on"
WIDTH, HEIGHT, BITS, PHOTOMETRIC = 256, 257, 258, 262  # tags of TIFF
PLANAR, SAMPLE_FORMAT = 284, 339
CONVERT = "volumes are read as NIfTI; convert it, for example with dcm2niix"
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow warns above, and refuses above twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # the metadata of some programs are larger than its 1 MB
warnings.filterwarnings("ignore", module="PIL")  # they name a line of Pillow's, not the file


def is_other_volume(path):
    """Whether a file is a volume of another kind than NIfTI. DICOM often has no ending."""
    if str(path).lower().endswith(OTHER_VOLUMES):
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def why_unreadable(path, kind, error):
    """What to tell the user about an exception that reading `path` has raised."""
    if isinstance(error, OSError) and error.errno:
        return f"{path}: {error.strerror}"
    if os.path.getsize(path) == 0:
        return f"{path}: empty file"
    if is_other_volume(path):
        return f"{path}: {CONVERT}"
    if isinstance(error, Image.DecompressionBombError):
        kind = f"{kind}; 100 million pixels at most"
    elif str(path).lower().endswith((".tif", ".tiff")):
        kind = f"{kind}; a TIFF needs 8 or 16 bits without sign, or float32"
    return f"{path}: not a readable {kind} ({one_line(error)[:120]})"


def open_image(path):
    """A decoded PIL image: the first frame, upright. Raises UserError.

    Its `deep_colours` says whether colours have 16 bits, of which Pillow keeps the upper 8, and its
    `white_is_zero` whether a TIFF says so: Pillow then inverts 1 and 8 bits, and not more.
    """
    try:
        # As a file: Pillow maps a path into memory, and a turned TIFF then comes out wrong
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1:
                print(f"{path}: {image.n_frames} frames; the first is used", file=sys.stderr)
            deep_colours = image.mode.startswith("RGB") and ";16" in str(image.tile)
            tags = getattr(image, "tag_v2", {})  # of a TIFF
            white_is_zero = tags.get(PHOTOMETRIC) == 0
            deep = max(tags.get(BITS, (8,))) > 8
            if tags.get(PLANAR) == 2 and deep and not deep_colours:  # Pillow reads noise
                raise UserError(f"{path}: a TIFF with one plane for each colour, of more than 8 "
                                "bits; save it as PNG")  # fmt: skip
            image.load()
            signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
            wraps = not deep if signed else image.mode == "I" and image.getextrema()[0] < 0
            if tags and wraps:  # Pillow takes -1 for 255, and 2**31 for -2**31
                raise UserError(f"{path}: a TIFF of 8 bits with sign, or with values of more than "
                                "31 bits; save it as PNG")  # fmt: skip
            if not image.mode.startswith(("I", "F")):
                Image.new(image.mode, (1, 1)).convert("RGB")  # raises where Pillow cannot, as LAB
            upright = ImageOps.exif_transpose(image)
            upright.format, upright.deep_colours = image.format, deep_colours
            upright.white_is_zero = white_is_zero
            return upright
    except UserError:
        raise
    except Exception as error:  # damaged files make Pillow raise many kinds of exceptions
        raise UserError(why_unreadable(path, "image", error)) from None


def exif_orientation(path):
    """-> 1 to 8, and the size as stored. Other numbers count as 1: not turned."""
    with Image.open(path, formats=FORMATS) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        tags = getattr(image, "tag_v2", None)  # the `size` of a TIFF is turned already
        size = (tags[WIDTH], tags[HEIGHT]) if tags else image.size
        return orientation if orientation in range(1, 9) else 1, size


def compare_exif(image, mask):
    """An image and its mask -> None, or what to know where EXIF turns them differently."""
    (a, size), (b, mask_size) = exif_orientation(image), exif_orientation(mask)
    drawn_upright = a > 4 and b == 1 and mask_size == size[::-1] != size
    if a == b or drawn_upright:
        return None
    return (f"EXIF orientation {a} in the image, {b} in its mask: they are turned differently; "
            "save both again without it")  # fmt: skip


# ---- images ----


def finite(values, path):
    """Infinities become the nearest finite extreme, NaN the lowest value. Raises UserError."""
    good = np.isfinite(values)
    if good.all():
        return values
    if not good.any():
        raise UserError(f"{path}: no value is finite")
    low, high = values.min(where=good, initial=np.inf), values.max(where=good, initial=-np.inf)
    return np.nan_to_num(values, nan=low, neginf=low, posinf=high)


def intensity_window(values):
    """(low, high): the 0.5 and 99.5 percentiles, so that a few extreme values decide nothing.

    Where they are equal, as in a volume that is empty but for a vessel: the extremes.
    """
    if values.size > 1_000_000:  # a million of them, anywhere
        rng = np.random.default_rng(0)
        sample = values[tuple(rng.integers(n, size=1_000_000) for n in values.shape)]
    else:
        sample = values
    low, high = np.percentile(sample, [0.5, 99.5]).tolist()
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def window_to_uint8(values, window):
    """Intensities -> uint8: low becomes 0, high 255, what lies outside is cut."""
    low, high = window
    scale = 255 / ((high - low) or 1)
    return ((values - low) * scale).round().clip(0, 255).astype(np.uint8)


def read_image(path):
    """Any image -> uint8 (H, W, 3). Raises UserError.

    Grey of more than 8 bits goes through its `intensity_window`. Transparent pixels are laid on
    black.
    """
    image = open_image(path)
    if image.deep_colours:
        print(f"{path}: colours of 16 bits; the upper 8 are used", file=sys.stderr)
    if image.mode.startswith(("I", "F")):
        values = finite(np.asarray(image, dtype=np.float32), path)
        values = -values if image.white_is_zero else values
        # A burnt-in mark has one extreme value and often covers more than 0.5 %
        inner = values[(values > values.min()) & (values < values.max())]
        window = intensity_window(inner if inner.size and np.ptp(inner) else values)
        return np.repeat(window_to_uint8(values, window)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not image.getchannel("A").getbbox():  # the alpha channel is not in use
            image.putalpha(255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


# ---- masks ----


class Mask(NamedTuple):
    """A mask file, decoded."""

    values: np.ndarray  # uint8, (H, W) of an image, (X, Y, Z) of a volume
    palette: dict  # value -> colour: of a coloured palette, or of a shape cut out of transparency
    lossy: bool  # JPEG or WebP, which change values


def format_values(values):
    """The different values in words, at most 16 of them."""
    different = np.unique(values)
    return ", ".join(f"{v:g}" for v in different[:16]) + (", .." if len(different) > 16 else "")


def whole_numbers(values, path):
    """Label values -> uint8. NaN is background, 0.9999 is 1. Raises UserError for other values."""
    if not np.isfinite(values).any():
        raise UserError(f"{path}: no value is finite")
    values = np.where(np.isnan(values), 0, values)
    whole = np.rint(values).clip(0, 255)
    if np.abs(values - whole).max() > 1e-3:
        raise UserError(f"{path}: mask values {format_values(values)}; class ids are whole numbers "
                        "from 0 to 255")  # fmt: skip
    return whole.astype(np.uint8)


def read_mask(path):
    """An image of class ids, or in black and white -> Mask. Raises UserError.

    A palette that holds a colour gives class ids: its indices. Where an alpha channel cuts out a
    shape of a single colour, the shape is 255; otherwise what is transparent is 0.
    """
    image = open_image(path)
    lossy = image.format not in LOSSLESS or image.info.get("compression") in ("jpeg", "webp")
    if image.deep_colours:
        raise UserError(f"{path}: a mask in colours of 16 bits; {SAVE_GREY}")
    if image.white_is_zero:
        raise UserError(f"{path}: a TIFF in which 0 is white: it may be meant the other way round; "
                        f"{SAVE_GREY}")  # fmt: skip
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        white = values.max() == 65535 and set(np.unique(values)) <= {0, 65535}
        return Mask(whole_numbers(values // 257 if white else values, path), {}, lossy)
    if image.mode == "P" and "transparency" in image.info:
        if len(image.convert("RGB").getcolors()) < len(image.getcolors()):
            image = image.convert("RGBA")  # only transparency tells these indices apart
    palette = palette_colours(image, path) if image.mode == "P" else {}
    if palette:
        return Mask(np.asarray(image), palette, lossy)
    # A colour that stands for transparency; black changes nothing
    if image.mode == "P" or image.info.get("transparency", 0) not in (0, (0, 0, 0)):
        image = image.convert("RGBA")
    rgb = np.asarray(image.convert("RGB"))
    alpha = np.asarray(image.getchannel("A")) if image.mode in ("RGBA", "LA", "PA") else None
    if alpha is None or alpha.min() == alpha.max() > 0:
        return Mask(grey_values(rgb, lossy, path), {}, lossy)
    values = cut_out(rgb, alpha, lossy, path)
    shape = rgb[values == 255]
    if lossy or not len(shape):
        return Mask(values, {}, lossy)
    # The shapes of two classes differ by their colours: `folders.check_palette` compares them
    return Mask(values, {255: tuple(np.median(shape, axis=0).astype(int).tolist())}, lossy)


def cut_out(rgb, alpha, lossy, path):
    """A mask with transparent pixels -> uint8 (H, W). Raises UserError where it is not plain."""
    visible = alpha > alpha.max() / 2
    colours = rgb[visible] if visible.any() else rgb.reshape(-1, 3)
    single = np.ptp(colours.astype(np.int16), axis=0).max() <= 8
    if not visible.any():  # nothing is cut out; or the alpha channel is not in use
        return np.zeros_like(alpha) if single else grey_values(rgb, lossy, path)
    if colours.max() <= 127:
        raise UserError(f"{path}: a dark shape on transparency, which may be the mask or its "
                        f"background; {SAVE_GREY}")  # fmt: skip
    if single:
        return visible * np.uint8(255)
    return visible * grey_values(np.where(visible[..., None], rgb, 0), lossy, path)


def grey_values(rgb, lossy, path):
    """uint8 (H, W, 3) -> (H, W). JPEG rounds grey to colours that are up to 8 apart.

    Raises UserError for colours.
    """
    apart = np.ptp(rgb.astype(np.int16), axis=-1).max()
    if apart > (8 if lossy else 0):
        raise UserError(f"{path}: a mask in colours; {SAVE_GREY}")
    return rgb[..., 0]


def palette_colours(image, path):
    """{index: (r, g, b)} of the indices in use; {} if the palette is grey. Raises UserError."""
    numbers = image.getpalette("RGB")
    colours = dict(enumerate(zip(numbers[::3], numbers[1::3], numbers[2::3])))
    indices = {index for _, index in image.getcolors()}
    if indices <= colours.keys() and all(r == g == b for r, g, b in colours.values()):
        return {}
    used = {i: colours.get(i, (0, 0, 0)) for i in sorted(indices | {0})}
    if used[0] != (0, 0, 0) or len(set(used.values())) < len(used):
        raise UserError(f"{path}: a palette that does not number the classes: index 0 must be "
                        "black, and each other class needs its own colour; or save the mask as "
                        "PNG with the grey values 0, 1, 2 and so on")  # fmt: skip
    return used


def has_flat_grey(values):
    """Whether 3 x 3 pixels somewhere are about the same grey, neither near black nor near white.

    A third class has such places. Smooth edges are steeper, and what JPEG adds to black and white
    is darker or lighter: on real masks of all JPEG qualities from 50 up this never fires.
    """
    rows = Image.fromarray(values.reshape(-1, values.shape[-1]))  # a volume: slice below slice
    filters = ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3)
    low, high = (np.asarray(rows.filter(f)).astype(np.int16) for f in filters)
    return bool(((low >= 14) & (high <= 241) & (high - low <= 24)).any())


# ---- sizes and files ----


def resize_image(image, size):
    """uint8 (H, W, 3) -> (size, size, 3), antialiased; the aspect ratio is not kept."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_mask(ids, size):
    """uint8 (H, W) class ids -> (size, size): the class that covers most of each new pixel."""
    classes = np.unique(ids)
    masks = (Image.fromarray((ids == c) * np.uint8(255)) for c in classes)
    shares = [np.asarray(m.resize((size, size), Image.Resampling.BOX)) for m in masks]
    return classes[np.argmax(shares, axis=0)].astype(np.uint8)


def write_image(path, array):
    """uint8 (H, W) or (H, W, 3) -> a PNG. The ending of `path` does not matter."""
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="png")
