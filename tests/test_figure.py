"""The figure: its tiles hold what their labels say, and what cannot be drawn is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import figure
from common import Refusal
from demo import draw_demo
from sdseg import SDSeg, SDSegConfig, ddim_timesteps
from unet import UNetConfig
from vae import VAEConfig

TINY = SDSegConfig(
    "nano",
    VAEConfig(32, (1, 1, 1, 1), 1),
    UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    prediction="v",
    image_size=32,
)
LEFT, TOP, SIDE, STEP = 12, 12 + 28 + 20, 129, 135  # of the first tile; from column to column
ROW = SIDE + 20 + 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SDSeg(TINY).eval()


@pytest.fixture
def place(model, tmp_path):
    """A folder with the small random model, a picture, and its mask."""
    model.save(tmp_path / "tiny.safetensors")
    image, mask = draw_demo(1, 50)
    Image.fromarray(image[:40]).save(tmp_path / "picture.png")
    Image.fromarray(mask[:40] * 255).save(tmp_path / "mask.png")
    return tmp_path


def draw(place, *more):
    """Run the program -> the figure, uint8 (H, W, 3)."""
    flags = ["--model", str(place / "tiny.safetensors"), "--device", "cpu"]
    out = place / "docs" / "method.png"
    figure.main(figure.parse([*map(str, more), *flags, "--out", str(out)]))
    return np.asarray(Image.open(out))


def tile(drawn, row, column):
    x, y = LEFT + column * STEP, TOP + row * ROW
    return drawn[y : y + SIDE, x : x + SIDE]


def test_the_layout(model, place):
    """Image and map stand at the top left, the figure is 960 wide, and its margins are white."""
    drawn = draw(place)
    image, mask = draw_demo(0, 32)
    assert drawn.shape[1:] == (960, 3)
    for shown, column in ((image, 0), (np.stack([mask * 255] * 3, 2), 1)):
        expected = np.asarray(figure.enlarge(Image.fromarray(shown), SIDE))
        assert np.array_equal(tile(drawn, 0, column), expected)
    for edge in (drawn[:12], drawn[-6:], drawn[:, :11], drawn[:, -6:]):
        assert (edge == 255).all()


def test_noise_grows_from_left_to_right(place):
    """The first z_t is close to z_0, which stands below the map, and the last is far from it."""
    drawn = draw(place).astype(int)
    distance = [abs(tile(drawn, 0, 2 + i) - tile(drawn, 1, 1)).mean() for i in range(5)]
    assert distance == sorted(distance)
    assert distance[-1] > 3 * distance[0]


def test_ddim_begins_with_the_single_step_and_ends_with_the_sample(model):
    """The first z_0 estimate is that of one step, the last is what `reverse` returns, exactly."""
    with torch.no_grad():
        noise, z_c = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
        estimates = figure.ddim_estimates(model, noise, z_c, ddim_timesteps(10))
        assert len(estimates) == 10
        assert torch.equal(estimates[0], model.reverse(noise, z_c, [999]))
        assert torch.equal(estimates[-1], model.reverse(noise, z_c, ddim_timesteps(10)))


def test_latents_keep_square_pixels():
    """Enlarged by whatever factor, a latent's pixels are equally large and sharp."""
    tile = Image.fromarray(np.array([[0, 90], [180, 250]], np.uint8)).convert("RGB")
    large = np.asarray(figure.enlarge(tile, 7))[..., 0]
    assert large[:3, :3].max() == 0 and large[4:, 4:].min() == 250
    assert large[0, 3] == 45  # the middle column is half of either


def test_an_own_picture_with_and_without_its_mask(place):
    """A picture of any shape is drawn with its own map or, lacking one, with the model's."""
    picture = place / "picture.png"
    with_mask = draw(place, picture, "--mask", place / "mask.png")
    without = draw(place, picture)
    assert np.array_equal(tile(with_mask, 0, 0), tile(without, 0, 0))
    assert with_mask.shape == without.shape


def test_several_classes(place):
    """A model of three classes has its map drawn in its three colours."""
    torch.manual_seed(0)
    model = SDSeg(replace(TINY, classes=("background", "a", "b")))
    model.save(place / "tiny.safetensors")
    Image.fromarray(np.arange(3, dtype=np.uint8).repeat(16).reshape(1, 48).repeat(48, 0)).save(
        place / "mask.png"
    )
    Image.new("RGB", (48, 48)).save(place / "picture.png")
    shown = tile(draw(place, place / "picture.png", "--mask", place / "mask.png"), 0, 1)
    colours = ((model.colours + 1) * 127.5).byte().numpy()
    for i in range(3):
        assert np.array_equal(shown[64, 20 + 43 * i], colours[i])


def test_refusals(place):
    """A mask alone, of another size, a wrong ending, and a missing file: one line each."""
    picture, mask = place / "picture.png", place / "mask.png"
    with pytest.raises(Refusal, match="without its picture"):
        draw(place, "--mask", mask)
    Image.new("L", (9, 9)).save(place / "small.png")
    with pytest.raises(Refusal, match="must match"):
        draw(place, picture, "--mask", place / "small.png")
    with pytest.raises(Refusal, match="none.png"):
        draw(place, place / "none.png")
    with pytest.raises(Refusal, match="ends in .png"):
        figure.main(figure.parse(["--out", str(place / "figure.jpg")]))
    for out in (picture, mask):
        with pytest.raises(Refusal, match="picture or its mask"):
            figure.main(figure.parse([str(picture), "--mask", str(mask), "--out", str(out)]))
    assert not (place / "figure.jpg").exists()
