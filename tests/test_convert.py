"""The converter: public names and numbers in, ours out, and nothing run on the way."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import golden, golden_weights
from safetensors.torch import save, save_file

import convert_sd_weights as converter
from common import Refusal, run
from convert_sd_weights import CONV_IN, EMA, TAU, UNET, VAE, convert, unet_name, vae_name
from sdseg import PRESETS, SDSeg
from unet import UNetConfig
from unpickle import read_tensors
from vae import VAEConfig

VAE_TINY = VAEConfig(32, (1, 2, 2), 1)
SD_TINY = replace(
    PRESETS["sd-v1"],
    vae=VAE_TINY,
    unet=UNetConfig("sd", 8, 4, 32, (1, 2, 4, 4), 2, (1, 2, 4), 8, 48),
)
LDM_TINY = replace(
    PRESETS["ldm-kl-8"],
    vae=VAE_TINY,
    unet=UNetConfig("ldm", 8, 4, 32, (1, 2, 4), 2, (1, 2, 4), 8, None),
)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
MARKER = "EXECUTED"
FUZZ = int(os.environ.get("FUZZ", 600))  # damaged files to try; more by hand


def shapes(file, part):
    """A full-size manifest as tensors without memory; the first convolution as public: 4 wide."""
    manifest = json.loads((Path(__file__).parent / "formats" / f"{file}.json").read_text())[part]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    return {k: v[:, :4] if k.endswith((CONV_IN, "conv_in.weight")) and v.shape[1] == 8 else v
            for k, v in tensors.items()}  # fmt: skip


def compvis(family):
    """The golden weights in the public layout of a family: full names, 4 input channels."""
    unet = golden_weights(golden(f"unet-{family}-tiny")[0]["state_dict"], UNET, strip=False)
    unet[UNET + CONV_IN] = unet[UNET + CONV_IN][:, :4].clone()
    return unet | golden_weights(golden("vae-tiny")[0]["first_stage_model"], VAE, strip=False)


def published():
    """The golden weights as the published SDSeg saves a run."""
    tensors = compvis("ldm") | golden_weights(
        golden("vae-tiny")[0]["cond_stage_model"], TAU, strip=False
    )
    manifest = golden("unet-ldm-tiny")[0]["state_dict"]
    tensors[UNET + CONV_IN] = golden_weights(manifest, UNET, strip=False)[UNET + CONV_IN]
    buffers = {"scale_factor": torch.tensor(0.1145), "betas": torch.tensor([0.0015, 0.0155])}
    return tensors | buffers


def averaged(tensors, factor=1.0):
    """model_ema.*: the U-Net's tensors under names that lost their dots."""
    return {EMA + k.removeprefix("model.").replace(".", ""): v * factor
            for k, v in tensors.items() if k.startswith(UNET)}  # fmt: skip


def junk():
    """What public checkpoints hold beside the weights."""
    return {
        TAU + "transformer.text_model.final_layer_norm.weight": torch.ones(768),
        "alphas_cumprod": torch.ones(1000),
        EMA + "decay": torch.tensor(0.9999),
    }


def save_ckpt(path, tensors, twice=False):
    """A .ckpt with the weights under "state_dict" beside objects of a class that is not there."""
    packages = ["lightning", "lightning.callbacks", "lightning.callbacks.model_checkpoint"]
    sys.modules.update({name: types.ModuleType(name) for name in packages})
    callback = type("ModelCheckpoint", (), {"__module__": packages[-1]})
    sys.modules[packages[-1]].ModelCheckpoint = callback
    instance = callback()
    instance.best, instance.score = Path("x"), torch.tensor(0.5)
    adam = {"state": {0: {"exp_avg": torch.ones(3), "step": 7}}, "param_groups": [{"lr": 1e-4}]}
    content = {
        "callbacks": {callback: {"best_model_score": instance}},
        "state_dict": {"state_dict": tensors} if twice else tensors,
        "optimizer_states": [adam],
        "global_step": 470000,
    }
    torch.save(content, path)
    for name in packages:
        del sys.modules[name]
    return path


def run_main(monkeypatch, *arguments):
    """The whole program, with presets of the golden networks' sizes."""
    monkeypatch.setattr(converter, "PRESETS", {"sd-v1": SD_TINY, "ldm-kl-8": LDM_TINY})
    return converter.main(converter.parse([str(a) for a in arguments]))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def check_outputs(model, g, expected):
    x = torch.cat([g["z_t"], g["z_c"]], 1)
    close(model.unet(x, g["t"]), g[expected])
    images = g if "image" in g else golden("vae-tiny")[1]
    mean = model.vae.encode(images["image"])[0]
    close(mean, images["moments_mean"])
    close(model.vae.decode(mean), images["decode_of_mean"])
    return images


# ---- names ----


@pytest.mark.parametrize("preset, unet", [("sd-v1", "unet-sd-v1"), ("ldm-kl-8", "unet-ldm-kl-8")])
@pytest.mark.parametrize("ema", [False, True])
def test_full_size_names_are_all_used_and_none_invented(preset, unet, ema):
    """At full size every public tensor finds its place, and every place its tensor."""
    plain = shapes(unet, "state_dict")
    tensors = plain | shapes("vae-kl-f8", "first_stage_model") | (averaged(plain) if ema else {})
    weights, used = convert(tensors, PRESETS[preset], ema)
    assert used == set(tensors) - (set(plain) if ema else set())
    expected = converter.build(PRESETS[preset], "").state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}


def test_full_size_names_of_the_published_code():
    """Its vision encoder, too, is consumed whole."""
    tensors = shapes("unet-ldm-kl-8", "state_dict") | shapes("vae-kl-f8", "first_stage_model")
    tensors[UNET + CONV_IN] = torch.empty(192, 8, 3, 3, device="meta")
    tensors |= shapes("vae-kl-f8", "cond_stage_model")
    assert convert(tensors, PRESETS["ldm-kl-8"])[1] == set(tensors)


@pytest.mark.parametrize("old", [False, True])
def test_full_size_names_of_diffusers(old):
    """diffusers names, new and old, become exactly the CompVis names of the same shapes."""
    vae = shapes("diffusers-sd-v1", "vae")
    for new_name, old_name in OLD_NAMES.items() if old else ():
        vae = {k.replace(f".{new_name}.", f".{old_name}."): v for k, v in vae.items()}
    vae = {VAE + vae_name(k, 4): v for k, v in vae.items()}
    unet = {UNET + unet_name(k): v for k, v in shapes("diffusers-sd-v1", "unet").items()}
    public = shapes("vae-kl-f8", "first_stage_model") | shapes("unet-sd-v1", "state_dict")
    assert {k: v.numel() for k, v in (vae | unet).items()} == {
        k: v.numel() for k, v in public.items()
    }


# ---- numbers ----


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("family", ["sd", "ldm"])
def test_ckpt_gives_the_reference_outputs(tmp_path, monkeypatch, capsys, family, twice):
    """A .ckpt with foreign classes: the converted model computes what the original does."""
    source = save_ckpt(tmp_path / "model.ckpt", compvis(family) | junk(), twice)
    run_main(monkeypatch, source, "--out", tmp_path / "out.safetensors")
    model = SDSeg.load(tmp_path / "out.safetensors")
    images = check_outputs(model, golden(f"unet-{family}-tiny")[1], "eps_zero_init")
    with torch.no_grad():
        assert torch.equal(model.tau(images["image"]), model.vae.encode(images["image"])[0])
    assert model.config == (SD_TINY if family == "sd" else LDM_TINY)
    printed = capsys.readouterr().out
    for words in ("ignored  optimiser ", "ignored  text encoder ", "zeroed   4 new input channels"):
        assert words in printed


def test_safetensors_equals_ckpt(tmp_path, monkeypatch):
    """The same weights give the same tensors, whichever kind of file they come in."""
    save_file(compvis("sd"), tmp_path / "a.ckpt")  # content tells what a file is, not its name
    torch.save(compvis("sd"), tmp_path / "b.safetensors")
    results = []
    for source in ("a.ckpt", "b.safetensors"):
        run_main(monkeypatch, tmp_path / source, "--out", tmp_path / "out.safetensors")
        results.append(read_tensors(tmp_path / "out.safetensors"))
    a, b = results
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ema_and_half(tmp_path, monkeypatch):
    """--ema takes the averages, the default does not; --half halves the file."""
    plain = compvis("ldm")
    source = save_ckpt(tmp_path / "model.ckpt", plain | averaged(plain, 2.0))
    files = {}
    for flags in ((), ("--ema",), ("--half",)):
        out = tmp_path / f"out{len(files)}.safetensors"
        run_main(monkeypatch, source, "--out", out, *flags)
        files[flags] = read_tensors(out), out.stat().st_size
    name = "unet.middle_block.0.in_layers.2.weight"
    public = plain[UNET + "middle_block.0.in_layers.2.weight"]
    assert torch.equal(files[()][0][name], public)
    assert torch.equal(files[("--ema",)][0][name], 2 * public)
    assert torch.equal(files[("--half",)][0][name], public.half())
    assert files[("--half",)][1] < 0.55 * files[()][1]


@pytest.mark.parametrize("swapped", [False, True])
def test_ldm_pair_in_any_order(tmp_path, monkeypatch, capsys, swapped):
    """kl-f8 (bare names, a loss) gives the autoencoder, lsun_churches the U-Net."""
    tensors = compvis("ldm")
    unet = {k: v for k, v in tensors.items() if k.startswith(UNET)}
    vae = {k.removeprefix(VAE): v for k, v in tensors.items() if k.startswith(VAE)}
    other = {VAE + k: torch.zeros_like(v) for k, v in vae.items()}
    files = [
        save_ckpt(tmp_path / "kl-f8.ckpt", vae | {"loss.logvar": torch.zeros(1)}),
        save_ckpt(tmp_path / "lsun.ckpt", unet | other | {"scale_factor": torch.tensor(0.2)}),
    ]
    run_main(monkeypatch, *files[:: -1 if swapped else 1], "--out", tmp_path / "o.safetensors")
    model = SDSeg.load(tmp_path / "o.safetensors")
    check_outputs(model, golden("unet-ldm-tiny")[1], "eps_zero_init")
    assert model.config == LDM_TINY
    assert "ignored  autoencoder's loss " in capsys.readouterr().out


@torch.no_grad()
def test_published_run_keeps_its_encoder_and_scales(tmp_path, monkeypatch):
    """A run of the published code: 8 channels, its own tau, its scale of masks, z_c unscaled."""
    source = save_ckpt(tmp_path / "last.ckpt", published())
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, source)
    model = SDSeg.load("weights/sdseg-last.safetensors")
    images = check_outputs(model, golden("unet-ldm-tiny")[1], "eps")
    close(model.condition(images["image"]), images["sdseg_condition"])
    assert model.config.mask_scale == pytest.approx(0.1145) and model.config.image_scale == 1
    assert (model.config.beta_start, model.config.beta_end) == (0.0015, 0.0155)


@pytest.mark.parametrize("files", ["new", "old", "fp16", "bin"])
def test_diffusers_folder_gives_the_reference_outputs(tmp_path, files):
    """A diffusers folder, with new and old attention names, half precision, or pickles."""
    manifest, g = golden("diffusers-tiny")
    vae, unet = golden_weights(manifest["vae"], "vae."), golden_weights(manifest["unet"], "unet.")
    for new_name, old_name in OLD_NAMES.items() if files == "old" else ():
        vae = {k.replace(f".{new_name}.", f".{old_name}."): v for k, v in vae.items()}
    for part, tensors in (("vae", vae), ("unet", unet)):
        (tmp_path / part).mkdir()
        path = tmp_path / part / "diffusion_pytorch_model"
        if files == "bin":
            torch.save(tensors, f"{path}.bin")
        elif files == "fp16":
            save_file({k: v.half() for k, v in tensors.items()}, f"{path}.fp16.safetensors")
        else:
            save_file(tensors, f"{path}.safetensors")
    weights, _ = convert(converter.read_source(tmp_path), SD_TINY)
    model = SDSeg(SD_TINY)
    model.load_state_dict(weights)
    if files == "fp16":
        first = "unet.input_blocks.0.0.weight"
        assert torch.equal(weights[first], unet["conv_in.weight"].half())
    else:
        check_outputs(model, g, "eps_without_cross_attention")


# ---- pickles are not run ----


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = [
    (os.system, f"touch {MARKER}"),
    (eval, f"open('{MARKER}', 'w')"),
    (exec, f"open('{MARKER}', 'w')"),
    (subprocess.call, ["touch", MARKER]),
    (open, MARKER, "w"),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a[0].__name__)
def test_a_malicious_pickle_has_no_effect(tmp_path, monkeypatch, attack, protocol):
    """What a pickle wants to call is not called, while the weights beside it are read."""
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.arange(6.0).view(2, 3)}, "x": Attack(*attack)}
    torch.save(content, "attack.ckpt", pickle_protocol=protocol)
    tensors = read_tensors("attack.ckpt")
    assert list(tensors) == ["a"] and torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert not Path(MARKER).exists()
    torch.load("attack.ckpt", weights_only=False)
    assert Path(MARKER).exists(), "the attack was no attack"


def test_views_and_types_survive(tmp_path):
    """Transposed, sliced, shared, empty and non-float tensors come back as torch.load has them."""
    base = torch.randn(4, 6)
    content = {
        "t": base.t(), "slice": base[1:3, ::2], "base": base, "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3), "half": base.half(), "bf16": base.bfloat16(),
        "bool": base > 0, "parameter": torch.nn.Parameter(base), "f64": base.double(),
    }  # fmt: skip
    for protocol in (2, 4):
        torch.save(content, tmp_path / "x.ckpt", pickle_protocol=protocol)
        tensors = read_tensors(tmp_path / "x.ckpt")
        assert set(tensors) == set(content)
        for name, tensor in content.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


# ---- refusals ----


def full_size(family="sd", **changes):
    """A full-size checkpoint that takes no space: every tensor is one number, repeated."""
    unet = shapes(f"unet-{'sd-v1' if family == 'sd' else 'ldm-kl-8'}", "state_dict")
    names = {k: list(v.shape) for k, v in (unet | shapes("vae-kl-f8", "first_stage_model")).items()}
    names = {k: changes.get(k.removeprefix(UNET), v) for k, v in names.items()}
    return {k: torch.zeros(1).expand(v) for k, v in names.items() if v is not None}


def unet_only(tensors):
    return {k: v for k, v in tensors.items() if k.startswith(UNET)}


def autoencoder_only(tensors):
    return {k: v for k, v in tensors.items() if k.startswith(VAE)}


TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
MODELS = {  # what is wrong, the checkpoint, what the refusal says
    "SD 2": (lambda: full_size(**{TO_K: [320, 1024]}), "Stable Diffusion 2.x"),
    "SDXL": (lambda: full_size() | {UNET + "label_emb.0.0.weight": torch.ones(1)}, "Diffusion XL"),
    "inpainting": (lambda: full_size(**{CONV_IN: [320, 9, 3, 3]}), "inpainting model"),
    "edit": (lambda: full_size(**{CONV_IN: [320, 8, 3, 3]}), "8 input channels"),
    "missing": (lambda: full_size(**{"out.2.bias": None}), "out.2.bias is missing"),
    "misshapen": (lambda: full_size("ldm", **{"out.2.bias": [7]}), "out.2.bias is [7]"),
    "huge": (lambda: full_size(**{CONV_IN: [2**40, 4, 3, 3]}), f"{CONV_IN} is [1099511627776, 4"),
    "extra": (
        lambda: full_size() | {VAE + "x": torch.ones(1)},
        "first_stage_model.x is unexpected",
    ),
    "no autoencoder": (lambda: unet_only(full_size("ldm")), "without autoencoder"),
    "no U-Net": (lambda: autoencoder_only(full_size()), "without U-Net"),
    "another model": (lambda: {"layer.weight": torch.ones(3)}, "no U-Net"),
    "nothing": (dict, "no tensors"),
    "integers": (
        lambda: full_size() | {UNET + "out.2.bias": torch.zeros(4, dtype=torch.int64)},
        "out.2.bias is [4] torch.int64",
    ),
    "converted already": (lambda: {"unet." + CONV_IN: torch.ones(1)}, "converted already"),
}


def check_refusal(capsys, tmp_path, says, *arguments):
    """One line on stderr with what is wrong, exit 2, and nothing written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(lambda: converter.main(converter.parse([str(a) for a in arguments])))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error, error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", MODELS)
def test_models_that_sdseg_cannot_start_from(tmp_path, capsys, monkeypatch, case):
    """Another model, or a tensor that does not fit, is named in one line; nothing is written."""
    monkeypatch.chdir(tmp_path)
    make, says = MODELS[case]
    torch.save({"state_dict": make()}, "model.ckpt")
    check_refusal(capsys, tmp_path, says, "model.ckpt")


def test_a_run_of_the_published_code_without_scale(tmp_path, monkeypatch):
    """Without its scale of mask latents, or with one of zero, a run cannot be used."""
    for scale in (None, torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(3)):
        tensors = published() | {"scale_factor": scale}
        with pytest.raises(Refusal, match="scale_factor"):
            converter.identify({k: v for k, v in tensors.items() if v is not None})


def test_ema_where_there_is_none(tmp_path, capsys, monkeypatch):
    """--ema on a file without averages is refused, not quietly ignored."""
    monkeypatch.chdir(tmp_path)
    torch.save(full_size(), "model.ckpt")
    check_refusal(capsys, tmp_path, "no averaged U-Net", "model.ckpt", "--ema")


def test_the_source_is_never_overwritten(tmp_path, capsys, monkeypatch):
    """--out may not be the source, and has to be a .safetensors."""
    monkeypatch.chdir(tmp_path)
    torch.save(full_size(), "model.safetensors")
    source = "model.safetensors"
    check_refusal(capsys, tmp_path, "this is the source", source, "--out", f"./{source}")
    check_refusal(capsys, tmp_path, "ends in .safetensors", source, "--out", "model.ckpt")


def zip_of(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pickle_of_tensor(count=4, size=(4,), stride=(1,), offset=0, key="0"):
    """What torch.save would pickle for a tensor, with any claim about its size."""

    def plain(value):
        if isinstance(value, tuple):
            return b"(" + b"".join(map(plain, value)) + b"t"
        return f"V{value}\n".encode() if isinstance(value, str) else f"L{value}L\n".encode()

    storage = b"(Vstorage\nctorch\nFloatStorage\n" + plain(key) + b"Vcpu\n" + plain(count) + b"tQ"
    tensor = plain(offset) + plain(size) + plain(stride) + b"I00\nNtR."
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + tensor


def ckpt_bytes(data=bytes(16), **claims):
    return zip_of({"archive/data.pkl": pickle_of_tensor(**claims), "archive/data/0": data})


def safetensors_bytes(header, numbers=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def entry(shape, start, end, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


WHOLE = ckpt_bytes()
MEMO_BOMB = b"\x80\x02Nr\xff\xff\xff\x7f."  # puts None into slot 2**31 - 1
FILES = {
    "empty": (b"", "empty"),
    "text": (b"hello\n" * 200, "a text file"),
    "web page": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
    "old format": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "before 1.6"),
    "other zip": (zip_of({"model.ckpt": b"x"}), "unpack it"),
    "cut in half": (WHOLE[: len(WHOLE) // 2], "truncated or damaged"),
    "cut by a byte": (WHOLE[:-1], "truncated or damaged"),
    "storage missing": (ckpt_bytes(key="7"), "truncated or damaged"),
    "storage too short": (ckpt_bytes(count=5), "truncated or damaged"),
    "storage absurd": (ckpt_bytes(count=2**60), "truncated or damaged"),
    "storage negative": (ckpt_bytes(count=-1), "truncated or damaged"),
    "tensor too large": (ckpt_bytes(size=(5,)), "truncated or damaged"),
    "tensor absurd": (ckpt_bytes(size=(2**62, 8), stride=(0, 0)), "truncated or damaged"),
    "offset outside": (ckpt_bytes(offset=2**40), "truncated or damaged"),
    "offset negative": (ckpt_bytes(offset=-2), "truncated or damaged"),
    "memo bomb": (zip_of({"a/data.pkl": MEMO_BOMB}), "no tensors"),
    "bytes bomb": (zip_of({"a/data.pkl": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f."}), "damaged"),
    "zip bomb": (
        zip_of({"a/data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED),
        "a/data.pkl is compressed",
    ),
    "header too long": (safetensors_bytes(entry([4], 0, 16), length=2**62), "damaged"),
    "header cut": (safetensors_bytes(entry([4], 0, 16))[:30], "damaged"),
    "header not JSON": (safetensors_bytes(b"{" * 64), "damaged"),
    "numbers missing": (safetensors_bytes(entry([400], 0, 1600)), "damaged"),
    "shape absurd": (safetensors_bytes(entry([2**40, 2**40], 0, 16)), "damaged"),
    "offsets reversed": (safetensors_bytes(entry([4], 16, 0)), "damaged"),
    "type unknown": (safetensors_bytes(entry([4], 0, 16, "F33")), "damaged"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_checkpoints(tmp_path, capsys, monkeypatch, case):
    """What is not a whole checkpoint, or lies about sizes, is refused in one line."""
    monkeypatch.chdir(tmp_path)
    content, says = FILES[case]
    Path("model.ckpt").write_bytes(content)
    check_refusal(capsys, tmp_path, says, "model.ckpt")


def test_sources_that_are_not_there(tmp_path, capsys, monkeypatch):
    """A missing file, and folders without a diffusers model, are refused by name."""
    monkeypatch.chdir(tmp_path)
    Path("unet").mkdir()
    (Path("unet") / "diffusion_pytorch_model.bin").write_bytes(WHOLE)
    check_refusal(capsys, tmp_path, "nowhere.ckpt: no such file", "nowhere.ckpt")
    check_refusal(capsys, tmp_path, "no vae/diffusion_pytorch_model", ".")
    check_refusal(capsys, tmp_path, "no unet/diffusion_pytorch_model", "unet")


# ---- memory and damage ----

READ = """
import resource, sys
from unpickle import read_tensors
from common import Refusal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = {}
for path in sys.argv[1:]:
    try:
        tensors |= read_tensors(path)
    except Refusal:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(tensors))
"""


def reading_takes(paths):
    """Megabytes by which a fresh process grows at most while it reads files; tensors it read."""
    command = [sys.executable, "-c", READ, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes, count = map(int, done.stdout.split())
    return kilobytes / 1e3, count


def test_reading_takes_no_memory(tmp_path):
    """Files of 100 MB are mapped: reading costs next to nothing until a tensor is used."""
    for write, name in ((torch.save, "a"), (save_file, "b")):
        write({f"{name}{i}": torch.zeros(5_000_000) for i in range(5)}, tmp_path / name)
    megabytes, count = reading_takes([tmp_path / "a", tmp_path / "b"])
    assert count == 10 and megabytes < 20


def test_lies_about_sizes_take_no_memory(tmp_path):
    """Whatever sizes the broken files above claim, memory is taken for none of them."""
    for i, (content, _) in enumerate(FILES.values()):
        (tmp_path / f"{i:02}").write_bytes(content)
    assert reading_takes(sorted(tmp_path.iterdir()))[0] < 20


def mutated(content, rng):
    """Change, cut out, repeat or append bytes, most often where the structure is."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i = rng.choice([rng.randrange(len(content)), rng.randrange(min(2000, len(content)))])
        kind = rng.randrange(5)
        if kind < 2:
            content[i] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 2:
            del content[i : i + rng.randint(1, 40)]
        elif kind == 3:
            content[i:i] = content[i : i + rng.randint(1, 40)]
        else:
            content[i : i + 8] = rng.getrandbits(64).to_bytes(8, "little")
    return bytes(content)


def fuzz_seeds():
    """Small files of both kinds to damage."""
    tensors = {"state_dict": {"a.weight": torch.randn(3, 4), "b": torch.randn(2, 3).t()}, "n": 3}
    for protocol in (2, 4):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, pickle_protocol=protocol)
        yield buffer.getvalue()
    yield save(tensors["state_dict"] | {"b": torch.randn(3, 2)})


def test_damaged_files_are_read_or_refused(tmp_path):
    """Of files damaged at random each is read or refused: no traceback, no hang, no crash."""
    rng, refused = random.Random(0), 0
    seeds = list(fuzz_seeds())
    for i in range(FUZZ):
        (tmp_path / "x").write_bytes(mutated(seeds[i % len(seeds)], rng))
        try:
            assert all(isinstance(t, torch.Tensor) for t in read_tensors(tmp_path / "x").values())
        except Refusal as error:
            refused += 1
            assert "\n" not in str(error)
    assert FUZZ // 10 < refused < FUZZ
