"""A trained model's scores: from hand-made predictions, and from a small model on small files."""

import csv
import json
import shutil
import zlib
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import disc_folder, save_tiny
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


def test_scores_are_those_of_the_masks_at_full_size(model, folder, tmp_path):
    """Dice is that of each image's own mask, whatever the batch; the mean is over the cases."""
    flags = ("--data", folder, "--model", model, "--limit", 5, "--precision", "fp32")
    summary, cases = run(*flags, "--out", tmp_path / "a", "--batch-size", 1)
    loaded, by_hand = SDSeg.load(model), []
    for case in cases:
        image = np.asarray(Image.open(folder / "images" / f"{case['case']}.png"))
        truth = np.asarray(Image.open(folder / "masks" / f"{case['case']}.png")) > 127
        prob = evaluate.segment_images(loaded, [image])[0]
        by_hand += [*dice(loaded.class_ids(prob).numpy(), truth)]
        assert float(case["dice"]) == pytest.approx(by_hand[-1], abs=1e-6)
    assert len(by_hand) == 5
    scores = summary["scores"]["dice"]
    assert scores["mean"] == pytest.approx(np.mean(by_hand))
    assert scores["std"] == pytest.approx(np.std(by_hand, ddof=1))
    _, again = run(*flags, "--out", tmp_path / "b", "--batch-size", 3)
    for a, b in zip(cases, again, strict=True):  # a batch may round otherwise
        assert float(a["dice"]) == pytest.approx(float(b["dice"]), abs=2e-3)


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
    nothing = evaluate.case_details(guess * 0, truth * 0, 2, (1, 1))
    assert nothing["lesions"] == nothing["false"] == nothing["marked"] == 0


def test_a_class_that_no_truth_holds_is_left_out():
    """Its columns are nan, and the means agree with the Dice that train.py validates with."""
    counts = np.array([[[2, 4, 4], [0, 0, 0]], [[1, 2, 2], [0, 3, 0]]])
    details = [{"hd95": [1.0, np.nan], "marked": 0.5}, {"hd95": [np.nan, np.nan], "marked": 0}]
    columns = evaluate.case_columns(counts, details, ("background", "a", "b"))
    assert columns["dice"].tolist() == columns["dice a"].tolist() == [0.5, 0.5]
    assert columns["dice"].mean() == mean_dice(counts) == 0.5
    for name in ("dice b", "iou b", "hd95 b"):
        assert np.isnan(columns[name]).all()
    assert columns["hd95"][0] == 1 and np.isnan(columns["hd95"][1])
    scores = evaluate.summarise(columns["hd95"], np.array(["x", "y"]))
    assert scores == {"mean": 1, "std": None, "low": None, "high": None, "n": 1}


def test_images_without_a_lesion(model, folder, tmp_path, monkeypatch, capsys):
    """Without any truth there is no Dice, but it is said how much the model marks."""
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    for path in (empty / "masks").iterdir():
        Image.new("L", (48, 40)).save(path)
    monkeypatch.setattr(evaluate, "segment_images", bright)
    summary, cases = run("--data", empty, "--model", model, "--out", tmp_path / "out", "--curve")
    assert summary["scores"]["dice"]["mean"] is None and cases[0]["dice"] == ""
    marked = np.mean([float(case["marked"]) for case in cases])
    output = capsys.readouterr().out
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
    for text, message in (("case,dice\nx,1\n", "none of the 8"), ("a,b\n1,2\n", "not a cases.csv")):
        other.write_text(text)
        with pytest.raises(UserError, match=message):
            run(*flags)


# ---- the command ----


def test_everything_is_written(model, folder, tmp_path, capsys):
    """All options at once: every file, and a summary that says how the numbers were made."""
    flags = ("--data", folder, "--model", model, "--out", tmp_path, "--stability", 2, "--curve")
    summary, cases = run(*flags, "--limit", 2, "--precision", "fp32")
    names = {"cases.csv", "gallery.png", "curve.csv", "curve.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (summary["part"], summary["split"], summary["n"]) == ("test", "random", 2)
    assert len(summary["sha256"]) == 64 and summary["versions"]["torch"] == torch.__version__
    curve = rows(tmp_path / "curve.csv")
    assert [int(c["steps"]) for c in curve] == [1, 2, 3, 5, 10, 20, 50]
    one_step = summary["scores"]["dice"]["mean"]
    assert float(curve[0]["dice"]) == pytest.approx(one_step, abs=1e-6)
    assert np.mean([float(case["dice"]) for case in cases]) == pytest.approx(one_step, abs=1e-6)
    output = capsys.readouterr().out
    assert "LPIPS" in output and "2 images in 2 groups" in output and f"{one_step:.4f}" in output


def test_refusals(model, folder, tmp_path, capsys):
    """One line and status 2: nothing to compare with, a negative count, other classes."""
    other = save_tiny(tmp_path / "other.safetensors", classes=("background", "cup", "disc"))
    with pytest.raises(UserError, match="segments background, cup, disc; discs has"):
        run("--data", folder, "--model", other, "--out", tmp_path / "out")
    for bad in (["--stability", "1"], ["--steps", "-1"], ["--part", "all"], ["--split", "val"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.parse_args(["--data", "cvc", "--model", "m", *bad])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- tools/stability.py ----


def test_identical_runs():
    """Runs that do not differ: SSIM 1, no finite PSNR, and all pairs counted as left out."""
    similarity = Similarity(2, "cpu")
    for case in range(2):
        mask = np.random.default_rng(case).integers(0, 2, (30, 40))
        similarity(case, [mask] * 3, [torch.from_numpy(mask[None])] * 3)
    summary = similarity.summary()
    for kind in Similarity.kinds:
        psnr_of = summary[f"psnr of {kind}"]
        assert psnr_of["data_set"] == {"mean": None, "std": None}
        assert (psnr_of["pairs"], psnr_of["left_out"]) == (6, 6)
        for name in ("ssim", "ms_ssim"):
            for level in ("data_set", "instance"):
                expected = pytest.approx({"mean": 1, "std": 0}, abs=1e-6)
                assert summary[f"{name} of {kind}"][level] == expected


def test_similarity_by_hand():
    """Three runs are three pairs; both levels have one mean, over pairs and over cases."""
    runs = torch.rand(2, 3, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    similarity = Similarity(2, "cpu")
    for case, probs in enumerate(runs):  # (cases, N, C, H, W)
        similarity(case, list((probs[:, 0] > 0.5).numpy()), list(probs))
    for kind, images in (("probabilities", runs), ("masks", (runs > 0.5).float())):
        for f in (psnr, ssim, ms_ssim):
            pairs = [f(images[:, i], images[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
            pairs = torch.stack(pairs).double().numpy()
            levels = similarity.summary()[f"{f.__name__} of {kind}"]
            assert levels["data_set"] == pytest.approx(mean_std(pairs.mean(1)), rel=1e-4)
            assert levels["instance"] == pytest.approx(mean_std(pairs.mean(0)), rel=1e-4)


def test_similarity_of_classes():
    """With several classes the channels are the foreground's; the background is not compared."""
    ids = [np.zeros((12, 12), np.uint8), np.full((12, 12), 2, np.uint8)]
    probs = [torch.eye(3)[torch.from_numpy(i).long()].permute(2, 0, 1) for i in ids]
    similarity = Similarity(1, "cpu")
    similarity(0, ids, probs)
    for kind in Similarity.kinds:  # one of two channels differs by 1: mean square 1/2
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
