"""tools.claims: each row differs in one thing, stopped runs go on, differences are paired."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, disc_folder
from PIL import Image

from sdseg import SDSeg, T
from support.cli import UserError
from support.metrics import bootstrap_interval
from support.weights import DEFAULT_WEIGHTS
from tools import claims, claims_report

CPU = torch.device("cpu")
CLASSES = ("background", "foreground")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function of flags: the command, with 20 small images and small U-Nets -> its arguments."""
    for name in ("UNET", "PIXEL_UNET"):
        small = replace(getattr(claims, name), channel_mult=(1, 1), attention_resolutions=(2,))
        monkeypatch.setattr(claims, name, small)
    monkeypatch.setattr(claims, "VALIDATIONS", 3)
    monkeypatch.setattr(claims, "STEPS", (1, 2))
    fixed = ["--data", str(disc_folder(tmp_path / "own")), "--batch-size", "2",
             "--steps", "3", "--vae-steps", "2", "--seeds", "0", "--device", "cpu",
             "--out", str(tmp_path / "out")]  # fmt: skip
    (tmp_path / "out").mkdir()
    shutil.copy(DEFAULT_WEIGHTS, tmp_path / "out/f4.safetensors")  # f8 is trained, where it is used
    return lambda *flags: claims.parse_args([*fixed, *flags])


def build(name):
    torch.manual_seed(0)
    return claims.build(claims.ROWS[name], str(DEFAULT_WEIGHTS), CLASSES)


def test_only_what_sees_z_t_depends_on_the_noise():
    """`no-z_t`, `logits` and `plain` give the same for any noise; the z_t of `zeros` is zero."""
    image = torch.randn(2, 3, 32, 32)
    for name in ("base", "no-z_t", "logits", "plain"):
        model = build(name)
        noises = [torch.randn(2, *model.latent_shape) for _ in range(2)]
        with torch.no_grad():
            a, b = (model.ddim_sample(noise, model.encode_image(image), [T - 1])
                    for noise in noises)  # fmt: skip
        assert torch.equal(a, b) == (name != "base"), name
    z_0, last = torch.randn(2, 4, 8, 8), torch.full((2,), T - 1)
    assert not build("zeros").q_sample(z_0, last, torch.zeros_like(z_0)).any()
    assert build("uniform-eps").q_sample(z_0, last, torch.zeros_like(z_0)).any()  # the leak


def test_zeros_take_the_place_of_the_noise(command, monkeypatch):
    """In training, and in validation, unless a measurement asks for noise."""
    seen = []
    predict = SDSeg.predict

    def spy(self, z_t, t, z_c):
        seen.append(bool(z_t.any()))
        return predict(self, z_t, t, z_c)

    monkeypatch.setattr(SDSeg, "predict", spy)
    monkeypatch.setattr(claims, "z_0_errors", lambda *_: None)
    args = command()
    result = claims.train_row(args, "zeros", 0, float("inf"))
    assert seen == [False] * (len(seen) - 1) + [True]  # the last call is the other start
    assert result["scores"]["1x1"] == result["curve"][-1]["dice"]


def test_the_loss_is_what_the_weights_say():
    """lambda 0 leaves L_noise alone; a loss on the mask alone needs no latent of it."""
    image, mask = torch.randn(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    t, noise = torch.tensor([T - 1, 300]), torch.randn(2, 4, 8, 8)
    for name, parts in (("uniform-eps", "nl"), ("mask", "m"), ("base", "nlm"), ("logits", "m")):
        row, model = claims.ROWS[name], build(name)
        out = model(image, model.encode_mask(mask), t, noise)
        terms = {"n": out.noise_loss.mean(), "l": out.latent_loss.mean(),
                 "m": claims.decoded_mask_loss(model, out.z_0_estimate, mask, t)}  # fmt: skip
        loss = claims.loss_of(row, model, image, mask, t, noise)
        torch.testing.assert_close(loss, sum(terms[part] for part in parts))


def test_a_row_trains_the_parts_that_it_names():
    """tau unless it is frozen, no part of the autoencoder unless there is none; equal sizes."""
    sizes = {}
    for name in ("concat", "trainable", "cross", "base", "no-z_t", "logits", "plain"):
        model = build(name)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        has_tau = any(n.startswith("tau.") for n in trained)
        assert has_tau == (name not in ("concat", "cross", "plain"))
        assert any(n.startswith("vae.decoder.") for n in trained) == (name == "logits")
        assert any(".attn2." in n for n in trained) == (name == "cross")
        sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes["plain"] == pytest.approx(sizes["base"], rel=0.1)
    assert not torch.equal(build("base").vae.decoder.conv_in.weight,
                           build("logits").vae.decoder.conv_in.weight)  # fmt: skip


def test_a_stopped_run_goes_on_to_the_same_result(command):
    """Stopped after each step, the JSON has the same numbers; other settings are refused."""
    args = command("--rows", "base")
    whole = claims.train_row(args, "base", 0, float("inf"))
    path, checkpoint = claims.paths_of(args, "base", 0)
    for _ in range(2):
        assert claims.train_row(args, "base", 0, deadline=0) is None and checkpoint.exists()
    claims.main(args)
    assert json.loads(path.read_text()) | {"seconds": 0} == whole | {"seconds": 0}
    assert not checkpoint.exists()
    with pytest.raises(UserError, match="another batch_size"):
        claims.main(command("--rows", "base", "--batch-size", "3"))


def test_the_command_trains_its_autoencoders_and_reports(command, tmp_path, capsys):
    """Rows of both experiments; time that is up leaves the rest for the next call."""
    claims.main(command("--rows", "lambda-1,plain", "--minutes", "0"))
    assert "2 runs are left" in capsys.readouterr().out
    claims.main(command("--rows", "lambda-1,plain"))
    text = (tmp_path / "out/report.md").read_text()
    assert text == capsys.readouterr().out.split("\n", 2)[2][:-1]
    assert "| lambda-1 | trainable | latent_weight 1.0 | 0.928 |" in text
    assert "| plain | logits | network plain U-Net | 0." in text
    assert claims_report.what_differs(*claims.TABLE["faithful"]["cross"]) == "the paper's row 1"
    result = json.loads((tmp_path / "out/lambda-1-0.json").read_text())
    assert list(result["scores"]) == ["1x1", "2x1", "1x25"]
    assert len(result["curve"]) == 3 and result["curve"][-1]["samples"] == 6
    assert list(result["z_0_errors"])[-2:] == ["999", "noise"]
    assert result["z_0_errors"]["autoencoder"][0] == 0
    assert Image.open(tmp_path / "out/claims.png").size == (1380, 420)


def test_z_0_errors_are_those_of_the_estimate(command):
    """A model that returns z_t has no error where z_t is z_0, and that of noise at T - 1."""
    args = command()
    _, _, val, _ = claims.load_data(args.data, args.root, 32, CPU)
    model = build("base")
    model.predict = lambda z_t, t, z_c: z_t
    errors = claims.z_0_errors(model, val)
    values = [errors[str(level)][0] for level in claims.LEVELS]
    assert values == sorted(values) and values[0] < 0.2 < values[-1]
    assert errors["noise"] == errors["999"]  # zero terminal SNR: z_T is the noise


# ---- the report ----


def test_a_difference_is_paired_by_seed_and_by_image():
    """A constant gain is certain however much images and seeds differ; an unpaired seed is out.
    The interval is over groups, the seeds averaged first; a star where all seeds agree.
    """
    rng, groups = np.random.default_rng(1), list("aabbccddee")
    ours, theirs = ({s: rng.random(10) for s in range(2)} for _ in range(2))
    d = (ours[0] - theirs[0] + ours[1] - theirs[1]) / 2
    mean, low, high, _ = claims_report.difference(ours, theirs, groups)
    assert (low, high) == bootstrap_interval(d, np.array(groups)) and low < mean < high
    for gains, cell in (
        ((0.125, 0.125), "+0.125 (+0.125 to +0.125)*"), ((0.2, -0.1), "+0.050 (+0.050 to +0.050)"),
    ):  # fmt: skip
        changed = {2: rng.random(10)} | {s: theirs[s] + gain for s, gain in enumerate(gains)}
        assert claims_report.in_words(changed, theirs, groups) == cell


def test_the_page_shows_the_results_that_ship():
    """The three tables of docs/claims.md are those of a report of docs/claims."""
    page = (ROOT / "docs/claims.md").read_text()
    results = claims_report.load_results(ROOT / "docs/claims", claims.ROWS)
    for rows in claims.TABLE.values():
        part = {name: results[name] for name in rows}
        assert claims_report.score_table(rows, part) in page
    assert claims_report.error_table(results) in page


def test_runs_that_were_not_made_alike_are_refused(tmp_path):
    """In one report; and a folder without results, or with a file that is none."""
    with pytest.raises(UserError, match="holds no result"):
        claims_report.load_results(tmp_path, ["base"])
    shutil.copy(ROOT / "docs/claims/base-0.json", tmp_path)
    claims_report.report(tmp_path, claims.TABLE)  # one run of one experiment is enough
    shorter = (ROOT / "docs/claims/v-0.json").read_text().replace('"steps": 800', '"steps": 2')
    for text, words in ((shorter, "not of the same"), ("{}", "not a result")):
        (tmp_path / "v-0.json").write_text(text)
        with pytest.raises(UserError, match=words):
            claims_report.load_results(tmp_path, ["base", "v"])
    with pytest.raises(UserError, match="--rows nothing: choose from"):
        claims.parse_args(["--rows", "nothing"])
