"""Checkpoints of unknown origin -> {name: tensor}: PyTorch's .ckpt and .bin, and .safetensors.

torch.save writes a pickle. A pickle is a program: it can name any function and call it.
torch.load(weights_only=True) calls only the functions that rebuild tensors, and refuses a file
that names others. Public checkpoints do name others (classes of Lightning and NumPy). Here every
such name means `Inert`, a class that does nothing; the real one is neither imported nor called.
Files are mapped: a tensor takes memory only when it is used.
"""

import os
import pickle
import zipfile

import torch
from safetensors.torch import load_file

from support.cli import UserError, one_line

NOT_CHECKPOINTS = (  # how a file begins that is no checkpoint, and what to say of it
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run git lfs pull"),
    (b"<", "a web page, not a checkpoint; download the file itself"),
    (b"\x80\x02\x8a\nl\xfc\x9cF", "saved by PyTorch before 1.6; save it again with a newer one"),
)


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
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise UserError("a zip without a checkpoint; unpack it and give the model.ckpt inside")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its zip is compressed, which torch.save never does")
    if sum(member.file_size for member in members) > os.path.getsize(path):
        raise ValueError("its zip claims more bytes than the file has")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    inert = [(Inert, name) for name in names]
    # torch.load maps only a path, and takes a path with this ending for the other format.
    mapped = not str(path).endswith(".safetensors")
    with open(path, "rb") as file, torch.serialization.safe_globals(inert):
        source = path if mapped else file
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


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


def check_beginning(start):
    """Raise UserError for what is no checkpoint, by the first bytes of the file."""
    if not start:
        raise UserError("empty; download it again")
    for beginning, what in NOT_CHECKPOINTS:
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(beginning):
            raise UserError(what)
    if start.isascii() and b"\0" not in start:
        raise UserError("a text file, not a checkpoint")
    if not (start.startswith(b"PK\3\4") or start[8:9] == b"{"):
        raise UserError("neither a .ckpt of PyTorch 1.6 or later nor a .safetensors file")


def read_tensors(path):
    """{name: tensor} of a file. Its content tells what it is, not its name.

    Raises UserError for anything but a whole checkpoint; OSError.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    try:
        check_beginning(start)
        return flatten(load_zip(path) if start.startswith(b"PK") else load_file(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except pickle.UnpicklingError:
        problem = "damaged, or it holds more than weights, which could run programs"
        raise UserError(f"{path}: {problem}; give the model as .safetensors") from None
    except Exception as error:  # a damaged file can raise anything
        problem = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"{path}: truncated or damaged ({problem}); download it again") from None
