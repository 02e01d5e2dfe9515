"""A trained model's scores: from hand-made predictions, and from a small model on small files."""

import csv
import json
import shutil
import time
from functools import partial
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import disc_folder, save_tiny, tiny
from PIL import Image

from data import find
from sdseg import SDSeg, SDSegConfig
from support.cli import UserError
from support.folders import image_hashes
from support.metrics import dice, mean_dice
from tools import evaluate
from tools.stability import Similarity, dice_spread, efficiency, mean_std, ms_ssim, psnr, ssim


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The file of a small random model."""
    return save_tiny(tmp_path_factory.mktemp("run") / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images with a bright disc each, eight of them for testing."""
    path = disc_folder(tmp_path_factory.mktemp("discs") / "discs", n=12)
    split = {"train": ["8", "9"], "val": ["10", "11"], "test": [str(i) for i in range(8)]}
    (path / "split.json").write_text(json.dumps(split))
    return path


def run(*flags):
    """Run the command -> its results folder's summary.json and rows of cases.csv."""
    out = flags[flags.index("--out") + 1]
    evaluate.main(evaluate.parse_args([str(flag) for flag in (*flags, "--device", "cpu")]))
    return json.loads((out / "summary.json").read_text()), rows(out / "cases.csv")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def bright(model, images, *settings):
    """A perfect prediction for `folder`, in the place of infer.segment_images."""
    return [torch.from_numpy(np.float32(i[None, :, :, 0] >= 120)) for i in images]


# ---- scores ----


def test_a_perfect_prediction_against_another_run(model, folder, tmp_path, monkeypatch, capsys):
    """The truth scores 1, at no distance; the cases of two runs are paired by name, or counted."""
    monkeypatch.setattr(evaluate, "segment_images", bright)
    text = "\ufeffcase,dice\n0,0.5\n1,0.75\n2,\nx,0.1\n"  # with the mark that Excel adds
    (tmp_path / "other.csv").write_text(text, encoding="utf-8")
    flags = ("--data", folder, "--model", model, "--out", tmp_path)
    summary, cases = run(*flags, "--against", tmp_path / "other.csv")
    perfect = {"mean": 1, "std": 0, "low": 1, "high": 1, "n": 8}
    assert summary["scores"]["dice"] == summary["scores"]["iou"] == perfect
    assert summary["scores"]["hd95"] == perfect | {"mean": 0, "low": 0, "high": 0}
    assert summary["regions"] == {"lesions": 8, "found": 8, "missed": 0, "false": 0}
    assert len(cases) == summary["n"] == summary["groups"] == 8
    for case in cases:
        assert (case["dice"], case["lesions"], case["missed"]) == ("1.0", "1", "0")
        assert 0.99 < float(case["benchmark_dice"]) < 1
    against = summary["against"]
    assert (against["mean"], against["low"], against["high"]) == (0.375, 0.25, 0.5)
    assert (against["n"], against["only_here"], against["only_there"]) == (2, 6, 2)
    assert "1.0000   0.0000   1.0000 to 1.0000   8" in capsys.readouterr().out


@pytest.mark.parametrize("plane, dice_a, dice_b, step", [
    ("axial", 4 / 5, 3 / 4, 0.5), ("coronal", 4 / 5, 3 / 4, 0.5), ("sagittal", 6 / 7, 6 / 7, 0.75),
])  # fmt: skip
def test_volumes_are_scored_whole(plane, dice_a, dice_b, step, tmp_path, monkeypatch):
    """One Dice for all voxels, distances in mm, in any orientation, through the model's window
    and slices.
    """

    def moved(model, images, *settings):  # the true masks, moved by a voxel along the rows
        ids = [np.roll(np.digitize(image[..., 0], (32, 96)), 1, axis=1) for image in images]
        return list(torch.eye(3)[torch.from_numpy(np.stack(ids))].permute(0, 3, 1, 2))

    truth, data = np.zeros((16, 18, 6), np.int16), tmp_path / "data"
    truth[3:8, 5:12, 1:3], truth[10:14, 5:12, 2:4] = 1, 2
    affine = np.array([[0, -0.5, 0, 0], [0, 0, 0.75, 0], [4, 0, 0, 0], [0, 0, 0, 1]])
    for name, values in (("images", 100 * truth), ("masks", truth)):
        (data / name).mkdir(parents=True)
        for i in range(3):
            stored = nibabel.Nifti1Image(values[::-1].transpose(2, 0, 1), affine)
            nibabel.save(stored, data / name / f"{i}.nii.gz")
    (data / "classes.json").write_text('["background", "a", "b"]')
    (data / "split.json").write_text('{"train": ["0"], "val": ["1"], "test": ["2"]}')
    config = dict(classes=("background", "a", "b"), window=(0.0, 400.0), plane=plane)
    model = save_tiny(tmp_path / "model.safetensors", **config)
    monkeypatch.setattr(evaluate, "segment_images", moved)
    summary, (case,) = run("--data", data, "--model", model, "--out", tmp_path, "--batch-size", 4)
    assert (summary["unit"], summary["n"], summary["regions"]["found"]) == ("volume", 1, 2)
    scores = float(case["dice a"]), float(case["dice b"])
    assert scores == (round(dice_a, 6), round(dice_b, 6))
    assert float(case["dice"]) == pytest.approx(summary["scores"]["dice"]["mean"], abs=1e-6)
    assert summary["scores"]["dice"]["mean"] == pytest.approx((dice_a + dice_b) / 2)
    assert float(case["hd95 a"]) == float(case["hd95"]) == step
    assert summary["scores"]["dice"]["low"] is None  # one volume tells nothing of the spread


def test_case_details_by_hand():
    """Of three lesions two are found, one by a single pixel; one of three regions is false."""
    truth = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    guess = np.array([[1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]])
    expected = {"lesions": 3, "found": 2, "missed": 1, "false": 1, "marked": 4 / 21}
    assert expected.items() <= evaluate.case_details(guess, truth, 2, (1, 1)).items()


def test_a_class_that_no_truth_holds_is_left_out():
    """Its columns are nan; the means agree with the Dice that train.py validates with."""
    counts = np.array([[[2, 4, 4], [0, 0, 0]], [[1, 2, 2], [0, 3, 0]]])
    details = [{"hd95": [1.0, np.nan], "marked": 0.5}, {"hd95": [np.nan, np.nan], "marked": 0}]
    columns = evaluate.case_columns(counts, details, ("background", "a", "b"))
    assert columns["dice"].tolist() == columns["dice a"].tolist() == [0.5, 0.5]
    assert columns["dice"].mean() == mean_dice(counts) == 0.5
    assert np.isnan(mean_dice(counts[:, 1:]))
    for name in ("dice b", "iou b", "hd95 b"):
        assert np.isnan(columns[name]).all()
    assert columns["hd95_undefined"].tolist() == [1, 2]
    scores = evaluate.summarise(columns["hd95"], np.array(["x", "y"]))
    assert scores == {"mean": 1, "std": None, "low": None, "high": None, "n": 1}


def test_images_without_a_lesion_have_no_dice(model, folder, tmp_path, monkeypatch, capsys):
    """Without any truth there is no Dice, nor nan in its place; it is said how much is marked."""
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    for path in (empty / "masks").iterdir():
        Image.new("L", (48, 40)).save(path)
    monkeypatch.setattr(evaluate, "segment_images", bright)
    flags = ("--data", empty, "--model", model, "--out", tmp_path / "out", "--curve")
    summary, cases = run(*flags, "--stability", 2)
    assert summary["scores"]["dice"]["mean"] is None and cases[0]["dice"] == ""
    assert summary["stability"]["dice"]["data_set"] == {"mean": None, "std": None}
    marked = np.mean([float(case["marked"]) for case in cases])
    output = capsys.readouterr().out
    assert "undefined where a class is empty, in 8 of 8 images" in output
    assert "no truth of this part holds it: foreground." in output and "nan" not in output
    assert f"8 images have an empty truth: 8 of them are marked, {marked:.2%}" in output


# ---- which cases ----


def test_training_images_are_left_out(folder, capsys):
    """They are known by their bytes. It is said how many; a part without others is refused."""
    spec = find(str(folder))
    test = spec.splits["test"]
    trained = SDSegConfig(data="other", trained_on=image_hashes(test[:3] + spec.splits["val"]))

    def scored(config, part):
        args = SimpleNamespace(part=part, limit=None, root="data", model="m.safetensors")
        return evaluate.cases_to_score(args, config, spec)

    assert scored(trained, "test") == test[3:]
    assert "left out 3 of 8 cases" in capsys.readouterr().out
    with pytest.raises(UserError, match="no case is left"):
        scored(trained, "val")
    assert scored(trained, "train") == spec.splits["train"]
    capsys.readouterr()
    assert scored(SDSegConfig(data="other"), "test") == test
    assert "does not say which images it was trained on" in capsys.readouterr().out


def test_the_split_is_that_of_the_model(tmp_path, monkeypatch):
    """By default a model trained by video is scored by video, where the data set has videos."""

    def stop(data, root, split):
        raise UserError(split)

    monkeypatch.setattr(evaluate, "find", stop)
    model = save_tiny(tmp_path / "model.safetensors", data="kvasir+cvc", split="sequence")
    for data, expected in (("cvc", "sequence"), ("kvasir", "random")):
        with pytest.raises(UserError, match=expected):
            run("--data", data, "--model", model, "--out", tmp_path)


# ---- the command ----


def test_everything_is_written(model, folder, tmp_path, monkeypatch):
    """All options at once write every file; Dice is that of each image's own mask at full size."""
    monkeypatch.setattr(evaluate.stability, "efficiency", partial(efficiency, seconds=0))
    flags = ("--data", folder, "--model", model, "--out", tmp_path, "--stability", 2, "--curve")
    summary, cases = run(*flags, "--efficiency", "--limit", 3, "--precision", "fp32")
    names = {"cases.csv", "gallery.png", "curve.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (summary["part"], summary["split"], summary["n"]) == ("test", "random", 3)
    assert len(summary["sha256"]) == 64 and summary["versions"]["torch"] == torch.__version__
    loaded, by_hand = SDSeg.load(model), []
    for case in cases:
        pair = (folder / part / f"{case['case']}.png" for part in ("images", "masks"))
        image, truth = (np.asarray(Image.open(path)) for path in pair)
        prob = evaluate.segment_images(loaded, [image])[0]
        by_hand += [*dice(loaded.class_ids(prob).numpy(), truth > 127)]
    # A network rounds differently in batches
    assert [float(case["dice"]) for case in cases] == pytest.approx(by_hand, abs=2e-3)
    scores, curve = summary["scores"]["dice"], summary["curve"]
    assert scores["mean"] == pytest.approx(np.mean(by_hand), abs=2e-3)
    assert [c["steps"] for c in curve] == [1, 2, 3, 5, 10, 20, 50]
    assert curve[0]["dice"] == pytest.approx(scores["mean"], abs=1e-6)
    assert [row["steps"] for row in summary["efficiency"]] == [1, 10]


def test_a_model_or_a_file_that_does_not_fit_is_refused(model, folder, tmp_path, capsys):
    """Other classes than the model's; a file that is no other run; nothing to compare with."""
    other = save_tiny(tmp_path / "other.safetensors", classes=("background", "cup", "disc"))
    flags = ("--data", folder, "--out", tmp_path / "out", "--model")
    with pytest.raises(UserError, match="segments background, cup, disc; discs has"):
        run(*flags, other)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a cases.csv"):
        run(*flags, model, "--against", tmp_path / "other.csv")
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["--data", "cvc", "--model", "m", "--stability", "1"])
    assert capsys.readouterr().err.count("\n") == 1


# ---- tools/stability.py ----


def test_similarity_by_hand():
    """Levels are means over pairs and over cases; PSNR leaves out and counts identical pairs."""
    probs = torch.rand(3, 3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    probs[2] = probs[2, :1]  # (cases, N, K, H, W)
    ids, similarity = probs.argmax(2), Similarity(3, "cpu")
    for case in range(3):
        similarity.add(case, list(ids[case].numpy()), list(probs[case]))
    summary, masks = similarity.summary(), torch.stack([ids == 1, ids == 2], 2).float()
    # The foreground classes are the channels
    for kind, images in (("probabilities", probs[:, :, 1:]), ("masks", masks)):
        for f in (psnr, ssim, ms_ssim):
            pairs = [f(images[:, i], images[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
            pairs = torch.stack(pairs).double().numpy()
            pairs = pairs[:, :2] if f is psnr else pairs
            levels = summary[f"{f.__name__} of {kind}"]
            assert levels["data_set"] == pytest.approx(mean_std(pairs.mean(1)), rel=1e-4)
            assert levels["instance"] == pytest.approx(mean_std(pairs.mean(0)), rel=1e-4)
            assert (levels["pairs"], levels["left_out"]) == (9, 3 if f is psnr else 0)


def test_dice_spread_by_hand():
    """Two cases swap scores 1 and 0 between two runs: no spread of the mean, all of the cases."""
    spread = dice_spread(np.array([[1, 0], [0, 1]]))
    assert spread["data_set"] == {"mean": 0.5, "std": 0}
    assert spread["instance"] == pytest.approx({"mean": 0.5**0.5, "std": 0})


def test_efficiency_counts_images():
    """Four images in 10 ms or more are at most 400 a second, with the steps that were asked for."""
    calls, fake = set(), tiny()
    fake.segment = lambda image, *settings: calls.add((len(image), *settings)) or time.sleep(0.01)
    result = efficiency(fake, torch.device("cpu"), 4, 10, 2, seconds=0.05)
    assert calls == {(4, 10, 2)} and 0 < result["images_per_second"] <= 400
