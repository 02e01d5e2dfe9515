"""The method, equation by equation: what SDSeg promises, shown on small numbers."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import golden, golden_weights

from checkpoint import write_weights
from common import Refusal
from sdseg import (
    PRESETS,
    SDSeg,
    SDSegConfig,
    T,
    class_colours,
    ddim_timesteps,
    draw,
    start_from,
    widen_conv_in,
)
from unet import UNet, UNetConfig
from vae import VAEConfig

SCHEDULES = {"ldm": (0.0015, 0.0155), "sd": (0.00085, 0.012)}
TINY = SDSegConfig(
    vae=VAEConfig(32, (1, 1, 1, 1), 1),
    unet=UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    image_size=32,
)


def tiny(**changes):
    torch.manual_seed(0)
    return SDSeg(replace(TINY, **changes)).eval()


def golden_model(schedule):
    """A model with the golden U-Net and schedule, and the golden numbers of that schedule."""
    manifest, _ = golden("unet-ldm-tiny")
    model = tiny(beta_start=SCHEDULES[schedule][0], beta_end=SCHEDULES[schedule][1])
    model.unet = UNet(UNetConfig("ldm", 8, 4, 32, (1, 2, 4), 2, (1, 2, 4), 8, None)).eval()
    model.unet.load_state_dict(golden_weights(manifest["state_dict"], "model.diffusion_model."))
    g = golden("sdseg-tiny")[1]
    return model, {k.removeprefix(schedule + "."): v for k, v in g.items()}


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_equations_agree_with_the_reference(schedule):
    """Schedule, Eq. 1, the network's noise, Eq. 2 and the three losses are the published ones."""
    model, g = golden_model(schedule)
    torch.testing.assert_close(model.alphas_cumprod, g["alphas_cumprod"], atol=1e-6, rtol=1e-4)
    z_t = model.q_sample(g["z_0"], g["t"], g["noise"])
    torch.testing.assert_close(z_t, g["z_t"], atol=1e-5, rtol=0)
    eps = model.denoise(z_t, g["t"], g["z_c"])
    torch.testing.assert_close(eps, g["eps"], atol=1e-4, rtol=0)
    assert relative(model.predict_z0(z_t, g["t"], eps), g["z_0_estimate"]) < 1e-4
    model.condition = lambda image: g["z_c"]
    loss = model.loss(None, None, drawn=(g["t"], g["noise"]), z_0=g["z_0"])
    for ours, name in (
        (loss.noise, "loss_noise"),
        (loss.latent, "loss_latent"),
        (loss.total, "loss"),
    ):
        assert ours.item() == pytest.approx(g[name].item(), rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_sampling_agrees_with_the_reference(schedule):
    """The single step, and DDIM on the published sampler's time steps."""
    model, g = golden_model(schedule)
    single = model.reverse(g["noise"], g["z_c"], [T - 1])
    assert relative(single, g["single_step"]) < 1e-4
    for steps in (1, 2, 10, 50):
        z = g["noise"]
        times = sorted(g[f"ddim{steps}_timesteps"].tolist(), reverse=True)
        assert times == ddim_timesteps(steps, "leading")
        for i, step in enumerate(times):  # theirs ends at a_0, not at 1
            t = torch.full((len(z),), step)
            after = times[i + 1] if i + 1 < len(times) else 0
            z = model.ddim_step(z, t, model.denoise(z, t, g["z_c"]), model.alphas_cumprod[after])
        assert relative(z, g[f"ddim{steps}"]) < 1e-4


@torch.no_grad()
def test_single_step_is_ddim_with_one_step():
    """One trailing DDIM step is Eq. 2 at t = T - 1, to the last bit."""
    model = tiny()
    z_t, z_c = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    t = torch.full((2,), T - 1)
    expected = model.predict_z0(z_t, t, model.denoise(z_t, t, z_c))
    assert ddim_timesteps(1) == [T - 1]
    assert torch.equal(model.reverse(z_t, z_c, ddim_timesteps(1)), expected)
    assert len(ddim_timesteps(T)) == T
    with pytest.raises(Refusal, match="1 to 999"):
        ddim_timesteps(T, "leading")  # would begin at t = T


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_gives_z0(prediction):
    """Whatever is predicted, Eq. 2 undoes Eq. 1 when the prediction is right."""
    model = tiny(prediction=prediction)
    z_0, noise, t = (
        torch.randn(5, 4, 4, 4),
        torch.randn(5, 4, 4, 4),
        torch.tensor([0, 9, 500, 900, 999]),
    )
    z_t = model.q_sample(z_0, t, noise)
    out = model.target(z_0, t, noise)
    torch.testing.assert_close(model.predict_z0(z_t, t, out), z_0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_leaves_no_trace_of_the_mask(prediction):
    """At t = T - 1, z_t is the noise itself; x0 and v still give z_0, eps is as it was."""
    model = tiny(prediction=prediction, zero_terminal_snr=True)
    z_0, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    t = torch.tensor([T - 1, 500])
    z_t = model.q_sample(z_0, t, noise)
    assert torch.equal(z_t[0], noise[0])
    out = model.target(z_0, t, noise)
    torch.testing.assert_close(model.predict_z0(z_t, t, out), z_0, atol=1e-5, rtol=0)
    plain, eps = tiny().alphas_cumprod, tiny(zero_terminal_snr=True).alphas_cumprod
    assert model.alphas_cumprod[0] == plain[0] and torch.equal(eps, plain)


@torch.no_grad()
def test_ddim_of_a_perfect_network_is_exact():
    """Ten steps of a network that knows z_0 arrive at z_0."""
    model = tiny(prediction="x0")
    z_0 = torch.randn(2, 4, 4, 4)
    model.denoise = lambda z_t, t, z_c: z_0
    z = model.reverse(torch.randn(2, 4, 4, 4), None, ddim_timesteps(10))
    torch.testing.assert_close(z, z_0)


def test_latent_loss_is_the_noise_loss_reweighted():
    """|z_0 estimate - z_0| = sqrt((1 - a) / a) |n~ - n|, so its weight at t = T - 1 is 14.6."""
    model = tiny()
    z_0, noise, t = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), torch.tensor([T - 1])
    model.condition = lambda image: torch.zeros_like(z_0)
    loss = model.loss(None, None, drawn=(t, noise), z_0=z_0)
    a = model.alphas_cumprod[T - 1].item()
    weight = math.sqrt((1 - a) / a)
    assert weight == pytest.approx(14.6, abs=0.05)
    assert loss.latent.item() == pytest.approx(weight * loss.noise.item(), rel=1e-3)


def test_eq2_is_float32_under_autocast():
    """bfloat16 outputs enter Eq. 2 as float32, and the U-Net's last layers never leave it."""
    model = tiny()
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([T - 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = model.denoise(z, t, z)
        assert out.dtype == torch.float32
        assert model.predict_z0(z.bfloat16(), t, out.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("k", range(2, 15))
def test_class_colours_are_apart_and_decode(k):
    """K colours of the cube: black first, none close, and each decodes to its own class."""
    colours = class_colours(k)
    assert colours[0].tolist() == [-1, -1, -1] and colours.abs().max() <= 1
    assert torch.pdist(colours).min() >= (3.46 if k == 2 else 2.8 if k <= 4 else 1.41)
    model = tiny(classes=tuple(f"class {i}" for i in range(k)))
    ids = torch.arange(k).repeat(2, 3, 1)
    scores = model.scores(model.colours[ids].permute(0, 3, 1, 2))
    if k == 2:
        assert torch.equal(scores[:, 0], ids.float())
    else:
        assert torch.equal(scores.argmax(1), ids)
        torch.testing.assert_close(scores.sum(1), torch.ones(2, 3, k))


@torch.no_grad()
def test_mask_latents_are_scaled_posterior_means():
    """The mask enters the autoencoder in one place: colours, mean, scale; and no sampling."""
    model = tiny(mask_scale=0.5)
    mask = torch.randint(0, 2, (2, 32, 32))
    x = (mask[:, None].float() * 2 - 1).repeat(1, 3, 1, 1)
    assert torch.equal(model.encode_mask(mask), 0.5 * model.vae.encode(x)[0])
    assert torch.equal(model.encode_mask(mask), model.encode_mask(mask))


@pytest.mark.parametrize("k", [2, 3])
def test_segment_gives_scores(k):
    """(B, 1, H, W) or (B, K, H, W) in [0, 1]; repeatable by its generator; samples are averaged."""
    model = tiny(classes=tuple("abc"[:k]))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    p = model.segment(image, generator=torch.Generator().manual_seed(3))
    assert p.shape == (2, 1 if k == 2 else k, 32, 32) and 0 <= p.min() and p.max() <= 1
    assert torch.equal(p, model.segment(image, generator=torch.Generator().manual_seed(3)))
    parts = model.sample(image, samples=3, generator=torch.Generator().manual_seed(3))
    mean = model.segment(image, samples=3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean, torch.stack(list(parts)).mean(0))


def test_a_pictures_mask_does_not_depend_on_its_neighbours():
    """The same picture alone and in a batch gets the same scores, to float rounding."""
    model = tiny()
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    together = model.segment(image, generator=torch.Generator().manual_seed(0))
    alone = model.segment(image[1:2], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)


def test_draw_sets_its_share_to_the_last_step():
    """`last` = 0.75 puts three of four samples at t = T - 1, evenly, in every part of a batch."""
    t, noise = draw(16, (4, 2, 2), torch.Generator().manual_seed(0), last=0.75)
    for part in t.view(4, 4):
        assert (part == T - 1).sum() >= 3
    assert noise.shape == (16, 4, 2, 2)
    alone = [draw(1, (1, 1, 1), last=0.75, first=i)[0].item() for i in range(400)]
    assert 300 <= alone.count(T - 1) <= 303
    t, _ = draw(4000, (1, 1, 1), torch.Generator().manual_seed(0))
    assert t.min() < 5 and t.max() > 994 and abs(t.float().mean() - 499.5) < 20


def test_only_tau_and_unet_learn():
    """Eq. 3 and the decoded-mask loss reach tau and the U-Net; the autoencoder stays frozen."""
    model = tiny(prediction="x0").train()
    mask = torch.randint(0, 2, (2, 32, 32))
    model.loss(torch.rand(2, 3, 32, 32), mask, last=1.0, mask_weight=1.0).total.backward()
    assert all(p.grad is None for p in model.vae.parameters())
    for part in (model.tau, model.unet):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


def test_cross_attention_sees_the_image():
    """fusion "cross": z_c enters as tokens, and changes the output."""
    unet = UNetConfig("sd", 4, 4, 32, (1, 2), 1, (2,), 8, context_dim=4)
    model = tiny(fusion="cross", unet=unet)
    z_t, t = torch.randn(1, 4, 4, 4), torch.tensor([T - 1])
    a, b = (model.denoise(z_t, t, torch.randn(1, 4, 4, 4)) for _ in range(2))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_returns(tmp_path, half):
    """save and load keep config and weights; every tensor is stored once."""
    model = tiny(window=(-125.0, 275.0), classes=("background", "a", "b"), data="x")
    model.save(tmp_path / "m.safetensors", half=half)
    again = SDSeg.load(tmp_path / "m.safetensors")
    assert again.config == model.config and not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a.half().float() if half else a, b), name


def test_loading_is_strict_and_names_what_is_wrong(tmp_path):
    """A missing, an unexpected and a misshapen tensor are each named, in one line."""
    model = tiny()
    tensors = model.state_dict()
    del tensors["tau.out.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["unet.out.2.bias"] = torch.zeros(5)
    write_weights(tmp_path / "m.safetensors", tensors, model.config)
    with pytest.raises(Refusal) as error:
        SDSeg.load(tmp_path / "m.safetensors")
    for part in ("m.safetensors", "missing tau.out.bias", "unexpected extra", "unet.out.2.bias"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(vae=replace(TINY.vae, ch_mult=())), dict(fusion="cross"), dict(split="half"),
    dict(version=2), dict(unet=replace(TINY.unet, num_heads=7)),
    dict(unet=replace(TINY.unet, in_channels=4)),
    dict(unet=replace(TINY.unet, model_channels=40)),
])  # fmt: skip
def test_a_config_of_no_network_is_refused(changes, tmp_path):
    """A foreign file's config: one line, whatever network it would describe."""
    config = replace(TINY, **changes)
    tensors = tiny().state_dict()
    write_weights(tmp_path / "m.safetensors", tensors, config)
    with pytest.raises(Refusal, match="m.safetensors: "):
        SDSeg.load(tmp_path / "m.safetensors")
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    write_weights(tmp_path / "vae.safetensors", vae, config)
    with pytest.raises(Refusal, match="vae.safetensors: "):
        start_from(tmp_path / "vae.safetensors")


def test_training_can_start_from_an_autoencoder_or_change_its_fusion(tmp_path):
    """start_from: the autoencoder is kept, tau is E again, and what fits is kept on request."""
    model = tiny()
    model.save(tmp_path / "m.safetensors")
    same = start_from(tmp_path / "m.safetensors", data="new")
    assert same.config == replace(model.config, data="new")
    assert torch.equal(same.unet.out[2].weight, model.unet.out[2].weight)
    fresh = start_from(tmp_path / "m.safetensors", fresh=True)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(fresh.tau(image), model.vae.encode(image)[0])
    assert not torch.equal(fresh.unet.out[2].weight, model.unet.out[2].weight)
    cross = start_from(tmp_path / "m.safetensors", fusion="cross")
    assert cross.unet.config.in_channels == 4 and cross.unet.config.context_dim == 4
    assert torch.equal(cross.unet.out[2].weight, model.unet.out[2].weight)
    first = model.unet.input_blocks[0][0].weight  # sees z_t in its first channels
    assert torch.equal(cross.unet.input_blocks[0][0].weight, first[:, :4])
    cross.save(tmp_path / "cross.safetensors")
    back = start_from(tmp_path / "cross.safetensors", fusion="concat")
    assert torch.equal(back.unet.input_blocks[0][0].weight, widen_conv_in(first[:, :4], 8))
    unet = replace(TINY.unet, family="ldm", context_dim=None)
    tiny(unet=unet).save(tmp_path / "ldm.safetensors")
    with pytest.raises(Refusal, match="sd family"):  # it would never see the image
        start_from(tmp_path / "ldm.safetensors", fusion="cross")


@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_bfloat16_gives_nearly_the_same_scores(fusion):
    """Either way of fusing runs in reduced precision, close to float32."""
    cross = replace(TINY.unet, in_channels=4, context_dim=4)
    model = tiny(fusion=fusion, prediction="x0", **({"unet": cross} if fusion == "cross" else {}))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    exact = model.segment(image, generator=torch.Generator().manual_seed(0))
    model.to_precision("cpu", "bf16")
    kept = (model.tau.encoder.conv_in, model.tau.out, model.unet.out)
    assert {p.dtype for part in kept for p in part.parameters()} == {torch.float32}
    assert model.tau.encoder.mid.block_1.conv1.weight.dtype == torch.bfloat16
    rounded = model.segment(image, generator=torch.Generator().manual_seed(0))
    assert (exact - rounded).abs().mean() < 0.01


def test_compiling_changes_no_score_and_no_name():
    """The networks can be captured whole, here LDM's; the weights' names stay."""
    model = tiny(unet=replace(TINY.unet, family="ldm"))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = model.segment(image, generator=torch.Generator().manual_seed(0))
    names = list(model.state_dict())
    torch.compiler.reset()  # its cache is the process's
    model.compile(backend="eager")
    made = model.segment(image, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made, plain)
    assert list(model.state_dict()) == names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same_scores():
    """Compiled for short latency, and called again and again, every call its own result."""
    model = tiny().to_precision("cuda")
    images = torch.rand(5, 2, 3, 32, 32, device="cuda") * 2 - 1
    plain = [model.segment(x, generator=torch.Generator().manual_seed(0)) for x in images]
    model.compile(mode="reduce-overhead")
    made = [model.segment(x, generator=torch.Generator().manual_seed(0)) for x in images]
    for a, b in zip(made, plain, strict=True):
        assert relative(a, b) < 1e-3


def test_presets_are_the_published_sizes():
    """860 M and 294 M parameters in the U-Nets of the paper, and a nano model under 32 MB."""
    sizes = {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = SDSeg(config)
        sizes[name] = sum(p.numel() for p in model.unet.parameters()) / 1e6
        if name == "nano":
            assert 2 * sum(p.numel() for p in model.parameters()) < 32e6
    assert sizes["sd-v1"] == pytest.approx(859.5, abs=0.1)
    assert sizes["ldm-kl-8"] == pytest.approx(294, abs=1)
