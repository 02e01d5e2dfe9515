"""The benchmark: medians of calls in turn, shares that add up, and a report that keeps its form."""

import platform
import re
import sys
import time
from dataclasses import replace

import pytest
import torch

import benchmark
from common import Refusal
from data import find
from sdseg import PRESETS, SDSeg, SDSegConfig
from unet import UNetConfig
from vae import VAEConfig

pytestmark = pytest.mark.usefixtures("drawn_once")
CPU = torch.device("cpu")
TINY = SDSegConfig(
    "nano",
    VAEConfig(32, (1, 1, 1, 1), 1),
    UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    prediction="x0",
    image_size=32,
)


@pytest.fixture(autouse=True)
def few_drawings(monkeypatch):
    """Loading is timed on 8 drawn pictures: to draw all 60 takes longer than what is tested."""
    found = find("demo")
    few = replace(found, parts={part: cases[:8] for part, cases in found.parts.items()})
    monkeypatch.setattr(benchmark, "find", lambda name: few)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SDSeg(TINY).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """The small random model's file."""
    path = tmp_path_factory.mktemp("benchmark") / "tiny.safetensors"
    model.save(path)
    return path


def report(file, *more):
    flags = ["--model", str(file), "--device", "cpu", "--seconds", "0", "--batch-sizes", "1,2"]
    benchmark.main(benchmark.parse([*flags, *more]))


def test_calls_take_turns_and_the_first_of_each_does_not_count():
    """Rivals alternate, so that a busy moment falls on both, and warming up is not timed."""
    order = []

    def slow_at_first():
        time.sleep(0 if "a" in order else 0.5)
        order.append("a")

    times = benchmark.medians({"a": slow_at_first, "b": lambda: order.append("b")}, 0, CPU)
    assert "".join(order) == "ab" * 4
    assert times["a"] < 0.25


def test_the_shares_are_of_the_whole(model):
    """tau, U-Net and decoder each take some of the time, and together all of it."""
    times = benchmark.inference({"ours": model, "twin": model}, 2, 0, CPU)
    assert set(times) == {
        *((name, what) for name in ("ours", "twin") for what in ("1 step", *benchmark.PARTS)),
        ("ours", "10 steps"),
    }
    for name in ("ours", "twin"):
        shares = benchmark.shares(times, name)
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0


def test_the_report(file, capsys):
    """A block for each batch size, then training: rates are batch over time, all is there."""
    report(file, "--precision", "fp32", "--train")
    text = capsys.readouterr().out
    assert "trained weights" in text and "fp32" in text and torch.__version__ in text
    assert [int(n) for n in re.findall(r"^batch (\d+)", text, re.M)] == [1, 2]
    rows = re.findall(r"^ours, (1 step|10 steps) +([\d.]+) +([\d.]+)(.*)", text, re.M)
    assert [what for what, *_ in rows] == ["1 step", "10 steps"] * 2
    for (what, ms, rate, rest), n in zip(rows, (1, 1, 2, 2)):
        assert float(ms) * float(rate) == pytest.approx(1000 * n, rel=0.05)
        shares = [float(share) for share in re.findall(r"([\d.]+)%", rest)]
        assert what == "10 steps" or sum(shares) == pytest.approx(100, abs=0.2)
    assert len(re.findall(r"^peak memory \d+ MiB", text, re.M)) == 2
    assert re.search(r"^training, .* steps/s in fp32; peak \d+ MiB", text, re.M)
    assert re.search(r"^loading a batch takes one process [\d.]+ ms, [\d.]+% of a step", text, re.M)


def test_lower_precision_is_compared_with_the_same_pictures_in_float32(file):
    """float32 against itself differs by nothing; bfloat16 differs a little, in the scores first."""
    exact, again, rough = (
        benchmark.scores_of_drawn(SDSeg.load(file, precision=precision))
        for precision in ("fp32", "fp32", "bf16")
    )
    assert benchmark.difference(again, exact) == (1, 0, 0)
    same, mean, most = benchmark.difference(rough, exact)
    assert 0 < mean < most < 0.5
    assert 0 <= same <= 1


def test_compiled_networks_have_rows_of_their_own(file, capsys, monkeypatch):
    """--compile: what it took, that it changed nothing, and how a compiled copy compares."""
    made = []
    monkeypatch.setattr(SDSeg, "compile", lambda self, mode, **_: made.append((self, mode)))
    report(file, "--precision", "fp32", "--compile", "--train")
    text = capsys.readouterr().out
    assert [mode for _, mode in made] == ["reduce-overhead"] * 2 and made[0][0] != made[1][0]
    assert re.search(r"^compiled in \d+ s .* Dice 1.0000 .* 0.00000 on average", text, re.M)
    assert len(re.findall(r"^compiled, 1 step .* [\d.]+ times ours", text, re.M)) == 2
    assert re.search(r"^training, .* steps/s in fp32, .* steps/s in fp32, compiled;", text, re.M)


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux forgets an earlier peak")
def test_the_peak_is_that_of_the_call():
    """A large tensor shows in the peak of the call that made it and not in the next one's."""
    quiet = int(benchmark.peak_of(lambda: None, CPU))
    assert int(benchmark.peak_of(lambda: torch.ones(50 << 18), CPU)) - quiet > 40
    assert int(benchmark.peak_of(lambda: None, CPU)) - quiet < 20


def test_training_takes_the_steps_of_train(model):
    """The step that is timed learns: the weights move, the frozen autoencoder stays."""
    steps = []
    original = benchmark.SDSeg

    class Kept(original):
        def __init__(self, config):
            super().__init__(config)
            steps.append(self)

    benchmark.SDSeg = Kept
    try:
        step = benchmark.training_step(TINY, {**benchmark.train.NANO, "batch_size": 2}, CPU)
    finally:
        benchmark.SDSeg = original
    before = {k: v.clone() for k, v in steps[0].state_dict().items()}
    step(False)
    changed = {k.split(".")[0] for k, v in steps[0].state_dict().items() if (v != before[k]).any()}
    assert changed == {"tau", "unet"}


def test_without_diffusers_one_line_says_so(file, capsys, monkeypatch):
    """The comparison is optional: without the package the rest is measured all the same."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # so importing it fails
    report(file, "--diffusers")
    lines = [line for line in capsys.readouterr().out.splitlines() if "diffusers" in line]
    assert len(lines) == 1 and "not installed" in lines[0]


def test_the_modules_compared_are_of_our_size():
    """diffusers' networks have our numbers of parameters: exactly for SD v1, else within 6 %."""
    pytest.importorskip("diffusers", reason="diffusers is not installed; it is optional")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            own, (vae, unet) = SDSeg(config), benchmark.their_modules(config)
        count = [sum(p.numel() for p in m.parameters()) for m in (vae, unet, own.vae, own.unet)]
        assert count[0] == count[2]
        assert count[1] == pytest.approx(count[3], rel=0 if name == "sd-v1" else 0.06)


def test_diffusers_modules_run_in_our_sampler(file, capsys):
    """With the package, its rows say how many times as long its modules take."""
    pytest.importorskip("diffusers", reason="diffusers is not installed; it is optional")
    report(file, "--diffusers", "--precision", "bf16")
    text = capsys.readouterr().out
    rows = re.findall(r"^diffusers (fp32|bf16), 1 step .* ([\d.]+) times ours", text, re.M)
    assert [kind for kind, _ in rows] == ["fp32", "bf16"] * 2


@pytest.mark.parametrize("flags", [["--batch-sizes", "0"], ["--batch-sizes", "1,x"], ["--presets"]])
def test_wrong_flags_are_one_line(flags, capsys):
    """A wrong flag ends with status 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        benchmark.parse(flags)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_model_and_too_little_memory_are_refused(tmp_path, monkeypatch):
    """What a user can mend is a Refusal: no such file, and a device that is too small."""
    args = benchmark.parse(["--model", str(tmp_path / "none.safetensors"), "--device", "cpu"])
    with pytest.raises(Refusal, match="no such file"):
        benchmark.main(args)

    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for error in (torch.OutOfMemoryError(), cpu, MemoryError()):

        def full(args, error=error):
            raise error

        monkeypatch.setattr(benchmark, "measure", full)
        with pytest.raises(Refusal, match="batch-sizes"):
            benchmark.main(args)
