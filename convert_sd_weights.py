"""Public checkpoints -> one `.safetensors` file that train.py starts from, or infer.py runs.

Reads Stable Diffusion v1 (.ckpt, .safetensors, a diffusers folder), LDM's lsun_churches with its
autoencoder kl-f8, and runs of the published SDSeg code. An autoencoder in a second file replaces
the one of a checkpoint. Our names are the names of CompVis behind other prefixes: see NAMES.
"""

from dataclasses import replace
from pathlib import Path

import torch

from sdseg import PRESETS, build_empty, widen_conv_in
from support.ckpt import read_tensors
from support.cli import ArgumentParser, UserError, run_command
from support.diffusers_names import compvis_names, find_part
from support.weights import load_strict, write_weights

UNET, VAE, TAU = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
EMA = "model_ema."  # the averaged U-Net; its names have no dots
NAMES = {  # how our names begin: how CompVis names begin
    "unet.": UNET,
    "vae.": VAE,
    "tau.encoder.": VAE + "encoder.",  # tau starts as the encoder of the autoencoder
    "tau.out.": VAE + "quant_conv.",
}
PUBLISHED_NAMES = {"unet.": UNET, "vae.": VAE, "tau.": TAU}  # a trained run has its own tau
BARE_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the names in kl-f8
KINDS = {  # what it is: a tensor that only it has, its preset, the input channels of its U-Net
    "a run of the published SDSeg": (TAU + "out.weight", "ldm-kl-8", 8),
    "Stable Diffusion v1": (UNET + "input_blocks.1.1.proj_in.weight", "sd-v1", 4),
    "LDM lsun_churches": (UNET + "input_blocks.1.1.qkv.weight", "ldm-kl-8", 4),
}
CONV_IN = UNET + "input_blocks.0.0.weight"
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SDXL = ("conditioner.", UNET + "label_emb.0.", UNET + "add_embedding.")
IGNORED = {  # how names begin: what is not taken; the first that fits counts
    "again.": "given twice",
    EMA: "averaged U-Net",
    VAE: "autoencoder's loss",
    "loss.": "autoencoder's loss",
    TAU: "text encoder",
    "optimizer_states.": "optimiser",
    "": "schedule and other buffers",
}


def parse_args(argv=None):
    parser = ArgumentParser("Convert public weights to one .safetensors file of SDSeg.")
    parser.add_argument(
        "source",
        nargs="+",
        help="Stable Diffusion v1 (.ckpt, .safetensors or a diffusers folder), LDM's lsun_churches "
        "model.ckpt, or a checkpoint of the published SDSeg code; beside it an autoencoder: the "
        "model.ckpt of LDM's kl-f8, or a diffusers VAE",
    )
    parser.add_argument("--out", metavar="FILE", help="default: in weights/, named by the model")
    parser.add_argument("--ema", action="store_true", help="take the averaged U-Net (model_ema.*)")
    parser.add_argument("--half", action="store_true", help="store float16")
    return parser.parse_args(argv)


# ---- sources -> {CompVis name: tensor} ----


def read_source(path):
    """{CompVis name: tensor} of a checkpoint file or a diffusers folder."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        unet, vae = find_part(path, "unet"), find_part(path, "vae")
        return read_source(unet) | read_source(vae)
    tensors = compvis_names(read_tensors(path))
    return {VAE + k if k.startswith(BARE_VAE) else k: v for k, v in tensors.items()}


def read_sources(paths):
    """All sources together. The file of an autoencoder comes before the one with the U-Net."""
    tensors = {}
    for source in sorted(map(read_source, paths), key=lambda source: CONV_IN in source):
        tensors |= {f"again.{k}" if k in tensors else k: v for k, v in source.items()}
    return tensors


def swap_averages(tensors):
    """Let the averaged U-Net and the plain one change places."""
    unet = [name for name in tensors if name.startswith(UNET)]
    swaps = {name: EMA + name.removeprefix("model.").replace(".", "") for name in unet}
    if not tensors.keys() >= set(swaps.values()):
        raise UserError("no averaged U-Net (model_ema.*) in it; convert without --ema")
    swaps |= {average: name for name, average in swaps.items()}
    return {name: tensors[swaps.get(name, name)] for name in tensors}


# ---- what they are ----


def identify(tensors):
    """-> which of KINDS, config. Raises UserError for what SDSeg cannot start from."""
    if CONV_IN not in tensors:
        raise UserError(without_unet(tensors))
    kind = next((kind for kind, (sign, *_) in KINDS.items() if sign in tensors), None)
    if kind is None:
        xl = any(name.startswith(SDXL) for name in tensors)
        found = "Stable Diffusion XL" if xl else "a U-Net of an unknown family"
        raise UserError(f"{found}; SDSeg starts from Stable Diffusion v1 or LDM's lsun_churches")
    _, preset, channels = KINDS[kind]
    config = PRESETS[preset]
    if CONTEXT in tensors and tensors[CONTEXT].shape[1:] != (config.unet.context_dim,):
        shape = list(tensors[CONTEXT].shape)
        found = f"Stable Diffusion 2.x or another variant ({CONTEXT} is {shape})"
        raise UserError(f"{found}; give Stable Diffusion v1")
    if tensors[CONV_IN].shape[1:] != (channels, 3, 3):
        shape = list(tensors[CONV_IN].shape)
        found = f"an inpainting model or another variant ({CONV_IN} is {shape})"
        raise UserError(f"{found}; give the plain model")
    if not any(name.startswith(VAE) for name in tensors):
        needed = "LDM's kl-f8 model.ckpt, or a diffusers VAE,"
        raise UserError(f"a U-Net without autoencoder; give {needed} as a second file")
    return kind, published_config(config, tensors) if is_published_run(tensors) else config


def without_unet(tensors):
    """What to say of tensors without a U-Net."""
    if VAE + "encoder.conv_in.weight" in tensors:
        needed = "a Stable Diffusion v1 checkpoint, or LDM's lsun_churches model.ckpt,"
        return f"an autoencoder without U-Net; give {needed} as a second file"
    if CONV_IN.replace(UNET, "unet.") in tensors:
        return "converted already; give it to train.py --init, or to infer.py --model if trained"
    names = f"{len(tensors)} tensors, the first is {min(tensors):.60}" if tensors else "no tensors"
    return f"no U-Net of Stable Diffusion v1 or LDM in it ({names})"


def is_published_run(tensors):
    """Only the published SDSeg code has a convolution behind its vision encoder."""
    return TAU + "out.weight" in tensors


def published_config(config, tensors):
    """The settings that the published code keeps as buffers. It does not scale z_c."""
    try:
        scale = tensors["scale_factor"].double().item()
        start, end = (round(beta, 7) for beta in tensors["betas"].double()[[0, -1]].tolist())
    except (KeyError, IndexError, RuntimeError):
        scale = start = end = 0
    if not (0 < scale < 1e6 and 0 < start < end < 1):
        raise UserError("its buffers scale_factor and betas are missing, or are no run's settings")
    return replace(config, beta_start=start, beta_end=end, image_scale=1.0, mask_scale=scale)


# ---- CompVis names -> ours ----


def convert(tensors, config):
    """{CompVis name: tensor} -> {our name: tensor}, and the tensors that were not taken.

    Two tensors change their shape. The first layer of the U-Net gets new input channels for z_c.
    tau has no variance: of the rows of quant_conv it keeps those that give the mean.
    Raises UserError for weights of a few bits or integers.
    """
    weights, left, memories = {}, dict(tensors), set()
    for ours, public in (PUBLISHED_NAMES if is_published_run(tensors) else NAMES).items():
        for name, value in tensors.items():
            if not name.startswith(public) or name.startswith(VAE + "loss."):
                continue
            if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise UserError(f"{name} is {value.dtype}; give a file of 16-bit or 32-bit floats")
            if name == CONV_IN:
                value = widen_conv_in(value, config.unet.in_channels)
            if ours == "tau.out." and value.dim() > 0:
                value = value[: config.vae.z_channels]
            if value.untyped_storage().data_ptr() in memories:  # tau's, and a file shares none
                value = value.clone()
            memories.add(value.untyped_storage().data_ptr())
            weights[ours + name.removeprefix(public)] = value
            left.pop(name, None)
    return weights, left


# ---- the report ----


def print_row(verb, what, tensors, note=""):
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    print(f"{verb:<9}{what:<27}{len(tensors):>7}{size:>10.2f}  {note}".rstrip())


def report(weights, left, published, ema):
    """Print what was taken, what starts at zero and what was left, with counts and sizes."""
    unet, vae, tau = (
        [value for name, value in weights.items() if name.startswith(part)]
        for part in ("unet.", "vae.", "tau.")
    )
    print(f"{'tensors        MB':>53}")
    print_row("loaded", "averaged U-Net" if ema else "U-Net", unet)
    print_row("loaded", "autoencoder", vae)
    if published:
        print_row("loaded", "vision encoder", tau)
    else:
        print_row("copied", "vision encoder", tau, "starts as the autoencoder's encoder")
        new = weights[CONV_IN.replace(UNET, "unet.")].chunk(2, dim=1)[1]
        print_row("zeroed", f"{new.shape[1]} new input channels", [new], "for the image")
    ignored = IGNORED | {EMA: "plain U-Net" if ema else "averaged U-Net"}
    groups = {}
    for name, value in left.items():
        what = next(what for prefix, what in ignored.items() if name.startswith(prefix))
        groups.setdefault(what, []).append(value)
    for what in sorted(groups):
        print_row("ignored", what, groups[what])


def output_path(args, default):
    """Where to write. Raises UserError for a source or a name that train.py would not take."""
    out = Path(args.out or f"weights/{default}.safetensors")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a name that ends in .safetensors")
    if out.exists() and any(out.samefile(source) for source in args.source):
        raise UserError(f"--out {out}: this is the source; give another name")
    return out


def main(args):
    where = " and ".join(args.source)
    tensors = read_sources([Path(source) for source in args.source])
    try:
        kind, config = identify(tensors)
        tensors = swap_averages(tensors) if args.ema else tensors
        # A trial with "meta" tensors, which take no memory, finds all that do not fit.
        shapes, _ = convert({name: value.to("meta") for name, value in tensors.items()}, config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    load_strict(build_empty(config, where), shapes, where)
    weights, left = convert(tensors, config)
    run_name, published = f"sdseg-{Path(args.source[0]).stem}", is_published_run(tensors)
    out = output_path(args, run_name if published else config.preset)
    print(f"found    {kind} in {where}")
    report(weights, left, published, args.ema)
    write_weights(out, weights, config, args.half)
    print(f"wrote    {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
