"""SDSeg: latent diffusion segmentation with a single-step reverse process (MICCAI 2024).

The segmentation map X and the image C meet in the latent space: z_0 = E(X) by a frozen
autoencoder, z_c = tau(C) by a trainable one. A U-Net sees [z_t, z_c] and predicts the noise;
one call at the noisiest step, Eq. 2 and the decoder give the map.
Letters: B batch, C channels, H W pixels, h w latent pixels (H/8; nano: H/4), K classes, T steps,
z_0 mask latent, z_t its noisy version, z_c image latent, eps noise, t step (B,) int64.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import assign, read_weights, write_weights
from common import MAX_CLASSES, Refusal, one_line
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, VisionEncoder

T = 1000  # diffusion steps


@dataclass(frozen=True)
class SDSegConfig:
    preset: str = "sd-v1"  # the row of PRESETS it began as
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    beta_start: float = 0.00085  # the schedule is linear in sqrt(beta)
    beta_end: float = 0.012
    zero_terminal_snr: bool = False  # shift sqrt(a_t) so that z_t at T - 1 holds no mask at all
    prediction: str = "eps"  # what the U-Net predicts: "eps" (the paper), "x0" or "v"
    fusion: str = "concat"  # how it sees z_c: "concat" (the paper) or "cross" attention
    image_scale: float = 0.18215  # z_c = image_scale * tau(C)
    mask_scale: float = 0.18215  # z_0 = mask_scale * E(X); training sets it to 1 / std
    image_size: int = 256  # what inference must repeat: H = W,
    window: tuple[float, float] | None = None  # intensity window of volumes,
    data: str = ""  # the data set's name,
    split: str = "random"  # and how it was split,
    classes: tuple[str, ...] = ("background", "foreground")  # the class ids' names
    version: int = 1  # of this format


LDM = UNetConfig("ldm", 8, 4, 192, (1, 2, 2, 4, 4), 2, (1, 2, 4, 8), 8, None)
NANO = UNetConfig("sd", 8, 4, 64, (1, 2, 3), 1, (2, 4), 8, None)
PRESETS = {
    "sd-v1": SDSegConfig(),
    "ldm-kl-8": SDSegConfig("ldm-kl-8", unet=LDM, beta_start=0.0015, beta_end=0.0155),
    "nano": SDSegConfig(
        "nano",
        VAEConfig(32, (1, 1, 2), 1),  # h = H/4, not H/8: learns faster
        NANO,
        zero_terminal_snr=True,
        prediction="x0",
        image_scale=1.0,
        image_size=128,
    ),
}


def class_colours(k):
    """(k, 3) colours in [-1, 1]: points of the RGB cube, far apart, k <= 14.

    Two classes are black and white, as in the paper; up to 4 a tetrahedron, up to 8 the corners,
    9 with the centre, up to 14 the corners and the centres of the faces.
    """
    if not 2 <= k <= MAX_CLASSES:
        raise Refusal(f"{k} classes; give 2 to {MAX_CLASSES}")
    tetrahedron = [(-1, -1, -1), (1, 1, -1), (1, -1, 1), (-1, 1, 1)]
    corners = tetrahedron + [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)]
    faces = [(0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)]
    points = [(-1, -1, -1), (1, 1, 1)] if k == 2 else corners + ([(0, 0, 0)] if k == 9 else faces)
    return torch.tensor(points[:k], dtype=torch.float32, device="cpu")


def alphas_cumprod(config):
    """a_t of Eq. 1, (T,) float32; the schedule is linear in sqrt(beta).

    Its last a_t is small but not zero, and a network finds the trace of the mask that z_t then
    holds in training and never at inference. `zero_terminal_snr` takes it away: Lin et al., 2024,
    "Common diffusion noise schedules and sample steps are flawed", algorithm 1. Not with "eps",
    for which Eq. 2 would divide by zero.
    """
    ends = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(*ends, T, dtype=torch.float64, device="cpu") ** 2
    a = torch.cumprod(1 - betas, 0)
    if config.zero_terminal_snr and config.prediction != "eps":
        root = a.sqrt()
        a = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return a.float()


class Loss(NamedTuple):
    total: torch.Tensor
    noise: torch.Tensor  # L_noise: mean |error| of the network's output (the noise, for "eps")
    latent: torch.Tensor  # L_latent: mean |z_0 estimate - z_0|
    mask: torch.Tensor  # beyond the paper: cross-entropy + Dice of the decoded map; 0 if unused
    late: torch.Tensor  # (2,) for the log: sum of |z_0 estimate - z_0| over t >= 900, their number


class SDSeg(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL(config.vae).requires_grad_(False)
        self.tau = VisionEncoder(config.vae)
        self.unet = UNet(config.unet)
        if config.fusion == "concat":  # what only a context would reach gets no gradient
            for name, p in self.unet.named_parameters():
                p.requires_grad_(".attn2." not in name and ".norm2." not in name)
        self.register_buffer("alphas_cumprod", alphas_cumprod(config), persistent=False)
        colours = class_colours(len(config.classes))
        self.squared_separation = F.pdist(colours).min().item() ** 2
        self.register_buffer("colours", colours, persistent=False)

    # ---- between masks and latents: the only place that knows colours and scales ----

    def paint(self, mask):
        """mask (B, H, W) int64 class ids -> their colours (B, 3, H, W) in [-1, 1]."""
        return self.colours[mask].permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()  # E is frozen
    def encode_mask(self, mask):
        """mask (B, H, W) int64 class ids -> z_0 (B, 4, h, w), the scaled posterior mean."""
        return self.config.mask_scale * self.vae.encode(self.paint(mask))[0].float()

    def decode_mask(self, z_0):
        """z_0 (B, 4, h, w) -> colours (B, 3, H, W) float32, near [-1, 1]."""
        return self.vae.decode(z_0 / self.config.mask_scale).float()

    def logits(self, colours):
        """Colours (B, 3, H, W) -> (B, K, H, W): squared distances to the K colours, negated,
        scaled to 4 between the closest two. Two classes: their difference is 4 mean(colours).
        """
        offset = colours[:, None] - self.colours[None, :, :, None, None]
        return offset.square().sum(2) * (-4 / self.squared_separation)

    def scores(self, colours):
        """Colours (B, 3, H, W) -> (B, K, H, W), or (B, 1, H, W) where K = 2; in [0, 1].

        Binary, as in the paper: the mean of the channels, so that 0.5 is the middle. Otherwise
        the softmax of `logits`, which is largest for the nearest colour.
        """
        if len(self.colours) == 2:
            return ((colours.mean(1, keepdim=True) + 1) / 2).clamp(0, 1)
        return self.logits(colours).softmax(1)

    # ---- the method ----

    def alpha_bar(self, t):
        """a_t of Eq. 1 (alpha bar in DDPM) as (B, 1, 1, 1)."""
        return self.alphas_cumprod[t].view(-1, 1, 1, 1)

    def q_sample(self, z_0, t, noise):
        """Eq. 1: z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) n."""
        a = self.alpha_bar(t)
        return a.sqrt() * z_0 + (1 - a).sqrt() * noise

    def predict_z0(self, z_t, t, out):
        """Eq. 2, in float32: the z_0 that the network's output `out` (B, 4, h, w) stands for.

        With "eps" an error of `out` grows by sqrt((1 - a_t) / a_t), at t = T - 1 by 14.6, or by
        38.7 in the schedule of ldm-kl-8.
        """
        a, z_t, out = self.alpha_bar(t), z_t.float(), out.float()
        if self.config.prediction == "x0":
            return out
        if self.config.prediction == "v":
            return a.sqrt() * z_t - (1 - a).sqrt() * out
        return (z_t - (1 - a).sqrt() * out) / a.sqrt()

    def target(self, z_0, t, noise):
        """What a perfect network puts out."""
        a = self.alpha_bar(t)
        v = a.sqrt() * noise - (1 - a).sqrt() * z_0
        return {"eps": noise, "x0": z_0, "v": v}[self.config.prediction]

    def condition(self, image):
        """image (B, 3, H, W) in [-1, 1] -> z_c (B, 4, h, w)."""
        return self.config.image_scale * self.tau(image).float()

    def denoise(self, z_t, t, z_c):
        """One call of the U-Net -> its output (B, 4, h, w)."""
        if self.config.fusion == "cross":
            return self.unet(z_t, t, z_c.flatten(2).transpose(1, 2))
        return self.unet(torch.cat([z_t, z_c], dim=1), t)

    def latent_shape(self):
        size = self.config.image_size // 2 ** (len(self.config.vae.ch_mult) - 1)
        return self.config.vae.z_channels, size, size

    def loss(self, image, mask, generator=None, *, drawn=None, z_0=None, last=0.0,
             latent_weight=1.0, mask_weight=0.0):  # fmt: skip
        """Eq. 3: L = L_noise + latent_weight * L_latent, means of absolute errors.

        image (B, 3, H, W) in [-1, 1], mask (B, H, W) int64. `drawn` is what `draw` returned,
        `z_0` the mask's latent if it is known already. Beyond the paper, `mask_weight` adds the
        error of the decoded map for the samples at t = T - 1.
        """
        z_0 = self.encode_mask(mask) if z_0 is None else z_0
        t, noise = drawn or draw(len(z_0), z_0.shape[1:], generator, last)
        at_end = (t == T - 1).nonzero()[:, 0].to(z_0.device, non_blocking=True)
        t, noise = (x.to(z_0.device, non_blocking=True) for x in (t, noise))
        z_t = self.q_sample(z_0, t, noise)
        out = self.denoise(z_t, t, self.condition(image))
        estimate = self.predict_z0(z_t, t, out)
        noise_loss = F.l1_loss(out.float(), self.target(z_0, t, noise))
        latent_error = (estimate - z_0).abs().mean((1, 2, 3))
        mask_loss = torch.zeros_like(noise_loss)
        if mask_weight and len(at_end):
            logits = self.logits(self.decode_mask(estimate[at_end]))
            mask_loss = cross_entropy_and_dice(logits, mask[at_end]) * (len(at_end) / len(t))
        latent_loss, late = latent_error.mean(), (t >= 900).float()
        total = noise_loss + latent_weight * latent_loss + mask_weight * mask_loss
        late = torch.stack([(late * latent_error.detach()).sum(), late.sum()])
        return Loss(total, noise_loss, latent_loss, mask_loss, late)

    forward = loss  # what DistributedDataParallel calls

    def ddim_step(self, z_t, t, out, a_next):
        """The deterministic DDIM update (eta = 0) from step t to the noise level `a_next`."""
        a, z_0 = self.alpha_bar(t), self.predict_z0(z_t, t, out)
        eps = (z_t - a.sqrt() * z_0) / (1 - a).sqrt()
        return a_next**0.5 * z_0 + (1 - a_next) ** 0.5 * eps

    def reverse(self, z_t, z_c, timesteps):
        """DDIM from pure noise z_t over descending `timesteps` to a = 1, where z_t is z_0.

        One step is Eq. 2: the single-step reverse process.
        """
        a_next = [self.alphas_cumprod[t].item() for t in timesteps[1:]] + [1.0]
        for step, a in zip(timesteps, a_next):
            t = torch.full((len(z_t),), step, device=z_t.device)
            z_t = self.ddim_step(z_t, t, self.denoise(z_t, t, z_c), a)
        return z_t

    @torch.no_grad()
    def sample(self, image, steps=1, samples=1, generator=None, spacing="trailing"):
        """Yield the scores of `samples` runs, each from noise of its own; see `segment`.

        All images of a batch start from the same noise, drawn on the CPU: a picture's mask does
        not depend on its neighbours, nor its noise on the device.
        """
        z_c = self.condition(image)
        for _ in range(samples):
            noise = torch.randn(z_c.shape[1:], generator=generator).to(z_c.device).expand_as(z_c)
            z_0 = self.reverse(noise, z_c, ddim_timesteps(steps, spacing))
            yield self.scores(self.decode_mask(z_0))

    def segment(self, image, steps=1, samples=1, generator=None):
        """image (B, 3, H, W) in [-1, 1] -> mean scores (B, 1, H, W) in [0, 1]; K classes: (B, K..).

        `steps` network calls for each of `samples` runs. `generator` is a CPU generator.
        """
        return sum(self.sample(image, steps, samples, generator)) / samples

    # ---- files ----

    def save(self, path, half=False):
        """Write weights and config to one `.safetensors` file; `half` stores float16."""
        write_weights(path, self.state_dict(), self.config, half)

    @staticmethod
    def load(path, device="cpu", precision="fp32"):
        """Read what `save` wrote; in eval mode. Raises Refusal for a file that is not complete.

        precision "fp32", "bf16", "fp16", or "auto": the fastest that keeps the masks.
        """
        config, tensors = read_weights(path, SDSegConfig)
        model = assign(build(config, path), tensors, path)
        return model.eval().to_precision(device, precision)

    def to_precision(self, device, precision="fp32"):
        """Move to a device for inference. What would change masks stays float32: the U-Net's last
        layers, see Eq. 2, and of tau the first, which would round the picture, and the last.
        """
        self.to(device=device, memory_format=torch.channels_last)
        dtype = inference_dtype(torch.device(device), precision)
        for part in (self.vae, self.unet, self.tau):
            part.to(dtype=dtype)
        for part in (self.unet.out, self.tau.encoder.conv_in, self.tau.out):
            part.float()
        return self

    def compile(self, **options):
        """Hand tau, the U-Net and the decoder to torch.compile, with its options, in place.

        The first calls with batches of a new size then take minutes, and need a C++ compiler.
        mode="reduce-overhead" makes a CUDA graph of each network, for short latency.
        """
        for part in (self.tau, self.unet, self.vae.decoder):
            part.compile(fullgraph=True, **options)


def draw(batch, latent_shape, generator=None, last=0.0, first=0):
    """t (batch,) uniform over the T steps, noise standard normal, both on the CPU.

    A share `last` of the samples, evenly spread, is set to T - 1: the step that single-step
    inference takes, which uniform t visits once in a thousand samples. `first` is the number of
    samples before these in a run, so that the share holds for small batches, too.
    """
    t = torch.randint(0, T, (batch,), generator=generator)
    noise = torch.randn(batch, *latent_shape, generator=generator)
    count = torch.arange(first, first + batch + 1, dtype=torch.float64) * last
    return torch.where(count.floor().diff() > 0, T - 1, t), noise


def cross_entropy_and_dice(logits, mask):
    """logits (B, K, H, W), mask (B, H, W) -> mean cross-entropy + 1 - mean Dice of classes 1.. ."""
    p = logits.softmax(1)[:, 1:]
    y = F.one_hot(mask, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].to(p.dtype)
    overlap, size = (p * y).sum((2, 3)), p.sum((2, 3)) + y.sum((2, 3))
    return F.cross_entropy(logits, mask) + 1 - ((2 * overlap + 1) / (size + 1)).mean()


def ddim_timesteps(steps, spacing="trailing"):
    """`steps` descending time steps. "trailing" starts at T - 1, where sampling starts.

    "leading" is the published code's choice, kept for comparison: one step announces pure noise
    as t = 1. Raises Refusal unless 1 <= steps <= T; "leading" has one fewer.
    """
    most = T - (spacing == "leading")
    if not 1 <= steps <= most:
        raise Refusal(f"{steps} steps; give 1 to {most}")
    if spacing == "leading":
        return [i * (T // steps) + 1 for i in reversed(range(steps))]
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def widen_conv_in(weight, in_channels):
    """(c, n, 3, 3) -> (c, in_channels, 3, 3): the new input channels, z_c, start at zero.

    So the widened U-Net's first output equals the pretrained one's, whatever the image.
    """
    return F.pad(weight, (0, 0, 0, 0, 0, in_channels - weight.shape[1]))


def split_seen(config, data):
    """The split of cvc, "random" or "sequence", that a model learned from, if `data` has cvc, too.

    What one split holds out, the other trains on. None where that cannot be.
    """
    return config.split if all("cvc" in d.split("+") for d in (config.data, data)) else None


def find_device(name=None):
    """The device to use: `name` if given, else cuda, then mps, then cpu."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("neither cuda nor mps nor cpu")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {name}: {one_line(error)[:100]}; try --device cpu") from None


def has_fast_bf16(device):
    """Does the device multiply bfloat16 in hardware?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and native()


def inference_dtype(device, precision):
    """The parameters' dtype for "fp32", "bf16", "fp16", or "auto": by the hardware."""
    if precision == "auto":
        slow = "fp16" if device.type == "cuda" else "fp32"
        precision = "bf16" if has_fast_bf16(device) else slow
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def start_from(path, fresh=False, **changes):
    """A model to train: the weights at `path`, its config with `changes`. Raises Refusal.

    A file of an autoencoder alone, or `fresh`, gives a new U-Net and a tau that starts as E.
    A new fusion keeps what fits; the rest starts anew.
    """
    config, tensors = read_weights(path, SDSegConfig)
    changed = replace(config, **changes)
    if changed.fusion != config.fusion:
        tokens = config.vae.z_channels if changed.fusion == "cross" else None
        inputs = config.vae.z_channels * (1 if tokens else 2)
        unet = replace(config.unet, in_channels=inputs, context_dim=tokens)
        changed = replace(changed, unet=unet)
    model = build(changed, path)  # refuses what would be no network
    vae = {k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")}
    if fresh or len(vae) == len(tensors):  # no more than the autoencoder is wanted, or there
        model = SDSeg(changed)
        assign(model.vae, vae, path)
        model.tau.start_as(model.vae)
        return model
    if changed.fusion != config.fusion:
        first, own = "unet.input_blocks.0.0.weight", SDSeg(changed).state_dict()
        tensors = {k: v for k, v in tensors.items() if k in own and own[k].dim() == v.dim()}
        if first in tensors:  # of its inputs z_t goes on, z_c enters elsewhere or from zero
            z_t = tensors[first][:, : config.vae.z_channels]
            tensors[first] = widen_conv_in(z_t, changed.unet.in_channels)
        tensors = own | {k: v for k, v in tensors.items() if own[k].shape == v.shape}
    return assign(model, tensors, path)


def check(config):
    """Raise Refusal for a config, read from a file, that describes no network of ours."""
    u, v = config.unet, config.vae
    sizes = [v.ch, *v.ch_mult, v.num_res_blocks, v.z_channels, u.model_channels, *u.channel_mult]
    sizes += [u.in_channels, u.out_channels, u.num_res_blocks, u.num_heads, u.context_dim or 1]
    levels = len(u.channel_mult), len(v.ch_mult)
    if not all(1 <= n <= 8192 for n in [*sizes, *levels, config.image_size]):
        raise Refusal("config has a size out of range")
    if max(*levels, u.num_res_blocks, v.num_res_blocks) > 8:
        raise Refusal("config has too many blocks")
    unit = 2 ** (sum(levels) - 2)  # of image_size: all levels halve it
    if config.image_size % unit:
        raise Refusal(f"pictures of {config.image_size} px; this network takes multiples of {unit}")
    if any(u.model_channels * m % u.num_heads for m in u.channel_mult):
        raise Refusal(f"config shares out its channels over {u.num_heads} heads, with a rest")
    cross = config.fusion == "cross"
    if cross and u.family == "ldm":
        raise Refusal("fusion by cross-attention needs a U-Net that has some: the sd family's")
    z = v.z_channels
    inputs, tokens = (z, z) if cross else (2 * z, u.context_dim)  # "concat" has no tokens: any fit
    if (u.in_channels, u.context_dim, u.out_channels) != (inputs, tokens, z):
        raise Refusal("config has a U-Net whose inputs and outputs are not the latents'")
    for value, allowed in (
        (config.version, (1,)),
        (config.prediction, ("eps", "x0", "v")),
        (config.split, ("random", "sequence")),
        (config.fusion, ("concat", "cross")),
        (u.family, ("sd", "ldm")),
    ):
        if value not in allowed:
            may = ", ".join(map(str, allowed))
            raise Refusal(f"config says {value!r:.20} where it may be {may}")


def build(config, path):
    """SDSeg without memory for its weights, which `assign` brings. Raises Refusal."""
    try:
        check(config)
        with torch.device("meta"):
            return SDSeg(config)
    except (Refusal, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise Refusal(f"{path}: {one_line(error)}") from None
