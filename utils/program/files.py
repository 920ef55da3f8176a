"""Files that are written whole or not at all, and read without running what is in them."""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import torch
from safetensors.torch import load as load_safetensors

from utils.program import RunFailed, UserError

# What a checkpoint may hold beside tensors: numbers of NumPy, such as a best accuracy. NumPy 1 and
# 2 call their maker differently. A type that is not here, such as that of objects, stays refused.
make_scalar = np.float64().__reduce__()[0]
NUMBER_CODES = np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"
NUMPY_SCALARS = [
    (make_scalar, "numpy._core.multiarray.scalar"),
    (make_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in NUMBER_CODES},
]


class TorchScript(Exception):
    """A file holds a program of torch and no weights: to load it would be to run it."""


@contextmanager
def unmade_on_failure(path: Path):
    """`path` and its parents: those that were absent before, and are empty, go again on failure."""
    absent = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    except Exception:
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()
        raise


def make_folder(path: Path, flag: str) -> None:
    """With its parents; none of them stays where that fails. Raises UserError."""
    with (
        refused(f"{flag} {path} cannot be made", way_out="name a folder", kinds=OSError),
        unmade_on_failure(path),
    ):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(file: Path, flag: str) -> None:
    """Raises UserError where the file that a flag names cannot be written."""
    if not os.path.exists(file.absolute().parent):
        raise UserError(f"{flag} {file}: its folder is not there; make it, or give another file")
    if os.path.isdir(file) or not os.access(file.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {file}: give a file in a folder that you may write to")
    # What is written takes the place of what has the name: /dev/null would be gone.
    is_device = os.path.exists(file) and not os.path.isfile(file)
    is_stream = os.path.islink(file) and os.path.dirname(os.path.abspath(file)) == "/dev"
    if is_device or is_stream:
        raise UserError(f"{flag} {file}: this is no regular file; give another one")


def check_not_input(file: Path, flag: str, inputs: Iterable[Path]) -> None:
    """Raises UserError where the file that a flag names is there, and the command reads it.

    `inputs`: files and folders that it reads; those of a folder are all that lie in or below it.
    """
    if not os.path.exists(file):
        return
    entry = Path(os.path.realpath(file.parent), file.name)  # what would be replaced, also a link
    for source in inputs:
        if os.path.isdir(source):
            is_read = entry.is_relative_to(os.path.realpath(source))
        else:
            is_read = os.path.exists(source) and os.path.samefile(file, source)
        if is_read:
            raise UserError(
                f"{flag} {file}: would write over what is read ({source}); give another file"
            )


def safe_name(text: str) -> str:
    """A file name from any text: unusual characters become `-`, a long one ends in its hash."""
    safe = re.sub(r"[^A-Za-z0-9+=.,_-]", "-", text).lstrip(".") or "run"
    if len(safe) > 180:
        safe = f"{safe[:160]}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return safe


@contextmanager
def atomic(path: Path, mode: str = "wb"):
    """A file in memory; at the end it goes to disk under another name and is renamed to `path`.

    So a disk that is full is met here and not in a library's writer. Raises RunFailed.
    """
    content = io.BytesIO() if "b" in mode else io.StringIO()
    yield content

    # Process numbers repeat: in containers that share a folder many are number 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, mode) as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunFailed(
            f"cannot write {path}: {error.strerror}; the files written before are whole, and the "
            "same command goes on from them"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content) -> None:
    with atomic(path, "w") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: Path, way_out: str) -> dict:
    """A JSON object. Raises UserError, which ends in `way_out`."""
    with refused(f"{path} cannot be read", way_out):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    return content


def write_torch(path: Path, content) -> None:
    with atomic(path) as file:
        torch.save(content, file)


def read_torch(path: Path, way_out: str) -> dict:
    """What torch.save or safetensors wrote, a dictionary. No code in it is run.

    Raises UserError, which says why not and ends in `way_out`.
    """
    try:
        content = unpack(path)
    except OSError as error:
        reason = error.strerror
    except TorchScript:
        reason = (
            "it is a TorchScript program, and to load one is to run it; save its weights alone: "
            "torch.save(torch.jit.load(file).state_dict(), other_file)"
        )
    # Damaged bytes raise whatever the unpickler stumbles over, from KeyError to UnicodeDecodeError.
    except Exception as error:
        reason = reason_of(error)
    else:
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__} and no dictionary, such as a state dict"
    raise UserError(f"{path} cannot be read: {reason}; {way_out}")


def reason_of(error: Exception) -> str:
    """Why torch has not read a file: something other than tensors is in it, or it is damaged."""
    # The name of the refused type stands in torch's message only.
    refused_type = re.search(r"GLOBAL (\S+)", str(error))
    if refused_type is not None:
        return (
            f"it holds more than tensors ({refused_type[1]}), and loading that could run code; "
            "save the weights alone: torch.save(net.state_dict(), file)"
        )
    return (
        "it is damaged, cut short or not written by torch.save or safetensors; copy or download it "
        "again"
    )


def unpack(path: Path):
    """The content of a file of torch.save or safetensors. Raises almost any Exception."""
    if path.stat().st_size > psutil.virtual_memory().available:
        raise OSError(errno.EFBIG, "it is larger than the free memory")
    data = path.read_bytes()
    return unpack_safetensors(data) if is_safetensors(data) else unpack_torch(data)


def unpack_torch(data: bytes):
    """Tensors, and plain values and numbers of NumPy beside them; no code is run.

    torch itself does not look at the checksums in its archives. Raises TorchScript where the file
    is a program, and almost any other Exception.
    """
    file = io.BytesIO(data)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise TorchScript
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("torch.save does not compress: this could fill the memory")
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
    file.seek(0)
    with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
        warnings.simplefilter("ignore")  # torch warns of odd formats before it refuses them
        return torch.load(file, map_location="cpu", weights_only=True)


def unpack_safetensors(data: bytes) -> dict:
    """The tensors; of a file of scripts/export.py what model_best.pth holds, tensors included."""
    tensors = load_safetensors(data)
    about = {}
    with suppress(ValueError):  # another program's text under that name
        about = json.loads(safetensors_metadata(data).get("checkpoint", "{}"))
    is_ours = isinstance(about, dict) and "model" in about
    return about | {"state_dict": tensors} if is_ours else tensors


def is_safetensors(data: bytes) -> bool:
    """By its header: its length in eight bytes, then JSON."""
    return data[8:9] == b"{"


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The texts that a file says of itself. Raises ValueError where it is damaged."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})


def open_npz(file: Path | BinaryIO, copies: int = 1):
    """What np.load makes of an archive whose content fits in memory, so many times.

    Pickled objects, which could run code, are refused when read. Raises almost any Exception.
    """
    with zipfile.ZipFile(file) as archive:
        require_memory(copies * sum(part.file_size for part in archive.infolist()))
    if hasattr(file, "seek"):  # ZipFile has left an open file at its end
        file.seek(0)
    return np.load(file, allow_pickle=False)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def refused(fault: str, way_out: str, kinds=Exception):
    """Any of these exceptions becomes a UserError: `fault` (the exception's words); `way_out`.

    Any at all by default: damaged files raise a dozen kinds, and each means the same to the user.
    """
    try:
        yield
    except kinds as error:
        reason = one_line(error)[:300] or type(error).__name__  # torch lists every tensor
        raise UserError(f"{fault} ({reason}); {way_out}") from error


def require_memory(size: int) -> None:
    """Raises ValueError where so many bytes are not free."""
    free = psutil.virtual_memory().available
    if size > free:
        raise ValueError(f"needs {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def files_below(folder: Path, name: str) -> list[Path]:
    """All files of that name in or below a folder, also behind symbolic links, each once."""
    paths = []
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a second way to it, or a link back up
            folders.clear()
        elif name in files:
            paths.append(Path(place, name))
        visited.add(real)
    return sorted(paths)
