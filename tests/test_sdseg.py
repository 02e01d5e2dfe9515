"""The method, equation by equation: what SDSeg promises, shown on small numbers."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, UNETS, golden, golden_weights, slow, tiny

from sdseg import PRESETS, SDSeg, T, class_colours, ddim_timesteps, from_pretrained, widen_conv_in
from support.cli import UserError
from support.device import compile_networks
from support.weights import write_weights
from unet import UNet

SCHEDULES = {"ldm": (0.0015, 0.0155), "sd": (0.00085, 0.012)}
PREDICTIONS = ("eps", "x0", "v")


def golden_model(schedule):
    """A model with the golden U-Net and schedule, and the golden numbers of that schedule."""
    manifest, _ = golden("unet-ldm-tiny")
    start, end = SCHEDULES[schedule]
    model = tiny(beta_start=start, beta_end=end, prediction="eps")
    model.unet = UNet(UNETS["ldm"]).eval()
    model.unet.load_state_dict(golden_weights(manifest["state_dict"], "model.diffusion_model."))
    g = golden("sdseg-tiny")[1]
    return model, {k.removeprefix(schedule + "."): v for k, v in g.items()}


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def latents(n=2):
    return torch.randn(n, 4, 4, 4)


def seed(n):
    return torch.Generator().manual_seed(n)


# ---- Eq. 1 to 3 ----


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_equations_agree_with_the_reference(schedule):
    """Schedule, Eq. 1, the network's noise, Eq. 2 and both losses are the published ones."""
    model, g = golden_model(schedule)
    torch.testing.assert_close(model.alphas_cumprod, g["alphas_cumprod"], atol=1e-6, rtol=1e-4)
    z_t = model.q_sample(g["z_0"], g["t"], g["noise"])
    torch.testing.assert_close(z_t, g["z_t"], atol=1e-5, rtol=0)
    model.encode_image = lambda image: g["z_c"]
    out = model(None, g["z_0"], g["t"], g["noise"])
    assert relative(out.z_0_estimate, g["z_0_estimate"]) < 1e-4
    assert out.noise_loss.mean().item() == pytest.approx(g["loss_noise"].item(), rel=1e-4)
    assert out.latent_loss.mean().item() == pytest.approx(g["loss_latent"].item(), rel=1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_gives_z0_and_the_noise(prediction, zero_terminal_snr):
    """Eq. 2 undoes Eq. 1 whatever is predicted, and the noise comes back as well."""
    model = tiny(prediction=prediction, zero_terminal_snr=zero_terminal_snr)
    z_0, noise, t = latents(5), latents(5), torch.tensor([0, 9, 500, 900, T - 1])
    z_t, a = model.q_sample(z_0, t, noise), model.alpha_bar(t)
    v = a.sqrt() * noise - (1 - a).sqrt() * z_0
    out = {"eps": noise, "x0": z_0, "v": v}[prediction]
    torch.testing.assert_close(model.predict_z0(z_t, t, out), z_0, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.predict_noise(z_t, t, out), noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_latent_loss_is_the_noise_loss_reweighted(prediction):
    """|z_0 estimate - z_0| = sqrt((1 - a) / a) |noise estimate - noise|; 14.6 times at T - 1."""
    model, t = tiny(prediction=prediction), torch.tensor([20, T - 1])
    model.encode_image = lambda image: torch.zeros(2, 4, 4, 4)
    out = model(None, latents(), t, latents())
    a = model.alphas_cumprod[t].double()
    weight = ((1 - a) / a).sqrt()
    assert weight[1].item() == pytest.approx(14.6, abs=0.05)  # in Stable Diffusion's schedule
    torch.testing.assert_close(out.latent_loss.double(), weight * out.noise_loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_terminal_snr_leaves_no_trace_of_the_mask(prediction):
    """At t = T - 1, z_t is the noise itself, so L_noise is 0 there whatever the network says."""
    model = tiny(prediction=prediction, zero_terminal_snr=True)
    z_0, noise, t = latents(), latents(), torch.tensor([T - 1, 500])
    losses = model(torch.rand(2, 3, 32, 32), z_0, t, noise)
    pure = torch.equal(model.q_sample(z_0, t, noise)[0], noise[0])
    assert pure == (prediction != "eps")  # it keeps its schedule: Eq. 2 would divide by zero
    assert (losses.noise_loss[0] == 0) == pure
    assert losses.noise_loss[1] > 0 and losses.latent_loss.min() > 0


def test_eq2_is_float32_under_autocast():
    """bfloat16 outputs enter Eq. 2 as float32, and the U-Net's last layers never leave it."""
    model, z, t = tiny(prediction="eps"), latents(1), torch.tensor([T - 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = model.predict(z, t, z)
        assert out.dtype == torch.float32
        assert model.predict_z0(z.bfloat16(), t, out.bfloat16()).dtype == torch.float32


# ---- sampling ----


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_sampling_agrees_with_the_reference(schedule):
    """The single step, and DDIM on the published sampler's time steps."""
    model, g = golden_model(schedule)
    single = model.ddim_sample(g["noise"], g["z_c"], [T - 1])
    assert relative(single, g["single_step"]) < 1e-4
    for steps in (1, 2, 10):
        z = g["noise"]
        times = sorted(g[f"ddim{steps}_timesteps"].tolist(), reverse=True)
        assert times == ddim_timesteps(steps, "leading")
        for step, after in zip(times, [*times[1:], 0]):  # theirs ends at alpha_bar_0, not at 1
            t = torch.full((len(z),), step)
            out = model.predict(z, t, g["z_c"])
            z = model.ddim_step(z, t, out, model.alphas_cumprod[after])
        assert relative(z, g[f"ddim{steps}"]) < 1e-4


@torch.no_grad()
def test_single_step_is_ddim_with_one_step():
    """One trailing step is Eq. 2 at t = T - 1; ten steps of a perfect network arrive at z_0."""
    model, z_t, z_c, t = tiny(prediction="eps"), latents(), latents(), torch.full((2,), T - 1)
    expected = model.predict_z0(z_t, t, model.predict(z_t, t, z_c))
    assert ddim_timesteps(1) == [T - 1] and len(ddim_timesteps(T)) == T
    assert torch.equal(model.ddim_sample(z_t, z_c, ddim_timesteps(1)), expected)
    with pytest.raises(UserError, match="1 to 999"):
        ddim_timesteps(T, "leading")  # would begin at t = T
    model, z_0 = tiny(prediction="x0"), latents()
    model.predict = lambda z_t, t, z_c: z_0
    torch.testing.assert_close(model.ddim_sample(z_t, None, ddim_timesteps(10)), z_0)


@pytest.mark.parametrize("k", [2, 3])
def test_segment_gives_probabilities(k):
    """(B, 1, H, W) or (B, K, H, W) in [0, 1]; the generator repeats them; samples are averaged."""
    model = tiny(classes=tuple("abc"[:k]))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    p = model.segment(image, generator=seed(3))
    assert p.shape == (2, 1 if k == 2 else k, 32, 32) and 0 <= p.min() and p.max() <= 1
    assert torch.equal(p, model.segment(image, generator=seed(3)))
    parts = model.sample(image, samples=3, generator=seed(3))
    mean = model.segment(image, samples=3, generator=seed(3))
    torch.testing.assert_close(mean, torch.stack(list(parts)).mean(0))


# ---- classes as colours ----


@pytest.mark.parametrize("k", range(2, 15))
def test_class_colours_are_apart_and_decode(k):
    """K colours of the cube: black first, none close, and each decodes to its own class."""
    colours = class_colours(k)
    assert colours[0].tolist() == [-1, -1, -1] and colours.abs().max() <= 1
    least = 3.46 if k == 2 else 2.8 if k <= 4 else 2 if k <= 8 else 1.73 if k == 9 else 1.41
    assert torch.pdist(colours).min() >= least
    model = tiny(classes=tuple(f"class {i}" for i in range(k)))
    ids = torch.arange(k).repeat(2, 3, 1)
    prob = model.probabilities(model.labels_to_rgb(ids))
    assert torch.equal(model.class_ids(prob), ids.byte())
    if k > 2:
        torch.testing.assert_close(prob.sum(1), torch.ones(2, 3, k))


def test_threshold_and_smallest_area_decide_what_is_marked():
    """Two classes: a pixel above the threshold is marked, in a region that is large enough."""
    prob = torch.zeros(2, 1, 10, 10)
    prob[0, 0, 1:4, 1:4], prob[0, 0, 7, 7:9], prob[1, 0, 5, 5] = 0.8, 0.8, 0.6
    marked = {(0.5, 0.0): (11, 1), (0.7, 0.0): (11, 0), (0.5, 0.03): (9, 0), (0.5, 0.1): (0, 0)}
    for (threshold, area), counts in marked.items():
        ids = tiny(threshold=threshold, smallest_area=area).class_ids(prob)
        assert ids.dtype == torch.uint8 and tuple(ids.sum((1, 2)).tolist()) == counts


@torch.no_grad()
def test_mask_latents_are_scaled_posterior_means():
    """The mask enters the autoencoder in one place: colours, mean, scale; nothing is sampled."""
    model, mask = tiny(mask_scale=0.5), torch.randint(0, 2, (2, 32, 32))
    x = (mask[:, None].float() * 2 - 1).repeat(1, 3, 1, 1)
    assert torch.equal(model.encode_mask(mask), 0.5 * model.vae.encode(x)[0])


# ---- files ----


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_returns(tmp_path, half):
    """save and load keep config and weights; the same model gives the same bytes."""
    model = tiny(window=(-125.0, 2e6), classes=("background", "a", "b"), trained_on=("ab12",))
    for name in "mn":
        model.save(tmp_path / f"{name}.safetensors", half=half)
    again = SDSeg.load(tmp_path / "m.safetensors")
    assert again.config == model.config and not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a.half().float() if half else a, b), name
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_loading_is_strict_and_names_what_is_wrong(tmp_path):
    """A missing, an unexpected and a misshapen tensor are each named, in one line."""
    model = tiny()
    tensors = {**model.state_dict(), "extra": torch.zeros(1), "unet.out.2.bias": torch.zeros(5)}
    del tensors["tau.out.bias"]
    write_weights(tmp_path / "m.safetensors", tensors, model.config)
    with pytest.raises(UserError) as error:
        SDSeg.load(tmp_path / "m.safetensors")
    for part in ("m.safetensors", "missing tau.out.bias", "unexpected extra", "unet.out.2.bias"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(vae=replace(TINY.vae, ch_mult=())), dict(fusion="cross"), dict(split="half"),
    dict(version=2), dict(unet=replace(TINY.unet, num_heads=7)), dict(image_size=2**40),
    dict(unet=replace(TINY.unet, num_res_blocks=99)), dict(classes=("one",)),
])  # fmt: skip
def test_a_config_of_no_network_is_refused(changes, tmp_path):
    """A foreign file's config: one line, whatever network it would describe."""
    tensors, path = tiny().state_dict(), tmp_path / "m.safetensors"
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    for kept, load in ((tensors, SDSeg.load), (vae, from_pretrained)):
        write_weights(path, kept, replace(TINY, **changes))
        with pytest.raises(UserError, match="m.safetensors: "):
            load(path)


def test_training_can_start_from_an_autoencoder(tmp_path):
    """from_pretrained keeps all weights, or with `vae_only` the autoencoder, and tau is E again."""
    model, path = tiny(), tmp_path / "m.safetensors"
    model.save(path)
    same = from_pretrained(path, data="new")
    assert same.config == replace(model.config, data="new")
    assert torch.equal(same.unet.out[2].weight, model.unet.out[2].weight)
    fresh, image = from_pretrained(path, vae_only=True), torch.rand(1, 3, 32, 32)
    assert torch.equal(fresh.tau(image), model.vae.encode(image)[0])
    assert not torch.equal(fresh.unet.out[2].weight, model.unet.out[2].weight)


def test_training_can_change_the_fusion(tmp_path):
    """Layers that fit keep their weights; z_c enters through zeros, or through new attention."""
    model, path = tiny(), tmp_path / "m.safetensors"
    model.save(path)
    cross = from_pretrained(path, fusion="cross")
    assert cross.unet.config.in_channels == 4 and cross.unet.config.context_dim == 4
    assert torch.equal(cross.unet.out[2].weight, model.unet.out[2].weight)
    first = model.unet.input_blocks[0][0].weight[:, :4]  # these channels see z_t
    assert torch.equal(cross.unet.input_blocks[0][0].weight, first)
    cross.save(path)
    back = from_pretrained(path, fusion="concat")
    assert torch.equal(back.unet.input_blocks[0][0].weight, widen_conv_in(first, 8))
    tiny(unet=replace(TINY.unet, family="ldm")).save(path)
    with pytest.raises(UserError, match="sd family"):  # it has no cross-attention
        from_pretrained(path, fusion="cross")


# ---- precision and speed ----


@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_both_fusions_see_the_image_in_any_precision(fusion):
    """z_c changes the mask, as channels or as tokens; bfloat16 in most layers hardly does."""
    cross = {"unet": replace(TINY.unet, in_channels=4, context_dim=4)} if fusion == "cross" else {}
    model, image = tiny(fusion=fusion, **cross), torch.rand(2, 3, 32, 32) * 2 - 1
    exact, other = (model.segment(x, generator=seed(0)) for x in (image, -image))
    kept = (model.tau.encoder.conv_in, model.tau.out, model.unet.out)
    before = [p.clone() for part in kept for p in part.parameters()]
    model.for_inference("cpu", "bf16")
    assert all(map(torch.equal, before, (p for part in kept for p in part.parameters())))
    assert model.tau.encoder.mid.block_1.conv1.weight.dtype == torch.bfloat16
    assert (exact - model.segment(image, generator=seed(0))).abs().mean() < 0.01
    assert (exact - other).abs().mean() > 1e-4


@slow
def test_compiling_changes_no_value_and_no_name():
    """Each network is captured as one graph, here LDM's; the weights' names stay."""
    model = tiny(unet=replace(TINY.unet, family="ldm")).for_inference("cpu")  # channels_last too
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    plain, names = model.segment(image, generator=seed(0)), list(model.state_dict())
    torch.compiler.reset()  # the cache belongs to the process
    compile_networks(model, backend="eager")
    assert torch.equal(model.segment(image, generator=seed(0)), plain)
    assert list(model.state_dict()) == names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same_probabilities():
    """Compiled for short latency and called again and again: every call has its own result."""
    model = tiny().for_inference("cuda")
    images = torch.rand(5, 2, 3, 32, 32, device="cuda") * 2 - 1
    plain = [model.segment(x, generator=seed(0)) for x in images]
    compile_networks(model, mode="reduce-overhead")
    compiled = [model.segment(x, generator=seed(0)) for x in images]
    for a, b in zip(compiled, plain, strict=True):
        assert relative(a, b) < 1e-3


def test_presets_are_the_published_sizes():
    """860 M and 294 M parameters in the U-Nets of the paper, and a nano model under 32 MB."""
    with torch.device("meta"):
        models = {name: SDSeg(config) for name, config in PRESETS.items()}
    sizes = {name: sum(p.numel() for p in m.unet.parameters()) for name, m in models.items()}
    assert sizes["sd-v1"] == pytest.approx(859.5e6, abs=1e5)
    assert sizes["ldm-kl-8"] == pytest.approx(294e6, abs=1e6)
    assert 2 * sum(p.numel() for p in models["nano"].parameters()) < 32e6
