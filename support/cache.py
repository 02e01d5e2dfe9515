"""Two caches: decoded items on disk, and latents of masks in memory.

Items are memory-mapped .npy files in ~/.cache/sdseg, or in the folder that SDSEG_CACHE names. Their
names begin with a hash of all that decides what the items look like, so they are never outdated.
Letters: B batch, N items, S pixels of a side, h w latent.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from support.cli import Progress, atomic_write
from support.folders import file_hash
from support.images import resize_image, resize_mask

VERSION = 9  # of the items; raise it when reading or resizing changes


def fingerprint(spec, part, size):
    """A hash of all that decides what a part's items look like, the files' bytes included."""
    facts = [VERSION, spec.name, part, size, spec.classes, spec.label_format, spec.window,
             spec.plane, spec.context]  # fmt: skip
    for case in spec.splits[part]:
        hashes = [file_hash(path) for path in (case.image, case.mask) if path]
        facts.append((case.name, case.seed, hashes))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def load_or_decode(spec, part, size, load_case):
    """-> fingerprint, images uint8 (N, S, S, 3), masks uint8 (N, S, S), their names, and remarks
    on the files. load_case(case, spec, remarks) reads one case.
    """
    key = fingerprint(spec, part, size)
    folder = os.path.expanduser(os.environ.get("SDSEG_CACHE") or "~/.cache/sdseg")
    if folder.startswith("~"):  # this user has no home folder
        return key, *decode(spec, part, size, load_case)
    files = [Path(folder, f"{key}-{kind}") for kind in ("images.npy", "masks.npy", "names.json")]
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):  # not there, or damaged
        images, masks = (np.load(file, mmap_mode="r") for file in files[:2])
        return key, images, masks, *json.loads(files[2].read_text())
    images, masks, names, remarks = decode(spec, part, size, load_case)
    with contextlib.suppress(OSError):  # an unwritable cache costs time, no more
        for file, array in zip(files, (images, masks)):
            with atomic_write(file) as temporary:
                np.save(temporary, array)
        with atomic_write(files[2]) as temporary:
            temporary.write_text(json.dumps([names, remarks]))
    return key, images, masks, names, remarks


def decode(spec, part, size, load_case):
    """Read and resize a part's items, one for an image, one for each slice of a volume."""

    def read(case):
        remarks = []
        image, mask = load_case(case, spec, remarks)
        if not spec.volumes:
            image, mask = image[None], mask[None]
        return [resize_image(x, size) for x in image], [resize_mask(x, size) for x in mask], remarks

    cases, images, masks, names, remarks = spec.splits[part], [], [], [], []
    progress = Progress(len(cases), f"{part} files read")
    with ThreadPoolExecutor(1 if spec.volumes else 4) as pool:  # one volume in memory
        for case, (image, mask, said) in zip(cases, pool.map(read, cases)):
            slices = [f"{case.name}:{i:03d}" for i in range(len(image))]
            names += slices if spec.volumes else [case.name]
            images += image
            masks += mask
            remarks += said
            progress.step()
    return np.stack(images), np.stack(masks), names, remarks


class LatentCache:
    """z_0 of masks: the autoencoder is frozen, so each mask is encoded once in each symmetry.

    Masks with keys are encoded one at a time, in float32, so a latent does not depend on the batch
    in which it came first. The latents stay on the masks' device, 1 GiB at most: 65,000 of 32 x 32.
    """

    def __init__(self, encode):
        self.encode, self.known = encode, {}

    def __call__(self, mask, keys):
        """mask (B, H, W); keys, an int for each mask -> z_0 (B, 4, h, w). With keys None no mask
        comes again, and the batch is encoded as it is, under the caller's autocast.
        """
        if keys is None:
            return self.encode(mask)
        z_0 = [self.known.get(key) for key in keys]
        for i, key in enumerate(keys):
            if z_0[i] is None:
                with torch.autocast(mask.device.type, enabled=False):
                    z_0[i] = self.encode(mask[i : i + 1])
                if len(self.known) * z_0[i].nbytes < 2**30:
                    self.known[key] = z_0[i]
        return torch.cat(z_0)
