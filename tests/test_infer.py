"""Inference: files go in, masks of their own size come out, and nothing else is touched."""

import io
import itertools
import runpy
import sys

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
from support.device import own_gpu
from support.images import read_image
from support.metrics import dice
from support.panels import montage, overlay
from support.volumes import PLANES, slices_of, slices_to_uint8
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


@pytest.mark.parametrize("height, width, k", [(70, 90, 3), (200, 10, 2), (10, 10, 2)])
def test_mask_and_overlay_have_the_size_of_the_image(height, width, k, tmp_path):
    """Any shape: a mask of 0 and 255, or of several class ids, and an overlay; names are kept."""
    model = save_tiny(tmp_path / "m.safetensors", classes=("background", "a", "b")[:k])
    path = draw(tmp_path / "a b ä.png", height, width)
    assert run(path, model=model, out=tmp_path / "o") == 0
    mask, shown = (pixels(tmp_path / f"o/a b ä_{name}.png") for name in ("mask", "overlay"))
    ids = mask // 255 if k == 2 else mask
    assert mask.shape == (height, width) and np.array_equal(shown, overlay(pixels(path), ids))
    assert set(np.unique(mask)) <= {0, 255} if k == 2 else len(np.unique(ids)) > 1


def test_the_files_hold_what_the_method_says(model, tmp_path):
    """A mask is: resize, `SDSeg.sample`, the mean, resize back, above one half. So is the std.
    The same seed gives the same bytes, over the old ones; another seed gives others.
    """
    path, loaded, files = draw(tmp_path / "x.png"), SDSeg.load(model), []
    for seed in (1, 5, 5):
        run(path, model=model, out=tmp_path / "o", samples=3, seed=seed)
        files.append((tmp_path / "o/x_mask.png").read_bytes())
    assert files[0] != files[1] == files[2]
    small = np.array(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC))
    batch = torch.from_numpy(small).permute(2, 0, 1)[None] / 127.5 - 1
    runs = torch.stack(list(loaded.sample(batch, 1, 3, torch.Generator().manual_seed(5))))
    prob, std = (F.interpolate(x, (70, 90), mode="bilinear")[0, 0].numpy()
                 for x in (runs.mean(0), runs.std(0, correction=0)))  # fmt: skip
    mask, clear = pixels(tmp_path / "o/x_mask.png") > 0, abs(prob - 0.5) > 1e-5
    assert 0.02 < mask.mean() < 0.98 and clear.mean() > 0.99  # elsewhere rounding may decide
    assert np.array_equal(mask[clear], prob[clear] > 0.5)
    assert abs(pixels(tmp_path / "o/x_std.png") / 510 - std).max() < 0.002  # 255 is one half


def test_probabilities_do_not_depend_on_the_batch(model, tmp_path):
    """In batches of 1, 2 and 3 an image gets the same probabilities, up to float rounding."""
    loaded = SDSeg.load(model)
    images = [read_image(draw(tmp_path / "x.png", 40 + 10 * i, 50, i)) for i in range(3)]
    alone = [infer.segment_images(loaded, [image])[0] for image in images]
    for batch in (images[:2], images):
        for a, b in zip(alone, infer.segment_images(loaded, batch)):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-4


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


def test_the_model_that_ships_segments_real_images(real_data):
    """Three validation images: mean Dice over 0.7."""
    spec, model = find("kvasir+cvc", real_data), SDSeg.load(DEFAULT_WEIGHTS)
    images, truths = zip(*(load_case(case, spec) for case in spec.splits["val"][::54]))
    masks = [model.class_ids(prob).numpy() for prob in infer.segment_images(model, images)]
    assert np.mean([dice(mask, truth) for mask, truth in zip(masks, truths)]) > 0.7


OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, 0.1, 0.3) @ np.diag([1, 2, 3]), [5, 6, 7]
)


@pytest.mark.parametrize("plane", PLANES)
def test_volumes_keep_their_place_in_space(plane, tmp_path):
    """In all 48 orders and directions of the axes, and in any unit without a window, a file gets
    the same mask in space, with the file's geometry.
    """
    how = dict(plane=plane, context="neighbours", image_size=16)
    model = save_tiny(tmp_path / "m.safetensors", **how)
    values = np.random.default_rng(0).integers(0, 255, (5, 4, 3)).astype(np.int16)
    stored = {}
    (tmp_path / "in").mkdir()
    orientations = itertools.product(itertools.permutations(range(3)), *[(1, -1)] * 3)
    for i, (axes, *directions) in enumerate(orientations):
        volume = nib.Nifti1Image(100 * values - 5000 if i % 2 else values, OBLIQUE)
        stored[f"{i}"] = volume.as_reoriented(np.column_stack([axes, directions]))
        nib.save(stored[f"{i}"], tmp_path / f"in/{i}.nii")
    assert run(tmp_path / "in", model=model, out=tmp_path / "o") == 0
    masks = []
    for name, volume in stored.items():
        mask = nib.load(tmp_path / f"o/{name}_mask.nii.gz")
        assert mask.shape == volume.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-6)
        masks.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    assert len({volume.affine.tobytes() for volume in stored.values()}) == len(masks) == 48
    assert set(np.unique(masks[0])) == {0, 1} and all(np.array_equal(masks[0], m) for m in masks)
    assert not list((tmp_path / "o").glob("*_std*"))  # a deviation is written where asked for


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0)])
def test_the_mask_has_the_header_of_its_image(codes, model, tmp_path):
    """All but the number format, so any reader places both alike, from qform or sform."""
    volume = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), OBLIQUE)
    volume.header.set_qform(OBLIQUE, codes[0]), volume.header.set_sform(OBLIQUE, codes[1])
    nib.save(volume, tmp_path / "v.nii")
    run(tmp_path / "v.nii", model=model, out=tmp_path / "o")
    a, b = (nib.load(tmp_path / name).header for name in ("v.nii", "o/v_mask.nii.gz"))
    assert {k for k in a.keys() if a[k].tobytes() != b[k].tobytes()} == {"datatype", "bitpix"}


@pytest.mark.parametrize("plane, context", [
    ("axial", "repeat"), ("coronal", "neighbours"), ("sagittal", "neighbours"),
])  # fmt: skip
def test_a_volume_is_its_slices(plane, context, tmp_path):
    """A slice gets the mask that it gets as an image; the standard deviation is written, and the
    overlay shows slices of the plane, without their neighbours.
    """
    how = dict(window=(0.0, 255.0), plane=plane, context=context)
    model = save_tiny(tmp_path / "m.safetensors", **how)
    volume = pixels(draw(tmp_path / "x.png", 30, 20))[:7, :8]
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    run(tmp_path / "v.nii", model=model, out=tmp_path / "o", samples=2, batch_size=1)
    mask, std = (np.asarray(nib.load(tmp_path / f"o/v_{name}.nii.gz").dataobj)
                 for name in ("mask", "std"))  # fmt: skip
    assert std.dtype.kind == "f" and 0 < std.max() <= 0.5
    slices = slices_to_uint8(volume, how["window"], plane, context)
    paths, ids = [tmp_path / f"{i}.png" for i in range(len(slices))], slices_of(mask, plane)
    for path, image in zip(paths, slices):
        Image.fromarray(image).save(path)
    run(*paths, model=model, out=tmp_path / "o", samples=2, batch_size=1)
    for i in range(len(slices)):
        assert np.array_equal(ids[i] * 255, pixels(tmp_path / f"o/{i}_mask.png"))
    shown = montage(slices[..., [1, 1, 1]], ids)
    assert np.array_equal(pixels(tmp_path / "o/v_overlay.png"), shown)


def masks_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*_mask.*"))


def test_a_folder_is_its_files(model, tmp_path, capsys):
    """Sub-folders and links are followed, each file once; hidden files, results and what a system
    puts beside files are left out.
    """
    left_out = "d_mask.png", ".e.png", "sub/.hidden/f.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg"
    for name in ("a.png", "sub/c.jpg", *left_out):
        draw(tmp_path / "in" / name)
    draw(tmp_path / "far/b.png")
    (tmp_path / "in/patient").symlink_to(tmp_path / "far")
    (tmp_path / "far/circle").symlink_to(tmp_path / "in")
    for name in ("notes.txt", "1.dcm", "2.dcm"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert run(tmp_path / "in/a.png", tmp_path / "in", model=model, out=tmp_path / "o") == 0
    assert masks_in(tmp_path / "o") == ["a_mask.png", "patient/b_mask.png", "sub/c_mask.png"]
    said = "".join(capsys.readouterr())
    assert said.count("a.png") == 1
    assert all(words in said for words in ("2 .dcm", "1 .txt", "dcm2niix"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image and no volume in it"):
        run(tmp_path / "empty", model=model, out=tmp_path / "o")


def test_a_folder_that_may_not_be_opened_is_refused(model, tmp_path, monkeypatch):
    """Its files would be missing in the results, without a word."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}: Permission denied"):
        run(tmp_path, model=model, out=tmp_path / "o")


def test_one_bad_file_does_not_stop_the_rest(model, tmp_path, capsys):
    """A bad file in a folder is reported, status 1; alone it gives status 2. The rest is done.

    So is a file with a name to which nothing can be added.
    """
    draw(tmp_path / "in/a.png"), draw(tmp_path / "in/z.png"), draw(tmp_path / f"in/{'x' * 250}.png")
    for name in ("bad.png", "worse.nii.gz"):
        (tmp_path / "in" / name).write_bytes(b"neither image nor volume")
    nib.save(nib.Nifti1Image(np.zeros((1, 20, 20), np.uint8), np.eye(4)), tmp_path / "in/one.nii")
    assert run(tmp_path / "in", model=model, out=tmp_path / "o") == 1
    assert masks_in(tmp_path / "o") == ["a_mask.png", "z_mask.png"]
    errors = capsys.readouterr().err
    assert errors.count("bad.png: ") == errors.count("worse.nii.gz: ") == 1
    assert errors.count("xx.png: not written: ") == 1
    assert "one.nii: holds one slice, which is not axial" in errors
    assert run(tmp_path / "in/bad.png", model=model, out=tmp_path / "p") == 2
    assert not (tmp_path / "p").exists()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    """Asked for by name, or by more processes than there are GPUs; never replaced by the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_gpu(local_rank=0) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_gpu(local_rank=1) == "cuda:1"
    with pytest.raises(UserError, match="process 2 has no GPU: this machine has 2"):
        own_gpu(local_rank=2)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: .*; try --device cpu"):
            infer.main(infer.parse_args(["docs/demo.png", "--device", "cuda"]))


def test_inputs_and_masks_beside_them_are_never_overwritten(model, tmp_path):
    """Results that would replace each other or a file among the inputs are refused at once."""
    a, b = draw(tmp_path / "x.png"), draw(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="overwrite"):
        run(a, b, model=model, out=tmp_path / "o")
    b.unlink()
    drawn, far = draw(tmp_path / "x_mask.png"), draw(tmp_path / "far/x_std.png")
    before = drawn.read_bytes(), far.read_bytes()
    for inputs, out in (([a], tmp_path), ([tmp_path], tmp_path), ([a, far], far.parent)):
        with pytest.raises(UserError, match="would be overwritten"):
            run(*inputs, model=model, out=out)
    assert (drawn.read_bytes(), far.read_bytes()) == before and not (tmp_path / "o").exists()


def test_processes_share_the_files(model, tmp_path, monkeypatch):
    """Two processes, numbered as by torchrun, do half of the files each; no file is done twice."""
    for i in range(5):
        draw(tmp_path / "in" / f"{i}.png", 20, 20, i)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(tmp_path / "in", model=model, out=tmp_path / rank) == 0
        made += masks_in(tmp_path / rank)
    assert made == [f"{i}_mask.png" for i in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize("rank, terminal, lines, end", [
    ("0", True, 8, "\r\x1b[K"), ("0", False, 3, "9/9 files, 0.1/s, 0 s left\n"), ("1", True, 0, ""),
])  # fmt: skip
def test_progress_suits_a_terminal_and_a_log(rank, terminal, lines, end, monkeypatch):
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
    ("give 1 to 1000", ["--steps", "1001"]),
])  # fmt: skip
def test_the_command_line_refuses_in_one_line(words, flags, tmp_path, capsys):
    """A wrong flag or file is one line on stderr, status 2, no traceback."""
    path = draw(tmp_path / "x.png")
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: infer.main(infer.parse_args([str(path), *flags])))
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("letters", ["ascii", None])
def test_no_console_ends_a_run(letters, model, tmp_path, monkeypatch):
    """It lacks letters of the file's name, or is closed (`>&- 2>&-`): the mask is written."""
    path, said = draw(tmp_path / "b息肉.png"), io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, letters and io.TextIOWrapper(said, encoding=letters))
    flags = ["--model", model, "--out", str(tmp_path / "o"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["infer.py", str(path), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
    assert end.value.code == 0 and masks_in(tmp_path / "o") == ["b息肉_mask.png"]
    assert (rb"b\u606f\u8089.png: 90 x 70" in said.getvalue()) == (letters is not None)
