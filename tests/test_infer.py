"""Inference: files in, masks of the files' own size out, and nothing else touched."""

import io
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import infer
from common import Refusal
from data import find, load_case
from files import read_image
from metrics import dice
from sdseg import SDSeg, SDSegConfig, has_fast_bf16
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).parent.parent


def save_model(path, **changes):
    torch.manual_seed(0)
    fields = dict(
        vae=VAEConfig(32, (1, 1, 1, 1), 1),
        unet=UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
        prediction="x0",
        image_size=32,
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


def test_exif_orientation_is_obeyed(model, tmp_path):
    """A photograph stored on its side gets the mask of the upright picture, upright."""
    upright = Image.open(picture(tmp_path / "upright.png", 40, 60))
    exif = upright.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    segment(tmp_path / "upright.png", tmp_path / "side.png", model=model, out=tmp_path / "o")
    masks = [np.asarray(Image.open(tmp_path / f"o/{n}_mask.png")) for n in ("upright", "side")]
    assert masks[0].shape == (40, 60) and np.array_equal(*masks)


def test_the_mask_is_the_method_s(model, tmp_path):
    """Resize, `SDSeg.segment`, resize back, one half: the file's mask is that, to the bit."""
    path = picture(tmp_path / "x.png")
    segment(path, model=model, out=tmp_path / "o", samples=2, seed=5)
    small = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC))
    image = torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    scores = SDSeg.load(model).segment(image, 1, 2, torch.Generator().manual_seed(5))
    scores = torch.nn.functional.interpolate(scores, (70, 90), mode="bilinear")[0, 0].numpy()
    mask = np.asarray(Image.open(tmp_path / "o/x_mask.png"))
    assert 0.02 < (mask > 0).mean() < 0.98
    sure = abs(scores - 0.5) > 1e-5
    assert sure.mean() > 0.99 and np.array_equal((mask > 127)[sure], (scores > 0.5)[sure])


def test_same_seed_same_bytes(model, tmp_path):
    """Same input and seed: the same bytes. Another seed: another mask of this untrained model."""
    path = picture(tmp_path / "x.png")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        segment(path, model=model, out=tmp_path / out, seed=seed)
    files = [(tmp_path / out / "x_mask.png").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_folder_is_its_files_one_by_one(model, tmp_path):
    """A folder in batches gives its files' own masks, to float rounding; sub-folders are kept."""
    (tmp_path / "in/sub/.hidden").mkdir(parents=True)
    names = ["a.png", "b.jpg", "sub/c.png", "d_mask.png", ".e.png", "sub/.hidden/f.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "in" / name, 60 + 7 * i, 80, seed=i)
    (tmp_path / "in/notes.txt").write_text("not a picture")
    assert segment(tmp_path / "in", model=model, out=tmp_path / "all", batch_size=2) == 0
    made = {str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*_mask.png")}
    assert made == {"a_mask.png", "b_mask.png", "sub/c_mask.png"}
    for name in ("a.png", "b.jpg", "sub/c.png"):
        segment(tmp_path / "in" / name, model=model, out=tmp_path / "one")
        stem = Path(name).stem
        together = np.asarray(Image.open(tmp_path / "all" / Path(name).parent / f"{stem}_mask.png"))
        alone = np.asarray(Image.open(tmp_path / "one" / f"{stem}_mask.png"))
        assert (together != alone).mean() < 0.001


def test_scores_do_not_depend_on_the_batch(model, tmp_path):
    """The scores of a picture are the same in batches of 1, 2 and 5, up to the last bits."""
    loaded = SDSeg.load(model)
    images = [read_image(picture(tmp_path / "x.png", 40 + 10 * i, 50, i)) for i in range(5)]
    alone = [infer.segment_images(loaded, [image])[0] for image in images]
    for size in (2, 5):
        batches = [images[i : i + size] for i in range(0, 5, size)]
        together = [s for batch in batches for s in infer.segment_images(loaded, batch)]
        for a, b in zip(alone, together, strict=True):
            assert a.shape == b.shape and abs(a - b).max() < 1e-4


def test_samples_write_their_deviation(model, tmp_path):
    """--samples 3 averages three runs and writes how much they differ, 255 for one half."""
    path = picture(tmp_path / "x.png", 40, 40)
    segment(path, model=model, out=tmp_path / "o", samples=3)
    std = np.asarray(Image.open(tmp_path / "o/x_std.png"))
    loaded, image = SDSeg.load(model), read_image(path)
    mean, deviation = infer.predict(loaded, [image], 1, 3, 0)
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    batch = torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    runs = torch.stack(list(loaded.sample(batch, 1, 3, torch.Generator().manual_seed(0))))
    torch.testing.assert_close(mean, runs.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, runs.std(0, correction=0), atol=1e-5, rtol=0)
    assert std.shape == (40, 40) and abs(std.max() / 510 - deviation.max()) < 0.1 and std.max() > 0


def test_several_classes_are_ids_and_colours(tmp_path):
    """K = 3: the mask holds class ids, not 255; the overlay shows each class in its colour."""
    model = save_model(tmp_path / "m.safetensors", classes=("background", "a", "b"))
    segment(picture(tmp_path / "x.png"), model=model, out=tmp_path / "o", samples=2)
    ids = np.asarray(Image.open(tmp_path / "o/x_mask.png"))
    assert set(np.unique(ids)) <= {0, 1, 2} and len(np.unique(ids)) > 1
    overlay, image = (np.asarray(Image.open(tmp_path / n)) for n in ("o/x_overlay.png", "x.png"))
    assert np.array_equal(overlay[ids == 0], image[ids == 0])
    for c in set(np.unique(ids)) - {0}:
        assert (overlay[ids == c] == infer.PALETTE[c]).all(1).any()


def test_an_overlay_has_tint_and_outline():
    """Outside nothing changes; inside a light tint; the border of a class in its full colour."""
    image, ids = np.full((40, 50, 3), 100, np.uint8), np.zeros((40, 50), np.uint8)
    ids[10:30, 10:25], ids[10:30, 25:40] = 1, 2
    result = infer.overlay(image, ids)
    assert (result[ids == 0] == 100).all()
    assert (result[10, 15] == infer.PALETTE[1]).all() and (result[20, 25] == infer.PALETTE[2]).all()
    assert (result[20, 15] == 75 + infer.PALETTE[1] // 4).all()
    assert len(np.unique(infer.PALETTE, axis=0)) == 14


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
    tile = 6 * np.array([20, 30])  # small slices are shown larger; five in rows of three
    assert Image.open(tmp_path / "o/scan_overlay.png").size == tuple(tile * (3, 2))


def test_a_volume_is_its_slices(tmp_path):
    """A slice gets the mask that the same slice gets as a picture; the deviation is written."""
    model = save_model(tmp_path / "m.safetensors", window=(0.0, 255.0))
    values = np.stack([np.asarray(Image.open(picture(tmp_path / "x.png", 30, 20, s)).convert("L"))
                       for s in range(3)])  # fmt: skip
    volume = values[:, ::-1].transpose(2, 1, 0)  # rows run from anterior, y towards it
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    segment(tmp_path / "v.nii", model=model, out=tmp_path / "o", samples=2, batch_size=1)
    mask, std = (nib.load(tmp_path / f"o/v_{n}.nii.gz") for n in ("mask", "std"))
    assert std.get_data_dtype() == np.float32 and 0 < np.asarray(std.dataobj).max() <= 0.5
    for z in range(3):
        Image.fromarray(values[z]).save(tmp_path / "z.png")
        segment(tmp_path / "z.png", model=model, out=tmp_path / "o", samples=2)
        alone = np.asarray(Image.open(tmp_path / "o/z_mask.png"))
        assert np.array_equal(np.asarray(mask.dataobj)[:, ::-1, z].T * 255, alone)


def test_a_montage_shows_the_fullest_slices():
    """Of 64 slices 16 are shown, each the fullest of its stretch; without foreground, any 16."""
    ids = np.zeros((64, 8, 200), np.uint8)
    for z in range(64):
        ids[z, 4, : 100 + 10 * (z % 4 == 2)] = 1
    images = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None], (64, 8, 200, 3))
    sheet = infer.montage(images, ids)
    assert sheet.shape == (4 * 8, 4 * 200, 3)
    assert np.array_equal(sheet[::8, ::200, 0].ravel(), np.arange(2, 64, 4))
    assert infer.montage(images, 0 * ids).shape == sheet.shape


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
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    assert segment(tmp_path / "in", model=model, out=tmp_path / "o") == 1
    assert len(list((tmp_path / "o").glob("*_mask.png"))) == 2
    errors = capsys.readouterr().err
    assert errors.count("bad.png: not a readable picture") == errors.count("loop.png: ") == 1
    assert segment(tmp_path / "in/bad.png", model=model, out=tmp_path / "p") == 2
    assert not (tmp_path / "p").exists()


def test_inputs_are_never_overwritten(model, tmp_path):
    """Results that would replace an input, or each other, are refused before anything is done."""
    a, b = picture(tmp_path / "x.png"), picture(tmp_path / "x.jpg")
    with pytest.raises(Refusal, match="overwrite that of"):
        segment(a, b, model=model, out=tmp_path / "o")
    (tmp_path / "far").mkdir()
    for c in (picture(tmp_path / "x_mask.png"), picture(tmp_path / "far/x_std.png")):
        before = c.read_bytes()
        with pytest.raises(Refusal, match="would be overwritten"):
            segment(a, c, model=model, out=c.parent)
        assert c.read_bytes() == before and not (tmp_path / "o").exists()


def test_masks_drawn_by_hand_are_not_overwritten(model, tmp_path):
    """A mask beside a picture, perhaps a person's work, stays; results elsewhere are replaced."""
    path, drawn = picture(tmp_path / "x.png"), tmp_path / "x_mask.png"
    drawn.write_bytes(b"a day's work")
    for given in (path, tmp_path):
        with pytest.raises(Refusal, match="would be overwritten"):
            segment(given, model=model, out=tmp_path)
    assert drawn.read_bytes() == b"a day's work"
    assert [segment(tmp_path, model=model, out=tmp_path / "o") for _ in range(2)] == [0, 0]


def test_the_same_file_twice_is_done_once(model, tmp_path, capsys):
    """A file and the folder it lies in: one line, no quarrel about its name."""
    path = picture(tmp_path / "x.png")
    assert segment(path, tmp_path, model=model, out=tmp_path / "o") == 0
    assert capsys.readouterr().out.count("x.png") == 1


def test_processes_share_the_files(model, tmp_path, monkeypatch):
    """Of two processes, as torchrun numbers them, each does half; together they do all, once."""
    (tmp_path / "in").mkdir()
    for i in range(5):
        picture(tmp_path / "in" / f"{i}.png", 20, 20, i)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert segment(tmp_path / "in", model=model, out=tmp_path / rank) == 0
        made += sorted(p.name for p in (tmp_path / rank).glob("*_mask.png"))
    assert made == [f"{i}_mask.png" for i in (0, 2, 4, 1, 3)]


def test_without_a_window_units_do_not_matter(model, tmp_path):
    """A model without an intensity window takes the volume's own: other units, the same mask."""
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.int16)
    masks = []
    for name, stored in (("a", values), ("b", 100 * values - 5000)):
        nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / f"{name}.nii")
        assert segment(tmp_path / f"{name}.nii", model=model, out=tmp_path) == 0
        masks.append(np.asarray(nib.load(tmp_path / f"{name}_mask.nii.gz").dataobj))
    assert masks[0].any() and np.array_equal(*masks)


def test_untrained_weights_are_said_to_be(tmp_path, capsys):
    """Weights that a converter made and nothing trained work, with one line that says so."""
    model = save_model(tmp_path / "m.safetensors", data="")
    assert segment(picture(tmp_path / "x.png"), model=model, out=tmp_path / "o") == 0
    error = capsys.readouterr().err
    assert "masks mean nothing" in error and error.count("\n") == 1


@pytest.fixture
def as_bf16_hardware(monkeypatch):
    """Where there is none, PyTorch's own loops take ten times as long for bfloat16 convolutions;
    the hardware multiplies the rounded numbers, adds in float32 and rounds the sum, and so do we.
    """

    def in_float32(convolve):
        def rounded(x, weight, bias, *more, **options):
            return convolve(x.float(), weight.float(), bias.float(), *more, **options).to(x.dtype)

        return rounded

    if not has_fast_bf16(torch.device("cpu")):
        for name in ("conv2d", "conv_transpose2d"):
            monkeypatch.setattr(F, name, in_float32(getattr(F, name)))


def test_the_model_that_ships_segments_real_pictures(real_data, as_bf16_hardware):
    """On ten validation pictures: Dice over 0.7 against the truth, over 0.998 between precisions.

    The second holds what reduced precision may cost, on real weights and real pictures.
    """
    found = find("kvasir+cvc", real_data)
    images, truths = zip(*(load_case(case, found) for case in found.parts["val"][::17]))
    weights = ROOT / "weights" / "nano.safetensors"
    exact, rounded = (
        [
            infer.class_ids(scores)
            for scores in infer.segment_images(SDSeg.load(weights, precision=precision), images)
        ]
        for precision in ("fp32", "bf16")
    )
    assert np.mean([dice(mask, truth) for mask, truth in zip(exact, truths)]) > 0.7
    assert np.mean([dice(a, b) for a, b in zip(exact, rounded)]) > 0.998


def test_scores_that_are_no_numbers_are_refused(model, tmp_path):
    """Broken weights, or a precision that overflows, do not pass for an empty mask."""
    loaded = SDSeg.load(model)
    loaded.unet.out[2].bias.data[:] = float("nan")
    with pytest.raises(Refusal, match="not finite"):
        infer.segment_images(loaded, [np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.parametrize("rank, terminal, lines, end", [
    ("0", True, 8, "\r\x1b[K"), ("0", False, 3, "9/9 files, 0.1/s, 0 s left\n"), ("1", True, 0, ""),
])  # fmt: skip
def test_progress(rank, terminal, lines, end, monkeypatch):
    """On a terminal a line that moves and goes; in a log one in 30 seconds; once for torchrun."""
    clock, out = iter(range(0, 1000, 10)), io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("RANK", rank)
    progress = common.Progress(9, "files")
    for _ in range(9):
        progress.step()
    assert out.getvalue().count("files") == lines and out.getvalue().endswith(end)


def test_help_answers_at_once():
    """`--help` imports neither torch nor numpy."""
    command = [sys.executable, "-X", "importtime", ROOT / "infer.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--samples" in done.stdout
    assert "torch" not in done.stderr and "numpy" not in done.stderr


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


def test_closed_streams_are_no_error(model, tmp_path, monkeypatch):
    """A program started without stdout and stderr, as `>&- 2>&-` does, does its work."""
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(common, "keep_freed_memory", lambda: None)  # the tests' own stays
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        common.run(lambda: segment(path, model=model, out=tmp_path / "o"))
    assert end.value.code == 0 and (tmp_path / "o/a_mask.png").exists()
