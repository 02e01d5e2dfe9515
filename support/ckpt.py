"""Checkpoints of unknown origin -> {name: tensor}: PyTorch's .ckpt and .bin, and .safetensors.

torch.save writes a pickle. A pickle is a program: it can name any function and call it.
torch.load(weights_only=True) calls only the functions that rebuild tensors, and refuses a file
that names others. Public checkpoints do name others (classes of Lightning and NumPy). Here every
such name means `Inert`, a class that does nothing; the real one is neither imported nor called.
Files are mapped: a tensor takes memory only when it is used.
"""

import os
import zipfile

import torch
from safetensors.torch import load_file

from support.cli import UserError


class Inert:
    """What every class or function that PyTorch does not know becomes. It does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def load_zip(path):
    """The object that torch.save wrote, with `Inert` objects in it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > os.path.getsize(path):
        raise UserError("a zip that torch.save did not write; if a model.ckpt is in it, unpack it")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def flatten(value):
    """Nested containers -> {"a.b.c": tensor}; a level called "state_dict" adds no name."""
    tensors, todo, seen = {}, [("", value)], set()
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and value.is_cpu
            if dense and not (value.is_nested or value.is_quantized):
                tensors[prefix[:-1]] = torch.Tensor.detach(value)  # without attributes
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen and len(prefix) < 500:
            seen.add(id(value))  # because a list can hold itself
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [
                (prefix if key == "state_dict" else f"{prefix}{key}.", item)
                for key, item in items
                if isinstance(key, (str, int))
            ]
    return tensors


def read_tensors(path):
    """{name: tensor} of a file. Raises UserError for anything but a whole checkpoint; OSError."""
    with open(path, "rb") as file:
        start = file.read(9)
        first_line = start + file.readline(31)
    try:
        if start.startswith(b"PK\3\4"):
            return flatten(load_zip(path))
        if start[8:] == b"{":
            return load_file(path)
        raise UserError(f"it begins with {first_line}; give a .ckpt of PyTorch 1.6 or later, or a "
                        ".safetensors")  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can raise anything
        problem = f"damaged, or it holds more than weights ({type(error).__name__})"
        raise UserError(f"{path}: {problem}; download it again, or as .safetensors") from None
