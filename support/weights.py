"""Weight files: named tensors, and a dataclass as JSON in the metadata of one `.safetensors`.

A file is not trusted: it holds no code, the config's names and types are checked, and loading
is strict.
"""

import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import safetensors
import torch
from safetensors.torch import save_file

from support.cli import UserError, atomic_write, one_line

DEFAULT_WEIGHTS = Path(__file__).parent.parent / "weights" / "nano.safetensors"  # ships with us
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_weights(path, tensors, config, half=False):
    """Save {name: tensor} and a dataclass; `half` stores floats as float16. Raises UserError if a
    weight is too large for it.
    """
    if half:
        halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        if large := [k for k, v in halves.items() if (v.isinf() & tensors[k].isfinite()).any()]:
            raise UserError(f"{path}: {large[0]} holds a weight that is too large for float16")
        tensors = halves
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, {"sdseg": json.dumps(asdict(config))})
        except safetensors.SafetensorError as error:  # it does not say which OSError it met
            raise UserError(f"{path}: cannot be written, is the disk full? ({error})") from None


def read_weights(path, config_class):
    """-> config, {name: tensor}. Raises UserError for a file that is not ours, or damaged."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give the .safetensors file in it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sdseg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; public weights: see docs/data.md") from None
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({one_line(error)})") from None
    if text is None:
        raise UserError(f"{path}: holds no SDSeg config; convert it with convert_sd_weights.py")
    try:
        return dataclass_from_dict(config_class, json.loads(text), "config"), tensors
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its config is not JSON") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dataclass_from_dict(cls, values, where):
    """Build a dataclass from JSON. Raises UserError naming an unknown key or a wrong type."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not an object")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where} has unknown keys: {', '.join(unknown)}; update this program")
    return cls(**{k: checked_value(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def checked_value(kind, value, where):
    """`value` as the annotated type `kind`: a dataclass, a tuple, an optional or a plain type.

    Whole numbers are sizes: from 1 to 8192.
    """
    options = get_args(kind)
    if is_dataclass(kind):
        return dataclass_from_dict(kind, value, where)
    if type(None) in options:
        return None if value is None else checked_value(options[0], value, where)
    if get_origin(kind) is Literal:
        if value not in options:
            raise UserError(f"{where} is {value!r:.40}; allowed: {', '.join(map(str, options))}")
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise UserError(f"{where} needs {len(options)} values")
        return tuple(checked_value(options[0], v, where) for v in value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is float or type(value) is not kind or (kind is int and not 1 <= value <= 8192):
        raise UserError(f"{where} is {value!r:.40}, which has a wrong type or size")
    return value


def load_strict(module, tensors, path):
    """Give a module its tensors; float32 is not copied. Raises UserError that names up to five
    tensors that do not fit, and counts the others.
    """
    expected = module.state_dict()
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in sorted(expected.keys() & tensors.keys()):
        need, have = list(expected[name].shape), list(tensors[name].shape)
        if need != have:
            wrong.append(f"{name} is {have}, not {need}")
        elif tensors[name].dtype not in FLOATS:
            wrong.append(f"{name} is {tensors[name].dtype}, not a float of 16 to 64 bits")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        text = one_line("; ".join(wrong[:5]))
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {text}{more}")
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return module
