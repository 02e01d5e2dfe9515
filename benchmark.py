"""Measure speed and memory: `python benchmark.py --preset nano --batch-sizes 1,8 --train`.

Random weights, which cost what trained ones cost, or `--model FILE`. Times are medians, from a
batch of images on the device to their scores there; what is compared is called in turn in one
run, so that whatever else the machine does falls on all alike. With diffusers installed,
`--diffusers` also times its modules of the same sizes, as they come, inside our sampler.
"""

from common import Parser, Refusal, duration, out_of_memory, positive, run, within


def positive_list(text):
    return [positive(number) for number in text.split(",")]


def parse(argv=None):
    parser = Parser("Measure the speed and memory of inference and training.")
    add = parser.add_argument
    add("--preset", default="nano", choices=["nano", "sd-v1", "ldm-kl-8"],
        help="whose sizes")  # fmt: skip
    add("--model", metavar="FILE", help="real weights; their config replaces the preset")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of the networks; auto: the fastest that keeps the masks")  # fmt: skip
    add("--batch-sizes", type=positive_list, default=[1, 8], metavar="N,N",
        help="of inference (default: 1,8)")  # fmt: skip
    add("--seconds", type=within(float, 0), default=5.0, help="for each measurement")
    add("--train", action="store_true", help="also measure training, with the preset's recipe")
    add("--compile", action="store_true",
        help="also time networks that torch.compile has made: minutes more")  # fmt: skip
    add("--diffusers", action="store_true", help="also time diffusers' modules, if installed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import contextlib
import copy
import ctypes
import datetime
import itertools
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from data import SegmentationData, find
from demo import draw_demo
from infer import class_ids, predict
from metrics import dice
from sdseg import PRESETS, SDSeg, T, draw, find_device, has_fast_bf16, inference_dtype
from studies import peak_memory, synchronize

PARTS = ("tau", "U-Net", "decoder")
DIFFERENCE = "Dice {:.4f} between the masks; the scores differ by {:.5f} on average, {:.4f} at most"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---- measuring ----


def medians(calls, seconds, device):
    """Call each of {name: function} in turn, `seconds` each on average -> {name: median, in s}.

    Once to warm up, then three times or more.
    """
    times = {name: [] for name in calls}

    def timed(call):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    for call in calls.values():
        timed(call)
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < seconds * len(calls):
        for name, call in calls.items():
            times[name].append(timed(call))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def inference(models, n, seconds, device):
    """Time {name: model} on n images -> {(name, what): s}; what: "1 step", its PARTS, "10 steps".

    DDIM with 10 steps is timed for the first model alone.
    """
    size = next(iter(models.values())).config.image_size
    image = torch.rand(n, size, size, 3, device=device).permute(0, 3, 1, 2) * 2 - 1  # as `predict`
    t, calls = torch.full((n,), T - 1, device=device), {}
    with torch.no_grad():
        for name, m in models.items():
            z = m.condition(image)
            noise = torch.randn_like(z[0]).expand_as(z)  # as `sample`, lest it be compiled anew
            calls[name, "1 step"] = lambda m=m: m.segment(image)
            if len(calls) == 1:
                calls[name, "10 steps"] = lambda m=m: m.segment(image, steps=10)
            calls[name, "tau"] = lambda m=m: m.condition(image)
            calls[name, "U-Net"] = lambda m=m, z=z, n=noise: m.denoise(n, t, z)
            calls[name, "decoder"] = lambda m=m, z=z: m.decode_mask(z)
        return medians(calls, seconds, device)


def shares(times, name):
    """What part of the time tau, the U-Net and the decoder take, of their sum."""
    parts = [times[name, part] for part in PARTS]
    return [seconds / sum(parts) for seconds in parts]


def peak_of(call, device):
    """Call -> the peak of memory meanwhile, weights included, as text in MiB.

    On a CPU only Linux can forget an earlier peak; elsewhere it is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept, see keep_freed_memory
        Path("/proc/self/clear_refs").write_text("5")
    call()
    peak = peak_memory(device)
    return "-" if peak is None else f"{peak:.0f}"


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# ---- what is measured ----


def load(args, device):
    """The model in float32, of --model or with random weights."""
    if args.model:
        return SDSeg.load(args.model, device)
    torch.manual_seed(0)
    with device:
        return SDSeg(PRESETS[args.preset]).eval().to_precision(device)


def scores_of_drawn(model, n=4):
    """The scores of n drawn pictures, always from the same noise."""
    images = [draw_demo(seed, model.config.image_size)[0] for seed in range(n)]
    return torch.cat([predict(model, [image], 1, 1, 0)[0] for image in images])


def difference(scores, exact):
    """-> Dice between the masks, the scores' mean and largest change."""
    pairs = [(class_ids(a.numpy()), class_ids(b.numpy())) for a, b in zip(scores, exact)]
    k, change = max(2, exact.shape[1]), (scores - exact).abs()
    same = sum(dice(a, b, k).mean() for a, b in pairs) / len(pairs)
    return same, change.mean().item(), change.max().item()


class Theirs(SDSeg):
    """Our sampler around diffusers' modules of a config's sizes, with random weights."""

    def __init__(self, config, device, dtype):
        with torch.device("meta"):  # keeps the method; our own networks get no memory
            super().__init__(config)
        self.dtype, self.tau = dtype, None
        with device:
            self.vae, self.unet = (net.to(dtype) for net in their_modules(config))
        self.eval().to(device)

    def condition(self, image):
        return self.vae.encode(image.to(self.dtype)).latent_dist.mean.float()

    def decode_mask(self, z_0):
        return self.vae.decode(z_0.to(self.dtype)).sample.float()

    def denoise(self, z_t, t, z_c):
        """Their cross-attention cannot do without a context: it gets one token."""
        x = torch.cat([z_t, z_c], dim=1).to(self.dtype)
        width = getattr(self.unet.config, "cross_attention_dim", None)
        return self.unet(x, t, *([x.new_zeros(len(x), 1, width)] if width else [])).sample


def their_modules(config):
    """diffusers' AutoencoderKL, and its UNet2DConditionModel or, of the LDM family, UNet2DModel."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    v, u = config.vae, config.unet
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(v.ch_mult),
        up_block_types=["UpDecoderBlock2D"] * len(v.ch_mult),
        block_out_channels=[v.ch * m for m in v.ch_mult],
        layers_per_block=v.num_res_blocks,
    )
    kind = "CrossAttn" if u.family == "sd" else "Attn"
    kinds = [kind * (2**i in u.attention_resolutions) for i in range(len(u.channel_mult))]
    sizes = dict(
        in_channels=u.in_channels,
        out_channels=u.out_channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        block_out_channels=[u.model_channels * m for m in u.channel_mult],
        layers_per_block=u.num_res_blocks,
    )
    if u.family == "sd":  # attention_head_dim is diffusers' name for the number of heads there
        sizes |= dict(cross_attention_dim=u.context_dim or 64, attention_head_dim=u.num_heads)
        return vae, diffusers.UNet2DConditionModel(**sizes)
    sizes |= dict(downsample_type="resnet", upsample_type="resnet")
    sizes |= dict(resnet_time_scale_shift="scale_shift", attention_head_dim=48)
    return vae, diffusers.UNet2DModel(**sizes)


def training_step(config, recipe, device, compiled=False):
    """-> a function of "bf16" or not: one step as train.py takes it, on a batch on the device.

    Where masks come again (see `train.MaskLatents`), their latents are known beforehand. With
    `compiled`, the networks are as `train.py --compile` has them.
    """
    with device:
        model = SDSeg(config)
    model.to(device=device, memory_format=torch.channels_last if compiled else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe["lr"], fused=True)
    average, watch = train.Average(trained, recipe["ema"]), train.Watch(optimiser, device)
    n, size = recipe["batch_size"], config.image_size
    image = torch.rand(n, 3, size, size, device=device) * 2 - 1
    mask = torch.randint(len(config.classes), (n, size, size), device=device)
    drawn = draw(n, model.latent_shape(), last=recipe["last"])
    z_0 = None if recipe["augment"] == "full" else model.encode_mask(mask)
    if compiled:
        model.compile(mode="reduce-overhead")

    def step(bf16):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model.loss(image, mask, drawn=drawn, z_0=z_0, mask_weight=recipe["mask_weight"])
        loss.total.backward()
        watch.step(loss)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(watch.steps)

    return step


def loading(config, recipe, seconds):
    """Seconds that one process needs for a batch of drawn pictures, cached, with augmentation."""
    data = SegmentationData(find("demo"), "val", config.image_size, recipe["augment"])
    with torch.device("meta"):
        batches = train.Batches(data, SDSeg(config), SimpleNamespace(seed=0, **recipe))
    step = itertools.count()
    return medians({"load": lambda: batches[next(step)]}, seconds, torch.device("cpu"))["load"]


# ---- the report ----


def report(n, times, names, peak):
    """A line for each model, with its parts' shares; the others' times as multiples of our own."""
    print(f"\nbatch {n:<4}{'ms':>20}{'images/s':>10}", *(f"{part:>8}" for part in PARTS))
    own = times[names[0], "1 step"]
    for (name, what), t in times.items():
        if what not in PARTS:
            last = [f"{share:8.1%}" for share in shares(times, name)] if what == "1 step" else []
            last += [f"  {t / own:.2f} times ours"] if name != names[0] else []
            print(f"{name + ', ' + what:<20}{1000 * t:10.1f}{n / t:10.2f}", *last)
    print(f"peak memory {peak} MiB", flush=True)


def describe(model, device, name, real):
    print(f"{model.config.preset} in {name} on {device.type}: {hardware(device)}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{datetime.date.today()}")  # fmt: skip
    tau, unet, vae = (sum(p.numel() for p in part.parameters()) / 1e6
                      for part in (model.tau, model.unet, model.vae))  # fmt: skip
    print(f"{'trained' if real else 'random'} weights: tau {tau:.1f} M, U-Net {unet:.1f} M, "
          f"autoencoder {vae:.1f} M parameters; {model.config.image_size} px")  # fmt: skip


def measure(args):
    # 1. The model, and what its precision costs
    device = find_device(args.device)
    model = load(args, device)
    config, dtype = model.config, inference_dtype(device, args.precision)
    describe(model, device, NAMES[dtype], args.model)
    if dtype != torch.float32:
        exact = scores_of_drawn(model)
        model.to_precision(device, NAMES[dtype])
        words = DIFFERENCE.format(*difference(scores_of_drawn(model), exact))
        print(f"{NAMES[dtype]} against fp32: {words}")

    # 2. Memory, before anything else takes some
    size, peaks = config.image_size, {}
    for n in args.batch_sizes:
        image = torch.zeros(n, 3, size, size, device=device)
        peaks[n] = peak_of(lambda x=image: model.segment(x), device)

    # 3. Speed
    models = {"ours": model}
    if args.compile:
        models["compiled"] = copy.deepcopy(model)
        models["compiled"].compile(mode="reduce-overhead", dynamic=False)
        exact, began = scores_of_drawn(model), time.perf_counter()
        words = DIFFERENCE.format(*difference(scores_of_drawn(models["compiled"]), exact))
        print(f"compiled in {duration(time.perf_counter() - began)} a batch size: {words}",
              flush=True)  # fmt: skip
    if args.diffusers and config.fusion == "concat":
        try:
            for kind in dict.fromkeys((torch.float32, dtype)):
                models[f"diffusers {NAMES[kind]}"] = Theirs(config, device, kind)
        except ImportError:
            print("diffusers is not installed: pip install diffusers, to compare with it")
    for n in args.batch_sizes:
        report(n, inference(models, n, args.seconds, device), list(models), peaks[n])

    # 4. Training, once the memory is free again
    if args.train:
        del model, models
        measure_training(config, device, args.seconds, args.compile)


def measure_training(config, device, seconds, compiled):
    """Print the steps a second of a preset's recipe, its peak of memory, and what loading takes."""
    recipe = train.NANO if config.preset == "nano" else train.PAPER
    fast = has_fast_bf16(device)
    kind = "bf16 autocast" if fast else "fp32"
    step = training_step(config, recipe, device, compiled)
    plain = torch.compiler.set_stance("force_eager")(step) if compiled else step
    peak = peak_of(lambda: plain(fast), device)
    calls = {kind: lambda: plain(fast)}
    if device.type == "cpu":  # on a GPU float32 may not fit
        calls["fp32"] = lambda: plain(False)
    if compiled:
        began = time.perf_counter()
        made_peak = peak_of(lambda: [step(fast) for _ in range(3)], device)  # then graphs are made
        took = duration(time.perf_counter() - began)
        print(f"\ntraining compiled in {took}; peak {made_peak} MiB", end="")
        calls[f"{kind}, compiled"] = lambda: step(fast)
    times = medians(calls, seconds, device)
    rates = ", ".join(f"{1 / t:.2f} steps/s in {name}" for name, t in times.items())
    print(f"\ntraining, AdamW, moving average, batch {recipe['batch_size']}: {rates}; "
          f"peak {peak} MiB")  # fmt: skip
    wait = loading(config, recipe, seconds)
    print(f"loading a batch takes one process {1000 * wait:.1f} ms, "
          f"{wait / min(times.values()):.1%} of a step")  # fmt: skip


def main(args):
    try:
        measure(args)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise Refusal("out of the device's memory; try smaller --batch-sizes") from None


if __name__ == "__main__":
    run(lambda: main(ARGS))
