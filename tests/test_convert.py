"""The converter: public names and numbers in, ours out, and no pickle is run."""

import io
import json
import os
import platform
import random
import struct
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import UNETS, VAE_TINY, golden, golden_weights
from safetensors.torch import load_file, save, save_file

import convert_sd_weights as converter
from convert_sd_weights import CONTEXT, CONV_IN, EMA, TAU, UNET, VAE
from sdseg import PRESETS, SDSeg, build_empty
from support.ckpt import read_tensors
from support.cli import UserError, run_command
from support.diffusers_names import compvis_names
from support.weights import write_weights
from tools.benchmark import peak_of

SMALL_PRESETS = {
    name: replace(PRESETS[name], vae=VAE_TINY, unet=UNETS[PRESETS[name].unet.family])
    for name in ("sd-v1", "ldm-kl-8")
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
BIAS = UNET + "out.2.bias"


def full_size(file, part):
    """{name: tensor without memory} of a full-size checkpoint, its U-Net with 4 input channels."""
    manifest = json.loads((Path(__file__).parent / "formats" / f"{file}.json").read_text())[part]
    for name in {CONV_IN, "conv_in.weight"} & manifest.keys():
        manifest[name][1] = 4
    return {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}


def compvis(family):
    """The golden weights in the public layout of a family: full names, 4 input channels."""
    unet = golden_weights(golden(f"unet-{family}-tiny")[0]["state_dict"], UNET, strip=False)
    unet[CONV_IN] = unet[CONV_IN][:, :4].clone()
    return unet | golden_weights(golden("vae-tiny")[0]["first_stage_model"], VAE, strip=False)


def published():
    """The golden weights as the published SDSeg saves a run."""
    unet = golden_weights(golden("unet-ldm-tiny")[0]["state_dict"], UNET, strip=False)
    tau = golden_weights(golden("vae-tiny")[0]["cond_stage_model"], TAU, strip=False)
    settings = {"scale_factor": torch.tensor(0.1145), "betas": torch.tensor([0.0015, 0.0155])}
    return compvis("ldm") | unet | tau | settings


def diffusers(part):
    """The golden weights of a diffusers U-Net or VAE."""
    return golden_weights(golden("diffusers-tiny")[0][part], f"{part}.")


def shapes(tensors):
    return {k: v.shape for k, v in tensors.items()}


def only(prefix, tensors):
    return {k: v for k, v in tensors.items() if k.startswith(prefix)}


class ModelCheckpoint:
    """PyTorch does not know it, as it does not know Lightning's class of this name."""


def save_ckpt(tensors, path):
    """A .ckpt as Lightning writes it: weights beside other objects."""
    callback = ModelCheckpoint()
    callback.path, callback.score = Path("x"), torch.tensor(0.5).numpy()[()]
    adam = {"state": {0: {"exp_avg": torch.ones(3), "step": 7}}, "param_groups": [{"lr": 1e-4}]}
    callbacks = {ModelCheckpoint: callback}
    torch.save({"callbacks": callbacks, "state_dict": tensors, "optimizer_states": [adam]}, path)


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """Work in an empty folder, with presets of the golden networks' sizes."""
    monkeypatch.setattr(converter, "PRESETS", SMALL_PRESETS)
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    converter.main(converter.parse_args([str(argument) for argument in arguments]))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def check_outputs(unet, expected, vae="vae-tiny", file="out.safetensors"):
    """The networks of a file compute what the public code computed: the goldens of these names."""
    model, g, v = SDSeg.load(file), golden(unet)[1], golden(vae)[1]
    close(model.unet(torch.cat([g["z_t"], g["z_c"]], 1), g["t"]), g[expected])
    mean = model.vae.encode(v["image"])[0]
    close(mean, v["moments_mean"])
    close(model.vae.decode(mean), v["decode_of_mean"])
    return model


# ---- names and numbers ----


def test_full_size_names_are_all_used_and_none_invented():
    """Every public tensor finds its place, and every place its tensor; also diffusers' names."""
    vae = full_size("vae-kl-f8", "first_stage_model")
    unets = {name: full_size(f"unet-{name}", "state_dict") for name in ("sd-v1", "ldm-kl-8")}
    for name, unet in unets.items():
        weights, left = converter.convert(unet | vae, PRESETS[name])
        assert shapes(weights) == shapes(build_empty(PRESETS[name], "").state_dict()) and not left
    renamed = compvis_names(full_size("diffusers-sd-v1", "unet"))
    assert shapes(renamed) == shapes(unets["sd-v1"])
    renamed = compvis_names(full_size("diffusers-sd-v1", "vae"))
    assert {VAE + name: shape for name, shape in shapes(renamed).items()} == shapes(vae)


@pytest.mark.parametrize("family, write", [("sd", save_ckpt), ("ldm", save_file)])
@torch.no_grad()
def test_checkpoints_give_the_reference_outputs(presets, family, write):
    """The converted model computes what the original does, and tau what its encoder does."""
    write(compvis(family), "model.ckpt")
    run("model.ckpt", "--out", "out.safetensors")
    model = check_outputs(f"unet-{family}-tiny", "eps_zero_init")
    close(model.tau(golden("vae-tiny")[1]["image"]), golden("vae-tiny")[1]["moments_mean"])
    assert model.config == SMALL_PRESETS["sd-v1" if family == "sd" else "ldm-kl-8"]


def test_ema_takes_the_averages_and_half_halves_the_file(presets, capsys):
    """--ema takes the averages, the default does not; --half halves the file."""
    plain = compvis("ldm")
    names = {k: EMA + k.removeprefix("model.").replace(".", "") for k in only(UNET, plain)}
    averages = {name: 2 * plain[k] for k, name in names.items()}
    save_ckpt({"state_dict": plain | averages}, "model.ckpt")  # may be wrapped twice
    for out, *flags in (["plain"], ["ema", "--ema"], ["half", "--half"]):
        run("model.ckpt", "--out", f"{out}.safetensors", *flags)
    public = plain[BIAS]
    for out, expected in (("plain", public), ("ema", 2 * public), ("half", public.half())):
        assert torch.equal(load_file(f"{out}.safetensors")["unet.out.2.bias"], expected)
    for dtype in (torch.bfloat16, torch.float64):
        save_ckpt({k: v.to(dtype) for k, v in plain.items()}, "other.ckpt")
        run("other.ckpt", "--out", "other.safetensors", "--half")
        assert {v.dtype for v in load_file("other.safetensors").values()} == {torch.float16}
    save_ckpt(plain | {BIAS: 1e6 * public}, "large.ckpt")
    with pytest.raises(UserError, match="unet.out.2.bias holds a weight that is too large"):
        run("large.ckpt", "--half")
    assert Path("half.safetensors").stat().st_size < 0.55 * Path("ema.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert all(f"ignored  {x}" in printed for x in ("model_ema", "plain U-Net", "optimizer_states"))


@pytest.mark.parametrize("family, source, order", [("sd", "diffusers", 1), ("ldm", "vae", -1)])
def test_an_autoencoder_beside_a_checkpoint_replaces_its_own(
    presets, capsys, family, source, order
):
    """kl-f8 (bare names, a loss), or a diffusers VAE, gives the autoencoder, in any order."""
    tensors = compvis(family)
    bare = {k.removeprefix(VAE): v for k, v in only(VAE, tensors).items()}
    vae = diffusers("vae") if family == "sd" else bare | {"loss.logvar": torch.ones(1)}
    zeros = {k: torch.zeros_like(v) for k, v in only(VAE, tensors).items()}
    torch.save(vae, "vae")
    torch.save(tensors | zeros, "unet")
    run(*["vae", "unet"][::order], "--out", "out.safetensors")
    check_outputs(f"unet-{family}-tiny", "eps_zero_init", f"{source}-tiny")
    printed = capsys.readouterr().out
    assert "ignored  given twice " in printed
    assert ("ignored  loss " in printed) == (family == "ldm")


@torch.no_grad()
def test_published_run_keeps_its_encoder_and_scales(presets):
    """A run of the published code: 8 channels, its own tau, its scale of masks, z_c unscaled."""
    save_ckpt(published(), "last.ckpt")
    run("last.ckpt")
    model = check_outputs("unet-ldm-tiny", "eps", file="weights/sdseg-last.safetensors")
    g, config = golden("vae-tiny")[1], model.config
    close(model.encode_image(g["image"]), g["sdseg_condition"])
    assert config.mask_scale == pytest.approx(0.1145) and config.image_scale == 1
    assert config.data  # it is trained
    assert (config.beta_start, config.beta_end) == (0.0015, 0.0155)


def test_diffusers_folder_gives_the_reference_outputs(presets):
    """A diffusers folder, of .safetensors or .bin; here the autoencoder has its old names."""
    vae = diffusers("vae")
    for new, old in OLD_NAMES.items():
        vae = {k.replace(f".{new}.", f".{old}."): v for k, v in vae.items()}
    Path("unet").mkdir()
    Path("vae").mkdir()
    save_file(diffusers("unet"), "unet/diffusion_pytorch_model.safetensors")
    torch.save(vae, "vae/diffusion_pytorch_model.fp16.bin")
    weights, _ = converter.convert(converter.read_source(Path()), SMALL_PRESETS["sd-v1"])
    write_weights("out.safetensors", weights, SMALL_PRESETS["sd-v1"])
    check_outputs("diffusers-tiny", "eps_without_cross_attention", "diffusers-tiny")


# ---- pickles are not run ----


class Call:
    """An object that is pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument", [(eval, "open('EXECUTED', 'w')"), (os.system, "touch EXECUTED")]
)
def test_a_malicious_pickle_has_no_effect(tmp_path, monkeypatch, function, argument):
    """What a pickle wants to call is not called; the weights beside it are read, or nothing is."""
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.arange(6.0)}, "x": Call(function, argument)}
    torch.save(content, "attack.ckpt")
    with suppress(UserError):
        assert torch.equal(read_tensors("attack.ckpt")["a"], torch.arange(6.0))
    assert not Path("EXECUTED").exists()
    torch.load("attack.ckpt", weights_only=False)
    assert Path("EXECUTED").exists(), "the attack was no attack"


# ---- refusals ----


def altered(name, value=None):
    """Stable Diffusion v1 in which one tensor is another one, or is missing."""
    tensors = compvis("sd") | {name: value}
    return {k: v for k, v in tensors.items() if v is not None}


HUGE = torch.zeros(()).expand(2**40, 4, 3, 3)  # stored as one number
MODELS = {  # what is wrong: the checkpoint, what the refusal says
    "SD 2": (lambda: altered(CONTEXT, torch.ones(32, 1024)), "Stable Diffusion 2"),
    "inpainting": (lambda: altered(CONV_IN, torch.ones(32, 9, 3, 3)), "an inpainting model"),
    "SDXL": (lambda: {CONV_IN: torch.ones(1)}, "Stable Diffusion XL"),
    "missing": (lambda: altered(BIAS), "missing unet.out.2.bias"),
    "huge": (lambda: altered(CONV_IN, HUGE), "is [1099511627776, 8, 3, 3], not [32"),
    "no dimension": (lambda: altered(VAE + "quant_conv.bias", torch.ones(())), "is [], not [8]"),
    "float8": (lambda: altered(BIAS, torch.ones(4).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "no autoencoder": (lambda: only(UNET, compvis("sd")), "without autoencoder"),
    "no U-Net": (lambda: only(VAE, compvis("sd")), "no U-Net of Stable Diffusion v1 or LDM"),
    "no scale": (lambda: published() | {"scale_factor": torch.tensor(torch.nan)}, "scale_factor"),
}


def check_refusal(capsys, says, *arguments):
    """One line on stderr, exit status 2, nothing else printed, nothing written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run(*arguments))
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error, error
    assert sorted(Path().rglob("*")) == before and not printed


def test_arguments_that_cannot_be_are_refused(presets, capsys):
    """--ema without averages; --out that is the source, or no .safetensors; no such source."""
    save_file(compvis("ldm"), "model.safetensors")
    check_refusal(capsys, "no averaged U-Net", "model.safetensors", "--ema")
    check_refusal(capsys, "is the source", "model.safetensors", "--out", "./model.safetensors")
    check_refusal(capsys, "ends in .safetensors", "model.safetensors", "--out", "model.ckpt")
    check_refusal(capsys, "https://huggingface.co/stable-diffusion-v1-5/", "nowhere.ckpt")
    check_refusal(capsys, "/lsun_churches.zip, see docs/data.md", "lsun_churches/model.ckpt")
    check_refusal(capsys, "no unet/diffusion_pytorch_model", ".")


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", bytes(10**7))
    return buffer.getvalue()


def ckpt(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_member_size(size):
    """A .ckpt with a directory that claims so many bytes for its first member."""
    content = bytearray(WHOLE)
    entry = content.index(b"PK\1\2")
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    return bytes(content)


REBUILD = torch._utils._rebuild_tensor_v2
LIE = Call(REBUILD, torch.zeros(4)._typed_storage(), 0, (2**40,), (1,), False, {})  # four numbers
WHOLE = ckpt({"a": torch.zeros(4)})
FILES = {
    "empty": (b"", "it begins with b''"),
    "old format": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "PyTorch 1.6"),
    "zip bomb": (zip_bomb(), "unpack it"),
    "cut by a byte": (WHOLE[:-1], "damaged"),
    "shape too large": (ckpt({"a": LIE}), "damaged"),
    "member absurd": (with_member_size(2**31), "a zip that"),
    "header absurd": (struct.pack("<Q", 2**62) + save({"x": torch.zeros(4)})[8:], "damaged"),
}


@pytest.mark.parametrize("case", [*MODELS, *FILES])
def test_foreign_and_damaged_sources_are_refused(presets, capsys, case):
    """A foreign model, a tensor that does not fit, a damaged file: one line says what is wrong."""
    content, says = (MODELS | FILES)[case]
    content = content if isinstance(content, bytes) else ckpt({"state_dict": content()})
    Path("model.ckpt").write_bytes(content)
    check_refusal(capsys, says, "model.ckpt")


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux forgets an earlier peak")
def test_reading_takes_no_memory(tmp_path):
    """Two files of 40 MB are mapped, and no lie about a size in the files above takes memory."""
    for write, name in ((torch.save, "a"), (save_file, "b")):
        write({f"{name}{i}": torch.zeros(2_000_000) for i in range(5)}, tmp_path / name)
    for case, (content, _) in FILES.items():
        (tmp_path / case).write_bytes(content)
    tensors = {}

    def read():
        for path in tmp_path.iterdir():
            with suppress(UserError):
                tensors.update(read_tensors(path))

    peaks = [peak_of(call, torch.device("cpu")) for call in (lambda: None, read)]
    before, after = (int(peak.removesuffix(" MiB")) for peak in peaks)
    assert len(tensors) == 10 and after - before < 20


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_refused(tmp_path):
    """Of files damaged at random each is read or refused: no traceback, no hang, no crash."""
    rng, refused, path = random.Random(0), 0, tmp_path / "x"
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.randn(3, 2)}
    for content in [ckpt({"state_dict": tensors, "path": Path("x")}), save(tensors)] * 100:
        i, n = rng.randrange(min(2000, len(content))), rng.randint(1, 40)
        new = rng.choice([b"", rng.randbytes(n), content[i : i + n] * 2])
        path.write_bytes(content[:i] + new + content[i + n :])
        try:
            assert all(torch.is_tensor(t.clone()) for t in read_tensors(path).values())
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 10 < refused < 200
