"""Training: the losses, a run's files, exact resume, signals, several processes, refusals."""

import csv
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, disc_folder, slow, tiny
from PIL import Image

import train
from data import SegmentationData, find
from sdseg import SDSeg, T
from support import run_state
from support.cache import LatentCache
from support.cli import UserError, advice
from support.device import choose_dtype
from support.folders import image_hashes

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            ROOT / "train.py"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """20 images with a bright disc each, a tiny model, and its finished run of six steps."""
    folder = tmp_path_factory.mktemp("made")
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SDSEG_CACHE", str(folder / "cache"))
        patch.setattr(train, "LOG_EVERY", 2)
        disc_folder(folder / "own")
        tiny().save("tiny.safetensors")
        run("finished")
    yield folder
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def place(made, tmp_path, monkeypatch):
    """Each test works in a folder of its own. It may change `own`, but only read the rest."""
    shutil.copytree(made / "own", tmp_path / "own")
    for name in ("tiny.safetensors", "finished"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "LOG_EVERY", 2)


def arguments(name, *more, steps=6):
    often = "--batch-size 4 --precision fp32 --eval-every 3"
    flags = f"--data own --init tiny.safetensors --out {name} --steps {steps} {often}"
    return [*flags.split(), *more]


def run(name, *more, **options):
    return train.main(train.parse_args(arguments(name, *more, **options)))


def resume(folder, *more):
    return train.main(train.parse_args(["--resume", folder, *more]))


def state(folder):
    return torch.load(f"{folder}/resume.pt", weights_only=True)


def rows(folder):
    return list(csv.DictReader(Path(folder, "log.csv").open()))


def settings(folder):
    return json.loads(Path(folder, "config.json").read_text())["args"]


# ---- the parts of a step ----


def test_t_is_uniform_but_for_a_share_at_the_end():
    """t is uniform, but `terminal_fraction` of all samples, evenly spread, are at T - 1."""
    draw, seed = train.sample_t_and_noise, torch.Generator().manual_seed(0)
    t, noise = draw(16, (4, 2, 2), seed, terminal_fraction=0.75)
    assert noise.shape == (16, 4, 2, 2) and all((part == T - 1).sum() >= 3 for part in t.view(4, 4))
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


def test_the_mask_loss_sees_only_samples_at_the_end():
    """0 without samples at T - 1; small for the mask's own colours, large for the opposite ones."""
    model, mask = tiny(), torch.randint(0, 2, (2, 32, 32))
    model.decode_mask = lambda rgb: rgb
    right, end = model.labels_to_rgb(mask), torch.tensor([T - 1, T - 1])
    loss = functools.partial(train.decoded_mask_loss, model, mask=mask)
    assert loss(right, t=torch.tensor([5, 998])) == 0
    assert loss(right, t=end) < 0.1 < 4 < loss(-right, t=end)
    assert loss(right, t=torch.tensor([T - 1, 5])) < loss(right, t=end)


def test_each_false_mark_costs_where_the_truth_is_empty():
    """The loss is 0 for an empty prediction, and grows with each mark."""
    empty, losses = torch.zeros(1, 32, 32, dtype=torch.long), []
    for marked in (0, 1, 10, 100, 1000):
        foreground = torch.full((1024,), -20.0)
        foreground[:marked] = 20.0
        logits = torch.stack([-foreground, foreground]).view(1, 2, 32, 32)
        entropy = F.cross_entropy(logits, empty)
        losses.append((train.cross_entropy_and_dice(logits, empty) - entropy).item())
    # the Dice term: marks / (marks + 1 % of the pixels)
    assert losses == pytest.approx([n / (n + 10.24) for n in (0, 1, 10, 100, 1000)], abs=1e-4)


def test_the_average_follows_the_weights():
    """Averages move by 1 - decay; frozen weights are shared, so a copy of them costs nothing."""
    model = tiny()
    ema, averages = train.make_ema(model)
    before, trained = averages[0].clone(), [p + 1 for p in model.parameters() if p.requires_grad]
    train.update_ema(averages, trained, step=10**6, decay=0.9)
    torch.testing.assert_close(averages[0].data, before + 0.1)
    assert next(ema.vae.parameters()).data_ptr() == next(model.vae.parameters()).data_ptr()
    together, one_by_one = (train.make_ema(model, on_host=True)[1] for _ in range(2))
    train.update_ema(together, trained, step=5, decay=0.9, since=3)
    for step in range(3, 6):  # while the weights stay, this is the same
        train.update_ema(one_by_one, trained, step, decay=0.9)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("augment", [None, "flip", "full"])
def test_mask_latents_are_encoded_once(augment):
    """z_0 looked up by item and flip is that of the mask at hand; new masks are encoded."""
    model, data = tiny(), SegmentationData(find("own"), "train", 32, augment, seed=0)
    encoded = []
    latents = LatentCache(lambda mask: encoded.append(len(mask)) or model.encode_mask(mask))
    for epoch in range(12):
        samples = [(epoch, i) for i in range(len(data))]
        mask, ids = data.batch(samples)["mask"], data.symmetry_ids(samples)
        torch.testing.assert_close(latents(mask, ids), model.encode_mask(mask))
    most = {None: 1, "flip": 8, "full": 12}[augment] * len(data)
    assert most / 2 <= sum(encoded) <= most


# ---- a run ----


def test_a_run_leaves_what_it_promises():
    """model, resume, log, samples, config: each is there, whole, and loads."""
    config = SDSeg.load("finished/model.safetensors").config
    assert config.classes == ("background", "foreground") and config.data == "own"
    assert config.mask_scale != TINY.mask_scale
    assert [r["step"] for r in rows("finished")] == ["2", "3", "4", "6", "6"]
    assert Image.open("finished/samples/000006.png").size[0] == 32 * 4
    assert Image.open("finished/curves.png").size == (3 * 460, 420)
    assert settings("finished")["steps"] == 6 and state("finished")["values"]["step"] == 6
    assert not list(Path("finished").glob(".tmp*"))


def test_a_run_saves_averages_and_the_hashes_of_its_images():
    """Averages, the autoencoder untouched, and the hashes of all training images, --init's too."""
    start, spec = tiny(trained_on=("00ff",)), find("own")
    start.save("before.safetensors")
    run("run", "--init", "before.safetensors", steps=1)
    model, saved = SDSeg.load("run/model.safetensors"), state("run")
    assert all(torch.equal(p, saved["ema"][name]) for name, p in model.state_dict().items())
    assert not torch.equal(model.tau.out.weight, saved["model"]["tau.out.weight"])
    for p, q in zip(model.vae.parameters(), start.vae.parameters(), strict=True):
        assert torch.equal(p, q)
    hashes = set(image_hashes(spec.splits["train"]))
    assert set(model.config.trained_on) == hashes | {"00ff"}


SIGTERM = functools.partial(signal.raise_signal, signal.SIGTERM)


def stopped(monkeypatch, stop, at, steps=6):
    """The run `parts`, which `stop` ends at a step -> its exit status, and the step it saved."""
    update = train.update_ema

    def update_and_stop(averages, trained, step, *more):
        update(averages, trained, step, *more)
        if step == at:
            stop()

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "update_ema", update_and_stop)
        sys.exit(run("parts", steps=steps))
    return end.value.code, state("parts")["values"]["step"]


def assert_same_end(whole, parts):
    """Two runs end with the same bits."""
    a, b = state(whole), state(parts)
    assert all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])


def assert_close_gradients(one, two):
    """The optimiser's means of the gradients agree, up to the order of the sums."""
    one, two = (state(name)["optimizer"]["state"] for name in (one, two))
    for i in one:
        torch.testing.assert_close(two[i]["exp_avg"], one[i]["exp_avg"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("stop, at, status, saved", [
    (SIGTERM, 3, 143, 4), (functools.partial(sys.exit, "as if killed"), 4, "as if killed", 3),
])  # fmt: skip
def test_resume_is_exact(stop, at, status, saved, monkeypatch):
    """After SIGTERM, which saves, or a kill, a resumed run ends with the bits of a whole one."""
    assert stopped(monkeypatch, stop, at) == (status, saved)
    resume("parts")
    assert_same_end("finished", "parts")
    assert [r["step"] for r in rows("parts")] == [r["step"] for r in rows("finished")]


def test_a_run_in_little_memory_gives_the_same_weights(monkeypatch):
    """The average in host memory, and tau image by image: the same weights, and exact resume. One
    move of the average stands for several steps, and no step is averaged twice.
    """
    moves, move = [], train.update_ema

    def record(averages, trained, step, decay, since):
        moves.append((since, step))
        move(averages, trained, step, decay, since)

    monkeypatch.setattr(train, "update_ema", record)
    monkeypatch.setattr(train, "is_too_small", lambda device, trained: True)
    assert train.average_every(0.9999) == 100 and train.average_every(0.5) == 1
    run("whole")
    usual, little = (state(name)["model"] for name in ("finished", "whole"))
    torch.testing.assert_close(little, usual, atol=1e-5, rtol=1e-4)
    assert stopped(monkeypatch, SIGTERM, at=4)[1] == 5  # nano's average moves at 3, 5 and 6
    resume("parts")
    assert_same_end("whole", "parts")
    resume("parts", "--steps", "8")
    assert moves == 2 * [(0, 2), (3, 4), (5, 5)] + [(6, 7)]


def test_float16_scales_its_loss(monkeypatch):
    """`auto` is float16 on a GPU without bfloat16; the scaled loss gives nearly the same losses."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_dtype(torch.device("cuda"), "auto") == torch.float16
    run("half", "--precision", "fp16", steps=2)
    assert state("half")["scaler"]["scale"] > 1
    losses = [float(rows(name)[0]["loss"]) for name in ("half", "finished")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_batch_in_parts_is_the_same_step():
    """Three and two images give the gradients and losses of five."""
    for name, more in (("whole", []), ("parts", ["--accumulate", "2"])):
        run(name, "--batch-size", "5", *more, steps=2)
    assert_close_gradients("whole", "parts")
    for name in run_state.LossMeter.names:
        whole, parts = (float(rows(run)[0][name]) for run in ("whole", "parts"))
        assert parts == pytest.approx(whole, rel=1e-4)


def test_the_batch_suits_processes_and_memory():
    """The recipe's 16 images are rounded up to torchrun's processes; the user's own are refused. A
    CPU takes 4 images of 256 px at a time, or as many pixels of another size; a GPU takes all.
    """

    def batch(flags, processes=1, device="cpu"):
        args = train.parse_args(f"--data own --init tiny.safetensors {flags}".split())
        train.resolve_defaults(args, processes, torch.device(device))
        return args.batch_size, args.accumulate

    assert batch("--size 128") == batch("--size 256", device="cuda") == (16, 1)
    assert batch("--size 256") == (16, 4) and batch("", processes=5) == (20, 1)
    with pytest.raises(UserError, match="not a multiple of 5"):
        batch("--batch-size 4", processes=5)


def test_a_run_says_early_how_long_it_takes(monkeypatch):
    """After three steps, or 20 s on a CPU; with fewer pixels where hours would pass. Once."""
    clock = iter([0, 1, 2, 6, 6, 7])
    monkeypatch.setattr(run_state.time, "monotonic", lambda: next(clock))
    timer = run_state.FirstSteps(CPU, skip=0)
    assert [timer.step() for _ in range(3)] == [None, None, 2]
    clock = iter([0, 30, 30, 31])
    timer = run_state.FirstSteps(CPU, skip=0)
    assert [timer.step() for _ in range(2)] == [30, None]
    text = run_state.first_estimate(16 * 3600, 256, CPU)
    assert "16 h 00 min" in text and "--size 128: about 4 h" in text and "64: about 1 h" in text
    assert "--size" not in run_state.first_estimate(16 * 3600, 256, torch.device("cuda"))


def test_a_run_may_be_moved_and_copied():
    """--resume works in the folder it is given, with the run's settings, and touches no other."""
    run("first", "--latent-weight", "0", "--mask-weight", "0", steps=1)
    before = {p: p.read_bytes() for p in Path("first").rglob("*.*")}
    shutil.copytree("first", "second")
    resume("second", "--steps", "2", "--root", "elsewhere")
    assert {p: p.read_bytes() for p in Path("first").rglob("*.*")} == before
    changed = {"steps": 2, "root": "elsewhere", "out": "second", "resume": "second"}
    assert settings("second") == settings("first") | changed
    assert state("second")["values"]["step"] == 2
    with pytest.raises(UserError, match="is at step 2 already; give more --steps"):
        resume("second")  # would otherwise claim to have trained


def test_two_processes_take_the_steps_of_one_and_stop_in_order(monkeypatch):
    """The gradients of half the batch each, in two parts, are those of one process. Ctrl-C and
    SLURM signal torchrun and its processes at once: the run saves what it has. Only rank 0 prints.
    """
    command = [*TORCHRUN, *arguments("two", "--accumulate", "2", steps=10**6)]
    with subprocess.Popen(
        command, text=True, start_new_session=True, stdout=subprocess.PIPE
    ) as process:
        begun = itertools.takewhile(lambda line: not line.startswith("step"), process.stdout)
        text = "".join(begun)
        os.killpg(process.pid, signal.SIGTERM)
        text += process.stdout.read()
    assert process.returncode != 0 and text.count("stopping after this step") == 1
    assert text.count("the autoencoder rebuilds masks with Dice 0.") == 1
    step = state("two")["values"]["step"]
    assert stopped(monkeypatch, SIGTERM, step - 1, steps=10**6) == (143, step)
    assert_close_gradients("parts", "two")


@slow
def test_a_compiled_run_is_the_same_run(monkeypatch):
    """Every step, but no validation, runs through the compiled networks; the losses stay."""
    calls = []

    def backend(graph, examples, mode):
        return lambda *inputs: calls.append(mode) or graph(*inputs)

    torch.compiler.reset()  # the cache belongs to the process
    compile_networks = functools.partial(train.compile_networks, backend=backend)
    monkeypatch.setattr(train, "compile_networks", compile_networks)
    run("compiled", "--compile")
    assert calls == ["reduce-overhead"] * 3 * 6  # networks, steps
    compiled, plain = ([float(r["loss"] or 0) for r in rows(p)] for p in ("compiled", "finished"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped(monkeypatch):
    """A NaN loss changes nothing; only NaN losses between two lines of the log stop the run."""
    factors, forward = iter([float("nan"), 1, 1, 1, float("nan"), float("nan")]), SDSeg.forward

    def sometimes(self, *inputs):
        out = forward(self, *inputs)
        return out._replace(noise_loss=out.noise_loss * next(factors))

    monkeypatch.setattr(SDSeg, "forward", sometimes)
    with pytest.raises(UserError, match="not finite for 2 steps in a row"):
        run("run")
    assert all(p.isfinite().all() for p in state("run")["model"].values())
    assert [r["skipped"] for r in rows("run") if r["skipped"]] == ["1", "0"]
    assert state("run")["scaler"]["scale"] == 1


def test_volumes_are_validated_whole():
    """All slices of a volume together, as evaluation does it: an empty slice is no Dice of 1."""
    truth, predicted = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    truth[0, :2], predicted[0, :1] = 1, 1  # half of it
    truth[2, :1] = predicted[2, :1] = 1  # slice 1 is empty

    class Slices(list):
        cases = ("a", "a", "b")  # two volumes

        def batch(self, samples):
            chosen = [i for _, i in samples]
            return {"image": predicted[chosen], "mask": truth[chosen]}

    model = SimpleNamespace(segment=lambda image, generator: image[:, None].float(),
                            class_ids=tiny().class_ids, device="cpu", config=TINY)  # fmt: skip
    for batch_size in (1, 16):
        score = train.validate(model, Slices(range(3)), batch_size)
        assert score == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("part", ["val", "train"])
def test_the_strip_shows_different_items(part):
    """Six rows, each of another item; with fewer validation items every item has one row."""
    data = SegmentationData(find("own"), part, 32)
    strip = train.sample_strip(tiny(), data)
    images = {strip[y : y + 32, :32].tobytes() for y in range(0, len(strip), 32)}
    assert len(images) == min(len(data), 6) and strip.shape == (len(images) * 32, 128, 3)


# ---- refusals ----


@pytest.mark.parametrize("words, flags", [
    ("holds a run already", arguments("finished")),
    ("no such file", arguments("run", "--init", "none.safetensors")),
    ("24 px; this network takes multiples of 16", arguments("run", "--size", "24")),
    ("no mask of the train part holds any foreground", arguments("run", "--data", "black")),
    ("has changed since this run", ["--resume", "finished"]),
    ("begun: holds a run already", arguments("begun")),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(words, flags):
    """Each refusal names the cause before anything is trained, and changes no file."""
    shutil.copytree("own", "black")
    for path in Path("black/masks").iterdir():
        Image.new("L", (48, 40)).save(path)
    Image.new("L", (48, 40)).save(find("own").splits["val"][0].mask)  # finished saw another
    run_state.claim_folder("begun")
    before = settings("finished")
    with pytest.raises(UserError, match=words) as error:
        train.main(train.parse_args(flags))
    assert "\n" not in str(error.value) and not Path("run").exists()
    assert settings("finished") == before
    with pytest.raises(UserError, match="begun: another run has begun in it"):
        run_state.claim_folder("begun")  # two at once: the first has saved nothing yet


def test_validation_without_foreground_is_not_a_score(monkeypatch, capsys):
    """Its Dice is `-`, neither 0 nor 1, and the last model is kept."""
    monkeypatch.setattr(train, "validate", lambda *_, **__: float("nan"))
    run("run", steps=1)
    assert "done: run/model.safetensors, validation Dice -" in capsys.readouterr().out
    assert SDSeg.load("run/model.safetensors")


def test_a_resumed_batch_that_processes_cannot_share_is_refused(monkeypatch):
    """Three processes, batches of 4: it is said before anything is read."""
    monkeypatch.setattr(train, "init_distributed", lambda: (0, 3, CPU))
    with pytest.raises(UserError, match="cannot be shared equally by 3 processes"):
        train.main(train.parse_args(["--resume", "finished"]))


def test_how_volumes_are_sliced_is_kept_with_the_model():
    """Plane and context, also in a resumed run; a later run takes the context of its weights."""
    for i, name in itertools.product(range(4), ("images", "masks")):
        values = np.zeros((2, 12, 12), np.int16)
        values[:, 2 + i : 8, 3:9] = 1
        Path("stacks", name).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.diag([4, 1, 1, 1])), f"stacks/{name}/{i}.nii")
    run("first", "--data=stacks", "--context=neighbours", steps=1)
    resume("first", "--steps=2")
    run("second", "--data=stacks", "--init=first/model.safetensors", steps=1)
    for name in ("first", "second"):
        config = SDSeg.load(f"{name}/model.safetensors").config
        assert (config.plane, config.context) == ("sagittal", "neighbours")
    with pytest.raises(UserError, match="own holds images"):
        run("third", "--context=neighbours")


@pytest.mark.parametrize("words, flags", [
    ("--steps: 0 is not ", "--data demo --steps 0"), ("--lr: nan is not ", "--data demo --lr nan"),
    ("--seed: 99", f"--data demo --seed {'9' * 400}"), ("give --data or --resume", ""),
    ("--resume does not take --augment, --lr, --seed;",  # also if it repeats a default
     "--resume finished --steps 4 --lr 1e-6 --augment none --seed 0"),
])  # fmt: skip
def test_flags_are_refused_in_one_line(words, flags, capsys):
    """Numbers out of range, and what --resume would ignore, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1


def test_damaged_settings_are_refused():
    """config.json is read as a command line is: no settings, missing ones, unknown ones."""
    for text in ("[" * 10**5, '{"args": {}}', '{"args": {"data": "demo", "nonsense": 1}}'):
        Path("config.json").write_text(text)
        with pytest.raises((UserError, SystemExit)) as error:
            resume(".")
        assert getattr(error.value, "code", 2) == 2


def test_a_damaged_state_is_refused():
    """What PyTorch would broadcast or crash on, and what is no state at all: one line."""
    model, whole = tiny(), state("finished")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    moments = whole["optimizer"]["state"]
    for part, damage in (
        ("model", whole["model"] | {"tau.out.weight": torch.zeros(1)}), ("values", None),
        ("optimizer", whole["optimizer"] | {"state": moments | {0: moments[1]}}),
    ):  # fmt: skip
        torch.save(whole | {part: damage}, "resume.pt")
        with pytest.raises(UserError, match="does not fit"):
            run_state.load_state("resume.pt", model=model, optimizer=optimizer)
    Path("resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        run_state.load_state("resume.pt", model=model)


def test_a_full_disk_is_one_line_and_leaves_no_piece():
    """Where a file cannot be written whole, the one before it stays."""
    resource = pytest.importorskip("resource")
    Path("m.safetensors").touch(), Path("resume.pt").touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # a file's size, like a disk's
    try:
        with pytest.raises(UserError, match="disk full"):
            run_state.save_state("resume.pt", {}, model=tiny())
        with pytest.raises(UserError, match="disk full"):
            tiny().save("m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Path("m.safetensors").stat().st_size == Path("resume.pt").stat().st_size == 0
    assert not list(Path().glob(".tmp*"))


def test_what_a_user_can_mend_has_advice():
    """Too little memory, no compiler, or the end of another process is one line; any other error is
    a bug with a traceback.
    """
    assert "make the batch" in advice(torch.OutOfMemoryError("CUDA out of memory"))
    assert "needs a C++ compiler" in advice(RuntimeError("No working C++ compiler found"))
    assert "has ended" in advice(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:4509"))
    assert advice(RuntimeError("shapes differ")) is None
