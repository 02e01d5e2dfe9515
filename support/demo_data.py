"""The demo data set: lesions on tissue, drawn by a seeded generator. It needs no file.

No threshold finds the lesions: they are lighter or darker than their surroundings, some hardly
differ in colour, and folds, a dark lumen, glare, bubbles and debris distract. All lesions have a
domed shading, a texture of their own and a closed, soft, dark outline.
Letters: y x coordinates in [0, 1), d a distance that is below 1 inside of an outline.
"""

import numpy as np
from PIL import Image


def noise(rng, size, cells, channels=1):
    """Smooth noise (size, size, channels) of about unit strength, `cells` + 3 values a side."""
    grid = rng.standard_normal((cells + 3, cells + 3, channels)).astype(np.float32)
    layers = [
        np.asarray(Image.fromarray(grid[..., c]).resize((size, size), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    return np.stack(layers, axis=-1)


def distance(rng, y, x, radius, wobble):
    """-> d (size, size) of a closed outline around a random centre, and the offsets from it."""
    cy, cx = rng.uniform(0.15, 0.85, 2)
    dy, dx = y - cy, x - cx
    angle, turn, squeeze = np.arctan2(dy, dx), rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
    outline = radius * np.ones_like(angle)
    for k in range(2, 6):
        outline = outline * (1 + wobble / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)))
    along, across = dy * np.sin(turn) + dx * np.cos(turn), dy * np.cos(turn) - dx * np.sin(turn)
    return np.hypot(along * squeeze, across / squeeze) / outline, dy / radius, dx / radius


def draw_tissue(rng, y, x, size):
    """Pink tissue with blotches, folds, vessels and a vignette, float (size, size, 3) in 0..1."""
    image = np.array([0.72, 0.42, 0.36]) + rng.normal(0, 0.05, 3)
    for cells, strength in ((2, 0.07), (5, 0.04), (12, 0.02)):
        image = image + strength * noise(rng, size, cells)
        image = image + strength * 0.3 * noise(rng, size, cells, 3)
    bend = 0.15 * noise(rng, size, 3)[..., 0]
    turn, folds = rng.uniform(0, np.pi), rng.uniform(3, 7)
    phase = (x * np.cos(turn) + y * np.sin(turn) + bend) * folds * 2 * np.pi
    image = image + rng.uniform(0, 0.09) * np.sin(phase)[..., None] ** 3
    vessels = np.exp(-((noise(rng, size, 6) / 0.06) ** 2))
    image = image - vessels * np.array([0.03, 0.09, 0.08]) * rng.uniform(0.3, 1)
    return image * (1.1 - 0.9 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None]


def draw_distractors(rng, y, x, size, image):
    """A dark lumen, flat debris with a hard outline, and bubbles; none of them is a lesion."""
    if rng.random() < 0.5:
        d, _, _ = distance(rng, y, x, rng.uniform(0.1, 0.25), 0.2)
        image = image * (1 - 0.8 / (1 + np.exp((d - 1) * 6)))[..., None]
    for _ in range(rng.integers(0, 4)):
        d, _, _ = distance(rng, y, x, rng.uniform(0.03, 0.12), 0.5)
        colour = np.array([0.62, 0.5, 0.2]) * rng.uniform(0.6, 1.4) + rng.normal(0, 0.04, 3)
        cover = (d < 1)[..., None] * rng.uniform(0.6, 1)
        image = image * (1 - cover) + cover * (colour + 0.05 * noise(rng, size, 30))
    for _ in range(rng.integers(0, 5)):
        d, dy, dx = distance(rng, y, x, rng.uniform(0.02, 0.07), 0.0)
        image = image + 0.25 * np.exp(-(((d - 1) / 0.15) ** 2))[..., None]
        image = image + 0.5 * np.exp(-((dy + 0.4) ** 2 + (dx + 0.4) ** 2) / 0.03)[..., None]
    return image


def draw_lesion(rng, y, x, size, image):
    """Draw one lesion -> the image with it, its mask bool (size, size)."""
    d, dy, dx = distance(rng, y, x, rng.uniform(0.11, 0.24), rng.uniform(0.1, 0.4))
    cover = 1 / (1 + np.exp(np.clip((d - 1) * rng.uniform(12, 40), -50, 50)))
    shift = rng.choice([-1, 1]) * rng.uniform(0.06, 0.18)  # lighter or darker
    colour = shift * np.array([1, 1, 1]) + rng.normal(0, 0.03, 3)
    light = rng.uniform(0, 2 * np.pi)
    dome = 0.2 * (dy * np.sin(light) + dx * np.cos(light)) * np.exp(-(d**2))
    rim = -0.22 * np.exp(-(((d - 1) / 0.16) ** 2))
    texture = 0.06 * noise(rng, size, 20)[..., 0]
    change = colour + ((dome + texture) * (d < 1.3) + rim)[..., None]
    return image + change * np.maximum(cover, 0.5 * (rim < -0.03))[..., None], d < 1


def draw_demo(seed, size):
    """-> image uint8 (size, size, 3), mask uint8 (size, size) of 0 and 1: 0 to 3 lesions."""
    rng = np.random.default_rng([20240, seed])
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    image = draw_distractors(rng, y, x, size, draw_tissue(rng, y, x, size))
    mask = np.zeros((size, size), bool)
    for _ in range(rng.choice(4, p=[0.02, 0.58, 0.25, 0.15])):
        image, lesion = draw_lesion(rng, y, x, size, image)
        mask |= lesion
    for _ in range(rng.integers(0, 9)):  # glare
        d, _, _ = distance(rng, y, x, rng.uniform(0.008, 0.03), 0.4)
        image = image + 0.8 * np.exp(-(d**4))[..., None]
    image = image + rng.normal(0, 0.012, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), mask.astype(np.uint8)
