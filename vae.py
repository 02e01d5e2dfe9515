"""The KL autoencoder of latent diffusion, and the vision encoder of SDSeg.

In: images (B, 3, H, W) in [-1, 1]. Out: latents (B, 4, h, w), unscaled. Every level of `ch_mult`
but the last halves the side, so h = H/8 (preset nano: H/4).
`AutoencoderKL` takes segmentation maps into the latent space and back; it stays frozen.
`VisionEncoder`, tau in the paper, has the same encoder, is trained, and encodes the image.
Modules have the parameter names of CompVis checkpoints, so that public weights load directly.
Letters: B batch, C channels, H W pixels, h w latent pixels. Shapes: sd-v1, 256 px images.
"""
# The columns of shapes are aligned by hand.
# fmt: off

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.fast_ops import GroupNorm, Upsample


@dataclass(frozen=True)
class VAEConfig:
    ch: int = 128  # channels at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # one level each; all but the last halve H and W
    num_res_blocks: int = 2  # per level of the encoder
    z_channels: int = 4
    decoder_res_blocks: int | None = None  # per level of the decoder; None: one more


def norm(channels):
    return GroupNorm(32, channels, eps=1e-6)  # the U-Net has 1e-5: both as the weights were trained


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                          # (B, c_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                      # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all latent pixels, one head."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):                                          # (B, 512, 32, 32)
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        # PyTorch's fused attention needs contiguous tensors.
        q, k, v = (y.contiguous() for y in (q, k, v))              # (B, 1, 1024, 512)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]          # (B, 1024, 512)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                          # (B, C, H, W)
        x = F.pad(x, (0, 1, 0, 1))  # right and bottom only: the weights were trained so
        return self.conv(x)                                        # (B, C, H/2, W/2)


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResnetBlock(c, c)
        self.attn_1 = AttnBlock(c)
        self.block_2 = ResnetBlock(c, c)

    def forward(self, x):                                          # (B, 512, 32, 32)
        return self.block_2(self.attn_1(self.block_1(x)))


def resnet_blocks(c_in, c_out, n):
    return nn.Sequential(*(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n)))


class DownLevel(nn.Module):
    """Residual blocks, then half the side; the last level keeps it."""

    def __init__(self, c_in, c_out, n, last):
        super().__init__()
        self.block = resnet_blocks(c_in, c_out, n)
        self.downsample = nn.Identity() if last else Downsample(c_out)

    def forward(self, x):                                          # (B, c_in, H, W)
        return self.downsample(self.block(x))                      # (B, c_out, H/2, W/2)


class UpLevel(nn.Module):
    """Residual blocks, then twice the side; the last level keeps it."""

    def __init__(self, c_in, c_out, n, last):
        super().__init__()
        self.block = resnet_blocks(c_in, c_out, n)
        self.upsample = nn.Identity() if last else Upsample(c_out)

    def forward(self, x):                                          # (B, c_in, H, W)
        return self.upsample(self.block(x))                        # (B, c_out, 2H, 2W)


class Encoder(nn.Module):
    """Image -> 8 channels, from which `quant_conv` makes mean and log-variance."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(c_in, c_out, config.num_res_blocks, last=i == len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x):                                          # (B, 3, 256, 256)
        # Without contiguous(), all layers after it would keep the strides of an image from a file
        x = x.to(self.conv_in.weight.dtype).contiguous()
        h = self.conv_in(x)                                        # (B, 128, 256, 256)
        if self.conv_in.weight.dtype != self.conv_out.weight.dtype:  # tau keeps conv_in in float32
            h = h.to(self.conv_out.weight.dtype)
        # After each level: (B, 128, 128, 128), (B, 256, 64, 64), (B, 512, 32, 32), (B, 512, 32, 32)
        for level in self.down:
            h = level(h)
        h = self.mid(h)                                            # (B, 512, 32, 32)
        return self.conv_out(F.silu(self.norm_out(h)))             # (B, 8, 32, 32)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks = config.decoder_res_blocks or config.num_res_blocks + 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # up.0 is the finest level and runs last: CompVis counts so
            UpLevel(c_in, c_out, blocks, last=i == 0)
            for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):                                          # (B, 4, 32, 32)
        h = self.mid(self.conv_in(z))                              # (B, 512, 32, 32)
        # After each level: (B, 512, 64, 64), (B, 512, 128, 128), (B, 256, 256, 256), (B, 128, ..)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))             # (B, 3, 256, 256)


class AutoencoderKL(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean, logvar of the posterior, (B, 4, h, w) each."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the original's limits, so that exp() stays finite

    def decode(self, z):
        """z (B, 4, h, w), unscaled -> (B, 3, H, W), near [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


class VisionEncoder(nn.Module):
    """tau: the trained encoder of the image. An Encoder, then a 1 x 1 convolution 8 -> 4."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.encoder = Encoder(config)
        self.out = nn.Conv2d(2 * config.z_channels, config.z_channels, 1)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, 4, h, w), unscaled like the autoencoder's mean."""
        return self.out(self.encoder(x).to(self.out.weight.dtype))

    @torch.no_grad()
    def init_from(self, vae):
        """Copy E: tau(x) is then exactly the posterior mean of x.

        The mean is the first half of `quant_conv`'s output, so `out` needs those rows only.
        """
        self.encoder.load_state_dict(vae.encoder.state_dict())
        n = self.out.out_channels
        self.out.weight.copy_(vae.quant_conv.weight[:n])
        self.out.bias.copy_(vae.quant_conv.bias[:n])
