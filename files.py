"""Pictures and volumes in and out, trusting nothing that a file says of itself.

Pictures are uint8 (H, W, 3), masks uint8 (H, W). Volumes are float32 (X, Y, Z), turned so that
the axes run to the right, anterior and superior (RAS); writing turns them back. Sizes are checked
before memory is taken, and whatever a decoder raises becomes a Refusal that names the file.
"""

import gzip
import logging
import math
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from common import Refusal, one_line, whole_file

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")  # no others, whatever a file contains
VOLUME_ENDINGS = (".nii.gz", ".nii")
MAX_PIXELS = 100_000_000  # of a picture: 10,000 x 10,000
MAX_BYTES = 8 << 30  # of a volume, decompressed
logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # a refusal is one line, ours
Image.MAX_IMAGE_PIXELS = None  # the limit above is checked first, and says what to do


def is_volume(path):
    return str(path).lower().endswith(VOLUME_ENDINGS)


def stem(path):
    """The file's name without its ending: scan.nii.gz -> scan."""
    name = Path(path).name
    ending = next((e for e in VOLUME_ENDINGS if name.lower().endswith(e)), Path(name).suffix)
    return name[: len(name) - len(ending)]


def open_image(path):
    """A decoded PIL image, its first frame, upright. Raises Refusal."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Refusal(f"{path}: {width} x {height} pixels; at most 100 million are read")
            if getattr(image, "n_frames", 1) > 1:
                print(f"{path}: {image.n_frames} frames; the first is used", file=sys.stderr)
                image.seek(0)
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
            return upright
    except (Refusal, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Refusal(one_line(error) if isinstance(error, Refusal) else
                      f"{path}: {error.strerror}") from None  # fmt: skip
    except Exception as error:  # a damaged file leads Pillow into many kinds
        raise Refusal(f"{path}: not a readable picture ({one_line(error)[:120]})") from None


def finite(values):
    """NaN and infinities become the nearest finite extreme, NaN the lowest."""
    good = np.isfinite(values)
    if good.all():
        return values
    low, high = (values[good].min(), values[good].max()) if good.any() else (0, 0)
    return np.nan_to_num(values, nan=low, neginf=low, posinf=high)


def read_image(path):
    """Any picture -> uint8 (H, W, 3). Raises Refusal.

    Grey of more than 8 bits is scaled by the picture's own range, of deep colours Pillow keeps the
    upper 8 bits; transparency is laid on black.
    """
    image = open_image(path)
    if image.mode.startswith(("I", "F")):
        values = finite(np.asarray(image, dtype=np.float32))
        low, high = values.min(), values.max()
        grey = (values - low) / max(high - low, 1e-9) * 255
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def read_mask(path):
    """A picture of class ids or of black and white -> its values, uint8 (H, W). Raises Refusal.

    Where an alpha channel cuts out a shape, what it clears is background, 0.
    """
    image = open_image(path)
    if image.mode == "P":  # its indices are class ids, unless its palette is black and white
        palette = set(zip(*[iter(image.getpalette("RGB"))] * 3))
        # and no two indices look alike, as those would that lie outside of it
        plain = len(image.convert("RGB").getcolors(256)) == len(image.getcolors())
        if plain and any(palette == {(0, 0, 0), (white,) * 3} for white in (1, 255)):
            image = image.convert("L")
    if image.mode == "1":
        image = image.convert("L")
    alpha = np.asarray(image.getchannel("A")) if "A" in image.mode else None
    if image.mode in ("RGBA", "LA", "PA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if alpha is not None and alpha.any():  # else it is unused
        values = values * (alpha > 127)[..., None]
    if values.ndim == 3:
        if image.format != "JPEG" and (values != values[..., :1]).any():
            raise Refusal(f"{path}: a mask in colours; store class ids as grey values 0, 1, 2, ..")
        values = values[..., 0]
    if not (values.min() >= 0 and values.max() <= 255) or (values % 1).any():
        raise Refusal(f"{path}: mask values {values.min()} to {values.max()}; class ids are whole "
                      "numbers from 0 to 255")  # fmt: skip
    return values.astype(np.uint8)


def write_image(path, array):
    """uint8 (H, W) or (H, W, 3) -> a PNG, whole or not at all."""
    with whole_file(path) as temporary:
        Image.fromarray(array).save(temporary, format="png")


class Geometry(NamedTuple):
    """How a volume lies in its file and in space; what `write_volume` needs to put a mask there."""

    header: object  # nibabel's
    affine: np.ndarray  # (4, 4), voxel indices to millimetres
    shape: tuple  # as stored
    turns: np.ndarray  # the orientation change from file to RAS

    @property
    def spacing(self):
        return tuple(float(s) for s in self.header.get_zooms()[:3])


def nifti_bytes(path):
    """-> nibabel's image class, and as many bytes as the header announces. Raises Refusal."""
    from nibabel import Nifti1Image, Nifti2Image

    opener = gzip.open if str(path).lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(544)
        second = start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
        kind = Nifti2Image if second else Nifti1Image
        header = kind.header_class(start[: kind.header_class.template_dtype.itemsize])
        shape, itemsize = header.get_data_shape(), header.get_data_dtype().itemsize
        size = int(header.get_data_offset()) + math.prod(map(int, shape)) * itemsize
        if not shape or min(shape) < 1 or not 0 < size <= MAX_BYTES:
            raise Refusal(f"{path}: a volume of {shape} voxels; at most 8 GB are read")
        if bytes(header["magic"])[:2] != b"n+":
            raise Refusal(f"{path}: half of a pair, .hdr and .img; save it as one .nii")
        content = start + file.read(max(size - len(start), 0))
        file.read(1 << 20)  # to the end, where gzip finds out whether what it read was right
    if len(content) < size:
        raise Refusal(f"{path}: truncated, {len(content)} of {size} bytes; copy it again")
    return kind, content


def read_volume(path):
    """A NIfTI file -> float32 (X, Y, Z) in RAS orientation, and its Geometry. Raises Refusal.

    scl_slope is applied; NaN and infinities become the nearest finite extreme. A volume without
    an affine is taken as it lies.
    """
    import nibabel as nib

    try:
        kind, content = nifti_bytes(path)
        image = kind.from_bytes(content)
        if image.get_data_dtype().kind not in "iufb":
            raise Refusal(f"{path}: voxels of type {image.get_data_dtype()}; give numbers")
        shape = image.shape
        if len(shape) < 2 or any(n > 1 for n in shape[3:]):
            raise Refusal(f"{path}: {len(shape)}-D, {shape}; save the one volume that you want")
        if not np.isfinite(image.affine).all():
            raise Refusal(f"{path}: its affine holds NaN or infinity; repair the header")
        with np.errstate(over="ignore"):  # beyond float32 is infinity
            values = np.asarray(image.dataobj, dtype=np.float32).reshape((shape + (1,))[:3])
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Refusal(f"{path}: {error.strerror}") from None
    except Refusal:
        raise
    except (Exception, zlib.error) as error:  # a damaged file leads nibabel into many kinds
        raise Refusal(f"{path}: not a readable NIfTI volume ({one_line(error)[:120]})") from None
    turns = nib.io_orientation(image.affine)
    if np.isnan(turns).any():  # an affine that flattens space says nothing of orientation
        turns = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
    values = nib.apply_orientation(finite(values), turns)
    return values, Geometry(image.header, image.affine, shape, turns)


def write_volume(path, values, geometry):
    """(X, Y, Z) in RAS -> a NIfTI file with the shape, affine and spacing of `geometry`'s file.

    The file keeps the dtype of `values`: uint8 for masks, float32 for scores.
    """
    import nibabel as nib

    ras = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
    back = nib.apply_orientation(values, nib.orientations.ornt_transform(ras, geometry.turns))
    kind = nib.Nifti2Image if isinstance(geometry.header, nib.Nifti2Header) else nib.Nifti1Image
    header = geometry.header.copy()
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    image = kind(back.reshape(geometry.shape), geometry.affine, header)
    with whole_file(path) as temporary:
        nib.save(image, temporary)


def slices_of(volume):
    """(X, Y, Z) in RAS -> axial slices (Z, H, W), rows from anterior to posterior."""
    return volume.transpose(2, 1, 0)[:, ::-1]


def volume_of(slices):
    """The inverse of `slices_of`."""
    return slices[:, ::-1].transpose(2, 1, 0)


def pictures_of(volume, window=None):
    """(X, Y, Z) in RAS -> its axial slices as grey pictures, uint8 (Z, H, W, 3).

    The window's (low, high) intensities become 0 and 255, what lies outside is cut. Without a
    window, as in magnetic resonance, they are the volume's own 0.5 and 99.5 percentiles.
    """
    if window is None:
        sample = volume.ravel()[:: max(1, volume.size // 1_000_000)]
        window = np.percentile(sample, [0.5, 99.5]).tolist()
    low, high = window
    scale = 255 / max(high - low, 1e-9)
    grey = [((x - low) * scale).round().clip(0, 255).astype(np.uint8) for x in slices_of(volume)]
    grey = np.stack(grey)[..., None]
    return np.broadcast_to(grey, (*grey.shape[:3], 3))


def resize_image(image, size):
    """uint8 (H, W, 3) -> (size, size, 3), antialiased; the aspect ratio is not kept."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_mask(ids, size):
    """uint8 (H, W) class ids -> (size, size): the class that covers most of each new pixel."""
    classes = np.unique(ids)
    masks = (Image.fromarray((ids == c) * np.uint8(255)) for c in classes)
    shares = [np.asarray(m.resize((size, size), Image.Resampling.BOX)) for m in masks]
    return classes[np.argmax(shares, axis=0)].astype(np.uint8)
