"""Images for people: overlays, montages, grids, tiles and plots."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from support import panels


def test_an_overlay_has_tint_and_outline():
    """Outside nothing changes; inside there is a light tint, at the border the full colour."""
    image, ids = np.full((40, 50, 3), 100, np.uint8), np.zeros((40, 50), np.uint8)
    ids[10:30, 10:25], ids[10:30, 25:40] = 1, 2
    result, palette = panels.overlay(image, ids), panels.PALETTE
    assert (result[ids == 0] == 100).all()
    assert (result[10, 15] == palette[1]).all() and (result[20, 25] == palette[2]).all()
    assert (result[20, 15] == 75 + palette[1] // 4).all()
    assert len(np.unique(palette, axis=0)) == 14


def test_a_montage_shows_the_fullest_slices():
    """Of 64 slices it shows 16, the fullest of each 4; without foreground it shows any 16."""
    ids = np.zeros((64, 8, 200), np.uint8)
    for z in range(64):
        ids[z, 4, : 100 + 10 * (z % 4 == 2)] = 1
    images = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None], (64, 8, 200, 3))
    sheet = panels.montage(images, ids)
    assert sheet.shape == (4 * 8, 4 * 200, 3)
    assert np.array_equal(sheet[::8, ::200, 0].ravel(), np.arange(2, 64, 4))
    assert panels.montage(images, 0 * ids).shape == sheet.shape


def test_grids_and_tiles_have_everything_in_its_place():
    """A grid's last row ends in black; a tile keeps the aspect ratio; 1 becomes 255."""
    sheet = panels.grid([np.full((4, 4, 3), i, np.uint8) for i in (1, 2, 3)], 2)
    assert sheet[::4, ::4, 0].tolist() == [[1, 2], [3, 0]]
    tile = np.asarray(panels.fit_tile(np.zeros((4, 8, 3), np.uint8), 8))
    assert tile[:, 0, 0].tolist() == [96, 96, 0, 0, 0, 0, 96, 96]
    x = torch.tensor([-2.0, -1.0, 0.2 / 255, 1.0, 3.0]).expand(2, 3, 1, 5)
    assert panels.to_uint8(x)[1, 0, :, 2].tolist() == [0, 0, 128, 255, 255]


def test_curves_stay_in_their_panels():
    """One panel a title, one colour a line; a value that is not finite leaves a gap, no error."""
    rising = ((1, 2, 3, 4), (0.0, 1.0, float("nan"), 3.0))
    two = ("two", {"a": rising, "b": ((1, 4), (3, 0))}, None, None)
    image = panels.plot_panels([two, ("none", {}, None, (0, 1))])
    assert image.shape == (420, 920, 3)
    for colour in map(ImageColor.getrgb, ("#1f5aa0", "#d1495b")):
        _, x = (image == colour).all(2).nonzero()
        assert 60 < x.min() and x.max() < 400 and np.ptp(x) > 200
    assert (image[80:100, 525:780] == 255).all()


@pytest.mark.parametrize("low, high", [(0, 1), (0.00191, 0.0021), (9e-5, 9e-5), (-3, 7000), (0, 0)])
def test_the_axes_have_round_numbers(low, high):
    """Few, evenly spaced, with one digit that is 1, 2 or 5 in their step; they enclose the data."""
    ticks = panels.round_numbers(low, high)
    step = float(f"{ticks[1] - ticks[0]:.6e}")
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low and high <= ticks[-1]
    assert f"{step:e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)
    assert np.allclose(np.diff(ticks), step)
