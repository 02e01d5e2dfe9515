"""What turns arrays into images for people: overlays, montages, contact sheets and plots.

Letters: H W the size of an image, S the side of a square one, Z the slices of a volume, N points.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageOps

# Black, then a colour for each class: hues a golden section apart, so that neighbours differ.
HUES = [colorsys.hsv_to_rgb((0.33 + 0.618 * i) % 1, 1, 1) for i in range(13)]
PALETTE = (255 * np.array([(0, 0, 0), *HUES])).astype(np.uint8)  # (14, 3)
GREY, BLUE = (96, 96, 96), (31, 90, 160)


def to_uint8(x):
    """A tensor (.., 3, H, W) in [-1, 1] -> an array uint8 (.., H, W, 3). Values outside are cut."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def fit_tile(image, side, method):
    """uint8 (H, W, 3) -> a PIL image of side x side, the aspect ratio kept, on grey.

    `method` is a PIL resampling method: NEAREST for class colours, BICUBIC for photographs.
    """
    return ImageOps.pad(Image.fromarray(image), (side, side), method, color=GREY)


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


def contact_sheet(rows, k):
    """Rows of pairs (image uint8 (S, S, 3), class ids uint8 (S, S)) of k classes -> one image.

    Each row of images stands above the row of their masks, where class k - 1 is white.
    """
    columns = max(len(row) for row in rows)
    tiles = []
    for row in rows:
        masks = [np.repeat((ids * (255 // (k - 1)))[..., None], 3, axis=2) for _, ids in row]
        for line in ([image for image, _ in row], masks):
            tiles += line + [np.zeros_like(line[0])] * (columns - len(line))
    return grid(tiles, columns)


def grid(tiles, columns):
    """Images (H, W, 3) of one size -> one image, row by row; black where the last row ends."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def plot_curve(steps, dice):
    """Mean Dice (N,) against N >= 2 numbers of DDIM steps, on a log axis -> uint8 (400, 640, 3)."""
    low = max(np.floor(min(dice) * 20 - 0.5) / 20, 0)
    high = min(np.ceil(max(dice) * 20 + 0.5) / 20, 1)
    left, right, top, bottom = 60, 610, 40, 340
    y = np.interp(dice, (low, high), (bottom, top))
    x = np.interp(np.log(steps), np.log((min(steps), max(steps))), (left + 30, right - 10))

    canvas = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(canvas)
    for value in np.linspace(low, high, round((high - low) * 20) + 1):
        height = np.interp(value, (low, high), (bottom, top))
        draw.line([left, height, right, height], fill=(225, 225, 225))
        draw.text((left - 8, height), f"{value:.2f}", fill="black", anchor="rm")
    draw.line([left, top, left, bottom, right, bottom], fill="black")
    draw.text((left, 12), "mean Dice", fill="black", anchor="mt")
    draw.text(((left + right) / 2, 375), "DDIM steps", fill="black", anchor="mt")

    draw.line(list(zip(x, y)), fill=BLUE, width=2)
    for px, py, n, value in zip(x, y, steps, dice):
        draw.ellipse([px - 4, py - 4, px + 4, py + 4], fill=BLUE)
        draw.text((px, py - 8), f"{value:.3f}", fill="black", anchor="mb")
        draw.text((px, bottom + 10), str(n), fill="black", anchor="mt")
    return np.asarray(canvas)


def plot_panels(panels):
    """[(title, {name: (x, y)})] -> uint8 (300, 400 N, 3): one plot a title, a line a name.

    x and y are sequences of equal length; y may hold nan. The top of a plot is a little above the
    98th percentile, because the first losses are far above all others.
    """
    canvas = Image.new("RGB", (400 * len(panels), 300), "white")
    draw = ImageDraw.Draw(canvas)
    for left, (title, lines) in zip(range(60, 400 * len(panels), 400), panels):
        right, top, bottom = left + 320, 40, 260
        draw.text((left, 12), title, fill="black", anchor="lt")
        draw.line([left, top, left, bottom, right, bottom], fill="black")
        values = [v for _, y in lines.values() for v in y if np.isfinite(v)]
        if not values:
            continue
        low, high = min(values), np.percentile(values, 98)
        high += 0.05 * (high - low) or 1
        last = max(max(x) for x, _ in lines.values())
        for i in range(5):
            value, height = low + i * (high - low) / 4, bottom - 220 * i / 4
            draw.line([left, height, right, height], fill=(225, 225, 225) if i else "black")
            draw.text((left - 6, height), f"{value:.3g}", fill="black", anchor="rm")
        for x in (0, last):
            draw.text((left + 320 * x / last, bottom + 8), f"{x:g}", fill="black", anchor="mt")
        for i, (name, (x, y)) in enumerate(lines.items()):
            colour = tuple((PALETTE[i + 1] // 4 * 3).tolist())
            height = np.interp(y, (low, high), (bottom, top))
            points = [(left + 320 * a / last, b) for a, b in zip(x, height) if np.isfinite(b)]
            draw.line(points, fill=colour, width=2)
            for px, py in points if len(points) < 20 else points[-1:]:
                draw.ellipse([px - 2, py - 2, px + 2, py + 2], fill=colour)
            if len(lines) > 1:
                draw.text((right, top + 14 * i), name, fill=colour, anchor="rt")
    return np.asarray(canvas)
