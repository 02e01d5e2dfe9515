"""Checkpoints of unknown origin, read without running them: PyTorch's .ckpt and .bin, safetensors.

torch.save writes a zip: one pickle that describes the tensors and, uncompressed, their numbers.
A pickle is a program and can do anything; here its opcodes are interpreted, and none imports or
calls. Files are mapped, not read, and every size they claim is checked before memory is taken.
"""

import mmap
import pickletools
import struct
import zipfile

import safetensors
import torch

from common import Refusal, one_line

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
PICKLE_LIMIT = 64 << 20  # bytes; it holds names, shapes and settings, the numbers lie elsewhere
NOT_WEIGHTS = (  # how files begin that are often taken for checkpoints
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run git lfs pull"),
    (b"<", "a web page, not a checkpoint; download the file itself"),
    (b"\x80\x02\x8a\nl\xfc\x9cF", "saved by PyTorch before 1.6; save it again with a newer one"),
)


def unpickle(data, storage):
    """The containers and tensors that a pickle describes.

    A class or function is its name, "module name"; an object of a class that we do not know is
    None; a tuple becomes a list. `storage` turns what the pickle says of a tensor's numbers
    (kind, key, device, count) into a flat tensor. A damaged pickle can raise anything.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        takes = opcode.stack_before
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif opcode.name == "STOP":
            return stack[-1]
        else:
            start = len(stack) - len(takes)
            if pickletools.markobject in takes:  # takes all that lies above the last mark
                start = marks.pop() - takes.index(pickletools.markobject)
            taken = stack[start:]
            del stack[start:]
            stack += step(opcode, arg, taken, storage)


def step(opcode, arg, taken, storage):
    """What one opcode pushes on the stack, given what it takes from it."""
    match opcode.name:
        case "EMPTY_DICT" | "DICT":
            return [fill({}, taken)]
        case "EMPTY_LIST" | "LIST" | "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
            return [taken]
        case "SETITEM" | "SETITEMS" | "APPEND" | "APPENDS":
            return [fill(taken[0], taken[1:])]
        case "BUILD":  # sets attributes, of which a container needs none
            return taken[:1]
        case "STACK_GLOBAL":
            return [" ".join(word[:1000] for word in taken)]  # lest it be doubled again and again
        case "BINPERSID":
            return [storage(*taken[0][1:])]
        case "REDUCE":
            return [call(*taken)]
        case _:  # a constant, which is its argument, or an object that is not made
            return [arg] * len(opcode.stack_after)


def fill(container, items):
    if isinstance(container, list):
        container += items
    elif isinstance(container, dict):
        pairs = zip(items[::2], items[1::2])
        container.update((k, v) for k, v in pairs if isinstance(k, (str, int)))
    return container


def call(function, args):
    """What a call in a pickle stands for: one of the three that state dicts need, else None."""
    if function == "torch._utils _rebuild_tensor_v2" and args[0] is not None:
        storage, offset, size, stride = args[:4]
        return storage.as_strided(size, stride, offset)  # raises where that leaves the storage
    if function == "torch._utils _rebuild_parameter":
        return args[0]
    return {} if function == "collections OrderedDict" else None


def read_zip(path, mapped):
    """The object that torch.save wrote."""
    infos = zipfile.ZipFile(path).infolist()
    root = next((i.filename[:-8] for i in infos if i.filename.endswith("data.pkl")), None)
    if root is None:
        raise Refusal("a zip without a checkpoint in it; unpack it and give the model.ckpt inside")
    members = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        name_size, extra_size = struct.unpack_from("<HH", mapped, info.header_offset + 26)
        members[info.filename] = info.header_offset + 30 + name_size + extra_size, info.file_size

    def storage(kind, key, _device, count):
        start, size = members[f"{root}data/{key}"]
        dtype = STORAGES.get(kind)
        if dtype is None:
            return None
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"data/{key} has {size} bytes, not {count} numbers")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)  # checks the end

    start, size = members[f"{root}data.pkl"]
    if size > PICKLE_LIMIT:
        raise ValueError(f"its pickle claims {size} bytes")
    return unpickle(mapped[start : start + size], storage)


def named_tensors(value):
    """Nested containers -> {"a.b.c": tensor}; a level called "state_dict" adds no name."""
    named, todo, seen = {}, [("", value)], set()
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, torch.Tensor):
            named[prefix[:-1]] = value
        elif isinstance(value, (dict, list)) and id(value) not in seen and len(prefix) < 500:
            seen.add(id(value))  # a pickle can describe a list that holds itself
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(prefix if k == "state_dict" else f"{prefix}{k}.", v) for k, v in items]
    return named


def check_beginning(start):
    """Raise Refusal for what is no checkpoint, by a file's first bytes."""
    if not start:
        raise Refusal("empty; download it again")
    for beginning, what in NOT_WEIGHTS:
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(beginning):
            raise Refusal(what)
    if start.isascii() and b"\0" not in start:
        raise Refusal("a text file, not a checkpoint")
    if not (start.startswith(b"PK\3\4") or start[8:9] == b"{"):
        raise Refusal("neither a .ckpt of PyTorch 1.6 or later nor a .safetensors file")


def read_tensors(path):
    """{name: tensor} of a file, mapped. Its content tells what it is, not its name.

    Raises Refusal for anything but a whole checkpoint; OSError.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            check_beginning(start)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if start.startswith(b"PK"):
            return named_tensors(read_zip(path, mapped))
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Refusal as error:
        raise Refusal(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        problem = one_line(f"{type(error).__name__}: {error}")[:200]
        raise Refusal(f"{path}: truncated or damaged ({problem}); download it again") from None
