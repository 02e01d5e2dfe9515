"""The networks compute what the original ones compute, from weights of the same names."""

import pytest
import torch
import torch.nn.functional as F
from conftest import UNETS, VAE_TINY, golden, golden_weights

from sdseg import widen_conv_in
from support.fast_ops import GroupNorm, Upsample, group_norm_by_channel
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VisionEncoder

# Where the networks are compared with the reference, and the largest difference of a value there:
# device, number format, bound. The outputs are about 1; half precision rounds after each layer.
PLACES = (
    ("cpu", torch.float32, 1e-4),
    ("cuda", torch.float32, 1e-3),
    ("cuda", torch.float16, 0.02),
    ("cuda", torch.bfloat16, 0.1),
)


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-{str(place[1])[6:]}")
def place(request, monkeypatch):
    """A function that moves a network and its inputs to a device and a number format, and one
    that compares. Float32 is without TF32, which PyTorch would use in convolutions.
    """
    device, dtype, bound = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the networks on a GPU need one")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def move(x):
        x = x.to(device, dtype if not torch.is_tensor(x) or x.is_floating_point() else None)
        if isinstance(x, UNet):
            x.out.float()  # as in inference
        return x

    def close(a, b):
        torch.testing.assert_close(a.float().cpu(), b, atol=bound, rtol=0)

    return move, close


@torch.no_grad()
def test_the_autoencoder_and_tau_equal_the_reference(place):
    """The original autoencoder's moments and images, and the published SDSeg's conditioning."""
    (move, close), (manifest, g) = place, golden("vae-tiny")
    vae, tau = AutoencoderKL(VAE_TINY), VisionEncoder(VAE_TINY)
    for part, name in ((vae, "first_stage_model"), (tau, "cond_stage_model")):
        part.load_state_dict(golden_weights(manifest[name], f"{name}."))
    mean, logvar = move(vae).encode(move(g["image"]))
    close(mean, g["moments_mean"])
    close(logvar, g["moments_logvar"])
    close(vae.decode(mean), g["decode_of_mean"])
    close(move(tau)(move(g["image"])), g["sdseg_condition"])


@pytest.mark.parametrize("family", UNETS)
@torch.no_grad()
def test_the_unet_equals_the_reference(family, place):
    """Both families; Stable Diffusion's with a context, and without one as in SDSeg."""
    (move, close), (manifest, g) = place, golden(f"unet-{family}-tiny")
    unet = UNet(UNETS[family])
    unet.load_state_dict(golden_weights(manifest["state_dict"], "model.diffusion_model."))
    x, t = move(torch.cat([g["z_t"], g["z_c"]], 1)), move(g["t"])
    without = "eps_without_cross_attention" if family == "sd" else "eps"
    close(move(unet)(x, t), g[without])
    if family == "sd":
        close(unet(x, t, move(g["context"])), g["eps"])


@torch.no_grad()
def test_a_widened_unet_ignores_the_image_at_first():
    """With the new input channels at zero, the output is the 4-channel network's, to rounding."""
    narrow = UNet(UNetConfig("sd", 4, 4, 32, (1, 2), 1, (1, 2), 8, None))
    wide = UNet(UNetConfig("sd", 8, 4, 32, (1, 2), 1, (1, 2), 8, None))
    weights = narrow.state_dict()
    first = "input_blocks.0.0.weight"
    wide.load_state_dict({**weights, first: widen_conv_in(weights[first], 8)})
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 999])
    expected = narrow(z_t, t)
    for z_c in (torch.randn(2, 4, 8, 8), 100 * torch.randn(2, 4, 8, 8)):
        torch.testing.assert_close(wide(torch.cat([z_t, z_c], 1), t), expected)


@pytest.mark.parametrize(
    "shape, groups", [((2, 64, 9, 7), 32), ((3, 96, 1, 1), 32), ((1, 8, 5, 5), 1)]
)
def test_group_norm_by_channel_is_group_norm(shape, groups):
    """The form for compiled kernels gives PyTorch's values and gradients, far from zero too."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[1])[:, None, None] + 20).requires_grad_()
    weight, bias = (torch.randn(shape[1]).requires_grad_() for _ in range(2))
    of = (x, weight, bias)
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
    made = group_norm_by_channel(x, groups, weight, bias, 1e-6)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), exact, atol=1e-4, rtol=0)
    direction = torch.randn(shape)
    for a, b in zip(*(torch.autograd.grad(y, of, direction.to(y.dtype)) for y in (made, exact))):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast of a GPU needs one")
def test_group_norm_keeps_half_precision_under_autocast():
    """The input's dtype comes out, with the values of float32 to its rounding."""
    layer, x = GroupNorm(8, 64).cuda(), torch.randn(2, 64, 16, 16, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.group_norm(x.float(), 8), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(2, 16, 5, 3), (1, 8, 1, 9), (1, 32, 2, 2)])
def test_upsample_is_a_convolution_of_doubled_pixels(shape):
    """As a transposed convolution, or plainly where pixels are few: same values and gradients."""
    torch.manual_seed(0)
    upsample, x = Upsample(shape[1]).double(), torch.randn(shape, dtype=torch.double)
    x.requires_grad_()
    made = upsample(x)
    plain = upsample.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(made, plain)
    of, direction = (x, *upsample.parameters()), torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, of, direction) for y in (made, plain))):
        torch.testing.assert_close(a, b)
