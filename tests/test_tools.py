"""The other tools: an autoencoder that learns, a benchmark that compares, a figure, a report."""

import platform
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import disc_folder, save_tiny, slow, tiny
from PIL import Image

import train
from data import SegmentationData, find
from sdseg import PRESETS, SDSeg, SDSegConfig, class_colours, from_pretrained
from support.cli import UserError
from support.weights import DEFAULT_WEIGHTS, read_weights
from tools import benchmark, calibrate, evaluate, figures, plain_unet, train_vae
from tools import report as paper_report

CPU = torch.device("cpu")


# ---- train_vae ----


@pytest.fixture
def run_vae(tmp_path):
    """A function of flags: train on 20 small images -> config and weights."""
    folder, out = disc_folder(tmp_path / "own"), str(tmp_path / "vae.safetensors")
    fixed = ["--data", str(folder), "--size", "32", "--batch-size", "4", "--out", out]

    def run(*flags):
        train_vae.main(train_vae.parse_args([*fixed, "--precision", "fp32", *flags]))
        return read_weights(out, SDSegConfig)

    return run


def test_the_autoencoder_learns_and_another_run_goes_on(run_vae, tmp_path, capsys):
    """Masks come back; `--init` takes the weights unchanged, and train.py takes the file."""
    config, first = run_vae("--steps", "30", "--lr", "1e-2")
    assert float(re.search(r"Dice ([\d.]+)", capsys.readouterr().out)[1]) > 0.6
    assert (config.image_size, config.data) == (32, "own") and len(config.trained_on) == 12
    kept = str((tmp_path / "vae.safetensors").rename(tmp_path / "first.safetensors"))
    _, again = run_vae("--steps", "1", "--lr", "0", "--init", kept)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    model = from_pretrained(kept)
    for encoder in (model.vae.encoder, model.tau.encoder):
        assert torch.equal(encoder.conv_in.weight, first["vae.encoder.conv_in.weight"])


@pytest.mark.parametrize("flag, value, words", [
    ("--size", "50", "takes multiples of"), ("--out", "a.png", "ends in .safetensors"),
    ("--lr", "1e30", "not finite"), ("--batch-size", "6", "a multiple of 4"),
])  # fmt: skip
def test_an_autoencoder_that_cannot_be_trained_is_refused(run_vae, flag, value, words):
    """A size that the levels cannot halve, a wrong name, a loss that is not finite, no quarters."""
    with pytest.raises(UserError, match=words):
        run_vae("--steps", "2", flag, value)


def test_a_batch_holds_images_masks_and_drawn_maps(tmp_path):
    """A quarter, a quarter and a half; the masks and the maps are in the colours of classes."""
    data = SegmentationData(find(str(disc_folder(tmp_path / "own"))), "train", 64, "full")
    x, [(masks, classes), (maps, k)] = train_vae.ColourBatches(data, 2, [64, 32], 4)[1]
    assert x.shape == (8, 3, 32, 32) and len(x[:2].unique()) > 100
    assert torch.equal(x[2:4], class_colours(classes)[masks].permute(0, 3, 1, 2)) and classes == 2
    assert torch.equal(x[4:], class_colours(k)[maps].permute(0, 3, 1, 2)) and 2 <= k <= 14


@pytest.mark.parametrize("size", [128, pytest.param(256, marks=slow)])
def test_the_model_that_ships_rebuilds_drawn_maps(size):
    """Dice of the worst class of k, over 16 maps; weights/README.md has the numbers printed."""
    vae = from_pretrained(DEFAULT_WEIGHTS).vae
    for k, expected in {2: 0.97, 4: 0.96, 9: 0.82, 14: 0.80}.items():
        worst = train_vae.worst_class_dice(vae, k, size)
        print(f"{size} px, {k} classes: {worst:.3f}")  # `pytest -s` shows it
        assert worst > expected


# ---- calibrate ----


def test_a_threshold_is_chosen_on_validation_images(tmp_path, monkeypatch, capsys):
    """A model for which bright pixels are foreground marks noise beside the discs as well: a
    higher threshold ends these false alarms at little cost, and is stored with the model.
    """

    def brightness(model, images):
        return torch.tensor(np.stack(images)).float().mean(3)[:, None] / 170, None

    folder, file = disc_folder(tmp_path / "own"), save_tiny(tmp_path / "tiny.safetensors")
    out = str(tmp_path / "out.safetensors")
    monkeypatch.setattr(calibrate, "mean_and_std", brightness)
    calibrate.main(calibrate.parse_args(["--data", str(folder), "--model", file, "--out", out]))
    text = capsys.readouterr().out
    config = SDSeg.load(out).config
    assert config.threshold > 0.5 and f"stored: threshold {config.threshold}" in text
    before, after = (float(x) for x in re.findall(r"false alarms on ([\d.]+)%", text))
    assert after < before


def test_the_slices_of_a_volume_are_counted_together():
    """A threshold above all of a volume's probabilities: silence in empty slices is no gain."""
    mask = torch.zeros(8, 4, 4, dtype=torch.uint8)
    mask[0], free = 1, torch.zeros(1, 1, 4, 4)
    for threshold, expected in ((0.5, 1), (0.6, 0)):
        model = tiny(threshold=threshold)
        assert calibrate.measure(model, 0.55 * mask[:, None], mask, ["v"] * 8, free)[0] == expected


# ---- plain_unet ----


def test_a_plain_unet_trains_and_is_scored_as_ours(tmp_path, monkeypatch, capsys):
    """The same cases in the same cases.csv, so that `--against` compares both by image."""
    conv = SimpleNamespace(BasicUNet=lambda _, c, k, __: torch.nn.Conv2d(c, k, 3, padding=1))
    monkeypatch.setitem(sys.modules, "monai.networks.nets", conv)  # MONAI is optional
    folder, out = str(disc_folder(tmp_path / "own")), tmp_path / "run"
    flags = ["--data", folder, "--size", "32", "--steps", "2", "--batch-size", "2"]
    plain_unet.main(plain_unet.parse_args([*flags, "--score", folder, "--out", str(out)]))
    assert "validation Dice" in capsys.readouterr().out
    theirs = (out / "eval-own-test/cases.csv").read_text().splitlines()
    file = save_tiny(tmp_path / "tiny.safetensors")
    flags = ["--data", folder, "--model", file, "--out", str(tmp_path / "ours"), "--device", "cpu"]
    evaluate.main(evaluate.parse_args(flags))
    ours = (tmp_path / "ours/cases.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in ours] == [row.split(",")[0] for row in theirs]


# ---- benchmark ----


@pytest.fixture
def report(tmp_path, monkeypatch, drawn_once, capsys):
    """A function of flags: benchmarks a tiny model, with 8 demo images -> what it prints."""
    file, spec = save_tiny(tmp_path / "tiny.safetensors"), find("demo")
    few = replace(spec, splits={part: cases[:8] for part, cases in spec.splits.items()})
    monkeypatch.setattr(benchmark, "find", lambda name: few)
    monkeypatch.setitem(train.RECIPES, "nano", {**train.RECIPES["nano"], "batch_size": 2})

    def run(*flags):
        fixed = ["--model", file, "--device", "cpu", "--seconds", "0", "--batch-sizes", "1,2"]
        benchmark.main(benchmark.parse_args([*fixed, *flags]))
        return capsys.readouterr().out

    return run


def test_calls_take_turns_and_the_first_of_each_does_not_count(monkeypatch):
    """What is compared alternates, so that a busy moment slows both; warming up is not timed."""
    order, now = [], [0]

    def call(name, first, later):
        now[0] += later if name in order else first
        order.append(name)

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = {"a": lambda: call("a", 100, 1), "b": lambda: call("b", 2, 2)}
    assert benchmark.medians(calls, 0, CPU) == {"a": 1, "b": 2}
    assert "".join(order) == "ab" * 4


def test_the_benchmark_reports_rates_shares_and_ratios(report, monkeypatch):
    """Rates are batch / time, shares add up to 1, and compiled networks have rows with ratios."""
    compiled = []
    monkeypatch.setattr(benchmark, "compile_networks", lambda model, **_: compiled.append(model))
    text = report("--precision", "fp32", "--compile", "--train")
    assert "trained weights" in text and "float32" in text and torch.__version__ in text
    rows = re.findall(r"^ours, (1 step|10 steps) +([\d.]+) +([\d.]+)(.*)", text, re.M)
    assert [what for what, *_ in rows] == ["1 step", "10 steps"] * 2
    for (what, ms, rate, rest), n in zip(rows, (1, 1, 2, 2)):
        assert float(ms) * float(rate) == pytest.approx(1000 * n, rel=0.05)
        shares = [float(share) for share in re.findall(r"([\d.]+)%", rest)]
        assert what == "10 steps" or sum(shares) == pytest.approx(100, abs=0.2)
    assert len(re.findall(r"^peak memory \d+ MiB", text, re.M)) == 2
    assert len(re.findall(r"^share of our time .* tau \d+%, .*, all \d+%$", text, re.M)) == 2
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
    assert re.search(r"^compiled in \d+ s.* Dice 1.0000 .* 0.00000 on average", text, re.M)
    assert len(re.findall(r"^compiled, 1 step .* [\d.]+x the time of ours$", text, re.M)) == 2
    assert re.search(r"steps/s, peak memory \d+ MiB; [\d.]+x the time, compiled in \d+ s", text)
    assert len(re.findall(r"^loading takes [\d.]+% of the time", text, re.M)) == 2


def test_bfloat16_is_compared_with_float32(report, monkeypatch):
    """The masks nearly agree. Without the optional diffusers a line says so, and the rest runs."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it now fails
    text = report("--precision", "bf16", "--diffusers")
    found = re.search(r"Dice ([\d.]+) .* by ([\d.]+) on average, by ([\d.]+) at most", text)
    same, mean, largest = map(float, found.groups())
    assert 0 < mean < largest < 0.5 and 0.5 < same <= 1
    assert text.count("diffusers is not installed") == 1 and "batch 2" in text


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux forgets an earlier peak")
def test_the_peak_is_that_of_the_call():
    """A large tensor shows in the peak of the call that made it, and not in that of the next."""
    calls = (lambda: None, lambda: torch.ones(50 << 18), lambda: None)
    before, large, after = (int(benchmark.peak_of(call, CPU).split()[0]) for call in calls)
    assert large - before > 40 and after - before < 20


def test_diffusers_is_compared_with_networks_of_our_size(report):
    """The numbers of parameters are the same for SD v1, else within 6 %. Rows have ratios."""
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            ours, (vae, unet) = SDSeg(config), benchmark.diffusers_modules(config)
        count = [sum(p.numel() for p in m.parameters()) for m in (vae, unet, ours.vae, ours.unet)]
        assert count[0] == count[2]
        assert count[1] == pytest.approx(count[3], rel=0 if name == "sd-v1" else 0.06)
    text = report("--diffusers", "--precision", "bf16")
    rows = re.findall(r"^diffusers (\w+), 1 step .* [\d.]+x the time of ours$", text, re.M)
    assert rows == ["bfloat16", "float32"] * 2


def test_training_as_on_a_small_gpu_tells_the_average_apart(report):
    """The average waits in host memory; its time is told apart from the step's."""
    text = report("--precision=fp32", "--batch-sizes=", "--train", "--small-gpu")
    assert "training in float32, batch 2, AdamW, EMA, as on a GPU of 16 GB" in text
    assert re.search(r"^the average in host memory: [\d.]+ s every 5 steps, [\d.]+%", text, re.M)


# ---- figures ----


def test_the_figure_shows_the_image(tmp_path):
    """One's own, or by default a drawn one; it is never written over the image."""
    own, out = str(tmp_path / "image.png"), str(tmp_path / "docs/out.png")
    Image.new("RGB", (48, 40), (1, 99, 7)).save(own)
    fixed = ["--model", save_tiny(tmp_path / "tiny.safetensors"), "--device", "cpu", "--out"]
    figures.main(figures.parse_args([own, *fixed, out]))
    figure = np.asarray(Image.open(out))
    assert (figure == (1, 99, 7)).all(-1).sum() > 1000
    figures.main(figures.parse_args([*fixed, out]))
    assert Image.open(out).size == figure.shape[1::-1]
    with pytest.raises(UserError, match="is the image"):
        figures.main(figures.parse_args([own, *fixed, own]))


# ---- report ----


def test_the_report_puts_our_numbers_beside_the_papers(tmp_path):
    """Each row holds the paper's number, then ours; what was not measured is a dash."""
    mean = {"mean": 0.9, "low": 0.8, "high": 1.0}
    scored = {"n": 62, "unit": "image", "part": "test", "device": "a GPU", "sha256": "abc",
              "scores": {"dice": mean, "iou": mean},
              "stability": {"psnr of masks": {"instance": {"mean": None}},
                            "psnr of probabilities": {"instance": {"mean": 30.5}}}}  # fmt: skip
    speed = {"efficiency": [{"steps": 10, "images_per_second": 7.25}]}
    curve = {"curve": [{"steps": 1, "dice": 0.9}, {"steps": 10, "dice": 0.91}]}
    config = {"args": dict.fromkeys(paper_report.CHOICES, 4e-5),
              "model": {"data": "cvc", "preset": "sd-v1", "image_size": 256}}  # fmt: skip
    lines = paper_report.page(config, scored, speed, curve).splitlines()
    assert "| Dice | 0.958 | 0.9 | 0.8 to 1 |" in lines and "| lr | 4e-05 |" in lines
    assert "| 10 | 2.01 | 0.9209 | 7.25 | 0.91 |" in lines
    assert "| psnr | 27.63 | 31.55 | - | 30.5 |" in lines and "| Dice here | 0.9 | 0.91 |" in lines
    with pytest.raises(UserError, match="summary.json: missing"):
        paper_report.main(paper_report.parse_args([str(tmp_path)]))
