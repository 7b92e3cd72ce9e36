"""The finished part of an evaluation, in a file from which it continues after a crash."""

from __future__ import annotations

import json
import os
from typing import Any

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast._core.files import write_json

FORMAT = 2


class Chunks:
    """The outcomes of finished batches, in a JSON file that is always whole; a digest tells if it was damaged.

    An entry's key is the caller's ``settings`` (digest of the checkpoint, device, versions) with those of the attack.
    In an entry, a batch's key is the index of its first sample and a digest of its tensors.

    Raises:
        TypeError: if ``path`` is no path, or the settings are not of JSON types.
        ValueError: if the file is not one of this class, or was damaged, naming it.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self._path, self._settings = checks.path("path", path), settings
        try:
            json.dumps({**settings})
        except TypeError as error:
            raise TypeError(
                f"settings: expected a dictionary of JSON types, got {checks.describe(settings)}"
            ) from error
        self._entries: dict[str, dict[str, Any]] = {}  # by the settings as JSON text
        if self._path.is_file():
            try:
                found = json.loads(self._path.read_bytes())
                if found["format"] != FORMAT:
                    raise ValueError(f"format {found['format']}")
                if found["digest"] != digest_of(_text(found["entries"]).encode()):
                    raise ValueError("damaged: the digest is that of another content")
                self._entries = {_text({**entry["settings"]}): {**entry["chunks"]} for entry in found["entries"]}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"partial result: expected chunks in format {FORMAT}, got {str(path)!r} with something else "
                    f"({error}); remove it to begin anew"
                ) from error

    def of(self, **settings: Any) -> dict[str, Any]:
        """The finished batches under these settings, a dictionary to which the caller adds more."""
        return self._entries.setdefault(_text({**self._settings, **settings}), {})

    def save(self) -> None:
        """Write the file, atomically."""
        entries = [{"settings": json.loads(text), "chunks": chunks} for text, chunks in self._entries.items()]
        write_json(self._path, {"format": FORMAT, "digest": digest_of(_text(entries).encode()), "entries": entries})

    def forget(self) -> None:
        """Remove the entries under the caller's settings, once the result is written; keep all others."""
        mine = json.loads(_text(self._settings)).items()
        self._entries = {text: chunks for text, chunks in self._entries.items() if not mine <= json.loads(text).items()}
        if self._entries:
            self.save()
        else:
            self._path.unlink(missing_ok=True)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
