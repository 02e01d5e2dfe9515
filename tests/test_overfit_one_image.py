"""The method end to end: it learns one image in seconds."""

from dataclasses import replace

import torch

from sdseg import T, from_pretrained
from support.metrics import dice
from support.weights import DEFAULT_WEIGHTS


def test_overfit_one_image():
    """Eq. 3 alone takes random tau and U-Net to the mask of one image, from noise never seen."""
    torch.manual_seed(0)
    model = from_pretrained(DEFAULT_WEIGHTS, vae_only=True, image_size=64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = ((y - 40) ** 2 + (x - 25) ** 2 < 16**2).long()[None]
    image = 0.5 * torch.rand(1, 3, 64, 64) + 0.4 * mask[:, None] - 0.5
    latent_std = model.vae.encode(model.labels_to_rgb(mask))[0].std().item()
    model.config = replace(model.config, mask_scale=1 / latent_std)

    def score():
        prob = model.segment(image, generator=torch.Generator().manual_seed(123))
        return dice(model.class_ids(prob)[0], mask[0]).item()

    assert score() < 0.5
    z_0 = model.encode_mask(mask).repeat(2, 1, 1, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(24):
        t = torch.tensor([T - 1, int(torch.randint(T, ()))])
        out = model(image.repeat(2, 1, 1, 1), z_0, t, torch.randn_like(z_0))
        loss = out.noise_loss.mean() + out.latent_loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert score() > 0.95
