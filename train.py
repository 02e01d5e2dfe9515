"""Train SDSeg: `python train.py --data cvc`, and `python train.py --resume runs/cvc`.

Trained are tau and the U-Net; the autoencoder stays frozen. A run's folder holds
`model.safetensors` (best validation Dice, averaged weights, complete), `resume.pt`, `log.csv`,
`samples/STEP.png` and `config.json`. Everything random is a function of (seed, step), so a resumed
run repeats an uninterrupted one, and two processes with half a batch each take the step of one.
Several GPUs: `torchrun --nproc_per_node=8 train.py --data cvc`.
"""

from common import Parser, Refusal, any_seed, positive, run, within

# What differs between the paper's models and the small one, unless a flag says otherwise.
PAPER = dict(steps=100_000, batch_size=4, lr=4e-5, warmup=1000, eval_every=2000, ema=0.9999,
             last=0.0, mask_weight=0.0, augment="flip")  # fmt: skip
NANO = dict(steps=5000, batch_size=16, lr=5e-4, warmup=200, eval_every=250, ema=0.998,
            last=0.875, mask_weight=1.0, augment="full")  # fmt: skip


def parse(argv=None):
    parser = Parser("Train SDSeg on a data set; see also the README.")
    amount, share = within(float, 0), within(float, 0, 1)
    recipe = {k: f"(default: {PAPER[k]}; nano: {NANO[k]})" for k in PAPER}

    add = parser.group("data")
    add("--data", help="cvc, kvasir, refuge2, btcv, sts3d, demo, several as a+b, or a folder")
    add("--root", help="where the data sets lie (default: data)")
    add("--split", default="random", choices=["random", "sequence"], help="sequence: cvc by video")
    add("--size", type=positive, help="pixels, H = W (default: that of the weights)")
    add("--augment", choices=["none", "flip", "full"], help=f"full: also turned, scaled, shifted, "
        f"recoloured {recipe['augment']}")  # fmt: skip

    add = parser.group("the run")
    add("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings; "
        "--steps and --root may be others, --device and --workers are chosen anew")  # fmt: skip
    add("--init", metavar="FILE", help="weights to start from (default: sd-v1, else nano)")
    add("--fresh", action="store_true", help="keep of --init only the autoencoder")
    add("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    add("--seed", type=any_seed, default=0, help="of everything random")

    add = parser.group("optimisation")
    add("--steps", type=positive, help=f"optimiser steps {recipe['steps']}")
    add("--batch-size", type=positive, help=f"images a step, over all GPUs {recipe['batch_size']}")
    add("--lr", type=amount, help=f"peak learning rate of AdamW {recipe['lr']}")
    add("--warmup", type=within(int, 0), help=f"steps of linear warm-up {recipe['warmup']}")
    add("--decay", action="store_true", help="let the rate fall linearly to zero (nano: always)")
    add("--eval-every", type=positive, help=f"steps between validations {recipe['eval_every']}")
    add("--log-every", type=positive, default=25, help="steps between lines of the log")
    add("--ema", type=share, help=f"decay of the moving average {recipe['ema']}")

    add = parser.group("method")
    add("--prediction", choices=["eps", "x0", "v"], help="of the U-Net (default: the weights')")
    add("--fusion", choices=["concat", "cross"],
        help="how the U-Net sees the image (default: the weights')")  # fmt: skip
    add("--freeze-encoder", action="store_true", help="do not train tau")
    add("--latent-weight", type=amount, default=1.0, help="lambda of Eq. 3")
    add("--mask-weight", type=amount, help=f"loss on the decoded mask {recipe['mask_weight']}")
    add("--last", type=share, help=f"share of samples at t = T - 1 {recipe['last']}")

    add = parser.group("machine")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"],
        help="auto: bf16 autocast where the hardware has it")  # fmt: skip
    add("--compile", action="store_true",
        help="with torch.compile: minutes at the start, for long runs on a GPU")  # fmt: skip
    add("--workers", type=within(int, 0),
        help="processes that load data (default: 0 on a CPU, 4 a GPU)")  # fmt: skip
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    if not args.data and not args.resume:
        parser.error("one of --data and --resume is needed")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import csv
import json
import math
import os
import shutil
import signal
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from checkpoint import read_weights
from common import SHIPPED, Progress, duration, one_line, out_of_memory, torchrun_place, whole_file
from data import SegmentationData, find, write_image
from infer import class_ids
from metrics import areas, dice_of
from sdseg import SDSegConfig, T, draw, find_device, has_fast_bf16, split_seen, start_from


class Batches(torch.utils.data.Dataset):
    """Step -> this process's share of the step's batch: samples, their `views`, t and the noise.

    Each epoch is a new permutation; an incomplete last batch is filled from the next epoch.
    """

    def __init__(self, data, model, args, rank=0, world=1):
        self.data, self.args = data, args
        self.latent_shape = model.latent_shape()
        self.mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)

    def __getitem__(self, step):
        a = self.args
        places = range(step * a.batch_size, (step + 1) * a.batch_size)
        samples = [self.sample(place) for place in places[self.mine]]
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + step)
        t, noise = draw(a.batch_size, self.latent_shape, generator, a.last, step * a.batch_size)
        batch = self.data.batch(samples)
        views = self.data.views(samples)
        return batch["image"], batch["mask"], views, t[self.mine], noise[self.mine]

    def sample(self, place):
        """The place-th sample of the whole run -> (epoch, index)."""
        epoch, i = divmod(place, len(self.data))
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.data))
        return epoch, int(order[i])


class MaskLatents:
    """A cache of z_0: the autoencoder is frozen, so each view of each mask is encoded once.

    One at a time, in float32: a latent does not depend on the batch in which it first came. At
    most `most` are kept, 16 kB each at 256 px, 64 kB for nano.
    """

    def __init__(self, model, most=100_000):
        self.model, self.known, self.most = model, {}, most

    def __call__(self, mask, views):
        """mask (B, H, W) -> z_0 (B, 4, h, w); None where `views` is, since no mask comes again."""
        if views is None:
            return None
        z_0 = [self.known.get(view) for view in views]
        for i, view in enumerate(views):
            if z_0[i] is None:
                z_0[i] = self.model.encode_mask(mask[i : i + 1])
                if len(self.known) < self.most:
                    self.known[view] = z_0[i]
        return torch.cat(z_0)


class Average:
    """Exponential moving average of the parameters that train, all of them."""

    def __init__(self, parameters, decay):
        self.live, self.decay = list(parameters), decay
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # forget the start quickly
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the live parameters and their averages; a second call undoes the first."""
        for p, m in zip(self.live, self.mean):
            held = p.detach().clone()
            p.copy_(m)
            m.copy_(held)


def learning_rate(step, args):
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * (1 - step / args.steps if args.decay else 1)


@torch.no_grad()
def mask_std(model, data, n=512):
    """Standard deviation of unscaled mask latents over some n training masks, as they are."""
    latents, places = [], range(0, len(data), max(1, len(data) // n))
    progress = Progress(len(places), "masks encoded")
    for i in range(0, len(places), 16):
        masks = data.batch([(None, j) for j in places[i : i + 16]])["mask"]
        latents.append(model.vae.encode(model.paint(masks.to(model.colours.device)))[0].cpu())
        progress.step(len(masks))
    return max(torch.cat(latents).double().std(correction=0).item(), 1e-6)


def validate(model, data, device, autocast, batch_size=16):
    """Mean Dice over the pictures or volumes, classes averaged, single-step inference, seed 0."""
    total, progress = {}, Progress(len(data), "items validated")
    for i in range(0, len(data), batch_size):
        places = range(len(data))[i : i + batch_size]
        batch = data.batch([(None, j) for j in places])
        with autocast():
            p = model.segment(batch["image"].to(device), generator=torch.Generator().manual_seed(0))
        for j, pixels in zip(places, areas_of(p, batch["mask"])):
            total[data.cases[j]] = total.get(data.cases[j], 0) + pixels
        progress.step(len(places))
    return float(dice_of(np.stack(list(total.values()))).mean())


def areas_of(p, mask):
    """Scores (B, 1 or K, H, W), truth (B, H, W) -> the items' pixels, see `metrics.areas`."""
    pairs = zip(p.cpu().numpy(), mask.numpy())
    return [areas(class_ids(scores), truth, max(2, len(scores))) for scores, truth in pairs]


@torch.no_grad()
def round_trip(model, data, n=16):
    """Mean Dice of some n masks, encoded and decoded: all that exact latents would give.

    The loss on the decoded mask can lead past it, to latents that decode better than E's.
    """
    scores = []
    for i in range(0, len(data), max(1, len(data) // n)):
        mask = data.batch([(None, i)])["mask"]
        z_0 = model.encode_mask(mask.to(model.colours.device))
        scores.append(dice_of(areas_of(model.scores(model.decode_mask(z_0)), mask)).mean())
    return float(np.mean(scores))


@torch.no_grad()
def sample_strip(model, data, device, n=6):
    """uint8 picture, a row an item: image | truth | prediction | z_0 estimate."""
    batch = data.batch([(None, i * len(data) // n) for i in range(min(n, len(data)))])
    image = batch["image"].to(device)
    z_c = model.condition(image)
    noise = torch.randn(z_c.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
    z_0 = model.reverse(noise.expand_as(z_c), z_c, [T - 1])
    latent = F.interpolate(z_0[:, :3], image.shape[2:], mode="nearest") / 2  # 3 of 4 channels
    truth = model.paint(batch["mask"].to(device))
    rows = torch.cat([image, truth, model.decode_mask(z_0), latent], 3).clamp(-1, 1)
    return ((rows + 1) * 127.5).byte().permute(0, 2, 3, 1).flatten(0, 1).cpu().numpy()


def read_resume(path):
    """Tensors and plain values only, whatever the file holds. Raises Refusal."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file; --resume takes the folder of a run") from None
    except Exception as error:  # torch.load raises whatever a damaged file leads it into
        raise Refusal(f"{path}: cannot be resumed from ({one_line(error)[:200]})") from None


def saved_flags(folder):
    """The settings of the run in `folder`, read again as the command line was. Raises Refusal."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())["args"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refusal(f"{path}: not the folder of a run; it needs config.json") from None
    flags = [(f"--{k.replace('_', '-')}", v) for k, v in saved if v is not None and v is not False]
    args = parse([flag if value is True else f"{flag}={value}" for flag, value in flags])
    missing = [name for name in PAPER if getattr(args, name) is None]
    if missing or not args.data:
        raise Refusal(f"{path}: does not say {', '.join(missing) or 'data'}; of another version?")
    return args


def settings(args):
    """Fill in what the user left open -> the weights to start from, and why these."""
    if args.resume:
        own = {k: getattr(args, k) for k in ("resume", "device", "workers")} | {"out": args.resume}
        own |= {k: getattr(args, k) for k in ("steps", "root") if getattr(args, k) is not None}
        vars(args).update({**vars(saved_flags(args.resume)), **own})
        best = Path(args.resume) / "model.safetensors"  # not there before the first validation
        return best if best.exists() else args.init, "as --resume says"
    args.root = args.root or "data"
    why = "as --init says"
    if args.init is None:
        big = Path("weights/sd-v1.safetensors")
        args.init = str(big if big.exists() else SHIPPED)
        why = "converted weights are there" if big.exists() else f"no {big} here"
    config = read_weights(args.init, SDSegConfig)[0]
    preset = config.preset
    if split_seen(config, args.data) not in (None, args.split):
        why += "; beware: they have seen cvc split otherwise, so cases held out here"
    for name, value in (NANO if preset == "nano" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            if name == "batch_size":  # at least one image for each of torchrun's processes
                world = torchrun_place()[1]
                args.batch_size = -(-value // world) * world
    args.decay = args.decay or preset == "nano"
    if args.out is None:
        args.out = f"runs/{Path(args.data).resolve().name.replace('+', '-')}"
    if (Path(args.out) / "resume.pt").exists():
        raise Refusal(f"{args.out}: holds a run already; --resume {args.out}, or another --out")
    return args.init, why


class Watch:
    """Sums of the losses since the last line of the log, and the guard against bad gradients.

    AdamW(fused=True) reads two attributes that GradScaler would set: it divides the gradients by
    `grad_scale`, here their norm where that is over 1, and skips a step that has `found_inf`. So
    the loop never waits for the GPU.
    """

    names = ("loss", "noise", "latent", "mask", "late")

    def __init__(self, optimiser, device):
        self.optimiser = optimiser
        self.sums = torch.zeros(7, device=device)  # 4 losses, late sum and count, skipped steps
        self.one_skipped = torch.tensor([0.0] * 6 + [1.0], device=device)
        self.steps = 0

    @torch.no_grad()
    def step(self, loss):
        """Between the backward pass and the optimiser's step."""
        parameters = self.optimiser.param_groups[0]["params"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        bad = ~torch.isfinite(norm)
        self.optimiser.found_inf = bad.float()
        self.optimiser.grad_scale = norm.clamp(min=1)
        values = torch.cat([torch.stack(loss[:4]), loss.late, bad.float()[None]])
        self.sums += torch.where(bad, self.one_skipped, values)
        self.steps += 1

    def read(self):
        """-> {name: mean since the last call}, skipped steps. Raises Refusal if all were."""
        *sums, late, count, skipped = self.sums.tolist()
        good = self.steps - skipped
        if not good:
            raise Refusal(
                f"the loss was not finite for {self.steps} steps on end; resume.pt holds the last "
                "good state: lower --lr, or --precision fp32"
            )
        means = [x / good for x in sums] + [late / count if count else float("nan")]
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.names, means)), int(skipped)


class Log:
    """One line an interval on stdout, the same numbers in log.csv."""

    columns = ("step", *Watch.names, "lr", "images_per_s", "skipped", "val_dice")

    def __init__(self, path, start, args):
        self.path, self.start, self.args, self.began = path, start, args, time.monotonic()
        rows = []
        if start and path.exists():  # a resumed run drops what came after its last save
            rows = [r for r in csv.reader(path.open()) if r and r[0].isdigit()]
        with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([self.columns, *(r for r in rows if int(r[0]) <= start)])

    def write(self, **values):
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )

    def losses(self, step, means, skipped, lr):
        pace = (time.monotonic() - self.began) / (step - self.start)  # seconds a step
        rate, left = self.args.batch_size / pace, (self.args.steps - step) * pace
        self.write(step=step, **means, lr=lr, images_per_s=rate, skipped=skipped)
        text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
        skips = f"  {skipped} steps skipped: not finite" if skipped else ""
        speed = f"lr {lr:.1e}  {rate:.1f} images/s  {duration(left)} left"
        print(f"step {step}  {text}  {speed}{skips}", flush=True)

    def score(self, step, score, best):
        self.write(step=step, val_dice=score)
        print(f"step {step}  validation Dice {score:.4f}{'  best' if score == best else ''}",
              flush=True)  # fmt: skip


def save_state(folder, step, best, key, trained, average, optimiser):
    """Write what `restore` reads. Raises Refusal where the disk is full."""
    state = {"step": step, "best": best, "data": key, "average": average.mean}
    state |= {"trained": [p.detach() for p in trained], "optimiser": optimiser.state_dict()}
    with whole_file(folder / "resume.pt") as path:
        try:
            torch.save(state, path)
        except RuntimeError as error:  # of PyTorch's writer; it does not say which OSError it met
            raise Refusal(f"{path}: cannot be written, is the disk full? ({one_line(error)[:100]})"
                          ) from None  # fmt: skip


def fitting(saved, p):
    """The saved tensor, if it has the parameter's shape: PyTorch would broadcast, or crash."""
    if saved.shape != p.shape:
        raise ValueError(f"{list(saved.shape)} where {list(p.shape)} is needed")
    return saved


def restore(folder, trained, average, optimiser, key):
    """Put a run's state back -> step, best Dice. Raises Refusal if it does not fit."""
    path = folder / "resume.pt"
    state = read_resume(path)
    try:
        if state["data"] != key:
            raise Refusal(f"{folder}: the data set, or how it is read, is not what it was then")
        with torch.no_grad():
            for live, saved in zip((trained, average.mean), (state["trained"], state["average"])):
                for p, q in zip(live, saved, strict=True):
                    p.copy_(fitting(q, p))
        moments = state["optimiser"]["state"]
        for i, p in enumerate(trained):
            for name in ("exp_avg", "exp_avg_sq"):
                fitting(moments[i][name], p)
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if not 0 < state["step"] < 1e9:
            raise ValueError(f"step {state['step']}")
        return int(state["step"]), float(state["best"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise Refusal(f"{path}: does not fit this model ({one_line(error)[:200]})") from None


def watch_signals():
    """-> a list that receives the number of the first SIGTERM or SIGINT; a second one kills."""
    caught = []

    def handler(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        print("stopping after this step; once more stops at once", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def ignore_signals(worker):
    """In a process that loads data: Ctrl-C and SLURM reach all, but the run alone may decide."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_model(args, found, path, alone):
    """The model to train, its data set's properties in the config, mask scale still to be set."""
    asked = {"prediction": args.prediction, "fusion": args.fusion, "image_size": args.size}
    model = start_from(path, alone, data=found.name, split=args.split, classes=found.classes,
                       window=found.window, **{k: v for k, v in asked.items() if v})  # fmt: skip
    model.tau.requires_grad_(not args.freeze_encoder)
    return model


def check_room(out, model, trained):
    """Raise Refusal now rather than lose a run later: can the disk hold what will be saved?"""
    out.mkdir(parents=True, exist_ok=True)
    weights = 4 * sum(p.numel() for p in model.parameters())  # bytes of model.safetensors
    state = 16 * sum(p.numel() for p in trained)  # weights, averages, AdamW's two moments
    need = state + (0 if (out / "resume.pt").exists() else state + weights)  # old beside new
    free = shutil.disk_usage(out).free
    if free < need:
        raise Refusal(f"{out}: {free >> 20} MB free, {need >> 20} MB needed; choose another --out")


def main(args):
    path, why = settings(args)
    torch.manual_seed(args.seed)

    # 1. Where: processes, device, precision
    rank, world, local = torchrun_place()
    if args.batch_size % world:
        raise Refusal(f"--batch-size {args.batch_size}: not a multiple of {world} processes")
    device = find_device(args.device or (f"cuda:{local}" if torch.cuda.is_available() else None))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # DDP's warning about gradients of 1 x 1 convolutions: strides along a side of 1 are free
        warnings.filterwarnings("ignore", "Grad strides do not match")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_fast_bf16(device))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    say = partial(print, flush=True) if rank == 0 else lambda text: None

    # 2. Data and model
    found = find(args.data, args.root, args.split)
    alone = args.fresh and path == args.init
    model = make_model(args, found, path, alone)
    say(f"starts from {path}{', its autoencoder alone' if alone else ''}: {why}")
    size = model.config.image_size
    augment = None if args.augment == "none" else args.augment
    train_data = SegmentationData(found, "train", size, augment, args.seed)
    val_data = SegmentationData(found, "val", size)
    # Not without --compile: on a GPU every group norm would copy such a tensor twice
    model.to(device=device, memory_format=torch.channels_last if args.compile else None)
    scale = 1 / mask_std(model, train_data)
    if not math.isfinite(scale):
        raise Refusal(f"{path}: its autoencoder makes masks NaN; take other weights")
    model.config = replace(model.config, mask_scale=scale)
    trained = [p for p in model.parameters() if p.requires_grad]
    out = Path(args.out)
    if rank == 0:
        check_room(out, model, trained)
    count = sum(p.numel() for p in trained) / 1e6
    say(f"{found.name}: {len(train_data)} training, {len(val_data)} validation items of {size} px, "
        f"{len(found.classes)} classes; mask latents have std {1 / scale:.3f}")  # fmt: skip
    rebuilt = round_trip(model, val_data)
    advice = ": try another --size, or `train_vae.py --init`" if rebuilt < 0.95 else ""
    say(f"the autoencoder rebuilds masks with Dice {rebuilt:.3f}{advice}")
    say(f"{count:.1f} M parameters train on {device}, {'bf16' if bf16 else 'fp32'}, "
        f"processes: {world}; {args.steps} steps of {args.batch_size}")  # fmt: skip

    # 3. Optimiser, average, and where a resumed run left off
    optimiser = torch.optim.AdamW(trained, lr=args.lr, fused=True)
    average = Average(trained, args.ema)
    start, best = 0, -1.0
    if args.resume:
        start, best = restore(Path(args.resume), trained, average, optimiser, train_data.key)
        say(f"resumed at step {start}, best validation Dice {best:.4f}")
    if rank == 0:
        config = {"args": vars(args), "model": asdict(model.config), "torch": torch.__version__}
        with whole_file(out / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=1))
    if args.compile:  # with CUDA graphs on one GPU; several exchange gradients in the middle
        model.compile(mode="reduce-overhead" if world == 1 else "default")
    uncompiled = partial(torch.compiler.set_stance, "force_eager") if args.compile else nullcontext
    net = DistributedDataParallel(model) if world > 1 else model
    workers = args.workers if args.workers is not None else 4 * (device.type == "cuda")
    loader = torch.utils.data.DataLoader(
        Batches(train_data, model, args, rank, world), batch_size=None,
        sampler=range(start, args.steps), num_workers=workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )  # fmt: skip
    log = Log(out / "log.csv", start, args) if rank == 0 else None
    caught = watch_signals()

    # 4. The loop; nothing in it waits for the GPU but the log and the validation
    model.train()
    watch, latents = Watch(optimiser, device), MaskLatents(model)
    for step, (image, mask, views, t, noise) in zip(range(start, args.steps), loader):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args)
        image, mask = (x.to(device, non_blocking=True) for x in (image, mask))
        z_0 = latents(mask, views)
        with autocast():
            loss = net(image, mask, drawn=(t, noise), z_0=z_0, latent_weight=args.latent_weight,
                       mask_weight=args.mask_weight)  # fmt: skip
        loss.total.backward()
        watch.step(loss)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(step)

        # 5. Log, validate, save
        done = step + 1
        final = done == args.steps or bool(caught)
        if rank == 0 and (done % args.log_every == 0 or final):
            log.losses(done, *watch.read(), optimiser.param_groups[0]["lr"])
        due = done % args.eval_every == 0 or done == args.steps
        if rank == 0 and (due or final):
            if not due:  # stopped: torchrun gives 30 seconds, and a validation may take longer
                save_state(out, done, best, train_data.key, trained, average, optimiser)
            average.swap()
            model.eval()
            with uncompiled():  # else it would be compiled anew, for other batch sizes
                score = validate(model, val_data, device, autocast)
                strip = sample_strip(model, val_data, device)
            write_image(out / "samples" / f"{done:06d}.png", strip)
            if score > best:
                best = score
                model.save(out / "model.safetensors")
            model.train()
            average.swap()
            log.score(done, score, best)
            save_state(out, done, best, train_data.key, trained, average, optimiser)
        if final and caught:  # a signal that came since `final` was set waits for the next step
            return 128 + caught[0]
    say(f"done: {out / 'model.safetensors'}, validation Dice {best:.4f}")


def main_or_refusal(args):
    """`main`, with what a user can do about a full memory, or no compiler, not a traceback."""
    try:
        return main(args)
    except (MemoryError, RuntimeError) as error:
        if args.compile and ("C compiler" in str(error) or "C++ compiler" in str(error)):
            raise Refusal(
                "--compile needs a C++ compiler, and none is found; train without it"
            ) from None
        if not out_of_memory(error):
            raise
        smaller = f"--batch-size {args.batch_size // 2}, or " if args.batch_size > 1 else ""
        raise Refusal(f"out of memory; try {smaller}a smaller --size") from None


if __name__ == "__main__":
    run(lambda: main_or_refusal(ARGS))
