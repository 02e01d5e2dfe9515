"""Segment images and volumes: `python infer.py img.png scan.nii.gz folder/`.

An image gives `<stem>_mask.png` (0 and 255, or class ids if there are several classes) and
`<stem>_overlay.png`, at its own size. A NIfTI volume gives `<stem>_mask.nii.gz`, with its own
shape, affine and spacing, and an overlay of some slices. All images start from the same noise, so
a mask does not depend on what else is segmented.
Several GPUs: `torchrun --nproc_per_node=8 infer.py folder/` shares the files.
Letters: B batch, C channels of prob (1, or K for K > 2 classes), H W the size of an image, S the
side of the square that the model sees, Z slices.
"""

import datetime
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sdseg import SDSeg
from support.cli import (
    ArgumentParser,
    Progress,
    UserError,
    positive_int,
    print_line,
    rank_and_world_size,
    run_command,
    seed_int,
)
from support.device import find_device, own_gpu
from support.images import read_image, resize_image
from support.outputs import plan_outputs, write_results
from support.volumes import is_volume, read_volume, slices_to_uint8
from support.weights import DEFAULT_WEIGHTS


def parse_args(argv=None):
    parser = ArgumentParser("Segment images and NIfTI volumes; --out receives the results.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="images, .nii or .nii.gz volumes, or folders")
    add("--model", metavar="FILE", help="weights (default: weights/nano.safetensors, which ships)")
    add("--out", metavar="DIR", default="outputs", help="where the results go")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=positive_int, default=1, help="DDIM steps: network calls per sample")
    add("--samples", type=positive_int, default=1, help="samples per image; they are averaged")
    add("--seed", type=seed_int, default=0, help="seed of the noise")

    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=positive_int, default=8, help="images or slices at a time")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="number format of the networks; auto: the fastest that keeps the masks")  # fmt: skip
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    return parser.parse_args(argv)


# ---- from images to class ids ----


def mean_and_std(model, images, steps=1, samples=1, seed=0, spacing="trailing"):
    """Images uint8 (H, W, 3) of any sizes -> probabilities (B, C, S, S) in [0, 1], the mean of the
    samples, and their standard deviation (B, 1, S, S), that of the least certain class.

    Both are float32, on the CPU. Raises UserError for probabilities that are not finite.
    """
    square = np.stack([resize_image(image, model.config.image_size) for image in images])
    batch = torch.from_numpy(square).to(model.device).permute(0, 3, 1, 2) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    mean = squares = 0  # Welford's update needs one sample in memory at a time
    for n, prob in enumerate(model.sample(batch, steps, samples, generator, spacing), 1):
        change = prob - mean
        mean = mean + change / n
        squares = squares + change * (prob - mean)
    if not mean.isfinite().all():
        raise UserError("the probabilities are not finite; try --precision fp32 or another --model")
    return mean.cpu(), (squares / samples).amax(1, keepdim=True).sqrt().cpu()


def resize_prob(prob, size):
    """(C, S, S) -> (C, H, W) for size (H, W): bilinear, antialiased where the image is smaller."""
    return F.interpolate(prob[None], tuple(size), mode="bilinear", antialias=True)[0]


def segment_images(model, images, steps=1, samples=1, seed=0, spacing="trailing"):
    """Images uint8 (H, W, 3) of any sizes -> a list of probabilities (C, H, W) at those sizes."""
    prob, _ = mean_and_std(model, images, steps, samples, seed, spacing)
    return [resize_prob(p, image.shape[:2]) for p, image in zip(prob, images)]


def predict_masks(model, images, args):
    """For each image uint8 (H, W, 3) yield class ids uint8 (H, W) and the standard deviation of the
    samples, float32 (H, W), or None if there is one sample.
    """
    progress = Progress(len(images), "slices")
    for i in range(0, len(images), args.batch_size):
        batch = images[i : i + args.batch_size]
        results = mean_and_std(model, batch, args.steps, args.samples, args.seed)
        for image, prob, std in zip(batch, *results):
            size = image.shape[:2]
            ids = model.class_ids(resize_prob(prob, size)).numpy()
            yield ids, resize_prob(std, size)[0].numpy() if args.samples > 1 else None
        if len(images) > args.batch_size:  # a volume
            progress.step(len(batch))


# ---- from files to files ----


def read_slices(path, config):
    """-> slices uint8 (Z, H, W, 3), and the Geometry of a volume; of an image Z = 1, and None.

    Raises UserError.
    """
    if not is_volume(path):
        return read_image(path)[None], None
    volume, geometry = read_volume(path)
    slices = slices_to_uint8(volume, config.window, config.plane, config.context)
    if 1 in slices.shape[1:3]:
        raise UserError(f"{path}: holds one slice, which is not {config.plane}; the model segments "
                        f"{config.plane} slices")  # fmt: skip
    return slices, geometry


def segment_files(model, jobs, args, pool):
    """Segment the files of jobs [(source, target)] together -> how many could be read and written.

    The threads of `pool` read and write, because a PNG takes as long as a small network.
    """
    # 1. Read
    start, config = time.monotonic(), model.config
    readings = [pool.submit(read_slices, source, config) for source, _ in jobs]
    files = {}
    for job, reading in zip(jobs, readings):
        try:
            files[job] = reading.result()
        except UserError as error:
            print_line(f"infer.py: {error}", sys.stderr)

    # 2. Segment and write
    images = [image for slices, _ in files.values() for image in slices]
    masks = predict_masks(model, images, args)
    classes, writings = config.classes, []
    for (source, target), (slices, geometry) in files.items():
        ids = np.empty(slices.shape[:3], np.uint8)
        std = np.empty(ids.shape, np.float32) if args.samples > 1 else None
        for i, (mask, deviation) in enumerate(islice(masks, len(ids))):
            ids[i] = mask
            if std is not None:
                std[i] = deviation
        writing = pool.submit(write_results, target, slices, ids, std, geometry, config.plane,
                              len(classes))  # fmt: skip
        writings.append((source, ids if geometry else ids[0], writing))

    # 3. Report
    written = []
    for source, ids, writing in writings:
        try:
            writing.result()
            written.append((source, ids))
        except OSError as error:  # a name that is too long for the folder, say
            print_line(f"infer.py: {source}: not written: {error.strerror or error}", sys.stderr)
    seconds = (time.monotonic() - start) / max(len(files), 1)
    for source, ids in written:
        report(source, ids, classes, seconds)
    return len(written)


# ---- the program ----


def report(source, ids, classes, seconds):
    """Print the line of one file: its size, the share of each class, the time."""
    size = " x ".join(map(str, ids.shape[::-1]))
    shares = [f"{name} {(ids == i).mean():.2%}" for i, name in enumerate(classes)][1:]
    print_line(f"{source}: {size}, {', '.join(shares)}, {seconds:.2f} s")


def main(args):
    # 1. The files and the model. The processes of torchrun share the files, each has its own GPU
    rank, world_size, local_rank = rank_and_world_size()
    jobs = plan_outputs(args.paths, args.out)[rank::world_size]
    gpu = own_gpu(local_rank) if args.device in (None, "cuda") else None
    device = find_device(gpu or args.device)
    model = SDSeg.load(args.model or DEFAULT_WEIGHTS, device, args.precision)

    # 2. Segment: images in batches, each volume by itself
    images = [job for job in jobs if not is_volume(job[0])]
    batches = [images[i : i + args.batch_size] for i in range(0, len(images), args.batch_size)]
    batches += [[job] for job in jobs if is_volume(job[0])]
    done, progress = 0, Progress(len(jobs), "files")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches:
            done += segment_files(model, batch, args, pool)
            progress.step(len(batch))

    # 3. Sum up over the processes; each waits for the last, because torchrun stops all of them
    #    when one exits with an error
    counts = torch.tensor([done, len(jobs)])
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        dist.init_process_group("gloo", timeout=datetime.timedelta(weeks=4))
        dist.all_reduce(counts)
    done, total = counts.tolist()
    if done and rank == 0:
        by = f" by a model trained on {model.config.data}" if model.config.data else ""
        print_line(f"{done} of {total} files segmented{by}; the results are in {args.out}")
        if not by:
            print_line("infer.py: these weights were never trained to segment, so the masks mean "
                       "nothing; train.py trains them", sys.stderr)  # fmt: skip
    if done == total:
        return 0
    return 1 if done else 2


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
