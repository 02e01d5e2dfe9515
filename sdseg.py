"""SDSeg: latent diffusion segmentation with a single-step reverse process (MICCAI 2024).

The segmentation map X and the image C meet in a latent space: z_0 = E(X) by a frozen autoencoder,
z_c = tau(C) by a trainable encoder. A U-Net sees [z_t, z_c] and predicts the noise (nano: z_0).
One call at the noisiest step, Eq. 2 and the decoder give the map.
Letters: B batch, C channels, H W pixels, h w latent pixels (H/8; nano: H/4), K classes, T steps,
z_0 mask latent, z_t its noisy version, z_c image latent, n noise, t step (B,) int64.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from support.cli import UserError, one_line
from support.device import place_for_inference
from support.metrics import remove_small
from support.weights import load_strict, read_weights, write_weights
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, VisionEncoder

T = 1000  # diffusion steps


@dataclass(frozen=True)
class SDSegConfig:
    preset: str = "sd-v1"  # the row of PRESETS that it began as
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    beta_start: float = 0.00085  # the schedule is linear in sqrt(beta)
    beta_end: float = 0.012
    zero_terminal_snr: bool = False  # z_t at T - 1 is pure noise in training too; "eps" ignores it
    prediction: Literal["eps", "x0", "v"] = "eps"  # what the U-Net predicts; the paper: eps
    fusion: Literal["concat", "cross"] = "concat"  # how it sees z_c; cross: as a context
    image_scale: float = 0.18215  # z_c = image_scale * tau(C)
    mask_scale: float = 0.18215  # z_0 = mask_scale * E(X); training sets it to 1 / std
    # What inference must repeat:
    image_size: int = 256  # H = W
    window: tuple[float, float] | None = None  # intensity window of volumes; None: of each volume
    plane: Literal["axial", "coronal", "sagittal"] = "axial"  # of the slices of volumes
    context: Literal["repeat", "neighbours"] = "repeat"  # a slice's 3 channels; not the U-Net's
    data: str = ""  # name of the data set; empty: never trained
    split: Literal["random", "sequence"] = "random"  # see data.py:find
    classes: tuple[str, ...] = ("background", "foreground")  # names of the class ids 0, 1, ..
    threshold: float = 0.5  # two classes: foreground is above; see tools/calibrate.py
    smallest_area: float = 0.0  # two classes: share of the image below which a region is dropped
    trained_on: tuple[str, ...] = ()  # hashes of the training images, which evaluation leaves out
    version: Literal[1] = 1  # of this format


LDM = UNetConfig(
    family="ldm",
    model_channels=192,
    channel_mult=(1, 2, 2, 4, 4),
    attention_resolutions=(1, 2, 4, 8),
    context_dim=None,
)
NANO = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attention_resolutions=(2, 4),
    context_dim=None,
)
PRESETS = {
    "sd-v1": SDSegConfig(),
    "ldm-kl-8": SDSegConfig("ldm-kl-8", unet=LDM, beta_start=0.0015, beta_end=0.0155),
    "nano": SDSegConfig(
        "nano",
        # h = H/4: learns faster; a light decoder: 23 % less arithmetic, masks as good
        vae=VAEConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, decoder_res_blocks=1),
        unet=NANO,
        zero_terminal_snr=True,
        prediction="x0",
        image_scale=1.0,
        image_size=128,
    ),
}


def class_colours(k):
    """(k, 3) colours in [-1, 1], 2 <= k <= 14: points of the RGB cube that are far apart.

    Two classes are black and white, as in the paper; up to 4 a tetrahedron, up to 8 the corners,
    9 with the centre, up to 14 the corners and the centres of the faces.
    """
    if not 2 <= k <= 14:
        raise UserError(f"{k} classes; give 2 to 14")
    tetrahedron = [(-1, -1, -1), (1, 1, -1), (1, -1, 1), (-1, 1, 1)]
    corners = tetrahedron + [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)]
    faces = [(0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)]
    points = [(-1, -1, -1), (1, 1, 1)] if k == 2 else corners + ([(0, 0, 0)] if k == 9 else faces)
    return torch.tensor(points[:k], dtype=torch.float32, device="cpu")


def colour_logits(rgb, colours):
    """rgb (B, 3, H, W), colours of K classes (K, 3) -> (B, K, H, W): negative squared distances.

    They are scaled so that the squared distance of the two closest colours is 4. For two classes
    the difference of the logits is then 4 times the mean of the channels.
    """
    separation = F.pdist(class_colours(len(colours))).min().item() ** 2  # on the CPU
    offset = rgb[:, None] - colours[None, :, :, None, None]
    return offset.square().sum(2) * (-4 / separation)


def noise_schedule(config):
    """alpha_bar of Eq. 1 for every t, (T,) float32. The schedule is linear in sqrt(beta).

    At t = T - 1, training inputs still leak the mask; inference inputs are pure noise.
    `zero_terminal_snr` closes this gap: algorithm 1 of Lin et al., 2024, "Common diffusion noise
    schedules and sample steps are flawed". "eps" cannot have it: Eq. 2 would divide by zero.
    """
    ends = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(*ends, T, dtype=torch.float64, device="cpu") ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    if config.zero_terminal_snr and config.prediction != "eps":
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return alpha_bar.float()


class Losses(NamedTuple):
    noise_loss: torch.Tensor  # (B,) L_noise: mean |noise estimate - noise|
    latent_loss: torch.Tensor  # (B,) L_latent: mean |z_0 estimate - z_0|
    z_0_estimate: torch.Tensor  # (B, 4, h, w)


class SDSeg(nn.Module):
    """vae (frozen), tau and unet. `forward` is for training, `segment` for inference."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL(config.vae).requires_grad_(False)
        self.tau = VisionEncoder(config.vae)
        self.unet = UNet(config.unet)
        if config.fusion == "concat":  # without a context these layers contribute nothing
            for name, p in self.unet.named_parameters():
                p.requires_grad_(".attn2." not in name and ".norm2." not in name)
        self.register_buffer("alphas_cumprod", noise_schedule(config), persistent=False)
        self.register_buffer("colours", class_colours(len(config.classes)), persistent=False)

    # ---- the method ----

    def alpha_bar(self, t):
        """alpha_bar_t, (B,) -> (B, 1, 1, 1)."""
        return self.alphas_cumprod[t].view(-1, 1, 1, 1)

    def q_sample(self, z_0, t, noise):
        """Eq. 1: z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) n, all (B, 4, h, w); t (B,)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noise

    def predict(self, z_t, t, z_c):
        """One call of the U-Net: z_t, z_c (B, 4, h, w), t (B,) in 0 .. T - 1 -> (B, 4, h, w).

        The output stands for the noise, z_0 or v, as `config.prediction` says.
        """
        if self.config.fusion == "cross":
            return self.unet(z_t, t, z_c.flatten(2).transpose(1, 2))
        return self.unet(torch.cat([z_t, z_c], dim=1), t)

    def predict_z0(self, z_t, t, out):
        """Eq. 2: the estimate of z_0 that the network's output stands for, in float32.

        With "eps" an error of the output is multiplied by sqrt((1 - alpha_bar) / alpha_bar): at
        t = T - 1 that is 14.6 in the schedule of sd-v1 and 38.7 in that of ldm-kl-8.
        """
        alpha_bar, z_t, out = self.alpha_bar(t), z_t.float(), out.float()
        if self.config.prediction == "x0":
            return out
        if self.config.prediction == "v":
            return alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * out
        return (z_t - (1 - alpha_bar).sqrt() * out) / alpha_bar.sqrt()

    def predict_noise(self, z_t, t, out):
        """The estimate of the noise that the network's output stands for, in float32."""
        alpha_bar, z_t, out = self.alpha_bar(t), z_t.float(), out.float()
        if self.config.prediction == "x0":
            return (z_t - alpha_bar.sqrt() * out) / (1 - alpha_bar).sqrt()
        if self.config.prediction == "v":
            return (1 - alpha_bar).sqrt() * z_t + alpha_bar.sqrt() * out
        return out

    def forward(self, image, z_0, t, noise):
        """The parts of Eq. 3, mean absolute errors of each sample -> Losses.

        image (B, 3, H, W) in [-1, 1]; z_0, noise (B, 4, h, w); t (B,). Both estimates come from
        the network's output, so L_noise and L_latent mean the same for "eps", "x0" and "v". With
        zero terminal SNR, z_t at T - 1 is the noise itself, and L_noise is 0 there by definition.
        """
        z_t = self.q_sample(z_0, t, noise)
        out = self.predict(z_t, t, self.encode_image(image))
        z_0_estimate = self.predict_z0(z_t, t, out)
        noise_estimate = self.predict_noise(z_t, t, out)
        noise_loss = (noise_estimate - noise).abs().mean((1, 2, 3))
        latent_loss = (z_0_estimate - z_0).abs().mean((1, 2, 3))
        return Losses(noise_loss, latent_loss, z_0_estimate)

    def ddim_step(self, z_t, t, out, alpha_bar_next):
        """The deterministic DDIM update (eta = 0) from step t to the level `alpha_bar_next`."""
        z_0_estimate, noise_estimate = self.predict_z0(z_t, t, out), self.predict_noise(z_t, t, out)
        return alpha_bar_next**0.5 * z_0_estimate + (1 - alpha_bar_next) ** 0.5 * noise_estimate

    def ddim_sample(self, z_t, z_c, timesteps):
        """DDIM from pure noise z_t over descending `timesteps`, ints -> z_0 (B, 4, h, w) float32.

        With the one step T - 1 this is Eq. 2: the single-step reverse process.
        """
        levels = [self.alphas_cumprod[t].item() for t in timesteps[1:]] + [1.0]
        for step, alpha_bar_next in zip(timesteps, levels):
            t = torch.full((len(z_t),), step, device=z_t.device)
            z_t = self.ddim_step(z_t, t, self.predict(z_t, t, z_c), alpha_bar_next)
        return z_t

    @torch.no_grad()
    def sample(self, image, steps=1, samples=1, generator=None, spacing="trailing"):
        """Yield the probabilities of `samples` runs, each from its own noise; see `segment`.

        All images of a batch start from the same noise, drawn on the CPU. So a mask does not
        depend on the other images of its batch, and the noise does not depend on the device.
        """
        z_c = self.encode_image(image)
        for _ in range(samples):
            noise = torch.randn(z_c.shape[1:], generator=generator).to(z_c.device).expand_as(z_c)
            z_0 = self.ddim_sample(noise, z_c, ddim_timesteps(steps, spacing))
            yield self.probabilities(self.decode_mask(z_0))

    def segment(self, image, steps=1, samples=1, generator=None):
        """image (B, 3, H, W) in [-1, 1] -> probabilities in [0, 1], the mean of `samples` runs.

        Two classes: (B, 1, H, W), of the foreground. K > 2 classes: (B, K, H, W). `steps` is the
        number of network calls of each run, UserError unless 1 <= steps <= T; `generator` is a CPU
        generator. H = W = config.image_size, as in training, is best; other sides must be multiples
        of what both networks divide them by (nano: 16, sd-v1: 64). float32.
        """
        return sum(self.sample(image, steps, samples, generator)) / samples

    # ---- between images, masks and latents: the only place with scales and colours ----

    def encode_image(self, image):
        """image (B, 3, H, W) in [-1, 1] -> z_c (B, 4, h, w), scaled."""
        return self.config.image_scale * self.tau(image).float()

    def labels_to_rgb(self, mask):
        """mask (B, H, W) int64 class ids -> their colours (B, 3, H, W) in [-1, 1]."""
        return self.colours[mask].permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()  # E is frozen
    def encode_mask(self, mask):
        """mask (B, H, W) int64 class ids -> z_0 (B, 4, h, w), the scaled posterior mean."""
        return self.config.mask_scale * self.vae.encode(self.labels_to_rgb(mask))[0].float()

    def decode_mask(self, z_0):
        """z_0 (B, 4, h, w) -> rgb (B, 3, H, W) float32, near [-1, 1]."""
        return self.vae.decode(z_0 / self.config.mask_scale).float()

    def logits(self, rgb):
        """rgb (B, 3, H, W) -> (B, K, H, W), see `colour_logits`."""
        return colour_logits(rgb, self.colours)

    def probabilities(self, rgb):
        """rgb (B, 3, H, W) -> (B, K, H, W), or (B, 1, H, W) for two classes; in [0, 1].

        Two classes, as in the paper: the mean of the channels, with 0.5 in the middle. More: the
        softmax of `logits`, which is largest for the nearest colour.
        """
        if len(self.colours) == 2:
            return ((rgb.mean(1, keepdim=True) + 1) / 2).clamp(0, 1)
        return self.logits(rgb).softmax(1)

    def class_ids(self, prob):
        """Probabilities (.., 1 or K, H, W) -> class ids (.., H, W) uint8.

        Two classes: foreground above the config's threshold, without regions that are smaller than
        its smallest area. More: the most probable class.
        """
        if prob.shape[-3] > 1:
            return prob.argmax(-3).to(torch.uint8)
        ids = (prob.squeeze(-3) > self.config.threshold).to(torch.uint8)
        return remove_small(ids, self.config.smallest_area)

    @property
    def device(self):
        return self.colours.device

    @property
    def latent_shape(self):
        """(4, h, w) for an image of the config's size."""
        size = self.config.image_size // 2 ** (len(self.config.vae.ch_mult) - 1)
        return self.config.vae.z_channels, size, size

    # ---- files ----

    def save(self, path, half=False):
        """Write weights and config to one `.safetensors` file; `half` stores float16."""
        write_weights(path, self.state_dict(), self.config, half)

    @staticmethod
    def load(path, device="cpu", precision="fp32"):
        """Read what `save` wrote -> a model in eval mode. Raises UserError that names up to five
        tensors that do not fit, and counts the others.

        precision: "fp32", "bf16", "fp16", or "auto": the fastest that keeps the masks.
        """
        config, tensors = read_weights(path, SDSegConfig)
        model = load_strict(build_empty(config, path), tensors, path)
        return model.eval().for_inference(device, precision)

    def for_inference(self, device, precision="fp32"):
        """Change device and precision in place -> the model. Layers that would change masks stay in
        float32: the last of the U-Net, see Eq. 2, and the first and the last of tau.
        """
        keep = (self.unet.out, self.tau.encoder.conv_in, self.tau.out)
        return place_for_inference(self, device, precision, keep)


def ddim_timesteps(steps, spacing="trailing"):
    """`steps` descending time steps. "trailing" starts at T - 1, where sampling starts.

    "leading" is the published code's choice, kept for comparison: its single step tells the
    network t = 1 and gives it pure noise. Raises UserError unless 1 <= steps <= T (leading: T - 1).
    """
    most = T - (spacing == "leading")
    if not 1 <= steps <= most:
        raise UserError(f"{steps} steps; give 1 to {most}")
    if spacing == "leading":
        return [i * (T // steps) + 1 for i in reversed(range(steps))]
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def widen_conv_in(weight, in_channels):
    """(c, n, 3, 3) -> (c, in_channels, 3, 3): the new input channels, z_c, start at zero.

    At step 0 the widened U-Net's output equals the pretrained one's, whatever the image.
    """
    return F.pad(weight, (0, 0, 0, 0, 0, in_channels - weight.shape[1]))


def from_pretrained(path, vae_only=False, **changes):
    """A model to train: the weights at `path`, its config with `changes`. Raises UserError.

    With `vae_only`, or if the file holds only an autoencoder, the U-Net is random and tau is
    copied from E. If `fusion` changes, the layers that still fit keep their weights. A calibrated
    threshold and smallest area are dropped, because they belong to the old weights.
    """
    old, tensors = read_weights(path, SDSegConfig)
    changes = dict(threshold=0.5, smallest_area=0.0) | changes
    config, z = replace(old, **changes), old.vae.z_channels
    if config.fusion != old.fusion:
        inputs, tokens = (z, z) if config.fusion == "cross" else (2 * z, None)
        unet = replace(old.unet, in_channels=inputs, context_dim=tokens)
        config = replace(config, unet=unet)
    model = build_empty(config, path)
    if vae_only or not any(name.startswith("unet.") for name in tensors):
        model = SDSeg(config)
        vae = {k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")}
        load_strict(model.vae, vae, path)
        model.tau.init_from(model.vae)
        return model
    if config.fusion == old.fusion:
        return load_strict(model, tensors, path)
    weights = load_strict(build_empty(old, path), tensors, path).state_dict()
    first = "unet.input_blocks.0.0.weight"  # its first z channels see z_t in both fusions
    weights[first] = widen_conv_in(weights[first][:, :z], config.unet.in_channels)
    model = SDSeg(config)
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    return load_strict(model, own | fitting, path)


def build_empty(config, path):
    """SDSeg without memory for its weights, which `load_strict` brings. Raises UserError."""
    try:
        validate_config(config)
        with torch.device("meta"):
            return SDSeg(config)
    except (UserError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def validate_config(config):
    """Raise UserError for a config, read from a file, that describes no network of ours."""
    u, v, cross = config.unet, config.vae, config.fusion == "cross"
    levels, z = (len(u.channel_mult), len(v.ch_mult)), v.z_channels
    blocks = u.num_res_blocks, v.num_res_blocks, v.decoder_res_blocks or 1
    if not (min(levels) and max(*levels, *blocks) <= 8):
        raise UserError("config has no levels, or too many levels or blocks")
    unit = 2 ** (sum(levels) - 2)  # every level but the last halves the side
    if config.image_size % unit:
        raise UserError(f"images of {config.image_size} px; this network takes multiples of {unit}")
    if any(u.model_channels * m % u.num_heads for m in u.channel_mult):
        raise UserError(f"config has channels that {u.num_heads} heads cannot share equally")
    if cross and u.family == "ldm":
        raise UserError("fusion by cross-attention needs a U-Net of the sd family")
    inputs, tokens = (z, z) if cross else (2 * z, u.context_dim)  # concat: any context_dim fits
    if (u.in_channels, u.context_dim, u.out_channels) != (inputs, tokens, z):
        raise UserError("config has a U-Net with inputs or outputs that are not the latents'")
