"""What evaluate.py measures beyond Dice: stability, efficiency, and the curve over DDIM steps.

Letters: N repeats from different noise, P = N (N - 1) / 2 pairs of them, C classes but the first.
"""

import platform
import time

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import Refusal
from metrics import WINDOW, dice_of, load_lpips, ms_ssim, psnr, ssim


def mean_std(values):
    """-> {"mean", "std"} of a flat array (std of a sample, n - 1), None where undefined."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "std": float(values.std(ddof=1)) if len(values) > 1 else None}


# ---- stability: Table 5 ----


class Similarity:
    """Compares repeated runs, every pair of them, as masks and as scores.

    Called with a case's number and the repeats of one of its pictures, the slices of a volume one
    by one. A picture has the C foreground classes as channels, in a mask 0 or 1.
    """

    kinds = ("masks", "scores")

    def __init__(self, n_cases, device):
        lpips = load_lpips(device)
        self.metrics = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
        self.metrics |= {"lpips": lpips} if lpips else {}
        self.values = [[] for _ in range(n_cases)]  # (pictures, kinds, metrics, P) of each
        self.device = device

    def __call__(self, number, ids, scores):
        """ids: N maps (H, W); scores: N arrays (1, H, W) or, with the background, (1 + C, H, W)."""
        if min(ids[0].shape) < WINDOW:
            raise Refusal(f"a picture of {ids[0].shape} pixels; SSIM needs {WINDOW} x {WINDOW}")
        count = max(len(scores[0]) - 1, 1)
        masks = np.array([[i == c for c in range(1, count + 1)] for i in ids])
        scores = np.array([s[-count:] for s in scores])
        self.values[number].append([self.compare(masks), self.compare(scores)])

    def compare(self, runs):
        """runs (N, C, H, W) in [0, 1] -> metrics x P numbers: each run against all after it."""
        runs = torch.from_numpy(runs).to(self.device, torch.float32)
        pairs = [(runs[i].expand_as(runs[i + 1 :]), runs[i + 1 :]) for i in range(len(runs) - 1)]
        return [torch.cat([f(a, b) for a, b in pairs]).tolist() for f in self.metrics.values()]

    def summary(self):
        """{"psnr of masks": {"data_set": mean, and std over pairs of runs; "instance": mean, and
        std over cases}, ...}. Identical pictures, whose PSNR is infinite, are left out of it.
        """
        cases = np.ma.stack([np.ma.masked_invalid(v).mean(0) for v in self.values])
        result = {}
        for i, kind in enumerate(self.kinds):
            for j, name in enumerate(self.metrics):
                levels = {"data_set": cases[:, i, j].mean(0), "instance": cases[:, i, j].mean(1)}
                levels = {level: mean_std(v.compressed()) for level, v in levels.items()}
                result[f"{name} of {kind}"] = levels
        return result

    def identical(self):
        """The share of pairs of masks that are the same to the last pixel."""
        every = np.concatenate([np.array(v) for v in self.values])
        return float(np.isinf(every[:, 0, 0]).mean())


def dice_spread(totals):
    """Pixels (N, cases, C, 3), see metrics.areas -> how Dice, mean over C, varies with the noise.

    "data_set": mean Dice and its std over the N runs. "instance": a case's std over the runs,
    its mean and std over the cases.
    """
    dice = dice_of(totals).mean(2)  # (N, cases)
    return {"data_set": mean_std(dice.mean(1)), "instance": mean_std(dice.std(0, ddof=1))}


# ---- efficiency: Table 4 ----


def peak_memory(device):
    """Most memory in use so far, in MiB: tensors on a GPU, the whole process on a CPU; or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def synchronize(device):
    """Wait until the device has done its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def efficiency(model, device, batch_size, steps, samples, seconds=3.0):
    """Speed of the networks alone, from a batch of images on the device to their scores there."""
    size = model.config.image_size
    image = torch.zeros(batch_size, 3, size, size, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.segment(image, steps, samples)  # the first call is slower
    synchronize(device)
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < seconds:
        model.segment(image, steps, samples)
        synchronize(device)
        done += batch_size
    return {
        "steps": steps,
        "samples": samples,
        "batch_size": batch_size,
        "images_per_second": done / (time.perf_counter() - start),
        "peak_memory_mib": peak_memory(device),
    }


# ---- the curve: Figure 3 ----


def plot(steps, dice):
    """Dice against DDIM steps, which have a logarithmic axis -> (H, W, 3) uint8."""
    low = max(np.floor(min(dice) * 20 - 0.5) / 20, 0)
    high = min(np.ceil(max(dice) * 20 + 0.5) / 20, 1)
    left, right, top, bottom = 60, 610, 40, 340
    y = np.interp(dice, (low, high), (bottom, top))
    x = np.interp(np.log(steps), np.log((min(steps), max(steps))), (left + 30, right - 10))

    canvas = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(canvas)
    for value in np.linspace(low, high, round((high - low) * 20) + 1):
        height = np.interp(value, (low, high), (bottom, top))
        draw.line([left, height, right, height], fill=(225, 225, 225))
        draw.text((left - 8, height), f"{value:.2f}", fill="black", anchor="rm")
    draw.line([left, top, left, bottom, right, bottom], fill="black")
    draw.text((left, 12), "mean Dice", fill="black", anchor="mt")
    draw.text(((left + right) / 2, 375), "DDIM steps", fill="black", anchor="mt")

    blue = (31, 90, 160)
    draw.line(list(zip(x, y)), fill=blue, width=2)
    for px, py, n, value in zip(x, y, steps, dice):
        draw.ellipse([px - 4, py - 4, px + 4, py + 4], fill=blue)
        draw.text((px, py - 8), f"{value:.3f}", fill="black", anchor="mb")
        draw.text((px, bottom + 10), str(n), fill="black", anchor="mt")
    return np.asarray(canvas)
