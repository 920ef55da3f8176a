"""The command line of every program: one-line errors, hints, and the values that flags take."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from utils.program.errors import UserError
from utils.program.hints import flag_hint, stray_hint

LARGEST = 10**9


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, but not "(default: None)"."""

    def _get_help_string(self, action):
        # 0 is a default, though it equals False.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """argparse with one-line errors, either of `_` and `-`, and a hint for a misspelt flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        argv = [self.respelled(word) if word.startswith("--") else word for word in argv]
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} is not a flag here; {self.hint(unknown[0], argv)}")
        return args

    def respelled(self, word: str) -> str:
        """`--weight_decay=1` as `--weight-decay=1`, where that is how the flag is written here."""
        spellings = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        flag, equals, value = word.partition("=")
        return spellings.get(flag.replace("_", "-"), flag) + equals + value

    def hint(self, word: str, argv: list[str]) -> str:
        actions = self._option_string_actions
        if word.startswith("-"):
            return flag_hint(word, actions)
        takes_value = {flag: action.nargs != 0 for flag, action in actions.items()}
        return stray_hint(word, argv, takes_value)

    def error(self, message: str):
        raise UserError(" ".join(message.removeprefix("argument ").split()))


def number(kind: type, wanted: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number for which `allowed` holds; `wanted` says so in words."""

    def convert(text: str) -> float:
        fault = argparse.ArgumentTypeError(f"{text[:80]!r} will not do; give {wanted}")
        try:
            value = kind(text)
        except ValueError:
            raise fault from None
        if not (math.isfinite(value) and allowed(value)):
            raise fault
        if abs(value) > LARGEST:
            raise argparse.ArgumentTypeError(
                f"{text[:80]!r} will not do; give a number of at most {LARGEST:g}"
            )
        return value

    return convert


def checked(check: Callable[[str], str]) -> Callable[[str], str]:
    """An argparse type: a text that `check` accepts, else the ValueError's own words."""

    def convert(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def short_text(longest: int) -> Callable[[str], str]:
    """An argparse type: a text of so many characters that garbles no message, log or table."""

    def check(text: str) -> str:
        if not (text.strip() and text.isprintable() and len(text) <= longest):
            raise ValueError(f"{text[:80]!r} will not do; give 1 to {longest} printable characters")
        return text

    return checked(check)


def suffix(text: str) -> str:
    """A part of a folder's name. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9+=.,_-]{1,80}", text):
        raise ValueError(f"{text!r} will not do; give 1 to 80 letters, digits or any of +=.,_-")
    return text


def path(text: str) -> str:
    """An argparse type: a path, with ~ for the user's folder."""
    return os.path.expanduser(short_text(4000)(text))


def location(text: str) -> Path:
    """An argparse type: the same as a Path."""
    return Path(path(text))


count = number(int, "a whole number of at least 1", lambda n: n >= 1)
whole = number(int, "a whole number of at least 0", lambda n: n >= 0)
positive = number(float, "a number above 0", lambda x: x > 0)
weight = number(float, "a number of at least 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
between_zero_and_one = number(
    float, "a fraction above 0 and below 1, such as 0.9", lambda x: 0 < x < 1
)
below_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
