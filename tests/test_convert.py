"""The converter: public names and numbers in, ours out, and no pickle is run."""

import collections
import importlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import golden, golden_weights
from safetensors.torch import load_file, save, save_file

import convert_sd_weights as converter
from convert_sd_weights import CONTEXT, CONV_IN, EMA, TAU, UNET, VAE
from sdseg import PRESETS, SDSeg, build_empty
from support.ckpt import read_tensors
from support.cli import UserError, run_command
from support.diffusers_names import compvis_names
from unet import UNetConfig
from vae import VAEConfig

VAE_TINY = VAEConfig(32, (1, 2, 2), 1)
SD_TINY = UNetConfig("sd", 8, 4, 32, (1, 2, 4, 4), 2, (1, 2, 4), 8, 48)
LDM_TINY = UNetConfig("ldm", 8, 4, 32, (1, 2, 4), 2, (1, 2, 4), 8, None)
TINY = {
    "sd-v1": replace(PRESETS["sd-v1"], vae=VAE_TINY, unet=SD_TINY),
    "ldm-kl-8": replace(PRESETS["ldm-kl-8"], vae=VAE_TINY, unet=LDM_TINY),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
BIAS = UNET + "out.2.bias"
FUZZ = int(os.environ.get("FUZZ", 200))  # damaged files to try


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


def published(**buffers):
    """The golden weights as the published SDSeg saves a run."""
    unet = golden_weights(golden("unet-ldm-tiny")[0]["state_dict"], UNET, strip=False)
    tau = golden_weights(golden("vae-tiny")[0]["cond_stage_model"], TAU, strip=False)
    settings = {"scale_factor": torch.tensor(0.1145), "betas": torch.tensor([0.0015, 0.0155])}
    return compvis("ldm") | unet | tau | settings | buffers


def diffusers(part, old_names=False):
    """The golden weights of a diffusers U-Net or VAE."""
    tensors = golden_weights(golden("diffusers-tiny")[0][part], f"{part}.")
    return with_old_names(tensors) if old_names else tensors


def with_old_names(vae):
    for new, old in OLD_NAMES.items():
        vae = {k.replace(f".{new}.", f".{old}."): v for k, v in vae.items()}
    return vae


def only(prefix, tensors):
    return {k: v for k, v in tensors.items() if k.startswith(prefix)}


def averages(tensors, factor=1.0):
    """model_ema.*: the tensors of the U-Net, under names without dots."""
    unet = only(UNET, tensors).items()
    return {EMA + k.removeprefix("model.").replace(".", ""): v * factor for k, v in unet}


class ModelCheckpoint:
    """PyTorch does not know it, as it does not know Lightning's class of this name."""


def save_ckpt(tensors, path):
    """A .ckpt as Lightning writes it: weights beside other objects."""
    callback = ModelCheckpoint()
    callback.path, callback.score = Path("x"), torch.tensor(0.5).numpy()[()]
    callbacks = {ModelCheckpoint: {"best_model_score": callback}}
    adam = {"state": {0: {"exp_avg": torch.ones(3), "step": 7}}, "param_groups": [{"lr": 1e-4}]}
    content = {"callbacks": callbacks, "state_dict": tensors, "optimizer_states": [adam]}
    torch.save(content, path)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Work in an empty folder, with presets of the golden networks' sizes."""
    monkeypatch.setattr(converter, "PRESETS", TINY)
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    converter.main(converter.parse_args([str(argument) for argument in arguments]))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def check_outputs(model, unet, expected, vae="vae-tiny"):
    """The networks compute what the public code computed: the goldens of these names."""
    g, v = golden(unet)[1], golden(vae)[1]
    close(model.unet(torch.cat([g["z_t"], g["z_c"]], 1), g["t"]), g[expected])
    mean = model.vae.encode(v["image"])[0]
    close(mean, v["moments_mean"])
    close(model.vae.decode(mean), v["decode_of_mean"])


# ---- names ----


@pytest.mark.parametrize(
    "preset, kind",
    [("sd-v1", "plain"), ("sd-v1", "ema"), ("ldm-kl-8", "plain"), ("ldm-kl-8", "published")],
)
def test_full_size_names_are_all_used_and_none_invented(preset, kind):
    """At full size every public tensor finds its place, and every place its tensor."""
    unet = full_size(f"unet-{preset}", "state_dict")
    tensors = unet | full_size("vae-kl-f8", "first_stage_model")
    if kind == "ema":
        tensors = converter.swap_averages(tensors | averages(unet))
    if kind == "published":
        tensors[CONV_IN] = unet[CONV_IN].repeat(1, 2, 1, 1)
        tensors |= full_size("vae-kl-f8", "cond_stage_model")
    weights, left = converter.convert(tensors, PRESETS[preset])
    assert left.keys() == (averages(unet).keys() if kind == "ema" else set())
    ours = build_empty(PRESETS[preset], "").state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("part", ["unet", "vae", "old vae"])
def test_full_size_names_of_diffusers(part):
    """diffusers names, new and old, become exactly the CompVis names of the same shapes."""
    tensors = full_size("diffusers-sd-v1", part.removeprefix("old "))
    renamed = compvis_names(with_old_names(tensors) if part == "old vae" else tensors)
    if part == "unet":
        public = full_size("unet-sd-v1", "state_dict")
    else:  # LDM's kl-f8 has no prefix
        public = full_size("vae-kl-f8", "first_stage_model")
        public = {name.removeprefix(VAE): value for name, value in public.items()}
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in public.items()}


# ---- numbers ----


@pytest.mark.parametrize(
    "family, write, name",
    [
        ("sd", save_ckpt, "a.ckpt"),
        ("ldm", save_ckpt, "b.safetensors"),  # its content tells what a source is, not its name
        ("ldm", save_file, "c.ckpt"),
    ],
)
@torch.no_grad()
def test_checkpoints_give_the_reference_outputs(tiny, family, write, name):
    """The converted model computes what the original does, whatever kind of file it came in."""
    write(compvis(family), name)
    run(name, "--out", "out.safetensors")
    model, image = SDSeg.load("out.safetensors"), golden("vae-tiny")[1]["image"]
    check_outputs(model, f"unet-{family}-tiny", "eps_zero_init")
    assert torch.equal(model.tau(image), model.vae.encode(image)[0])
    assert model.config == TINY["sd-v1" if family == "sd" else "ldm-kl-8"]


def test_ema_and_half(tiny, capsys):
    """--ema takes the averages, the default does not; --half halves the file."""
    plain = compvis("ldm")
    save_ckpt({"state_dict": plain | averages(plain, 2.0)}, "model.ckpt")  # may be wrapped twice
    for out, *flags in (["plain"], ["ema", "--ema"], ["half", "--half"]):
        run("model.ckpt", "--out", f"{out}.safetensors", *flags)
    name, public = "unet.out.2.bias", plain[BIAS]
    for out, expected in (("plain", public), ("ema", 2 * public), ("half", public.half())):
        assert torch.equal(load_file(f"{out}.safetensors")[name], expected)
    whole, half = (Path(f"{out}.safetensors").stat().st_size for out in ("plain", "half"))
    assert half < 0.55 * whole
    printed = capsys.readouterr().out
    for row in ("loaded   averaged", "zeroed   4 new", "ignored  averaged", "ignored  optimiser"):
        assert row in printed


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("family", ["sd", "ldm"])
def test_an_autoencoder_beside_a_checkpoint_replaces_its_own(tiny, capsys, family, order):
    """kl-f8 (bare names, a loss), or a diffusers VAE, gives the autoencoder, in any order."""
    tensors = compvis(family)
    bare = {k.removeprefix(VAE): v for k, v in only(VAE, tensors).items()}
    vae = diffusers("vae") if family == "sd" else bare | {"loss.logvar": torch.ones(1)}
    zeros = {k: torch.zeros_like(v) for k, v in only(VAE, tensors).items()}
    torch.save(vae, "vae")
    torch.save(tensors | zeros, "unet")
    run(*["vae", "unet"][::order], "--out", "out.safetensors")
    model, file = SDSeg.load("out.safetensors"), {"sd": "diffusers-tiny", "ldm": "vae-tiny"}[family]
    check_outputs(model, f"unet-{family}-tiny", "eps_zero_init", file)
    printed = capsys.readouterr().out
    assert "ignored  given twice " in printed
    assert ("ignored  autoencoder's loss " in printed) == (family == "ldm")


@torch.no_grad()
def test_published_run_keeps_its_encoder_and_scales(tiny):
    """A run of the published code: 8 channels, its own tau, its scale of masks, z_c unscaled."""
    save_ckpt(published(), "last.ckpt")
    run("last.ckpt")
    model, g = SDSeg.load("weights/sdseg-last.safetensors"), golden("vae-tiny")[1]
    check_outputs(model, "unet-ldm-tiny", "eps")
    close(model.encode_image(g["image"]), g["sdseg_condition"])
    assert model.config.mask_scale == pytest.approx(0.1145) and model.config.image_scale == 1
    assert (model.config.beta_start, model.config.beta_end) == (0.0015, 0.0155)


@pytest.mark.parametrize("ending", ["safetensors", "fp16.safetensors", "bin", "fp16.bin"])
def test_diffusers_folder_gives_the_reference_outputs(tmp_path, ending):
    """A diffusers folder: .safetensors with new names, .bin with old ones, in 32 or 16 bits."""
    for part in ("unet", "vae"):
        tensors = diffusers(part, old_names=part == "vae" and ending.endswith("bin"))
        if ending.startswith("fp16"):
            tensors = {k: v.half() for k, v in tensors.items()}
        (tmp_path / part).mkdir()
        write = torch.save if ending.endswith("bin") else save_file
        write(tensors, tmp_path / part / f"diffusion_pytorch_model.{ending}")
    weights, _ = converter.convert(converter.read_source(tmp_path), TINY["sd-v1"])
    assert torch.equal(weights["vae.quant_conv.bias"], tensors["quant_conv.bias"])
    if not ending.startswith("fp16"):
        model = SDSeg(TINY["sd-v1"])
        model.load_state_dict(weights)
        check_outputs(model, "diffusers-tiny", "eps_without_cross_attention", "diffusers-tiny")


# ---- pickles are not run ----


class Call:
    """An object that is pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = [
    (eval, "open('EXECUTED', 'w')"),
    (exec, "open('EXECUTED', 'w')"),
    (subprocess.call, ["touch", "EXECUTED"]),
    (open, "EXECUTED", "w"),
    (importlib.import_module, "attack"),
    (os.system, "touch EXECUTED"),  # PyTorch refuses every function of os
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack[0].__name__)
def test_a_malicious_pickle_has_no_effect(tmp_path, monkeypatch, attack, protocol):
    """What a pickle wants to call is not called; the weights beside it are read, or nothing is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("attack.py").write_text("open('EXECUTED', 'w')")
    content = {"state_dict": {"a": torch.arange(6.0)}, "x": Call(*attack)}
    torch.save(content, "attack.ckpt", pickle_protocol=protocol)
    if protocol == 4 or attack[0] is os.system:
        with pytest.raises(UserError, match="attack.ckpt: .* could run programs"):
            read_tensors("attack.ckpt")
    else:
        tensors = read_tensors("attack.ckpt")
        assert list(tensors) == ["a"] and torch.equal(tensors["a"], torch.arange(6.0))
    assert not Path("EXECUTED").exists()
    sys.modules.pop("attack", None)
    torch.load("attack.ckpt", weights_only=False)
    assert Path("EXECUTED").exists(), "the attack was no attack"


def test_a_class_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    """Reading an object of a module that is installed does not load the module."""
    (tmp_path / "foreign.py").write_text("class Thing: pass")
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("foreign").Thing()
    torch.save({"a": torch.ones(1), "thing": thing}, tmp_path / "x.ckpt")
    del sys.modules["foreign"]
    assert list(read_tensors(tmp_path / "x.ckpt")) == ["a"] and "foreign" not in sys.modules


# ---- refusals ----


def big(name=None, shape=None, preset="sd-v1"):
    """A full-size checkpoint on little disk, each tensor one number; one may have another shape."""
    tensors = full_size(f"unet-{preset}", "state_dict")
    tensors |= full_size("vae-kl-f8", "first_stage_model")
    shapes = {k: v.shape for k, v in tensors.items()} | {name: shape}
    return {k: torch.zeros(()).expand(v) for k, v in shapes.items() if v is not None}


def with_type(dtype):
    return big() | {BIAS: torch.zeros(4, dtype=dtype)}


MODELS = {  # what is wrong: the checkpoint, what the refusal says
    "SD 2": (lambda: big(CONTEXT, [320, 1024]), "Stable Diffusion 2.x"),
    "inpainting": (lambda: big(CONV_IN, [320, 9, 3, 3]), "an inpainting model"),
    "edit": (lambda: big(CONV_IN, [320, 8, 3, 3]), "is [320, 8, 3, 3]"),
    "no channels": (lambda: big(CONV_IN, [320]), "is [320]"),
    "SDXL": (lambda: dict.fromkeys([CONV_IN, "conditioner.a"], torch.ones(1)), "XL"),
    "unknown": (lambda: {CONV_IN: torch.ones(1)}, "unknown family"),
    "missing": (lambda: big(BIAS, None), "missing unet.out.2.bias"),
    "misshapen": (lambda: big(BIAS, [7], "ldm-kl-8"), "unet.out.2.bias is [7], not [4]"),
    "huge": (lambda: big(CONV_IN, [2**40, 4, 3, 3]), "is [1099511627776, 8, 3, 3], not [320"),
    "no dimension": (lambda: big(VAE + "quant_conv.bias", []), "vae.quant_conv.bias is [], not"),
    "extra": (lambda: big() | {VAE + "x": torch.ones(1)}, "unexpected vae.x"),
    "no autoencoder": (lambda: only(UNET, big(preset="ldm-kl-8")), "without autoencoder"),
    "no U-Net": (lambda: only(VAE, big()), "give a Stable Diffusion v1 checkpoint, or LDM's"),
    "diffusers VAE": (lambda: diffusers("vae"), "an autoencoder without U-Net"),
    "another model": (lambda: {"layer.weight": torch.ones(3)}, "no U-Net"),
    "nothing": (dict, "no tensors"),
    "integers": (lambda: with_type(torch.int32), "out.2.bias is torch.int32"),
    "float8": (lambda: with_type(torch.float8_e4m3fn), "float8_e4m3fn; give a file of 16-bit"),
    "no scale": (lambda: published(scale_factor=0.1145), "scale_factor"),
    "scale of zero": (lambda: published(scale_factor=torch.tensor(0.0)), "scale_factor"),
    "scale not finite": (lambda: published(scale_factor=torch.tensor(torch.nan)), "scale_factor"),
    "two scales": (lambda: published(scale_factor=torch.ones(2)), "scale_factor"),
    "ours": (lambda: {"unet.input_blocks.0.0.weight": torch.ones(1)}, "converted already"),
}


def check_refusal(capsys, says, *arguments):
    """One line on stderr, exit status 2, nothing else printed, nothing written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run(*arguments))
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error, error
    assert sorted(Path().rglob("*")) == before and not printed


def test_arguments_that_cannot_be(tmp_path, capsys, monkeypatch):
    """--ema without averages; --out that is the source, or no .safetensors; no such source."""
    monkeypatch.chdir(tmp_path)
    torch.save(big(), "model.safetensors")
    Path("unet").mkdir()
    Path("unet", "diffusion_pytorch_model.bin").write_bytes(b"x")
    check_refusal(capsys, "no averaged U-Net", "model.safetensors", "--ema")
    check_refusal(capsys, "is the source", "model.safetensors", "--out", "./model.safetensors")
    check_refusal(capsys, "ends in .safetensors", "model.safetensors", "--out", "model.ckpt")
    check_refusal(capsys, "nowhere.ckpt: no such file", "nowhere.ckpt")
    check_refusal(capsys, "no vae/diffusion_pytorch_model", ".")
    check_refusal(capsys, "no unet/diffusion_pytorch_model", "unet")


# ---- damaged files ----


def zip_of(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def ckpt(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_count(count):
    """A .ckpt of 70,001 numbers that claims to have `count` of them."""
    archive = zipfile.ZipFile(io.BytesIO(ckpt({"a": torch.zeros(70001)})))
    members = {name: archive.read(name) for name in archive.namelist()}
    true, claimed = (b"J" + struct.pack("<i", n) for n in (70001, count))
    assert members["archive/data.pkl"].count(true) == 2  # the storage, and the tensor's shape
    members["archive/data.pkl"] = members["archive/data.pkl"].replace(true, claimed)
    return zip_of(members)


def with_shape(shape, stride=(1,), offset=0):
    """A .ckpt that claims a tensor of any shape, in a storage of four numbers."""
    storage, hooks = torch.zeros(4)._typed_storage(), collections.OrderedDict()
    args = storage, offset, shape, stride, False, hooks
    return ckpt({"a": Call(torch._utils._rebuild_tensor_v2, *args)})


def with_member_size(size):
    """A .ckpt whose directory claims that its first member has so many bytes."""
    content = bytearray(WHOLE)
    entry = content.index(b"PK\1\2")
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    return bytes(content)


WHOLE = ckpt({"a": torch.zeros(4)})
FILES = {
    "empty": (b"", "empty"),
    "text": (b"hello\n" * 200, "a text file"),
    "web page": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
    "old format": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "before 1.6"),
    "other zip": (zip_of({"model.ckpt": b"x"}, zipfile.ZIP_DEFLATED), "unpack it"),
    "foreign dict": (ckpt({"a": collections.defaultdict(int, b=1)}), "damaged"),
    "cut in half": (WHOLE[: len(WHOLE) // 2], "truncated or damaged"),
    "cut by a byte": (WHOLE[:-1], "truncated or damaged"),
    "count absurd": (with_count(2**31 - 1), "truncated or damaged"),
    "count negative": (with_count(-1), "truncated or damaged"),
    "shape too large": (with_shape((5,)), "truncated or damaged"),
    "shape absurd": (with_shape((2**62, 8), (0, 0)), "truncated or damaged"),
    "offset outside": (with_shape((4,), offset=2**40), "truncated or damaged"),
    "offset negative": (with_shape((4,), offset=-2), "truncated or damaged"),
    "zip bomb": (zip_of({"a/data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED), "is compressed"),
    "member absurd": (with_member_size(2**31), "claims more bytes than the file has"),
    "header absurd": (struct.pack("<Q", 2**62) + save({"x": torch.zeros(4)})[8:], "damaged"),
    "numbers missing": (save({"x": torch.zeros(4)})[:-1], "damaged"),
}


@pytest.mark.parametrize("case", [*MODELS, *FILES])
def test_sources_that_are_refused(tmp_path, capsys, monkeypatch, case):
    """A foreign model, a tensor that does not fit, a damaged file: one line says what is wrong."""
    monkeypatch.chdir(tmp_path)
    content, says = (MODELS | FILES)[case]
    content = content if isinstance(content, bytes) else ckpt({"state_dict": content()})
    Path("model.ckpt").write_bytes(content)
    check_refusal(capsys, says, "model.ckpt")


READ = """
import resource, sys
from support.ckpt import read_tensors
from support.cli import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = {}
for path in sys.argv[1:]:
    try:
        tensors |= read_tensors(path)
    except UserError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(tensors))
"""


def test_reading_takes_no_memory(tmp_path):
    """Two files of 100 MB are mapped, and no lie about a size in the files above takes memory."""
    for write, name in ((torch.save, "a"), (save_file, "b")):
        write({f"{name}{i}": torch.zeros(5_000_000) for i in range(5)}, tmp_path / name)
    for case, (content, _) in FILES.items():
        (tmp_path / case).write_bytes(content)
    command = [sys.executable, "-c", READ, *tmp_path.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes, count = map(int, done.stdout.split())
    assert count == 10 and kilobytes < 20_000


def damaged(content, rng):
    """Change, cut out, repeat or replace bytes, most often where the structure is."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i = rng.choice([rng.randrange(len(content)), rng.randrange(min(2000, len(content)))])
        n = rng.randint(1, 40)
        new = rng.choice([b"", bytes(1), b"\xff", rng.randbytes(8), content[i : i + n] * 2])
        content[i : i + (n if new == b"" else len(new))] = new
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_refused(tmp_path):
    """Of files damaged at random each is read or refused: no traceback, no hang, no crash."""
    rng, refused = random.Random(0), 0
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.randn(3, 2)}
    seeds = [ckpt({"state_dict": tensors, "path": Path("x")}), ckpt(tensors), save(tensors)]
    for i in range(FUZZ):
        (tmp_path / "x").write_bytes(damaged(seeds[i % 3], rng))
        try:
            assert all(torch.is_tensor(t.clone()) for t in read_tensors(tmp_path / "x").values())
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert FUZZ // 10 < refused < FUZZ
