"""How alike two segmentations are: Dice, IoU, PSNR, SSIM, MS-SSIM and LPIPS.

Dice and IoU compare class ids and are what the paper's tables report. The others compare the
masks or scores of repeated runs as pictures, (B, C, H, W) in [0, 1], one number per picture.
"""

import numpy as np
import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
C1, C2 = 0.01**2, 0.03**2  # keep SSIM's fractions finite where a picture is dark or flat
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, the finest scale first


def areas(prediction, truth, k=2):
    """Pixels in both, in the prediction, in the truth -> (k - 1, 3) int64, for classes 1..k-1.

    Two integer maps of one shape, both numpy or both torch. A volume's areas are the sums of
    those of its slices.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"shapes {tuple(prediction.shape)} and {tuple(truth.shape)} differ")
    masks = [(prediction == c, truth == c) for c in range(1, k)]
    return np.array([[int((p & t).sum()), int(p.sum()), int(t.sum())] for p, t in masks])


def dice_of(areas):
    """Dice, 2 |P and T| / (|P| + |T|), of areas (..., 3) -> (...) float64 in [0, 1].

    Both empty: 1. One empty: 0.
    """
    both, p, t = np.moveaxis(areas, -1, 0)
    return np.where(p + t, 2 * both / np.maximum(p + t, 1), 1.0)


def iou_of(areas):
    """IoU, or Jaccard index, |P and T| / |P or T|, likewise."""
    both, p, t = np.moveaxis(areas, -1, 0)
    return np.where(p + t, both / np.maximum(p + t - both, 1), 1.0)


def dice(prediction, truth, k=2):
    """Dice of the classes 1..k-1 of two integer maps, see `areas` -> (k - 1,) float64."""
    return dice_of(areas(prediction, truth, k))


def iou(prediction, truth, k=2):
    """IoU of the classes 1..k-1 of two integer maps, see `areas` -> (k - 1,) float64."""
    return iou_of(areas(prediction, truth, k))


def psnr(a, b):
    """10 log10(1 / mean squared difference) -> (B,) decibels; infinite where a equals b."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def blur(x):
    """(B, C, H, W) -> (B, C, H - 10, W - 10): means under the window, wherever it fits."""
    offset = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = (window / window.sum()).view(1, 1, -1, 1).expand(x.shape[0] * x.shape[1], -1, -1, -1)
    maps = x.flatten(0, 1)[None]  # pictures as channels: many times faster than as a batch
    maps = F.conv2d(maps, window, groups=len(window))
    maps = F.conv2d(maps, window.transpose(2, 3), groups=len(window))
    return maps.view(*x.shape[:2], *maps.shape[2:])


def ssim_parts(a, b):
    """-> SSIM and its contrast-structure factor, both (B, C), means over the blurred maps."""
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels")
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    contrast_structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * contrast_structure).mean((2, 3)), contrast_structure.mean((2, 3))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) -> (B,) in [-1, 1], 1 where a equals b.

    The window stays inside the picture. Raises ValueError below 11 x 11 pixels.
    """
    return ssim_parts(a, b)[0].mean(1)


def ms_ssim(a, b):
    """Multi-scale SSIM (Wang et al. 2003) -> (B,) in [0, 1], 1 where a equals b.

    Five scales, each half the one before. A picture with a side under 176 pixels, whose fifth
    scale has no room for the window, gets the scales that fit, their weights again adding to 1.
    A negative factor, which has no real power, counts as 0.
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
    """-> a function of a, b like the above, lower for more alike; or None, after a line saying why.

    Needs the optional package `lpips`, which fetches its AlexNet when first used.
    """
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except (ImportError, OSError) as error:
        print(f"no LPIPS: {' '.join(str(error).split())[:80]}; to have it: pip install lpips")
        return None

    @torch.no_grad()
    def distance(a, b):
        pairs = (x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) * 2 - 1 for x in (a, b))
        return network(*pairs).view(a.shape[:2]).mean(1)

    return distance
