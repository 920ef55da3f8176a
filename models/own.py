"""Nets of the user's own: `FILE.py:function`, a file whose code runs because its user names it.

The function, or the class, is called with `num_classes` and gives a torch.nn.Module: images
(B, 3, H, W) in, logits (B, K) out. Code runs when a command line names it and never else: what a
run says of its net is looked up among the files that were named, and has to agree with one.
"""

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.nn.parameter import is_lazy

FORM = "FILE.py:function"


@dataclass(frozen=True)
class OwnNet:
    """A function that makes a net, and the file that it was read from."""

    file: Path
    function: str
    content: bytes  # of the file
    make: Callable[..., nn.Module]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def label(self) -> str:
        """`mynet.tiny`: what runs and their folders are called by, wherever the file lies."""
        return net_label(f"{self.file}:{self.function}")

    def build(self, num_classes: int) -> nn.Module:
        """Raises ValueError where the function fails, or gives no net that can be trained."""
        call = f"{self.function}(num_classes={num_classes}) of {self.file}"
        try:
            net = self.make(num_classes=num_classes)
        # Any exception: the code is the user's own.
        except Exception as error:
            raise ValueError(f"{call} fails: {where_and_why(error, self.file)}") from error
        if not isinstance(net, nn.Module):
            raise ValueError(f"{call} gives a {type(net).__name__} and no torch.nn.Module")
        if any(is_lazy(weights) for weights in net.parameters()):
            raise ValueError(f"{call} has lazy layers; give the sizes of their inputs")
        return net


# What command lines have named in this process. A file is read here and nowhere else: so the code
# that runs, its hash and the copy in the run folder are one, though its user edits it meanwhile.
NAMED: dict[str, OwnNet] = {}


def is_own(name: str) -> bool:
    return re.fullmatch(r".+\.py:[^\W\d]\w*", name) is not None


def read_own(name: str) -> OwnNet:
    """Run the file of a FILE.py:function, and remember the function by that name.

    Raises ValueError, which says in one line what is wrong with the file or the function.
    """
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); check the path") from None

    module = ModuleType(f"own_net_{hashlib.sha256(content).hexdigest()}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and others look for their module
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    # Also the SystemExit of a script that was not made to be imported.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} cannot be imported: {where_and_why(error, file)}") from error

    NAMED[name] = OwnNet(file, function, content, make=function_of(module, file, function))
    return NAMED[name]


def function_of(module: ModuleType, file: Path, function: str) -> Callable[..., nn.Module]:
    """What is called so in the module. Raises ValueError where it cannot make a net."""
    if function not in vars(module):
        own = [name for name, value in vars(module).items() if is_defined_in(module, value)]
        raise ValueError(f"{file} has no {function}; it has {', '.join(own) or 'no function'}")
    make = vars(module)[function]
    if not callable(make):
        raise ValueError(f"{function} of {file} is a {type(make).__name__} and no function")
    try:
        inspect.signature(make).bind(num_classes=10)
    except TypeError:
        raise ValueError(
            f"{function} of {file} cannot be called with num_classes alone; write "
            f"def {function}(num_classes)"
        ) from None
    return make


def is_defined_in(module: ModuleType, value) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def where_and_why(error: BaseException, file: Path) -> str:
    """`line 3, ModuleNotFoundError: No module named 'blocks'`; the line where the file has one."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines.append(error.lineno)
    place = f"line {lines[-1]}, " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9+=,_-]", "-", text)[:80]


def net_label(name: str) -> str:
    """`nets/mynet.py:tiny` -> `mynet.tiny`."""
    path, _, function = name.rpartition(":")
    return f"{safe(Path(path).stem)}.{safe(function)}"


def own_net(name: str) -> OwnNet:
    """What a command line named so. Raises ValueError where none did."""
    if name not in NAMED:
        raise ValueError(f"{name} was not named on the command line, and no other code is run")
    return NAMED[name]


def identity_of_net(name: str) -> dict[str, str]:
    """What a run says of its net: `model`, and of the user's own the SHA-256 of its file."""
    if not is_own(name):
        return {"model": name}
    net = own_net(name)
    return {"model": net.label, "model_sha256": net.sha256}


def name_of_saved(saved: Mapping, flag: str, given: Collection[str] = ()) -> str:
    """The name by which `build_model` makes the net that a run saved.

    Of the user's own that is the FILE.py:function which the command line named and whose hash
    agrees: one of those `given`, or else any. Raises ValueError where there is none; `flag` takes
    it.
    """
    if "model_sha256" not in saved:
        return saved["model"]
    _, _, function = saved["model"].rpartition(".")
    candidates = given or NAMED
    for name in candidates:
        net = NAMED.get(name)
        if net and net.sha256 == saved["model_sha256"] and safe(net.function) == function:
            return name
    differs = f", and not {' or '.join(candidates)}" if candidates else ""
    raise ValueError(
        f"its net is {saved['model']} of a file whose SHA-256 begins with "
        f"{saved['model_sha256']!s:.12}{differs}, and no run makes code run; name that file with "
        f"{flag} FILE.py:{function} (net.py in its run folder is a copy)"
    )
