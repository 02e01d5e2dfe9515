"""The small autoencoder: it learns, its file is whole, and another run goes on from it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import train_vae
from checkpoint import read_weights
from common import Refusal
from sdseg import SDSegConfig, class_colours, start_from


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function of flags: trains on 20 pictures with a rectangle each -> config and weights."""
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for i in range(20):
        mask = np.zeros((32, 32), np.uint8)
        top, left = rng.integers(0, 16, 2)
        mask[top : top + 14, left : left + 14] = 255
        picture = np.repeat(mask[..., None] // 2 + 40, 3, axis=2)
        Image.fromarray(picture).save(tmp_path / "own/images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "own/masks" / f"{i}.png")

    def train_with(*flags):
        out = str(tmp_path / "vae.safetensors")
        fixed = ["--data", str(tmp_path / "own"), "--size", "32", "--batch-size", "4"]
        fixed += ["--device", "cpu", "--precision", "fp32", "--log-every", "15", "--out", out]
        train_vae.main(train_vae.parse([*fixed, *flags]))
        return read_weights(out, SDSegConfig)

    return train_with


def test_it_learns_and_another_run_goes_on(run, tmp_path, capsys):
    """Masks come back; `--init` takes the weights as they are, and `train.py --init` the file."""
    config, first = run("--steps", "60", "--lr", "5e-3")
    scores = [float(x) for x in re.findall(r"Dice ([\d.]+)", capsys.readouterr().out)]
    assert len(scores) == 4 and scores[-1] > max(0.8, scores[0])
    assert (config.image_size, config.data) == (32, "own") and (tmp_path / "vae.png").exists()
    kept = str((tmp_path / "vae.safetensors").rename(tmp_path / "first.safetensors"))
    _, again = run("--steps", "1", "--lr", "0", "--init", kept)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    model = start_from(kept)
    for encoder in (model.vae.encoder, model.tau.encoder):
        assert torch.equal(encoder.conv_in.weight, first["vae.encoder.conv_in.weight"])


def test_the_split_is_that_of_train(tmp_path):
    """An autoencoder for held-out videos must not see them; where there are none, it says so."""
    flags = ["--data", "demo", "--split", "sequence", "--out", str(tmp_path / "vae.safetensors")]
    with pytest.raises(Refusal, match="only cvc has video sequences"):
        train_vae.main(train_vae.parse(flags))


@pytest.mark.parametrize(
    "flag, value", [("size", "50"), ("batch-size", "1"), ("out", "vae.png"), ("lr", "1e30")]
)
def test_what_cannot_be_trained_is_refused(run, flag, value):
    """A size that the levels do not halve evenly, a batch without images and maps, a wrong name,
    a rate that leads to NaN.
    """
    with pytest.raises((Refusal, SystemExit)) as error:
        run(f"--{flag}", value)
    assert getattr(error.value, "code", 2) == 2


def test_a_third_of_the_maps_are_the_masks_as_they_are():
    """The data set's own classes in its own colours; the others up to four colours each."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(3, (9, 8, 8), generator=generator)
    own = class_colours(3)
    maps = train_vae.colour_maps(mask, own, generator)
    assert torch.equal(maps[:3], own[mask[:3]].permute(0, 3, 1, 2))
    counts = [len(x.flatten(1).unique(dim=1).T) for x in maps[3:]]
    assert all(2 <= n <= 4 for n in counts) and max(counts) > 2
