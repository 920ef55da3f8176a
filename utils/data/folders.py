"""What lies in a folder of images: which files have a label, and what is not read.

FOLDER/train/CLASS/**/*.jpg      any format that Pillow reads; classes in the order of their names
FOLDER/test/CLASS/...            tests; or val/, where there is no test/ or it has no labels
FOLDER/val/CLASS/...             validates, where test/ tests
FOLDER/val/val_annotations.txt   instead of class folders, as in Tiny-ImageNet

Whatever else lies there is named and counted in one line. Class names are compared in one Unicode
spelling: macOS and Linux write an accent differently.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

Labelled = list[tuple[str, str]]  # class and file of each image
PARTS = ("train", "val", "test")
ANNOTATIONS = "val_annotations.txt"
# Beside names that begin with a dot: what systems and file servers put into any folder.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "lost+found", "$recycle.bin"}
HIDDEN, EMPTY, LOOSE = "hidden", "class folders without an image", "in no class folder"


@dataclass
class Part:
    """train/, val/ or test/ of a folder."""

    folder: Path
    images: Labelled = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)  # name -> its folders
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by kind

    @property
    def labels(self) -> set[str]:
        return {label for label, _ in self.images}


@dataclass
class Listing:
    """The labelled images of a folder. `val`: of a validation split of its own, or empty."""

    train: Labelled
    val: Labelled
    test: Labelled
    notes: list[str]  # what is not read, and what is read otherwise than one may expect


def list_folder(folder: Path) -> Listing:
    """Raises OSError, and ValueError, which says what is wrong with the folder."""
    train, val, test = (read_part(folder / name) for name in PARTS)
    check_training(train, len(val.images) + len(test.images))
    labelled, notes = [], []
    for part in (val, test):
        if part.labels & train.labels:
            check_known(part, train)
            labelled.append(part)
        elif part.folder.is_dir():
            notes.append(f"{part.folder.name}/ has no class of train/: it is not read")
    if not labelled:
        raise ValueError(f"no image to test on has a label; {'; '.join(notes)}")
    validates = labelled[0].images if len(labelled) == 2 else []
    notes = [f"{note}, and {labelled[0].folder.name}/ is the test split" for note in notes]
    if validates:
        notes.append(f"the {len(validates)} images of val/ validate, and all of train/ trains")
    notes += [note for part in (train, *labelled) for note in spelt_alike(part)]
    notes += not_read(folder, [train, *labelled])
    return Listing(train.images, validates, labelled[-1].images, notes)


def check_training(train: Part, others: int) -> None:
    """Refuse a class without an image, and fewer than two classes. `others`: images elsewhere."""
    for label, folders in train.classes.items():
        if label not in train.labels:
            found = " and ".join(content(train, name) for name in folders)
            fault = f"class {label} has no image in train/{label}/ that can be read ({found})"
            raise ValueError(f"{fault}; put some there, or delete the folder")
    if len(train.labels) < 2 or not others:
        count = f"{len(train.images)} images of {len(train.labels)} classes in train/CLASS/"
        wanted = "val/CLASS/ or test/CLASS/; both need images of two classes"
        raise ValueError(f"{count} and {others} in {wanted}")


def content(part: Part, name: str) -> str:
    """What a class folder without an image holds."""
    path = part.folder / name
    if not path.exists():
        return "a link to nowhere"
    kinds = {
        kind: sum(file.startswith(f"{path}/") for file in files)
        for kind, files in part.left_out.items()
    }
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n) or "it is empty"


def check_known(part: Part, train: Part) -> None:
    """Refuse a class that has no training image."""
    absent = sorted(part.labels - train.labels)
    if not absent:
        return
    label = absent[0]
    alike = [each for each in train.labels if plain(each) == plain(label)]
    if alike:
        way_out = f"train/ has {alike[0]!r}: give both one name"
    else:
        way_out = f"put some into train/{label}/, or leave the class out"
    fault = f"class {label} of {part.folder.name}/ (one of {len(absent)}) has no training image"
    raise ValueError(f"{fault}; {way_out}")


def plain(label: str) -> str:
    return label.strip().casefold()


def spelt_alike(part: Part) -> list[str]:
    """A line for each class of two folders, whose names look the same."""
    return [
        f"{len(folders)} folders of {part.folder.name}/ are called {label}, in different Unicode "
        "spellings: they are read as one class"
        for label, folders in part.classes.items()
        if len(folders) > 1
    ]


def not_read(folder: Path, parts: list[Part]) -> list[str]:
    """A line that counts what is not read, by kind, if there is any."""
    kinds = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in PARTS and not is_hidden(path.name):
            kinds["folders beside train/, val/ and test/"].append(str(path))
    for part in parts:
        for kind, paths in part.left_out.items():
            kinds[kind] += paths
    counts = [
        f"{len(paths)} {kind} (first {os.path.relpath(paths[0], folder)})"
        for kind, paths in kinds.items()
    ]
    return [f"not read: {', '.join(counts)}"] if counts else []


def read_part(folder: Path) -> Part:
    part = Part(folder)
    if not folder.is_dir():
        return part
    if (folder / ANNOTATIONS).exists():
        read_annotations(part)
        return part
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            part.left_out[HIDDEN].append(str(path))
        elif path.is_dir() or not path.exists():  # a link may lead nowhere
            label = one_spelling(path.name)
            part.classes.setdefault(label, []).append(path.name)
            images = images_below(path, part) if path.exists() else []
            part.images += [(label, file) for file in images]
            if not images:
                part.left_out[EMPTY].append(str(path))
        else:
            part.left_out[LOOSE].append(str(path))
    return part


def read_annotations(part: Part) -> None:
    """A line for each image: its file's name in images/, a tab, its class."""
    file = part.folder / ANNOTATIONS
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, tab, rest = line.partition("\t")
        label = one_spelling(rest.partition("\t")[0])
        if tab and name and label:
            part.images.append((label, f"{part.folder}/images/{name}"))
        elif line.strip():
            raise ValueError(f"{file} line {number}: a file name, a tab and a class are wanted")
    listed = {file for _, file in part.images}
    present = (path for path in sorted(part.folder.rglob("*")) if path.is_file() and path != file)
    for path in present:
        if str(path) not in listed:
            part.left_out[f"not in {ANNOTATIONS}"].append(str(path))


def images_below(folder: Path, part: Part) -> list[str]:
    """Files below a class folder that Pillow may read; counts the others."""
    known, images = Image.registered_extensions(), []
    for place, names in sorted(folders_below(folder, part)):
        for name in sorted(names):
            file, suffix = f"{place}/{name}", os.path.splitext(name)[1]
            if is_hidden(name):
                part.left_out[HIDDEN].append(file)
            elif known.get(suffix.lower()) in Image.OPEN:
                images.append(file)
            else:
                part.left_out[f"*{suffix}" if suffix else "without a suffix"].append(file)
    return images


def folders_below(folder: Path, part: Part) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of it and all below, also behind links; counts hidden ones."""
    places = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in places:  # a second way to it, or a link back up
            folders.clear()
            continue
        places.add(real)
        hidden = [f"{place}/{name}" for name in folders if is_hidden(name)]
        if hidden:
            part.left_out[HIDDEN] += hidden
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, names


def fail(error: OSError) -> None:
    """A folder that cannot be read is not an empty one."""
    raise error


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def one_spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name)
