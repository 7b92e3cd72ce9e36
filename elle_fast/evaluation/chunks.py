"""The finished part of an evaluation, in a file from which it continues after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elle_fast._core.files import write_json

FORMAT = 1


class Chunks:
    """The outcomes of finished batches, in a JSON file that is always whole.

    An entry's key is the caller's ``settings`` (digest of the checkpoint, device, versions) with those of the attack.
    In an entry, a batch's key is the index of its first sample and a digest of its tensors.

    Raises:
        ValueError: if the file is not one of this class, naming it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._entries: dict[str, dict[str, Any]] = {}  # by the settings as JSON text
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                if found["format"] != FORMAT:
                    raise ValueError(f"format {found['format']}")
                self._entries = {_text(entry["settings"]): entry["chunks"] for entry in found["entries"]}
            except (ValueError, KeyError, TypeError) as error:
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
        write_json(self._path, {"format": FORMAT, "entries": entries})

    def forget(self) -> None:
        """Remove the entries under the caller's settings, once the result is written; keep all others."""
        mine = json.loads(_text(self._settings)).items()
        self._entries = {text: chunks for text, chunks in self._entries.items() if not mine <= json.loads(text).items()}
        if self._entries:
            self.save()
        else:
            self._path.unlink(missing_ok=True)


def _text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
