"""What turns arrays into images for people: overlays, montages and plots.

Letters: H W the size of an image, Z the slices of a volume, N panels.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# Black, then a colour for each class: hues a golden section apart, so that neighbours differ.
HUES = [colorsys.hsv_to_rgb((0.33 + 0.618 * i) % 1, 1, 1) for i in range(13)]
PALETTE = (255 * np.array([(0, 0, 0), *HUES])).astype(np.uint8)  # (14, 3)
GREY, LIGHT_GREY, BLUE = (96, 96, 96), (225, 225, 225), (31, 90, 160)
LINES = (BLUE, "#d1495b", "#2e8b57", "#e08e0b", "#7b3fa0", "#444444", "#00a0b0", "#b0713a")


def to_uint8(x):
    """A tensor (.., 3, H, W) in [-1, 1] -> an array uint8 (.., H, W, 3). Values outside are cut."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def fit_tile(image, side):
    """uint8 (H, W, 3) -> a PIL image of side x side, the aspect ratio kept, on grey."""
    return ImageOps.pad(Image.fromarray(image), (side, side), color=GREY)


def overlay(image, ids):
    """Image uint8 (H, W, 3), class ids (H, W) -> the image with a tint and an outline per class.

    The outline is wider in larger images.
    """
    inside = ids > 0
    width = 1 + max(ids.shape) // 500  # of the outline, in pixels
    edge = np.zeros_like(inside)
    for axis in (0, 1):
        for shift in (-width, width):
            edge |= np.roll(ids, shift, axis) != ids
    edge &= inside
    result = image.copy()
    result[inside] = image[inside] // 4 * 3 + PALETTE[ids[inside]] // 4
    result[edge] = PALETTE[ids[edge]]
    return result


def montage(images, ids):
    """Slices uint8 (Z, H, W, 3), class ids (Z, H, W) -> one image of at most 16 overlays.

    The slices with foreground are divided into 16 stretches, and the fullest of each is shown.
    """
    pixels = np.array([np.count_nonzero(i) for i in ids])
    candidates = np.flatnonzero(pixels) if pixels.any() else np.arange(len(ids))
    stretches = np.array_split(candidates, min(16, len(candidates)))
    fullest = [stretch[pixels[stretch].argmax()] for stretch in stretches]
    zoom = 1 + 160 // max(ids.shape[1:])  # small slices are shown larger
    tiles = [overlay(enlarge(images[z], zoom), enlarge(ids[z], zoom)) for z in fullest]
    return grid(tiles, int(np.ceil(len(tiles) ** 0.5)))


def enlarge(x, zoom):
    """(H, W, ..) -> (zoom H, zoom W, ..): each pixel becomes a square."""
    return x.repeat(zoom, axis=0).repeat(zoom, axis=1)


def grid(tiles, columns):
    """Images (H, W, 3) of one size -> one image, row by row; black where the last row ends."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def plot_panels(panels):
    """[(title, {name: (x, y)}, x_labels, y_range)] -> uint8 (420, 460 N, 3): one plot per title.

    x and y are sequences of equal length; y may hold nan. x_labels {text: x}, or None for round
    numbers from 0; y_range (low, high), or None for that of the values. Of these the largest 2 %
    are cut off, because the first losses of a run are far above all others.
    """
    return np.concatenate([plot_lines(*panel) for panel in panels], 1)


def plot_lines(title, lines, x_labels, y_range):
    """One panel of `plot_panels`; the names stand at its right."""
    values = [v for _, y in lines.values() for v in y if np.isfinite(v)] or [0]
    y_ticks = round_numbers(*(y_range or (min(values), np.percentile(values, 98))))
    last = max((max(x) for x, _ in lines.values()), default=1)
    x_labels = x_labels or {f"{x:g}": x for x in round_numbers(0, last)}
    span = min(x_labels.values()), max(x_labels.values())
    left, right, top, bottom = 60, 320, 40, 370

    canvas = Image.new("RGB", (460, 420), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((left, 12), title, "black", font)
    for value in y_ticks:
        height = np.interp(value, (y_ticks[0], y_ticks[-1]), (bottom, top))
        draw.line([left, height, right, height], LIGHT_GREY)
        draw.text((left - 6, height), f"{value:g}", "black", font, anchor="rm")
    for text, value in x_labels.items():
        draw.text((np.interp(value, span, (left, right)), bottom + 8), text, "black", font, "mt")
    draw.line([left, top, left, bottom, right, bottom], "black")
    for i, (name, (x, y)) in enumerate(lines.items()):
        colour = LINES[i % len(LINES)]
        y = np.interp(y, (y_ticks[0], y_ticks[-1]), (bottom, top))
        points = [p for p in zip(np.interp(x, span, (left, right)), y) if np.isfinite(p[1])]
        draw.line(points, colour, 2)
        for px, py in points[-1:]:
            draw.ellipse([px - 3, py - 3, px + 3, py + 3], colour)
        draw.line([right + 12, 56 + 20 * i, right + 30, 56 + 20 * i], colour, 3)
        draw.text((right + 36, 56 + 20 * i), name, "black", font, anchor="lm")
    return np.asarray(canvas)


def round_numbers(low, high):
    """Two to seven numbers such as 0, 0.2, 0.4, .. that enclose low to high, which may be equal."""
    high = high if high > low else low + (abs(low) or 1)
    step = 10 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if high - low <= 5 * m * step)
    first, last = np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6)
    return [float(f"{i * step:.12g}") for i in np.arange(first, last + 1)]
