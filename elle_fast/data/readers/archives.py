"""Files of a folder or a tar, read in memory; nothing is ever extracted to disk.

Both have `files` and `folders`, the relative names (with forward slashes) of regular files and folders that are not
hidden, and `read`, which yields files with their content in the order that is cheapest to read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from elle_fast.data.readers.decoding import decoding

_TAR_BLOCK = 512
_CHUNK = 1 << 20


class Folder:
    """The files at most `depth` levels below a folder, without symbolic links."""

    def __init__(self, root: Path, depth: int) -> None:
        self.root = root
        files: list[str] = []
        folders: set[str] = set()
        self._list(root, "", depth, files, folders)
        self.files, self.folders = tuple(sorted(files)), frozenset(folders)

    def _list(self, folder: Path, prefix: str, depth: int, files: list[str], folders: set[str]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file(follow_symlinks=False):
                    files.append(prefix + entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.add(prefix + entry.name)
                    if depth > 1:
                        self._list(Path(entry.path), f"{prefix}{entry.name}/", depth - 1, files, folders)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each named file with its content, sorted by name."""
        for name in sorted(names):
            yield name, (self.root / name).read_bytes()


class Archive:
    """The files of a tar, in any compression `tarfile` reads. Links and special members are skipped.

    Raises ValueError if the tar is truncated or corrupt.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with decoding(root), tarfile.open(root) as tar:
            members = tar.getmembers()
            _check_end(tar)
        # As in extraction, the later of two members with the same name counts.
        self._members = {name: member for member in members if member.isreg() and (name := _relative(member.name))}
        folders = {name for member in members if member.isdir() and (name := _relative(member.name))}
        # A tar need not list its folders.
        folders |= {name.rpartition("/")[0] for name in self._members}
        folders |= {str(parent) for folder in folders for parent in PurePosixPath(folder).parents}
        self.files, self.folders = tuple(sorted(self._members)), frozenset(folders - {"", "."})

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each named file with its content, in the order of the archive."""
        # A compressed tar starts over when it seeks back, so read its members in their order.
        wanted = sorted(names, key=lambda name: self._members[name].offset)
        with decoding(self.root), tarfile.open(self.root) as tar:
            for name in wanted:
                stream = tar.extractfile(self._members[name])
                assert stream is not None, "only regular members are listed"
                yield name, stream.read()


Files = Folder | Archive


def _relative(name: str) -> str | None:
    """A member's name without "./", or None if it is hidden, absolute or points out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") for part in parts)
    return None if not parts or hidden or name.startswith("/") else "/".join(parts)


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
