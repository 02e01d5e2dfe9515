"""Train SDSeg: `python train.py --data cvc`, and `python train.py --resume runs/cvc`.

tau and the U-Net train; the autoencoder stays frozen. A run's folder holds `model.safetensors`
(best validation Dice, averaged weights, complete), `resume.pt`, `log.csv`, `curves.png`,
`samples/STEP.png` and `config.json`. Everything random is a function of (seed, step). So a resumed
run repeats an uninterrupted one, to the last bit on a CPU and to rounding on a GPU, and two
processes with half a batch each take the step of one process.
Several GPUs: `torchrun --nproc_per_node=8 train.py --data cvc`. Each of several machines needs the
data and the initial weights; `--resume` needs a folder that all machines share.
`main` has six phases. The noise and the loss of a step stand above it, the helpers below it.
"""

import contextlib
import copy
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import SegmentationData, TrainingBatches, find
from sdseg import SDSegConfig, T, from_pretrained
from support import run_state
from support.cache import LatentCache
from support.cli import (
    ArgumentParser,
    Progress,
    UserError,
    bounded,
    format_duration,
    positive_int,
    print0,
    run_command,
    seed_int,
)
from support.device import choose_dtype, compile_networks, init_distributed, loader_workers
from support.folders import image_hashes
from support.images import write_image
from support.metrics import latent_std, mean_dice, pixel_counts, vae_dice
from support.panels import plot_panels, to_uint8
from support.small_gpu import is_too_small, save_memory
from support.weights import DEFAULT_WEIGHTS, read_weights

RECIPES = {  # by the preset of the initial weights; a flag of the same name replaces the value
    "paper": dict(steps=100_000, batch_size=4, lr=4e-5, warmup=1000, decay=False, eval_every=2000,
                  ema=0.9999, terminal_fraction=0.0, mask_weight=0.0, augment="flip"),
    "nano": dict(steps=5000, batch_size=16, lr=5e-4, warmup=200, decay=True, eval_every=250,
                 ema=0.998, terminal_fraction=0.875, mask_weight=1.0, augment="full"),
}  # fmt: skip
LOG_EVERY = 25  # steps between two lines of the log; its latent_t900 is L_latent at t >= 900
LOG_COLUMNS = ("step", *run_state.LossMeter.names, "lr", "images_per_s", "skipped", "val_dice")


def sample_t_and_noise(n, latent_shape, generator=None, terminal_fraction=0.0, first=0):
    """t (n,) uniform over the T steps and standard normal noise (n, 4, h, w), both on the CPU.

    `terminal_fraction` of the samples, evenly spread, gets t = T - 1: the step of single-step
    inference, which uniform t visits once in a thousand samples. `first` is the number of samples
    drawn before these in the run, so that small batches keep the fraction too.
    """
    t = torch.randint(0, T, (n,), generator=generator)
    noise = torch.randn(n, *latent_shape, generator=generator)
    count = torch.arange(first, first + n + 1, dtype=torch.float64) * terminal_fraction
    return torch.where(count.floor().diff() > 0, T - 1, t), noise


def decoded_mask_loss(model, z_0_estimate, mask, t):
    """Beyond the paper: the loss on the decoded mask of the samples at t = T - 1.

    z_0_estimate (B, 4, h, w), mask (B, H, W), t (B,) on the CPU -> the mean over all B samples;
    those with t < T - 1 count as zero.
    """
    at_end = (t == T - 1).nonzero()[:, 0].to(mask.device, non_blocking=True)
    if len(at_end) == 0:
        return z_0_estimate.new_zeros(())
    logits = model.logits(model.decode_mask(z_0_estimate[at_end]))
    return cross_entropy_and_dice(logits, mask[at_end]) * (len(at_end) / len(t))


def cross_entropy_and_dice(logits, mask):
    """logits (B, K, H, W), mask (B, H, W) class ids -> cross-entropy + 1 - soft Dice, a scalar."""
    p = logits.softmax(1)[:, 1:]
    y = F.one_hot(mask, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].to(p.dtype)
    overlap, truth = (p * y).sum((2, 3)), y.sum((2, 3))
    # Where the truth is empty, the smoothing term is 1 % of the pixels. So 1 - Dice falls gradually
    # as false marks shrink; with 1 pixel it would stay near 1 until almost no mark is left.
    smooth = torch.where(truth > 0, 1.0, 0.01 * mask[0].numel())
    dice = (2 * overlap + smooth) / (p.sum((2, 3)) + truth + smooth)
    return F.cross_entropy(logits, mask) + 1 - dice.mean()


def weighted_loss(model, net, image, mask, z_0, t, noise, latent_weight, mask_weight):
    """-> loss, L_noise, L_latent and the loss on the decoded mask as one tensor (4,), and L_latent
    of each sample (B,). `net` is the model, or DDP around it; t (B,) is on the CPU.
    """
    out = net(image, z_0, t.to(image.device, non_blocking=True), noise)
    noise_loss, latent_loss = out.noise_loss.mean(), out.latent_loss.mean()
    mask_loss = torch.zeros_like(noise_loss)
    if mask_weight:
        mask_loss = decoded_mask_loss(model, out.z_0_estimate, mask, t)
    loss = noise_loss + latent_weight * latent_loss + mask_weight * mask_loss
    return torch.stack([loss, noise_loss, latent_loss, mask_loss]), out.latent_loss.detach()


def main(args):
    # 1. Device: one process, or one of torchrun's
    rank, world_size, device = init_distributed()
    dtype = choose_dtype(device, args.precision)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(args.seed)

    # 2. Data and model; the scale of the mask latents gives them a standard deviation of 1
    init, why = resolve_defaults(args, world_size, device)
    spec = find(args.data, args.root, args.split)
    model = make_model(args, spec, init)
    spec = replace(spec, context=model.config.context)
    print0(f"goes on with {args.out}: {why}" if args.resume else f"starts from {init}: {why}")
    size, augment = model.config.image_size, None if args.augment == "none" else args.augment
    train_set = SegmentationData(spec, "train", size, augment, args.seed)
    val_set = SegmentationData(spec, "val", size)
    if not train_set.has_foreground():
        raise UserError(f"{spec.name}: no mask of the train part holds any foreground")
    model.to(device)
    model.config = replace(model.config, mask_scale=1 / latent_std(model, train_set))
    describe(args, model, train_set, val_set, dtype, world_size)

    # 3. Optimiser, moving average, gradient scaler. It scales the loss for float16 only; otherwise
    #    its factor stays 1, and it just skips steps with gradients that are not finite (not on mps)
    recipe = recipe_of(model.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    small_gpu = is_too_small(device, trained)  # then the average is in host memory: `update_ema`
    if args.compile and small_gpu:
        print0("--compile is ignored: this GPU is too small for it")
    elif args.compile:  # with CUDA graphs, unless a step has parts or GPUs exchange gradients
        plain = world_size == args.accumulate == 1
        compile_networks(model, mode="reduce-overhead" if plain else "default")
    ema, averages = make_ema(model, on_host=small_gpu)
    ema_every = average_every(recipe["ema"]) if small_gpu else 1
    if small_gpu:
        save_memory(model)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, fused=True)
    scale = None if dtype == torch.float16 else 1.0
    scaler = torch.amp.GradScaler(device.type, scale or 2.0**16, enabled=device.type != "mps")

    # 4. The run's folder, and the state of a resumed run
    folder, state = Path(args.out), dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    fingerprint = train_set.fingerprint + val_set.fingerprint
    start, averaged, best = 0, 0, -1.0  # the step to go on at, the first that is not averaged yet
    if args.resume:
        start, averaged, best = resume(folder, fingerprint, state, args.steps)
    if rank == 0:
        if not args.resume:
            run_state.claim_folder(folder)
        log = run_state.Log(folder / "log.csv", LOG_COLUMNS, start)
        run_state.write_settings(folder, vars(args), asdict(model.config))
    net = DistributedDataParallel(model) if world_size > 1 else model
    on_gpu, n = device.type == "cuda", args.batch_size
    loss_weights = args.latent_weight, args.mask_weight
    batches = TrainingBatches(train_set, n, args.seed, rank, world_size)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, args.steps),
                        num_workers=loader_workers(device), pin_memory=on_gpu,
                        worker_init_fn=run_state.ignore_stop_signals)  # fmt: skip

    # 5. The loop; it waits for the GPU only to log and to validate
    began, stop = time.monotonic(), run_state.catch_stop_signals()
    timer = run_state.FirstSteps(device, skip=5 if on_gpu or args.compile else 0)
    latents, meter = LatentCache(model.encode_mask), run_state.LossMeter(device)
    for step, (image, mask, symmetries) in zip(range(start, args.steps), loader):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args, recipe["decay"])
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        t, noise = sample_t_and_noise(n, model.latent_shape, generator, args.terminal_fraction,
                                      first=step * n)  # fmt: skip
        t, noise = (x[batches.share] for x in (t, noise))
        if on_gpu:  # else their copies wait for the last step
            t, noise = t.pin_memory(), noise.pin_memory()
        image, mask, noise = (x.to(device, non_blocking=True) for x in (image, mask, noise))
        losses, latent_losses = 0, []
        width = -(-len(t) // args.accumulate)  # of the parts; their gradients add up
        for begin in range(0, len(t), width):
            part = slice(begin, begin + width)
            last = begin + width >= len(t)  # only then do processes exchange gradients
            with contextlib.nullcontext() if last or world_size == 1 else net.no_sync():
                with autocast():
                    z_0 = latents(mask[part], symmetries and symmetries[part])
                    values, latent_loss = weighted_loss(
                        model, net, image[part], mask[part], z_0, t[part], noise[part],
                        *loss_weights)  # fmt: skip
                values = values * (len(t[part]) / len(t))
                scaler.scale(values[0]).backward()
            losses += values.detach()
            latent_losses.append(latent_loss)
        scaler.unscale_(optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update(scale)
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        due = done % args.eval_every == 0 or done == args.steps
        if due or done % ema_every == 0:
            update_ema(averages, trained, step, recipe["ema"], averaged)
            averaged = done
        t = t.to(device, non_blocking=True)
        meter.update(losses, torch.cat(latent_losses), t, gradient_norm)

        # 6. Log, validate, save
        stopping = bool(stop)
        if seconds := timer.step():
            print0(run_state.first_estimate(seconds * (args.steps - done), size, device))
        if rank == 0 and (done % LOG_EVERY == 0 or done == args.steps or stopping):
            log_losses(log, meter, done, lr, (time.monotonic() - began) / (done - start), args)
        if rank == 0 and due:
            judged = ema
            if small_gpu:
                judged = copy.deepcopy(ema).for_inference(device, args.precision)
            with autocast():
                score = validate(judged, val_set, batch_size=4 if small_gpu else 16)
            write_image(folder / f"samples/{done:06d}.png", sample_strip(judged, val_set))
            log.write(step=done, val_dice=score)
            write_image(folder / "curves.png", plot_panels(curves(log)))
            print0(f"step {done}  {in_words(score)}{'  best' if score > best else ''}")
            if not score <= best:  # better; or undefined, then the last model is kept
                best = score
                ema.save(folder / "model.safetensors")
        if rank == 0 and (due or stopping):
            values = dict(step=done, averaged=averaged, best=best, data=fingerprint)
            run_state.save_state(folder / "resume.pt", values, **state)
        if stopping:
            print0(f"saved at step {done}; to go on: python train.py --resume {folder}")
            return 128 + stop[0]  # the exit status that a shell gives for a signal
    print0(f"done: {folder / 'model.safetensors'}, {in_words(best)}")


# ---- the optimisation ----


def learning_rate(step, args, decay):
    """A linear warm-up; with `decay` also a linear fall, to zero after the last step."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * (1 - step / args.steps if decay else 1)


def make_ema(model, on_host=False):
    """-> a copy of the model that holds the averages, and the list of its averaged parameters."""
    ema, averages = copy.deepcopy(model), []
    if on_host:
        ema.cpu()
    for average, p in zip(ema.parameters(), model.parameters()):
        if p.requires_grad:
            averages.append(average.requires_grad_(False))
        elif not on_host:
            average.data = p.data  # frozen: one memory for both
    return ema, averages


def average_every(decay):
    """Steps between two updates of an average in host memory: 1 % of the steps that it remembers.

    100 for sd-v1, where an update takes about a second: 3.4 GB leave the GPU.
    """
    return max(1, round(0.01 / (1 - decay)))


@torch.no_grad()
def update_ema(averages, trained, step, decay, since=None):
    """Move the averages towards the parameters, by as much as in all steps from `since` on."""
    steps = range(step if since is None else since, step + 1)
    # (1 + i) / (10 + i): forget the start quickly
    weight = 1 - math.prod(min(decay, (1 + i) / (10 + i)) for i in steps)
    if averages[0].device == trained[0].device:
        return torch._foreach_lerp_(averages, trained, weight)
    for average, p in zip(averages, trained):  # one at a time, because host memory is short too
        average.lerp_(p.to(average.device), weight)


# ---- validation ----


def validate(model, data, batch_size=16):
    """Mean Dice of the images or whole volumes, at the side that the model sees and not at the
    files' own size; single-step inference, noise of seed 0.
    """
    counts, progress = {}, Progress(len(data), "items validated")
    for i in range(0, len(data), batch_size):
        indices = range(len(data))[i : i + batch_size]
        batch = data.batch([(None, j) for j in indices])
        generator = torch.Generator().manual_seed(0)
        prob = model.segment(batch["image"].to(model.device), generator=generator)
        for j, ids, truth in zip(indices, model.class_ids(prob).cpu(), batch["mask"]):
            pixels = pixel_counts(ids, truth, len(model.config.classes))
            counts[data.cases[j]] = counts.get(data.cases[j], 0) + pixels
        progress.step(len(indices))
    return mean_dice(np.stack(list(counts.values())))


def in_words(score):
    """nan means that no validation mask holds foreground, -1 that nothing is validated yet."""
    return f"validation Dice {score:.4f}" if score >= 0 else "validation Dice -"


@torch.no_grad()
def sample_strip(model, data, n=6):
    """uint8 image, one row per item: image | truth | prediction | 3 channels of its latent."""
    n = min(n, len(data))
    batch = data.batch([(None, i * len(data) // n) for i in range(n)])
    image, truth = (batch[name].to(model.device) for name in ("image", "mask"))
    z_c = model.encode_image(image)
    if model.config.context == "neighbours":
        image = image[:, 1:2].expand(-1, 3, -1, -1)  # the slice itself
    noise = torch.randn(z_c.shape[1:], generator=torch.Generator().manual_seed(0))
    z_0 = model.ddim_sample(noise.to(model.device).expand_as(z_c), z_c, [T - 1])
    latent = F.interpolate(z_0[:, :3], image.shape[2:], mode="nearest") / 2
    rows = torch.cat([image, model.labels_to_rgb(truth), model.decode_mask(z_0), latent], 3)
    return np.concatenate(list(to_uint8(rows)))


# ---- the run ----


def resolve_defaults(args, world_size, device):
    """Fill in what the user left open -> the initial weights, and why these."""
    if args.resume:
        if args.batch_size % world_size:
            raise UserError(f"{args.resume}: its batches of {args.batch_size} images cannot be "
                            f"shared equally by {world_size} processes")  # fmt: skip
        best = Path(args.out) / "model.safetensors"  # not there before the first validation
        return best if best.exists() else args.init, "as --resume says"
    why = "as --init says"
    if args.init is None:
        big = Path("weights/sd-v1.safetensors")
        args.init = str(big if big.exists() else DEFAULT_WEIGHTS)
        missing = f"there is no {big}, see docs/data.md"
        why = "converted weights are there" if big.exists() else missing
    config = read_weights(args.init, SDSegConfig)[0]
    recipe = recipe_of(config)
    if args.batch_size is None:  # at least one image for each process
        args.batch_size = -(-recipe["batch_size"] // world_size) * world_size
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {world_size} processes")
    if args.accumulate is None:  # a CPU's memory is short: 4 images of 256 px at a time
        at_once = max(1, 2**18 // (args.size or config.image_size) ** 2)
        on_cpu = device.type == "cpu"
        args.accumulate = -(-args.batch_size // world_size // at_once) if on_cpu else 1
    for name in recipe.keys() & vars(args).keys():
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    args.out = args.out or f"runs/{Path(args.data).resolve().name.replace('+', '-')}"
    if any(Path(args.out, name).exists() for name in ("config.json", "model.safetensors")):
        raise UserError(f"{args.out}: holds a run already; --resume {args.out}, or another --out")
    return args.init, why


def recipe_of(config):
    return RECIPES["nano" if config.preset == "nano" else "paper"]


def make_model(args, spec, init):
    """The model to train, from the initial weights and what the flags change."""
    if args.context == "neighbours" and not spec.volumes:
        raise UserError(f"--context neighbours: {spec.name} holds images; only volumes have slices")
    changes = dict(prediction=args.prediction, fusion=args.fusion, image_size=args.size,
                   context=args.context if spec.volumes else "repeat")  # fmt: skip
    changes = {name: value for name, value in changes.items() if value}
    changes |= dict(classes=spec.classes, window=spec.window, plane=spec.plane)
    # A copy, because weights are mapped from their file, and Windows replaces no mapped file
    model = copy.deepcopy(from_pretrained(init, **changes))
    config, val = model.config, image_hashes(spec.splits["val"])
    seen = len(set(config.trained_on) & set(val))
    if seen and not args.resume:
        print0(f"{init} was trained on {seen} of the {len(val)} validation cases, so validation "
               "Dice is too high; evaluation leaves out the test cases that it saw")  # fmt: skip
    model.config = remember_images(config, spec, args.split)
    model.tau.requires_grad_(not args.freeze_encoder)
    return model


def remember_images(config, spec, split):
    """The config of a model that will be trained on a data set, with the hashes of its images
    added to those before.
    """
    trained_on = tuple(sorted({*config.trained_on, *image_hashes(spec.splits["train"])}))
    return replace(config, data=spec.name, split=split, trained_on=trained_on)


def describe(args, model, train_set, val_set, dtype, world_size):
    """Say what trains, on what, and how well the autoencoder rebuilds these masks."""
    config, dice = model.config, vae_dice(model, val_set)
    print0(f"{config.data}: {len(train_set)} training, {len(val_set)} validation items of "
           f"{config.image_size} px, {len(config.classes)} classes; mask latents have std "
           f"{1 / config.mask_scale:.3f}")  # fmt: skip
    advice = ""
    if dice < 0.95:
        advice = ": try another --size, or `python -m tools.train_vae --init`"
    elif dice != dice:  # nan
        advice = ": those tried hold no foreground"
    print0(f"the autoencoder rebuilds masks with Dice {dice:.3f}{advice}")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print0(f"{count:.1f} M parameters train on {model.device}, {str(dtype)[6:]}, processes: "
           f"{world_size}; {args.steps} steps of {args.batch_size}")  # fmt: skip


def resume(folder, fingerprint, state, steps):
    """Put a run's state back -> step, the first step that is not averaged yet, best validation
    Dice. Raises UserError if it does not fit.
    """
    values = run_state.load_state(folder / "resume.pt", **state)
    if values["data"] != fingerprint:
        raise UserError(f"{folder}: the data set, or how it is read, has changed since this run")
    if values["step"] >= steps:
        raise UserError(f"{folder}: is at step {values['step']} already; give more --steps")
    print0(f"resumed at step {values['step']}, best {in_words(values['best'])}")
    return values["step"], values["averaged"], values["best"]


def curves(log):
    """What a run's curves.png shows, each against the step."""
    return [
        ("losses, by step", log.curves(run_state.LossMeter.names), None, None),
        ("validation Dice, by step", log.curves(["val_dice"]), None, (0, 1)),
        ("learning rate, by step", log.curves(["lr"]), None, None),
    ]


def log_losses(log, meter, done, lr, seconds_a_step, args):
    """One printed line, and the same numbers in log.csv."""
    means, skipped = meter.read()
    rate, left = args.batch_size / seconds_a_step, (args.steps - done) * seconds_a_step
    log.write(step=done, **means, lr=lr, images_per_s=rate, skipped=skipped)
    text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    note = f"  {skipped} steps skipped: not finite" if skipped else ""
    left = format_duration(left)
    print0(f"step {done}  {text}  lr {lr:.1e}  {rate:.1f} images/s  {left} left{note}")


def parse_args(argv=None):
    parser = ArgumentParser("Train SDSeg on a data set; see also the README.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.resume:
        return resumed_args(parser, args, parser.given(argv))
    if not args.data:
        parser.error("give --data or --resume")
    return args


def add_arguments(parser):
    default = {name: f"(default: {value}; nano: {RECIPES['nano'][name]})"
               for name, value in RECIPES["paper"].items()}  # fmt: skip
    amount, fraction = bounded(float, 0), bounded(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--data", help="cvc, kvasir, refuge2, btcv, btcv-organs, sts3d, demo, several as a+b, "
        "or a folder")  # fmt: skip
    add("--root", default="data", help="where the data sets are")
    add("--split", default="random", choices=["random", "sequence"],
        help="random: always the same; sequence: cvc by video")  # fmt: skip
    add("--size", type=positive_int, help="pixels, H = W (default: that of the weights)")
    add("--context", choices=["repeat", "neighbours"],
        help="a volume's slice three times, or between its neighbours (default: as the weights)",
        )  # fmt: skip
    add("--augment", choices=["none", "flip", "full"],
        help=f"full: flips, crops, affine maps, colours {default['augment']}")  # fmt: skip

    add = parser.add_argument_group("the run").add_argument
    add("--resume", metavar="DIR", help="go on with a run; only --steps and --root may be changed")
    add("--init", metavar="FILE", help="initial weights (default: sd-v1 if converted, else nano)")
    add("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    add("--seed", type=seed_int, default=0, help="seed of everything random")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive_int, help=f"optimiser steps {default['steps']}")
    add("--batch-size", type=positive_int, help=f"images, all GPUs {default['batch_size']}")
    add("--lr", type=amount, help=f"peak learning rate of AdamW {default['lr']}")
    add("--warmup", type=bounded(int, 0), help=f"steps of warm-up {default['warmup']}")
    add("--eval-every", type=positive_int,
        help=f"steps between two validations {default['eval_every']}")  # fmt: skip

    add = parser.add_argument_group("method").add_argument
    add("--prediction", choices=["eps", "x0", "v"],
        help="what the U-Net predicts (default: as the weights)")  # fmt: skip
    add("--fusion", choices=["concat", "cross"],
        help="z_c as channels or by cross-attention (default: that of the weights)")  # fmt: skip
    add("--freeze-encoder", action="store_true", help="do not train tau")
    add("--latent-weight", type=amount, default=1.0, help="lambda of Eq. 3")
    add("--mask-weight", type=amount,
        help=f"weight of the loss on the decoded mask {default['mask_weight']}")  # fmt: skip
    add("--terminal-fraction", type=fraction,
        help=f"share of the samples at t = T - 1 {default['terminal_fraction']}")  # fmt: skip

    add = parser.add_argument_group("machine").add_argument
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="number format of autocast")  # fmt: skip
    add("--accumulate", type=positive_int, metavar="N", help="a step's batch in N parts, which "
        "saves memory (default: 1; on a CPU parts of at most 4 images of 256 px)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile: minutes at first, for long GPU runs")


def resumed_args(parser, args, given):
    """The settings of the run to resume, with the few that may change."""
    refused = sorted(given - {"resume", "steps", "root"})
    if refused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        parser.error(f"--resume does not take {names}; a new run with --init does")
    parser.prog = f"{parser.prog}: {args.resume}/config.json"
    saved = parser.parse_args(run_state.read_flags(args.resume))
    if not (saved.data and saved.init):
        parser.error("--data and --init are missing")
    vars(saved).update({name: getattr(args, name) for name in given}, out=args.resume)
    return saved


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
