"""Shards: what is packed is read back, every epoch is exact and can be entered anywhere, damage is named."""

import io
import json
import logging
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin
from torch.utils.data import DataLoader
from torchvision import transforms

from data.decoding import decode_pil
from data.images import Images
from data.raw import RawSource
from data.shards import ShardSampler, ShardSet, StreamImages, read_ahead
from data.sources import FolderSource, Source
from data.tar import count_samples
from tools import make_shards
from tools.make_shards import Options

CLASSES = ["ant", "bee", "cat"]


def photograph(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 255, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/ and val/ of 3 classes: 17 and 5 JPEG and PNG images of 20 to 70 pixels; no bee in val/."""
    root = tmp_path_factory.mktemp("folder")
    sizes = np.random.RandomState(0).randint(20, 70, (22, 2)).tolist()
    for number, (width, height) in enumerate(sizes):
        split, label = ("train", number % 3) if number < 17 else ("val", number % 2 * 2)
        suffix = "png" if number % 5 == 0 else "JPEG"
        path = root / split / CLASSES[label] / f"image.{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, width, height).save(path)
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    """The folder's own files in shards of 5: train/ with 4 of them, val/ with 1."""
    target = tmp_path_factory.mktemp("packed")
    make_shards.make_shards(folder, target, ["train", "val"], Options(shard_size=5))
    return target


def samples_of(shards: ShardSet) -> list[tuple[str, bytes, int]]:
    """(name, data, label) in the order of numbers."""
    return [tuple(sample) for shard in range(len(shards.urls)) for _, *sample in shards.read(shard)]


def pairs(source: Source) -> list[tuple[bytes, int]]:
    return [(source.read(i), int(source.labels[i])) for i in range(len(source))]


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def plain_shard(path: Path, count: int, first: int = 0) -> Path:
    """A shard whose image bytes and labels are the samples' numbers."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:04d}.jpg", b"%d" % number), (f"{number:04d}.cls", b"%d" % (number % 7))]
    return write_tar(path, *members)


@pytest.fixture
def three(tmp_path) -> Path:
    """A folder of three shards with 5, 7 and 6 samples, without an index."""
    for name, count, first in (("a.tar", 5, 0), ("b.tar", 7, 5), ("c.tar", 6, 12)):
        plain_shard(tmp_path / name, count, first)
    return tmp_path


def write_index(folder: Path, counts: dict[str, int], **others) -> Path:
    entries = [{"name": name, "samples": count} for name, count in counts.items()]
    (folder / "index.json").write_text(json.dumps({"format": "tar", "shards": entries, **others}))
    return folder / "index.json"


# Packing and reading back


@pytest.mark.parametrize("split", ["train", "val"])
def test_tar_shards_hold_the_folders_bytes_and_labels(folder, packed, split):
    source, shards = FolderSource(folder / split, CLASSES), ShardSet(packed / split)
    found = samples_of(shards)
    assert sorted((data, label) for _, data, label in found) == sorted(pairs(source))
    assert len(shards) == len(source) and shards.classes == CLASSES and shards.num_classes == 3
    assert [label for *_, label in found] != sorted(label for *_, label in found)  # shuffled
    name, data, _ = found[0]
    assert name.startswith(f"{packed / split}/shard-000000.tar@/") and name.endswith((".jpeg", ".png"))
    stem = name.rsplit("-", 1)[1].replace("image_", "image.").rsplit(".", 1)[0]
    assert any(path.read_bytes() == data for path in folder.rglob(f"{stem}.*"))  # the key tells the file


def test_webdataset_itself_reads_the_shards(packed):
    urls = [str(path) for path in sorted((packed / "train").glob("*.tar"))]
    theirs = [
        (next(sample[suffix] for suffix in ("jpeg", "png") if suffix in sample), int(sample["cls"]))
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert theirs == [(data, label) for _, data, label in samples_of(ShardSet(packed / "train"))]


@pytest.mark.parametrize("side", [None, 32])
def test_raw_shards_hold_the_pixels(folder, tmp_path, side):
    options = Options(format="raw", shard_size=7, shortest_side=side)
    make_shards.make_shards(folder, tmp_path / "raw", ["train"], options)
    raw, source = RawSource(tmp_path / "raw/train", CLASSES), FolderSource(folder / "train")
    expected = []
    for data, label in pairs(source):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if side and min(image.size) > side:
            image = image.resize([round(length * side / min(image.size)) for length in image.size], Image.BICUBIC)
        expected.append((image.height, np.array(image).tobytes(), label))
    assert sorted((raw.read(i).shape[0], raw.read(i).tobytes(), raw.labels[i]) for i in range(len(raw))) == sorted(
        expected
    )
    assert np.array_equal(decode_pil(raw.read(3), raw.name(3)), raw.read(3)) and raw.read(3).dtype == np.uint8
    assert raw.name(9) == f"{tmp_path}/raw/train/shard-000001.raw@/2" and raw.classes == CLASSES
    raw.verify()


def test_images_are_shrunk_and_encoded_only_where_asked(folder, tmp_path):
    source = FolderSource(folder / "train")
    own = {data for data, _ in pairs(source)}
    make_shards.make_shards(folder, tmp_path / "small", ["train"], Options(shortest_side=40))
    make_shards.make_shards(folder, tmp_path / "poor", ["train"], Options(quality=30, subsampling="4:4:4"))
    small = [data for _, data, _ in samples_of(ShardSet(tmp_path / "small/train"))]
    large = [data for data in own if min(Image.open(io.BytesIO(data)).size) > 40]
    assert 0 < len(large) < len(own) and own - set(small) == set(large)
    for data in set(small) - own:
        image = Image.open(io.BytesIO(data))
        assert min(image.size) == 40 and JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
    poor = [Image.open(io.BytesIO(data)) for _, data, _ in samples_of(ShardSet(tmp_path / "poor/train"))]
    assert {(image.format, JpegImagePlugin.get_sampling(image)) for image in poor} == {("JPEG", 0)}
    sizes = Counter(Image.open(io.BytesIO(data)).size for data in own)
    assert Counter(image.size for image in poor) == sizes


# Exact epochs


class Numbers(ShardSet):
    """Shards of given counts without files; the data of a sample is its number."""

    def __init__(self, counts: list[int]):
        self.urls, self.counts = [f"{i}.tar" for i in range(len(counts))], np.array(counts)
        self.first, self.reads = np.cumsum(self.counts) - self.counts, 0

    def read(self, shard, positions):
        for position in positions:
            self.reads += 1
            yield position, "name", int(self.first[shard]) + position, 0


EPOCHS = {
    "counts": st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) >= 5),
    "world_size": st.integers(1, 5),
    "buffer": st.integers(0, 60),
    "epoch": st.integers(0, 3),
    "seed": st.integers(0, 3),
}


@given(**EPOCHS)
@settings(max_examples=150, deadline=None)
def test_each_sample_is_trained_on_once_per_epoch(counts, world_size, buffer, epoch, seed):
    seen, total = Counter(), sum(counts)
    for rank in range(world_size):
        sampler = ShardSampler(Numbers(counts), rank, world_size, seed, buffer=buffer, ahead=0)
        sampler.set_epoch(epoch)
        items = list(sampler)
        assert len(items) == len(sampler) == total // world_size
        assert all(item[0] == epoch and item[1] == item[3] for item in items)
        seen.update(number for _, number, *_ in items)
    assert set(seen.values()) == {1} and len(seen) == total // world_size * world_size
    assert set(seen) <= set(range(total))


@given(**EPOCHS)
@settings(max_examples=60, deadline=None)
def test_each_sample_is_evaluated_once(counts, world_size, buffer, epoch, seed):
    parts = []
    for rank in range(world_size):
        sampler = ShardSampler(Numbers(counts), rank, world_size, seed, train=False, buffer=buffer, ahead=0)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    assert [number for part in parts for _, number, *_ in part] == list(range(sum(counts)))
    assert {item[0] for part in parts for item in part} == {None}
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(start=st.integers(0, 130), ahead=st.sampled_from([0, 0, 64]), **EPOCHS)
@settings(max_examples=150, deadline=None)
def test_an_epoch_can_be_entered_anywhere(counts, world_size, buffer, epoch, seed, start, ahead):
    shards = Numbers(counts)
    sampler = ShardSampler(shards, world_size - 1, world_size, seed, buffer=buffer, ahead=ahead)
    sampler.set_epoch(epoch)
    whole, reads = list(sampler), shards.reads
    sampler.set_epoch(epoch, start)
    assert list(sampler) == whole[start:] and len(sampler) == len(whole)
    assert shards.reads - reads == len(whole[start:])  # nothing is unpacked that was seen before


@given(count=st.integers(1, 500), buffer=st.integers(0, 100), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_buffer_holds_at_most_its_size(count, buffer, seed):
    sampler = ShardSampler(Numbers([count]), seed=seed, buffer=buffer, ahead=0)
    order = sampler._order()
    read_before = np.maximum.accumulate(order) + 1
    assert np.all(read_before - np.arange(1, count + 1) <= buffer)
    if buffer <= 1:
        assert np.array_equal(order, np.arange(count))


def test_the_order_differs_between_epochs_seeds_and_ranks_and_mixes_well():
    def order(epoch=0, seed=0, rank=0):
        sampler = ShardSampler(Numbers([50] * 20), rank, 2, seed, buffer=100, ahead=0)
        sampler.set_epoch(epoch)
        return [number for _, number, *_ in sampler]

    orders = [order(), order(epoch=1), order(seed=1), order(rank=1)]
    assert len({tuple(numbers) for numbers in orders}) == 4 and order() == orders[0]
    assert len({number // 50 for number in orders[0][200:300]}) >= 3  # several shards within 100 samples
    delays = [ShardSampler(Numbers([1000]), rank, 2, buffer=100, ahead=0)._order() for rank in (0, 1)]
    assert not np.array_equal(*delays)


def test_the_left_out_sample_is_another_one_in_each_epoch():
    left_out = set()
    for epoch in range(12):
        seen = set()
        for rank in range(4):
            sampler = ShardSampler(Numbers([19]), rank, 4, ahead=0)
            sampler.set_epoch(epoch)
            seen |= {number for _, number, *_ in sampler}
        left_out |= set(range(19)) - seen
    assert len(left_out) > 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("command", ["", "pipe:cat "])
def test_real_shards_are_exact_and_resume(three, world_size, command):
    urls = [f"{command}{three}/{name}.tar" for name in "abc"]
    shards = ShardSet(urls, samples=[5, 7, 6])
    seen = Counter()
    for rank in range(world_size):
        sampler = ShardSampler(shards, rank, world_size, buffer=4)
        sampler.set_epoch(1)
        items = list(sampler)
        assert all(data == b"%d" % number and label == number % 7 for _, number, _, data, label in items)
        seen.update(number for _, number, *_ in items)
        sampler.set_epoch(1, 3)
        assert list(sampler) == items[3:]
    assert set(seen.values()) == {1} and len(seen) == 18 // world_size * world_size


def test_shards_that_were_finished_before_a_resume_are_not_opened(three):
    sampler = ShardSampler(ShardSet(three), buffer=0)
    expected = list(sampler)[-1:]
    last = Path(expected[0][2].split("@")[0])
    for path in three.glob("*.tar"):
        if path != last:
            path.unlink()
    sampler.set_epoch(0, 17)
    assert list(sampler) == expected


# The loader


TRANSFORM = transforms.Compose(
    [transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


class Held(Source):
    """Samples of shards as a map-style source."""

    def __init__(self, shards: ShardSet):
        self.samples = samples_of(shards)
        self.labels = np.array([label for *_, label in self.samples])

    def name(self, index):
        return self.samples[index][0]

    def read(self, index):
        return self.samples[index][1]


def test_batches_do_not_depend_on_workers_and_equal_those_of_map_style_images(packed):
    shards = ShardSet(packed / "train")
    epochs, held = [], Images(Held(shards), decode_pil, TRANSFORM, seed=3)
    for workers in (0, 2):
        dataset, sampler = StreamImages(shards, decode_pil, TRANSFORM, seed=3), ShardSampler(shards, seed=3, buffer=6)
        loader = DataLoader(
            dataset, 4, sampler=sampler, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        assert len(loader) == 4 and len(dataset) == 17 and dataset.classes == CLASSES
        for epoch, start in ((0, 0), (1, 0), (1, 8)):
            sampler.set_epoch(epoch, start)
            epochs.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    for mine, other in zip(epochs[:3], epochs[3:], strict=True):
        assert all(torch.equal(*both) for both in zip(mine, other, strict=True))
    assert torch.equal(epochs[1][0][8:], epochs[2][0]) and not torch.equal(epochs[0][0], epochs[1][0])
    sampler.set_epoch(1)
    expected = [held[epoch, number] for epoch, number, *_ in sampler][:16]
    assert torch.equal(torch.stack([image for image, _ in expected]), epochs[1][0])
    assert [label for _, label in expected] == epochs[1][1].tolist()


def test_evaluation_draws_nothing(packed):
    shards = ShardSet(packed / "val")
    dataset = StreamImages(shards, decode_pil, transforms.ToTensor())
    before = torch.get_rng_state()
    found = [dataset[item] for item in ShardSampler(shards, train=False)]
    held = Images(Held(shards), decode_pil, transforms.ToTensor())
    assert len(found) == len(held) == 5 and torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) and x == y for (a, x), (b, y) in zip(found, map(held.__getitem__, range(5)), strict=True)
    )


# Reading ahead


def reading_threads() -> int:
    return sum(thread.name == "read_ahead" for thread in threading.enumerate())


def wait_until(condition, seconds: float = 10) -> bool:
    """Whether something comes true; tests do not depend on when."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 500])
def test_a_thread_reads_the_same(count):
    assert list(read_ahead((i for i in range(count)), 64)) == list(range(count))


def test_what_fails_while_reading_ahead_is_raised_in_its_turn():
    def source():
        yield from range(40)
        raise ValueError("damaged")

    found = []
    with pytest.raises(ValueError, match="damaged"):
        for element in read_ahead(source(), 1000):
            found.append(element)
    assert found == list(range(40))


def test_a_dropped_iterator_ends_its_thread_and_command(three):
    command = f"pipe:cat {three}/a.tar; sleep 1000"
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    iterator = read_ahead(endless(), 64)
    assert next(iterator) == 1
    del iterator
    assert closed.wait(10) and wait_until(lambda: reading_threads() == 0)
    before = children()
    iterator = iter(ShardSampler(ShardSet([command], samples=[5]), buffer=0, ahead=0))
    next(iterator)
    assert children() - before
    iterator.close()
    assert not children() - before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_a_process_ends_in_the_middle_of_an_epoch(tmp_path):
    plain_shard(tmp_path / "a.tar", 3000)
    script = (
        "import sys; from torch.utils.data import DataLoader; from data.shards import *\n"
        "one, shards = lambda *a: 1, ShardSet(sys.argv[1])\n"
        "sampler = ShardSampler(shards, ahead=64)\n"
        "held = iter(DataLoader(StreamImages(shards, one, one), 4, sampler=sampler, num_workers=2))\n"
        "print(len(next(held)[1]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "4\n"), result.stderr


# Names of shards and counts


def test_folders_globs_braces_lists_and_commands_name_the_same_shards(three):
    expected = [(data, label) for _, data, label in samples_of(ShardSet(three))]
    assert [data for data, _ in expected] == [b"%d" % i for i in range(18)]
    for given_shards in (
        f"{three}/*.tar",
        f"{three}/{{a..c}}.tar",
        f"{three}/{{a,b}}.tar::{three}/c.tar",
        [three / "a.tar", f"{three}/[bc].tar"],
    ):
        assert [(data, label) for _, data, label in samples_of(ShardSet(given_shards))] == expected
    for samples in ([5, 7, 6], (5, 7, 6)):
        shards = ShardSet(f"pipe:cat {three}/{{a..c}}.tar", samples=samples)
        assert [(data, label) for _, data, label in samples_of(shards)] == expected


def test_counts_come_from_the_index_or_the_headers_or_the_caller(three, caplog):
    with caplog.at_level(logging.INFO):
        assert ShardSet(three).counts.tolist() == [5, 7, 6]
    assert "counted 18 samples" in caplog.text
    caplog.clear()
    index = write_index(three, {"a.tar": 5, "b.tar": 7, "c.tar": 6}, num_classes=7)
    shards = ShardSet(f"{three}/[bc].tar")
    assert (shards.counts.tolist(), shards.num_classes, shards.classes) == ([7, 6], 7, None) and not caplog.text
    piped = ShardSet(f"pipe:cat '{three}/{{b,a}}.tar'", index=index)
    assert piped.counts.tolist() == [7, 5] and len(samples_of(piped)) == 12
    even = ShardSet([f"pipe:cat {three}/b.tar", f"pipe:cat {three}/c.tar"], samples=13)
    assert even.counts.tolist() == [7, 6] and len(samples_of(even)) == 13
    assert ShardSet(three, samples=18).counts.tolist() == ShardSet(three, samples=(5, 7, 6)).counts.tolist()


def test_counting_agrees_with_webdataset_on_unusual_archives(tmp_path):
    long = "d/" + "long" * 40
    members = [
        *("__meta__", "README", "d/__x__/1.jpg", "d/__x__/1.cls", "a.b/2.seg.png", "a.b/2.cls", "._3.jpg", "3.jpg"),
        *("README", "3.cls", "__y__/4.jpg", f"{long}.jpg", f"{long}.cls", "5.cls", "6.jpg", "7"),
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"123"))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    theirs = list(webdataset.tarfile_samples([{"url": str(tmp_path / "a.tar")}]))
    assert count_samples(tmp_path / "a.tar") == len(theirs) == len(samples_of(ShardSet(tmp_path))) == 6


@pytest.mark.parametrize(
    "given_shards, others, message",
    [
        ("{0}/nowhere.tar", {}, "nowhere.tar: no such shard"),
        ("{0}/{{a,z}}.tar", {}, "z.tar: no such shard"),
        ("{0}/x*.tar", {}, r"x\*.tar: no shard matches"),
        ("{0}/{{a", {}, r"not a pattern of shards"),
        ("{0}/${{UNSET}}.tar", {}, r"not a pattern of shards: missing environment variable"),
        ("https://x.org/a.tar", {}, "pipe:curl -sfL https://x.org/a.tar"),
        ("{0}/empty", {}, "no .tar shards in this folder"),
        ([], {}, "no shards given"),
        (["{0}/a.tar", "{0}/?.tar"], {}, "a.tar: this shard is given twice"),
        ("pipe:cat {0}/a.tar", {}, "how many samples it has is not known; give the index.json"),
        ("pipe:cat {0}/a.tar", {"index": "{0}/none.json"}, "none.json: no such index"),
        ("pipe:cat {0}/a.tar", {"samples": [1, 2]}, r"samples=\[1, 2\] does not fit 1 shard"),
        ("{0}/{{a,b,c}}.tar", {"samples": 17}, None),
        ("pipe:cat {0}/{{a,b,c}}.tar", {"samples": 1}, "samples=1 does not fit 3 shard"),
    ],
)
def test_wrong_names_and_counts_are_named(three, given_shards, others, message):
    (three / "empty").mkdir()
    many = (
        [given.format(three) for given in given_shards]
        if isinstance(given_shards, list)
        else given_shards.format(three)
    )
    others = {key: value.format(three) if isinstance(value, str) else value for key, value in others.items()}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        samples_of(ShardSet(many, **others))
    assert "\n" not in str(caught.value)


def test_webdataset_is_named_where_it_is_missing(three, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    with pytest.raises(ValueError, match="python -m pip install webdataset"):
        ShardSet(three)


# Damage


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "index.json: not a JSON file"),
        ("[" * 100000, "index.json: not a JSON file"),
        ("[]", "not an index that tools/make_shards.py wrote"),
        ({"format": "raw"}, "shards of format 'raw' where 'tar' ones are expected"),
        ({"shards": [{"name": "../a.tar", "samples": 1}]}, "shard 0 has the name '../a.tar'"),
        ({"shards": [{"samples": 1}]}, "shard 0 has the name None"),
        ({"shards": [7]}, "shard 0 has the name None"),
        ({"shards": [{"name": "a.tar"}]}, "shard 'a.tar' has 'samples': None"),
        ({"shards": [{"name": "a.tar", "samples": True}]}, "'samples': True"),
        ({"shards": [{"name": "a.tar", "samples": -1}]}, "'samples': -1"),
        ({"shards": [{"name": "a.tar", "samples": 10**30}]}, "'samples': 1000"),
        ({"shards": [{"name": "a.tar", "samples": 5, "bytes": 7}]}, "a.tar: 20480 bytes, but 7 by"),
        ({"shards": [{"name": "a.tar", "samples": 5}] * 2}, "'a.tar' is listed twice"),
        ({"shards": [{"name": "a.tar", "samples": 5}, {"name": "d.tar", "samples": 5}]}, "d.tar: no such shard, but"),
        ({"shards": []}, "a.tar: index.json beside it does not list it"),
        ({"shards": [{"name": "a.tar", "samples": 0}]}, "a.tar: no samples in it"),
        ({"num_classes": 3, "classes": ["a"]}, "'num_classes' is 3 with 1 names"),
        ({"num_classes": 10**30}, "'num_classes' is 1000"),
        ({"classes": "abc"}, "'classes' is neither null nor a list of printable names"),
        ({"classes": ["a\nb"]}, "'classes' is neither null nor a list of printable names"),
        ({"shards": [{"name": "a\n.tar", "samples": 1}]}, r"shard 0 has the name 'a\\n.tar'"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, content, message):
    plain_shard(tmp_path / "a.tar", 5)
    if isinstance(content, dict):
        content = json.dumps({"format": "tar", "shards": [{"name": "a.tar", "samples": 5}], **content})
    (tmp_path / "index.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        ShardSet(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["{0}/d/*.tar", "{0}/d*/[ab].tar", "{0}/./d/?.tar"])
def test_shards_that_a_glob_does_not_find_are_those_of_the_index(tmp_path, pattern):
    folder = tmp_path / "d"
    folder.mkdir()
    plain_shard(folder / "a.tar", 5)
    write_index(folder, {"a.tar": 5, "b.tar": 7})
    pattern = pattern.format(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"/d/b.tar: no such shard, but .*/d/index.json lists it"):
        ShardSet(pattern)
    shards = ShardSet(pattern, skip=True)
    assert [Path(url) for url in shards.urls] == [folder / "a.tar", folder / "b.tar"]
    assert shards.counts.tolist() == [5, 7]
    data = [data for _, data, _ in samples_of(shards)]
    assert data[:5] == [b"%d" % i for i in range(5)] and all("b.tar: no such shard" in str(err) for err in data[5:])
    assert ShardSet(f"{folder}/a*.tar").urls == [f"{folder}/a.tar"]  # the index lists others that do not match


def test_more_samples_than_a_shard_can_hold_are_not_believed(folder, three, tmp_path):
    entries = [{"name": f"{name}.tar", "samples": 6_000_000_000 * (name == "b"), "bytes": 20480} for name in "abc"]
    (three / "index.json").write_text(json.dumps({"format": "tar", "shards": entries}))
    message = r"index.json: shard 'b.tar' has 'samples': 6000000000, more than its 20480 bytes can hold"
    with pytest.raises(ValueError, match=message):
        ShardSet(three, skip=True)
    make_shards.make_shards(folder, tmp_path / "raw", ["val"], Options(format="raw"))
    index = tmp_path / "raw/val/index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["samples"] = 6_000_000_000
    index.write_text(json.dumps(content))
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"shard 'shard-000000.raw' has 'samples': 6000000000, more than its "):
            RawSource(index.parent, skip=skip)


def test_other_shards_and_classes_than_the_indexs_are_named(three):
    index = write_index(three, {"a.tar": 5, "b.tar": 7, "c.tar": 6}, classes=["x", "y"])
    with pytest.raises(ValueError, match=r"index.json lists no shard of this name; its 3 shard\(s\) begin with a.tar"):
        ShardSet("pipe:cat d.tar", index=index)
    with pytest.raises(ValueError, match="lists more than one shard of this name"):
        ShardSet("pipe:cat a.tar b.tar", index=index)
    with pytest.raises(ValueError, match=r"packed with 2 classes, the training data has 2; they differ in their order"):
        ShardSet(three, classes=["y", "x"])
    with pytest.raises(ValueError, match=r"by the index.json, not 19"):
        ShardSet(three, samples=19)
    assert ShardSet(three, classes=["x", "y"]).num_classes == 2


@pytest.mark.parametrize(
    "members, message",
    [
        ([("1.cls", b"1")], r"a.tar@/1: 0 images among its members \(cls\)"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"1")], "2 images among its members"),
        ([("1.jpg", b"x")], r"a.tar@/1.jpg: no label"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], r"1.jpg: its .cls is b'cat'"),
        ([("1.jpg", b"x"), ("1.cls", b"")], r"1.jpg: its .cls is b''"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], r"its .cls is b'-1'"),
        ([("1.jpg", b"x"), ("1.cls", b"9" * 5000)], r"its .cls is b'9999"),
        ([("1.jpg", b"x"), ("1.cls", b"3")], "label 3, but there are 3 classes"),
        ([("1.jpg", b""), ("1.cls", b"1")], "1.jpg: 0 bytes"),
        ([("1\n2.jpg", b""), ("1\n2.cls", b"1")], r"1\\n2.jpg: 0 bytes"),
    ],
)
def test_a_wrong_sample_fails_where_it_is_used_and_alone(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", ("0.jpg", b"x"), ("0.cls", b"2\n"), *members)
    shards = ShardSet(tmp_path, num_classes=3)
    good, bad = ShardSampler(shards, train=False)
    dataset = StreamImages(shards, lambda data, name: data, lambda image: image)
    assert dataset[good] == (b"x", 2)
    with pytest.raises(ValueError, match=message) as caught:
        dataset[pickle.loads(pickle.dumps(bad))]  # as it travels to a worker
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ahead", [0, 1024])
@pytest.mark.parametrize("command", ["", "pipe:cat "])
def test_more_or_fewer_samples_than_expected_are_named(three, ahead, command):
    for count, found in ((6, 7), (8, 7)):
        sampler = ShardSampler(ShardSet([f"{command}{three}/b.tar"], samples=[count]), train=False, ahead=ahead)
        given_away = 0
        with pytest.raises(ValueError, match=f"b.tar: expected {count} samples, found {found}"):
            for _ in sampler:
                given_away += 1
        assert given_away < count  # the last one is not given away


def test_truncated_and_damaged_shards_are_named(three):
    whole = (three / "a.tar").read_bytes()
    cases = [
        (whole[: 3072 + 100], "damaged at or after member 0001.jpg: a damaged header"),
        (whole[: 2048 + 512 + 1], "damaged at or after member 0001.jpg: unexpected end of data"),
        (whole[:2048], "damaged at or after member 0000.cls: a damaged header, or no end"),  # between two members
        (whole[:2048] + b"x" * 512 + whole[2560:], "damaged at or after member 0000.cls: a damaged header"),
        (b"", "damaged from the beginning: empty file"),
        (b"no archive" * 200, "damaged from the beginning"),
    ]
    for content, message in cases:
        (three / "b.tar").write_bytes(content)
        with pytest.raises(ValueError, match=f"b.tar: {message}"):
            ShardSet(three / "b.tar")
        for url in (f"{three}/b.tar", f"pipe:cat {three}/b.tar"):
            with pytest.raises(ValueError, match=r"b.tar: (damaged|expected 5 samples, found)"):
                samples_of(ShardSet([url], samples=[5]))


@pytest.mark.parametrize(
    "command, code", [("false", 1), ("cat {0}/a.tar; exit 3", 3), ("head -c 3000 {0}/a.tar; exit 4", 4)]
)
def test_a_command_that_fails_is_named_with_its_exit_code(three, command, code):
    url = f"pipe:{command.format(three)}"
    with pytest.raises(OSError, match=f"the command ended with exit code {code}") as caught:
        samples_of(ShardSet([url], samples=[5]))
    assert url in str(caught.value)


def test_too_few_samples_for_the_ranks(three):
    shards = ShardSet(three / "a.tar")
    with pytest.raises(ValueError, match=r"5 training sample\(s\) in 1 shard\(s\) for 6 processes; use at most 5"):
        ShardSampler(shards, 0, 6)
    assert [len(ShardSampler(shards, rank, 6, train=False)) for rank in range(6)] == [0, 1, 1, 1, 1, 1]


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Truncated, overwritten, doubled and mended content: some headers keep a right checksum."""
    at = st.integers(0, len(content) - 1)

    def overwrite(changes: list[tuple[int, bytes]], end: int, mend: bool) -> bytes:
        result = bytearray(content)
        for position, data in changes:
            result[position : position + len(data)] = data
        for header in range(0, len(result) - 511, 512) if mend else ():
            if result[header + 257 : header + 262] == b"ustar":
                total = sum(result[header : header + 148]) + 256 + sum(result[header + 156 : header + 512])
                result[header + 148 : header + 156] = b"%06o\0 " % total
        return bytes(result[:end])

    header = st.tuples(st.integers(0, 5).map(lambda n: n * 1024), st.sampled_from([0, 100, 124, 156, 157, 257, 345]))
    position = st.one_of(at, header.map(sum))
    data = st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from([b"\xff" * 12, b"\x80" + b"\xff" * 11, b"x", b"L", b"S", b"g"]),
    )
    return st.builds(
        overwrite, st.lists(st.tuples(position, data), max_size=3), st.one_of(st.just(len(content)), at), st.booleans()
    )


@pytest.fixture(scope="module")
def small_shard(tmp_path_factory) -> Path:
    return plain_shard(tmp_path_factory.mktemp("fuzz") / "a.tar", 3)


@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_shards_are_read_or_named(small_shard, data):
    content = small_shard.read_bytes()[:4096]
    mutated = small_shard.with_name("b.tar")
    mutated.write_bytes(data.draw(mutations(content + bytes(1024))))
    for samples in (None, [3]):
        try:
            found = samples_of(ShardSet([mutated], samples=samples))
        except (ValueError, OSError) as err:
            assert "b.tar" in str(err) and "\n" not in str(err)
        else:
            assert all(isinstance(part, bytes | ValueError) for _, part, _ in found)
            assert samples is None or len(found) == 3


@given(changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_indices_and_records_are_read_or_named(mutable, changes):
    for root, name, read in (
        (mutable / "tar", "index.json", ShardSet),
        (mutable / "raw", "shard-000000.npy", RawSource),
    ):
        content = (root / f"{name}.good").read_bytes()
        mutated = bytearray(content)
        for at, data in changes:
            at %= len(content)
            mutated[at : at + len(data)] = data
        (root / name).write_bytes(mutated)
        try:
            read(root)
        except (ValueError, OSError) as err:
            assert str(root) in str(err) and "\n" not in str(err)


@pytest.fixture(scope="module")
def mutable(folder, packed, tmp_path_factory) -> Path:
    """tar/ and raw/ with copies of the files that are mutated."""
    root = tmp_path_factory.mktemp("mutable")
    make_shards.make_shards(folder, root / "packed", ["val"], Options(format="raw", shortest_side=20))
    shutil.copytree(packed / "val", root / "tar")
    (root / "packed/val").rename(root / "raw")
    for path in (root / "tar/index.json", root / "raw/shard-000000.npy"):
        shutil.copy(path, f"{path}.good")
    return root


# Raw shards


@pytest.fixture
def raw(folder, tmp_path) -> Path:
    make_shards.make_shards(folder, tmp_path / "raw", ["train"], Options(format="raw", shard_size=6, shortest_side=24))
    return tmp_path / "raw/train"


def test_raw_images_reach_forked_and_spawned_workers(raw, monkeypatch):
    monkeypatch.setattr("data.raw.MOST_MAPS", 2)
    source = RawSource(raw)
    expected = [source.read(i).copy() for i in range(len(source))]
    assert len(source.maps) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.maps and np.array_equal(copy.read(7), expected[7]) and np.array_equal(source.read(-1), expected[-1])
    dataset = Images(source, lambda pixels, name: pixels, lambda pixels: torch.from_numpy(pixels.copy()))
    loader = DataLoader(dataset, None, sampler=range(len(source)), num_workers=2)
    found = list(loader)
    assert all(np.array_equal(image, pixels) for (image, _), pixels in zip(found, expected, strict=True))
    assert [label for _, label in found] == source.labels.tolist()
    with pytest.raises(ValueError, match="read-only"):
        source.read(0)[:] = 0
    with pytest.raises(IndexError):
        source.read(len(source))


def records_of(raw: Path, **changes) -> None:
    """Overwrite fields of the second record of the first shard."""
    records = np.load(raw / "shard-000000.npy")
    for field, value in changes.items():
        records[field][1] = value
    np.save(raw / "shard-000000.npy", records)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: (raw / "index.json").unlink(), "index.json: no such index"),
        (lambda raw: (raw / "shard-000001.raw").unlink(), "shard-000001.raw: no such file, but .*index.json needs it"),
        (lambda raw: (raw / "shard-000001.npy").unlink(), "shard-000001.npy: no such file"),
        (lambda raw: (raw / "shard-000001.npy").write_bytes(b"x" * 300), "shard-000001.npy: not an array of records"),
        (lambda raw: (raw / "shard-000001.npy").write_bytes(b""), "shard-000001.npy: not an array of records"),
        (lambda raw: np.save(raw / "shard-000001.npy", np.zeros(6)), r"an array \(6,\) of float64; expected"),
        (lambda raw: shutil.copy(raw / "shard-000002.npy", raw / "shard-000001.npy"), "expected 6 images, found 5"),
        (lambda raw: records_of(raw, height=0), "shard-000000.npy: an image without height or width"),
        (lambda raw: records_of(raw, width=2**30), "shard-000000.npy: an image without height or width"),
        (lambda raw: records_of(raw, offset=7), "an image does not begin where the one before it ends"),
        (lambda raw: records_of(raw, label=-1), "shard-000000.npy: the label -1 of image 1, but there are 3 classes"),
        (lambda raw: records_of(raw, label=3), "shard-000000.npy: the label 3 of image 1, but there are 3 classes"),
        (lambda raw: (raw / "shard-000000.raw").write_bytes(b"x" * 99), "shard-000000.raw has 99 bytes"),
    ],
)
def test_damaged_raw_shards_are_named(raw, damage, message):
    damage(raw)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        RawSource(raw)
    assert "\n" not in str(caught.value)


def test_changed_pixels_are_found_by_their_digest(raw):
    content = bytearray((raw / "shard-000001.raw").read_bytes())
    content[5] ^= 1
    (raw / "shard-000001.raw").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000001.raw: its SHA-256 is not that of .*index.json"):
        RawSource(raw).verify()


# The packer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["tar", "raw"])
def test_processes_and_interruptions_change_nothing(folder, tmp_path, kind, monkeypatch):
    options = Options(format=kind, shard_size=4, shortest_side=30)
    make_shards.make_shards(folder, tmp_path / "one", ["train"], options)
    make_shards.make_shards(folder, tmp_path / "two", ["train"], options, workers=2)
    write, begun = make_shards.write_shard, []

    def interrupted(job):
        begun.append(job.name)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return write(job)

    monkeypatch.setattr(make_shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shards.make_shards(folder, tmp_path / "three", ["train"], options)
    partial = tmp_path / "three/.train.partial"
    assert not (tmp_path / "three/train").exists() and len(list(partial.glob(f"*.{kind}"))) == 3
    kept, damaged = partial / f"shard-000000.{kind}", partial / f"shard-000001.{kind}"
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-1])
    make_shards.make_shards(folder, tmp_path / "three", ["train"], options)
    assert (tmp_path / "three/train" / kept.name).stat().st_mtime_ns == before
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert {Path(name).parent.name for name in contents(tmp_path / "three")} == {"train"}


def test_seeds_change_the_order_alone(folder, packed, tmp_path):
    make_shards.make_shards(folder, tmp_path, ["train"], Options(shard_size=5, seed=1))
    one, other = (samples_of(ShardSet(root / "train")) for root in (packed, tmp_path))
    assert [data for _, data, _ in one] != [data for _, data, _ in other]
    assert sorted(sample[1:] for sample in one) == sorted(sample[1:] for sample in other)


def test_nothing_is_overwritten_without_force(folder, tmp_path, monkeypatch):
    (tmp_path / "val").mkdir()
    with pytest.raises(FileExistsError, match="val exists and is no set of shards; choose another folder"):
        make_shards.make_shards(folder, tmp_path, ["val"], Options(), force=True)
    (tmp_path / "val").rmdir()
    make_shards.make_shards(folder, tmp_path, ["val"], Options())
    with pytest.raises(FileExistsError, match=r"val exists; .* replace it with --force"):
        make_shards.make_shards(folder, tmp_path, ["val"], Options())
    before = contents(tmp_path)
    write = make_shards.write_shard
    monkeypatch.setattr(make_shards, "write_shard", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_shards.make_shards(folder, tmp_path, ["val"], Options(quality=50), force=True)
    assert before.items() <= contents(tmp_path).items()
    monkeypatch.setattr(make_shards, "write_shard", write)
    make_shards.make_shards(folder, tmp_path, ["val"], Options(quality=50), force=True)
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


def test_an_unfinished_run_of_other_options_is_not_mixed_in(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "put_in_place", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_shards.make_shards(folder, tmp_path, ["val"], Options())
    with pytest.raises(
        FileExistsError, match=r"\.val\.partial holds shards of an unfinished run with other files or opt"
    ):
        make_shards.make_shards(folder, tmp_path, ["val"], Options(seed=1))


def hold(folder: Path, events) -> None:
    with make_shards.only_run(folder):
        events[0].set()
        events[1].wait()


def test_two_runs_do_not_work_at_the_same_place(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / ".val.partial/progress", (held, done)))
    other.start()
    assert held.wait(20)
    with pytest.raises(BlockingIOError, match="another run is at work here; wait for it or end it"):
        make_shards.make_shards(folder, tmp_path, ["val"], Options())
    done.set()
    other.join()
    make_shards.make_shards(folder, tmp_path, ["val"], Options())


def test_unreadable_and_equal_files_are_reported(folder, tmp_path, caplog):
    shutil.copytree(folder / "val", tmp_path / "data/val")
    ant = tmp_path / "data/val/ant"
    first, second = sorted(ant.iterdir())[:2]
    shutil.copy(first, ant / "copy.png")
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"1 of 6 files cannot be read, first {second}: "):
        make_shards.make_shards(tmp_path / "data", tmp_path / "out", ["val"], Options())
    assert not (tmp_path / "out/val").exists()
    with caplog.at_level(logging.INFO):
        make_shards.make_shards(tmp_path / "data", tmp_path / "out", ["val"], Options(), skip_unreadable=True)
    assert f"the same bytes: {ant}/copy.png, {first}" in caplog.text and "5 images in 1 tar shard" in caplog.text
    assert "1 unreadable ones left out" in caplog.text
    shards = ShardSet(tmp_path / "out/val")
    assert len(shards) == 5 and second.read_bytes() not in [data for _, data, _ in samples_of(shards)]
    for path in ant.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="ant: no image of this class can be read"):
        make_shards.make_shards(tmp_path / "data", tmp_path / "none", ["val"], Options(), skip_unreadable=True)


def test_what_the_disk_changes_is_noticed(folder, tmp_path, monkeypatch):
    whole = make_shards.is_whole
    monkeypatch.setattr(make_shards, "is_whole", lambda folder, entry: False)
    with pytest.raises(OSError, match=r"shard-000000.tar: something else is read from it than was written"):
        make_shards.make_shards(folder, tmp_path, ["val"], Options())
    monkeypatch.setattr(make_shards, "is_whole", whole)
    monkeypatch.setattr(
        make_shards, "survey", lambda paths, *_: (np.ones(len(paths), bool), np.zeros((len(paths), 32)))
    )
    with pytest.raises(OSError, match="changed while it was being packed"):
        make_shards.make_shards(folder, tmp_path, ["val"], Options())
    assert not list(tmp_path.glob(".val.partial/shard-*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quality", "101"], "--quality 101 is that of JPEG files in tar shards, from 1 to 100"),
        (["--quality", "90", "--format", "raw"], "--quality 90 is that of JPEG files in tar shards"),
        (["--shard-size", "0"], "--shard-size 0; choose a number from 1 on"),
        (["--shortest-side", "0"], "--shortest-side 0; choose a number from 1 on"),
        (["--seed", "-1"], "--seed -1; choose a number from 0 on"),
        (["--splits", "train"], "no such folder"),
    ],
)
def test_the_command_ends_with_one_line(folder, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "val").symlink_to(folder / "val")
    monkeypatch.setattr(
        "sys.argv", ["make_shards.py", str(tmp_path), str(tmp_path / "out"), "--workers", "0", *arguments]
    )
    with pytest.raises(SystemExit, match=message) as caught:
        make_shards.main()
    assert str(caught.value).startswith("make_shards.py: error: ") and "\n" not in str(caught.value)


def test_the_command_packs(folder, tmp_path, monkeypatch, packed):
    arguments = ["--workers", "0", "--shard-size", "5"]
    monkeypatch.setattr("sys.argv", ["make_shards.py", str(folder), str(tmp_path / "out"), *arguments])
    make_shards.main()
    assert contents(tmp_path / "out") == contents(packed)
