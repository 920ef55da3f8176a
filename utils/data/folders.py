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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from utils.program.words import counted

Labelled = list[tuple[str, str]]  # class and file of each image
PathsByKind = dict[str, list[str]]  # that are not read
SPLITS = ("train", "val", "test")
ANNOTATIONS = "val_annotations.txt"
# Beside names that begin with a dot: what systems and file servers put into any folder.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "lost+found", "$recycle.bin"}
# Kinds of what is not read; others are a file's suffix.
HIDDEN = "hidden"
EMPTY = "class folders without an image"
LOOSE = "in no class folder"


@dataclass
class SplitFolder:
    """train/, val/ or test/ of a folder."""

    folder: Path
    images: Labelled = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)  # name -> its folders
    left_out: PathsByKind = field(default_factory=lambda: defaultdict(list))

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
    train = read_split(folder / "train")
    val = read_split(folder / "val")
    test = read_split(folder / "test")
    check_training(train, images_elsewhere=len(val.images) + len(test.images))

    # The last split that has labels tests; where both have, val/ validates.
    labelled = []
    unread = []
    for split in (val, test):
        if split.labels & train.labels:
            check_known(split, train)
            labelled.append(split)
        elif split.folder.is_dir():
            unread.append(f"{split.folder.name}/ has no class of train/: it is not read")
    if not labelled:
        raise ValueError(f"no image to test on has a label; {'; '.join(unread)}")

    notes = [f"{note}, and {labelled[0].folder.name}/ is the test split" for note in unread]
    validation = []
    if len(labelled) == 2:
        validation = val.images
        images = counted(len(validation), "image of val/ validates", "images of val/ validate")
        notes.append(f"the {images}, and all of train/ trains")
    for split in (train, *labelled):
        notes += spelt_alike(split)
    notes += not_read(folder, [train, *labelled])
    return Listing(train=train.images, val=validation, test=labelled[-1].images, notes=notes)


def check_training(train: SplitFolder, images_elsewhere: int) -> None:
    """Refuse a class without an image, fewer than two classes, and nothing to test on."""
    for label, folders in train.classes.items():
        if label not in train.labels:
            contents = " and ".join(content(train, name) for name in folders)
            raise ValueError(
                f"class {label} has no image in train/{label}/ that can be read ({contents}); put "
                "some there, or delete the folder"
            )
    if len(train.labels) < 2 or not images_elsewhere:
        raise ValueError(
            f"{counted(len(train.images), 'image')} of "
            f"{counted(len(train.labels), 'class', 'classes')} in train/CLASS/ and "
            f"{images_elsewhere} in val/CLASS/ or test/CLASS/; both need images of two classes"
        )


def content(split: SplitFolder, name: str) -> str:
    """What a class folder without an image holds."""
    path = split.folder / name
    if not path.exists():
        return "a link to nowhere"
    counts = []
    for kind, files in split.left_out.items():
        count = sum(file.startswith(f"{path}/") for file in files)
        if count:
            counts.append(f"{count} {kind}")
    return ", ".join(counts) or "it is empty"


def check_known(split: SplitFolder, train: SplitFolder) -> None:
    """Refuse a class that has no training image."""
    absent = sorted(split.labels - train.labels)
    if not absent:
        return
    label = absent[0]
    alike = [other for other in train.labels if folded(other) == folded(label)]
    if alike:
        way_out = f"train/ has {alike[0]!r}: give both one name"
    else:
        way_out = f"put some into train/{label}/, or leave the class out"
    raise ValueError(
        f"class {label} of {split.folder.name}/ (one of {len(absent)}) has no training image; "
        f"{way_out}"
    )


def folded(label: str) -> str:
    """What is left of a name where blanks around it and capitals do not count."""
    return label.strip().casefold()


def spelt_alike(split: SplitFolder) -> list[str]:
    """A line for each class of two folders, whose names look the same."""
    return [
        f"{len(folders)} folders of {split.folder.name}/ are called {label}, in different Unicode "
        "spellings: they are read as one class"
        for label, folders in split.classes.items()
        if len(folders) > 1
    ]


def not_read(folder: Path, splits: list[SplitFolder]) -> list[str]:
    """A line that counts what is not read, by kind, if there is any."""
    kinds = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SPLITS and not is_hidden(path.name):
            kinds["folders beside train/, val/ and test/"].append(str(path))
    for split in splits:
        for kind, paths in split.left_out.items():
            kinds[kind] += paths
    for kind, paths in kinds.items():
        kinds[kind] = [os.path.relpath(path, folder) for path in paths]
    return counted_kinds(kinds)


def counted_kinds(kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """A line that counts what is not read, if there is any; `kinds`: the files of each."""
    counts = [f"{len(paths)} {kind} (first {paths[0]})" for kind, paths in kinds.items()]
    return [f"not read: {', '.join(counts)}"] if counts else []


def read_split(folder: Path) -> SplitFolder:
    """By class folders or by annotations; empty where there is no such folder.

    Raises OSError, and ValueError for a line of annotations.
    """
    split = SplitFolder(folder)
    if not folder.is_dir():
        return split
    if (folder / ANNOTATIONS).exists():
        read_annotations(split)
        return split
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            split.left_out[HIDDEN].append(str(path))
        elif path.is_dir() or not path.exists():  # a link may lead nowhere
            label = one_spelling(path.name)
            split.classes.setdefault(label, []).append(path.name)
            images = images_below(path, split.left_out) if path.exists() else []
            split.images += [(label, file) for file in images]
            if not images:
                split.left_out[EMPTY].append(str(path))
        else:
            split.left_out[LOOSE].append(str(path))
    return split


def read_annotations(split: SplitFolder) -> None:
    """A line for each image: its file's name in images/, a tab, its class. Raises ValueError."""
    file = split.folder / ANNOTATIONS
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        name, tab, rest = line.partition("\t")
        label = one_spelling(rest.partition("\t")[0])
        if tab and name and label:
            split.images.append((label, f"{split.folder}/images/{name}"))
        elif line.strip():
            raise ValueError(f"{file} line {number}: a file name, a tab and a class are wanted")
    listed = {file for _, file in split.images}
    for path in sorted(split.folder.rglob("*")):
        if path.is_file() and path != file and str(path) not in listed:
            split.left_out[f"not in {ANNOTATIONS}"].append(str(path))


def images_below(folder: Path, left_out: PathsByKind) -> list[str]:
    """Files below a folder that Pillow may read; the others are added to `left_out`."""
    formats = Image.registered_extensions()
    images = []
    for place, names in sorted(folders_below(folder, left_out)):
        for name in sorted(names):
            file = f"{place}/{name}"
            suffix = os.path.splitext(name)[1]
            if is_hidden(name):
                left_out[HIDDEN].append(file)
            elif formats.get(suffix.lower()) in Image.OPEN:
                images.append(file)
            else:
                left_out[f"*{suffix}" if suffix else "without a suffix"].append(file)
    return images


def folders_below(folder: Path, left_out: PathsByKind) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of it and all below, also behind links; without hidden ones."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in visited:  # a second way to it, or a link back up
            folders.clear()
            continue
        visited.add(real)

        # What is taken out of `folders` here is not walked through.
        hidden = [f"{place}/{name}" for name in folders if is_hidden(name)]
        if hidden:
            left_out[HIDDEN] += hidden
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, names


def fail(error: OSError) -> None:
    """A folder that cannot be read is not an empty one."""
    raise error


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def one_spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name)
