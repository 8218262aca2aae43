"""Files that grow by chunks, so that a process that was killed while it wrote them goes on.

A journal in their folder has, for each chunk, the number of items so far, and of each file the size so
far and a checksum of the chunk and the numbers. What lies behind the last whole chunk is cut off.
"""

import json
import os
import pathlib
import zlib
from typing import Any

import tqdm

from rqv2_jax import disk
from rqv2_jax.errors import readable

JOURNAL = "chunks.json"


class Growing:
    """The files of a folder, of which other ones are removed; `items` are written already."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        self._chunks: list[dict[str, Any]] = []
        if path.is_file():
            self._chunks = readable(path, lambda: self._whole(json.loads(path.read_text()))) or []
        self.items: int = self._chunks[-1]["items"] if self._chunks else 0
        sizes = self._sizes()
        for file in folder.iterdir():
            if file.name in sizes:
                os.truncate(file, sizes[file.name])
            elif file.name != JOURNAL:
                file.unlink()

    def size(self, name: str) -> int:
        """Returns the bytes of a file so far."""
        return self._sizes().get(name, 0)

    def append(self, items: int, contents: dict[str, bytes]) -> None:
        """Adds a chunk of some items to each file; it counts when all of it is on the disk."""
        files, self.items = {}, self.items + items
        for name, content in contents.items():
            with (self.folder / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            files[name] = [self.size(name) + len(content), zlib.crc32(content, self.items)]
        self._chunks.append({"items": self.items, "files": files})
        disk.replace_text(self.folder / JOURNAL, json.dumps(self._chunks))

    def _sizes(self) -> dict[str, int]:
        files = self._chunks[-1]["files"] if self._chunks else {}
        return {name: size for name, (size, _) in files.items()}

    def _whole(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the chunks before the first one that is damaged in a file."""
        items, starts = 0, dict[str, int]()
        for number, chunk in enumerate(chunks):
            for name, (end, checksum) in chunk["files"].items():
                start = starts.get(name, 0)
                with (self.folder / name).open("rb") as file:
                    file.seek(start)
                    content = file.read(end - start)
                actual = start + len(content), zlib.crc32(content, chunk["items"])
                if actual != (end, checksum):
                    tqdm.tqdm.write(
                        f"{self.folder / name}: is damaged behind item {items:,}; from there on it is "
                        "made again"
                    )
                    return chunks[:number]
                starts[name] = end
            items = chunk["items"]
        return chunks
