"""How much repeated runs differ (the paper's Table 5), and how fast a model is (its Table 4).

PSNR, SSIM, MS-SSIM and LPIPS compare masks or probabilities of two runs as images (B, C, H, W) in
[0, 1] and give one number per image. Letters: N runs from different noise, P = N (N - 1) / 2 pairs
of runs, K classes, C the K - 1 foreground classes.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

from support.cli import UserError, one_line
from support.device import peak_memory, synchronize
from support.metrics import dice_from_counts

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
C1, C2 = 0.01**2, 0.03**2  # keep SSIM's fractions finite where an image is dark or flat
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, the finest scale first


# ---- two runs as images ----


def psnr(a, b):
    """10 log10(1 / mean squared difference) -> (B,) decibels; infinite where a equals b."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def blur(x):
    """(B, C, H, W) -> (B, C, H - 10, W - 10): means under the window, wherever it fits."""
    offset = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = (window / window.sum()).view(1, 1, -1, 1).expand(x.shape[0] * x.shape[1], -1, -1, -1)
    maps = x.flatten(0, 1)[None]  # images as channels: many times faster than as a batch
    maps = F.conv2d(maps, window, groups=len(window))
    maps = F.conv2d(maps, window.transpose(2, 3), groups=len(window))
    return maps.view(*x.shape[:2], *maps.shape[2:])


def ssim_parts(a, b):
    """-> SSIM and its contrast-structure factor, both (B, C), means over the blurred maps."""
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels")
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    contrast_structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * contrast_structure).mean((2, 3)), contrast_structure.mean((2, 3))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) -> (B,) in [-1, 1], 1 where a equals b.

    The window stays inside the image. Raises ValueError below 11 x 11 pixels.
    """
    return ssim_parts(a, b)[0].mean(1)


def ms_ssim(a, b):
    """Multi-scale SSIM (Wang et al. 2003) -> (B,) in [0, 1], 1 where a equals b.

    Five scales, each half the size of the one before. An image with a side under 176 pixels uses
    the scales at which the window fits, and their weights are rescaled to add up to 1. A negative
    factor has no real power and counts as 0.
    """
    scales = sum(min(a.shape[2:]) >> i >= WINDOW for i in range(len(SCALE_WEIGHTS)))
    scales = max(scales, 1)
    product = 1.0
    for i, weight in enumerate(SCALE_WEIGHTS[:scales]):
        full, factor = ssim_parts(a, b)
        factor = full if i == scales - 1 else factor
        product = product * factor.clamp(min=0) ** (weight / sum(SCALE_WEIGHTS[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)


def load_lpips(device):
    """-> a function of a, b like those above, lower for more alike; or None after a line why.

    Needs the optional package `lpips`, which fetches AlexNet's weights when it is first used.
    """
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except (ImportError, OSError) as error:
        print(f"LPIPS is missing from the table below: {one_line(error)[:80]} (pip install lpips)")
        return None

    @torch.no_grad()
    def distance(a, b):
        pairs = (x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) * 2 - 1 for x in (a, b))
        return network(*pairs).view(a.shape[:2]).mean(1)

    return distance


# ---- stability: Table 5 ----


def mean_std(values):
    """-> {"mean", "std"} of the numbers in a flat array that are not nan; std of a sample (n - 1).

    None where there are too few numbers.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "std": float(values.std(ddof=1)) if len(values) > 1 else None}


def mean_over_classes(values):
    """(.., K - 1) -> (..): the mean of those that are not nan; nan if there are none."""
    return np.ma.masked_invalid(values).mean(-1).filled(np.nan)


def held_only(scores, counts):
    """Scores (.., cases, K - 1) of pixel counts (.., cases, K - 1, 3), where a class that no truth
    holds becomes nan: two empty masks would score 1 each time.
    """
    held = counts[..., 2].any(-2, keepdims=True)
    return np.where(held, scores, np.nan)


class Similarity:
    """Compares repeated runs, each pair of them, as masks and as probabilities.

    It is called with the N results of one image, or of one slice of a volume after the other. The C
    foreground classes are the channels; in a mask they are 0 or 1.
    """

    kinds = ("masks", "probabilities")

    def __init__(self, n_cases, device):
        lpips = load_lpips(device)
        self.metrics = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
        self.metrics |= {"lpips": lpips} if lpips else {}
        self.values = [[] for _ in range(n_cases)]  # (images, kinds, metrics, P) of each case
        self.device = device

    def __call__(self, case, ids, probs):
        """case: its number; ids: N arrays (H, W); probs: N tensors (1, H, W), or (K, H, W) with the
        background.
        """
        if min(ids[0].shape) < WINDOW:
            raise UserError(f"an image of {ids[0].shape} pixels; SSIM needs {WINDOW} x {WINDOW}")
        n_foreground = max(len(probs[0]) - 1, 1)
        masks = np.array([[i == c for c in range(1, n_foreground + 1)] for i in ids])
        probs = torch.stack([p[-n_foreground:] for p in probs])
        pair = [self.compare(torch.from_numpy(masks)), self.compare(probs)]
        self.values[case].append(pair)

    def compare(self, runs):
        """runs (N, C, H, W) in [0, 1] -> metrics x P numbers: each run against all after it."""
        runs = runs.to(self.device, torch.float32)
        pairs = [(runs[i].expand_as(runs[i + 1 :]), runs[i + 1 :]) for i in range(len(runs) - 1)]
        return [torch.cat([f(a, b) for a, b in pairs]).tolist() for f in self.metrics.values()]

    def summary(self):
        """-> {"psnr of masks": {..}, ..}, in each: "data_set", mean and std over pairs of runs;
        "instance", mean and std over cases; "pairs", the number of pairs of images; "left_out",
        those of identical images, because their PSNR is infinite.
        """
        images = np.concatenate([np.array(v) for v in self.values])
        cases = np.ma.stack([np.ma.masked_invalid(v).mean(0) for v in self.values])
        result = {}
        for i, kind in enumerate(self.kinds):
            for j, name in enumerate(self.metrics):
                levels = {"data_set": cases[:, i, j].mean(0), "instance": cases[:, i, j].mean(1)}
                levels = {level: mean_std(v.compressed()) for level, v in levels.items()}
                pairs = images[:, i, j]
                levels |= {"pairs": pairs.size, "left_out": int(np.isinf(pairs).sum())}
                result[f"{name} of {kind}"] = levels
        return result


def dice_spread(totals):
    """Pixel counts (N, cases, K - 1, 3) -> how Dice, mean over the classes, varies with the noise.

    "data_set": mean Dice and its std over the N runs. "instance": a case's std over the runs,
    its mean and std over the cases.
    """
    dice = mean_over_classes(held_only(dice_from_counts(totals), totals))  # (N, cases)
    return {"data_set": mean_std(dice.mean(1)), "instance": mean_std(dice.std(0, ddof=1))}


# ---- efficiency: Table 4 ----


def efficiency(model, device, batch_size, steps, samples, seconds=3.0):
    """Speed of the networks alone, from images on the device to probabilities there -> a dict."""
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
