"""A trained model's scores: from hand-made predictions, and from a small model on small files."""

import csv
import json
import shutil
import time
import zlib
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


def test_perfect_prediction(model, folder, tmp_path, monkeypatch, capsys):
    """A prediction that is the truth scores 1 everywhere, at no distance, and finds each lesion."""
    monkeypatch.setattr(evaluate, "segment_images", bright)
    summary, cases = run("--data", folder, "--model", model, "--out", tmp_path)
    perfect = {"mean": 1, "std": 0, "low": 1, "high": 1, "n": 8}
    assert summary["scores"]["dice"] == summary["scores"]["iou"] == perfect
    assert summary["scores"]["hd95"] == perfect | {"mean": 0, "low": 0, "high": 0}
    assert summary["regions"] == {"lesions": 8, "found": 8, "missed": 0, "false": 0}
    assert len(cases) == summary["n"] == summary["groups"] == 8
    for case in cases:
        assert (case["dice"], case["lesions"], case["missed"]) == ("1.0", "1", "0")
        assert 0.99 < float(case["benchmark_dice"]) < 1
    assert "1.0000   0.0000   1.0000 to 1.0000   8" in capsys.readouterr().out


def test_volumes_are_scored_whole(tmp_path, monkeypatch):
    """A volume has one Dice per class, of all its voxels, and distances in millimetres, also if its
    file is stored in another orientation. The model's window decides what the networks see. Here
    the predicted masks are the true ones, moved by a voxel of 0.5 mm.
    """

    def moved(model, images, *settings):
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
    config = dict(classes=("background", "a", "b"), window=(0.0, 400.0))
    model = save_tiny(tmp_path / "model.safetensors", **config)
    monkeypatch.setattr(evaluate, "segment_images", moved)
    summary, (case,) = run("--data", data, "--model", model, "--out", tmp_path, "--batch-size", 4)
    assert (summary["unit"], summary["n"], summary["regions"]["found"]) == ("volume", 1, 2)
    assert (float(case["dice a"]), float(case["dice b"])) == (4 / 5, 3 / 4)
    assert float(case["dice"]) == summary["scores"]["dice"]["mean"] == pytest.approx(0.775)
    assert float(case["hd95 a"]) == float(case["hd95"]) == 0.5
    assert summary["scores"]["dice"]["low"] is None  # one volume tells nothing of the spread


def test_case_details_by_hand():
    """Of three lesions two are found, one by a single pixel; one of three regions is false."""
    truth = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    guess = np.array([[1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]])
    details = evaluate.case_details(guess, truth, 2, (1, 1))
    assert [details[name] for name in ("lesions", "found", "missed", "false")] == [3, 2, 1, 1]
    assert details["marked"] == 4 / 21 and len(details["hd95"]) == 1


def test_a_class_that_no_truth_holds_is_left_out():
    """Its columns are nan, and the means agree with the Dice that train.py validates with."""
    counts = np.array([[[2, 4, 4], [0, 0, 0]], [[1, 2, 2], [0, 3, 0]]])
    details = [{"hd95": [1.0, np.nan], "marked": 0.5}, {"hd95": [np.nan, np.nan], "marked": 0}]
    columns = evaluate.case_columns(counts, details, ("background", "a", "b"))
    assert columns["dice"].tolist() == columns["dice a"].tolist() == [0.5, 0.5]
    assert columns["dice"].mean() == mean_dice(counts) == 0.5
    for name in ("dice b", "iou b", "hd95 b"):
        assert np.isnan(columns[name]).all()
    assert columns["hd95_undefined"].tolist() == [1, 2]
    assert columns["hd95"][0] == 1 and np.isnan(columns["hd95"][1])
    scores = evaluate.summarise(columns["hd95"], np.array(["x", "y"]))
    assert scores == {"mean": 1, "std": None, "low": None, "high": None, "n": 1}


def test_images_without_a_lesion(model, folder, tmp_path, monkeypatch, capsys):
    """Without any truth there is no Dice, and no file holds nan in its place; but it is said how
    much the model marks.
    """
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


def scored_cases(config, spec, part="test"):
    args = SimpleNamespace(part=part, limit=None, root="data", model="m.safetensors")
    return evaluate.cases_to_score(args, config, spec)


def test_training_images_are_left_out(folder, capsys):
    """They are known by their bytes. It is said how many; a part without others is refused."""
    spec = find(str(folder))
    test = spec.splits["test"]
    config = SDSegConfig(data="other", trained_on=image_hashes(test[:3] + spec.splits["val"]))
    assert scored_cases(config, spec) == test[3:]
    assert "left out 3 of 8 cases" in capsys.readouterr().out
    with pytest.raises(UserError, match="no case is left"):
        scored_cases(config, spec, "val")
    assert scored_cases(config, spec, "train") == spec.splits["train"]
    assert scored_cases(SDSegConfig(data="other"), spec) == test


def test_the_splits_of_older_models(real_data):
    """Files without hashes: the split of their time gives the images that they were trained on."""
    golden = {  # the number and a checksum of the names in the training parts of that time
        ("cvc", "random"): (488, 2755850068),
        ("kvasir", "random"): (800, 3456994143),
        ("cvc", "sequence"): (481, 1712585689),
    }
    for (name, split), expected in golden.items():
        hashes = evaluate.old_training_hashes(f"other+{name}", split, real_data)
        cases = sum(find(name, real_data).splits.values(), ())
        names = [c.name for c, digest in zip(cases, image_hashes(cases)) if digest in hashes]
        assert (len(names), zlib.crc32(" ".join(sorted(names)).encode())) == expected
    assert evaluate.old_training_hashes("cvc", "random", "nowhere") == set()


@pytest.mark.parametrize("data, split", [("cvc", "sequence"), ("kvasir", "random")])
def test_the_split_is_the_model_s_own(tmp_path, monkeypatch, data, split):
    """By default a model trained by video is scored by video, where the data set has videos."""

    def stop(data, root, split):
        raise UserError(split)

    monkeypatch.setattr(evaluate, "find", stop)
    model = save_tiny(tmp_path / "model.safetensors", data="kvasir+cvc", split="sequence")
    for flags, expected in (((), split), (("--split", "random"), "random")):
        with pytest.raises(UserError, match=expected):
            run("--data", data, "--model", model, "--out", tmp_path, *flags)


# ---- comparison with another run ----


def test_against_another_run(model, folder, tmp_path, monkeypatch, capsys):
    """Cases are paired by name; cases that only one run has are counted."""
    monkeypatch.setattr(evaluate, "segment_images", bright)
    other = tmp_path / "other.csv"
    other.write_text("case,dice\n0,0.5\n1,0.75\n2,\nx,0.1\n")
    flags = ("--data", folder, "--model", model, "--out", tmp_path / "out", "--against", other)
    against = run(*flags)[0]["against"]
    assert (against["mean"], against["n"], against["only_here"]) == (0.375, 2, 6)
    assert (against["low"], against["high"]) == (0.25, 0.5)
    assert "mean 0.3750, 95 % interval 0.2500 to 0.5000,\nover 2 cases" in capsys.readouterr().out
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a cases.csv"):
        run(*flags)


# ---- the command ----


def test_everything_is_written(model, folder, tmp_path, capsys):
    """All options at once: every file, and a summary that says how the numbers were made. Dice is
    that of each image's own mask at full size; the mean is over the cases.
    """
    flags = ("--data", folder, "--model", model, "--out", tmp_path, "--stability", 2, "--curve")
    summary, cases = run(*flags, "--limit", 3, "--precision", "fp32")
    names = {"cases.csv", "gallery.png", "curve.csv", "curve.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (summary["part"], summary["split"], summary["n"]) == ("test", "random", 3)
    assert len(summary["sha256"]) == 64 and summary["versions"]["torch"] == torch.__version__
    loaded, by_hand = SDSeg.load(model), []
    for name in (f"{case['case']}.png" for case in cases):
        image = np.asarray(Image.open(folder / "images" / name))
        truth = np.asarray(Image.open(folder / "masks" / name)) > 127
        prob = evaluate.segment_images(loaded, [image])[0]
        by_hand += [*dice(loaded.class_ids(prob).numpy(), truth)]
    # A network rounds differently in batches
    assert [float(case["dice"]) for case in cases] == pytest.approx(by_hand, abs=2e-3)
    scores, curve = summary["scores"]["dice"], rows(tmp_path / "curve.csv")
    assert scores["mean"] == pytest.approx(np.mean(by_hand), abs=2e-3)
    assert scores["std"] == pytest.approx(np.std(by_hand, ddof=1), abs=2e-3)
    assert [int(c["steps"]) for c in curve] == [1, 2, 3, 5, 10, 20, 50]
    assert float(curve[0]["dice"]) == pytest.approx(scores["mean"], abs=1e-6)
    output = capsys.readouterr().out
    assert "LPIPS" in output and "3 images in 3 groups" in output
    assert f"{scores['mean']:.4f}" in output


def test_refusals(model, folder, tmp_path, capsys):
    """One line and status 2: nothing to compare with, a negative count; other classes."""
    other = save_tiny(tmp_path / "other.safetensors", classes=("background", "cup", "disc"))
    with pytest.raises(UserError, match="segments background, cup, disc; discs has"):
        run("--data", folder, "--model", other, "--out", tmp_path / "out")
    for bad in (["--stability", "1"], ["--steps", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args(["--data", "cvc", "--model", "m", *bad])
        assert capsys.readouterr().err.count("\n") == 1


# ---- tools/stability.py ----


def test_similarity_by_hand():
    """Three runs are three pairs; both levels have one mean, over pairs and over cases. Pairs of
    identical images, here of the last case, have no finite PSNR and are counted.
    """
    runs = torch.rand(3, 3, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    runs[2] = runs[2, :1]
    similarity = Similarity(3, "cpu")
    for case, probs in enumerate(runs):  # (cases, N, C, H, W)
        similarity.add(case, list((probs[:, 0] > 0.5).numpy()), list(probs))
    summary = similarity.summary()
    for kind, images in (("probabilities", runs), ("masks", (runs > 0.5).float())):
        for f in (psnr, ssim, ms_ssim):
            pairs = [f(images[:, i], images[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
            pairs = torch.stack(pairs).double().numpy()
            pairs = pairs[:, :2] if f is psnr else pairs
            levels = summary[f"{f.__name__} of {kind}"]
            assert levels["data_set"] == pytest.approx(mean_std(pairs.mean(1)), rel=1e-4)
            assert levels["instance"] == pytest.approx(mean_std(pairs.mean(0)), rel=1e-4)
            assert (levels["pairs"], levels["left_out"]) == (9, 3 if f is psnr else 0)


def test_similarity_of_classes():
    """With several classes the channels are the foreground's; the background is not compared."""
    ids = [np.zeros((12, 12), np.uint8), np.full((12, 12), 2, np.uint8)]
    probs = [torch.eye(3)[torch.from_numpy(i).long()].permute(2, 0, 1) for i in ids]
    similarity = Similarity(1, "cpu")
    similarity.add(0, ids, probs)
    for kind in ("masks", "probabilities"):  # one of two channels differs by 1: mean square 1/2
        levels = similarity.summary()[f"psnr of {kind}"]
        assert levels["instance"]["mean"] == pytest.approx(10 * np.log10(2), abs=1e-5)


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
    assert (result["steps"], result["samples"], result["batch_size"]) == (10, 2, 4)
