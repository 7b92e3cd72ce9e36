"""Files of a folder or a tar, read in memory; nothing is ever extracted to disk.

Both have `files` and `folders`, the relative names (with forward slashes) of regular files and folders that are not
hidden, `read`, which yields files with their content in the order that is cheapest to read, and `skipped`: the names of
what they leave out, by its kind. Links are followed if they lead to a place inside.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import os
import posixpath
import tarfile
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from elle_fast.data.readers.decoding import decoding
from elle_fast.data.readers.limits import LARGEST_FILE, Bounded, TooLargeError, at_most, unpacked

_TAR_BLOCK = 512
_CHUNK = 1 << 20
_MOST_FILES = 4_000_000
_LINKS_IN_A_ROW = 8
_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x5d\0\0": lzma.open,
}
_OTHERS = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"Rar!": "rar", b"7z\xbc\xaf": "7z", b"\x28\xb5\x2f\xfd": "zstd"}
# Kinds of what is left out; the first word is the noun.
ASTRAY = "link leading out of it, nowhere or in a circle"
SPECIAL, HIDDEN, DEEPER = "file of a special kind", "file that is hidden", "folder below a class"
OUTSIDE = "member named as if outside"


class Folder:
    """The files at most `depth` levels below a folder."""

    def __init__(self, root: Path, depth: int) -> None:
        self.root, self._real = root, os.path.realpath(root)
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self._files: list[str] = []
        self._folders: list[str] = []
        self._list(self._real, "", depth)
        self.files, self.folders = tuple(sorted(self._files)), frozenset(self._folders)

    def _list(self, folder: str, prefix: str, depth: int) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, place = prefix + entry.name, entry.path
                if entry.name.startswith("."):
                    self.skipped[HIDDEN].append(name)
                    continue
                if entry.is_symlink():
                    place = os.path.realpath(place)
                    if not _inside(place, self._real) or _inside(folder, place) or not Path(place).exists():
                        self.skipped[ASTRAY].append(name)
                        continue
                if entry.is_file():
                    self._files.append(name)
                    _check_count(len(self._files), self.root)
                elif not entry.is_dir():
                    self.skipped[SPECIAL].append(name)
                else:
                    self._folders.append(name)
                    if depth > 1:
                        self._list(place, f"{name}/", depth - 1)
                    else:
                        self.skipped[DEEPER].append(name)

    def read(self, names: Iterable[str], most: int = LARGEST_FILE) -> Iterator[tuple[str, bytes]]:
        """Each named file with its content, sorted by name. ValueError for one of more than `most` bytes."""
        for name in sorted(names):
            file = self.root / name
            at_most(f"{self.root}: {name}", file.stat().st_size, most)
            yield name, file.read_bytes()


class Archive:
    """The files of a tar, plain or compressed (gz, bz2, xz).

    Raises ValueError if the tar is truncated or corrupt, and if it unpacks to what no data set would.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self._entries: dict[str, tarfile.TarInfo | None] = {}  # None: a folder
        links: dict[str, str] = {}
        with _opened(root) as tar:
            for count, member in enumerate(tar, 1):
                self._add(member, links)
                _check_count(count, root)
            _check_end(tar)
        self._add_folders()
        self._follow(links)
        self._add_folders()  # a folder may hold nothing but links
        visible = [name for name in self._entries if name not in ("", ".") and not _hidden(name)]
        self.files = tuple(sorted(name for name in visible if self._entries[name] is not None))
        self.folders = frozenset(name for name in visible if self._entries[name] is None)

    def _add(self, member: tarfile.TarInfo, links: dict[str, str]) -> None:
        """Enter one member. As in extraction, the later of two with the same name counts."""
        name = _relative(member.name)
        if name is None:
            self.skipped[OUTSIDE].append(member.name)
            return
        links.pop(name, None)
        if member.issym():
            self._entries.pop(name, None)
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():  # another name of a member before it
            file = self._entries.get(_relative(member.linkname) or "")
            if file is None:
                self.skipped[ASTRAY].append(name)
            else:
                self._entries[name] = file
        elif member.isdir():
            self._entries.setdefault(name, None)
        elif member.isreg():
            self._entries[name] = member
        else:
            self.skipped[SPECIAL].append(name)
        if posixpath.basename(name).startswith("."):
            self.skipped[HIDDEN].append(name)

    def _add_folders(self) -> None:
        """Enter the folders that the names tell of: a tar need not list them."""
        folders = {name.rpartition("/")[0] for name in self._entries}
        for folder in folders | {str(parent) for name in folders for parent in PurePosixPath(name).parents}:
            self._entries.setdefault(folder, None)

    def _follow(self, links: Mapping[str, str]) -> None:
        """Enter what symbolic links lead to, a file or all that is in a folder, under the links' own names."""
        followed: set[str] = set()
        for _ in range(_LINKS_IN_A_ROW):  # a link may lead through others
            before = len(self._entries)
            names = sorted(self._entries)
            for link, target in links.items():
                if target not in self._entries or _inside(link, target) or target == ".":
                    continue
                followed.add(link)
                below = f"{target}/"
                start = bisect(names, below)
                end = bisect(names, below[:-1] + "0", start)  # "0" comes after "/"
                for name in [target, *names[start:end]]:
                    self._entries.setdefault(link + name.removeprefix(target), self._entries[name])
                _check_count(len(self._entries), self.root)
            if len(self._entries) == before:
                break
        self.skipped[ASTRAY] += [link for link in links if link not in followed]

    def read(self, names: Iterable[str], most: int = LARGEST_FILE) -> Iterator[tuple[str, bytes]]:
        """Each named file with its content, in the archive's order. ValueError for one of more than `most` bytes."""
        members = {name: member for name in names if (member := self._entries[name]) is not None}
        for name, member in members.items():
            at_most(f"{self.root}: {name}", member.size, most)  # of a sparse one, when expanded
        with _opened(self.root) as tar:
            # A compressed tar starts over when it seeks back, so read its members in their order.
            for name, member in sorted(members.items(), key=lambda item: item[1].offset):
                stream = tar.extractfile(member)
                assert stream is not None, "only regular members are entered"
                yield name, stream.read()

    def in_one_order(self, names: Iterable[str]) -> str | None:
        """Why these files can be read in the tar's order only, if so."""
        with self.root.open("rb") as file:
            head = file.read(8)
        if any(head.startswith(magic) for magic in _COMPRESSED):
            return f"{self.root}: expected an uncompressed tar, to be read in any order, got a compressed one"
        for name in names:
            if (member := self._entries[name]) is not None and member.issparse():
                return f"{self.root}: {name}: expected a file that is there as a whole, got a sparse one"
        return None

    def places(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """First byte and size of each named file."""
        for name in names:
            member = self._entries[name]
            assert member is not None, "a file"
            yield member.offset_data, member.size


Files = Folder | Archive


def described(skipped: Mapping[str, list[str]]) -> str:
    """How many of each kind were left out, with one of them: ``3 links that ... (train/cat/0.png, ...)``."""
    parts = []
    for kind, names in skipped.items():
        noun, _, rest = kind.partition(" ")
        more = ", ..." if len(names) > 1 else ""
        parts.append(f"{len(names)} {noun}{'s' if more else ''} {rest} ({min(names)}{more})")
    return ", ".join(parts)


def astray(files: Files) -> str:
    """For an error about what is not there: the links that were not followed, in brackets, or nothing."""
    links = files.skipped[ASTRAY]
    return f" ({described({ASTRAY: links})})" if links else ""


@contextmanager
def _opened(root: Path) -> Iterator[tarfile.TarFile]:
    """The tar of a file, in any compression; ValueError if reading it fails, or goes further than a data set would."""
    with root.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        for magic, kind in _OTHERS.items():
            if head.startswith(magic):
                expected = "expected a tar, plain or compressed (gz, bz2, xz)"
                raise ValueError(f"{root}: {expected}, got a {kind} archive; unpack it, or pack its files as a tar")
        unpack = next((unpack for magic, unpack in _COMPRESSED.items() if head.startswith(magic)), None)
        most = math.inf if unpack is None else unpacked(os.fstat(file.fileno()).st_size)
        with decoding(root):
            content = Bounded(file if unpack is None else unpack(file, "rb"), most, str(root))
            with tarfile.open(fileobj=content, mode="r:") as tar:  # type: ignore[call-overload]
                yield tar


def _relative(name: str) -> str | None:
    """A member's name without "./", or None if it is absolute or points out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or name.startswith("/") else "/".join(parts)


def _hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _inside(place: str, folder: str) -> bool:
    """True for the folder itself and all paths below it."""
    return place == folder or place.startswith(folder.rstrip("/") + "/")


def _check_count(count: int, root: Path) -> None:
    if count > _MOST_FILES:
        raise TooLargeError(f"{root}: expected at most {_MOST_FILES} files and folders, got more")


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless zeros follow the last member, or what the decompressor raises before the end.

    `tarfile` takes a damaged header in the middle of the file for the end of the archive.
    """
    stream = tar.fileobj
    assert stream is not None, "the tar is open"
    stream.seek(tar.offset)
    end = stream.read(_TAR_BLOCK)
    if end != bytes(_TAR_BLOCK):
        expected = f"an end-of-archive block of {_TAR_BLOCK} zero bytes at byte {tar.offset}"
        raise tarfile.ReadError(f"expected {expected}, got {len(end)} bytes that are not that")
    # Only at its end does a decompressor compare the checksum and notice what was cut off.
    while stream.read(_CHUNK):
        pass
