"""Public checkpoints -> one `.safetensors` file that train.py starts from, or infer.py runs.

Stable Diffusion v1 (.ckpt, .safetensors, a diffusers folder), the LDM pair kl-f8 + lsun_churches,
and runs of the published SDSeg code. Everything is brought to CompVis names first; our parameters
have the same names behind other prefixes. Files are mapped, not read, so memory stays near the
size of what is written. No pickle is ever run: see `unpickle`.
"""

import re
from dataclasses import replace
from pathlib import Path

from common import Parser, Refusal, run


def parse(argv=None):
    parser = Parser("Convert public weights to one .safetensors file of SDSeg.")
    parser.add_argument(
        "source",
        nargs="+",
        help="a Stable Diffusion v1 .ckpt or .safetensors, a diffusers folder, a checkpoint of "
        "the published SDSeg code, or two files: the model.ckpt of LDM kl-f8 and lsun_churches",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="(default: in weights/, named by what is found)"
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged U-Net (model_ema.*)")
    parser.add_argument("--half", action="store_true", help="store float16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports below, so that --help and a wrong flag answer at once

from checkpoint import write_weights
from sdseg import PRESETS, build, widen_conv_in
from unpickle import read_tensors

UNET, VAE, TAU = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
EMA = "model_ema."
CONV_IN = "input_blocks.0.0.weight"

# ---- sources -> {CompVis name: tensor} ----


def read_folder(folder):
    """{CompVis name: tensor} of a diffusers folder."""
    unet, vae = (read_tensors(diffusers_file(folder, part)) for part in ("unet", "vae"))
    tensors = {UNET + unet_name(name): value for name, value in unet.items()}
    levels = len({k.split(".")[2] for k in vae if k.startswith("decoder.up_blocks.")})
    for name, value in vae.items():
        name = vae_name(name, levels)
        if ".attn_1." in name and value.dim() == 2:  # a linear layer there, a 1x1 convolution here
            value = value[:, :, None, None]
        tensors[VAE + name] = value
    return tensors


def diffusers_file(folder, part):
    for ending in ("safetensors", "fp16.safetensors", "bin", "fp16.bin"):
        path = folder / part / f"diffusion_pytorch_model.{ending}"
        if path.is_file():
            return path
    raise Refusal(
        f"{folder}: no {part}/diffusion_pytorch_model.safetensors or .bin in it; "
        "give a diffusers folder with unet/ and vae/, or a checkpoint file"
    )


def read_source(path):
    """{CompVis name: tensor} of a file or a diffusers folder."""
    if not path.exists():
        raise Refusal(f"{path}: no such file or folder")
    if path.is_dir():
        return read_folder(path)
    bare = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # kl-f8 on its own
    return {VAE * k.startswith(bare) + k: v for k, v in read_tensors(path).items()}


def read_sources(paths):
    """All sources together. Where two hold an autoencoder, the file of the autoencoder wins."""
    tensors = {}
    for part in sorted(map(read_source, paths), key=lambda part: UNET + CONV_IN in part):
        tensors |= {f"again.{k}" if k in tensors else k: v for k, v in part.items()}
    return tensors


# ---- diffusers names -> CompVis names ----

UNET_RULES = (  # CompVis numbers the blocks through, three a level
    (r"^conv_in", "input_blocks.0.0"),
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"(resnets\.\d)\.norm1", r"\1.in_layers.0"),
    (r"(resnets\.\d)\.conv1", r"\1.in_layers.2"),
    (r"(resnets\.\d)\.time_emb_proj", r"\1.emb_layers.1"),
    (r"(resnets\.\d)\.norm2", r"\1.out_layers.0"),
    (r"(resnets\.\d)\.conv2", r"\1.out_layers.3"),
    (r"(resnets\.\d)\.conv_shortcut", r"\1.skip_connection"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{block(m) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{block(m) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.(0)\.conv", lambda m: f"input_blocks.{block(m) + 3}.0.op"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{block(m)}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{block(m)}.1"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.2.1"),  # the coarsest has no attention
    (r"^up_blocks\.(\d)\.upsamplers\.(0)", lambda m: f"output_blocks.{block(m) + 2}.2"),
)
VAE_RULES = (
    (r"\.down_blocks\.(\d)\.resnets", r".down.\1.block"),
    (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
    (r"\.up_blocks\.(\d)\.resnets", r".up.\1.block"),
    (r"\.up_blocks\.(\d)\.upsamplers\.0", r".up.\1.upsample"),
    (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.conv_norm_out", ".norm_out"),
    (r"\.conv_shortcut", ".nin_shortcut"),
    (r"\.group_norm", ".norm"),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
)


def block(match):
    """Level and index inside it -> index over all levels."""
    return 3 * int(match[1]) + int(match[2])


def unet_name(name):
    for pattern, new in UNET_RULES:
        name = re.sub(pattern, new, name)
    return name


def vae_name(name, levels):
    for pattern, new in VAE_RULES:
        name = re.sub(pattern, new, name)
    # CompVis counts the decoder's levels from the finest, diffusers from the coarsest.
    return re.sub(r"\.up\.(\d)", lambda m: f".up.{levels - 1 - int(m[1])}", name)


# ---- public names -> ours ----

FAMILIES = {  # preset: a tensor that only this family has, and what to call it
    "sd-v1": ("input_blocks.1.1.proj_in.weight", "Stable Diffusion v1: spatial transformers"),
    "ldm-kl-8": ("input_blocks.1.1.qkv.weight", "LDM kl-8: plain attention blocks"),
}
CONTEXT = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # as wide as the text's tokens
SDXL = ("conditioner.", UNET + "label_emb.0.", UNET + "add_embedding.")


def is_published_run(tensors):
    """Only the published SDSeg code has a convolution behind its conditioning encoder."""
    return TAU + "out.weight" in tensors


def identify(tensors):
    """-> config, what it was found to be. Raises Refusal for what SDSeg cannot start from."""
    if UNET + CONV_IN not in tensors:
        raise Refusal(without_unet(tensors))
    if any(name.startswith(SDXL) for name in tensors):
        raise Refusal("Stable Diffusion XL; SDSeg starts from Stable Diffusion v1")
    preset = next((p for p, (name, _) in FAMILIES.items() if UNET + name in tensors), None)
    if preset is None:
        raise Refusal("a U-Net of an unknown family; SDSeg starts from Stable Diffusion v1 or LDM")
    config, context = PRESETS[preset], width(tensors, CONTEXT)
    if context not in (None, config.unet.context_dim):
        kind = "Stable Diffusion 2.x" if context == 1024 else "an unknown Stable Diffusion"
        raise Refusal(f"{kind} (context {context}); SDSeg starts from Stable Diffusion v1")
    channels, trained = width(tensors, CONV_IN), is_published_run(tensors)
    if channels != (8 if trained else 4):
        kind = "an inpainting model" if channels == 9 else "a variant"
        raise Refusal(f"{kind}: its U-Net has {channels} input channels; give the plain model")
    if not any(name.startswith(VAE) for name in tensors):
        raise Refusal("a U-Net without autoencoder; give the kl-f8 model.ckpt as a second file")
    phrase = f"{FAMILIES[preset][1]}, {channels} input channels"
    if trained:
        return as_trained(config, tensors), f"a run of the published SDSeg ({phrase})"
    return config, phrase


def width(tensors, name):
    """Input channels of a U-Net layer; None if it is not there."""
    tensor = tensors.get(UNET + name)
    return tensor.shape[1] if tensor is not None and tensor.dim() > 1 else None


def without_unet(tensors):
    if VAE + "encoder.conv_in.weight" in tensors:
        return "an autoencoder without U-Net; give the lsun_churches model.ckpt as a second file"
    if "unet." + CONV_IN in tensors:
        return "converted already; pass it to train.py --init, or to infer.py --model if trained"
    names = f"{len(tensors)} tensors, {sorted(tensors)[0]:.60} and on" if tensors else "no tensors"
    return f"no U-Net of Stable Diffusion v1 or LDM in it ({names})"


def as_trained(config, tensors):
    """The settings that the published code keeps as buffers. It does not scale z_c."""
    start, end = config.beta_start, config.beta_end
    try:
        scale = tensors["scale_factor"].double().item()
        if "betas" in tensors:
            start, end = (round(b, 7) for b in tensors["betas"].double()[[0, -1]].tolist())
    except (KeyError, IndexError, RuntimeError):
        raise Refusal("the buffers scale_factor and betas are missing or misshapen") from None
    if not (0 < scale < 1e6 and 0 < start < end < 1):
        raise Refusal(f"scale_factor {scale} with betas {start} to {end} is no run's setting")
    return replace(config, beta_start=start, beta_end=end, image_scale=1.0, mask_scale=scale)


def public_name(name, trained, ema):
    """Where the tensor that we call `name` comes from. tau starts as the autoencoder's encoder."""
    part, _, rest = name.partition(".")
    if part == "unet" and ema:  # the averages' names lost their dots
        return EMA + (UNET.removeprefix("model.") + rest).replace(".", "")
    if part == "tau" and not trained:
        return VAE + re.sub("^out", "quant_conv", rest)
    return {"unet": UNET, "vae": VAE, "tau": TAU}[part] + rest


def adapted(name, value, shape, config):
    """Bring the two tensors to size whose size differs; `shape` is what the model expects."""
    z = config.vae.z_channels
    if name == f"unet.{CONV_IN}" and list(value.shape) == [shape[0], z, *shape[2:]]:
        return widen_conv_in(value, shape[1])
    if name.startswith("tau.out.") and list(value.shape) == [2 * z, *shape[1:]]:
        return value[:z]  # the rows of quant_conv that give the mean
    return value


def convert(tensors, config, ema=False):
    """{CompVis name: tensor} -> {our name: tensor}, and the set of public names that were used.

    Raises Refusal naming the tensors that are missing, misshapen or left over.
    """
    weights, used, taken, wrong = {}, set(), set(), []
    if ema and not any(name.startswith(EMA + "diffusion_model") for name in tensors):
        raise Refusal("no averaged U-Net (model_ema.*) in it; convert without --ema")
    for name, expected in build(config, "preset").state_dict().items():
        source, shape = public_name(name, is_published_run(tensors), ema), list(expected.shape)
        if source not in tensors:
            wrong.append(f"{source} is missing")
            continue
        value = adapted(name, tensors[source], shape, config)
        if list(value.shape) != shape or not value.is_floating_point():
            wrong.append(f"{source} is {list(value.shape)} {value.dtype}, not {shape}")
        else:  # safetensors wants tensors that share no memory, as tau and the autoencoder would
            memory = value.untyped_storage().data_ptr()
            weights[name] = value.clone() if memory in taken else value
            taken.add(memory)
        used.add(source)
    parts = (VAE,) if ema else (UNET, VAE)
    left = [name for name in tensors if name.startswith(parts) and name not in used]
    wrong += [f"{name} is unexpected" for name in left if not name.startswith(VAE + "loss.")]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Refusal(f"{', '.join(wrong[:3])}{more}; download the original file again")
    return weights, used


# ---- the report ----

IGNORED = (  # how public names begin, and what is not taken; the first that fits counts
    ("again.", "given twice"),
    (EMA, "averaged U-Net"),
    (UNET, "plain U-Net"),
    (TAU, "text encoder"),
    ("optimizer_states.", "optimiser"),
    ((VAE, "loss."), "autoencoder's loss"),
    ("", "schedule and other buffers"),
)


def row(verb, what, tensors, note=""):
    size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    count = f"{len(tensors):>5} tensor" + ("s" if len(tensors) != 1 else " ")
    print(f"{verb:<9}{what:<27}{count}{size:>10.2f} MB  {note}".rstrip())


def report(tensors, weights, used, ema):
    """Print what was taken, what starts at zero and what was left, with counts and sizes."""
    trained, conv_in = is_published_run(tensors), "unet." + CONV_IN
    own = ("unet.", "vae.", "tau.")
    parts = {p: [t for name, t in weights.items() if name.startswith(p)] for p in own}
    row("loaded", "averaged U-Net" if ema else "U-Net", parts["unet."])
    row("loaded", "autoencoder", parts["vae."])
    if trained:
        row("loaded", "vision encoder", parts["tau."])
    else:
        row("copied", "vision encoder", parts["tau."], "starts as the autoencoder's encoder")
    new = weights[conv_in].shape[1] - tensors[public_name(conv_in, trained, ema)].shape[1]
    if new:
        row("zeroed", f"{new} new input channels", [weights[conv_in][:, -new:]], "for the image")
    left = {}
    for name in tensors.keys() - used:
        kind = next(kind for prefix, kind in IGNORED if name.startswith(prefix))
        left.setdefault(kind, []).append(tensors[name])
    for kind in sorted(left):
        row("ignored", kind, left[kind])


def output_path(args, config, trained):
    """Where to write. Raises Refusal for a source or a name that train.py would not take."""
    stem = f"sdseg-{Path(args.source[0]).stem}" if trained else config.preset
    out = Path(args.out or f"weights/{stem}.safetensors")
    if out.suffix != ".safetensors":
        raise Refusal(f"--out {out}: give a name that ends in .safetensors")
    if out.exists() and any(out.samefile(source) for source in args.source):
        raise Refusal(f"--out {out}: this is the source; give another name")
    return out


def main(args):
    where = " and ".join(args.source)
    tensors = read_sources([Path(source) for source in args.source])
    try:
        config, phrase = identify(tensors)
        weights, used = convert(tensors, config, args.ema)
    except Refusal as error:
        raise Refusal(f"{where}: {error}") from None
    out = output_path(args, config, is_published_run(tensors))
    print(f"found    {phrase} in {where}")
    report(tensors, weights, used, args.ema)
    write_weights(out, weights, config, args.half)
    print(f"wrote    {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(lambda: main(ARGS))
