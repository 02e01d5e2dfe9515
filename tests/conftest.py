"""What the tests share: a tiny model, drawn folders, golden weights, and where real data may be.

Read test_sdseg, test_networks, test_data, test_files, test_train, test_infer, test_metrics and
test_evaluate in this order. The others are about the tools and the documents.
"""

import functools
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdseg import SDSeg, SDSegConfig
from support.cli import keep_freed_memory
from unet import UNetConfig
from vae import VAEConfig

keep_freed_memory()  # as every command does
ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow; SLOW=1 pytest runs it")
VAE_TINY = VAEConfig(32, (1, 2, 2), 1)  # the golden networks
UNETS = {
    "sd": UNetConfig("sd", 8, 4, 32, (1, 2, 4, 4), 2, (1, 2, 4), 8, 48),
    "ldm": UNetConfig("ldm", 8, 4, 32, (1, 2, 4), 2, (1, 2, 4), 8, None),
}
TINY = SDSegConfig(
    "nano",
    VAEConfig(32, (1, 1, 1, 1), 1),
    UNetConfig("sd", 8, 4, 32, (1, 2), 1, (2,), 8, None),
    prediction="x0",
    image_size=32,
)


def tiny(**changes):
    """A small random model, the same in every test; `changes` are fields of its config."""
    torch.manual_seed(0)
    return SDSeg(replace(TINY, **changes)).eval()


def save_tiny(path, **changes):
    """The file of a small random model that has a data set and masks of more than one class."""
    model = tiny(**{"data": "test", **changes})
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.3)
    model.save(path)
    return str(path)


def disc_folder(path, n=20, height=40, width=48):
    """DIR/{images,masks}/: n noisy images with a bright disc each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True)
    for i in range(n):
        cy, cx = rng.integers(10, height - 10), rng.integers(10, width - 10)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < 80
        image = rng.integers(0, 120, (height, width, 3)) + 120 * disc[..., None]
        Image.fromarray(image.astype(np.uint8)).save(path / "images" / f"{i}.png")
        Image.fromarray((disc * 255).astype(np.uint8)).save(path / "masks" / f"{i}.png")
    return path


@functools.cache
def rule(name, shape):
    """The golden weights: a function of the parameter's full name (see goldens/README.md)."""
    w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) <= 1:
        return torch.from_numpy(1 + 0.1 * w if name.endswith("weight") else 0.1 * w)
    return torch.from_numpy(w / np.float32(np.sqrt(np.prod(shape[1:]))))


def golden(name):
    """-> manifest (None where there is none), tensors (dict)."""
    manifest = GOLDENS / f"{name}.json"
    manifest = json.loads(manifest.read_text()) if manifest.exists() else None
    return manifest, load_file(GOLDENS / f"{name}.safetensors")


def golden_weights(manifest, prefix, strip=True):
    """{name: tensor} of a manifest {name: shape}, with or without the prefix in the name."""
    names = {k if k.startswith(prefix) else prefix + k: tuple(v) for k, v in manifest.items()}
    return {k.removeprefix(prefix) if strip else k: rule(k, v) for k, v in names.items()}


@pytest.fixture(scope="session")
def real_data():
    """The folder with CVC-ClinicDB and Kvasir-SEG; tests skip where there is none."""
    for root in (ROOT / "data", ROOT.parent / "shared/data"):
        if (root / "CVC-ClinicDB").is_dir():
            return root
    pytest.skip("no data/CVC-ClinicDB: the data sets are licensed and not in the repository")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an empty cache of its own, and leaves the user's alone."""
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def drawn_once(tmp_path_factory, monkeypatch):
    """Drawn images are kept for the other tests that ask for this fixture."""
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
