"""Segment pictures and volumes: `python infer.py img.png scan.nii.gz folder/`.

A picture gives `<stem>_mask.png` (0 and 255; class ids if there are several classes) and
`<stem>_overlay.png`, at its own size. A NIfTI volume gives `<stem>_mask.nii.gz`, with its shape,
affine and spacing, and a montage of slices. All start from the same noise, so a mask does not
depend on what else is segmented; only the rounding of the scores may, with the batch size.
Several GPUs: `torchrun --nproc_per_node=8 infer.py folder/`.
Letters: B batch, C scores (1, or K for K > 2 classes), H W a picture's own size, S the model's.
"""

from common import Parser, Progress, Refusal, one_line, run


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv=None):
    parser = Parser("Segment pictures and NIfTI volumes; the folder --out receives the results.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="pictures, .nii or .nii.gz volumes, or folders")
    add("--model", metavar="FILE", help="weights (default: weights/nano.safetensors, which ships)")
    add("--out", metavar="DIR", default="outputs", help="where the results go")
    add("--steps", type=positive, default=1, help="network calls a sample: DDIM steps")
    add("--samples", type=positive, default=1, help="samples a picture; their scores are averaged")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch-size", type=positive, default=8, help="pictures or slices at a time")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import colorsys
import datetime
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import files
from sdseg import SDSeg, find_device

READ = (*files.IMAGE_ENDINGS, *files.VOLUME_ENDINGS)
WRITTEN = ("_mask.png", "_overlay.png", "_std.png", "_mask.nii.gz", "_std.nii.gz")
# Hues a golden section apart: however many classes, no two look alike. The background has none.
HUES = [colorsys.hsv_to_rgb((0.33 + 0.618 * i) % 1, 1, 1) for i in range(13)]
PALETTE = (255 * np.array([(0, 0, 0), *HUES])).astype(np.uint8)


# ---- from pictures to class ids; evaluate.py uses this, too ----


@torch.no_grad()
def predict(model, images, steps, samples, seed):
    """Pictures uint8 (H, W, 3) of any sizes -> mean scores (B, C, S, S), deviations (B, 1, S, S).

    The standard deviation over the samples is that of the least certain class. Both float32, on
    the CPU. Raises Refusal for scores that are not finite.
    """
    batch = np.stack([files.resize_image(image, model.config.image_size) for image in images])
    image = torch.from_numpy(batch).to(model.colours.device).permute(0, 3, 1, 2) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed % 2**63)
    mean = spread = 0
    for n, scores in enumerate(model.sample(image, steps, samples, generator), 1):
        change = scores - mean  # Welford's update: one sample in memory at a time
        mean = mean + change / n
        spread = spread + change * (scores - mean)
    if not mean.isfinite().all():
        raise Refusal("the scores are not finite; try --precision fp32, or another --model")
    return mean.cpu(), (spread / samples).amax(1, keepdim=True).sqrt().cpu()


def resize_scores(scores, size):
    """(C, S, S) -> float32 (C, H, W), bilinear; antialiased where the picture is the smaller."""
    return F.interpolate(scores[None], tuple(size), mode="bilinear", antialias=True)[0].numpy()


def segment_images(model, images, steps=1, samples=1, seed=0):
    """Pictures uint8 (H, W, 3) of any sizes -> mean scores, float32 (C, H, W) each, in [0, 1]."""
    means, _ = predict(model, images, steps, samples, seed)
    return [resize_scores(mean, image.shape[:2]) for mean, image in zip(means, images)]


def class_ids(scores):
    """(C, H, W) -> uint8 (H, W): one half is the threshold of two classes, else the largest."""
    ids = scores[0] > 0.5 if len(scores) == 1 else scores.argmax(0)
    return ids.astype(np.uint8)


# ---- pictures for people ----


def overlay(image, ids):
    """The picture uint8 (H, W, 3) with each class's tint and outline, wider in large pictures."""
    width, inside = 1 + max(ids.shape) // 500, ids > 0
    edge = np.zeros_like(inside)
    for axis in (0, 1):
        for shift in (-width, width):
            edge |= np.roll(ids, shift, axis) != ids
    edge &= inside
    result = image.copy()
    result[inside] = image[inside] // 4 * 3 + PALETTE[ids[inside]] // 4
    result[edge] = PALETTE[ids[edge]]
    return result


def grey(values, window):
    """A slice's intensities (H, W) -> uint8 (H, W, 3), as in training."""
    return np.repeat(files.window_to_uint8(values, window)[..., None], 3, axis=2)


def montage(slices, ids, window):
    """(Z, H, W) intensities and class ids -> one picture of at most 16 overlays.

    The slices with foreground are cut into 16 stretches, and of each the fullest is shown.
    """
    size = np.array([np.count_nonzero(i) for i in ids])
    candidates = np.flatnonzero(size) if size.any() else np.arange(len(size))
    stretches = np.array_split(candidates, min(16, len(candidates)))
    shown = [stretch[size[stretch].argmax()] for stretch in stretches]
    tiles = [overlay(grey(slices[z], window), ids[z]) for z in shown]
    columns = int(np.ceil(len(tiles) ** 0.5))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


# ---- files ----


def search(folder):
    """The pictures and volumes in a folder, without hidden ones and what earlier runs wrote."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            wanted = name.lower().endswith(READ) and not name.endswith(WRITTEN)
            if wanted and not name.startswith("."):
                yield Path(where, name)


def plan(paths, out):
    """-> {target: path}, and the Refusals of what cannot be done.

    A target is the path of what will be written, up to "_mask.png". Sub-folders stay as they are.
    """
    found, jobs, refused = [], {}, []
    for path in map(Path, paths):
        top, inside = (path, list(search(path))) if path.is_dir() else (path.parent, [path])
        found += [(p, Path(out, p.relative_to(top).parent, files.stem(p))) for p in inside]
        if not inside:
            refused.append(Refusal(f"{path}: holds nothing to read: {', '.join(READ)}"))
    sources = {path.parent.resolve() for path, _ in found}
    for path, target in found:
        outputs = [f"{target}{ending}" for ending in WRITTEN]
        lost = [o for o in outputs if os.path.lexists(o) and target.parent.resolve() in sources]
        if lost:
            refused.append(Refusal(f"{path}: {lost[0]} is there already, among the inputs, and "
                                   "is not overwritten; choose another --out"))  # fmt: skip
        elif jobs.setdefault(target, path).resolve() != path.resolve():
            refused.append(Refusal(f"{path}: {jobs[target]} has the same name; use another --out"))
    return jobs, refused


def read(path):
    """-> the picture, or the volume and its geometry, or the Refusal that says why not."""
    try:
        return files.read_volume(path) if files.is_volume(path) else files.read_image(path)
    except Refusal as error:
        return error


def write_picture(job, image, mean, deviation, several):
    """Mask, overlay and, of several samples, their deviation -> class ids (H, W)."""
    target, size = job[0], image.shape[:2]
    ids = class_ids(resize_scores(mean, size))
    files.write_image(f"{target}_mask.png", ids * 255 if len(mean) == 1 else ids)
    files.write_image(f"{target}_overlay.png", overlay(image, ids))
    if several:  # scores in [0, 1] deviate by at most one half
        deviation = (resize_scores(deviation, size)[0] * 510).round().clip(0, 255)
        files.write_image(f"{target}_std.png", deviation.astype(np.uint8))
    return ids


def segment_pictures(model, jobs, args, pool):
    """[(target, path)] -> {job: class ids (H, W), or the Refusal to read it}."""
    results = dict(zip(jobs, pool.map(read, [path for _, path in jobs])))
    images = {job: r for job, r in results.items() if not isinstance(r, Refusal)}
    if images:
        scores = predict(model, images.values(), args.steps, args.samples, args.seed)
        several = repeat(args.samples > 1)
        ids = pool.map(write_picture, images, images.values(), *scores, several)
        results.update(zip(images, ids))
    return results


def segment_volume(model, job, args):
    """(target, path) -> {job: class ids (Z, H, W), or the Refusal to read it}."""
    target, loaded = job[0], read(job[1])
    if isinstance(loaded, Refusal):
        return {job: loaded}
    (volume, geometry), window = loaded, model.config.window
    slices = files.slices_of(volume)
    if window is None:  # a model of pictures knows none: most of this volume's intensities
        window = np.percentile(slices.flat[:: max(1, slices.size // 20_000)], [0.5, 99.5])
    several, progress = args.samples > 1, Progress(len(slices), "slices")
    ids = np.empty(slices.shape, np.uint8)
    deviations = np.empty(slices.shape, np.float32) if several else None
    for start in range(0, len(slices), args.batch_size):
        images = [grey(values, window) for values in slices[start : start + args.batch_size]]
        scores = predict(model, images, args.steps, args.samples, args.seed)
        for z, (mean, deviation) in enumerate(zip(*scores), start):
            ids[z] = class_ids(resize_scores(mean, ids.shape[1:]))
            if several:
                deviations[z] = resize_scores(deviation, ids.shape[1:])[0]
        progress.step(len(images))
    files.write_volume(f"{target}_mask.nii.gz", files.volume_of(ids), geometry)
    if several:
        files.write_volume(f"{target}_std.nii.gz", files.volume_of(deviations), geometry)
    files.write_image(f"{target}_overlay.png", montage(slices, ids, window))
    return {job: ids}


def say(text, file=None):
    """One line; on a terminal it takes the place of the moving one."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(one_line(text), file=file, flush=True)


def describe(path, ids, seconds, classes):
    size = " x ".join(map(str, ids.shape[::-1]))
    shares = [np.count_nonzero(ids == i) / ids.size for i in range(1, len(classes))]
    named = ", ".join(f"{name} {share:.2%}" for name, share in zip(classes[1:], shares))
    return f"{path}: {size}, {named}, {seconds:.2f} s"


def main(args):
    # 1. The files and the model. Several processes, as torchrun starts them, share the files
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    path = args.model or Path(__file__).parent / "weights" / "nano.safetensors"
    if not Path(path).exists():
        raise Refusal(f"{path}: no such file; `python train.py --data demo` makes "
                      "runs/demo/model.safetensors")  # fmt: skip
    gpu = f"cuda:{local}" if world > 1 and torch.cuda.is_available() else None
    jobs, refused = plan(args.paths, args.out)
    model = SDSeg.load(path, find_device(args.device or gpu), args.precision)
    if rank == 0 and not model.config.data:
        say(f"{path}: never trained to segment, so the masks mean nothing; train.py trains it",
            sys.stderr)  # fmt: skip
    jobs = sorted(jobs.items(), key=lambda job: files.is_volume(job[1]))[rank::world]
    pictures = [job for job in jobs if not files.is_volume(job[1])]
    batches = [pictures[i : i + args.batch_size] for i in range(0, len(pictures), args.batch_size)]
    batches += [[job] for job in jobs[len(pictures) :]]

    # 2. Segment. Reading and writing pictures takes as long as a small network, so it is shared
    done, failed, progress = 0, 0, Progress(len(jobs), "files")
    ...
