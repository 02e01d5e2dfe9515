"""Public checkpoints -> one `.safetensors` file that train.py starts from, or infer.py runs.

Reads Stable Diffusion v1 (.ckpt, .safetensors, a diffusers folder), LDM's lsun_churches with its
autoencoder kl-f8, and runs of the published SDSeg code. An autoencoder in a second file replaces
the one of a checkpoint. Our names are the names of CompVis behind other prefixes: see NAMES.
"""

from dataclasses import replace
from pathlib import Path

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
# What a source is: a tensor that it has, its preset, the input channels of its U-Net. The first
# match counts, because a published run also has LDM's tensors.
KINDS = {
    "a run of the published SDSeg": (TAU + "out.weight", "ldm-kl-8", 8),
    "Stable Diffusion v1": (UNET + "input_blocks.1.1.proj_in.weight", "sd-v1", 4),
    "LDM lsun_churches": (UNET + "input_blocks.1.1.qkv.weight", "ldm-kl-8", 4),
}
ADDRESSES = {  # what stands in the path of a public checkpoint: where it is; see docs/data.md
    "kl-f8": "https://ommer-lab.com/files/latent-diffusion/kl-f8.zip",
    "lsun_churches": "https://ommer-lab.com/files/latent-diffusion/lsun_churches.zip",
    "sd-v1-4": "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original",
    "": "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
}
CONV_IN = UNET + "input_blocks.0.0.weight"
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


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
    """{CompVis name: tensor} of a checkpoint file or a diffusers folder. Raises UserError."""
    if not path.exists():
        address = next(where for part, where in ADDRESSES.items() if part in str(path))
        raise UserError(f"{path}: no such file; download: {address}, see docs/data.md")
    if path.is_dir():
        return read_source(find_part(path, "unet")) | read_source(find_part(path, "vae"))
    tensors = compvis_names(read_tensors(path))
    return {VAE + k if k.startswith(BARE_VAE) else k: v for k, v in tensors.items()}


def read_sources(paths):
    """All sources together. The file of an autoencoder comes before the one with the U-Net.

    What comes twice gets a name that is none of ours, so `report` counts it as ignored.
    """
    tensors = {}
    for source in sorted(map(read_source, paths), key=lambda source: CONV_IN in source):
        tensors |= {f"given twice.{k}" if k in tensors else k: v for k, v in source.items()}
    return tensors


def take_averages(tensors):
    """Let the averaged U-Net have the names of the plain one."""
    names = {name: f"plain U-Net.{name}" for name in tensors if name.startswith(UNET)}
    averages = {EMA + name.removeprefix("model.").replace(".", ""): name for name in names}
    if not tensors.keys() >= averages.keys():
        raise UserError("no averaged U-Net (model_ema.*) in it; convert without --ema")
    names |= averages
    return {names.get(name, name): value for name, value in tensors.items()}


# ---- what they are ----


def identify(tensors):
    """-> which of KINDS, config. Raises UserError for what SDSeg cannot start from."""
    if CONV_IN not in tensors:
        found = f"no U-Net of Stable Diffusion v1 or LDM among {len(tensors)} tensors"
        raise UserError(f"{found}; give its checkpoint (a converted file needs no conversion)")
    kind = next((kind for kind, (sign, *_) in KINDS.items() if sign in tensors), None)
    if kind is None:
        found = "the U-Net of another family, such as Stable Diffusion XL"
        raise UserError(f"{found}; SDSeg starts from Stable Diffusion v1 or LDM's lsun_churches")
    _, preset, channels = KINDS[kind]
    config = PRESETS[preset]
    for name, inputs, other in (
        (CONTEXT, (config.unet.context_dim,), "Stable Diffusion 2"),
        (CONV_IN, (channels, 3, 3), "an inpainting model"),
    ):
        if name in tensors and tensors[name].shape[1:] != inputs:
            found = f"{other} or another variant ({name} is {list(tensors[name].shape)})"
            raise UserError(f"{found}; give the plain model of version 1")
    if not any(name.startswith(VAE) for name in tensors):
        needed = "LDM's kl-f8 model.ckpt, or a diffusers VAE,"
        raise UserError(f"a U-Net without autoencoder; give {needed} as a second file")
    return kind, published_config(config, tensors) if is_published_run(tensors) else config


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
    return replace(config, beta_start=start, beta_end=end, image_scale=1.0, mask_scale=scale,
                   data="data that the published code read")  # fmt: skip


# ---- CompVis names -> ours ----


def convert(tensors, config):
    """{CompVis name: tensor} -> {our name: tensor}, and the tensors that were not taken.

    Two layers change their shape. The first layer of the U-Net gets new input channels for z_c.
    tau has no variance: of the rows of quant_conv it keeps those that give the mean.
    """
    weights, left, memories = {}, dict(tensors), set()
    for ours, public in (PUBLISHED_NAMES if is_published_run(tensors) else NAMES).items():
        for name, value in tensors.items():
            if not name.startswith(public) or name.startswith(VAE + "loss."):
                continue
            if name == CONV_IN:
                value = widen_conv_in(value, config.unet.in_channels)
            if ours == "tau.out." and value.dim() > 0:
                value = value[: config.vae.z_channels]
            if value.untyped_storage().data_ptr() in memories:  # of E and tau: a file shares none
                value = value.clone()
            memories.add(value.untyped_storage().data_ptr())
            weights[ours + name.removeprefix(public)] = value
            left.pop(name, None)
    return weights, left


def report(weights, left):
    """Print how many tensors of each part were loaded and ignored, and their size."""
    groups = {}
    for verb, tensors in (("loaded", weights), ("ignored", left)):
        for name, value in tensors.items():
            part = name.removeprefix(VAE).split(".")[0] if "." in name else "buffers"
            groups.setdefault(f"{verb:<9}{part}", []).append(value.nbytes)
    for group, sizes in groups.items():
        print(f"{group:<27}{len(sizes):>5} tensors{sum(sizes) / 1e6:>10.2f} MB")


def main(args):
    where = " and ".join(args.source)
    tensors = read_sources([Path(source) for source in args.source])
    try:
        kind, config = identify(tensors)
        tensors = take_averages(tensors) if args.ema else tensors
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    # A trial with "meta" tensors, which take no memory, finds all that do not fit.
    shapes, _ = convert({name: value.to("meta") for name, value in tensors.items()}, config)
    load_strict(build_empty(config, where), shapes, where)
    weights, left = convert(tensors, config)
    published = is_published_run(tensors)
    name = f"sdseg-{Path(args.source[0]).stem}" if published else config.preset
    out = Path(args.out or f"weights/{name}.safetensors")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a name that ends in .safetensors")
    sources = {Path(source).resolve() for source in args.source}
    if out.exists() and sources & {out.resolve(), *out.resolve().parents}:
        raise UserError(f"--out {out}: this is the source, or a file of it; give another name")
    print(f"found    {kind} in {where}")
    report(weights, left)
    if not published:
        print("tau starts as the autoencoder's encoder; the U-Net's new inputs, z_c, start at zero")
    write_weights(out, weights, config, args.half)
    print(f"wrote    {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
