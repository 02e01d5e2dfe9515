"""Draw the method at work: `python figure.py [picture.png --mask mask.png] --out method.png`.

Above, training (Figure 1 of the paper): the latents of image and map, noise on the latter, and
what one network call makes of it at several t. Below, inference (Figure 2): the z_0 estimates of
DDIM from pure noise; the first is the single-step result. Latents have false colours: three of
the four channels, grey at 0, full at 2.5 (z_c: at 2.5 of its standard deviations).
"""

from common import SHIPPED, Parser, Refusal, any_seed, run


def parse(argv=None):
    parser = Parser("Draw how a model goes from noise to a mask, as one PNG.")
    add = parser.add_argument
    add("picture", nargs="?", help="the image (default: one of the demo data set)")
    add("--mask", metavar="FILE", help="its true map (default: the model's own, of one step)")
    add("--model", metavar="FILE", help="weights (default: weights/nano.safetensors, which ships)")
    add("--out", default="docs/method.png", metavar="FILE", help="the PNG to write")
    add("--seed", type=any_seed, default=0, help="of the noise, and of the demo picture")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()  # before the heavy imports, so that --help and a wrong flag answer at once

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from demo import draw_demo
from files import read_image, read_mask, resize_image, resize_mask, write_image
from infer import class_ids, overlay
from metrics import dice
from sdseg import SDSeg, T, ddim_timesteps, find_device

LEVELS = (99, 299, 499, 749, T - 1)  # t of the upper half
WIDTH, MARGIN, GAP = 960, 12, 6  # pixels


# ---- what is shown ----


def load_pair(args, size, k):
    """-> image uint8 (size, size, 3), and class ids uint8 (size, size) or None. Raises Refusal."""
    if args.picture is None:
        if args.mask:
            raise Refusal(f"{args.mask}: a mask without its picture; name the picture, too")
        return draw_demo(args.seed, size)
    image = read_image(args.picture)
    if args.mask is None:
        return resize_image(image, size), None
    values = read_mask(args.mask)
    if values.shape != image.shape[:2]:
        raise Refusal(f"{args.mask}: a mask of {values.shape}, but {args.picture} is "
                      f"{image.shape[:2]}; they must match")  # fmt: skip
    ids = data.class_ids(values, "binary" if k == 2 else "ids", k, args.mask)
    return resize_image(image, size), resize_mask(ids, size)


def call(model, z_t, step, z_c):
    """One network call at time `step` -> t (1,), its output, and the z_0 estimate (1, 4, h, w)."""
    t = torch.full((1,), step, device=z_t.device)
    out = model.denoise(z_t, t, z_c)
    return t, out, model.predict_z0(z_t, t, out)


def ddim_estimates(model, z_t, z_c, timesteps):
    """DDIM from pure noise z_t, as in `SDSeg.reverse` -> the z_0 estimate of every step."""
    estimates = []
    for step, after in zip(timesteps, [*timesteps[1:], None]):
        t, out, estimate = call(model, z_t, step, z_c)
        estimates.append(estimate)
        if after is not None:
            z_t = model.ddim_step(z_t, t, out, model.alphas_cumprod[after].item())
    return estimates


def ids_of(model, z_0):
    return class_ids(model.scores(model.decode_mask(z_0))[0].cpu().numpy())


# ---- how it is drawn ----


def picture(x):
    """(1, C, H, W) in [-1, 1] -> a PIL image of its first three channels."""
    x = ((x[0, :3].clamp(-1, 1) + 1) * 127.5).byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def enlarge(tile, side):
    """Square pixels stay square and even, whatever the factor."""
    if tile.width < side:
        tile = tile.resize((tile.width * side,) * 2, Image.Resampling.NEAREST)
    return tile.resize((side, side), Image.Resampling.BOX)


class Canvas:
    """Rows of labelled tiles, one below another."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH, 2 * WIDTH), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def write(self, x, text, size, colour="black"):
        """The character after an underscore is a subscript."""
        first, *others = text.split("_")
        words = [(first, size, 0)]
        for part in others:
            words += [(part[:1], round(0.75 * size), 0.4 * size), (part[1:], size, 0)]
        for word, size, drop in words:
            font = ImageFont.load_default(size)
            self.draw.text((x, self.y + drop), word, fill=colour, font=font)
            x += self.draw.textlength(word, font) + (drop > 0)

    def title(self, text):
        self.write(MARGIN, text, 16)
        self.y += 28

    def row(self, tiles):
        """[(label, PIL image), ...] side by side over the whole width."""
        step = (WIDTH - 2 * MARGIN + GAP) / len(tiles)
        side = round(step) - GAP
        for i, (label, tile) in enumerate(tiles):
            x = MARGIN + round(i * step)
            self.write(x, label, 13, (70, 70, 70))
            self.image.paste(enlarge(tile, side), (x, self.y + 20))
        self.y += side + 20 + GAP

    def finish(self):
        return np.asarray(self.image.crop((0, 0, WIDTH, self.y + MARGIN - GAP)))


@torch.no_grad()
def draw_method(model, image, ids, seed):
    """image uint8 (S, S, 3), class ids uint8 (S, S) or None -> the figure, uint8 (H, 960, 3)."""
    # 1. Inference: DDIM from pure noise, whose first estimate is the single step's
    device, k = model.colours.device, len(model.config.classes)
    x = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None] / 127.5 - 1
    z_c = model.condition(x)
    noise = torch.randn(z_c.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    timesteps = ddim_timesteps(10)
    estimates = ddim_estimates(model, noise, z_c, timesteps)
    predicted = ids_of(model, estimates[0])
    map_label = "map X" if ids is not None else "map X (predicted)"
    ids = predicted if ids is None else ids

    def latent(z):
        return picture(z / 2.5)

    def decoded(z):
        score = dice(ids_of(model, z), ids, k).mean()
        return f"D, Dice {score:.2f}", picture(model.decode_mask(z))

    # 2. Training: z_t and what one call makes of it
    mask = torch.from_numpy(ids).long().to(device)[None]
    z_0 = model.encode_mask(mask)
    noisy = [model.q_sample(z_0, torch.tensor([t], device=device), noise) for t in LEVELS]
    guesses = [call(model, z, t, z_c)[2] for z, t in zip(noisy, LEVELS)]

    # 3. The picture
    canvas = Canvas()
    canvas.title("Training: noise on the map's latent z_0, and what one network call makes of it")
    canvas.row([("image C", Image.fromarray(image)), (map_label, picture(model.paint(mask))),
                *((f"z_t, t = {t}", latent(z)) for t, z in zip(LEVELS, noisy))])  # fmt: skip
    canvas.row([("z_c = tau(C)", latent(z_c / z_c.std())), ("z_0 = E(X)", latent(z_0)),
                *(("z_0 estimate", latent(z)) for z in guesses)])  # fmt: skip
    canvas.row([("mask of one step", Image.fromarray(overlay(image, predicted))),
                ("D(z_0)", picture(model.decode_mask(z_0))), *map(decoded, guesses)])  # fmt: skip
    canvas.y += 2 * GAP
    canvas.title("Inference: z_0 estimates of DDIM from pure noise; the first is the single step's")
    canvas.row([(f"t = {t}", latent(z)) for t, z in zip(timesteps, estimates)])
    canvas.row([decoded(z) for z in estimates])
    return canvas.finish()


def main(args):
    if Path(args.out).suffix.lower() != ".png":
        raise Refusal(f"{args.out}: the figure is a PNG; give it a name that ends in .png")
    inputs = [os.path.realpath(path) for path in (args.picture, args.mask) if path]
    if os.path.realpath(args.out) in inputs:
        raise Refusal(f"{args.out}: is the picture or its mask; choose another --out")
    model = SDSeg.load(args.model or SHIPPED, find_device(args.device))
    image, ids = load_pair(args, model.config.image_size, len(model.config.classes))
    write_image(args.out, draw_method(model, image, ids, args.seed))
    print(f"{args.out}: written")


if __name__ == "__main__":
    run(lambda: main(ARGS))
