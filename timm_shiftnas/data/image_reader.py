"""Images in folders and tars, with their classes.

A data folder holds SPLIT/CLASS/IMAGE, or SPLIT.tar with CLASS/IMAGE inside; a tar as data folder holds
SPLIT/CLASS/IMAGE. The class of an image is the top folder below the split, however deep the image lies. timm takes the
deepest folder, and reads all of a tar for any split. Classes and images have timm's order: that of natural sorting.
"""
from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from .decoding import image_extensions
from .in_memory import EVAL_SPLITS, TRAIN_SPLITS

__all__ = ['ImageReader', 'locate', 'standard_split']

_logger = logging.getLogger('train')
SYNONYMS = (TRAIN_SPLITS, ('val', 'valid', 'validation', 'eval', 'evaluation'))  # in timm's order
# What file managers, notebooks and version control leave behind, in lower case: not worth a message.
LITTER = frozenset({
    '.ds_store', '.ipynb_checkpoints', '.git', '.cache', '.thumbnails', '.trashes', '.fseventsd', '.spotlight-v100',
    'thumbs.db', 'ehthumbs.db', 'desktop.ini', '__macosx', '@eadir', '$recycle.bin', 'system volume information',
    'lost+found', '__pycache__', 'icon\r'})


NO_IMAGES = 'folder without images'
Notes = dict[str, dict[str, None]]  # what is passed over: paths by kind, in order


class Entry(NamedTuple):
    """A file or folder below a data folder or in a tar; `name` is '' for a folder, `kind` says why it is unusable."""
    folders: tuple[str, ...]
    name: str
    path: str
    kind: str = ''
    offset: int = 0
    size: int = 0


class ImageReader(Reader):
    """The images of a split, as open files with targets.

    Args:
        root: Data folder or tar.
        split: Name of the split or one of timm's synonyms; '' takes the folder or tar itself as the split.
        class_map: Indices by class name, or a file of them as in timm. An image has the class of the topmost of its
            folders that is in the map; one with none of them is passed over.
        extensions: Extensions of image files (default: all that can be read).
        order: Sorting key of names (default: natural order).
        labelled: Whether classes are needed; without them, images may lie anywhere and have the class '.'.

    Attributes:
        root: The folder or tar of the split.
        samples: (path, target) of every image.
        class_to_idx: Indices by class name.

    Raises:
        ValueError: If the split does not exist, or there are splits where classes should be.
        OSError: If a folder or tar cannot be read.
    """

    def __init__(
            self,
            root: str,
            split: str,
            class_map: str | Mapping[str, int] | None = None,
            extensions: Iterable[str] | None = None,
            order: Callable[[str], Any] = natural_key,
            labelled: bool = True,
    ) -> None:
        super().__init__()
        self.root, entries = locate(root, split)
        if not labelled:
            entries = (entry._replace(folders=('.',)) for entry in entries if entry.name)
        self.is_tar = os.path.isfile(self.root)
        given = load_class_map(class_map, os.path.dirname(self.root)) if class_map else None
        types = frozenset(extensions or image_extensions())
        notes: Notes = {}
        found = [(entry, label) for entry in entries if (label := find_label(entry, types, given, notes)) is not None]
        found.sort(key=lambda each: (order(each[0].path), each[0].path))
        labels = sorted({label for _, label in found}, key=lambda label: (order(label), label))
        if labels and not given and {*labels} <= {*TRAIN_SPLITS, *EVAL_SPLITS}:
            raise ValueError(f'{self.root!r} holds splits and not classes: {_some(labels)}; give the name of one')
        self.class_to_idx = dict(given) if given else {label: index for index, label in enumerate(labels)}
        self.samples = [(entry.path, self.class_to_idx[label]) for entry, label in found]
        self.places = [(entry.offset, entry.size) for entry, _ in found] if self.is_tar else []
        for message in describe(notes, found):
            _logger.warning(f'{self.root}: {message}')

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        if not self.is_tar:
            return open(path, 'rb'), target
        offset, size = self.places[index]
        with open(self.root, 'rb') as file:  # opened for each image: workers would share the position of an open one
            file.seek(offset)
            return io.BytesIO(file.read(size)), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        if self.is_tar:
            return os.path.join(self.root, path) if absolute else path
        return path if absolute else os.path.relpath(path, self.root)


# -- classes -----------------------------------------------------------------------------------------------------------


def find_label(entry: Entry, types: frozenset[str], given: Mapping[str, int] | None, notes: Notes) -> str | None:
    """The class of an image; `None` for everything else, which is noted."""
    extension = os.path.splitext(entry.name)[1].lower()
    kind, label = entry.kind, None
    if not kind and not entry.name:
        kind = NO_IMAGES if len(entry.folders) == 1 and not given else ''
    elif not kind and extension not in types:
        kind = f'{extension} file' if extension else 'file without extension'
    elif not kind and not entry.folders:
        kind = 'image outside of class folders'
    elif not kind:
        label = next((name for name in entry.folders if name in given), None) if given else entry.folders[0]
        kind = 'image of a class that the class map lacks' if label is None else ''
    if kind:
        notes.setdefault(kind, {})['/'.join(filter(None, (*entry.folders, entry.name)))] = None
    return label


def describe(notes: Notes, found: list[tuple[Entry, str]]) -> Iterator[str]:
    """Messages about what is passed over, and about images that are deeper than in CLASS/IMAGE."""
    labels = {label for _, label in found}
    names = {kind: [name for name in paths if kind != NO_IMAGES or name not in labels] for kind, paths in notes.items()}
    parts = [f'{len(paths)} x {kind} (such as {paths[0]!r})' for kind, paths in names.items() if paths]
    if parts:
        yield f'passed over: {", ".join(parts)}'
    nested = [(entry, label) for entry, label in found if label in entry.folders[:-1]]
    if nested:
        entry, label = nested[0]
        yield (
            f'{len(nested)} images are deeper than CLASS/IMAGE, such as {"/".join((*entry.folders, entry.name))!r}, '
            f'whose class is {label!r}; for classes of deeper folders, give their names with --class-map')


# -- splits ------------------------------------------------------------------------------------------------------------


def locate(root: str, split: str) -> tuple[str, Iterable[Entry]]:
    """Find a split: its folder or tar, and what is in it.

    Raises:
        ValueError: If it does not exist.
    """
    names = [split, *(name for synonyms in SYNONYMS if split in synonyms for name in synonyms)] if split else []
    if os.path.isfile(root):
        if not root.lower().endswith('.tar'):
            raise ValueError(f'{root!r} is neither a folder nor a .tar; unpack it, and give the folder')
        own_name = os.path.splitext(os.path.basename(root))[0]
        name, found, entries = below_split(root, names)
        if name is not None or not split or own_name in names:
            return root, entries
    elif not split:
        return root, walk_folder(root)
    else:
        for path in (os.path.join(root, name) for name in names):
            if os.path.isdir(path):
                return path, walk_folder(path)
            for tar in (path, f'{path}.tar'):
                if tar.lower().endswith('.tar') and os.path.isfile(tar):
                    return tar, below_split(tar, names)[-1]
        found = [entry.name for entry in os.scandir(root) if not is_hidden(entry.name) and (
            entry.is_dir() or entry.name.lower().endswith('.tar'))]
    raise ValueError(
        f'{root!r} has no folder for the split {split!r}, but: {_some(found)}; give the name of one, or a folder that '
        f"holds {split}/ or {split}.tar, or '' to take all images as the split")


def standard_split(root: str) -> str:
    """The first of 'train', 'validation' and 'test' that a data folder has, or ''."""
    for split in ('train', 'validation', 'test'):
        try:
            locate(root, split)
        except (ValueError, OSError):
            continue
        return split
    return ''


def below_split(tar: str, names: Sequence[str]) -> tuple[str | None, Iterable[str], list[Entry]]:
    """The entries of a tar below the folder of a split, or else below the folders that all images share.

    Args:
        tar: The file.
        names: Names of the split.

    Returns:
        The name of the split, if there is one, all names beside it, and the entries.
    """
    entries = list(walk_tar(tar))
    folders = {entry.folders for entry in entries if entry.name and entry.folders}
    depth = 0
    while True:
        tops = {each[depth] for each in folders if len(each) > depth}
        split = next((name for name in names if name in tops), None)
        if split is not None:
            below = [entry for entry in entries if entry.folders[depth:depth + 1] == (split,)]
            return split, tops, [entry._replace(folders=entry.folders[depth + 1:]) for entry in below]
        if len(tops) != 1 or any(len(each) <= depth + 1 for each in folders):
            return None, tops, [entry._replace(folders=entry.folders[depth:]) for entry in entries]
        depth += 1


def _some(names: Iterable[str]) -> str:
    return ', '.join(sorted(names)[:5]) or 'no folders'


# -- folders and tars --------------------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a file or folder does not belong to the data."""
    return name.startswith('.') or name.lower() in LITTER


def hidden_entry(folders: tuple[str, ...], name: str, path: str) -> Iterator[Entry]:
    """An entry for a hidden file or folder, unless it is known litter."""
    if name.lower() not in LITTER and not name.startswith('._'):
        yield Entry(folders, name, path, kind='hidden file or folder')


def walk_folder(root: str) -> Iterator[Entry]:
    """All files and folders below a folder. Links are followed, except to a folder that holds them."""
    def fail(error: OSError) -> None:
        raise error  # os.walk passes over a folder that it may not read

    for path, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        folders = tuple(os.path.relpath(path, root).split(os.sep)) if path != root else ()
        if folders:
            yield Entry(folders, '', path)
        for name in (*subfolders, *files):
            if is_hidden(name):
                yield from hidden_entry(folders, name, os.path.join(path, name))
        subfolders[:] = [
            name for name in subfolders if not is_hidden(name) and not leads_back(os.path.join(path, name))]
        for name in files:
            if not is_hidden(name):
                yield Entry(folders, name, os.path.join(path, name))


def leads_back(path: str) -> bool:
    """Whether a path is a link to a folder that contains it."""
    return os.path.islink(path) and f'{os.path.realpath(os.path.dirname(path))}{os.sep}'.startswith(
        f'{os.path.realpath(path)}{os.sep}')


def walk_tar(path: str) -> Iterator[Entry]:
    """All files and folders in a tar, and in the tars in it, which count as folders. Links are unusable."""
    with tarfile.open(path, 'r:') as tar:
        yield from _members(tar, (), 0)


def _members(tar: tarfile.TarFile, parents: tuple[str, ...], start: int) -> Iterator[Entry]:
    """The members of a tar that begins at byte `start` of the file."""
    for member in tar:
        parts = (*parents, *(part for part in member.name.split('/') if part not in ('', '.')))
        folders, name = (parts, '') if member.isdir() else (parts[:-1], parts[-1])
        hidden = next((i for i, part in enumerate(parts) if is_hidden(part)), None)
        if hidden is not None:
            yield from hidden_entry(parts[:hidden], parts[hidden], '/'.join(parts[:hidden + 1]))
        elif member.isreg() and name.lower().endswith('.tar'):
            with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as inner:
                yield from _members(inner, (*folders, name[:-len('.tar')]), start + member.offset_data)
        elif member.isdir() or (member.isreg() and not member.issparse()):
            yield Entry(folders, name, '/'.join(parts), '', start + member.offset_data, member.size)
        else:
            yield Entry(folders, name, '/'.join(parts), kind='link')
