"""What every command shares: one-line refusals, whole files, progress.

Nothing here imports torch or numpy, so that `--help` answers at once.
"""

import contextlib
import ctypes
import difflib
import math
import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, HelpFormatter
from pathlib import Path

PARTS = ("train", "val", "test")  # of a data set
MAX_CLASSES = 14  # background included: as many colours as `sdseg.class_colours` keeps apart
CLEAR = "\r\x1b[K"  # empties a terminal's line
SHIPPED = Path(__file__).parent / "weights" / "nano.safetensors"  # the model that ships


class Refusal(Exception):
    """A request that cannot be met. Its text is one line: the file, what is wrong, what to do."""


def one_line(error):
    """The text of an exception on one line, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


def run(main):
    """Call `main` and turn what a user can mend into one line on stderr and an exit status.

    A Refusal, an OSError (disk full, no permission) and too little memory exit 2. Whatever `main`
    returns is the exit status otherwise. Any other exception is a bug and keeps its traceback.
    """
    keep_freed_memory()
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (Refusal, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (Refusal, OSError)) and not out_of_memory(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def torchrun_place():
    """-> rank, number of processes, rank on this machine; 0, 1, 0 without torchrun."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return [int(os.environ.get(name, default)) for name, default in defaults.items()]


def out_of_memory(error):
    """Whether an exception says so: Python's and NumPy's MemoryError, PyTorch's RuntimeErrors."""
    text = f"{type(error).__name__}: {error}"
    signs = ("OutOfMemoryError", "out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def keep_freed_memory():
    """Let glibc keep what a tensor frees for the next one; elsewhere do nothing.

    It would hand large blocks back to the kernel, which clears them page by page when they are
    asked for again, every step: a sixth of the time of training on a CPU.
    """
    mmap_max, trim_threshold = -4, -1  # of <malloc.h>; see mallopt(3)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # take no block from mmap
        libc.mallopt(trim_threshold, 2**31 - 1)  # and return none below 2 GiB


def within(kind, low, high=math.inf):
    """A type for argparse: an int or a finite float from `low` to `high`, both included."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            span = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise ArgumentTypeError(f"{text} is not {span}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


positive = within(int, 1)
any_seed = within(int, 0, 2**32 - 1)  # PyTorch takes it times 1,000,003, too; see train.Batches


class Help(HelpFormatter):
    """Ends each flag's help with its default, unless the help says it or there is none."""

    def _get_help_string(self, action):
        silent = any(action.default is value for value in (None, False, SUPPRESS))
        said = silent or "(default" in action.help
        return action.help if said else f"{action.help} (default: %(default)s)"


class Parser(ArgumentParser):
    """argparse with defaults in `--help`, no abbreviations, and one-line errors that suggest."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def group(self, title):
        """-> the `add_argument` of a group of flags that `--help` shows together."""
        return self.add_argument_group(title).add_argument

    def error(self, message):
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = message.partition("unrecognized arguments: ")[2].split()
        near = [m for w in wrong for m in difflib.get_close_matches(w.partition("=")[0], known, 1)]
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        self.exit(2, f"{self.prog}: {message}{hint}\n")


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    A reader sees the old file or the new one, never half of one; on an error nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last: libraries choose the format by it.
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """done / total, rate, time left: a line now and then in a log, on a terminal one that moves and
    is gone at the end. What is over before the first is due prints nothing, and of torchrun's
    processes only the first speaks.
    """

    def __init__(self, total, unit):
        self.total, self.unit, self.done = total, unit, 0
        self.terminal = sys.stderr.isatty()
        self.pause = math.inf if torchrun_place()[0] else 0.2 if self.terminal else 30.0
        self.began = self.shown = time.monotonic()

    def step(self, n=1):
        self.done += n
        now = time.monotonic()
        over = self.done >= self.total and self.shown > self.began
        if now - self.shown >= self.pause or over:
            self.shown = now
            rate = self.done / (now - self.began)
            left = duration((self.total - self.done) / rate)
            text = f"{self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left} left"
            if self.terminal:
                text = CLEAR if over else CLEAR + text
            print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)


def duration(seconds):
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
