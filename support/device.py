"""Devices, number formats, processes and compilation."""

import contextlib
import os
import platform
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.cli import UserError, one_line, rank_and_world_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name=None):
    """The device `name`, or the first of cuda, mps and cpu. Raises UserError if it is not there."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("neither cuda nor mps nor cpu")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {one_line(error)[:100]}; try --device cpu") from None


def has_fast_bf16(device):
    """Does the device multiply bfloat16 in hardware?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and native()


def choose_dtype(device, precision):
    """The dtype for "fp32", "bf16", "fp16", or "auto": the fastest that keeps the masks.

    "auto" is bfloat16 where the hardware has it, else float16 on cuda, else float32.
    """
    if precision == "auto":
        slow = "fp16" if device.type == "cuda" else "fp32"
        precision = "bf16" if has_fast_bf16(device) else slow
    return DTYPES[precision]


def place_for_inference(model, device, precision, keep_float32):
    """Move a model to a device and a precision; the modules in `keep_float32` stay float32.

    Convolutions want channels_last. But on a GPU the kernel of PyTorch's group norm copies such
    tensors, so there only compiled networks have this format: see `compile_networks`.
    """
    device = torch.device(device)
    dtype = choose_dtype(device, precision)
    kept = {p for part in keep_float32 for p in part.parameters()}
    for p in {*model.parameters()} - kept:
        p.data = p.data.to(dtype)
    on_cpu = device.type == "cpu"
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    return model.to(device=device, memory_format=layout)


def compile_networks(model, **options):
    """Hand tau, the U-Net and the decoder to torch.compile, with its options, in place.

    Their weights become channels_last, so make the copy for the moving average afterwards.
    The first calls with a new batch size take minutes and need a C++ compiler.
    mode="reduce-overhead" makes a CUDA graph of each network, which shortens the latency.
    """
    for part in (model.tau, model.unet, model.vae.decoder):
        part.to(memory_format=torch.channels_last).compile(fullgraph=True, **options)


def loader_workers(device):
    """Processes that load data for one GPU. On a CPU none: they would take time from training."""
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    return min(12, max(1, os.cpu_count() // gpus)) if device.type == "cuda" else 0


def own_gpu(local_rank):
    """The name of the GPU of this process of torchrun, or None on a machine without GPUs."""
    n = torch.cuda.device_count()
    if 0 < n <= local_rank:
        raise UserError(f"process {local_rank} has no GPU: this machine has {n}; start fewer "
                        "processes")  # fmt: skip
    return f"cuda:{local_rank}" if n else None


def init_distributed():
    """Join the other processes of torchrun, if there are any -> rank, world size, device."""
    rank, world_size, local_rank = rank_and_world_size()
    device = find_device(own_gpu(local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        # The others wait while rank 0 validates, which may take hours
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(weeks=4)
        dist.init_process_group(backend, timeout=timeout)
        # DDP warns about strides of 1 x 1 convolutions, where a side of 1 may have any stride.
        warnings.filterwarnings("ignore", "Grad strides do not match")
    return rank, world_size, device


def synchronize(device):
    """Wait until the device has done its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_memory(device):
    """Peak memory so far in MiB: of tensors on a GPU, of the whole process on a CPU; or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def device_name(device):
    """What the hardware calls itself: the GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
