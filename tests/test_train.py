"""Training: learns, resumes to the bit, survives signals, and splits over processes."""

import copy
import csv
import functools
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from common import Refusal
from data import SegmentationData, find
from sdseg import Loss, SDSeg, SDSegConfig
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).parent.parent
TINY = SDSegConfig(
    "nano",
    VAEConfig(32, (1, 1, 1, 1), 1),
    UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    prediction="x0",
    image_size=32,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of 20 pictures with a bright disc each, and a tiny model to start from."""
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for folder in ("images", "masks"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for i in range(20):
        disc = (y - rng.integers(10, 30)) ** 2 + (x - rng.integers(10, 38)) ** 2 < 80
        picture = rng.integers(0, 120, (40, 48, 3)) + 120 * disc[..., None]
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "own/images" / f"{i}.png")
        Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / "own/masks" / f"{i}.png")
    SDSeg(TINY).save(tmp_path / "tiny.safetensors")
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def arguments(place, name, *more, steps=6):
    return [
        *("--data", str(place / "own"), "--init", str(place / "tiny.safetensors")),
        *("--out", str(place / name), "--steps", str(steps), "--batch-size", "4"),
        *("--eval-every", "3", "--log-every", "2", "--precision", "fp32", "--device", "cpu"),
        *more,
    ]


def run(place, name, *more, **options):
    return train.main(train.parse(arguments(place, name, *more, **options)))


def state(folder):
    return torch.load(folder / "resume.pt", weights_only=True)


def same(a, b):
    return all(
        torch.equal(p, q)
        for key in ("trained", "average")
        for p, q in zip(a[key], b[key], strict=True)
    )


def test_a_run_leaves_what_it_promises(place):
    """model, resume, log, samples, config: each is there, whole, and loads."""
    assert run(place, "run") is None
    model = SDSeg.load(place / "run/model.safetensors")
    assert model.config.classes == ("background", "foreground") and model.config.data == "own"
    assert model.config.mask_scale != TINY.mask_scale
    rows = list(csv.DictReader((place / "run/log.csv").open()))
    assert [r["step"] for r in rows] == ["2", "3", "4", "6", "6"]
    assert Image.open(place / "run/samples/000006.png").size == (32 * 4, 32 * 2)
    assert json.loads((place / "run/config.json").read_text())["args"]["steps"] == 6
    assert not [p for p in (place / "run").iterdir() if p.name.startswith(".tmp")]


def test_what_is_saved_is_the_average(place):
    """model.safetensors holds the averaged tau and U-Net, and the frozen autoencoder untouched."""
    run(place, "run", "--eval-every", "6")
    model = SDSeg.load(place / "run/model.safetensors")
    trained = [p for n, p in model.named_parameters() if not n.startswith("vae.")]
    for p, q in zip(trained, state(place / "run")["average"], strict=True):
        assert torch.equal(p, q)
    start = SDSeg.load(place / "tiny.safetensors")
    for p, q in zip(model.vae.parameters(), start.vae.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resume_is_exact(place, monkeypatch):
    """SIGTERM after a step saves and returns 143; the resumed run ends with the same bits."""
    run(place, "whole")
    update = train.Average.update

    def stop_at_3(self, step):
        update(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Average, "update", stop_at_3)
    assert run(place, "parts") == 128 + signal.SIGTERM
    monkeypatch.setattr(train.Average, "update", update)
    assert state(place / "parts")["step"] == 4
    train.main(train.parse(["--resume", str(place / "parts"), "--device", "cpu"]))
    assert same(state(place / "whole"), state(place / "parts"))
    steps = [r["step"] for r in csv.DictReader((place / "parts/log.csv").open())]
    assert steps == sorted(steps, key=int) and steps[-1] == "6"


def test_a_signal_to_all_its_processes_stops_a_run_in_order(place):
    """Ctrl-C and SLURM signal those that load data too: the run saves all the same."""
    command = [sys.executable, "train.py", *arguments(place, "run", "--workers", "2", steps=10**6)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE
    ) as process:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("step"))
        os.killpg(process.pid, signal.SIGTERM)
        text = "".join(lines)
    assert process.returncode == 128 + signal.SIGTERM
    assert text.count("stopping after this step") == 1 and "validation Dice" in text
    assert (place / "run" / "resume.pt").exists()


def test_the_round_trip_of_masks_is_told(place, monkeypatch, capsys):
    """Dice 1 where decoding undoes encoding, 0 where it loses the mask; a run prints it."""
    told = r"rebuilds masks with Dice (\d\.\d{3})"
    monkeypatch.setattr(SDSeg, "encode_mask", SDSeg.paint)
    for sign in (1, -1):
        monkeypatch.setattr(SDSeg, "decode_mask", lambda self, z, sign=sign: sign * z)
        model = SDSeg(TINY)
        data = SegmentationData(find(str(place / "own")), "val", 32)
        assert train.round_trip(model, data) == (sign == 1)
    monkeypatch.undo()
    run(place, "run")
    assert 0 <= float(re.search(told, capsys.readouterr().out)[1]) <= 1


def test_volumes_are_validated_whole():
    """As evaluate.py scores them: the slices of a volume together, an empty one is no Dice of 1."""
    truth, found = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    truth[0, :2], found[0, :1] = 1, 1  # half of it
    truth[2, :1] = found[2, :1] = 1  # slice 1 is empty

    class Slices(list):
        cases = ["a", "a", "b"]

        def batch(self, samples):
            chosen = [i for _, i in samples]
            return {"image": found[chosen], "mask": truth[chosen]}

    model = SimpleNamespace(segment=lambda image, generator: image[:, None].float())
    for batch_size in (1, 16):
        score = train.validate(
            model, Slices(range(3)), torch.device("cpu"), nullcontext, batch_size
        )
        assert score == pytest.approx((2 / 3 + 1) / 2)


def test_a_compiled_run_is_the_same_run(place, monkeypatch):
    """--compile runs every step through the compiled networks, and no validation; same bits as
    its memory format gives without, and the losses of a plain run.
    """
    run(place, "plain")
    calls = []

    def backend(graph, examples):
        def network(*inputs):
            calls.append(graph)
            return graph(*inputs)

        return network

    torch.compiler.reset()  # its cache is the process's
    compile_with = SDSeg.compile
    monkeypatch.setattr(SDSeg, "compile", lambda self, mode: None)
    run(place, "laid out", "--compile")
    monkeypatch.setattr(SDSeg, "compile", lambda self, mode: compile_with(self, backend=backend))
    run(place, "compiled", "--compile")
    assert len(calls) == 3 * 6  # networks, steps
    assert same(state(place / "laid out"), state(place / "compiled"))
    logs = [csv.DictReader((place / name / "log.csv").open()) for name in ("plain", "compiled")]
    plain, compiled = ([float(r["loss"]) for r in log if r["loss"]] for log in logs)
    assert len(plain) == 3 and compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("error, advice", [
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size 2"),
    (RuntimeError("No working C++ compiler found"), "without it"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line(place, monkeypatch, error, advice):
    """Too little memory, and no compiler for --compile; any other error stays what it is."""
    args = train.parse(arguments(place, "run", "--compile"))

    def fail(args):
        raise error

    monkeypatch.setattr(train, "main", fail)
    with pytest.raises(Refusal, match=advice):
        train.main_or_refusal(args)
    for words in ("shapes differ", "an illegal memory access was encountered"):
        error = RuntimeError(words)
        with pytest.raises(RuntimeError, match=words):
            train.main_or_refusal(args)


def test_a_run_may_be_moved_and_copied(place):
    """--resume works in the folder it is given, keeps what the run began with, touches no other."""
    run(place, "first", "--latent-weight", "0", "--mask-weight", "0", "--last", "0")
    before = {p: p.read_bytes() for p in (place / "first").rglob("*.*")}
    shutil.copytree(place / "first", place / "second")
    flags = ["--steps", "8", "--root", "elsewhere", "--workers", "0", "--device", "cpu"]
    train.main(train.parse(["--resume", str(place / "second"), *flags]))
    assert state(place / "second")["step"] == 8
    assert {p: p.read_bytes() for p in (place / "first").rglob("*.*")} == before
    first, second = (
        json.loads((place / name / "config.json").read_text()) for name in ("first", "second")
    )
    second_place = str(place / "second")
    changed = {"steps": 8, "root": "elsewhere", "workers": 0}
    changed |= {"out": second_place, "resume": second_place}
    assert second["args"] == first["args"] | changed


def test_a_signal_saves_before_it_validates(place, monkeypatch):
    """torchrun kills after 30 seconds: a first validation that never ends loses no step, but one
    that was due anyway is not passed over.
    """
    run(place, "whole")
    update = train.Average.update

    def signal_at(last, self, step):
        update(self, step)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    def endless(*args):
        raise MemoryError("as if killed")

    for name, last in (("between", 1), ("due", 2)):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(train.Average, "update", lambda *a, last=last: signal_at(last, *a))
            patch.setattr(train, "validate", endless)
            run(place, name)
        assert not (place / name / "model.safetensors").exists()
    assert not (place / "due/resume.pt").exists() and state(place / "between")["step"] == 2
    train.main(train.parse(["--resume", str(place / "between"), "--device", "cpu"]))
    assert same(state(place / "whole"), state(place / "between"))


def test_a_full_disk_is_one_line_and_leaves_no_piece(place):
    """Where resume.pt cannot be written whole, the one before it stays."""
    resource = pytest.importorskip("resource")
    run(place, "run", steps=2)
    before, limit = state(place / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # a file's size, like a disk's
    try:
        p = [torch.nn.Parameter(torch.zeros(100_000))]
        parts = train.Average(p, 0.9), torch.optim.AdamW(p)
        with pytest.raises(Refusal, match="disk full"):
            train.save_state(place / "run", 3, 0.5, "key", p, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert same(state(place / "run"), before) and state(place / "run")["step"] == 2
    assert not [x for x in (place / "run").iterdir() if x.name.startswith(".tmp")]


def test_a_damaged_state_is_refused(place):
    """What PyTorch would broadcast, or crash on, is one line."""
    run(place, "run", steps=2)
    whole = state(place / "run")
    for value, *keys in (
        (torch.tensor(1.0), "trained", 3), (float("inf"), "step"), (-3, "step"),
        (None, "optimiser"), ([], "optimiser", "state"),
        (torch.zeros(2), "optimiser", "state", 0, "exp_avg"),
    ):  # fmt: skip
        content = copy.deepcopy(whole)
        functools.reduce(operator.getitem, keys[:-1], content)[keys[-1]] = value
        torch.save(content, place / "run/resume.pt")
        with pytest.raises(Refusal, match="does not fit"):
            train.main(train.parse(["--resume", str(place / "run"), "--device", "cpu"]))


@pytest.mark.parametrize("text", [
    "[" * 10**5, '{"args": [1]}', '{"args": {}}', '{"args": {"data": "demo"}}',
    '{"args": {"data": "demo", "seed": -5}}', '{"args": {"data": "demo", "nonsense": 1}}',
])  # fmt: skip
def test_damaged_settings_are_refused(place, text):
    """config.json is read as a command line is: unknown, missing and impossible settings."""
    (place / "config.json").write_text(text)
    with pytest.raises((Refusal, SystemExit)) as error:
        train.main(train.parse(["--resume", str(place)]))
    assert getattr(error.value, "code", 2) == 2


def test_every_process_gets_an_image(place, monkeypatch):
    """The recipe's batch is rounded up to torchrun's processes; the user's own is refused."""
    monkeypatch.setenv("WORLD_SIZE", "5")
    flags = ["--data", "demo", "--init", str(place / "tiny.safetensors"), "--out", str(place)]
    args = train.parse(flags)
    train.settings(args)
    assert args.batch_size == 20  # nano has 16
    args = train.parse([*flags, "--batch-size", "4"])
    train.settings(args)
    assert args.batch_size == 4


def test_other_splits_of_cvc_are_told(place, capsys, monkeypatch):
    """Weights that learned from one split have seen what the other holds out."""
    model = SDSeg.load(place / "tiny.safetensors")
    model.config = replace(model.config, data="cvc", split="sequence")
    model.save(place / "seen.safetensors")
    for path in (place / "own").rglob("*.png"):  # a video each
        path.rename(path.with_name(f"frame {30 * int(path.stem)}.png"))
    (place / "own").rename(place / "CVC-ClinicDB")
    for split, told in (("random", True), ("sequence", False)):
        flags = ["--data", "cvc", "--root", str(place), "--split", split]
        flags += ["--init", str(place / "seen.safetensors")]
        run(place, split, *flags, steps=1)
        assert ("beware" in capsys.readouterr().out) == told
        assert SDSeg.load(place / split / "model.safetensors").config.split == split


def test_a_killed_run_goes_on_from_its_last_save(place, monkeypatch):
    """Death between saves loses the steps since the last one, and the end is the same bits."""
    run(place, "whole")
    update = train.Average.update

    def die_at_5(self, step):
        update(self, step)
        if step == 5:
            raise MemoryError("as if killed")

    monkeypatch.setattr(train.Average, "update", die_at_5)
    with pytest.raises(MemoryError):
        run(place, "parts")
    monkeypatch.setattr(train.Average, "update", update)
    assert state(place / "parts")["step"] == 3
    train.main(train.parse(["--resume", str(place / "parts"), "--device", "cpu"]))
    assert same(state(place / "whole"), state(place / "parts"))


def test_a_non_finite_step_is_skipped(place, monkeypatch):
    """A NaN loss changes nothing; only NaN losses stop the run in one line."""
    bad = {1}
    loss = SDSeg.loss

    def sometimes(self, *args, **kwargs):
        out = loss(self, *args, **kwargs)
        sometimes.calls += 1
        return out._replace(total=out.total * float("nan")) if sometimes.calls - 1 in bad else out

    sometimes.calls = 0
    monkeypatch.setattr(SDSeg, "forward", sometimes)
    monkeypatch.setattr(SDSeg, "__call__", sometimes, raising=False)
    run(place, "run")
    assert all(p.isfinite().all() for p in state(place / "run")["trained"])
    rows = list(csv.DictReader((place / "run/log.csv").open()))
    assert [r["skipped"] for r in rows if r["skipped"]] == ["1", "0", "0"]
    bad.update(range(100))
    with pytest.raises(Refusal, match="not finite"):
        run(place, "bad")


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_gradients_are_clipped_to_norm_one(size):
    """Two steps inside the optimiser equal two with clip_grad_norm_; small gradients stay."""
    runs = []
    for inside in (True, False):
        torch.manual_seed(0)
        p = [torch.nn.Parameter(torch.randn(n)) for n in (5, 70)]
        optimiser = torch.optim.AdamW(p, eps=1.0, fused=True)  # lets a gradient's size show
        watch = train.Watch(optimiser, torch.device("cpu"))
        zero = torch.zeros(())
        for _ in range(2):
            for x in p:
                x.grad = size * torch.randn_like(x)
            if inside:
                watch.step(Loss(zero, zero, zero, zero, torch.zeros(2)))
            else:
                torch.nn.utils.clip_grad_norm_(p, 1.0)
            optimiser.step()
        runs.append(p)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_two_processes_take_the_step_of_one(place):
    """torchrun with two processes and half the batch each ends where one process ends."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    flags = arguments(place, "two", "--mask-weight", "1", steps=3)
    done = subprocess.run(
        [*torchrun, "--master_port=29611", str(ROOT / "train.py"), *flags],
        capture_output=True, text=True, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run(place, "one", "--mask-weight", "1", steps=3)
    for p, q in zip(state(place / "one")["trained"], state(place / "two")["trained"]):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("augment", [None, "flip", "full"])
def test_mask_latents_are_encoded_once(place, augment, monkeypatch):
    """z_0 looked up by item and flip is that of the mask at hand; new masks have no look-up."""
    model = SDSeg(TINY).eval()
    data = SegmentationData(find(str(place / "own")), "train", 32, augment, seed=0)
    latents, encoded, encode = train.MaskLatents(model), [], model.encode_mask
    monkeypatch.setattr(model, "encode_mask", lambda m: encoded.append(len(m)) or encode(m))
    for epoch in range(12):
        samples = [(epoch, i) for i in range(len(data))]
        mask, views = data.batch(samples)["mask"], data.views(samples)
        z_0 = latents(mask, views)
        if augment == "full":
            assert views is None and z_0 is None
        else:
            torch.testing.assert_close(z_0, encode(mask))
    most = {None: 1, "flip": 8, "full": 0}[augment] * len(data)
    assert most / 2 <= sum(encoded) <= most < 12 * len(data)


@pytest.mark.parametrize("augment, most", [("none", 16), ("flip", 16 * 8)])
def test_a_run_knows_the_masks_it_has_seen(place, augment, most, monkeypatch):
    """Through the loader, too: 48 steps of 4 over 16 items encode no view of a mask twice, and
    `round_trip` the 2 masks of validation.
    """
    encoded, encode = [], SDSeg.encode_mask
    monkeypatch.setattr(SDSeg, "encode_mask", lambda m, x: encoded.append(len(x)) or encode(m, x))
    cheap = ["--freeze-encoder", "--mask-weight", "0", "--eval-every", "48"]
    run(place, "run", "--augment", augment, *cheap, steps=48)
    assert most / 2 <= sum(encoded) - 2 <= most


def test_refusals(place):
    """What cannot be done is said in one line before anything is trained."""
    run(place, "run", steps=2)
    cases = {
        "holds a run already": arguments(place, "run"),
        "no such file": arguments(place, "x", "--init", str(place / "none.safetensors")),
        "config.json": ["--resume", str(place / "nothing")],
        "nowhere": ["--data", str(place / "nowhere"), "--init", str(place / "tiny.safetensors")],
        "24 px; this network takes multiples of 16": arguments(place, "x", "--size", "24"),
    }
    for words, flags in cases.items():
        with pytest.raises(Refusal, match=words) as error:
            train.main(train.parse(flags))
        assert "\n" not in str(error.value)
    (place / "run/resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(Refusal, match="cannot be resumed"):
        train.main(train.parse(["--resume", str(place / "run"), "--device", "cpu"]))


@pytest.mark.parametrize(
    "flag, value",
    [("steps", "0"), ("eval-every", "0"), ("batch-size", "-1"), ("workers", "-1"), ("seed", "-1"),
     ("lr", "nan"), ("lr", "inf"), ("ema", "1.5"), ("last", "2"), ("seed", "9" * 400)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(flag, value, capsys):
    """By the command line, in one line, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        train.parse(["--data", "demo", f"--{flag}", value])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument --{flag}: {value} is not " in said
    assert said.count("\n") == 1


def test_a_changed_data_set_is_noticed(place):
    """Resuming on other pictures than the run began with is refused."""
    run(place, "run", steps=2)
    (place / "own/images/3.png").unlink()
    (place / "own/masks/3.png").unlink()
    before = (place / "run/config.json").read_text()
    flags = ["--root", "elsewhere", "--device", "cpu"]
    with pytest.raises(Refusal, match="data set"):
        train.main(train.parse(["--resume", str(place / "run"), *flags]))
    assert (place / "run/config.json").read_text() == before


def test_the_average_covers_and_swaps():
    """swap exchanges weights and averages; twice is nothing; a constant stays itself."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = train.Average([p], 0.9)
    with torch.no_grad():
        p.add_(1)
    average.update(step=10**6)
    torch.testing.assert_close(average.mean[0], torch.tensor([1.1, 2.1]))
    average.swap()
    torch.testing.assert_close(p.detach(), torch.tensor([1.1, 2.1]))
    average.swap()
    assert p.tolist() == [2.0, 3.0]
