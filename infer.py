"""Segment pictures and volumes: `python infer.py img.png scan.nii.gz folder/`.

A picture gives `<stem>_mask.png` (0 and 255; class ids if there are several classes) and
`<stem>_overlay.png`, at its own size. A NIfTI volume gives `<stem>_mask.nii.gz`, with its shape,
affine and spacing, and a montage of slices. All start from the same noise, so a mask does not
depend on what else is segmented; only the rounding of the scores may, with the batch size.
Several GPUs: `torchrun --nproc_per_node=8 infer.py folder/`.
Letters: B batch, C scores (1, or K for K > 2 classes), H W a picture's own size, S the model's.
"""

from common import (
    CLEAR,
    SHIPPED,
    Parser,
    Progress,
    Refusal,
    one_line,
    out_of_memory,
    positive,
    run,
    torchrun_place,
)


def parse(argv=None):
    parser = Parser("Segment pictures and NIfTI volumes; the folder --out receives the results.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="pictures, .nii or .nii.gz volumes, or folders")
    add("--model", metavar="FILE", help="weights (default: weights/nano.safetensors, which ships)")
    add("--out", metavar="DIR", default="outputs", help="where the results go")

    add = parser.group("sampling")
    add("--steps", type=positive, default=1, help="network calls a sample: DDIM steps")
    add("--samples", type=positive, default=1, help="samples a picture; their scores are averaged")
    add("--seed", type=int, default=0, help="of the noise")

    add = parser.group("machine")
    add("--batch-size", type=positive, default=8, help="pictures or slices at a time")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of the networks; auto: the fastest that keeps the masks")  # fmt: skip
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import files
from sdseg import SDSeg, find_device

READ = (*files.IMAGE_ENDINGS, *files.VOLUME_ENDINGS)
WRITTEN = ("_mask.png", "_overlay.png", "_std.png", "_mask.nii.gz", "_std.nii.gz")
# Each hue lies a golden section from the one before: well spread, however many there are.
HUES = [colorsys.hsv_to_rgb((0.33 + 0.618 * i) % 1, 1, 1) for i in range(13)]
PALETTE = (255 * np.array([(0, 0, 0), *HUES])).astype(np.uint8)


# ---- from pictures to class ids; evaluate.py uses this, too ----


def predict(model, images, steps, samples, seed, spacing="trailing"):
    """Pictures uint8 (H, W, 3) of any sizes -> mean scores (B, C, S, S), deviations (B, 1, S, S).

    The standard deviation over the samples is that of the least certain class. Both float32, on
    the CPU. Raises Refusal for scores that are not finite.
    """
    batch = np.stack([files.resize_image(image, model.config.image_size) for image in images])
    image = torch.from_numpy(batch).to(model.colours.device).permute(0, 3, 1, 2) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed % 2**63)
    mean = spread = 0
    try:
        for n, scores in enumerate(model.sample(image, steps, samples, generator, spacing), 1):
            change = scores - mean  # Welford's update: one sample in memory at a time
            mean = mean + change / n
            spread = spread + change * (scores - mean)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise Refusal(f"out of memory with {len(batch)} pictures; lower --batch-size") from None
    if not mean.isfinite().all():
        raise Refusal("the scores are not finite; try --precision fp32, or another --model")
    return mean.cpu(), (spread / samples).amax(1, keepdim=True).sqrt().cpu()


def resize_scores(scores, size):
    """(C, S, S) -> float32 (C, H, W), bilinear; antialiased where the picture is the smaller."""
    return F.interpolate(scores[None], tuple(size), mode="bilinear", antialias=True)[0].numpy()


def segment_images(model, images, steps=1, samples=1, seed=0, spacing="trailing"):
    """Pictures uint8 (H, W, 3) of any sizes -> mean scores, float32 (C, H, W) each, in [0, 1]."""
    means, _ = predict(model, images, steps, samples, seed, spacing)
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


def montage(images, ids):
    """Slices (Z, H, W, 3) and class ids (Z, H, W) -> one picture of at most 16 overlays.

    The slices with foreground are cut into 16 stretches, and of each the fullest is shown.
    """
    size = np.array([np.count_nonzero(i) for i in ids])
    candidates = np.flatnonzero(size) if size.any() else np.arange(len(size))
    stretches = np.array_split(candidates, min(16, len(candidates)))
    shown = [stretch[size[stretch].argmax()] for stretch in stretches]
    zoom = 1 + 160 // max(ids.shape[1:])  # small slices are shown larger
    tiles = [overlay(*(x[z].repeat(zoom, 0).repeat(zoom, 1) for x in (images, ids))) for z in shown]
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
    """-> jobs [(target, source)]. Raises Refusal for an empty folder, and for what would be lost.

    A target is the path of what will be written, up to "_mask.png". Sub-folders stay as they are.
    """
    jobs = {}
    for path in map(Path, paths):
        top, inside = (path, list(search(path))) if path.is_dir() else (path.parent, [path])
        if not inside:
            raise Refusal(f"{path}: holds no picture and no volume ({', '.join(READ)})")
        for source in inside:
            target = Path(out, source.relative_to(top).parent, files.stem(source))
            first = jobs.setdefault(target, source)
            if os.path.realpath(first) != os.path.realpath(source):
                raise Refusal(f"{source}: its mask would overwrite that of {first}; "
                              "do one of them with another --out")  # fmt: skip
    folders = {os.path.realpath(source.parent) for source in jobs.values()}
    for target in jobs:
        there = [f"{target}{ending}" for ending in WRITTEN if os.path.lexists(f"{target}{ending}")]
        # An input itself, or a mask drawn by hand
        if there and os.path.realpath(target.parent) in folders:
            raise Refusal(f"{there[0]}: lies among the inputs and would be overwritten; "
                          "use another --out")  # fmt: skip
    return list(jobs.items())


def batches(jobs, size):
    """Pictures go through the network together, each volume by itself."""
    volumes = [job for job in jobs if files.is_volume(job[1])]
    pictures = [job for job in jobs if not files.is_volume(job[1])]
    return [pictures[i : i + size] for i in range(0, len(pictures), size)] + [[v] for v in volumes]


def attempt(function, *args):
    """-> what the function returns, or the Refusal that it raises."""
    try:
        return function(*args)
    except Refusal as error:
        return error


def segment(model, images, args):
    """Yield the class ids uint8 (H, W) and deviations float32 (H, W) of pictures of any sizes."""
    scores = predict(model, images, args.steps, args.samples, args.seed)
    for image, mean, deviation in zip(images, *scores):
        size = image.shape[:2]
        yield class_ids(resize_scores(mean, size)), resize_scores(deviation, size)[0]


def write_picture(k, several, job, image, segmented):
    """Mask, overlay and, where there are several samples, their deviation -> class ids (H, W)."""
    target, (ids, deviation) = job[0], segmented
    files.write_image(f"{target}_mask.png", ids * 255 if k == 2 else ids)
    files.write_image(f"{target}_overlay.png", overlay(image, ids))
    if several:  # scores in [0, 1] deviate by at most one half
        files.write_image(f"{target}_std.png", (510 * deviation).round().astype(np.uint8))
    return ids


def segment_pictures(model, jobs, args, pool):
    """Write the files of each picture -> {job: class ids (H, W), or the Refusal to read it}."""
    sources = [source for _, source in jobs]
    results = dict(zip(jobs, pool.map(partial(attempt, files.read_image), sources)))
    images = {job: r for job, r in results.items() if not isinstance(r, Refusal)}
    if images:
        segmented = segment(model, list(images.values()), args)
        write = partial(write_picture, len(model.config.classes), args.samples > 1)
        results.update(zip(images, pool.map(write, images, images.values(), segmented)))
    return results


def segment_volume(model, job, args):
    """Slice by slice, write the files of a volume -> class ids (Z, H, W). Raises Refusal."""
    target, source = job
    volume, geometry = files.read_volume(source)
    images = files.pictures_of(volume, model.config.window)
    ids, deviations = (np.empty(images.shape[:3], dtype) for dtype in (np.uint8, np.float32))
    progress = Progress(len(images), "slices")
    for start in range(0, len(images), args.batch_size):
        batch = images[start : start + args.batch_size]
        for z, (mask, deviation) in enumerate(segment(model, batch, args), start):
            ids[z], deviations[z] = mask, deviation
        progress.step(len(batch))
    files.write_volume(f"{target}_mask.nii.gz", files.volume_of(ids), geometry)
    files.write_image(f"{target}_overlay.png", montage(images, ids))
    if args.samples > 1:
        files.write_volume(f"{target}_std.nii.gz", files.volume_of(deviations), geometry)
    return ids


# ---- the program ----


def say(text, file=None):
    """One line; on a terminal it takes the place of the moving one."""
    if sys.stderr.isatty():
        print(CLEAR, end="", file=sys.stderr, flush=True)
    print(one_line(text), file=file, flush=True)


def report(source, result, classes, seconds):
    """Print the line of one file."""
    if isinstance(result, Refusal):
        return say(f"infer.py: {result}", sys.stderr)
    size = " x ".join(map(str, result.shape[::-1]))
    shares = [np.count_nonzero(result == i) / result.size for i in range(1, len(classes))]
    named = ", ".join(f"{name} {share:.2%}" for name, share in zip(classes[1:], shares))
    say(f"{source}: {size}, {named}, {seconds:.2f} s")


def load(args, gpu):
    """The model, on --device or else, where torchrun started several processes, on GPU `gpu`."""
    path = args.model or SHIPPED
    if not Path(path).exists():
        raise Refusal(f"{path}: no such file; `python train.py --data demo` makes one, "
                      "runs/demo/model.safetensors")  # fmt: skip
    several = "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    device = find_device(args.device or (f"cuda:{gpu}" if several else None))
    return SDSeg.load(path, device, args.precision)


def main(args):
    # 1. The files and the model; torchrun's processes share the files
    rank, world, local = torchrun_place()
    jobs = plan(args.paths, args.out)[rank::world]
    model = load(args, local)

    # 2. Segment
    failed, progress = 0, Progress(len(jobs), "files")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PNG takes as long as a small network
        for batch in batches(jobs, args.batch_size):
            began = time.monotonic()
            if files.is_volume(batch[0][1]):
                results = {batch[0]: attempt(segment_volume, model, batch[0], args)}
            else:
                results = segment_pictures(model, batch, args, pool)
            seconds = (time.monotonic() - began) / len(batch)
            for (_, source), result in results.items():
                report(source, result, model.config.classes, seconds)
                failed += isinstance(result, Refusal)
            progress.step(len(batch))

    # 3. Say what came of it
    done = len(jobs) - failed
    if done:
        say(f"{done} of {len(jobs)} files segmented; the results are in {args.out}")
    if done and rank == 0 and not model.config.data:
        say("infer.py: these weights were never trained to segment, so the masks mean nothing; "
            "train.py trains them", sys.stderr)  # fmt: skip
    if dist.is_torchelastic_launched():  # it ends all when one exits with an error: leave together
        dist.init_process_group("gloo", timeout=datetime.timedelta(weeks=4))
        dist.barrier()
    return (1 if done else 2) if failed else 0


if __name__ == "__main__":
    run(lambda: main(ARGS))
