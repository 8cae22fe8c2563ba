"""The corpus `stdlib`: real text that every Python brings along, so that a first run needs no network.

It is the language reference as pydoc has it, the sources of the standard library, and the docstrings of modules
written in C; about 11 MB in CPython 3.11. The same Python gives the same documents in the same order.
"""

import importlib
import io
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, ModuleType

from fastgpt.data.text_file import text_documents

# Tests, a translator's fixtures, bundled wheels, what others installed, and the topics once more.
LEFT_OUT_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "turtledemo"),
    *("site-packages", "dist-packages", "pydoc_data", "__pycache__"),
}
BUILD_RECORDS = ("_sysconfigdata", "config-")  # how and where this Python was built

# Importing these does nothing but define things. Which of them are built in differs between Pythons.
EXTENSIONS = (
    *("_asyncio", "_bisect", "_bz2", "_contextvars", "_csv", "_datetime", "_decimal", "_elementtree", "_hashlib"),
    *("_heapq", "_json", "_lzma", "_pickle", "_posixsubprocess", "_queue", "_random", "_socket", "_sqlite3"),
    *("_statistics", "_struct", "_zoneinfo", "array", "binascii", "cmath", "fcntl", "grp", "math", "mmap"),
    *("pyexpat", "resource", "select", "termios", "unicodedata", "zlib"),
)
# Some Pythons have modules built in that touch the terminal or the display.
LEFT_OUT_BUILT_INS = {"_tkinter", "_curses", "_curses_panel", "readline", "_ctypes"}

HIDDEN_PARAMETER = re.compile(r"\(\$\w+(, /)?(, )?")  # a C function's own module or object: "($module, x, /)"


def stdlib_documents() -> Iterator[str]:
    """The documents of the running Python, long ones cut like text files."""
    for name, text in chain(topics(), sources(), built_in_docstrings()):
        yield from text_documents(io.BytesIO(text), name)


def topics() -> Iterator[tuple[str, bytes]]:
    """The language reference: the topics of `help()`."""
    from pydoc_data.topics import topics as pages

    for name in sorted(pages):
        yield name, pages[name].encode()


def sources() -> Iterator[tuple[str, bytes]]:
    """The modules written in Python, where this Python has their sources and they are UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in set(folders) - LEFT_OUT_FOLDERS if not name.startswith(BUILD_RECORDS))
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith(BUILD_RECORDS):
                path = Path(folder, file)
                text = path.read_bytes()
                if is_utf8(text):
                    yield path.relative_to(root).as_posix(), text


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are UTF-8, as all but a few old modules are."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def built_in_docstrings() -> Iterator[tuple[str, bytes]]:
    """What the modules written in C say about themselves, one document a module; no docstring comes twice."""
    seen: set[str] = set()
    for name in sorted({*sys.builtin_module_names, *EXTENSIONS} - LEFT_OUT_BUILT_INS):
        if name.startswith(("_test", "xx", "_xx")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # not part of this build of Python
            continue
        new = {text: head for head, text in docstrings(module) if text not in seen}
        seen.update(new)
        yield name, "\n\n".join(f"{head}\n    {text}" for text, head in new.items()).encode()


def docstrings(module: ModuleType) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, of its functions and classes, and of their methods, each under its name."""
    yield from entry(module.__name__, module)
    for name, value in sorted(vars(module).items()):
        # Hooks, as sys.excepthook, are there to be replaced by programs; so is what is not written in C.
        if name.startswith("__") or name.endswith("hook") or not isinstance(value, (type, BuiltinFunctionType)):
            continue
        yield from entry(name, value)
        if isinstance(value, type):
            for attribute, method in sorted(vars(value).items()):
                if hasattr(method, "__get__"):
                    yield from entry(f"{name}.{attribute}", method)


def entry(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The name of something with its signature, and its docstring, indented below it, where it has one."""
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and text:
        signature = HIDDEN_PARAMETER.sub("(", getattr(value, "__text_signature__", None) or "")
        yield f"{name}{signature}", text.replace("\n", "\n    ")
