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
    dice_from_counts,
    hd95,
    iou_from_counts,
    latent_std,
    mean_dice,
    pixel_counts,
)
from tools.stability import load_lpips, ms_ssim, psnr, ssim

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 0, 0]])
GUESS = np.array([[0, 0, 0, 1], [2, 2, 1, 1], [2, 0, 0, 1]])
EMPTY, FULL = np.zeros((2, 3, 4), np.uint8), np.ones((2, 3, 4), np.uint8)


# ---- Dice and IoU ----


@pytest.mark.parametrize(
    "guess, truth, dice_by_hand, iou_by_hand",
    [
        (GUESS, TRUTH, [6 / 8, 4 / 6], [3 / 5, 2 / 4]),
        (torch.from_numpy(GUESS), torch.from_numpy(TRUTH), [6 / 8, 4 / 6], [3 / 5, 2 / 4]),
        (EMPTY, EMPTY, [1, 1], [1, 1]),
        (EMPTY, FULL, [0, 1], [0, 1]),
        (FULL, EMPTY, [0, 1], [0, 1]),
    ],
)
def test_dice_and_iou_by_hand(guess, truth, dice_by_hand, iou_by_hand):
    """Class 1 shares 3 of 4 and 4 pixels, class 2 shares 2 of 3 and 3; numpy and torch agree. Two
    empty masks score 1; one empty mask scores 0, whichever of the two it is.
    """
    np.testing.assert_array_equal(dice(guess, truth, 3), dice_by_hand)
    np.testing.assert_array_equal(iou_from_counts(pixel_counts(guess, truth, 3)), iou_by_hand)


def test_counts_of_slices_add_up():
    """A volume can be scored slice by slice: the summed counts give the volume's Dice exactly."""
    a, b = np.random.default_rng(1).integers(0, 3, (2, 6, 8, 9))
    total = sum(pixel_counts(p, t, 3) for p, t in zip(a, b))
    np.testing.assert_array_equal(dice_from_counts(total), dice(a, b, 3))


def test_mean_dice_leaves_out_classes_that_no_truth_holds():
    """Class 1: Dice 6/8, and 1 where both masks are empty. Class 2 is never true: left out."""
    counts = np.array([[[3, 4, 4], [0, 0, 0]], [[0, 0, 0], [0, 5, 0]]])
    assert mean_dice(counts) == (6 / 8 + 1) / 2
    assert np.isnan(mean_dice(counts[:, 1:]))


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


@pytest.mark.parametrize("seed", range(40))
def test_distances_and_components_equal_scipy(seed):
    """HD95 by MONAI's steps: erosion, distance transform, percentile, maximum. Components by an
    independent labelling with 8 or 26 neighbours.
    """
    reason = "SciPy is not installed; the tests by hand need nothing"
    ndimage = pytest.importorskip("scipy.ndimage", reason=reason)
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


def test_benchmark_dice():
    """Two pixels by hand: the lowest of 256 thresholds marks both, the others the true one. And
    the histogram gives what 256 passes over an image give.
    """
    scores, truth = np.array([[0.2, 0.7]]), np.array([[0, 1]])
    assert benchmark_dice(scores, truth) == pytest.approx((2 / 3 + 255) / 256)
    assert benchmark_dice(scores, 1 - truth) == pytest.approx((2 / 3 + 0) / 256)
    assert benchmark_dice(scores, 0 * truth) == 0
    assert benchmark_dice(0 * scores, truth) == pytest.approx(2 / 3 / 256)
    rng = np.random.default_rng(0)
    truth = rng.random((20, 30)) < 0.3
    scores = 0.3 + 0.4 * rng.random((20, 30)) + 0.1 * truth
    levels = np.round(255 * (scores - scores.min()) / np.ptp(scores))
    expected = np.mean([dice(levels >= i, truth) for i in range(256)])
    assert benchmark_dice(scores, truth) == pytest.approx(expected)


def test_bootstrap_resamples_groups():
    """50 equal cases in a group are worth one: the interval is that of the groups' values. By hand:
    groups of 1 and 3 cases have the means 1, 1/4 and 0; one group has no interval.
    """
    values = np.random.default_rng(0).normal(size=40)
    theory = 2 * 1.96 * values.std() / 40**0.5
    for copies in (1, 50):
        grouped = bootstrap_interval(values.repeat(copies), np.arange(40).repeat(copies))
        assert np.ptp(grouped) == pytest.approx(theory, rel=0.1)
        alone = bootstrap_interval(values.repeat(copies), np.arange(40 * copies))
        assert np.ptp(alone) == pytest.approx(theory / copies**0.5, rel=0.1)
    assert bootstrap_interval([1.0, 0, 0, 0], ["a", "b", "b", "b"]) == (0, 1)
    assert bootstrap_interval([1.0, 0.5], ["a", "a"]) == (None, None)


# ---- repeated runs as images ----


def images(h, w):
    """Two images in [0, 1], float64 (1, 1, H, W), that any program can draw from this formula."""
    y, x = np.mgrid[:h, :w]
    a = 0.5 + 0.5 * np.sin(x / 7) * np.cos(y / 11)
    b = np.clip(a + 0.1 * np.sin(x * y / 50), 0, 1)
    return [torch.from_numpy(image)[None, None] for image in (a, b)]


def test_reference_values():
    """The numbers that scikit-image 0.26 (SSIM, PSNR) and pytorch-msssim 1.0 give for `images`.

    The latter keeps its window in float32.
    """
    a, b = images(192, 208)
    assert ssim(a, b).item() == pytest.approx(0.6026288303054216, abs=1e-12)
    assert psnr(a, b).item() == pytest.approx(23.22687585618492, abs=1e-9)
    assert ms_ssim(a, b).item() == pytest.approx(0.968353866, abs=1e-5)


def test_image_identities():
    """An image equals itself; the order does not matter; a batch is scored image by image. Under
    22 pixels one scale is left, which is SSIM; no scale fits under 11.
    """
    a, b = images(40, 35)
    assert psnr(a, a).item() == float("inf")
    assert psnr(a, a + 0.1).item() == pytest.approx(20)
    both_a, both_b = torch.cat([a, b]), torch.cat([b, b])
    for score in (ssim, ms_ssim):
        assert score(a, a).item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(score(a, b), score(b, a))
        torch.testing.assert_close(score(both_a, both_b), torch.cat([score(a, b), score(b, b)]))
    torch.testing.assert_close(ms_ssim(*images(21, 30)), ssim(*images(21, 30)))
    with pytest.raises(UserError, match="11 x 11"):
        ms_ssim(*images(10, 30))


def test_lpips(monkeypatch, capsys):
    """LPIPS sees three channels in [-1, 1], and an image's channels are averaged. Without the
    package a line says that its rows are missing.
    """

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.shape[1:] == (3, 16, 16) and a.min() == -1 and b.max() == 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    a, b = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
    b[1, 0] = 1
    assert load_lpips("cpu")(a, b).tolist() == [0, 1]
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import then fails
    assert load_lpips("cpu") is None
    assert capsys.readouterr().out.startswith("LPIPS is missing")


def test_latent_std():
    """The standard deviation of latents -1 and 1 is 1, without the scale of the model's config."""

    class Masks(list):
        def batch(self, samples):
            return {"mask": torch.stack([self[i] for _, i in samples])}

    model = tiny()
    model.vae.encode = lambda rgb: (rgb, None)
    assert latent_std(model, Masks([torch.tensor([[0, 1]])] * 40)) == 1
