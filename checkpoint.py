"""Weight files: named tensors and a config, as JSON in the metadata of one `.safetensors`.

Reading trusts nothing: safetensors holds no code, the config's names and types are checked, and
loading is strict.
"""

import json
from dataclasses import asdict, is_dataclass
from typing import get_args, get_origin, get_type_hints

import safetensors
import torch

from common import Refusal, one_line, whole_file

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def write_weights(path, tensors, config, half=False):
    """Save {name: tensor} and a dataclass; `half` stores float32 as float16.

    Written here rather than by the library, in its format: one tensor is in memory at a time, the
    same input gives the same bytes, and a full disk is an OSError.
    """
    dtypes = {k: torch.float16 if half and t.dtype == torch.float32 else t.dtype
              for k, t in tensors.items()}  # fmt: skip
    header, end = {"__metadata__": {"format": "pt", "sdseg": json.dumps(asdict(config))}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtypes[name].itemsize
        kind, shape = CODES[dtypes[name]], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = tensor.detach().to("cpu", dtypes[name]).contiguous()
            file.write(values.flatten().view(torch.uint8).numpy())


def read_weights(path, config_class):
    """-> config, {name: tensor}, memory-mapped. Raises Refusal: not safetensors, or not ours."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sdseg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise Refusal(f"{path}: not a readable .safetensors file ({one_line(error)})") from None
    if text is None:
        raise Refusal(f"{path}: holds no SDSeg config; convert it with convert_sd_weights.py")
    try:
        return from_dict(config_class, json.loads(text), "config"), tensors
    except (ValueError, RecursionError):
        raise Refusal(f"{path}: its config is not JSON") from None
    except Refusal as error:
        raise Refusal(f"{path}: {error}") from None


def from_dict(cls, values, where):
    """Build a dataclass from plain values. Raises Refusal naming an unknown key or a wrong type."""
    if not isinstance(values, dict):
        raise Refusal(f"{where} is not an object")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise Refusal(f"{where} has unknown keys: {', '.join(unknown)}; is it of a newer version?")
    return cls(**{k: checked(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def checked(kind, value, where):
    """`value` as the annotated type `kind`: a dataclass, tuple, optional, or plain type."""
    options = get_args(kind)
    if is_dataclass(kind):
        return from_dict(kind, value, where)
    if type(None) in options:
        return None if value is None else checked(options[0], value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise Refusal(f"{where} needs {len(options)} values")
        return tuple(checked(options[0], v, where) for v in value)
    if kind is float and type(value) in (int, float) and abs(value) < 1e6:
        return float(value)
    if kind is float or type(value) is not kind:
        raise Refusal(f"{where} is {value!r:.40}, which is not its type or range")
    return value


def assign(module, tensors, path):
    """Give a module its tensors, without copying float32. Raises Refusal naming every misfit."""
    expected = module.state_dict()
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in sorted(expected.keys() & tensors.keys()):
        need, have = list(expected[name].shape), list(tensors[name].shape)
        if need != have:
            wrong.append(f"{name} is {have}, not {need}")
        elif not tensors[name].is_floating_point():
            wrong.append(f"{name} is {tensors[name].dtype}")
    if wrong:
        raise Refusal(f"{path}: {len(wrong)} tensors do not fit: {one_line('; '.join(wrong))}")
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return module
