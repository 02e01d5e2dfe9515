"""Where the results of infer.py go, and how they are written.

A result never replaces an input, nor a file beside an input: `x_mask.png` in the folder of `x.png`
may be a mask that somebody drew. Letters: H W pixels, Z slices.
"""

import os
from pathlib import Path

import numpy as np

from support.cli import UserError
from support.folders import file_stem, find_inputs
from support.images import write_image
from support.panels import montage, overlay
from support.volumes import volume_of, write_volume

RESULT_ENDINGS = ("_mask.png", "_overlay.png", "_std.png", "_mask.nii.gz", "_std.nii.gz")


def plan_outputs(paths, out):
    """Files and folders -> [(source, target)]; a target lacks one of RESULT_ENDINGS.

    Sub-folders are kept; a source that is given twice appears once. Raises UserError where a result
    would overwrite another result, or a file in a folder of inputs.
    """
    sources = {}
    for source, folder in find_inputs(paths, skip=RESULT_ENDINGS):
        target = Path(out, folder, file_stem(source))
        first = sources.setdefault(target, source)
        if os.path.realpath(first) != os.path.realpath(source):
            raise UserError(
                f"{source}: its results would overwrite those of {first}; "
                "segment one of them with another --out"
            )
    input_folders = {os.path.realpath(source.parent) for source in sources.values()}
    for target in sources:
        for path in (f"{target}{ending}" for ending in RESULT_ENDINGS):
            if os.path.lexists(path) and os.path.realpath(target.parent) in input_folders:
                raise UserError(
                    f"{path}: lies among the inputs and would be overwritten; use another --out"
                )
    return [(source, target) for target, source in sources.items()]


def write_results(target, slices, ids, std, geometry, plane, k):
    """Write the mask, an overlay and, unless it is None, the standard deviation of one file.

    slices uint8 (Z, H, W, 3); ids uint8 (Z, H, W) of k classes; std float32 (Z, H, W) in [0, 0.5];
    geometry: the Geometry of a volume, sliced in `plane`, or None for an image (Z = 1).
    """
    if geometry is None:
        write_image(f"{target}_mask.png", ids[0] * 255 if k == 2 else ids[0])
        write_image(f"{target}_overlay.png", overlay(slices[0], ids[0]))
        if std is not None:
            write_image(f"{target}_std.png", (510 * std[0]).round().astype(np.uint8))
    else:
        grey = np.broadcast_to(slices[..., 1:2], slices.shape)  # without the neighbours
        write_volume(f"{target}_mask.nii.gz", volume_of(ids, plane), geometry)
        write_image(f"{target}_overlay.png", montage(grey, ids))
        if std is not None:
            write_volume(f"{target}_std.nii.gz", volume_of(std, plane), geometry)
