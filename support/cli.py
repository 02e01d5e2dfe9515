"""What every command shares: errors on one line, arguments, progress, whole-file writing."""

import argparse
import contextlib
import ctypes
import math
import os
import sys
import time
from pathlib import Path

CLEAR_LINE = "\r\x1b[K"  # empties the current line of a terminal
ADVICE = (  # what the text of an exception holds, and then what the user can do
    ("MemoryError", "out of memory; make the batch, the size or the model smaller"),
    ("out of memory", "out of memory; make the batch, the size or the model smaller"),
    ("allocate memory", "out of memory; make the batch, the size or the model smaller"),
    ("C++ compiler", "--compile needs a C++ compiler and finds none; run without it"),
    ("C compiler", "--compile needs a C compiler and finds none; run without it"),
    ("by peer", "another process of this run has ended; its own last lines say why"),
)


class UserError(Exception):
    """Something that the user can fix. One line: the file, what is wrong, what to do."""


def one_line(error):
    """The text of an exception on one line, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


def advice(error):
    """What to do about an exception that is no bug, or None for a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, (UserError, OSError)):
        return one_line(error)
    text = f"{type(error).__name__}: {error}"
    return next((what for sign, what in ADVICE if sign in text), None)


def run_command(main):
    """Call `main` and exit with what it returns.

    What the user can fix (UserError, OSError, too little memory, no compiler) is one line on
    stderr and exit status 2. Any other exception is a bug and keeps its traceback.
    """
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with closed streams
            setattr(sys, name, open(os.devnull, "w"))
        # A console that lacks a letter shows it as \u606f; it does not end the run.
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = advice(error)
        if text is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory():
    """Let glibc keep the memory that a tensor frees; on other systems do nothing.

    Otherwise large blocks go back to the kernel, which clears them page by page when the next
    step asks for them: a sixth of the time of training on a CPU.
    """
    mmap_max, trim_threshold = -4, -1  # constants of <malloc.h>; see mallopt(3)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # take no block from mmap
        libc.mallopt(trim_threshold, 2**31 - 1)  # return none below 2 GiB


# ---- arguments ----


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False, which tell a reader nothing."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and errors on one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def given(self, argv=None):
        """The names of the arguments that stand on the command line."""
        absent = argparse.Namespace(**{action.dest: self for action in self._actions})
        return {k for k, v in vars(self.parse_args(argv, absent)).items() if v is not self}


def bounded(kind, low, high=math.inf):
    """A type for argparse: an int or a finite float from `low` to `high`, both included."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            span = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {span}")
        return value

    read.__name__ = kind.__name__  # argparse then says "invalid int value"
    return read


positive_int = bounded(int, 1)
seed_int = bounded(int, 0, 2**32 - 1)


# ---- files and lines ----


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it.

    A reader sees the old file or the new one, never half of one. After an error nothing is left.
    Its permissions are the usual ones, because safetensors makes files that nobody else can read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last because libraries choose the format by it.
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rank_and_world_size():
    """-> rank, number of processes, rank on this machine: torchrun's, else 0, 1, 0."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return [int(os.environ.get(name, default)) for name, default in defaults.items()]


def print0(text):
    """Print on rank 0 only, at once."""
    if rank_and_world_size()[0] == 0:
        print(text, flush=True)


def print_line(text, file=None):
    """Print one line; on a terminal it replaces the progress line."""
    if sys.stderr.isatty():
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
    print(one_line(text), file=file, flush=True)


def format_duration(seconds):
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Prints done / total, rate and time left to stderr: every 30 s in a log, or as one moving
    line on a terminal. Short jobs print nothing. Only rank 0 prints.
    """

    def __init__(self, total, unit):
        self.total, self.unit, self.done = total, unit, 0
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else 30.0
        if rank_and_world_size()[0]:
            self.interval = math.inf
        self.began = self.shown = time.monotonic()

    def step(self, n=1):
        self.done += n
        now = time.monotonic()
        finished = self.done >= self.total and self.shown > self.began
        if now - self.shown < self.interval and not finished:
            return
        self.shown = now
        rate = self.done / (now - self.began)
        left = format_duration((self.total - self.done) / rate)
        text = f"{self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left} left"
        if self.terminal:
            text = CLEAR_LINE if finished else CLEAR_LINE + text
        print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)
