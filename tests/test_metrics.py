"""The numbers that describe a segmentation: by hand, by identity, and by other people's code."""

import sys
import types

import numpy as np
import pytest
import torch
from conftest import tiny

from support.cli import UserError
from support.metrics import (
    benchmark_dice,
    bootstrap_interval,
    count_components,
    dice,
    hd95,
    iou_from_counts,
    latent_std,
    pixel_counts,
    vae_dice,
)
from tools.stability import load_lpips, ms_ssim, psnr, ssim

# ---- Dice and IoU ----


def test_dice_and_iou_by_hand():
    """Numpy and torch agree; two empty masks score 1, one empty mask scores 0."""
    some = np.array([[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 0, 0]])
    others = np.array([[0, 0, 0, 1], [2, 2, 1, 1], [2, 0, 0, 1]])
    empty, full = np.zeros((2, 3, 4), np.uint8), np.ones((2, 3, 4), np.uint8)
    for guess, truth, dice_by_hand, iou_by_hand in (
        (others, some, [6 / 8, 4 / 6], [3 / 5, 2 / 4]),  # classes 1 and 2 share 3 and 2 pixels
        (empty, empty, [1, 1], [1, 1]),
        (empty, full, [0, 1], [0, 1]),
        (full, empty, [0, 1], [0, 1]),
    ):
        for a, b in ((guess, truth), (torch.from_numpy(guess), torch.from_numpy(truth))):
            np.testing.assert_array_equal(dice(a, b, 3), dice_by_hand)
            np.testing.assert_array_equal(iou_from_counts(pixel_counts(a, b, 3)), iou_by_hand)


# ---- distances and components ----


def test_hd95_by_hand():
    """One pixel against another: Pythagoras, in the unit of the spacing."""
    a, b = np.zeros((2, 9, 9), bool)
    a[1, 2] = b[4, 6] = True
    assert hd95(a, b, (1, 1)) == hd95(a[None], b[None], (7, 1, 1)) == 5
    assert hd95(a, b, (2, 0.5)) == pytest.approx(np.hypot(6, 2))
    assert np.isnan(hd95(a, b & False, (1, 1)))
    # 21 pixels lie 0 to 20 away from one of them. The 95th percentile is 19; backwards it is 0.
    line, start = np.ones((1, 21), bool), np.arange(21)[None] == 0
    assert hd95(line, start, (1, 1)) == hd95(start, line, (1, 1)) == 19


def test_components_by_hand():
    """Corners connect, also in 3-D; a U is one component, though its arms meet late."""
    u = np.array([[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    for other, overlapped in ((u, 2), (np.eye(4, 5, dtype=bool), 1), (~u, 0)):
        assert count_components(u, other) == (2, overlapped)
    cube = np.zeros((3, 3, 3), bool)
    cube[[0, 1, 2], [0, 1, 2], [2, 1, 0]] = True
    assert count_components(cube, cube) == (1, 1)


def test_distances_and_components_equal_scipy():
    """HD95 by MONAI's steps; components by an independent labelling with all neighbours."""
    reason = "SciPy is not installed; the tests by hand need nothing"
    ndimage = pytest.importorskip("scipy.ndimage", reason=reason)
    for seed in range(40):
        rng, ndim = np.random.default_rng(seed), 2 + seed % 2
        shape, spacing = rng.integers(3, 40 if ndim == 2 else 16, ndim), rng.uniform(0.5, 3, ndim)
        a, b = (rng.random(shape) < rng.uniform(0.02, 0.6) for _ in range(2))
        labels, n = ndimage.label(a, np.ones((3,) * ndim))
        assert count_components(a, b) == (n, len(np.unique(labels[a & b])))
        edges = [mask ^ ndimage.binary_erosion(mask) for mask in (a, b)]
        to_a, to_b = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
        if a.any() and b.any():
            expected = max(np.percentile(d, 95) for d in (to_b[edges[0]], to_a[edges[1]]))
            assert hd95(a, b, spacing) == pytest.approx(expected, rel=1e-6)


# ---- the polyp benchmark's Dice, and intervals ----


def test_benchmark_dice_is_the_mean_over_thresholds():
    """Two pixels by hand; and the histogram gives what 256 passes over an image give."""
    scores, truth = np.array([[0.2, 0.7]]), np.array([[0, 1]])
    # The lowest threshold marks both pixels, the 255 others the true one
    assert benchmark_dice(scores, truth) == pytest.approx((2 / 3 + 255) / 256)
    assert benchmark_dice(scores, 1 - truth) == pytest.approx((2 / 3 + 0) / 256)
    assert benchmark_dice(scores, 0 * truth) == 0
    assert benchmark_dice(0 * scores, truth) == pytest.approx(2 / 3 / 256)
    rng = np.random.default_rng(0)
    scores, truth = rng.random((20, 30)), rng.random((20, 30)) < 0.3
    levels = np.round(255 * (scores - scores.min()) / np.ptp(scores))
    expected = np.mean([dice(levels >= i, truth) for i in range(256)])
    assert benchmark_dice(scores, truth) == pytest.approx(expected)


def test_bootstrap_resamples_groups():
    """50 equal cases in a group are worth one: the interval is that of the groups' values."""
    values = np.random.default_rng(0).normal(size=40)
    theory = 2 * 1.96 * values.std() / 40**0.5
    for copies in (1, 50):
        grouped = bootstrap_interval(values.repeat(copies), np.arange(40).repeat(copies))
        assert np.ptp(grouped) == pytest.approx(theory, rel=0.1)
        alone = bootstrap_interval(values.repeat(copies), np.arange(40 * copies))
        assert np.ptp(alone) == pytest.approx(theory / copies**0.5, rel=0.1)
    # Drawn groups of 1 and 3 cases have the means 1, 1/4 and 0; one group has no interval
    assert bootstrap_interval([1.0, 0, 0, 0], ["a", "b", "b", "b"]) == (0, 1)
    assert bootstrap_interval([1.0, 0.5], ["a", "a"]) == (None, None)


# ---- repeated runs as images ----


def images(h, w):
    """Two images in [0, 1], float64 (1, 1, H, W), that any program can draw from this formula."""
    y, x = np.mgrid[:h, :w]
    a = 0.5 + 0.5 * np.sin(x / 7) * np.cos(y / 11)
    b = np.clip(a + 0.1 * np.sin(x * y / 50), 0, 1)
    return [torch.from_numpy(image)[None, None] for image in (a, b)]


def test_psnr_ssim_and_ms_ssim_are_those_of_other_programs():
    """They give other programs' numbers, 1 for equal images, and score a batch image by image."""
    a, b = images(192, 208)
    # scikit-image 0.26 (SSIM, PSNR), pytorch-msssim 1.0, which keeps its window in float32
    assert ssim(a, b).item() == pytest.approx(0.6026288303054216, abs=1e-12)
    assert psnr(a, b).item() == pytest.approx(23.22687585618492, abs=1e-9)
    assert ms_ssim(a, b).item() == pytest.approx(0.968353866, abs=1e-5)
    assert psnr(a, a).item() == float("inf")
    for score in (ssim, ms_ssim):
        assert score(a, a).item() == pytest.approx(1, abs=1e-12)
        both = score(torch.cat([a, b]), torch.cat([b, b]))
        torch.testing.assert_close(both, torch.cat([score(a, b), score(b, b)]))
    # Under 22 pixels one scale is left, which is SSIM; no scale fits under 11
    torch.testing.assert_close(ms_ssim(*images(21, 30)), ssim(*images(21, 30)))
    with pytest.raises(UserError, match="11 x 11"):
        ms_ssim(*images(10, 30))


def test_lpips_gets_three_channels_or_is_said_to_be_missing(monkeypatch, capsys):
    """It sees three channels in [-1, 1]; without the package a line says that it is missing."""

    def distance(a, b):
        assert a.shape[1:] == (3, 16, 16) and a.min() == -1 and b.max() == 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    network = torch.nn.Identity()
    network.forward = distance
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=lambda **_: network))
    a, b = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
    b[1, 0] = 1
    assert load_lpips("cpu")(a, b).tolist() == [0, 1]
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import then fails
    assert load_lpips("cpu") is None
    assert capsys.readouterr().out.startswith("LPIPS is missing")


class Masks(list):
    """What the measurements of an autoencoder take: masks (H, W) of class ids."""

    def batch(self, samples):
        return {"mask": torch.stack([self[i] for _, i in samples])}


def keeps_all():
    """A tiny model with an autoencoder that changes nothing."""
    model = tiny()
    model.vae.encode, model.vae.decode = lambda rgb: (rgb, None), lambda z: z
    return model


def test_latent_std_leaves_out_the_models_own_scale():
    """The standard deviation of latents -1 and 1 is 1, without the scale of the model's config."""
    assert latent_std(keeps_all(), Masks([torch.tensor([[0, 1]])] * 40)) == 1


def test_rebuilt_masks_are_counted_together():
    """A wrong pixel in an empty mask costs what it costs in a volume; without foreground, nan."""
    empty, half = torch.zeros(16, 16, dtype=int), torch.zeros(16, 16, dtype=int)
    half[8:] = 1
    model, masks = keeps_all(), Masks([empty, half, half])
    assert vae_dice(model, masks) == 1 and np.isnan(vae_dice(model, Masks([empty])))
    model.vae.decode = lambda z: torch.where(torch.arange(256).view(16, 16) == 0, 1.0, z)
    assert vae_dice(model, masks) == pytest.approx(2 * 256 / (256 + 259))
