"""What a run keeps on disk, and how it stops: resume.pt, config.json, log.csv, signals."""

import atexit
import csv
import json
import os
import signal
import time
from pathlib import Path

import torch

from support.cli import UserError, atomic_write, format_duration, one_line, rank_and_world_size
from support.device import synchronize

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


# ---- resume.pt ----


def save_state(path, values, **parts):
    """Write plain values, and the state_dict of each part, to one file. Raises UserError."""
    state = {"values": values} | {name: part.state_dict() for name, part in parts.items()}
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # PyTorch's writer does not say which OSError it met
            text = one_line(error)[:100]
            raise UserError(f"{path}: cannot be written, is the disk full? ({text})") from None


def load_state(path, **parts):
    """Give each part its state -> the plain values. Raises UserError for a file that is damaged
    or does not fit. `weights_only`: nothing in the file is run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --resume takes the folder of a run") from None
    except Exception as error:  # a damaged file can raise anything
        text = one_line(error)[:200]
        raise UserError(f"{path}: damaged, or of an older version ({text})") from None
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                check_shapes(part)
        return dict(state["values"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit this model ({one_line(error)[:200]})") from None


def check_shapes(optimizer):
    """Raise ValueError for moments of a wrong shape; the fused AdamW would crash on them."""
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != p.shape:
                raise ValueError(f"{name} is {list(state[name].shape)}, not {list(p.shape)}")


# ---- config.json ----


def claim_folder(folder):
    """Make an empty config.json, so that no second run begins in this folder. Raises UserError if
    one has begun. A run that ends before it has saved anything gives the folder back.
    """
    path = Path(folder) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"{folder}: another run has begun in it; give another --out") from None
    saved = path.with_name("resume.pt")
    atexit.register(lambda: saved.exists() or path.unlink(missing_ok=True))


def write_settings(folder, args, model):
    """Two dicts: the command line's flags by name, and the model's config."""
    settings = {"args": args, "model": model, "torch": torch.__version__}
    with atomic_write(Path(folder) / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def read_flags(folder):
    """The settings of the run in `folder`, as command line flags. Raises UserError."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())["args"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not the folder of a run; it needs config.json") from None
    flags = {f"--{k.replace('_', '-')}": v for k, v in saved if v is not None and v is not False}
    return [flag if value is True else f"{flag}={value}" for flag, value in flags.items()]


# ---- log.csv ----


class Log:
    """Rows of numbers in log.csv. A resumed run drops the rows after its last save."""

    def __init__(self, path, columns, start):
        self.path, self.columns, rows = path, columns, []
        if start and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
        with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
            kept = [row for row in rows if int(row[0]) <= start]
            csv.writer(file).writerows([columns, *kept])

    def write(self, **values):
        text = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(text)

    def curves(self, names):
        """-> {name: (steps, values)} of the named columns, from the rows that hold the value."""
        with open(self.path, newline="") as file:
            rows = list(csv.DictReader(file))
        held = {name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in names}
        return {name: tuple(zip(*pairs)) for name, pairs in held.items() if pairs}


class LossMeter:
    """Means of the losses since the last line of the log, and the number of skipped steps.

    Of several processes each counts its own share of the batch, and the log is that of the first.
    The sums stay on the device, so the loop does not wait for it.
    """

    names = ("loss", "noise", "latent", "mask", "latent_t900")

    def __init__(self, device):
        self.sums = torch.zeros(7, device=device)  # 4 losses; sum and count of t >= 900; skipped
        self.skipped = torch.eye(7, device=device)[6]
        self.steps = 0

    @torch.no_grad()
    def update(self, losses, latent_loss, t, gradient_norm):
        """losses (4,); latent_loss, t (B,). A step with gradients that are not finite counts as
        skipped, because GradScaler skips it.
        """
        at_t900 = (t >= 900).float()
        at_t900 = torch.stack([at_t900 @ latent_loss, at_t900.sum(), at_t900.new_zeros(())])
        values = torch.cat([losses, at_t900])
        self.sums += torch.where(gradient_norm.isfinite(), values, self.skipped)
        self.steps += 1

    def read(self):
        """-> {name: mean since the last call}, skipped steps. Raises UserError if all were."""
        *sums, at_t900, count, skipped = self.sums.tolist()
        good = self.steps - skipped
        if not good:
            raise UserError(
                f"the loss was not finite for {self.steps} steps in a row; start again with a "
                "lower --lr, or with --precision fp32"
            )
        means = [x / good for x in sums] + [at_t900 / count if count else float("nan")]
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.names, means)), int(skipped)


class FirstSteps:
    """Tells once how long a step takes: after three steps, or after 20 s on a CPU.

    `skip` steps before these do not count, because in the first ones a GPU compiles and chooses
    kernels.
    """

    def __init__(self, device, skip):
        self.device, self.steps, self.told, self.began = device, -skip, False, time.monotonic()

    def step(self):
        """-> seconds per step; None before and after the one time."""
        self.steps += 1
        if self.steps == 0:
            synchronize(self.device)
            self.began = time.monotonic()
        slow = self.device.type == "cpu" and time.monotonic() - self.began > 20
        if self.told or self.steps < 1 or not (slow or self.steps == 3):
            return None
        synchronize(self.device)
        self.told = True
        return (time.monotonic() - self.began) / self.steps


def first_estimate(seconds, size, device):
    """-> one line: how long the run takes, and on a CPU what fewer pixels would take."""
    where = "CPU" if device.type == "cpu" else "GPU"
    text = f"the run will take about {format_duration(seconds)} on this {where}"
    if device.type != "cpu" or seconds < 3600:
        return text
    smaller = [side for side in (size // 2, size // 4) if side >= 64]
    times = [f"--size {s}: about {format_duration(seconds * (s / size) ** 2)}" for s in smaller]
    return "; ".join([text, *times])


# ---- signals ----


def catch_stop_signals():
    """-> a list that receives the number of the first SIGTERM or SIGINT; a later one kills.

    Several within a second count as one, because torchrun passes on what the group has received.
    Only rank 0 decides: it could not finish its step if another process had left before.
    """
    caught, first = [], 0.0
    if rank_and_world_size()[0]:
        ignore_stop_signals(None)
        return caught

    def handler(number, frame):
        nonlocal first
        if not caught:
            first = time.monotonic()
            caught.append(number)
            print("stopping after this step and saving; Ctrl-C again stops at once", flush=True)
        elif time.monotonic() - first > 1:
            os._exit(128 + number)

    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    return caught


def ignore_stop_signals(worker):
    """For processes that load data: Ctrl-C reaches them too, but the main process decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
