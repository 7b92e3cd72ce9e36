"""What a stream of pictures costs: a core's time for each, an epoch beside one in memory, memory by number of samples.

    python -m benchmarks.data.streams --work /tmp/streams --out benchmarks/results/streams.json

- ``loader``: processor time for each JPEG of about 100 kB (500 x 375) as a crop of 224 pixels, by a worker process and
  by the process that asks, beside that of Pillow's decoder alone (open and convert to RGB). In processor time, so that
  other programs of the machine do not count; and the cores that a rate of pictures needs.
- ``epoch``: steps of a small PreActResNet on pictures of 32 pixels, streamed and from memory, in turn.
- ``memory``: of the process and its workers with a stand-in for 100 GB of data: 1.28 million names, or members of
  shards, that are hard links to a few files.
"""

from __future__ import annotations

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness.program import command, number, parser
from elle_fast import data
from elle_fast._core.files import write_json
from elle_fast.data.streaming import Stream
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run

PARTS = ("loader", "epoch", "memory")
SIDE, WIDTH, HEIGHT, KILOBYTES = 224, 500, 375, 100
RATES = (500, 1000, 2000, 4000)
_MOST_LINKS = 30_000  # of one file, which file systems bound


def picture(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """A smooth picture with fine noise, of which a JPEG has about as much to say as of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    return (np.asarray(coarse) + rng.normal(0, 9, (height, width, 1))).clip(0, 255).astype(np.uint8)


def jpeg(seed: int, width: int = WIDTH, height: int = HEIGHT, kilobytes: int = KILOBYTES) -> bytes:
    """The picture as the JPEG whose size is nearest to ``kilobytes``."""
    image, found = Image.fromarray(picture(seed, width, height)), []
    for quality in range(60, 98, 2):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        found.append(stream.getvalue())
    return min(found, key=lambda each: abs(len(each) - 1000 * kilobytes))


def write_pictures(root: Path, *, train: int, test: int, classes: int, encoded: Sequence[bytes], suffix: str) -> Path:
    """An image folder whose files are the encoded ones in turn."""
    for part, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / part / f"class{label:03}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                (folder / f"{index:05}{suffix}").write_bytes(encoded[(label * count + index) % len(encoded)])
    return root


# A core's time for a picture


def of_processes() -> tuple[float, float]:
    """Processor time of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return used[0].ru_utime + used[0].ru_stime, used[1].ru_utime + used[1].ru_stime


def loader(work: Path, *, pictures: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a core for each picture."""
    encoded = [jpeg(seed) for seed in range(8)]
    root = write_pictures(work / "loader", train=pictures, test=1, classes=2, encoded=encoded, suffix=".jpg")
    times: dict[str, list[float]] = {"decoder alone": [], "worker": [], "process that asks": []}
    for repetition in range(repetitions):
        began = time.process_time()
        for index in range(2 * pictures):
            with Image.open(io.BytesIO(encoded[index % len(encoded)])) as image:
                image.convert("RGB")
        times["decoder alone"].append((time.process_time() - began) / (2 * pictures))
        split = Bytes(streamed(root, workers=1))
        before = of_processes()
        asked = data.identified_batches(split, 64, seed=repetition, epoch=0, augment=True)
        seen = sum(len(y) for _, y, _ in asked)
        del asked  # the worker's time counts once it has ended
        own, of_worker = (after - was for after, was in zip(of_processes(), before, strict=True))
        times["worker"].append(of_worker / seen)
        times["process that asks"].append(own / seen)
    found = {name: 1000 * statistics.median(values) for name, values in times.items()}
    rate = 1000 / found["worker"]
    return {
        "bytes": statistics.mean(map(len, encoded)),
        "milliseconds": found,
        "part of the decoder's rate": found["decoder alone"] / found["worker"],
        "pictures a second and core": rate,
        "worker cores for a rate of pictures": {str(each): each / rate for each in RATES},
    }


class Bytes(Stream):
    """A stream whose batches stay bytes on the host: what is left is the device's work."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.source, stream.view, stream.rows, workers=stream.workers)

    def read(self, asked: Any, drawn_from: tuple[int, int] | None) -> Any:
        """As it is read."""
        return self.raw(asked, drawn_from)


def streamed(root: Path, *, workers: int, kind: str = "image-folder") -> Stream:
    """The training pictures of a folder, as random crops."""
    split = data.load(kind, root, image_size=SIDE, crop="resized", stream="always", workers=workers).train
    assert isinstance(split, Stream)
    return split


# An epoch, streamed and from memory


def epoch(work: Path, *, steps: int, repetitions: int) -> dict[str, Any]:
    """Seconds of ``steps`` training steps."""
    encoded = []
    for seed in range(640):
        stream = io.BytesIO()
        Image.fromarray(picture(seed, 32, 32)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    root = write_pictures(work / "epoch", train=320, test=8, classes=2, encoded=encoded, suffix=".png")
    given: dict[str, Any] = {"data": "image-folder", "root": str(root), "model": "preactresnet18", "width": 8}
    given |= {"batch_size": 64, "validation": 0, "method": "elle-a", "workers": 1, "device": "cpu", "epochs": 1000}
    seconds: dict[str, list[float]] = {"memory": [], "stream": []}
    weights = {}
    for _ in range(repetitions):
        for name, how in (("memory", "never"), ("stream", "always")):
            config = replace(TrainConfig(**given), stream=how).resolved()
            run = Run(config, config.read_data(), work / "unwritten", Ranks(60))
            began = time.perf_counter()
            for x, y in run.upcoming(steps):
                run.take_step(x, y)
                run.step += 1
            seconds[name].append(time.perf_counter() - began)
            weights[name] = run.model.state_dict()
    same = all(torch.equal(weights["memory"][key], weights["stream"][key]) for key in weights["memory"])
    ratios = [b / a for a, b in zip(seconds["memory"], seconds["stream"], strict=True)]
    return {"steps": steps, "seconds": seconds, "stream to memory": statistics.median(ratios), "same bits": same}


# Memory by the number of samples


def stand_in(root: Path, kind: str, samples: int) -> Path:
    """A data set of so many samples whose files are hard links to a few; nothing is written if it is there."""
    if (root / "done").exists():
        return root
    encoded = [jpeg(seed) for seed in range(8)]
    if kind == "image-folder":
        _linked_folder(root, encoded, samples)
    else:
        _linked_shards(root, encoded, samples)
    (root / "done").touch()
    return root


def _linked_folder(root: Path, encoded: Sequence[bytes], samples: int) -> None:
    (root / "test" / "class000").mkdir(parents=True)
    (root / "test" / "class000" / "0.jpg").write_bytes(encoded[0])
    (root / "files").mkdir()
    for index in range(samples):
        file = root / "files" / f"{index // _MOST_LINKS}"
        if index % _MOST_LINKS == 0:
            file.write_bytes(encoded[index // _MOST_LINKS % len(encoded)])
        folder = root / "train" / f"class{index % 1000:03}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(file, folder / f"picture_{index:08}.jpg")


def _linked_shards(root: Path, encoded: Sequence[bytes], samples: int) -> None:
    root.mkdir(parents=True)
    each = min(1000, samples)
    first = root / "train-000000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(each):
            for suffix, content in (("jpg", encoded[index % len(encoded)]), ("cls", b"%d" % index)):
                member = tarfile.TarInfo(f"picture_{index:08}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for shard in range(1, samples // each):
        os.link(first, root / f"train-{shard:06}.tar")
    os.link(first, root / "test-000000.tar")


def memory(work: Path, *, samples: int) -> dict[str, Any]:
    """MiB of the process and of its workers, each measured in a process of its own."""
    found = {}
    for kind in ("image-folder", "webdataset"):
        for count in (samples // 10, samples):
            root = stand_in(work / f"{kind}-{count}", kind, count)
            script = f"from benchmarks.data.streams import measured; measured({str(root)!r}, {kind!r})"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
            )
            found[f"{kind}, {count} samples"] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(root: str, kind: str) -> None:
    """Print what a process has open and has read a little of; called in a process of its own."""
    import multiprocessing

    began = time.perf_counter()
    before = _mebibytes(os.getpid())
    split = streamed(Path(root), workers=2, kind=kind)
    row: dict[str, Any] = {"samples": len(split), "seconds to open": time.perf_counter() - began}
    began = time.perf_counter()
    split.digest()
    row["seconds for the digest"] = time.perf_counter() - began
    batches = data.identified_batches(split, 64, seed=0, epoch=0, augment=True)
    for _ in range(6):
        next(batches)
    row["process"] = _mebibytes(os.getpid()) | {"rss before": before["rss"]}
    row["process"]["peak rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row["workers"] = [_mebibytes(int(each.pid or 0)) for each in multiprocessing.active_children()]
    print(json.dumps(row))


def _mebibytes(pid: int) -> dict[str, float]:
    """Resident and proportional memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0].lower(): int(line.split()[1]) / 2**10 for line in lines[1:] if line.endswith("kB")}
    return {name: sizes[name] for name in ("rss", "pss")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the result."""
    options_of = parser("benchmarks.data.streams", __doc__)
    options_of.add_argument("--work", type=Path, required=True, help="a folder for what is made to be read")
    options_of.add_argument("--out", type=Path, help="the JSON file; one that is there keeps its other parts")
    options_of.add_argument("--only", choices=PARTS, action="append", help="these parts; by default all")
    options_of.add_argument("--samples", type=number, default=1_280_000, help="of the stand-in")
    options_of.add_argument("--pictures", type=number, default=256, help="of the loader, for each of two classes")
    options_of.add_argument("--steps", type=number, default=40, help="of the epoch")
    options_of.add_argument("--repetitions", type=number, default=5)
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        result = json.loads(options.out.read_text())
    options.work.mkdir(parents=True, exist_ok=True)
    for part in options.only or PARTS:
        measure: dict[str, Any] = {
            "loader": lambda: loader(options.work, pictures=options.pictures, repetitions=options.repetitions),
            "epoch": lambda: epoch(options.work, steps=options.steps, repetitions=options.repetitions),
            "memory": lambda: memory(options.work, samples=options.samples),
        }
        found = measure[part]()
        result[part] = {**found, **provenance(), "command": command(options_of, options), "load": os.getloadavg()[0]}
        print(json.dumps({part: found}, indent=1))
        if options.out is not None:
            write_json(options.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
