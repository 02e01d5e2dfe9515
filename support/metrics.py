"""How alike a prediction and the truth are, how certain a mean is, and what an autoencoder keeps.

Dice, IoU, the Hausdorff distance and component counts compare class ids or masks of an image or a
volume; any number of dimensions unless a docstring says otherwise. Letters: k or K classes, N
cases, |P| and |T| the pixels of a class in prediction and truth.
"""

import numpy as np
import torch

from support.cli import Progress

# ---- a prediction against the truth ----


def pixel_counts(prediction, truth, k=2):
    """Pixels in both, in the prediction, in the truth -> (k - 1, 3) int64, for classes 1..k-1.

    Two maps of class ids of one shape, both numpy or both torch. The counts of a volume are the
    sums of those of its slices. Raises ValueError if the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"shapes {tuple(prediction.shape)} and {tuple(truth.shape)} differ")
    masks = [(prediction == c, truth == c) for c in range(1, k)]
    return np.array([[int((p & t).sum()), int(p.sum()), int(t.sum())] for p, t in masks])


def dice_from_counts(counts):
    """Dice, 2 |P and T| / (|P| + |T|), of counts (.., 3) -> (..) float64 in [0, 1].

    Both masks empty: 1. One mask empty: 0.
    """
    both, p, t = np.moveaxis(counts, -1, 0)
    return np.where(p + t, 2 * both / np.maximum(p + t, 1), 1.0)


def iou_from_counts(counts):
    """IoU (Jaccard index), |P and T| / |P or T|, of counts (.., 3), like `dice_from_counts`."""
    both, p, t = np.moveaxis(counts, -1, 0)
    return np.where(p + t, both / np.maximum(p + t - both, 1), 1.0)


def dice(prediction, truth, k=2):
    """Dice of the classes 1..k-1 of two maps of class ids -> (k - 1,) float64."""
    return dice_from_counts(pixel_counts(prediction, truth, k))


def mean_dice(counts):
    """Counts (N, k - 1, 3) of N cases -> mean Dice over the cases and the classes; a float.

    A class that no truth holds is left out, because two empty masks would score 1 each time.
    nan if no class is left.
    """
    held = counts[..., 2].any(0)
    return float(dice_from_counts(counts[:, held]).mean()) if held.any() else float("nan")


def crop_to_both(a, b):
    """Two bool arrays -> the parts of them in the smallest box that holds the pixels of both."""
    indices = np.nonzero(a | b)
    box = tuple(slice(i.min(), i.max() + 1) if len(i) else slice(0) for i in indices)
    return a[box], b[box]


def hd95(prediction, truth, spacing):
    """95th percentile of the distances between two surfaces, in the unit of `spacing`; a float.

    Two bool arrays; `spacing` is the size of a pixel along each axis. nan if a mask is empty. The
    larger of the two directed percentiles, exact, as MONAI's compute_hausdorff_distance(
    percentile=95); medpy's hd95 pools both directions first. `crop_to_both` before this saves time
    and changes nothing.
    """
    if not (prediction.any() and truth.any()):
        return float("nan")
    p, t = surface(prediction), surface(truth)
    distances = nearest_distances(p, t, spacing), nearest_distances(t, p, spacing)
    return max(float(np.percentile(d, 95)) for d in distances)


def surface(mask):
    """The pixels of a mask that have a neighbour along an axis outside of it, or of the array."""
    padded, inner = np.pad(mask, 1), True
    for axis in range(mask.ndim):
        inner = inner & np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return mask & ~inner[(slice(1, -1),) * mask.ndim]


def nearest_distances(a, b, spacing):
    """The distance of each pixel in `a` to the nearest in `b`, one number each. b is not empty.

    The squared distance is a sum over the axes, so its minimum is found axis by axis.
    """
    *z_of_volume, y, x = [s * np.arange(n, dtype=np.float32) for s, n in zip(spacing, b.shape)]
    # 1. Along x: the nearest pixel of b on the same line lies before or after
    before = np.maximum.accumulate(np.where(b, x, -np.inf), -1)
    after = np.minimum.accumulate(np.where(b, x, np.inf)[..., ::-1], -1)[..., ::-1]
    square = np.minimum(x - before, after - x) ** 2
    # 2. Along z, in a volume: the best of all slices
    for z in z_of_volume:
        square = np.stack([(square + ((z - at) ** 2)[:, None, None]).min(0) for at in z])
    # 3. Along y, for the pixels of a only: further and further until nothing can be nearer
    *slices, rows, columns = np.nonzero(a)
    nearest, offset = square[a], 1
    while offset < len(y) and (offset * spacing[-2]) ** 2 < nearest.max():
        for other in (rows - offset, rows + offset):
            other = other.clip(0, len(y) - 1)
            found = square[(*slices, other, columns)] + (y[other] - y[rows]) ** 2
            nearest = np.minimum(nearest, found)
        offset += 1
    return np.sqrt(nearest)


def label_components(mask):
    """bool array -> an int array: 0 outside the mask, one number for each connected component.

    Pixels are connected if they touch, corners included: 8 neighbours in 2-D, 26 in 3-D. Runs of
    pixels along the last axis are numbered; runs that touch then share the largest number.
    """
    padded = np.pad(mask, 1)
    first = padded & ~np.roll(padded, 1, -1)  # the first pixel of each run
    runs = np.cumsum(first).reshape(padded.shape) * padded  # 1, 2, ..; 0 outside the mask
    # Of two runs that touch, one starts beside a pixel of the other
    offsets = np.argwhere(np.ones((3,) * mask.ndim)) - 1
    around = np.argwhere(first)[:, None] + offsets  # (runs, neighbours, dimensions)
    beside = runs[tuple(np.moveaxis(around, -1, 0))]
    a, b = np.nonzero(beside)[0] + 1, beside[beside > 0]  # the pairs of runs that touch
    label = np.arange(len(beside) + 1)
    while (label[a] != label[b]).any():
        largest = np.maximum(label[a], label[b])
        np.maximum.at(label, label[a], largest)
        np.maximum.at(label, label[b], largest)
        label = label[label]
    return label[runs][(slice(1, -1),) * mask.ndim]


def count_components(mask, other):
    """Two bool arrays -> the number of components of `mask`, the number that `other` overlaps."""
    label = label_components(mask)
    return len(np.unique(label[mask])), len(np.unique(label[mask & other]))


def remove_small(ids, smallest_area):
    """Masks (.., H, W) of 0 and 1 without the components that are smaller than a share of H W.

    A tensor uint8 on any device -> another on the same device.
    """
    if not smallest_area:
        return ids
    kept = ids.cpu().numpy().copy()
    for mask in kept.reshape(-1, *kept.shape[-2:]):  # views
        label = label_components(mask > 0)
        mask[np.bincount(label.ravel())[label] < smallest_area * mask.size] = 0
    return torch.from_numpy(kept).to(ids.device)


def benchmark_dice(scores, truth):
    """mDice of the public polyp benchmark (PraNet): the mean Dice over 256 thresholds; a float.

    scores float (H, W), truth (H, W) 0 or 1. As in PraNet's MyTest.py and eval/main.m: the scores
    are stretched to the full range and rounded to 8 bits; a pixel is foreground at each threshold
    0, 1, .., 255 that it reaches; Dice is 0 where nothing overlaps, so also if the truth is empty.
    """
    low, high = scores.min(), scores.max()
    level = ((scores - low) / max(high - low, 1e-8) * 255).round().astype(np.uint8)
    histograms = [np.bincount(x, minlength=256)[::-1] for x in (level[truth > 0], level.ravel())]
    both, predicted = np.cumsum(histograms, 1)  # pixels at or above the threshold 255, .., 0
    return float((2 * both / np.maximum(predicted + both[-1], 1)).mean())


def bootstrap_interval(values, groups, resamples=5000):
    """-> low, high of the mean: its 95 % percentile interval over resampled groups, seed 0.

    values (N,) of N cases and the group of each. Whole groups are drawn with replacement, as many
    as there are, because cases of one video or patient are alike. None, None for one group.
    """
    _, index = np.unique(groups, return_inverse=True)
    cases, total = np.bincount(index), np.bincount(index, values)
    n = len(cases)
    if n < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(n, size=(resamples, n))
    means = total[drawn].sum(1) / cases[drawn].sum(1)
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


# ---- masks through a model's autoencoder ----


@torch.no_grad()
def latent_std(model, data, n=512):
    """Standard deviation of the unscaled latents of all masks, not augmented; if there are more
    than n, of n to 2 n of them.
    """
    latents, indices = [], range(0, len(data), max(1, len(data) // n))
    progress = Progress(len(indices), "masks encoded")
    for i in range(0, len(indices), 16):
        masks = data.batch([(None, j) for j in indices[i : i + 16]])["mask"]
        latents.append(model.vae.encode(model.labels_to_rgb(masks.to(model.device)))[0].cpu())
        progress.step(len(masks))
    return torch.cat(latents).double().std(correction=0).item()


@torch.no_grad()
def vae_dice(model, data, n=16):
    """Dice of all masks, or of n to 2 n of them if there are more, after encoding and decoding: the
    best that a U-Net could reach.

    Their pixels are counted together, as those of a volume's slices are: in a slice without a
    class, one wrong pixel would give 0. The mean is over the classes; nan if the masks hold none.
    """
    counts, classes = 0, len(model.config.classes)
    for i in range(0, len(data), max(1, len(data) // n)):
        mask = data.batch([(None, i)])["mask"].to(model.device)
        decoded = model.probabilities(model.decode_mask(model.encode_mask(mask)))
        counts = counts + pixel_counts(model.class_ids(decoded), mask, classes)
    return mean_dice(counts[None])
