"""Training: the losses, a run's files, exact resume, signals, several processes, refusals."""

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
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, disc_folder, tiny
from PIL import Image

import train
from data import SegmentationData, find
from sdseg import SDSeg, T
from support import run_state
from support.cache import LatentCache
from support.cli import UserError, advice, run_command
from support.folders import image_hashes
from support.metrics import vae_dice


@pytest.fixture
def place(tmp_path):
    """A folder of 20 images with a bright disc each, and a tiny model to start from."""
    torch.use_deterministic_algorithms(True)
    disc_folder(tmp_path / "own")
    tiny().save(tmp_path / "tiny.safetensors")
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def arguments(place, name, *more, steps=6):
    return [
        *("--data", str(place / "own"), "--init", str(place / "tiny.safetensors")),
        *("--out", str(place / name), "--steps", str(steps), "--batch-size", "4"),
        *("--eval-every", "3", "--log-every", "2", "--precision", "fp32", *more),
    ]


def run(place, name, *more, **options):
    return train.main(train.parse_args(arguments(place, name, *more, **options)))


def resume(folder, *more):
    return train.main(train.parse_args(["--resume", str(folder), *more]))


def state(folder):
    return torch.load(folder / "resume.pt", weights_only=True)


def same(a, b):
    """Do two states hold the same bits?"""
    return all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])


def at_step(monkeypatch, number, action):
    """Call `action` after the optimiser's step `number`."""
    update = train.update_ema

    def patched(averages, trained, step, decay):
        update(averages, trained, step, decay)
        if step == number:
            action()

    monkeypatch.setattr(train, "update_ema", patched)


def rows(folder):
    return list(csv.DictReader((folder / "log.csv").open()))


# ---- the parts of a step ----


def test_t_and_noise():
    """t is uniform; `terminal_fraction` 0.75 puts three of four samples at T - 1, evenly, in every
    part of a batch and over batches of one.
    """
    draw, seed = train.sample_t_and_noise, torch.Generator().manual_seed(0)
    t, noise = draw(16, (4, 2, 2), seed, terminal_fraction=0.75)
    assert all((part == T - 1).sum() >= 3 for part in t.view(4, 4))
    assert noise.shape == (16, 4, 2, 2)
    alone = [draw(1, (1, 1, 1), None, 0.75, first=i)[0].item() for i in range(400)]
    assert 300 <= alone.count(T - 1) <= 303
    t, _ = draw(4000, (1, 1, 1), seed)
    assert t.min() < 5 and t.max() > 994 and abs(t.float().mean() - 499.5) < 20


def test_only_tau_and_unet_learn():
    """Eq. 3 and the decoded-mask loss reach tau and the U-Net; the autoencoder stays frozen."""
    model, mask = tiny(), torch.randint(0, 2, (2, 32, 32))
    z_0, t = model.encode_mask(mask), torch.tensor([T - 1, 300])
    out = model(torch.rand(2, 3, 32, 32), z_0, t, torch.randn_like(z_0))
    mask_loss = train.decoded_mask_loss(model, out.z_0_estimate, mask, t)
    (out.noise_loss.mean() + out.latent_loss.mean() + mask_loss).backward()
    assert all(p.grad is None for p in model.vae.parameters())
    for part in (model.tau, model.unet):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


def test_the_decoded_mask_loss():
    """0 without samples at T - 1; small for the mask's own colours, large for the opposite ones."""
    model, mask = tiny(), torch.randint(0, 2, (2, 32, 32))
    model.decode_mask = lambda rgb: rgb
    right, end = model.labels_to_rgb(mask), torch.tensor([T - 1, T - 1])
    loss = functools.partial(train.decoded_mask_loss, model, mask=mask)
    assert loss(right, t=torch.tensor([5, 998])) == 0
    assert loss(right, t=end) < 0.1 < 4 < loss(-right, t=end)
    assert loss(right, t=torch.tensor([T - 1, 5])) < loss(right, t=end)


def test_the_average_follows_the_weights():
    """Averages move by 1 - decay; frozen weights are shared, so a copy of them costs nothing."""
    model = tiny()
    ema, averages = train.make_ema(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        [p.add_(1) for p in trained]
    before = averages[0].clone()
    train.update_ema(averages, trained, step=10**6, decay=0.9)
    torch.testing.assert_close(averages[0].data, before + 0.1)
    first = next(ema.vae.parameters()).data_ptr()
    assert first == next(model.vae.parameters()).data_ptr() and len(averages) == len(trained)


@pytest.mark.parametrize("augment", [None, "flip", "full"])
def test_mask_latents_are_encoded_once(place, augment):
    """z_0 looked up by item and flip is that of the mask at hand; new masks are encoded."""
    model, data = tiny(), SegmentationData(find(str(place / "own")), "train", 32, augment, seed=0)
    encoded = []
    latents = LatentCache(lambda mask: encoded.append(len(mask)) or model.encode_mask(mask))
    for epoch in range(12):
        samples = [(epoch, i) for i in range(len(data))]
        mask, ids = data.batch(samples)["mask"], data.symmetry_ids(samples)
        torch.testing.assert_close(latents(mask, ids), model.encode_mask(mask))
    most = {None: 1, "flip": 8, "full": 12}[augment] * len(data)
    assert most / 2 <= sum(encoded) <= most


# ---- a run ----


def test_a_run_leaves_what_it_promises(place):
    """model, resume, log, samples, config: each is there, whole, and loads."""
    assert run(place, "run") is None
    config = SDSeg.load(place / "run/model.safetensors").config
    assert config.classes == ("background", "foreground") and config.data == "own"
    assert config.mask_scale != TINY.mask_scale
    assert [r["step"] for r in rows(place / "run")] == ["2", "3", "4", "6", "6"]
    assert Image.open(place / "run/samples/000006.png").size[0] == 32 * 4
    assert json.loads((place / "run/config.json").read_text())["args"]["steps"] == 6
    assert not [p for p in (place / "run").iterdir() if p.name.startswith(".tmp")]


def test_what_is_saved_is_the_average(place):
    """model.safetensors holds the averaged tau and U-Net, and the frozen autoencoder untouched."""
    run(place, "run", "--eval-every", "6")
    model, start = (SDSeg.load(place / p) for p in ("run/model.safetensors", "tiny.safetensors"))
    for name, average in state(place / "run")["ema"].items():
        assert torch.equal(model.state_dict()[name], average)
    for p, q in zip(model.vae.parameters(), start.vae.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_knows_every_image_that_it_was_trained_on(place):
    """Through --init too: hashes are added; a file of before names its data set instead."""
    hashes = set(image_hashes(find(str(place / "own")).splits["train"]))
    for data, kept, before in (("", ("00ff",), {"00ff"}), ("cvc", (), {"cvc/random"})):
        model = SDSeg.load(place / "tiny.safetensors")
        model.config = replace(model.config, data=data, trained_on=kept)
        model.save(place / "before.safetensors")
        run(place, f"x{data}", "--init", str(place / "before.safetensors"), steps=1)
        config = SDSeg.load(place / f"x{data}/model.safetensors").config
        assert set(config.trained_on) == hashes | before


def test_resume_is_exact(place, monkeypatch):
    """SIGTERM after a step saves and returns 143; the resumed run ends with the same bits."""
    run(place, "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(place, "parts") == 128 + signal.SIGTERM
    assert state(place / "parts")["values"]["step"] == 4
    resume(place / "parts")
    assert same(state(place / "whole"), state(place / "parts"))
    steps = [r["step"] for r in rows(place / "parts")]
    assert steps == sorted(steps, key=int) and steps[-1] == "6"


def test_a_killed_run_goes_on_from_its_last_save(place, monkeypatch):
    """Death between saves loses the steps since the last one; the end is the same bits."""

    def die():
        raise MemoryError("as if killed")

    run(place, "whole")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_step(patch, 5, die)
        run(place, "parts")
    assert state(place / "parts")["values"]["step"] == 3
    resume(place / "parts")
    assert same(state(place / "whole"), state(place / "parts"))


def test_a_signal_to_all_processes_stops_a_run_in_order(place):
    """Ctrl-C and SLURM signal the whole group; the run saves what it has."""
    command = [sys.executable, "train.py", *arguments(place, "run", steps=10**6)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE
    ) as process:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("step"))
        os.killpg(process.pid, signal.SIGTERM)
        text = "".join(lines)
    assert process.returncode == 128 + signal.SIGTERM
    assert text.count("stopping after this step") == 1
    assert (place / "run" / "resume.pt").exists()


def test_a_run_may_be_moved_and_copied(place):
    """--resume works in the folder it is given, with the run's settings, and touches no other."""
    run(place, "first", "--latent-weight", "0", "--mask-weight", "0", "--terminal-fraction", "0")
    before = {p: p.read_bytes() for p in (place / "first").rglob("*.*")}
    second = place / "second"
    shutil.copytree(place / "first", second)
    resume(second, "--steps", "8", "--root", "elsewhere")
    assert state(second)["values"]["step"] == 8
    assert {p: p.read_bytes() for p in (place / "first").rglob("*.*")} == before
    old, new = (json.loads((p / "config.json").read_text())["args"]
                for p in (place / "first", second))  # fmt: skip
    changed = {"steps": 8, "root": "elsewhere", "out": str(second), "resume": str(second)}
    assert new == old | changed


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
    one, two = (state(place / name)["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)


def test_a_compiled_run_is_the_same_run(place, monkeypatch):
    """--compile runs every step through the compiled networks, no validation, and gives the
    losses of a plain run.
    """
    calls, compile_networks = [], train.compile_networks

    def backend(graph, examples):
        return lambda *inputs: calls.append(graph) or graph(*inputs)

    torch.compiler.reset()  # the cache belongs to the process
    monkeypatch.setattr(
        train, "compile_networks", lambda model, mode: compile_networks(model, backend=backend)
    )
    run(place, "plain")
    run(place, "compiled", "--compile")
    assert len(calls) == 3 * 6  # networks, steps
    plain, compiled = (
        [float(r["loss"]) for r in rows(place / name) if r["loss"]]
        for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and compiled == pytest.approx(plain, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped(place, monkeypatch):
    """A NaN loss changes nothing; only NaN losses stop the run in one line."""
    bad, calls, forward = {1}, [], SDSeg.forward

    def sometimes(self, *inputs):
        out = forward(self, *inputs)
        calls.append(1)
        return out._replace(noise_loss=out.noise_loss * float("nan")) if len(calls) in bad else out

    monkeypatch.setattr(SDSeg, "forward", sometimes)
    run(place, "run")
    assert all(p.isfinite().all() for p in state(place / "run")["model"].values())
    assert [r["skipped"] for r in rows(place / "run") if r["skipped"]] == ["1", "0", "0"]
    assert state(place / "run")["scaler"]["scale"] == 1
    bad.update(range(100))
    with pytest.raises(UserError, match="not finite for 2 steps in a row"):
        run(place, "bad")


def test_the_autoencoders_dice_is_told(place, monkeypatch, capsys):
    """1 where decoding undoes encoding, 0 where it loses the mask; a run prints it."""
    data = SegmentationData(find(str(place / "own")), "val", 32)
    for sign in (1, -1):
        model = tiny()
        model.encode_mask, model.decode_mask = model.labels_to_rgb, lambda z, s=sign: s * z
        assert vae_dice(model, data) == (sign == 1)
    run(place, "run", steps=1)
    told = re.search(r"rebuilds masks with Dice (\d\.\d{3})", capsys.readouterr().out)
    assert 0 <= float(told[1]) <= 1


class Volumes(list):
    """Stands for a data set of slices: their prediction is their image."""

    def __init__(self, cases, predicted, truth):
        super().__init__(cases)
        self.cases, self.predicted, self.truth = cases, predicted, truth

    def batch(self, samples):
        chosen = [i for _, i in samples]
        return {"image": self.predicted[chosen], "mask": self.truth[chosen]}


@pytest.mark.parametrize("batch_size", [1, 16])
def test_volumes_are_validated_whole(batch_size):
    """All slices of a volume together, as evaluation does it: an empty slice is no Dice of 1."""
    truth, predicted = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    truth[0, :2], predicted[0, :1] = 1, 1  # half of it
    truth[2, :1] = predicted[2, :1] = 1  # slice 1 is empty
    model = SimpleNamespace(segment=lambda image, generator: image[:, None].float(),
                            class_ids=SDSeg.class_ids, device="cpu", config=TINY)  # fmt: skip
    score = train.validate(model, Volumes(["a", "a", "b"], predicted, truth), batch_size)
    assert score == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_the_strip_shows_different_items(place, n):
    """With fewer than six validation items every item is shown once."""
    data = SegmentationData(find(str(place / "own")), "train", 32)
    shown = []
    batch = data.batch
    data.batch = lambda samples: shown.extend(i for _, i in samples) or batch(samples)
    data.names = data.names[:n]
    strip = train.sample_strip(tiny(), data)
    assert len(shown) == len(set(shown)) == min(n, 6) and strip.shape == (min(n, 6) * 32, 128, 3)


# ---- refusals ----


def test_what_cannot_be_done_is_one_line(place):
    """Each refusal names the cause before anything is trained."""
    run(place, "run", steps=2)
    for words, flags in {
        "holds a run already": arguments(place, "run"),
        "no such file": arguments(place, "x", "--init", str(place / "none.safetensors")),
        "config.json": ["--resume", str(place / "nothing")],
        "nowhere": ["--data", str(place / "nowhere"), "--init", str(place / "tiny.safetensors")],
        "24 px; this network takes multiples of 16": arguments(place, "x", "--size", "24"),
    }.items():
        with pytest.raises(UserError, match=words) as error:
            train.main(train.parse_args(flags))
        assert "\n" not in str(error.value)


def test_a_data_set_without_foreground_is_refused(place):
    """All training masks are black: nothing can be learnt, and every Dice would be 1."""
    for path in (place / "own/masks").iterdir():
        Image.new("L", (48, 40)).save(path)
    with pytest.raises(UserError, match="no training mask holds any foreground"):
        run(place, "run")


@pytest.mark.parametrize(
    "flag, value",
    [("steps", "0"), ("eval-every", "0"), ("batch-size", "-1"), ("seed", "-1"), ("lr", "nan"),
     ("lr", "inf"), ("terminal-fraction", "2"), ("seed", "9" * 400)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(flag, value, capsys):
    """By the command line, in one line, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--data", "demo", f"--{flag}", value])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument --{flag}: {value} is not " in said
    assert said.count("\n") == 1


def test_resume_refuses_flags_that_it_does_not_take(place, capsys):
    """Also one that repeats a default: it would be ignored without a word."""
    run(place, "run", steps=2)
    with pytest.raises(SystemExit) as stop:
        resume(place / "run", "--steps", "4", "--lr", "1e-6", "--augment", "none", "--seed", "0")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--resume does not take --augment, --lr, --seed;" in said


@pytest.mark.parametrize("text", [
    "[" * 10**5, '{"args": [1]}', '{"args": {}}', '{"args": {"data": "demo"}}',
    '{"args": {"data": "demo", "seed": -5}}', '{"args": {"data": "demo", "nonsense": 1}}',
])  # fmt: skip
def test_damaged_settings_are_refused(place, text):
    """config.json is read as a command line is: unknown, missing and impossible settings."""
    (place / "config.json").write_text(text)
    with pytest.raises((UserError, SystemExit)) as error:
        resume(place)
    assert getattr(error.value, "code", 2) == 2


def test_a_damaged_state_is_refused(place):
    """What PyTorch would broadcast or crash on, and what is no state at all: one line."""
    run(place, "run", steps=2)
    whole = state(place / "run")
    for value, *keys in (
        (torch.zeros(1), "model", "tau.out.weight"), (None, "optimizer"), ({}, "ema"),
        (torch.zeros(2), "optimizer", "state", 0, "exp_avg"), (None, "values"),
    ):  # fmt: skip
        content = copy.deepcopy(whole)
        functools.reduce(operator.getitem, keys[:-1], content)[keys[-1]] = value
        torch.save(content, place / "run/resume.pt")
        with pytest.raises(UserError, match="does not fit"):
            resume(place / "run")
    (place / "run/resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        resume(place / "run")


def test_a_changed_data_set_is_noticed(place):
    """Resuming on other images than the run began with is refused, and changes no file."""
    run(place, "run", steps=2)
    name = find(str(place / "own")).splits["train"][0].name
    for path in (place / "own").rglob(f"{name}.png"):
        path.unlink()
    before = (place / "run/config.json").read_text()
    with pytest.raises(UserError, match="has changed since"):
        resume(place / "run")
    assert (place / "run/config.json").read_text() == before


def test_every_process_gets_an_image(place):
    """The recipe's batch is rounded up to torchrun's processes; the user's own may be refused."""
    flags = ["--data", "demo", "--init", str(place / "tiny.safetensors"), "--out", str(place)]
    args = train.parse_args(flags)
    train.resolve_defaults(args, world_size=5)
    assert args.batch_size == 20  # nano has 16
    with pytest.raises(UserError, match="not a multiple of 5"):
        train.resolve_defaults(train.parse_args([*flags, "--batch-size", "4"]), world_size=5)


def test_a_full_disk_is_one_line_and_leaves_no_piece(place):
    """Where a file cannot be written whole, the one before it stays."""
    resource = pytest.importorskip("resource")
    run(place, "run", steps=2)
    before, limit = state(place / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # a file's size, like a disk's
    try:
        with pytest.raises(UserError, match="disk full"):
            run_state.save_state(place / "run/resume.pt", {}, model=tiny())
        with pytest.raises(UserError, match="disk full"):
            tiny().save(place / "run/model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert same(state(place / "run"), before)
    assert SDSeg.load(place / "run/model.safetensors")
    assert not [p for p in (place / "run").iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize("error, words", [
    (UserError("x.png: empty"), "x.png: empty"), (MemoryError(), "make the batch"),
    (torch.OutOfMemoryError("CUDA out of memory"), "make the batch"),
    (RuntimeError("can't allocate memory: you tried"), "make the batch"),
    (RuntimeError("No working C++ compiler found"), "--compile needs a C++ compiler"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error, words, capsys):
    """Any other error is a bug and keeps its traceback."""

    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1
    assert advice(RuntimeError("shapes differ")) is None
