"""NIfTI volumes in and out. No file is trusted.

Volumes are arrays (X, Y, Z), turned so that the axes run to the right, anterior and superior (RAS);
writing turns them back. Sizes are checked before memory is taken, and whatever nibabel raises
becomes a UserError that names the file. Letters: X Y Z voxels; Z H W slices, of any plane, and
their pixels.
"""

import contextlib
import gzip
import itertools
import logging
import math
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import inv_ornt_aff, ornt_transform

from support import images
from support.cli import UserError, atomic_write

VOLUME_ENDINGS = (".nii.gz", ".nii")
MAX_BYTES = 8 << 30  # of a volume, decompressed
RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)  # an orientation in nibabel's form
# The axes of space (0 right, 1 anterior, 2 superior) of a plane's slices, rows and columns
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # we print one line; nibabel prints more


def is_volume(path):
    return str(path).lower().endswith(VOLUME_ENDINGS)


class Geometry(NamedTuple):
    """How a volume lies in its file and in space; `write_volume` needs it to place a mask."""

    header: object  # nibabel's
    affine: np.ndarray  # (4, 4), voxel indices of the file to millimetres
    shape: tuple  # as stored
    orientation: np.ndarray  # (3, 2), nibabel's form: from the file's axes to RAS

    @property
    def ras_affine(self):
        """(4, 4): voxel indices of the turned array to millimetres."""
        return self.affine @ inv_ornt_aff(self.orientation, (*self.shape, 1)[:3])


def in_mm(numbers):
    return f"({', '.join(f'{n:.4g}' for n in numbers)}) mm"


def open_file(path):
    """-> the file, decompressed if its first two bytes say gzip, because an ending may be wrong."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    return opener(path, "rb")


def read_header(file):
    """-> nibabel's kind of image, the header, and the bytes that were read."""
    start = file.read(544)
    second = nib.Nifti2Header.may_contain_header(start)
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    return kind, kind.header_class(start[: kind.header_class.template_dtype.itemsize]), start


def open_volume(path):
    """-> nibabel's image, all of its bytes in memory. Raises UserError.

    At most 1 MiB more is decompressed than the header announces.
    """
    with open_file(path) as file:
        kind, header, start = read_header(file)
        shape, itemsize = header.get_data_shape(), header.get_data_dtype().itemsize
        size = int(header.get_data_offset()) + math.prod(map(int, shape)) * itemsize
        if not shape or min(shape) < 1 or not 0 < size <= MAX_BYTES:
            raise UserError(f"{path}: a volume of {shape} voxels; at most 8 GB are read")
        if bytes(header["magic"])[:2] != b"n+":
            raise UserError(f"{path}: half of a pair, .hdr and .img; save it as one .nii")
        if header.get_data_offset() < header.single_vox_offset:
            raise UserError(f"{path}: its header says that the voxels begin inside of it")
        content = start + file.read(max(size - len(start), 0))
        file.read(1 << 20)  # gzip checks the sum at the end of the file
    return kind.from_bytes(content)


def read_volume(path, labels=False):
    """A NIfTI file -> values (X, Y, Z) in RAS orientation, and its Geometry. Raises UserError.

    Intensities are float32: scl_slope is applied, infinities become the nearest finite extreme,
    NaN the lowest value. Labels are uint8: see `whole_numbers`.
    """
    try:
        image = open_volume(path)
        if image.get_data_dtype().kind not in "iufb":
            raise UserError(f"{path}: voxels of type {image.get_data_dtype()}; give numbers")
        if len(image.shape) < 2 or any(n > 1 for n in image.shape[3:]):
            raise UserError(f"{path}: {len(image.shape)}-D, {image.shape}; save the one volume "
                            "that you want")  # fmt: skip
        if not np.isfinite(image.affine).all():
            raise UserError(f"{path}: its affine holds NaN or infinity; repair the header")
        values = np.empty(image.shape, np.float32, order="F")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity
            for i in range(image.shape[-1]):  # in pieces, because scaling takes memory
                values[..., i] = image.dataobj[..., i]
    except UserError:
        raise
    except Exception as error:  # damaged files make nibabel raise many kinds of exceptions
        raise UserError(images.why_unreadable(path, "NIfTI volume", error)) from None
    shape, orientation = image.shape, orientation_of(image.affine)
    geometry = Geometry(image.header, image.affine, shape, orientation)
    del image  # and with it the file's bytes
    values = images.whole_numbers(values, path) if labels else images.finite(values, path)
    return nib.apply_orientation(values.reshape((*shape, 1)[:3]), orientation), geometry


def orientation_of(affine):
    """(3, 2), nibabel's form. An affine that flattens space says nothing: RAS is taken."""
    orientation = nib.io_orientation(affine)
    return RAS if np.isnan(orientation).any() else orientation


def grid_in_space(path):
    """-> numbers of voxels (3,) and millimetres from voxel to voxel (3,), along X, Y, Z in RAS.

    Only the header is read. Raises UserError.
    """
    try:
        with open_file(path) as file:
            header = read_header(file)[1]
        affine, shape = header.get_best_affine(), (*header.get_data_shape(), 1, 1)[:3]
        order = np.argsort(orientation_of(affine)[:, 0])
        unit = {1: 1000, 3: 0.001}.get(int(header["xyzt_units"]) % 8, 1)  # metre, micron; else mm
        return np.take(shape, order), unit * voxel_sizes(affine)[order]
    except Exception as error:  # damaged files make nibabel raise many kinds of exceptions
        raise UserError(images.why_unreadable(path, "NIfTI volume", error)) from None


def choose_plane(paths):
    """The plane in which all volumes of a data set are sliced. Axial, unless another axis of space
    has more than 1.5 times the spacing of each other one (the median over the volumes). An axis of
    a single voxel counts as infinitely wide.
    """
    spacings = []
    for path in paths:
        with contextlib.suppress(UserError):  # raised again where the volume is read
            voxels, spacing = grid_in_space(path)
            spacings.append(np.where(voxels == 1, np.inf, spacing))
    spacing = np.median(spacings or [(1, 1, 1)], axis=0)
    for plane, (axis, *others) in PLANES.items():
        if spacing[axis] > 1.5 * spacing[others].max():
            return plane
    return "axial"


def write_volume(path, values, geometry):
    """(X, Y, Z) in RAS -> a NIfTI file with the shape, affine and spacing of `geometry`'s file.

    The file keeps the dtype of `values`: uint8 for masks, float32 for standard deviations.
    """
    stored = nib.apply_orientation(values, ornt_transform(RAS, geometry.orientation))
    kind = nib.Nifti2Image if isinstance(geometry.header, nib.Nifti2Header) else nib.Nifti1Image
    header = geometry.header.copy()
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    with atomic_write(path) as temporary:
        nib.save(kind(stored.reshape(geometry.shape), geometry.affine, header), temporary)


def compare_grids(image, mask, path):
    """The Geometries of an image and its mask -> None, or what to know where they differ.

    Arrays are compared voxel by voxel in any case. Raises UserError for a mask that is stored in
    another orientation and has no affine that leads to the image's place: it may be mirrored.
    """
    # How far apart the corners of the two grids are, in voxels; an affine may flatten space
    sizes = np.take((*image.shape, 1)[:3], np.argsort(image.orientation[:, 0]))
    corners = np.array([(*c, 1) for c in itertools.product(*((0, n - 1) for n in sizes))]).T
    apart = np.linalg.pinv(image.ras_affine) @ (mask.ras_affine - image.ras_affine) @ corners
    far = np.abs(apart).max()
    if far <= 0.1:
        return None
    places = [f"origin {in_mm(g.ras_affine[:3, 3])}, spacing {in_mm(g.header.get_zooms()[:3])}"
              for g in (mask, image)]  # fmt: skip
    text = f"the mask has {places[0]}, its image {places[1]}, up to {far:.1f} voxels apart"
    if far > 1 and not np.array_equal(image.orientation, mask.orientation):
        raise UserError(f"{path}: lies elsewhere in space and is stored in another orientation: "
                        f"{text}; save both with the same affine")  # fmt: skip
    return f"{text}; they are read voxel by voxel"


def slices_of(volume, plane):
    """(X, Y, Z) in RAS -> the slices of one of PLANES, (Z, H, W).

    Rows run from anterior to posterior, or from superior to inferior.
    """
    return volume.transpose(PLANES[plane])[:, ::-1]


def volume_of(slices, plane):
    """The inverse of `slices_of`."""
    return slices[:, ::-1].transpose(np.argsort(PLANES[plane]))


def slices_to_uint8(volume, window, plane, context):
    """(X, Y, Z) in RAS -> its slices as images, uint8 (Z, H, W, 3), in the memory of one channel.

    The window's (low, high) intensities become 0 and 255. Without a window, as in magnetic
    resonance, the volume's own percentiles are taken: see `intensity_window`. The channels are
    the slice three times (context "repeat"), or the slices before, at and after it
    ("neighbours"), where the first and the last slice stand in for those that are not there.
    """
    window = window or images.intensity_window(volume)
    grey = np.stack([images.window_to_uint8(x, window) for x in slices_of(volume, plane)])
    if context == "neighbours":
        padded = np.pad(grey, ((1, 1), (0, 0), (0, 0)), "edge")
        return np.lib.stride_tricks.sliding_window_view(padded, 3, axis=0)
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))
