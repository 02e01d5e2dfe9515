"""Draw the method: `python -m tools.figures [image.png] --out method.png`.

Above, training (Figure 1 of the paper): the latents of the image and of its mask, the mask latent
with noise at several t, and what one network call makes of each. Below, inference (Figure 2): the
z_0 estimate after each step of DDIM from pure noise; the first is the single-step result. Latents
have false colours: three of the four channels, grey at 0, full colour at 2.5.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sdseg import SDSeg, T, ddim_timesteps
from support.cli import ArgumentParser, UserError, run_command, seed_int
from support.demo_data import draw_demo
from support.device import find_device
from support.images import read_image, resize_image, write_image
from support.metrics import dice
from support.panels import GREY, overlay, to_uint8
from support.weights import DEFAULT_WEIGHTS

LEVELS = (99, 299, 499, 749, T - 1)  # t of the upper half
FULL = 2.5  # the value of a latent that gets the full colour; of z_c, in standard deviations
WIDTH, MARGIN, GAP = 960, 12, 6  # pixels


def parse_args(argv=None):
    parser = ArgumentParser("Draw how a model goes from noise to a mask, as one PNG.")
    add = parser.add_argument
    add("image", nargs="?", help="the image; its mask is the model's (default: a drawn image)")
    add("--model", metavar="FILE", help="weights (default: weights/nano.safetensors, which ships)")
    add("--out", default="outputs/method.png", metavar="FILE", help="the PNG to write")
    add("--seed", type=seed_int, default=0, help="of the noise, and of the demo image")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    return parser.parse_args(argv)


# ---- how it is drawn: strips of the whole width, one below another ----


def heading(text):
    strip = Image.new("RGB", (WIDTH, 28), "white")
    ImageDraw.Draw(strip).text((MARGIN, 0), text, "black", ImageFont.load_default(16))
    return strip


def row(labelled):
    """[(label, PIL image), ..] -> a strip of the images, each below its label."""
    step = (WIDTH - 2 * MARGIN + GAP) / len(labelled)
    side = round(step) - GAP
    strip = Image.new("RGB", (WIDTH, 20 + side + GAP), "white")
    for i, (label, image) in enumerate(labelled):
        x = MARGIN + round(i * step)
        ImageDraw.Draw(strip).text((x, 0), label, GREY, ImageFont.load_default(13))
        strip.paste(image.resize((side, side), Image.Resampling.BOX), (x, 20))
    return strip


def tiles(x):
    """x (B, 3 or 4, H, W) in [-1, 1] -> B PIL images of the first three channels."""
    return [Image.fromarray(array) for array in to_uint8(x[:, :3])]


# ---- what is drawn ----


@torch.no_grad()
def draw_method(model, image, ids, seed):
    """image uint8 (S, S, 3), class ids uint8 (S, S) or None -> the figure, uint8 (H, 960, 3)."""
    # 1. Inference: after k steps DDIM's z_0 estimate is the sample of the first k steps
    x = torch.tensor(image, device=model.device).permute(2, 0, 1)[None] / 127.5 - 1
    z_c = model.encode_image(x)
    noise = torch.randn(z_c.shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    timesteps = ddim_timesteps(10)
    steps = [model.ddim_sample(noise, z_c, timesteps[:k]) for k in range(1, 11)]
    estimates = torch.cat(steps)
    predicted = model.class_ids(model.probabilities(model.decode_mask(estimates[:1])))[0]

    # 2. Training: z_t, and what one network call makes of it
    mask_label = "mask X (predicted)" if ids is None else "mask X"
    mask = predicted if ids is None else torch.tensor(ids, device=model.device)
    z_0 = model.encode_mask(mask[None].long())
    t = torch.tensor(LEVELS, device=model.device)
    z_t = model.q_sample(z_0, t, noise)
    guesses = model.predict_z0(z_t, t, model.predict(z_t, t, z_c.expand(len(t), -1, -1, -1)))

    def decoded(z):
        rgb, k = model.decode_mask(z), len(model.config.classes)
        scores = [dice(i, mask, k).mean() for i in model.class_ids(model.probabilities(rgb))]
        return [(f"D, Dice {score:.2f}", image) for score, image in zip(scores, tiles(rgb))]

    # 3. The drawing
    strips = [
        heading("Training: noise on the mask latent z_0, and what one network call makes of it"),
        row([("image C", Image.fromarray(image)),
             (mask_label, *tiles(model.labels_to_rgb(mask[None].long()))),
             *((f"z_t, t = {t}", image) for t, image in zip(LEVELS, tiles(z_t / FULL)))]),
        row([("z_c = tau(C)", *tiles(z_c / z_c.std() / FULL)), ("z_0 = E(X)", *tiles(z_0 / FULL)),
             *(("z_0 estimate", image) for image in tiles(guesses / FULL))]),
        row([("mask of one step", Image.fromarray(overlay(image, predicted.cpu().numpy()))),
             ("D(z_0)", *tiles(model.decode_mask(z_0))), *decoded(guesses)]),
        heading("Inference: z_0 estimates of DDIM from noise; the first is the single-step result"),
        row([(f"t = {t}", image) for t, image in zip(timesteps, tiles(estimates / FULL))]),
        row(decoded(estimates)),
    ]  # fmt: skip
    drawing = np.concatenate([np.asarray(strip) for strip in strips])
    return np.pad(drawing, ((MARGIN, GAP), (0, 0), (0, 0)), constant_values=255)


def main(args):
    if args.image and os.path.realpath(args.out) == os.path.realpath(args.image):
        raise UserError(f"{args.out}: is the image; choose another --out")
    model = SDSeg.load(args.model or DEFAULT_WEIGHTS, find_device(args.device))
    size = model.config.image_size
    if args.image:
        image, ids = resize_image(read_image(args.image), size), None
    else:
        image, ids = draw_demo(args.seed, size)
    write_image(args.out, draw_method(model, image, ids, args.seed))
    print(f"{args.out}: written")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
