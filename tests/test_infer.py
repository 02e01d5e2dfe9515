"""Inference: files go in, masks of their own size come out, and nothing else is touched."""

import io
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save_tiny
from PIL import Image

import infer
from data import find, load_case
from sdseg import SDSeg
from support import cli
from support.cli import UserError
from support.device import has_fast_bf16
from support.images import read_image
from support.metrics import dice
from support.panels import overlay
from support.weights import DEFAULT_WEIGHTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m.safetensors", window=(0.0, 255.0))


def draw(path, height=70, width=90, seed=0):
    """Write a smooth random image -> its path."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC).save(path)
    return path


def run(*inputs, model, out, **options):
    """Run infer.py in float32 on the CPU -> its exit status."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags += [f"--model={model}", f"--out={out}", "--precision=fp32", "--device=cpu"]
    return infer.main(infer.parse_args([*map(str, inputs), *flags]))


def pixels(path):
    return np.asarray(Image.open(path))


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("height, width", [(70, 90), (200, 10), (10, 10), (64, 64)])
def test_mask_and_overlay_have_the_size_of_the_image(height, width, model, tmp_path):
    """An image of any shape gets a mask of 0 and 255; spaces and umlauts in names are kept."""
    path = draw(tmp_path / "a b ä.png", height, width)
    assert run(path, model=model, out=tmp_path / "o") == 0
    mask = pixels(tmp_path / "o/a b ä_mask.png")
    assert mask.shape == (height, width) and set(np.unique(mask)) <= {0, 255}
    assert pixels(tmp_path / "o/a b ä_overlay.png").shape == (height, width, 3)


def test_the_files_hold_what_the_method_says(model, tmp_path):
    """A mask is: resize, `SDSeg.sample`, the mean, resize back, above one half. So is the std."""
    path, loaded = draw(tmp_path / "x.png"), SDSeg.load(model)
    run(path, model=model, out=tmp_path / "o", samples=3, seed=5)
    small = np.array(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC))
    batch = torch.from_numpy(small).permute(2, 0, 1)[None] / 127.5 - 1
    runs = torch.stack(list(loaded.sample(batch, 1, 3, torch.Generator().manual_seed(5))))
    mean, std = infer.predict(loaded, [read_image(path)], samples=3, seed=5)
    torch.testing.assert_close(mean, runs.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, runs.std(0, correction=0), atol=1e-5, rtol=0)
    prob, std = (F.interpolate(x, (70, 90), mode="bilinear")[0, 0].numpy() for x in (mean, std))
    mask, clear = pixels(tmp_path / "o/x_mask.png") > 0, abs(prob - 0.5) > 1e-5
    assert 0.02 < mask.mean() < 0.98 and clear.mean() > 0.99  # elsewhere rounding may decide
    assert np.array_equal(mask[clear], prob[clear] > 0.5)
    assert abs(pixels(tmp_path / "o/x_std.png") / 510 - std).max() < 0.002  # 255 is one half


def test_same_seed_same_bytes(model, tmp_path):
    """The same input and seed give the same bytes; another seed gives other ones."""
    path = draw(tmp_path / "x.png")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(path, model=model, out=tmp_path / out, seed=seed)
    files = [(tmp_path / out / "x_mask.png").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


def test_probabilities_do_not_depend_on_the_batch(model, tmp_path):
    """In batches of 1, 2 and 5 an image gets the same probabilities, up to float rounding."""
    loaded = SDSeg.load(model)
    images = [read_image(draw(tmp_path / "x.png", 40 + 10 * i, 50, i)) for i in range(5)]
    alone = [infer.segment_images(loaded, [image])[0] for image in images]
    for size in (2, 5):
        batches = [images[i : i + size] for i in range(0, 5, size)]
        together = [prob for batch in batches for prob in infer.segment_images(loaded, batch)]
        for a, b in zip(alone, together, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-4


def test_several_classes_are_ids_and_colours(tmp_path):
    """With three classes the mask holds class ids, and the overlay shows a colour for each."""
    model = save_tiny(tmp_path / "m.safetensors", classes=("background", "a", "b"))
    run(draw(tmp_path / "x.png"), model=model, out=tmp_path / "o")
    ids, image = pixels(tmp_path / "o/x_mask.png"), pixels(tmp_path / "x.png")
    assert set(np.unique(ids)) <= {0, 1, 2} and len(np.unique(ids)) > 1
    assert np.array_equal(pixels(tmp_path / "o/x_overlay.png"), overlay(image, ids))


def test_probabilities_that_are_not_finite_are_refused(model):
    """Broken weights, or a precision that overflows, do not pass as an empty mask."""
    loaded = SDSeg.load(model)
    loaded.unet.out[2].bias.data[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        infer.segment_images(loaded, [np.zeros((8, 8, 3), np.uint8)])


def test_untrained_weights_are_said_to_be_untrained(tmp_path, capsys):
    """Converted weights that nobody trained work, with one line that says so."""
    model = save_tiny(tmp_path / "m.safetensors", data="")
    assert run(draw(tmp_path / "x.png"), model=model, out=tmp_path / "o") == 0
    error = capsys.readouterr().err
    assert "masks mean nothing" in error and error.count("\n") == 1


@pytest.fixture
def emulated_bf16(monkeypatch):
    """Without the hardware PyTorch takes ten times as long for convolutions in bfloat16. The
    hardware multiplies rounded numbers, adds in float32 and rounds the sum, and so does this.
    """

    def in_float32(convolve):
        def rounded(x, weight, bias, *more, **options):
            return convolve(x.float(), weight.float(), bias.float(), *more, **options).to(x.dtype)

        return rounded

    if not has_fast_bf16(torch.device("cpu")):
        for name in ("conv2d", "conv_transpose2d"):
            monkeypatch.setattr(F, name, in_float32(getattr(F, name)))


def test_the_model_that_ships_segments_real_images(real_data, emulated_bf16):
    """Six validation images: Dice over 0.7 against the truth, over 0.998 between precisions."""
    spec = find("kvasir+cvc", real_data)
    images, truths = zip(*(load_case(case, spec) for case in spec.splits["val"][::27]))
    exact, rounded = [], []
    for masks, precision in ((exact, "fp32"), (rounded, "bf16")):
        model = SDSeg.load(DEFAULT_WEIGHTS, precision=precision)
        masks += [model.class_ids(p).numpy() for p in infer.segment_images(model, images)]
    assert np.mean([dice(mask, truth) for mask, truth in zip(exact, truths)]) > 0.7
    assert np.mean([dice(a, b) for a, b in zip(exact, rounded)]) > 0.998


def random_volume(depth=5):
    """int16 (20, 30, depth)."""
    return np.random.default_rng(0).integers(0, 255, (20, 30, depth)).astype(np.int16)


def test_volumes_keep_their_place_in_space(model, tmp_path):
    """In any orientation a volume gets the same mask in space, with the geometry of its file."""
    oblique = nib.eulerangles.euler2mat(0.2, 0.1, 0.3) @ np.diag([1, 2, 3])
    volume = nib.Nifti1Image(random_volume(), nib.affines.from_matvec(oblique, [5, 6, 7]))
    masks = []
    for code in ("RAS", "LPS", "PIR"):
        stored = volume.as_reoriented(nib.orientations.axcodes2ornt(code))
        nib.save(stored, tmp_path / f"{code}.nii.gz")
        assert run(tmp_path / f"{code}.nii.gz", model=model, out=tmp_path / "o", batch_size=2) == 0
        mask = nib.load(tmp_path / f"o/{code}_mask.nii.gz")
        assert mask.shape == stored.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, stored.affine, atol=1e-6)
        masks.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    assert set(np.unique(masks[0])) == {0, 1} and all(np.array_equal(masks[0], m) for m in masks)
    # Small slices are shown six times as large, and five of them in rows of three.
    assert Image.open(tmp_path / "o/RAS_overlay.png").size == (6 * 20 * 3, 6 * 30 * 2)


def test_a_volume_is_its_slices(model, tmp_path):
    """A slice gets the mask that it gets as an image; the standard deviation is written."""
    values = np.stack([pixels(draw(tmp_path / "x.png", 30, 20, z))[..., 0] for z in range(3)])
    volume = values[:, ::-1].transpose(2, 1, 0)  # row 0 is anterior, y = 0 is posterior
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    run(tmp_path / "v.nii", model=model, out=tmp_path / "o", samples=2, batch_size=1)
    mask, std = (voxels(tmp_path / f"o/v_{name}.nii.gz") for name in ("mask", "std"))
    assert std.dtype.kind == "f" and 0 < std.max() <= 0.5
    for z in range(3):
        Image.fromarray(values[z]).save(tmp_path / "z.png")
        run(tmp_path / "z.png", model=model, out=tmp_path / "o", samples=2)
        assert np.array_equal(mask[:, ::-1, z].T * 255, pixels(tmp_path / "o/z_mask.png"))


def test_without_a_window_units_do_not_matter(tmp_path):
    """A model without an intensity window takes the volume's own: other units, the same mask."""
    model = save_tiny(tmp_path / "m.safetensors")
    for name, values in (("a", random_volume(3)), ("b", 100 * random_volume(3) - 5000)):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii")
    assert run(tmp_path / "a.nii", tmp_path / "b.nii", model=model, out=tmp_path / "o") == 0
    a, b = (voxels(tmp_path / f"o/{name}_mask.nii.gz") for name in "ab")
    assert a.any() and np.array_equal(a, b)


def test_a_folder_is_its_files_one_by_one(model, tmp_path, capsys):
    """In a batch a file gets the mask that it gets alone; a file that is given twice is done once.

    Sub-folders are kept. Hidden files and the results of earlier runs are left out.
    """
    names = ["a.png", "b.jpg", "sub/c.png", "d_mask.png", ".e.png", "sub/.hidden/f.png"]
    for i, name in enumerate(names):
        draw(tmp_path / "in" / name, 60 + 7 * i, 80, seed=i)
    inputs = tmp_path / "in/a.png", tmp_path / "in"
    assert run(*inputs, model=model, out=tmp_path / "all", batch_size=2) == 0
    assert capsys.readouterr().out.count("a.png") == 1
    masks = {str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*_mask.png")}
    assert masks == {"a_mask.png", "b_mask.png", "sub/c_mask.png"}
    for name in ("a.png", "b.jpg", "sub/c.png"):
        run(tmp_path / "in" / name, model=model, out=tmp_path / "one")
        mask = Path(name).with_name(f"{Path(name).stem}_mask.png")
        together, alone = pixels(tmp_path / "all" / mask), pixels(tmp_path / "one" / mask.name)
        assert (together != alone).mean() < 0.001


def test_nothing_is_passed_over_in_silence(model, tmp_path, capsys):
    """Links to folders are followed, each folder once; files of other kinds are counted."""
    draw(tmp_path / "in/a.png"), draw(tmp_path / "elsewhere/b.png")
    (tmp_path / "in/patient").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "in")
    for name in ("notes.txt", "1.dcm", "2.dcm"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert run(tmp_path / "in", model=model, out=tmp_path / "o") == 0
    made = {str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*_mask.png")}
    assert made == {"a_mask.png", "patient/b_mask.png"}
    lines = "".join(capsys.readouterr())
    assert "2 .dcm" in lines and "1 .txt" in lines and "dcm2niix" in lines


def test_one_bad_file_does_not_stop_the_rest(model, tmp_path, capsys):
    """In a folder a bad file is reported and skipped, status 1; alone it gives status 2."""
    draw(tmp_path / "in/a.png"), draw(tmp_path / "in/z.png")
    for name in ("bad.png", "worse.nii.gz"):
        (tmp_path / "in" / name).write_bytes(b"neither image nor volume")
    assert run(tmp_path / "in", model=model, out=tmp_path / "o") == 1
    assert len(list((tmp_path / "o").glob("*_mask.*"))) == 2
    errors = capsys.readouterr().err
    assert errors.count("bad.png: ") == errors.count("worse.nii.gz: ") == 1
    assert run(tmp_path / "in/bad.png", model=model, out=tmp_path / "p") == 2
    assert not (tmp_path / "p").exists()


def test_inputs_and_masks_beside_them_are_never_overwritten(model, tmp_path):
    """Results that would replace each other or a file among the inputs are refused at once."""
    a, b = draw(tmp_path / "x.png"), draw(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="overwrite"):
        run(a, b, model=model, out=tmp_path / "o")
    b.unlink()
    drawn, far = tmp_path / "x_mask.png", draw(tmp_path / "far/x_std.png")
    drawn.write_bytes(b"a day's work")
    for inputs, out in (([a], tmp_path), ([tmp_path], tmp_path), ([a, far], far.parent)):
        before = drawn.read_bytes(), far.read_bytes()
        with pytest.raises(UserError, match="would be overwritten"):
            run(*inputs, model=model, out=out)
        assert (drawn.read_bytes(), far.read_bytes()) == before
    assert not (tmp_path / "o").exists()
    assert [run(a, model=model, out=tmp_path / "o") for _ in range(2)] == [0, 0]


def test_processes_share_the_files(model, tmp_path, monkeypatch):
    """Two processes, numbered as by torchrun, do half of the files each; no file is done twice."""
    for i in range(5):
        draw(tmp_path / "in" / f"{i}.png", 20, 20, i)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(tmp_path / "in", model=model, out=tmp_path / rank) == 0
        made += sorted(p.name for p in (tmp_path / rank).glob("*_mask.png"))
    assert made == [f"{i}_mask.png" for i in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize("rank, terminal, lines, end", [
    ("0", True, 8, "\r\x1b[K"), ("0", False, 3, "9/9 files, 0.1/s, 0 s left\n"), ("1", True, 0, ""),
])  # fmt: skip
def test_progress(rank, terminal, lines, end, monkeypatch):
    """A terminal shows one moving line, a log gets a line every 30 s; only rank 0 prints."""
    clock, out = iter(range(0, 1000, 10)), io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("RANK", rank)
    progress = cli.Progress(9, "files")
    for _ in range(9):
        progress.step()
    assert out.getvalue().count("files") == lines and out.getvalue().endswith(end)


@pytest.mark.parametrize("words, flags", [
    ("no such file", ["--model", "none.safetensors"]), ("--step ", ["--step", "3"]),
    ("0 is not 1 or more", ["--steps", "0"]), ("give 1 to 1000", ["--steps", "1001"]),
])  # fmt: skip
def test_the_command_line_refuses_in_one_line(words, flags, tmp_path, capsys):
    """A wrong flag or file is one line on stderr, status 2, no traceback."""
    path = draw(tmp_path / "x.png")
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: infer.main(infer.parse_args([str(path), *flags])))
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_a_console_without_the_letters_does_not_end_a_run(model, tmp_path):
    """Chinese letters on a Windows console: the name is printed as codes, and the work is done."""
    draw(tmp_path / "b息肉.png"), draw(tmp_path / "c.png")
    done = subprocess.run([sys.executable, ROOT / "infer.py", tmp_path, "--model", model],
                          capture_output=True, cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})  # fmt: skip
    assert done.returncode == 0 and r"b\u606f\u8089.png" in done.stdout and not done.stderr
    assert len(list((tmp_path / "outputs").glob("*_mask.png"))) == 2


def test_closed_streams_are_no_error(model, tmp_path, monkeypatch):
    """A program that starts without stdout and stderr, as with `>&- 2>&-`, does its work."""
    path = draw(tmp_path / "a.png")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: run(path, model=model, out=tmp_path / "o"))
    assert end.value.code == 0 and (tmp_path / "o/a_mask.png").exists()
