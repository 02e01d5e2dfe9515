"""How much repeated runs differ (the paper's Table 5), and how fast a model is (its Table 4).

PSNR, SSIM, MS-SSIM and LPIPS compare masks or probabilities of two runs as images (B, C, H, W) in
[0, 1] and give one number per image. Letters: N runs from different noise, P = N (N - 1) / 2 pairs
of runs, K classes, C the K - 1 foreground classes.
"""

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from support.cli import UserError, one_line
from support.device import peak_memory
from tools.benchmark import medians

WINDOW = 11  # pixels a side of SSIM's Gaussian; its sigma is 1.5 pixels
GAUSSIAN = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
GAUSSIAN = (GAUSSIAN / GAUSSIAN.sum()).tolist()
C1, C2 = 0.01**2, 0.03**2  # keep SSIM's fractions finite where an image is dark or flat
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, the finest scale first


# ---- two runs as images ----


def psnr(a, b):
    """10 log10(1 / mean squared difference) -> (B,) decibels; infinite where a equals b."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def blur(x):
    """(B, C, H, W) -> (B, C, H - 10, W - 10): means under the window, wherever it fits."""
    for axis in (2, 3):
        fits = x.shape[axis] - WINDOW + 1
        x = sum(weight * x.narrow(axis, i, fits) for i, weight in enumerate(GAUSSIAN))
    return x


def ssim_parts(a, b):
    """-> SSIM and its contrast-structure factor, both (B, C), means over the blurred maps."""
    if min(a.shape[2:]) < WINDOW:
        raise UserError(f"an image of {tuple(a.shape[2:])} pixels; SSIM needs {WINDOW} x {WINDOW}")
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    contrast_structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * contrast_structure).mean((2, 3)), contrast_structure.mean((2, 3))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) -> (B,) in [-1, 1], 1 where a equals b."""
    return ssim_parts(a, b)[0].mean(1)


def ms_ssim(a, b):
    """Multi-scale SSIM (Wang et al. 2003) -> (B,) in [0, 1], 1 where a equals b.

    Five scales, each half the size of the one before. An image with a side under 176 pixels uses
    the scales at which the window fits, and their weights are rescaled to add up to 1. A negative
    factor has no real power and counts as 0.
    """
    scales = sum(min(a.shape[2:]) >> i >= WINDOW for i in range(len(SCALE_WEIGHTS)))
    weights = SCALE_WEIGHTS[: max(scales, 1)]
    result = 1.0
    for i, weight in enumerate(weights, 1):
        full, contrast_structure = ssim_parts(a, b)
        factor = full if i == len(weights) else contrast_structure
        result = result * factor.clamp(min=0) ** (weight / sum(weights))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result.mean(1)


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
    """-> {"mean", "std"} of the numbers in an array that are finite; std of a sample (n - 1).

    None where there are too few numbers.
    """
    values = np.ma.masked_invalid(values).compressed()
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "std": float(values.std(ddof=1)) if len(values) > 1 else None}


class Similarity:
    """Compares repeated runs, each pair of them, as masks and as probabilities.

    The C foreground classes are the channels; in a mask they are 0 or 1.
    """

    def __init__(self, n_cases, device):
        metrics = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "lpips": load_lpips(device)}
        self.metrics = {name: metric for name, metric in metrics.items() if metric}
        self.values = [[] for _ in range(n_cases)]  # of each image (2 x metrics, P)
        self.device = device

    def add(self, case, ids, probs):
        """The N results of one image, or of one slice of a volume.

        case: its number; ids: N arrays (H, W); probs: N tensors (1, H, W), or (K, H, W) with the
        background.
        """
        n_foreground = max(len(probs[0]) - 1, 1)
        masks = np.array([[i == c for c in range(1, n_foreground + 1)] for i in ids])
        probs = torch.stack([p[-n_foreground:] for p in probs])
        rows = []
        for runs in (torch.from_numpy(masks), probs):  # (N, C, H, W) in [0, 1]
            runs = runs.to(self.device, torch.float32)
            pairs = [(run.expand_as(runs[i:]), runs[i:]) for i, run in enumerate(runs[:-1], 1)]
            rows += [torch.cat([f(a, b) for a, b in pairs]).tolist() for f in self.metrics.values()]
        self.values[case].append(rows)

    def summary(self):
        """-> {"psnr of masks": {..}, ..}, in each: "data_set", mean and std over pairs of runs;
        "instance", mean and std over cases; "pairs", the number of pairs of images; "left_out",
        those of identical images, because their PSNR is infinite.
        """
        values = np.concatenate(self.values)
        cases = np.ma.stack([np.ma.masked_invalid(images).mean(0) for images in self.values])
        result = {}
        for i, (kind, name) in enumerate(product(("masks", "probabilities"), self.metrics)):
            result[f"{name} of {kind}"] = {
                "data_set": mean_std(cases[:, i].mean(0)),
                "instance": mean_std(cases[:, i].mean(1)),
                "pairs": values[:, i].size,
                "left_out": int(np.isinf(values[:, i]).sum()),
            }
        return result


def dice_spread(dice):
    """How Dice (N, cases) varies with the noise. "data_set": the mean over the cases and its std
    over the N runs. "instance": a case's std over the runs, its mean and std over the cases.
    """
    return {"data_set": mean_std(dice.mean(1)), "instance": mean_std(dice.std(0, ddof=1))}


# ---- efficiency: Table 4 ----


def efficiency(model, device, batch_size, steps, samples, seconds=3.0):
    """Speed of the networks alone, from images on the device to probabilities there."""
    image = torch.zeros(batch_size, 3, *[model.config.image_size] * 2, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = medians({"segment": lambda: model.segment(image, steps, samples)}, seconds, device)
    return {
        "steps": steps,
        "samples": samples,
        "batch_size": batch_size,
        "images_per_second": batch_size / times["segment"],
        "peak_memory_mib": peak_memory(device),
    }
