"""The numbers that describe a segmentation: by hand, by identity, and by other people's code."""

import builtins
import sys
import types

import numpy as np
import pytest
import torch

from metrics import areas, dice, dice_of, iou, load_lpips, ms_ssim, psnr, ssim

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 0, 0]])
GUESS = np.array([[0, 0, 0, 1], [2, 2, 1, 1], [2, 0, 0, 1]])


def pictures(h=192, w=208):
    """Two pictures in [0, 1], float64, that any program can draw again from this formula."""
    y, x = np.mgrid[:h, :w]
    a = 0.5 + 0.5 * np.sin(x / 7) * np.cos(y / 11)
    b = np.clip(a + 0.1 * np.sin(x * y / 50), 0, 1)
    return a, b


def batch(*arrays):
    return [torch.from_numpy(a)[None, None] for a in arrays]


def test_dice_and_iou_by_hand():
    """Class 1 shares 3 of 4 and 4 pixels, class 2 shares 2 of 3 and 3; numpy and torch agree."""
    for convert in (np.asarray, torch.from_numpy):
        guess, truth = convert(GUESS), convert(TRUTH)
        np.testing.assert_array_equal(dice(guess, truth, 3), [6 / 8, 4 / 6])
        np.testing.assert_array_equal(iou(guess, truth, 3), [3 / 5, 2 / 4])


def test_empty_classes():
    """Both empty is 1, one empty is 0, whichever of the two it is."""
    empty, full = np.zeros((2, 3, 4), np.uint8), np.ones((2, 3, 4), np.uint8)
    for score in (dice, iou):
        assert score(empty, empty, 2) == 1
        assert score(empty, full, 2) == 0
        assert score(full, empty, 2) == 0


@pytest.mark.parametrize("shape", [(40,), (9, 11), (3, 5, 7)])
def test_dice_identities(shape):
    """Any shape: a map equals itself, order is no matter, and Dice = 2 IoU / (1 + IoU)."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, *shape), dtype=np.uint8)
    assert (dice(a, a, 4) == 1).all() and (iou(a, a, 4) == 1).all()
    np.testing.assert_array_equal(dice(a, b, 4), dice(b, a, 4))
    np.testing.assert_allclose(dice(a, b, 4), 2 * iou(a, b, 4) / (1 + iou(a, b, 4)))


def test_areas_of_slices_add_up():
    """A volume can be scored slice by slice: the sum of areas gives the volume's Dice, exactly."""
    a, b = np.random.default_rng(1).integers(0, 3, (2, 6, 8, 9))
    total = sum(areas(p, t, 3) for p, t in zip(a, b))
    np.testing.assert_array_equal(dice_of(total), dice(a, b, 3))


def test_dice_refuses_to_broadcast():
    """A mask that was not brought back to its picture's size is an error, not a number."""
    with pytest.raises(ValueError, match="differ"):
        dice(np.ones((1, 4)), np.ones((4, 4)), 2)


def test_picture_identities():
    """A picture equals itself; order is no matter; a batch is scored picture by picture."""
    a, b = batch(*pictures())
    assert psnr(a, a).item() == float("inf")
    both_a, both_b = torch.cat([a, b]), torch.cat([b, b])
    for score in (ssim, ms_ssim):
        assert score(a, a).item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(score(a, b), score(b, a))
        torch.testing.assert_close(score(both_a, both_b), torch.cat([score(a, b), score(b, b)]))


def test_psnr_by_hand():
    """A constant difference of 0.1 is 20 dB."""
    assert psnr(torch.full((1, 1, 9, 9), 0.5), torch.full((1, 1, 9, 9), 0.6)) == pytest.approx(20)


def test_reference_values():
    """The numbers scikit-image 0.26 (SSIM, PSNR) and pytorch-msssim 1.0 give for `pictures`.

    The latter keeps its window in float32.
    """
    a, b = batch(*pictures())
    assert ssim(a, b).item() == pytest.approx(0.6026288303054216, abs=1e-12)
    assert psnr(a, b).item() == pytest.approx(23.22687585618492, abs=1e-9)
    assert ms_ssim(a, b).item() == pytest.approx(0.968353866, abs=1e-5)


def test_ssim_equals_scikit_image():
    """SSIM and PSNR are those of an independent implementation, also at odd sizes."""
    reason = "scikit-image is not installed; the values it gave are in test_reference_values"
    reference = pytest.importorskip("skimage.metrics", reason=reason)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for size in ((192, 208), (33, 57), (11, 11)):
        a, b = pictures(*size)
        expected = reference.structural_similarity(a, b, data_range=1, **options)
        assert ssim(*batch(a, b)).item() == pytest.approx(expected, abs=1e-12)
        expected = reference.peak_signal_noise_ratio(a, b, data_range=1)
        assert psnr(*batch(a, b)).item() == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_near_torchmetrics():
    """MS-SSIM agrees with an implementation that reflects the picture at its border."""
    reason = "torchmetrics is not installed; a reference value is in test_reference_values"
    image = pytest.importorskip("torchmetrics.functional.image", reason=reason)
    a, b = batch(*pictures())
    expected = image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0)
    assert ms_ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-4)


def test_ms_ssim_of_small_pictures():
    """Under 22 pixels one scale is left, which is SSIM; no scale fits under 11."""
    a, b = batch(*pictures(21, 30))
    torch.testing.assert_close(ms_ssim(a, b), ssim(a, b))
    assert 0 < ms_ssim(*batch(*pictures(40, 35))).item() < 1
    with pytest.raises(ValueError, match="11 x 11"):
        ms_ssim(*batch(*pictures(10, 30)))


def test_lpips_absent(monkeypatch, capsys):
    """Without the optional package one line says so, and the other numbers do not need it."""
    real = builtins.__import__

    def without(name, *rest):
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert load_lpips("cpu") is None
    assert capsys.readouterr().out.count("\n") == 1


def test_lpips_is_given_what_it_expects(monkeypatch):
    """LPIPS sees three channels in [-1, 1], and a picture's channels are averaged."""

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
