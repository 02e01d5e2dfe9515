"""GroupNorm and Upsample: the standard layers, computed in a faster way where that helps.

Values and parameter names are those of the plain layers; tests compare both.
"""

import torch
import torch.nn.functional as F
from torch import nn


def group_norm_by_channel(x, groups, weight, bias, eps):
    """`F.group_norm` of x (B, C, H, W) in float32, from each channel's mean and variance.

    torch.compile turns these plain operations into kernels that read channels_last memory in
    order. The kernels of F.group_norm read a few values of every pixel instead.
    """
    var, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    var, mean = (y.unflatten(1, (groups, -1)) for y in (var, mean))  # (B, groups, C / groups)
    center = mean.mean(2, keepdim=True)
    var = (var + (mean - center).square()).mean(2, keepdim=True)
    scale = weight.float().unflatten(0, (groups, -1)) * (var + eps).rsqrt()
    shift = bias.float().unflatten(0, (groups, -1)) - center * scale
    return x.float() * scale.flatten(1)[:, :, None, None] + shift.flatten(1)[:, :, None, None]


class GroupNorm(nn.GroupNorm):
    """PyTorch's layer. Compiled for a GPU it runs `group_norm_by_channel`, which is faster.

    Autocast would copy half precision to float32 and back, large tensors each time. The kernel sums
    in float32 anyway, so on a GPU, uncompiled, the input keeps its dtype.
    """

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        if torch.compiler.is_compiling():
            y = group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
            return y if torch.is_autocast_enabled("cuda") else y.to(x.dtype)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Upsample(nn.Module):
    """Every pixel doubled in height and width, then a 3 x 3 convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
        if x.device.type != "cpu" or pixels < channels:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # On a CPU: one transposed convolution of 4 products per pixel instead of 9, because
        # weights that meet copies of the same pixel can be added beforehand.
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)
        weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (C, C, 4, 4)
        return F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)
