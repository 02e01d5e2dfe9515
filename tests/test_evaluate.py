"""A trained model's scores: from hand-made predictions, and from a small model on small files."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import Refusal
from metrics import dice, ms_ssim, psnr, ssim
from sdseg import SDSeg, SDSegConfig
from studies import Similarity, dice_spread, efficiency, mean_std, plot
from unet import UNetConfig
from vae import VAEConfig

SMALL = dict(
    vae=VAEConfig(32, (1, 1, 1, 1), 1),
    unet=UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    prediction="x0",
    image_size=64,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model's file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    SDSeg(SDSegConfig(**SMALL)).save(path)
    return path


def disc(h, w, seed):
    """A mask (h, w) of one disc."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    cy, cx = h * rng.uniform(0.3, 0.7), w * rng.uniform(0.3, 0.7)
    return ((y - cy) ** 2 + (x - cx) ** 2 < (min(h, w) / 4) ** 2).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty pictures of three sizes whose red channel is their mask."""
    path = tmp_path_factory.mktemp("discs")
    for part in ("images", "masks"):
        (path / part).mkdir()
    for i in range(20):
        mask = disc(*((48, 64), (70, 50), (33, 47))[i % 3], i) * 255
        image = np.stack([mask, 255 - mask, mask // 2], 2)
        Image.fromarray(image).save(path / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i:02d}.png")
    return path


def run(*flags):
    """Run the program -> its results folder's summary.json."""
    out = flags[flags.index("--out") + 1]
    evaluate.main(evaluate.parse([str(flag) for flag in (*flags, "--device", "cpu")]))
    return json.loads((out / "summary.json").read_text())


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_perfect_prediction(model, folder, tmp_path, monkeypatch):
    """A prediction that is the truth, at the files' own sizes, scores 1 everywhere."""

    def red(model, images, *settings):
        return [i[None, :, :, 0].astype(np.float32) / 255 for i in images]

    monkeypatch.setattr(evaluate, "segment_images", red)
    summary = run("--data", folder, "--model", model, "--out", tmp_path, "--part", "train")
    assert summary["scores"]["dice"] == summary["scores"]["iou"] == {"mean": 1, "std": 0}
    cases = rows(tmp_path / "cases.csv")
    assert len(cases) == summary["n"] == 16
    assert all(float(c["dice"]) == float(c["iou"]) == 1 for c in cases)


def test_scores_are_those_of_the_masks_at_full_size(model, folder, tmp_path):
    """What is written is Dice of each picture's own mask, and its mean and deviation."""
    flags = ("--data", folder, "--model", model, "--part", "train", "--limit", 5)
    one_by_one = ("--precision", "fp32", "--batch-size", 1)  # a batch may round otherwise
    summary = run(*flags, "--out", tmp_path, *one_by_one)
    loaded, by_hand = SDSeg.load(model), []
    for case in rows(tmp_path / "cases.csv"):
        image = np.asarray(Image.open(folder / "images" / f"{case['case']}.png"))
        truth = np.asarray(Image.open(folder / "masks" / f"{case['case']}.png")) > 127
        ids = evaluate.class_ids(evaluate.segment_images(loaded, [image], 1, 1, 0)[0])
        by_hand += [*dice(ids, truth, 2)]
        assert float(case["dice"]) == pytest.approx(by_hand[-1], abs=1e-6)
    assert len(by_hand) == 5
    expected = {"mean": np.mean(by_hand), "std": np.std(by_hand, ddof=1)}
    assert summary["scores"]["dice"] == pytest.approx(expected)


def test_batches_change_nothing(model, folder, tmp_path):
    """A case's score depends on neither its neighbours nor their number."""
    flags = ("--data", folder, "--model", model, "--part", "train", "--precision", "fp32")
    run(*flags, "--out", tmp_path / "a", "--batch-size", 1, "--limit", 7)
    run(*flags, "--out", tmp_path / "b", "--batch-size", 5)
    for a, b in zip(rows(tmp_path / "a" / "cases.csv"), rows(tmp_path / "b" / "cases.csv")):
        assert a["case"] == b["case"] and float(a["dice"]) == pytest.approx(
            float(b["dice"]), abs=2e-3
        )


def test_everything_is_written(model, folder, tmp_path, capsys):
    """All options at once: every file, and a summary that says how the numbers were made."""
    flags = ("--data", folder, "--model", model, "--split", "test", "--out", tmp_path)
    summary = run(*flags, "--stability", 2, "--curve", "--precision", "fp32")
    names = {"cases.csv", "gallery.png", "curve.csv", "curve.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (summary["part"], summary["split"], summary["n"]) == ("test", "random", 2)
    assert len(summary["sha256"]) == 64 and summary["versions"]["torch"] == torch.__version__
    curve = rows(tmp_path / "curve.csv")
    assert [int(c["steps"]) for c in curve] == [1, 2, 3, 5, 10, 20, 50]
    one_step = summary["scores"]["dice"]["mean"]
    assert float(curve[0]["dice"]) == summary["curve"][0]["dice"]["mean"] == one_step
    output = capsys.readouterr().out
    assert "LPIPS" in output and "foreground" in output and f"{one_step:.4f}" in output


def test_volumes_are_scored_whole(tmp_path, monkeypatch):
    """A volume has one Dice per class, that of all its voxels, not a mean over slices."""
    torch.manual_seed(0)
    model, part = tmp_path / "model.safetensors", tmp_path / "data"
    SDSeg(SDSegConfig(**SMALL, classes=("background", "a", "b"))).save(model)
    truths = np.stack([disc(40, 44, i) * (i % 3) for i in range(6)], 2)
    for i in range(3):
        for name, values in (("images", truths * 100), ("masks", truths)):
            (part / name).mkdir(parents=True, exist_ok=True)
            volume = nibabel.Nifti1Image(values.astype(np.int16), np.eye(4))
            nibabel.save(volume, part / name / f"{i}.nii.gz")
    (part / "classes.json").write_text(json.dumps(["background", "a", "b"]))
    (part / "split.json").write_text(json.dumps({"train": ["0"], "val": ["1"], "test": ["2"]}))
    summary = run("--data", part, "--model", model, "--out", tmp_path / "out", "--stability", 2)
    assert summary["unit"] == "volume" and summary["n"] == 1
    found = evaluate.find(str(part), "data", "random")
    slices = list(evaluate.pictures(found, enumerate(found.parts["test"])))
    loaded = SDSeg.load(model, precision="auto")
    scores = evaluate.segment_images(loaded, [p.image for p in slices], 1, 1, 0)
    ids = np.stack([evaluate.class_ids(s) for s in scores])
    a, b = dice(ids, np.stack([p.truth for p in slices]), 3)
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert float(case["dice a"]) == pytest.approx(a, abs=1e-6)
    assert float(case["dice b"]) == pytest.approx(b, abs=1e-6)
    assert float(case["dice"]) == pytest.approx((a + b) / 2, abs=1e-6)
    # Intensities are seen through the model's window, as infer.py does, not the data set's
    monkeypatch.setattr(evaluate, "find", lambda *args: replace(found, window=(0.0, 1.0)))
    again = run("--data", part, "--model", model, "--out", tmp_path / "out", "--stability", 2)
    assert again["scores"] == summary["scores"]


def test_the_split_is_the_model_s_own(capsys):
    """Without --split, a model by sequence is scored by sequence; another split gets a warning."""

    def settled(data, *flags):
        args = evaluate.parse(["--data", data, "--model", "model.safetensors", *flags])
        evaluate.settle_split(args, SDSegConfig(data="kvasir+cvc", split="sequence"))
        return args.split, bool(capsys.readouterr().out)

    assert settled("cvc") == ("sequence", False)
    assert settled("cvc", "--split", "val") == ("sequence", False)
    assert settled("cvc", "--split", "random") == ("random", True)
    assert settled("kvasir+cvc") == ("sequence", False)
    assert settled("kvasir") == settled("demo") == ("random", False)


def test_refusals(model, folder, tmp_path):
    """One line and status 2: nothing to compare with, a negative count, other classes."""
    other = tmp_path / "other.safetensors"
    SDSeg(SDSegConfig(**SMALL, classes=("background", "cup", "disc"))).save(other)
    with pytest.raises(Refusal, match="cup"):
        run("--data", folder, "--model", other, "--out", tmp_path / "out")
    names = shutil.copytree(folder, tmp_path / "names")
    (names / "classes.json").write_text('["background", "disc", "cup"]')
    with pytest.raises(Refusal, match="cup, disc; names has background, disc, cup"):
        run("--data", names, "--model", other, "--out", tmp_path / "out")
    flags = ["--data", str(folder), "--model", str(model)]
    for bad in (["--stability", "1"], ["--steps", "-1"], ["--part", "all"], ["--stepz", "3"]):
        result = subprocess.run(
            [sys.executable, "evaluate.py", *flags, *bad], capture_output=True, text=True
        )
        assert result.returncode == 2 and result.stderr.count("\n") == 1


# ---- studies.py ----


def test_identical_repeats():
    """Repeats that do not differ: SSIM 1, no finite PSNR, and all pairs counted as identical."""
    similarity = Similarity(2, "cpu")
    for case in range(2):
        mask = disc(30, 40, case)
        similarity(case, [mask] * 3, [mask[None].astype(np.float32)] * 3)
    summary = similarity.summary()
    assert similarity.identical() == 1
    for kind in ("masks", "scores"):
        assert summary[f"psnr of {kind}"]["data_set"] == {"mean": None, "std": None}
        for name in ("ssim", "ms_ssim"):
            for level in ("data_set", "instance"):
                expected = pytest.approx({"mean": 1, "std": 0}, abs=1e-6)
                assert summary[f"{name} of {kind}"][level] == expected


def test_similarity_by_hand():
    """Three repeats are three pairs; both levels have one mean, over pairs and over cases."""
    rng = np.random.default_rng(0)
    runs = rng.random((2, 3, 1, 24, 24), dtype=np.float32)  # (cases, N, C, H, W)
    similarity = Similarity(2, "cpu")
    for case, scores in enumerate(runs):
        similarity(case, list(scores[:, 0] > 0.5), list(scores))
    for kind, pictures in (("scores", runs), ("masks", (runs > 0.5).astype(np.float32))):
        for f in (psnr, ssim, ms_ssim):
            t = torch.from_numpy(pictures)
            pairs = [f(t[:, i], t[:, j]).double().numpy() for i, j in ((0, 1), (0, 2), (1, 2))]
            levels = similarity.summary()[f"{f.__name__} of {kind}"]
            assert levels["data_set"] == pytest.approx(mean_std(np.mean(pairs, 1)), rel=1e-4)
            assert levels["instance"] == pytest.approx(mean_std(np.mean(pairs, 0)), rel=1e-4)


def test_similarity_of_classes():
    """With several classes the channels are the foreground's; the background is not compared."""
    ids = [np.zeros((12, 12), np.uint8), np.full((12, 12), 2, np.uint8)]
    scores = [np.eye(3, dtype=np.float32)[i].transpose(2, 0, 1) for i in ids]
    similarity = Similarity(1, "cpu")
    similarity(0, ids, scores)
    for kind in ("masks", "scores"):  # one of two channels differs by 1: mean square 1/2
        levels = similarity.summary()[f"psnr of {kind}"]
        assert levels["instance"]["mean"] == pytest.approx(10 * np.log10(2), abs=1e-5)


def test_dice_spread_by_hand():
    """Two cases swap scores 1 and 0 between two runs: no spread of the mean, all of the cases."""
    right, wrong = [[5, 5, 5]], [[0, 5, 5]]  # one class: pixels in both, predicted, true
    spread = dice_spread(np.array([[right, wrong], [wrong, right]]))
    assert spread["data_set"] == {"mean": 0.5, "std": 0}
    assert spread["instance"] == pytest.approx({"mean": 0.5**0.5, "std": 0})


def test_efficiency_counts_images():
    """The speed is that of the images that went through `segment`, with the steps asked for."""
    calls = []
    config = SimpleNamespace(image_size=16)
    segment = lambda image, steps, samples: calls.append((len(image), steps, samples))  # noqa: E731
    fake = SimpleNamespace(config=config, segment=segment)
    result = efficiency(fake, torch.device("cpu"), 4, 10, 2, seconds=0.05)
    assert set(calls) == {(4, 10, 2)}
    assert 0 < result["images_per_second"] < 4 * len(calls) / 0.05
    assert (result["steps"], result["samples"], result["batch_size"]) == (10, 2, 4)


@pytest.mark.parametrize("dice", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.1, 0.9, 0.3)])
def test_plot_has_room_for_every_curve(dice):
    """Every point lies inside the picture, on a dot of the curve's colour, rising with Dice."""
    picture = plot((1, 10, 50), dice)
    blue = (picture == (31, 90, 160)).all(2)
    height = [np.nonzero(blue[:, x])[0].mean() for x in (90, 600)]
    assert picture.shape == (400, 640, 3) and not blue[[0, -1]].any() and not blue[:, [0, -1]].any()
    assert np.sign(height[0] - height[1]) == np.sign(dice[2] - dice[0])
