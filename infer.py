"""Segment files: `python infer.py img.png`, folders, NIfTI volumes.

Writes NAME_mask.png (0 and 255, or class ids) and NAME_overlay.png at the picture's own size; for
a volume NAME_mask.nii.gz, which lies in space as its input does, and a montage of slices. Every
picture starts from the same noise, so its mask depends on the seed and not on its neighbours.
Several GPUs: `torchrun --nproc_per_node=8 infer.py folder/`, the files are shared out by rank.
"""

import os
from pathlib import Path

from common import Parser, Progress, Refusal, duration, one_line, run

NANO = Path(__file__).parent / "weights" / "nano.safetensors"


def parse(argv=None):
    parser = Parser("Segment pictures and NIfTI volumes, files or whole folders.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="pictures, .nii.gz volumes, or folders of them")
    add("--model", default=str(NANO), metavar="FILE", help="weights that train.py wrote")
    add("--out", default="outputs", metavar="DIR", help="where the masks go")
    add("--steps", type=int, default=1, help="network calls a sample: DDIM steps")
    add("--samples", type=int, default=1, help="average this many, and write their deviation")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch-size", type=int, default=8, help="pictures or slices at once")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    for name in ("steps", "samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from files import (
    IMAGE_ENDINGS,
    VOLUME_ENDINGS,
    is_volume,
    read_image,
    read_volume,
    resize_image,
    slices_of,
    stem,
    volume_of,
    window_to_uint8,
    write_image,
    write_volume,
)
from sdseg import SDSeg, class_colours, find_device

OURS = ("_mask", "_overlay", "_std")  # endings of earlier outputs, no inputs of ours
MANY_PIXELS = 50_000_000  # in one batch, whatever its number of pictures

# ---- pictures through the network ----


def sample_images(model, images, steps=1, samples=1, seed=0):
    """Yield for each picture, uint8 (H, W, 3), its mean scores and their standard deviation.

    Both (1, H, W), or (K, H, W) for K > 2 classes, float32, at the picture's own size.
    """
    x = torch.from_numpy(np.stack([resize_image(i, model.config.image_size) for i in images]))
    x = x.permute(0, 3, 1, 2).to(model.colours.device).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    runs = torch.stack(list(model.sample(x, steps, samples, generator)))
    for image, mean, std in zip(images, runs.mean(0), runs.std(0, correction=0)):
        yield tuple(
            F.interpolate(s[None], image.shape[:2], mode="bilinear")[0].cpu().numpy()
            for s in (mean, std)
        )


def segment_images(model, images, steps=1, samples=1, seed=0):
    """[uint8 (H, W, 3)] -> [mean scores float32 (1, H, W)], or (K, H, W) for K > 2 classes."""
    return [mean for mean, _ in sample_images(model, images, steps, samples, seed)]


def class_ids(scores):
    """(1, H, W) -> above 0.5 or not, (K, H, W) -> the best class; uint8 (H, W)."""
    return (scores[0] > 0.5 if len(scores) == 1 else scores.argmax(0)).astype(np.uint8)


# ---- what is written ----


def overlay(image, ids, k):
    """The picture with each class lightly tinted and outlined in its colour."""
    colours = (
        (class_colours(k).numpy() + 1) * 127.5 if k > 2 else np.array([[0, 0, 0], [80, 255, 80]])
    )
    picture, width = image.astype(np.float32), max(1, max(ids.shape) // 250)
    for c in range(1, k):
        inside = ids == c
        core = inside.copy()
        for axis in (0, 1):
            for shift in (-width, width):
                core &= np.roll(inside, shift, axis)
        picture[inside] = 0.75 * picture[inside] + 0.25 * colours[c]
        picture[inside & ~core] = colours[c]
    return picture.round().clip(0, 255).astype(np.uint8)


def montage(slices, ids, k, tile=192, most=16):
    """Up to `most` slices, evenly spread over those with foreground, as one picture."""
    chosen = ids.reshape(len(ids), -1).any(1).nonzero()[0]
    chosen = chosen if len(chosen) else np.arange(len(ids))
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int)]
    columns = min(4, len(chosen))
    sheet = np.zeros((-(-len(chosen) // columns) * tile, columns * tile, 3), np.uint8)
    for place, z in enumerate(chosen):
        top, left = place // columns * tile, place % columns * tile
        height, width = (max(1, n * tile // max(ids.shape[1:])) for n in ids.shape[1:])
        rows, cols = (
            np.arange(height) * ids.shape[1] // height,
            np.arange(width) * ids.shape[2] // width,
        )
        picture = overlay(slices(z)[rows][:, cols], ids[z][rows][:, cols], k)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def shares(ids, classes):
    """ "polyp 12.3 %, .." """
    counts = np.bincount(ids.ravel(), minlength=len(classes)) / ids.size
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(classes[1:], counts[1:]))


def save_picture(target, image, scores, std, args, classes):
    k, ids = len(classes), class_ids(scores)
    write_image(target("_mask.png"), ids * np.uint8(255 if k == 2 else 1))
    write_image(target("_overlay.png"), overlay(image, ids, k))
    if args.samples > 1:
        write_image(target("_std.png"), (std.max(0) * 510).round().clip(0, 255).astype(np.uint8))
    return ids


def segment_volume(model, path, target, args):
    """One NIfTI file -> its mask and montage, slices in batches -> class ids (Z, H, W)."""
    volume, geometry = read_volume(path)
    window = model.config.window
    if window is None:
        raise Refusal(f"{path}: a volume, but the model was trained on pictures ({args.model})")
    slices = slices_of(volume)
    ids = np.zeros(slices.shape, np.uint8)
    stds = np.zeros(slices.shape, np.float32) if args.samples > 1 else None
    progress = Progress(len(slices), "slices")

    def picture(z):
        return np.repeat(window_to_uint8(slices[z], window)[..., None], 3, axis=2)

    for start in range(0, len(slices), args.batch_size):
        chosen = range(start, min(start + args.batch_size, len(slices)))
        images = [picture(z) for z in chosen]
        results = sample_images(model, images, args.steps, args.samples, args.seed)
        for z, (scores, std) in zip(chosen, results):
            ids[z] = class_ids(scores)
            if stds is not None:
                stds[z] = std.max(0)
        progress.step(len(chosen))
    write_volume(target("_mask.nii.gz"), volume_of(ids), geometry)
    if stds is not None:
        write_volume(target("_std.nii.gz"), volume_of(stds), geometry)
    write_image(target("_overlay.png"), montage(picture, ids, len(model.config.classes)))
    return ids


# ---- which files ----


def collect(inputs):
    """Files and folders -> [(path, output name without ending)]. Raises Refusal for nothing."""
    found = []
    for path in map(Path, inputs):
        if not path.is_dir():
            found.append((path, Path(stem(path))))
            continue
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            known = file.name.lower().endswith((*IMAGE_ENDINGS, *VOLUME_ENDINGS))
            if known and not hidden and not stem(file).endswith(OURS) and file.is_file():
                found.append((file, inside.parent / stem(file)))
    if not found:
        raise Refusal(f"{inputs[0]}: no pictures or volumes in it")
    return found


class Job:
    """Where one file's results go; refuses to overwrite an input or another file's results."""

    taken = {}

    def __init__(self, path, name, out):
        self.path, self.base = path, Path(out) / name
        first = Job.taken.setdefault(self.base.resolve(), path)
        if first != path:
            raise Refusal(f"{path}: its mask would overwrite that of {first}; use another --out")

    def target(self, ending):
        path = self.base.with_name(self.base.name + ending)
        if path.exists() and self.path.exists() and path.samefile(self.path):
            raise Refusal(f"{self.path}: would be overwritten by its own mask; use another --out")
        return path


def main(args):
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    if args.model == str(NANO) and not NANO.exists():
        raise Refusal(f"{NANO}: not there; train one with train.py, or name one with --model")
    files = collect(args.inputs)[rank::world]
    device = find_device(args.device or (f"cuda:{local}" if torch.cuda.is_available() else None))
    model = SDSeg.load(args.model, device, args.precision)
    if not model.config.data:
        print(f"{args.model}: never trained to segment; its masks mean nothing", file=sys.stderr)
    Job.taken.clear()
    failed, progress = [], Progress(len(files), "files")

    def attempt(action, path):
        """Do it, or report the file in one line and go on."""
        try:
            return action()
        except Refusal as error:
            failed.append(error)
            if len(files) > 1:
                print(one_line(error), file=sys.stderr)
                progress.step()

    def say(path, shape, ids, seconds):
        size = " x ".join(map(str, shape))
        print(f"{path}  {size}  {shares(ids, model.config.classes)}  {seconds:.2f} s", flush=True)
        progress.step()

    def flush(batch):
        began = time.monotonic()
        results = sample_images(
            model, [image for _, image in batch], args.steps, args.samples, args.seed
        )
        for (job, image), (scores, std) in zip(batch, results):
            ids = attempt(
                lambda: save_picture(job.target, image, scores, std, args, model.config.classes),
                job.path,
            )
            if ids is not None:
                say(job.path, ids.shape[::-1], ids, (time.monotonic() - began) / len(batch))
        batch.clear()

    batch, started = [], time.monotonic()
    for path, name in files:
        job = attempt(lambda: Job(path, name, args.out), path)
        if job is None:
            continue
        if is_volume(path):
            began = time.monotonic()
            ids = attempt(lambda: segment_volume(model, path, job.target, args), path)
            if ids is not None:
                say(path, ids.shape[::-1], ids, time.monotonic() - began)
            continue
        image = attempt(lambda: read_image(path), path)
        if image is not None:
            batch.append((job, image))
        if len(batch) == args.batch_size or sum(i.size for _, i in batch) > 3 * MANY_PIXELS:
            flush(batch)
    if batch:
        flush(batch)
    if failed and len(files) == 1:
        raise failed[0]
    done = len(files) - len(failed)
    print(
        f"{done} of {len(files)} in {duration(time.monotonic() - started)}; masks are in {args.out}/"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run(lambda: main(ARGS))
