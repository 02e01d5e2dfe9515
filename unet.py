"""The U-Net of latent diffusion, in the two families that SDSeg starts from.

`family="sd"`: Stable Diffusion v1: spatial transformers (self-attention, optional cross-attention,
GEGLU) and strided convolutions. `family="ldm"`: LDM as in LSUN-churches: plain attention blocks,
scale and shift by the time step, residual blocks that resample.
In: [z_t, z_c] (B, 8, h, w), or z_t (B, 4, h, w) if z_c is the context of cross-attention; t (B,)
int64. Out: (B, 4, h, w) float32.
Modules have the parameter names of CompVis checkpoints, so that public weights load directly; the
lists of layers with fixed indices are there for these names. Shapes: sd-v1, 256 px images.
"""
# The columns of shapes are aligned by hand.
# fmt: off

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from support.fast_ops import GroupNorm, Upsample


@dataclass(frozen=True)
class UNetConfig:
    family: Literal["sd", "ldm"] = "sd"
    in_channels: int = 8  # z_t and z_c
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # one level each; all but the last halve h and w
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)  # downsampling factors with attention
    num_heads: int = 8
    context_dim: int | None = 768  # width of the context's tokens; None: no cross-attention


def timestep_embedding(t, dim):
    """t (B,) -> (B, dim) float32: cosines, then sines, of dim/2 frequencies, 1 to about 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm(channels, eps=1e-5):
    return GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    """Two convolutions. The time step enters between them: it is added, or scales and shifts.

    `resample` ("up", "down" or None) changes the resolution on both paths: nearest, or 2x2 mean.
    """

    def __init__(self, c_in, c_out, c_emb, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            norm(c_out),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout; the convolution has index 3 in checkpoints
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        same = c_in == c_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1)

    def resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):                                     # (B, c_in, h, w), (B, 1280)
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))  # (B, c_out, h', w')
        emb = self.emb_layers(emb)[:, :, None, None]               # (B, c_out or 2 c_out, 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resize(x)) + h            # (B, c_out, h', w')


class AttentionBlock(nn.Module):
    """Self-attention of the LDM family; `qkv` holds q, k, v of the first head, then the next."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x):                                          # (B, C, h, w)
        qkv = self.qkv(self.norm(x).flatten(2))                    # (B, 3C, hw)
        qkv = qkv.unflatten(1, (self.heads, 3, -1))                # (B, heads, 3, C / heads, hw)
        q, k, v = qkv.transpose(3, 4).unbind(2)                    # (B, heads, hw, C / heads) each
        h = F.scaled_dot_product_attention(q, k, v)                # (B, heads, hw, C / heads)
        return x + self.proj_out(h.transpose(2, 3).flatten(1, 2)).view_as(x)


class CrossAttention(nn.Module):
    """x (B, n, C) attends to a context (B, m, c_context). With context = x: self-attention."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x, context):                                 # (B, n, C), (B, m, c_context)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)                # (B, heads, n, C / heads)
        return self.to_out(h.transpose(1, 2).flatten(2))           # (B, n, C)


class GEGLU(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        # The identity is the original's dropout; the last layer has index 2 in checkpoints.
        self.net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward."""

    def __init__(self, c, heads, context_dim):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn1 = CrossAttention(c, c, heads)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(c)
            self.attn2 = CrossAttention(c, context_dim, heads)
        self.ff = FeedForward(c)

    def forward(self, x, context):                                 # (B, hw, C), (B, m, context_dim)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        if context is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """The attention of the SD family: latent pixels as tokens of one transformer block."""

    def __init__(self, c, heads, context_dim):
        super().__init__()
        self.norm = norm(c, eps=1e-6)  # 1e-6 here, 1e-5 in the residual blocks: as trained
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(c, heads, context_dim)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, context):                                 # (B, C, h, w)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, hw, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Block(nn.Sequential):
    """Layers in a row. Each gets what it takes: x, and the time embedding or the context."""

    def forward(self, x, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        c = config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, c, 3, padding=1))])
        widths, skips = [config.model_channels * m for m in config.channel_mult], [c]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self.level_block(c, width, level))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(self.resample(c, "down")))
                skips.append(c)
        self.middle_block = Block(self.res_block(c, c), self.attention(c), self.res_block(c, c))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                block = self.level_block(c + skips.pop(), width, level)
                c = width
                if level and i == config.num_res_blocks:  # the last block of all but the finest
                    block.append(self.resample(c, "up"))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            norm(c), nn.SiLU(), nn.Conv2d(c, config.out_channels, 3, padding=1)
        )

    def res_block(self, c_in, c_out, resample=None):
        ldm = self.config.family == "ldm"
        return ResBlock(c_in, c_out, 4 * self.config.model_channels, ldm, resample)

    def attention(self, c):
        if self.config.family == "ldm":
            return AttentionBlock(c, self.config.num_heads)
        return SpatialTransformer(c, self.config.num_heads, self.config.context_dim)

    def resample(self, c, direction):
        if self.config.family == "ldm":
            return self.res_block(c, c, direction)
        return Downsample(c) if direction == "down" else Upsample(c)

    def level_block(self, c_in, c_out, level):
        layers = [self.res_block(c_in, c_out)]
        if 2**level in self.config.attention_resolutions:
            layers.append(self.attention(c_out))
        return Block(*layers)

    def forward(self, x, t, context=None):
        """x (B, in_channels, h, w), t (B,) int64, context (B, n, context_dim) -> (B, 4, h, w).

        h and w are multiples of 2 ** (levels - 1): 8 for Stable Diffusion's four levels.
        Without a context every cross-attention contributes nothing. The last normalisation and
        convolution run in float32, because Eq. 2 multiplies their rounding by up to 38.7.
        """
        dtype = self.time_embed[0].weight.dtype
        emb = timestep_embedding(t, self.config.model_channels)    # (B, 320)
        emb = self.time_embed(emb.to(dtype))                       # (B, 1280)
        context = None if context is None else context.to(dtype)   # (B, n, 768)
        h, skips = x.to(dtype), []                                 # (B, 8, 32, 32)
        # After each level: (B, 320, 16, 16), (B, 640, 8, 8), (B, 1280, 4, 4), (B, 1280, 4, 4)
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)                     # (B, 1280, 4, 4)
        # After each level: (B, 1280, 8, 8), (B, 1280, 16, 16), (B, 640, 32, 32), (B, 320, 32, 32)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)                 # (B, 640 to 2560, h, w)
            h = block(h, emb, context)
        with torch.autocast(h.device.type, enabled=False):
            return self.out(h.float())                             # (B, 4, 32, 32)
