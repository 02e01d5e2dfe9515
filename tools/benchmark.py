"""Measure speed and memory: `python -m tools.benchmark --preset nano --batch-sizes 1,8 --train`.

Times are medians, from a batch of images on the device to their probabilities there. What is
compared is called in turn, so that other load on the machine slows all of it alike. Random weights
cost the same as trained ones. `--diffusers` also times diffusers' modules in our sampler, in the
same precision, and on a CPU also in float32, which is their default.
"""

import contextlib
import copy
import ctypes
import datetime
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import train
from data import SegmentationData, TrainingBatches, find
from infer import mean_and_std
from sdseg import PRESETS, SDSeg, T
from support.cache import LatentCache
from support.cli import ArgumentParser, bounded, format_duration, positive_int, run_command
from support.demo_data import draw_demo
from support.device import (
    DTYPES,
    choose_dtype,
    compile_networks,
    device_name,
    find_device,
    loader_workers,
    peak_memory,
    synchronize,
)
from support.metrics import dice
from support.small_gpu import save_memory

NETWORKS = ("tau", "U-Net", "decoder")


def int_list(text):
    return [positive_int(number) for number in text.split(",") if text]


def parse_args(argv=None):
    parser = ArgumentParser("Measure the speed and memory of inference and training.")
    add = parser.add_argument
    add("--preset", default="nano", choices=list(PRESETS), help="the sizes of the networks")
    add("--model", metavar="FILE", help="trained weights; their config replaces the preset")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--precision", default="auto", choices=["auto", *DTYPES], help="auto: by the hardware")
    add("--batch-sizes", type=int_list, default="1,8", metavar="N,N", help="of inference; '': none")
    add("--seconds", type=bounded(float, 0), default=5.0, help="for each measurement")
    add("--train", action="store_true", help="also measure training, with the preset's recipe")
    add("--small-gpu", action="store_true", help="train as on a GPU of 16 GB, to save memory")
    add("--compile", action="store_true", help="also time compiled networks: minutes more")
    add("--diffusers", action="store_true", help="also time diffusers' modules, if installed")
    return parser.parse_args(argv)


def medians(calls, seconds, device):
    """Call each of {name: function} in turn, about `seconds` each -> {name: median, in s}."""
    for call in calls.values():  # warm up
        call()
    times, rounds, began = {name: [] for name in calls}, 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - began < seconds * len(calls):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of(call, device):
    """Call -> the peak of memory during the call, weights included, as text.

    On a CPU it is the peak of the process; only Linux can forget an earlier one.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what keep_freed_memory has kept
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    call()
    peak = peak_memory(device)
    if device.type == "cuda":  # what PyTorch holds: with gaps between tensors, as nvidia-smi sees
        return f"{peak:.0f} MiB, reserved {torch.cuda.max_memory_reserved(device) / 2**20:.0f} MiB"
    return "unknown" if peak is None else f"{peak:.0f} MiB"


def prob_of_demo(model, n=4):
    """Probabilities of n demo images, one at a time, always from the same noise."""
    images = [draw_demo(seed, model.config.image_size)[0] for seed in range(n)]
    return torch.cat([mean_and_std(model, [image])[0] for image in images])


def difference(model, prob, exact):
    """Two results (B, C, S, S) of the same images -> a line on how far they are apart."""
    change, k = (prob - exact).abs(), max(2, exact.shape[1])
    masks = zip(model.class_ids(prob), model.class_ids(exact))
    same = sum(dice(a, b, k).mean() for a, b in masks) / len(prob)
    return (f"Dice {same:.4f} between the masks; the probabilities differ by {change.mean():.5f} "
            f"on average, by {change.max():.4f} at most")  # fmt: skip


class DiffusersSDSeg(SDSeg):
    """Our sampler with diffusers' modules of a config's sizes, and random weights."""

    def __init__(self, config, device, dtype):
        with torch.device("meta"):  # our own networks, which are replaced, take no memory
            super().__init__(config)
        self.dtype, self.tau = dtype, None
        with device:
            self.vae, self.unet = (module.to(dtype) for module in diffusers_modules(config))
        self.eval().to(device)

    def encode_image(self, image):
        image = image.to(self.dtype).contiguous()  # as for ours, see vae.py
        return self.vae.encode(image).latent_dist.mean.float()

    def decode_mask(self, z_0):
        return self.vae.decode(z_0.to(self.dtype)).sample.float()

    def predict(self, z_t, t, z_c):
        """Their cross-attention needs a context: it gets one token of zeros."""
        x = torch.cat([z_t, z_c], dim=1).to(self.dtype)
        width = getattr(self.unet.config, "cross_attention_dim", None)
        return self.unet(x, t, *([x.new_zeros(len(x), 1, width)] if width else [])).sample


def diffusers_modules(config):
    """diffusers' AutoencoderKL, and its UNet2DConditionModel (family sd) or UNet2DModel (ldm)."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    v, u = config.vae, config.unet
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(v.ch_mult),
        up_block_types=["UpDecoderBlock2D"] * len(v.ch_mult),
        block_out_channels=[v.ch * m for m in v.ch_mult],
        layers_per_block=v.num_res_blocks,
    )
    for level in vae.decoder.up_blocks:
        level.resnets = level.resnets[: v.decoder_res_blocks]
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
    if u.family == "sd":  # there, attention_head_dim means the number of heads
        sizes |= dict(cross_attention_dim=u.context_dim or 64, attention_head_dim=u.num_heads)
        return vae, diffusers.UNet2DConditionModel(**sizes)
    sizes |= dict(downsample_type="resnet", upsample_type="resnet")
    sizes |= dict(resnet_time_scale_shift="scale_shift", attention_head_dim=48)
    return vae, diffusers.UNet2DModel(**sizes)


class Products(TorchDispatchMode):
    """Remembers the convolutions and the matrix products of a call, to call them once more."""

    names = ("convolution", "addmm", "mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self, call):
        super().__init__()
        self.calls = []
        with self:
            call()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = partial(function, *args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.names:
            self.calls.append(call)
        return call()

    def back_to_back(self):
        for call in self.calls:
            call()


def time_inference(models, image, seconds, device):
    """Time {name: model} on a batch -> {(name, what): s}; what: "1 step", "10 steps" or a part.

    On a CPU also the products of our parts alone, by the name "products".
    """
    t, calls = torch.full((len(image),), T - 1, device=device), {}
    with torch.no_grad():
        for name, m in models.items():
            z_c = m.encode_image(image)
            noise = torch.randn_like(z_c[0]).expand_as(z_c)  # strides as in `SDSeg.sample`
            calls[name, "1 step"] = lambda m=m: m.segment(image)
            if name == "ours":
                calls[name, "10 steps"] = lambda m=m: m.segment(image, steps=10)
            calls[name, "tau"] = lambda m=m: m.encode_image(image)
            calls[name, "U-Net"] = lambda m=m, z=z_c, n=noise: m.predict(n, t, z)
            calls[name, "decoder"] = lambda m=m, z=z_c: m.decode_mask(z)
        if device.type == "cpu":
            for part in NETWORKS:
                calls["products", part] = Products(calls["ours", part]).back_to_back
        return medians(calls, seconds, device)


def report(n, times, peak):
    """One line for each model: its time, its parts' shares of it, and the ratio to our times."""
    print(f"\nbatch {n:<4}{'ms':>28}{'images/s':>10}", *(f"{part:>8}" for part in NETWORKS))
    ours = {name: times[name, "1 step"] for name in ("ours", "compiled") if (name, "tau") in times}
    for (name, what), t in times.items():
        if what in NETWORKS:
            continue
        parts = [times[name, part] for part in NETWORKS]
        shares = [f"{part / sum(parts):8.1%}" for part in parts if what == "1 step"]
        than = [] if name == "ours" else ["ours"] if name == "compiled" else list(ours)
        ratios = [f"  {t / ours[other]:.2f}x the time of {other}" for other in than]
        print(f"{name + ', ' + what:<28}{1000 * t:10.1f}{n / t:10.2f}", *shares, *ratios)
    if ("products", "tau") in times:  # the rest is normalisation, sums, copies
        pairs = {part: (times["products", part], times["ours", part]) for part in NETWORKS}
        pairs["all"] = [sum(values) for values in zip(*pairs.values())]
        shares = (f"{name} {a / b:.0%}" for name, (a, b) in pairs.items())
        print(f"share of our time that the same products take back to back: {', '.join(shares)}")
    print(f"peak memory {peak}", flush=True)


def training_step(config, recipe, batch, device, dtype, compiled=False, small_gpu=False):
    """-> two functions: one step of train.py's loop, with the same batch each time, and the update
    of the average, which is a part of the step unless `small_gpu`.
    """
    with device:
        model = SDSeg(config)
    model.to(device)
    if compiled:
        compile_networks(model, mode="reduce-overhead")
    averages = train.make_ema(model, on_host=small_gpu)[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    if small_gpu:
        save_memory(model)
    optimizer = torch.optim.AdamW(trained, lr=recipe["lr"], fused=True)
    scale = None if dtype == torch.float16 else 1.0
    scaler = torch.amp.GradScaler(device.type, scale or 2.0**16, enabled=device.type != "mps")
    latents = LatentCache(model.encode_mask)
    image, mask, symmetries = batch
    shape = model.latent_shape
    t, noise = train.sample_t_and_noise(len(mask), shape, None, recipe["terminal_fraction"])
    image, mask, noise = (x.to(device) for x in (image, mask, noise))

    def average():
        train.update_ema(averages, trained, recipe["steps"], recipe["ema"])

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            z_0 = latents(mask, symmetries)
            values, _ = train.weighted_loss(model, model, image, mask, z_0, t, noise, 1.0,
                                            recipe["mask_weight"])  # fmt: skip
        scaler.scale(values[0]).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update(scale)
        optimizer.zero_grad(set_to_none=True)
        if not small_gpu:
            average()

    return step, average


def loading_share(step, batches, seconds, device):
    """The share of the time that the loop of train.py waits for its batches, as text."""
    on_gpu = device.type == "cuda"
    loader = iter(DataLoader(batches, batch_size=None, sampler=itertools.count(),
                             num_workers=loader_workers(device), pin_memory=on_gpu))  # fmt: skip
    waited, rounds = 0, 0
    began = time.perf_counter()
    while rounds < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        next(loader)
        waited += (time.perf_counter() - start) * (rounds > 0)  # not the start of the processes
        began += (time.perf_counter() - start) * (rounds == 0)
        step()
        synchronize(device)
        rounds += 1
    share = waited / (time.perf_counter() - began)
    workers = loader_workers(device) or "no"
    return f"loading takes {share:.1%} of the time, in {workers} processes beside"


def measure_training(config, device, dtype, args):
    """Print the speed and the memory of the preset's recipe, and what loading takes."""
    recipe, times = train.recipe_of(config), []
    data = SegmentationData(find("demo"), "val", config.image_size, recipe["augment"])
    batches = TrainingBatches(data, recipe["batch_size"], seed=0)
    print(f"\ntraining in {str(dtype)[6:]}, batch {recipe['batch_size']}, AdamW, EMA"
          f"{', as on a GPU of 16 GB' * args.small_gpu}")  # fmt: skip
    for compiled in (False, True)[: 1 + args.compile]:
        began = time.monotonic()
        step, average = training_step(
            config, recipe, batches[0], device, dtype, compiled, args.small_gpu
        )
        # After 3 steps CUDA graphs are ready; the first ones in float16 only lower the scale.
        first = 20 if dtype == torch.float16 else 3
        peak = peak_of(lambda: [step() for _ in range(first)], device)
        ready = format_duration(time.monotonic() - began)
        times.append(medians({"step": step}, args.seconds, device)["step"])
        note = f"; {times[-1] / times[0]:.2f}x the time, compiled in {ready}" if compiled else ""
        print(f"{1 / times[-1]:.2f} steps/s, peak memory {peak}{note}", flush=True)
        if args.small_gpu:
            t, every = medians({"": average}, 0, device)[""], train.average_every(recipe["ema"])
            print(f"the average in host memory: {t:.2f} s every {every} steps, "
                  f"{t / (t + every * times[-1]):.1%} of the time")  # fmt: skip
        print(loading_share(step, batches, args.seconds, device), flush=True)
        step = average = None  # free their memory


def measure_inference(model, device, dtype, args):
    """Print what precision and compilation change, then speed and memory of each batch size."""
    # 1. What the precision changes
    config, size = model.config, model.config.image_size
    if dtype != torch.float32:
        exact = prob_of_demo(model)
        model.for_inference(device, args.precision)
        text = difference(model, prob_of_demo(model), exact)
        print(f"{str(dtype)[6:]} compared with float32: {text}")

    # 2. Memory, before other measurements need some
    images = {n: torch.zeros(n, size, size, 3, device=device).permute(0, 3, 1, 2)  # as in infer.py
              for n in args.batch_sizes}  # fmt: skip
    peaks = {n: peak_of(lambda: model.segment(x), device) for n, x in images.items()}

    # 3. Speed
    models = {"ours": model}
    if args.compile:
        exact, began = prob_of_demo(model), time.perf_counter()
        models["compiled"] = copy.deepcopy(model)
        compile_networks(models["compiled"], mode="reduce-overhead", dynamic=False)
        text = difference(model, prob_of_demo(models["compiled"]), exact)
        ready = format_duration(time.perf_counter() - began)
        print(f"compiled in {ready} (for each batch size): {text}", flush=True)
    if args.diffusers and config.fusion == "concat":
        try:
            kinds = (dtype, torch.float32) if device.type == "cpu" else (dtype,)
            for kind in dict.fromkeys(kinds):
                models[f"diffusers {str(kind)[6:]}"] = DiffusersSDSeg(config, device, kind)
        except ImportError:
            print("diffusers is not installed; to compare with it: pip install diffusers")
    for n, image in images.items():
        report(n, time_inference(models, image, args.seconds, device), peaks[n])


def main(args):
    device = find_device(args.device)
    dtype = choose_dtype(device, args.precision)
    if args.model:
        model = SDSeg.load(args.model, device)
    else:
        torch.manual_seed(0)
        with device:
            model = SDSeg(PRESETS[args.preset]).eval().for_inference(device)
    config = model.config
    print(f"{config.preset} in {str(dtype)[6:]} on {device.type}: {device_name(device)}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{datetime.date.today()}")  # fmt: skip
    tau, unet, vae = (sum(p.numel() for p in part.parameters()) / 1e6
                      for part in (model.tau, model.unet, model.vae))  # fmt: skip
    print(f"{'trained' if args.model else 'random'} weights: tau {tau:.1f} M, U-Net {unet:.1f} M, "
          f"autoencoder {vae:.1f} M parameters; {config.image_size} px", flush=True)  # fmt: skip
    if args.batch_sizes:
        measure_inference(model, device, dtype, args)
    if args.train:
        del model  # free its memory
        measure_training(config, device, dtype, args)


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
