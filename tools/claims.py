"""The paper's claims at small size, and does diffusion help? `python -m tools.claims`.

Every row of two experiments is trained with several seeds and scored on validation images. Each
(row, seed) leaves one small JSON in --out; a second call goes on where the first was stopped.
`--report` makes three tables and a figure of the JSONs. Rows differ from the row that they are
compared with in what their line in TABLE says, and in nothing else: same data, batches and steps.
Latents have 8 x 8 pixels: images of 64 px with the f8 autoencoder, of 32 px with the f4 one. This
command trains both autoencoders; the rows keep them frozen, but `logits` trains its own, and
`plain` has none. The rate is constant after a warm-up and the weights are averaged (EMA), because
plateaus are compared: mean validation Dice of the last third.
Letters: B batch, N images, S pixels of a side, M measurements, z_0 z_t z_c as in `sdseg.py`.
"""

import functools
import json
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import SegmentationData, TrainingBatches, find
from sdseg import Losses, SDSeg, SDSegConfig, T, ddim_timesteps
from support.cli import (
    ArgumentParser,
    UserError,
    atomic_write,
    bounded,
    keep_freed_memory,
    positive_int,
    print_line,
    run_command,
    seed_int,
)
from support.device import device_name, find_device
from support.folders import file_hash
from support.metrics import dice_from_counts, latent_std
from support.run_state import load_state, save_state
from support.weights import load_strict, read_weights
from tools import train_vae
from tools.claims_report import plateau, report
from train import decoded_mask_loss, make_ema, sample_t_and_noise, update_ema
from unet import UNet, UNetConfig

LR, WARMUP, EMA = 1e-3, 50, 0.99
UNET = UNetConfig("sd", 8, 4, 32, (1, 2, 4), 1, (2, 4), 4, None)  # 3.9 M parameters
PIXEL_UNET = UNetConfig("sd", 3, 2, 32, (1, 1, 2, 4), 1, (4, 8), 4, None)  # of `plain`: 4.0 M
LATENT_SIDE = 8  # h = w of z_0
VALIDATIONS = 15  # in a run, evenly spread; the last five are the plateau
CHUNK = 64  # validation images at a time
STEPS = (1, 2, 5, 10, 50)  # DDIM steps of Figure 3
LEVELS = (9, 99, 199, 299, 499, 699, 849, 949, T - 1)  # t at which the z_0 estimate is measured
SAVE_EVERY = 60  # seconds between two checkpoints of a run


# ---- the rows ----


@dataclass(frozen=True)
class Row:
    """One way to train and to segment. The defaults are nano's recipe: the base of `helps`."""

    factor: int = 4  # image side / latent side, of the frozen autoencoder
    prediction: str = "x0"
    zero_terminal_snr: bool = True  # "eps" cannot have it, see sdseg.py:noise_schedule
    fusion: str = "concat"
    freeze_encoder: bool = False
    terminal_fraction: float = 0.875  # of the samples at t = T - 1, the others are uniform
    noise_weight: float = 1.0
    latent_weight: float = 1.0  # lambda
    mask_weight: float = 1.0
    start: str = "noise"  # the noise of training and inference, or "zeros" in its place
    network: str = "SDSeg"  # "no z_t", "no autoencoder" and "plain U-Net": see `build`


# The paper's own recipe. Its cross-attention has tokens without a position, as in the paper.
PAPER = dict(factor=8, prediction="eps", zero_terminal_snr=False, fusion="cross",
             freeze_encoder=True, terminal_fraction=0.0, latent_weight=0.0, mask_weight=0.0,
             )  # fmt: skip
TABLE = {  # experiment: row: (the row that it is compared with, what differs from it)
    "faithful": {
        "cross": (None, PAPER),
        "concat": ("cross", dict(fusion="concat")),  # Table 6, row by row
        "trainable": ("concat", dict(freeze_encoder=False)),
        "lambda-1": ("trainable", dict(latent_weight=1.0)),
        "cross-trainable": ("cross", dict(freeze_encoder=False)),  # does tau make up for it?
        "f8-x0": ("lambda-1", dict(prediction="x0")),  # is it the noise prediction?
    },
    "helps": {
        "base": (None, {}),
        "eps": ("base", dict(prediction="eps")),  # this also keeps the schedule's leak
        "v": ("base", dict(prediction="v")),
        "eq-3": ("base", dict(mask_weight=0.0)),
        "uniform": ("eq-3", dict(terminal_fraction=0.0)),
        "uniform-eps": ("uniform", dict(prediction="eps")),  # the paper's, at f4
        "terminal": ("base", dict(terminal_fraction=1.0)),  # z_t is noise alone from here on
        "zeros": ("terminal", dict(start="zeros")),  # a constant in place of the noise
        "no-z_t": ("terminal", dict(network="no z_t")),  # 4 input channels fewer
        "latent": ("no-z_t", dict(mask_weight=0.0)),  # a regression of latents
        "mask": ("no-z_t", dict(noise_weight=0.0, latent_weight=0.0)),
        "logits": ("mask", dict(network="no autoencoder")),  # tau and decoder from scratch
        "plain": ("logits", dict(network="plain U-Net")),  # on pixels, with skips
    },
}
ROWS = {}
for rows in TABLE.values():
    for name, (than, changes) in rows.items():
        ROWS[name] = replace(ROWS[than] if than else Row(), **changes)


def measurements(row):
    """What the last model is scored at: {name: (DDIM steps, samples, what it starts from)}."""
    asked = {"1x1": (1, 1, row.start)}
    if row.network != "SDSeg":
        return asked
    if row.factor == 8:
        return {f"{s}x1": (s, 1, row.start) for s in STEPS} | {"1x25": (1, 25, row.start)}
    if row.terminal_fraction < 1:
        asked["10x1"] = (10, 1, row.start)
    return asked | {"other": (1, 1, "zeros" if row.start == "noise" else "noise")}


def size_of(row):
    """H = W of its images."""
    return LATENT_SIDE * row.factor


# ---- the networks ----


class WithoutZt(SDSeg):
    """The one difference: the U-Net sees z_c alone, so nothing depends on noise or on z_0."""

    def predict(self, z_t, t, z_c):
        return self.unet(z_c, t)


class PlainUNet(nn.Module):
    """A U-Net from pixels to logits: no latents, no noise, t = 0. The names are SDSeg's, so that
    the loop, the loss on the mask and the scores need no other code.
    """

    latent_shape = (1, 1, 1)  # of noise that nothing reads

    def __init__(self):
        super().__init__()
        self.unet = UNet(PIXEL_UNET)
        self.encode_image = self.decode_mask = self.logits = nn.Identity()

    def forward(self, image, z_0, t, noise):
        return Losses(None, None, self.ddim_sample(noise, image, None))

    def ddim_sample(self, noise, image, timesteps):
        return self.unet(image, torch.zeros(len(image), dtype=torch.int64, device=image.device))

    def probabilities(self, logits):
        return logits.softmax(1)[:, 1:]


def build(row, vae_file, classes):
    """The untrained model of a row; U-Net and tau are about as large as the plain U-Net."""
    if row.network == "plain U-Net":
        return PlainUNet()
    config, tensors = read_weights(vae_file, SDSegConfig)
    z = config.vae.z_channels
    sees_both = row.network == "SDSeg" and row.fusion == "concat"
    tokens = z if row.fusion == "cross" else None
    unet = replace(UNET, in_channels=z + z * sees_both, out_channels=z, context_dim=tokens)
    config = replace(config, unet=unet, classes=classes, image_size=size_of(row),
                     fusion=row.fusion, prediction=row.prediction,
                     zero_terminal_snr=row.zero_terminal_snr)  # fmt: skip
    model = (SDSeg if row.network == "SDSeg" else WithoutZt)(config)
    if row.network == "no autoencoder":  # the same layers: random at first, all trained
        model.config = replace(config, mask_scale=1.0)
        for part in (model.vae.post_quant_conv, model.vae.decoder):
            part.requires_grad_()
        return model
    vae = {k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")}
    load_strict(model.vae, vae, vae_file)
    model.tau.init_from(model.vae)
    model.tau.requires_grad_(not row.freeze_encoder)
    return model


def loss_of(row, model, image, mask, t, noise):
    """The weighted losses of a row; t (B,) on the CPU, the rest on the device."""
    weighs_latents = row.noise_weight or row.latent_weight
    z_0 = model.encode_mask(mask) if weighs_latents else noise
    out, loss = model(image, z_0, t.to(image.device), noise), 0.0
    if weighs_latents:
        loss = row.noise_weight * out.noise_loss.mean()
        loss = loss + row.latent_weight * out.latent_loss.mean()
    if row.mask_weight:
        loss = loss + row.mask_weight * decoded_mask_loss(model, out.z_0_estimate, mask, t)
    return loss


# ---- the data ----


@functools.cache
def load_data(data, root, size, device):
    """-> classes, training items, validation [(image, mask)] on the device and their groups.

    Augmented as in train.py, but without its crops.
    """
    spec = find(data, root)
    if spec.volumes or len(spec.classes) > 2:
        raise UserError(f"--data {data}: this command needs images and one class of foreground")
    train_set = SegmentationData(spec, "train", size, "full")
    train_set.crops = False
    val_set, val = SegmentationData(spec, "val", size), []
    for i in range(0, len(val_set), CHUNK):
        batch = val_set.batch([(None, j) for j in range(len(val_set))[i : i + CHUNK]])
        val.append((batch["image"].to(device), batch["mask"].to(device)))
    return spec.classes, train_set, val, [case.group for case in val_set.cases]


# ---- scores ----


def image_dice(prob, mask):
    """Probabilities (B, 1, S, S), masks (B, S, S) -> B numbers."""
    ids = (prob[:, 0] > 0.5).long()
    counts = [(x.flatten(1).sum(1)).cpu().numpy() for x in (ids * mask, ids, mask)]
    return dice_from_counts(np.stack(counts, 1)).round(4).tolist()


@torch.no_grad()
def score(model, val, steps, samples, start):
    """Dice of each validation image; each has noise of its own, of seed 0, drawn on the CPU."""
    generator, result = torch.Generator().manual_seed(0), []
    for image, mask in val:
        z_c, prob = model.encode_image(image), 0.0
        for _ in range(samples):
            noise = torch.randn(len(image), *model.latent_shape, generator=generator)
            noise = noise.to(image.device) * (start == "noise")
            z_0 = model.ddim_sample(noise, z_c, ddim_timesteps(steps))
            prob = prob + model.probabilities(model.decode_mask(z_0)) / samples
        result += image_dice(prob, mask)
    return result


@torch.no_grad()
def z_0_errors(model, val):
    """How good one call is at each noise level: {level: [mean |z_0 estimate - z_0|, mean Dice]}.

    z_t holds the true z_0, as in training. "noise" is t = T - 1 from pure noise, as in inference,
    "autoencoder" the true z_0 itself: no row can score more than its Dice.
    """
    generator, sums = torch.Generator().manual_seed(0), {}
    for image, mask in val:
        z_0, z_c = model.encode_mask(mask), model.encode_image(image)
        noise = torch.randn(z_0.shape, generator=generator).to(z_0.device)
        estimates = {"autoencoder": z_0}
        for level in (*LEVELS, "noise"):
            t = torch.full((len(z_0),), T - 1 if level == "noise" else level, device=z_0.device)
            z_t = noise if level == "noise" else model.q_sample(z_0, t, noise)
            estimates[str(level)] = model.predict_z0(z_t, t, model.predict(z_t, t, z_c))
        for level, estimate in estimates.items():
            error = (estimate - z_0).abs().mean((1, 2, 3)).cpu().tolist()
            dice = image_dice(model.probabilities(model.decode_mask(estimate)), mask)
            sums.setdefault(level, []).append(np.stack([error, dice]))
    means = {level: np.concatenate(pairs, 1).mean(1) for level, pairs in sums.items()}
    return {level: pair.round(4).tolist() for level, pair in means.items()}


# ---- one run ----


def settings_of(args, name, seed):
    """All that decides a run's numbers, as it stands in its JSON and in its checkpoint."""
    row = ROWS[name]
    common = {k: getattr(args, k) for k in ("data", "steps", "batch_size")}
    vae = None if row.network == "plain U-Net" else file_hash(vae_file(args, row))[:16]
    constants = {"size": size_of(row), "lr": LR, "warmup": WARMUP, "ema": EMA, "vae": vae}
    return {"row": name, "seed": seed, **asdict(row), **common, **constants}


def vae_file(args, row):
    return str(Path(args.out) / f"f{row.factor}.safetensors")


def paths_of(args, name, seed):
    return (Path(args.out) / f"{name}-{seed}.json",
            Path(args.out) / "unfinished" / f"{name}-{seed}.pt")  # fmt: skip


def check_settings(found, settings, path):
    different = sorted(k for k in found.keys() | settings if found.get(k) != settings.get(k))
    if different:
        raise UserError(f"{path}: made with another {', '.join(different)}; use another --out")


def train_row(args, name, seed, deadline):
    """Train and score one row with one seed, from its checkpoint if there is one -> its JSON's
    content, or None if the deadline, as time.time() counts, came first: then it is saved.
    """
    row, settings = ROWS[name], settings_of(args, name, seed)
    device, (_, checkpoint) = find_device(args.device), paths_of(args, name, seed)
    classes, train_set, val, groups = load_data(args.data, args.root, size_of(row), device)
    train_set.seed = seed
    batches = TrainingBatches(train_set, args.batch_size, seed)
    torch.manual_seed(seed)
    model = build(row, vae_file(args, row), classes).to(device)
    encodes_masks = row.network in ("SDSeg", "no z_t")
    if encodes_masks:
        model.config = replace(model.config, mask_scale=1 / latent_std(model, train_set))
    ema, averages = make_ema(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    state = dict(model=model, ema=ema, optimizer=optimizer)
    begin, curve, seconds = 0, [], 0.0
    if checkpoint.exists():
        values = load_state(checkpoint, **state)
        check_settings(values["settings"], settings, checkpoint)
        begin, curve, seconds = values["step"], values["curve"], values["seconds"]

    began = saved = time.monotonic()
    for step in range(begin, args.steps):
        train_step(row, model, trained, optimizer, batches[step], seed, step)
        update_ema(averages, trained, step, EMA)
        done, late = step + 1, time.time() > deadline
        if done * VALIDATIONS // args.steps > step * VALIDATIONS // args.steps:
            dice = score(ema, val, 1, 1, row.start)
            curve.append({"samples": done * args.batch_size, "dice": dice})
        if late or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            spent = seconds + saved - began
            values = dict(settings=settings, step=done, curve=curve, seconds=spent)
            save_state(checkpoint, values, **state)
        if late:
            return None
    seconds += time.monotonic() - began
    errors = z_0_errors(ema, val) if encodes_masks else None
    return {
        "settings": settings,
        "device": device_name(device),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in trained),
        "samples": args.steps * args.batch_size,
        "seconds": round(seconds, 1),
        "jobs": args.jobs,
        "groups": groups,
        "curve": curve,
        "scores": {k: score(ema, val, *how) for k, how in measurements(row).items()},
        "z_0_errors": errors,
    }


def train_step(row, model, trained, optimizer, batch, seed, step):
    """One step of the optimiser; t and the noise are a function of (seed, step)."""
    image, mask = (x.to(trained[0].device) for x in batch[:2])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    t, noise = sample_t_and_noise(len(image), model.latent_shape, generator,
                                  row.terminal_fraction, step * len(image))  # fmt: skip
    noise = noise.to(image.device) * (row.start == "noise")
    loss_of(row, model, image, mask, t, noise).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def work(args, name, seed, deadline):
    """Run one row in this process, write its JSON -> a line to print, or None if time was up."""
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.backends.cudnn.benchmark = True
    path, checkpoint = paths_of(args, name, seed)
    result = train_row(args, name, seed, deadline) if time.time() < deadline else None
    if result is None:
        return None
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result))
    checkpoint.unlink(missing_ok=True)
    return f"{name}, seed {seed}: Dice {plateau(result).mean():.4f}, {result['seconds']:.0f} s"


def set_up_process(threads):
    """Of each process that runs rows. Ctrl-C ends it at once; its last checkpoint stays."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    keep_freed_memory()
    torch.set_num_threads(threads)


# ---- the autoencoders ----


def train_autoencoder(args, row):
    """The small autoencoder of a row, unless it needs none or its file is there."""
    path = vae_file(args, row)
    if row.network != "plain U-Net" and not Path(path).exists():
        flags = {"data": args.data, "root": args.root, "size": size_of(row),
                 "factor": row.factor, "steps": args.vae_steps, "out": path}  # fmt: skip
        train_vae.main(train_vae.parse_args([f"--{k}={v}" for k, v in flags.items()]))


# ---- the command ----


def parse_args(argv=None):
    parser = ArgumentParser("The paper's claims at small size, and does diffusion help?")
    add = parser.add_argument
    add("--rows", type=row_names, default="faithful,helps", help="rows, or faithful, or helps")
    add("--seeds", type=seed_list, default="0,1,2", help="training seeds, with commas")
    add("--out", default="runs/claims", metavar="DIR", help="where the JSONs and the report go")
    add("--report", action="store_true", help="only make the report, from the JSONs in --out")
    add("--data", default="kvasir+cvc", help="a data set as in train.py")
    add("--root", default="data", help="where the data sets are")
    add("--vae-steps", type=positive_int, default=1500, help="of each autoencoder's training")
    add("--steps", type=bounded(int, VALIDATIONS), default=800, help="optimiser steps of a run")
    add("--batch-size", type=positive_int, default=32, help="images")
    add("--jobs", type=positive_int, default=1, help="runs side by side, each a process")
    add("--minutes", type=bounded(float, 0), help="then save the unfinished runs and stop")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    return parser.parse_args(argv)


def row_names(text):
    """Names of rows or experiments, with commas -> names of rows, in the order of TABLE."""
    asked = text.split(",")
    wrong = [name for name in asked if name not in ROWS and name not in TABLE]
    if wrong:
        raise UserError(f"--rows {wrong[0]}: choose from {', '.join([*TABLE, *ROWS])}")
    return [name for experiment, rows in TABLE.items() for name in rows
            if name in asked or experiment in asked]  # fmt: skip


def seed_list(text):
    return [seed_int(seed) for seed in text.split(",")]


def main(args):
    if args.report:
        return report(args.out, TABLE)
    deadline = time.time() + 60 * args.minutes if args.minutes is not None else float("inf")
    threads = max(1, torch.get_num_threads() // args.jobs)
    for name in args.rows:  # once for all: the autoencoders are trained, the images decoded
        train_autoencoder(args, ROWS[name])
        load_data(args.data, args.root, size_of(ROWS[name]), find_device(args.device))
    todo = []
    for seed in args.seeds:  # seed 0 of all rows first: a first answer comes early
        for name in args.rows:
            path, _ = paths_of(args, name, seed)
            if path.exists():
                found = json.loads(path.read_text())["settings"]
                check_settings(found, settings_of(args, name, seed), path)
            else:
                todo.append((name, seed))
    finished = 0
    for line in run_all(args, todo, deadline, threads):
        if line:
            finished += 1
            print_line(f"{finished}/{len(todo)}  {line}")
    if finished < len(todo):
        print_line(f"{len(todo) - finished} runs are left; the same command goes on with them")
    if any(Path(args.out).glob("*-*.json")):
        report(args.out, TABLE)


def run_all(args, todo, deadline, threads):
    """Yield what `work` returns for each (row, seed), in the order in which they end."""
    if args.jobs == 1:
        yield from (work(args, name, seed, deadline) for name, seed in todo)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be forked
    with ProcessPoolExecutor(args.jobs, spawn, set_up_process, (threads,)) as pool:
        futures = [pool.submit(work, args, *task, deadline) for task in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
