"""What the tests share: golden weights made by a rule, and where real data may lie."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import keep_freed_memory

keep_freed_memory()  # as every command does
GOLDENS = Path(__file__).parent / "goldens"


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
    for root in (Path("data"), Path("../shared/data")):
        if (root / "CVC-ClinicDB").is_dir():
            return root
    pytest.skip("no data/CVC-ClinicDB: the data sets are licensed and not in the repository")


@pytest.fixture
def drawn_once(tmp_path_factory, monkeypatch):
    """Drawn pictures are kept for the other tests that ask for this, until all are done."""
    monkeypatch.setenv("SDSEG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
