"""Inference: files in, masks of the files' own size out, and nothing else touched."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from common import Refusal
from sdseg import SDSeg, SDSegConfig
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).parent.parent


def save_model(path, **changes):
    torch.manual_seed(0)
    fields = dict(
        vae=VAEConfig(32, (1, 1, 1, 1), 1),
        unet=UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
        prediction="x0",
        image_size=64,
        data="test",
    )
    model = SDSeg(SDSegConfig(**{**fields, **changes}))
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.3)  # masks that are not all one class
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m.safetensors")


def picture(path, height=70, width=90, seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    image.save(path, **options)
    return path


def segment(*inputs, model, out, **options):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    flags += ["--model", model, "--out", str(out), "--precision", "fp32", "--device", "cpu"]
    return infer.main(infer.parse([*map(str, inputs), *flags]))


def test_mask_and_overlay_have_the_pictures_size(model, tmp_path):
    """A picture of any shape, a name with spaces and Unicode: masks of 0 and 255, its own size."""
    for n, (height, width) in enumerate([(70, 90), (200, 10), (1, 1), (64, 64)]):
        name = f"a b ä{n}"
        picture(tmp_path / f"{name}.png", max(height, 10), max(width, 10))
        assert segment(tmp_path / f"{name}.png", model=model, out=tmp_path / "out") == 0
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png"))
        assert mask.shape == (max(height, 10), max(width, 10)) and set(np.unique(mask)) <= {0, 255}
        overlay = Image.open(tmp_path / "out" / f"{name}_overlay.png")
        assert overlay.size == mask.shape[::-1] and overlay.mode == "RGB"


def test_same_seed_same_bytes(model, tmp_path):
    """Same input and seed: the same bytes. Another seed: another mask of this untrained model."""
    path = picture(tmp_path / "x.png")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        segment(path, model=model, out=tmp_path / out, seed=seed)
    files = [(tmp_path / out / "x_mask.png").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_folder_is_its_files_one_by_one(model, tmp_path):
    """A folder in batches gives the masks of its files alone, to float rounding, sub-folders kept."""
    (tmp_path / "in/sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png", "d_mask.png", ".hidden.png"]):
        picture(tmp_path / "in" / name, 60 + 7 * i, 80, seed=i)
    assert segment(tmp_path / "in", model=model, out=tmp_path / "all", batch_size=2) == 0
    made = {str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*_mask.png")}
    assert made == {"a_mask.png", "b_mask.png", "sub/c_mask.png"}
    for name in ("a.png", "b.jpg", "sub/c.png"):
        segment(tmp_path / "in" / name, model=model, out=tmp_path / "one")
        stem = Path(name).stem
        together = np.asarray(Image.open(tmp_path / "all" / Path(name).parent / f"{stem}_mask.png"))
        alone = np.asarray(Image.open(tmp_path / "one" / f"{stem}_mask.png"))
        assert (together != alone).mean() < 0.001


def test_samples_write_their_deviation(model, tmp_path):
    """--samples 3 averages three runs and writes how much they differ."""
    path = picture(tmp_path / "x.png")
    segment(path, model=model, out=tmp_path / "o", samples=3)
    assert np.asarray(Image.open(tmp_path / "o/x_std.png")).max() > 0


def test_several_classes_are_ids(tmp_path):
    """K = 3: the mask holds class ids, not 255."""
    model = save_model(tmp_path / "m.safetensors", classes=("background", "a", "b"))
    segment(picture(tmp_path / "x.png"), model=model, out=tmp_path / "o")
    assert set(np.unique(np.asarray(Image.open(tmp_path / "o/x_mask.png")))) <= {0, 1, 2}


AFFINES = {
    "RAS": np.diag([1.0, 2.0, 3.0, 1.0]),
    "LPS": np.diag([-1.0, -2.0, 3.0, 1.0]),
    "oblique": nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.2, 0.1, 0.3) @ np.diag([1, 2, 3]), [5, 6, 7]
    ),
}


@pytest.mark.parametrize("name", AFFINES)
def test_volumes_keep_their_place_in_space(name, tmp_path):
    """NIfTI in, NIfTI out: shape, affine, orientation, spacing; integers; and a montage."""
    model = save_model(tmp_path / "m.safetensors", window=(0.0, 255.0))
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 5)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, AFFINES[name]), tmp_path / "scan.nii.gz")
    assert segment(tmp_path / "scan.nii.gz", model=model, out=tmp_path / "o", batch_size=2) == 0
    mask = nib.load(tmp_path / "o/scan_mask.nii.gz")
    assert mask.shape == values.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, AFFINES[name], atol=1e-6)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
    assert Image.open(tmp_path / "o/scan_overlay.png").size[0] % 192 == 0


def test_orientation_does_not_change_the_mask(tmp_path):
    """The same volume stored in two orientations gets the same mask in space."""
    model = save_model(tmp_path / "m.safetensors", window=(0.0, 255.0))
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 5)).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("PIR"))
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(turned, tmp_path / "b.nii.gz")
    segment(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", model=model, out=tmp_path / "o")
    a, b = (nib.load(tmp_path / f"o/{n}_mask.nii.gz") for n in "ab")
    assert b.shape == turned.shape != a.shape
    a, b = (np.asarray(nib.as_closest_canonical(x).dataobj) for x in (a, b))
    assert a.any() and np.array_equal(a, b)


def test_one_bad_file_does_not_stop_the_rest(model, tmp_path, capsys):
    """In a folder: reported in one line, skipped, exit status 1. Alone: exit status 2."""
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/z.png")
    (tmp_path / "in/bad.png").write_bytes(b"no picture")
    assert segment(tmp_path / "in", model=model, out=tmp_path / "o") == 1
    assert len(list((tmp_path / "o").glob("*_mask.png"))) == 2
    assert capsys.readouterr().err.count("bad.png: not a readable picture") == 1
    assert segment(tmp_path / "in/bad.png", model=model, out=tmp_path / "p") == 2
    assert not (tmp_path / "p").exists()


def test_inputs_are_never_overwritten(model, tmp_path):
    """Results that would replace an input, or each other, are refused before anything is done."""
    a, b = picture(tmp_path / "x.png"), picture(tmp_path / "x.jpg")
    with pytest.raises(Refusal, match="overwrite that of"):
        segment(a, b, model=model, out=tmp_path / "o")
    c = picture(tmp_path / "x_mask.png")
    before = c.read_bytes()
    with pytest.raises(Refusal, match="overwrite an input"):
        segment(a, c, model=model, out=tmp_path)
    assert c.read_bytes() == before and not (tmp_path / "o").exists()


def test_a_model_for_pictures_refuses_volumes(model, tmp_path, capsys):
    """A volume needs an intensity window, which only a model trained on volumes has."""
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 2), np.int16), np.eye(4)), tmp_path / "v.nii")
    assert segment(tmp_path / "v.nii", model=model, out=tmp_path / "o") == 2
    assert "was trained on pictures" in capsys.readouterr().err


def test_the_command_line_refuses_in_one_line(tmp_path):
    """A missing model, a missing file, a wrong flag: one line on stderr, status 2, no traceback."""
    cases = {
        "no such file": ["x.png", "--model", "none.safetensors"],
        "did you mean --steps": ["x.png", "--step", "3"],
    }
    for words, flags in cases.items():
        done = subprocess.run(
            [sys.executable, ROOT / "infer.py", *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
