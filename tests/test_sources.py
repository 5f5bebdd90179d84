"""Sources and their packers: the same samples in every form, shared caches, bad input named, nothing half-written."""

import errno
import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import distributed
from data import zipped
from data.lists import LISTS, ListSource
from data.sources import FolderSource, Source
from data.tiny_imagenet import TinyImageNetSource
from data.zipped import ZipSource
from tools import make_22k_list, make_zip, scan

WNIDS = ["n01440764", "n02102040", "n03394916"]
FUZZ = settings(max_examples=int(os.environ.get("FUZZ", 150)), deadline=None, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip


def encoded(label: int, number: int, form: str) -> bytes:
    """A small image whose content says which it is."""
    pixels = np.random.RandomState(100 * label + number).randint(0, 255, (12, 10 + number, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """train/ and val/ of three classes: 5 and 2 images each, JPEG and PNG, with names that sort."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 5), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                suffix, form = ((".JPEG", "JPEG"), (".png", "PNG"))[number % 2]
                data = encoded(label, number + 10 * (split == "val"), form)
                (root / split / wnid / f"{wnid}_{number}{suffix}").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def forms(photos, tmp_path_factory) -> dict[str, Path]:
    """The photographs in each form; every second member of an archive is deflated."""
    roots = {form: tmp_path_factory.mktemp(form) for form in ("zip", "list", "tiny")}
    shutil.copytree(photos, roots["list"], dirs_exist_ok=True)
    (roots["tiny"] / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(WNIDS)))
    for split in ("train", "val"):
        folder = FolderSource(photos / split)
        names = [str(Path(path).relative_to(photos / split)) for path in folder.paths]
        pairs = list(zip(names, folder.labels.tolist(), strict=True))
        with zipfile.ZipFile(roots["zip"] / f"{split}.zip", "w") as archive:
            for index, name in enumerate(names):
                archive.write(folder.paths[index], name, zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED)
        (roots["zip"] / f"{split}_map.txt").write_text("".join(f"{name}\t{label}\n" for name, label in pairs))
        entries = [[f"{split}/{name}", label] for name, label in pairs]
        (roots["list"] / LISTS[split]).write_text(json.dumps(entries))
        lines = []
        for index, (name, label) in enumerate(pairs):
            wnid, inner = WNIDS[label], "" if split == "val" else f"{WNIDS[label]}/"
            target = roots["tiny"] / split / f"{inner}images" / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder.paths[index], target)
            lines.append(f"{target.name}\t{wnid}\t0\t0\t9\t9\n")
    (roots["tiny"] / "val" / "val_annotations.txt").write_text("".join(lines))
    return roots


SOURCES: dict[str, Callable[[dict[str, Path], str], Source]] = {
    "zip": lambda roots, split: ZipSource(roots["zip"], split),
    "zip part": lambda roots, split: ZipSource(roots["zip"], split, "part", rank=1, world_size=3),
    "zip full": lambda roots, split: ZipSource(roots["zip"], split, "full"),
    "list": lambda roots, split: ListSource(roots["list"], split),
    "tiny": lambda roots, split: TinyImageNetSource(roots["tiny"], split),
}


class Bytes(Dataset):
    """(bytes, label, whether another process read them)."""

    def __init__(self, source: Source):
        self.source, self.process = source, os.getpid()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes, int, bool]:
        return self.source.read(index), int(self.source.labels[index]), os.getpid() != self.process


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("form", SOURCES)
def test_every_source_gives_the_same_samples(photos, forms, form, split):
    folder, source = FolderSource(photos / split), SOURCES[form](forms, split)
    expected = [folder.read(index) for index in range(len(folder))]
    assert len(source) == len(folder) and source.classes == folder.classes == WNIDS
    assert source.labels.dtype == np.int64 and np.array_equal(source.labels, folder.labels)
    assert all(Path(source.name(index)).name == Path(folder.name(index)).name for index in range(len(folder)))
    again = pickle.loads(pickle.dumps(source))
    for reader in (source, again):
        assert [reader.read(index) for index in range(len(reader))] == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, list(range(len(source))) * 20)) == expected * 20
    loader = DataLoader(Bytes(source), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [[data, label, True] for data, label in zip(expected, folder.labels.tolist(), strict=True)]
    assert source.read(0) == expected[0]  # still, after processes that inherited it have ended


def test_known_classes_number_a_split_that_lacks_some(forms, tmp_path):
    shutil.copy(forms["zip"] / "val.zip", tmp_path)
    lines = (forms["zip"] / "val_map.txt").read_text().splitlines(keepends=True)
    (tmp_path / "val_map.txt").write_text("".join(lines[:2] + lines[4:]))  # without the class in the middle
    assert ZipSource(tmp_path, "val").classes is None
    assert ZipSource(tmp_path, "val", classes=WNIDS).classes == WNIDS
    with pytest.raises(ValueError, match=r"val_map.txt: the folder 'n03394916' has label 2, which is 'n09' in the tr"):
        ZipSource(tmp_path, "val", classes=[*WNIDS[::2], "n09"])
    with pytest.raises(ValueError, match=r"line 3: the label 2 of 'n03394916/.*' is out of range; .* from 0 to 1"):
        ZipSource(tmp_path, "val", num_classes=2)


# Caches


@pytest.fixture
def memory(monkeypatch) -> Path:
    """A folder of this test's own in shared memory; nothing may stay in it."""
    with tempfile.TemporaryDirectory(dir=zipped.shared_folder()) as folder:
        monkeypatch.setattr(zipped, "shared_folder", lambda: Path(folder))
        yield Path(folder)
        assert not list(Path(folder).iterdir())


def test_part_holds_its_own_samples_alone(forms, monkeypatch, memory):
    sources = [ZipSource(forms["zip"], "train", "part", rank=rank, world_size=4) for rank in range(4)]
    assert sorted(index for source in sources for index in source.own_indices()) == list(range(15))
    assert sum(source.cache.size for source in sources) == sum(sources[0].archive.sizes)
    expected = [ZipSource(forms["zip"], "train").read(index) for index in range(15)]
    for source in sources:
        assert [source.read(index) for index in range(15)] == expected  # others come from the archive
    monkeypatch.setattr(zipped.Archive, "read", None)
    for source in sources:
        assert all(source.read(index) == expected[index] for index in source.own_indices())


def test_lines_that_repeat_are_samples_again_but_cached_once(forms, tmp_path):
    shutil.copy(forms["zip"] / "val.zip", tmp_path)
    lines = (forms["zip"] / "val_map.txt").read_text()
    (tmp_path / "val_map.txt").write_text(lines + lines)
    source = ZipSource(tmp_path, "val", "full")
    assert len(source) == 12 and source.cache.size == sum(source.archive.sizes[:6])
    assert all(source.read(index) == source.read(index + 6) == source.archive.read(index) for index in range(6))


def test_cache_fills_in_many_runs(forms, monkeypatch):
    """Small windows and gaps: each member is in a run of its own, or does not fit into one."""
    for gap, window in ((-1, 2**24), (2**16, 1), (0, 500)):
        monkeypatch.setattr(zipped, "GAP", gap), monkeypatch.setattr(zipped, "WINDOW", window)
        source = ZipSource(forms["zip"], "train", "full")
        assert all(source.read(index) == source.archive.read(index) for index in range(15))


def test_spawned_processes_reach_the_cache(forms):
    sources = [ZipSource(forms["zip"], "train", mode, rank=1, world_size=2) for mode in ("full", "part")]
    code = (
        "import pickle, sys; sources = pickle.load(sys.stdin.buffer); sources[0].archive = sources[1].archive = None;"
        "sys.stdout.buffer.write(pickle.dumps([[s.read(i) for i in s.own_indices()] for s in sources]))"
    )
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(sources), stdout=subprocess.PIPE, cwd=ROOT)
    expected = [[source.archive.read(index) for index in source.own_indices()] for source in sources]
    assert pickle.loads(result.stdout) == expected


def test_a_pickle_that_outlives_its_cache_reads_the_archive(forms, caplog):
    source = ZipSource(forms["zip"], "train", "full")
    expected = [source.read(index) for index in range(15)]
    saved = pickle.dumps(source)
    del source
    other = ZipSource(forms["zip"], "val", "full")  # may get the same descriptor
    loaded = pickle.loads(saved)
    assert [loaded.read(index) for index in range(15)] == expected and len(other) == 6
    assert "reads from the archive instead" in caplog.text


MEMBER, MEMBERS = 2**17, 400  # 52 MB


def pss() -> int:
    """This process's share of memory, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def in_ranks(world_size: int, work: Callable[[int], object], store: Path) -> list[object]:
    """Results of ``work(rank)`` in forked processes of one gloo group; an exception is a result, too."""

    def run(rank: int, results: multiprocessing.SimpleQueue) -> None:
        gc.freeze()  # collecting what the tests before have left would copy pages, which memory tests would count
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        try:
            results.put((rank, work(rank)))
        except Exception as err:
            results.put((rank, err))
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=run, args=(rank, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    answers = dict(results.get() for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [answers[rank] for rank in range(world_size)]


def full(root: Path, rank: int) -> ZipSource:
    calls = {"barrier": distributed.barrier, "broadcast": distributed.broadcast_object}
    return ZipSource(root, "train", "full", local_rank=rank, **calls)


def test_full_cache_is_in_memory_once(forms, tmp_path, memory):
    """Four ranks read all of it: their memory and the cache's together are one copy, not four."""
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for number in range(MEMBERS):
            archive.writestr(f"{number}.png", os.urandom(MEMBER))
    (tmp_path / "train_map.txt").write_text("".join(f"{number}.png\t{number}\n" for number in range(MEMBERS)))

    def work(rank: int) -> tuple:
        full(forms["zip"], rank).read(0)  # what a process takes at first, whatever the archive's size
        distributed.barrier()
        before = pss()
        source = full(tmp_path, rank)
        equal = all(source.read(index) == source.archive.read(index) for index in range(MEMBERS))
        distributed.barrier()
        shared = pss() - before
        distributed.barrier()
        own = [source.read(index) for index in range(MEMBERS)]  # what a cache in each process would take
        distributed.barrier()
        copied = pss() - before
        distributed.barrier()
        state = os.fstat(source.cache.file.descriptor)
        return equal, shared, copied, (state.st_dev, state.st_ino), state.st_blocks * 512, len(own)

    results = in_ranks(4, work, tmp_path / "store")
    equal, shared, copied, files, held, _ = zip(*results, strict=True)
    size = MEMBERS * MEMBER
    assert all(equal) and len(set(files)) == 1
    assert size <= held[0] < 1.01 * size
    assert sum(shared) + held[0] < 1.5 * size
    assert sum(copied) > 3 * size  # the measure sees copies where there are some


@pytest.mark.parametrize("fault", ["damaged", "no room"])
def test_every_rank_hears_of_a_cache_that_cannot_be_filled(forms, tmp_path, monkeypatch, fault, memory):
    shutil.copy(forms["zip"] / "train_map.txt", tmp_path)
    data = bytearray((forms["zip"] / "train.zip").read_bytes())
    if fault == "damaged":
        data[len(data) // 2] ^= 1
    else:
        monkeypatch.setattr(zipped, "free_memory", lambda: 1000)
    (tmp_path / "train.zip").write_bytes(data)
    first, *others = in_ranks(3, lambda rank: full(tmp_path, rank), tmp_path / "store")
    expected = {"damaged": (ValueError, r"train.zip@/n.*damaged"), "no room": (OSError, "use --cache-mode part or no")}
    with pytest.raises(expected[fault][0], match=expected[fault][1]):
        raise first
    for other in others:
        with pytest.raises(OSError, match=r"train.zip: the first process of this machine could not cache it"):
            raise other


def test_shared_memory_that_fills_up_is_an_error_with_a_way_out(forms, monkeypatch, memory):
    def pwrite(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    for mode, instead in (("full", "part or no"), ("part", "no")):
        with pytest.raises(OSError, match=rf"train.zip: .* is full; use --cache-mode {instead}, or allow more"):
            ZipSource(forms["zip"], "train", mode)


def test_cache_is_logged_with_count_and_bytes(forms, caplog):
    caplog.set_level(logging.INFO)
    ZipSource(forms["zip"], "train", "full")
    assert "train.zip: cached 15 samples, 0.0 MB" in caplog.text
    with pytest.raises(ValueError, match=r"DATA.CACHE_MODE='some'; choose from \['no', 'part', 'full'\]"):
        ZipSource(forms["zip"], "train", "some")


# Bad input


@pytest.mark.parametrize(
    "line, message",
    [
        ("n01440764/a.png 0", "line 3: no tab in 'n01440764/a.png 0'; a line is path<TAB>label"),
        ("", "line 3: no tab in ''"),
        ("NAME\tseven", "line 3: the label 'seven' of 'n01440764/.*' is not an integer"),
        ("NAME\t1_0", "line 3: the label '1_0' of"),
        ("NAME\t-1", "line 3: the label -1 of 'n01440764/.*' is out of range"),
        ("NAME\t3", "line 3: the label 3 of .* is out of range; labels go from 0 to 2"),
        ("NAME\t1", "line 3: 'n01440764/n01440764_0.JPEG' has label 1, but 0 in line 1"),
        ("n01440764/lost.png\t0", "line 3: .*train.zip has no member 'n01440764/lost.png'"),
        ("../secret.png\t0", r"line 3: the path '\.\./secret.png' leaves the data's root"),
        ("a/../../secret.png\t0", "line 3: the path .* leaves the data's root"),
        ("/etc/passwd\t0", "line 3: the path '/etc/passwd' leaves the data's root"),
        ("\t0", "line 3: '' is not a path"),
        ("a\0b\t0", "line 3: .* is not a path"),
        ("\udcff.png\t0", r"line 3: .*train.zip has no member '\\udcff.png'"),
    ],
)
def test_bad_lines_of_a_map_are_named(forms, tmp_path, line, message):
    shutil.copy(forms["zip"] / "train.zip", tmp_path)
    lines = (forms["zip"] / "train_map.txt").read_text().splitlines()
    lines[2:2] = [line.replace("NAME", lines[0].split("\t")[0])]
    (tmp_path / "train_map.txt").write_bytes(os.fsencode("\n".join(lines)))
    with pytest.raises(ValueError, match=rf"train_map.txt, {message}"):
        ZipSource(tmp_path, "train", num_classes=3)


def test_missing_and_empty_parts_of_zip_data_are_named(forms, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.zip: no such file; .* tools/make_zip.py writes"):
        ZipSource(tmp_path, "train")
    shutil.copy(forms["zip"] / "train.zip", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_map.txt: no such file"):
        ZipSource(tmp_path, "train")
    (tmp_path / "train_map.txt").write_text("")
    with pytest.raises(ValueError, match=r"train_map.txt: no line in it"):
        ZipSource(tmp_path, "train")
    with pytest.raises(ValueError, match=r"split='test'; choose from \['train', 'val'\]"):
        ZipSource(tmp_path, "test")


def write_archive(folder: Path, data: bytes = b"x" * 3000, method: int = zipfile.ZIP_STORED) -> bytearray:
    """An archive of one member, a.png, and its map; returns the archive's bytes."""
    with zipfile.ZipFile(folder / "train.zip", "w", method) as archive:
        archive.writestr("a.png", data)
    (folder / "train_map.txt").write_text("a.png\t0\n")
    return bytearray((folder / "train.zip").read_bytes())


def damage(data: bytearray, where: bytes, offset: int, value: bytes) -> None:
    start = data.rindex(where) + offset
    data[start : start + len(value)] = value


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "where, offset, value, message",
    [
        (LOCAL, 36, b"?", "train.zip@/a.png: damaged: .*copy the archive again"),
        (LOCAL, 0, b"JUNK", "train.zip@/a.png: damaged: no member begins at byte 0"),
        (CENTRAL, 16, b"\0\0\0\0", "train.zip@/a.png: damaged: its header is not the archive's"),
        (CENTRAL, 8, b"\1\0", "train.zip@/a.png is encrypted; pack the archive without a password"),
        (CENTRAL, 10, b"\x0e\0", "train.zip@/a.png is compressed by method 14; pack the archive without compression"),
        (
            CENTRAL,
            42,
            b"\0\0\0\7",
            "train.zip@/a.png is damaged: it would end beyond|no member begins|truncated or not",
        ),
        (CENTRAL, 24, b"\xfe\xff\xff\xff", "train.zip@/a.png claims 4294967294 bytes"),
        (CENTRAL, 24, b"\1\0\0\0", "train.zip@/a.png.* damaged"),
        (CENTRAL, 0, b"JUNK", "train.zip: truncated or not a zip archive"),
        (END, 0, b"JUNK", "train.zip: truncated or not a zip archive: File is not a zip file; copy it again"),
    ],
)
def test_damaged_archives_are_named(tmp_path, method, where, offset, value, message):
    data = write_archive(tmp_path, method=method)
    damage(data, where, offset, value)
    (tmp_path / "train.zip").write_bytes(data)
    for mode in ("no", "full"):
        with pytest.raises(ValueError, match=message):
            ZipSource(tmp_path, "train", mode).read(0)


def test_two_members_at_one_place_are_named(tmp_path):
    """By a damaged directory; a cache must not give one's bytes for the other's."""
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.png", b"first"), archive.writestr("b.png", b"second")
    (tmp_path / "train_map.txt").write_text("a.png\t0\nb.png\t1\n")
    data = bytearray((tmp_path / "train.zip").read_bytes())
    damage(data, CENTRAL, 42, bytes(4))
    (tmp_path / "train.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"train.zip@/b.png is damaged: it begins where 'a.png' does"):
        ZipSource(tmp_path, "train", "full")


def test_truncated_archives_and_other_files_are_named(tmp_path):
    data = write_archive(tmp_path)
    for other in (b"", b"no zip", data[:-1], data[:1000], data[1000:]):
        (tmp_path / "train.zip").write_bytes(other)
        with pytest.raises(ValueError, match=r"train.zip: truncated or not a zip|train.zip@/a.png(:| is) damaged"):
            ZipSource(tmp_path, "train").read(0)


def test_an_archive_cut_short_while_in_use_is_named(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = write_archive(tmp_path, os.urandom(3000), method)
        source = ZipSource(tmp_path, "train")
        for length in (0, 20, 1000):
            os.truncate(source.file, 0)
            (tmp_path / "train.zip").write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"train.zip@/a.png: damaged"):
                source.read(0)


def test_a_member_that_inflates_to_more_than_it_claims_stops(tmp_path):
    data = write_archive(tmp_path, bytes(10**7), zipfile.ZIP_DEFLATED)
    damage(data, CENTRAL, 24, (1000).to_bytes(4, "little"))
    (tmp_path / "train.zip").write_bytes(data)
    source = ZipSource(tmp_path, "train")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a.png: damaged"):
        source.read(0)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_archives_behind_other_bytes_and_with_longer_headers_are_read(tmp_path):
    data = os.urandom(2000)
    with open(tmp_path / "train.zip", "wb") as file:
        file.write(b"a program that extracts itself")
        with zipfile.ZipFile(file, "w") as archive:
            info = zipfile.ZipInfo("a.png")
            info.extra = b"\xfe\xca" + (500).to_bytes(2, "little") + bytes(500)
            archive.writestr(info, data)
            archive.writestr("é.png", data[::-1])
    (tmp_path / "train_map.txt").write_text("a.png\t0\r\né.png\t1\tmore\n", encoding="utf-8", newline="")
    for mode in ("no", "full"):
        source = ZipSource(tmp_path, "train", mode)
        assert source.read(0) == data and source.read(1) == data[::-1] and source.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a JSON list .* it begins with ''"),
        ('{"a": 1}', "not a JSON list"),
        ("[]", "no entry in it"),
        ('[["a.png", 0], ["b.png"]]', r"entry 2: \['b.png'\] is not \[path, label\]"),
        ('[["a.png", 0], "b.png"]', r"entry 2: 'b.png' is not \[path, label\]"),
        ('[["a.png", 0], ["b.png", 1, 2]]', r"entry 2: .* is not \[path, label\]"),
        ('[["a.png", 0], ["b.png", "one"]]', "entry 2: the label 'one' of 'b.png' is not an integer"),
        ('[["a.png", true]]', "entry 1: the label True of 'a.png' is not an integer"),
        ('[["a.png", 1.0]]', "entry 1: the label 1.0"),
        ('[["a.png", -1]]', "entry 1: the label -1 of 'a.png' is out of range"),
        ('[["a.png", 3]]', "entry 1: the label 3 of 'a.png' is out of range; labels go from 0 to 2"),
        (f'[["a.png", {10**30}]]', "entry 1: the label 10+ of 'a.png' is out of range"),
        (f'[["a.png", {"9" * 5000}]]', "entry 1: malformed JSON: Exceeds the limit"),
        ("[[7, 0]]", "entry 1: 7 is not a path"),
        ('[["", 0]]', "entry 1: '' is not a path"),
        ('[["a\\u0000b", 0]]', "entry 1: .* is not a path"),
        ('[["a\\ud800b", 0]]', "entry 1: .*surrogates not allowed"),
        ('[["/etc/passwd", 0]]', "entry 1: the path '/etc/passwd' leaves the data's root"),
        ('[["a.png", 0], ["a/../../b.png", 0]]', "entry 2: the path .* leaves the data's root"),
        ('[["a.png", 0], ["b.png", ', "entry 2: malformed JSON"),
        ('[["a.png", 0]', "entry 1: malformed JSON: neither , nor ] follows it; truncated"),
        ('[["a.png", 0],]', "entry 2: malformed JSON"),
        ('[["a.png", 0]] more', "'more' follows the end of the list, entry 1"),
        ("[" * 100_000, "entry 1: malformed JSON: maximum recursion depth"),
    ],
)
def test_bad_entries_of_a_list_are_named(tmp_path, text, message):
    (tmp_path / LISTS["train"]).write_text(text)
    with pytest.raises(ValueError, match=rf"{LISTS['train']}(:|,) {message}") as caught:
        ListSource(tmp_path, "train", num_classes=3)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_lists_that_are_missing_or_no_text_or_name_absent_files(tmp_path):
    file = tmp_path / LISTS["val"]
    with pytest.raises(FileNotFoundError, match=r"_map_val.txt: no such list; tools/make_22k_list.py writes one"):
        ListSource(tmp_path, "val")
    file.write_bytes(b'[["\xff.png", 0]]')
    with pytest.raises(ValueError, match=r"_map_val.txt: not a JSON list: byte 3 is not UTF-8"):
        ListSource(tmp_path, "val")
    file.write_text('[["a.png", 0], ["b.png", 1]]')
    (tmp_path / "a.png").write_bytes(b"an image")
    source = ListSource(tmp_path, "val")
    assert source.read(0) == b"an image" and source.absent() == [1] and source.classes is None
    with pytest.raises(FileNotFoundError, match=r"/b.png: no such file, but .*_map_val.txt, entry 2, names it"):
        source.read(1)


def test_a_list_takes_little_more_memory_than_its_text(tmp_path):
    count = 20_000
    entries = [[f"n{i // 100:08d}/n{i // 100:08d}_{i}.JPEG", i // 100] for i in range(count)]
    (tmp_path / LISTS["train"]).write_text(json.dumps(entries))
    source = ListSource(tmp_path, "train")
    assert source.classes == [f"n{i:08d}" for i in range(200)] and source.name(19_999).endswith(entries[-1][0])
    assert len(pickle.dumps(source)) < 50 * count
    with pytest.raises(IndexError):
        source.paths[count]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("wnids.txt", lambda text: None, "wnids.txt: no such file; Tiny-ImageNet has"),
        ("wnids.txt", lambda text: "", "wnids.txt: empty"),
        ("wnids.txt", lambda text: text + "n1 n2\n", "wnids.txt, line 4: 'n1 n2' is not the name of a class"),
        ("wnids.txt", lambda text: text + "../n1\n", r"wnids.txt, line 4: '\.\./n1' is not the name of a class"),
        ("wnids.txt", lambda text: text + text, "wnids.txt, line 4: .* is there already"),
        ("wnids.txt", lambda text: text + "n1\n", "train: the class n1 has no folder here, but .*wnids.txt has it"),
        ("wnids.txt", lambda text: text[:-10], "train: the class n0.* is a folder here, but .*wnids.txt lacks it"),
        ("val/val_annotations.txt", lambda text: None, "val_annotations.txt: no such file"),
        ("val/val_annotations.txt", lambda text: "x.JPEG n1\n" + text, "txt, line 1: no tab in 'x.JPEG n1'; a line is"),
        ("val/val_annotations.txt", lambda text: "x.JPEG\tn1\t0\n", "line 1: .*wnids.txt has no class 'n1'"),
        ("val/val_annotations.txt", lambda text: f"x.JPEG\t{WNIDS[0]}\n", "line 1: .*images has no image 'x.JPEG'"),
        ("val/val_annotations.txt", lambda text: text + text, "line 7: .* or a line before it"),
        (
            "val/val_annotations.txt",
            lambda text: text[: text.index("\n") + 1],
            "txt: no line for '.*' in .*val/images",
        ),
    ],
)
def test_tiny_imagenet_names_what_does_not_agree(forms, tmp_path, file, change, message):
    root = shutil.copytree(forms["tiny"], tmp_path / "tiny")
    text = change((root / file).read_text())
    (root / file).unlink() if text is None else (root / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TinyImageNetSource(root, "val" if "val" in file else "train")


def test_tiny_imagenet_needs_each_of_its_folders(forms, tmp_path):
    root = shutil.copytree(forms["tiny"], tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"split='test'; .* the test images have no labels"):
        TinyImageNetSource(root, "test")
    with pytest.raises(ValueError, match=r"wnids.txt: n02102040 is not one of the 2 classes"):
        TinyImageNetSource(root, "val", WNIDS[::2])
    for path in (root / "train" / WNIDS[1] / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"train/{WNIDS[1]}/images: no images in it"):
        TinyImageNetSource(root, "train")
    shutil.rmtree(root / "val" / "images")
    with pytest.raises(FileNotFoundError, match="val/images: no such folder"):
        TinyImageNetSource(root, "val")


# Fuzzing: what is read is right, or an error names the file.

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "copy", "drop"]), st.floats(0, 1), st.binary(max_size=8),
        st.integers(0, 200),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def mutate(data: bytes, changes: list[tuple]) -> bytes:
    """Bytes changed at random places: one bit, some bytes, an end cut off, a piece inserted, repeated or dropped."""
    for kind, place, piece, length in changes:
        at = int(place * len(data))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << length % 8]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "copy":
            data = data[:at] + data[at : at + length] + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
    return data


def attempt(make: Callable[[], Source], names: list[str]) -> list[tuple[str, int, bytes]] | None:
    """(name, label, bytes) of each sample, or None after an error that names a file on one line."""
    try:
        source = make()
        return [(source.name(i), int(source.labels[i]), source.read(i)) for i in range(len(source))]
    except (ValueError, OSError) as err:
        message = str(err)
        assert any(name in message for name in names) and "\n" not in message and len(message) < 2000, message
        return None


@pytest.fixture(scope="module")
def scratch(forms) -> Path:
    """A folder of every form, whose files a test changes one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(forms["tiny"], folder, dirs_exist_ok=True)
        shutil.copytree(forms["zip"], folder, dirs_exist_ok=True)
        yield Path(folder)


@given(changes=CHANGES, directory_alone=st.booleans())
@FUZZ
def test_fuzzed_archives(forms, scratch, changes, directory_alone):
    data = (forms["zip"] / "val.zip").read_bytes()
    start = data.index(CENTRAL) if directory_alone else 0
    (scratch / "val.zip").write_bytes(data[:start] + mutate(data[start:], changes))
    shutil.copy(forms["zip"] / "val_map.txt", scratch)
    expected = [ZipSource(forms["zip"], "val").read(index) for index in range(6)]
    for mode in ("no", "full"):
        samples = attempt(lambda mode=mode: ZipSource(scratch, "val", mode), ["val.zip"])
        assert samples is None or [data for *_, data in samples] == expected


@given(changes=CHANGES)
@FUZZ
def test_fuzzed_maps(forms, scratch, changes):
    text = mutate((forms["zip"] / "val_map.txt").read_bytes(), changes)
    shutil.copy(forms["zip"] / "val.zip", scratch)
    (scratch / "val_map.txt").write_bytes(text)
    samples = attempt(lambda: ZipSource(scratch, "val", num_classes=3), ["val_map.txt", "val.zip"])
    if samples is not None:
        lines = [line.split("\t") for line in io.StringIO(text.decode(), newline=None)]
        with zipfile.ZipFile(scratch / "val.zip") as archive:
            assert samples == [(f"{scratch}/val.zip@/{n}", int(label), archive.read(n)) for n, label, *_ in lines]


@given(changes=CHANGES)
@FUZZ
def test_fuzzed_lists(forms, changes):
    root, file = forms["list"], ".fuzzed.txt"
    text = mutate((root / LISTS["val"]).read_bytes(), changes)
    (root / file).write_bytes(text)
    samples = attempt(lambda: ListSource(root, "val", num_classes=3, file=file), [file, str(root)])
    if samples is not None:
        assert samples == [(f"{root}/{name}", label, (root / name).read_bytes()) for name, label in json.loads(text)]


@given(data=st.binary(max_size=300), form=st.sampled_from(["zip", "map", "list", "wnids", "annotations"]))
@FUZZ
def test_fuzzed_from_nothing(forms, scratch, data, form):
    for name in ("val.zip", "val_map.txt"):
        shutil.copy(forms["zip"] / name, scratch)
    for name in ("wnids.txt", "val/val_annotations.txt"):
        shutil.copy(forms["tiny"] / name, scratch / name)
    file = {
        "zip": "val.zip", "map": "val_map.txt", "list": LISTS["val"], "wnids": "wnids.txt",
        "annotations": "val/val_annotations.txt",
    }[form]  # fmt: skip
    (scratch / file).write_bytes(data)
    make = {"list": ListSource, "zip": ZipSource, "map": ZipSource}.get(form, TinyImageNetSource)
    assert attempt(lambda: make(scratch, "val"), [file, str(scratch)]) is None


# Packers


@pytest.fixture
def messy(photos, tmp_path) -> Path:
    """The photographs with a damaged, an empty and a copied file."""
    root = shutil.copytree(photos, tmp_path / "messy")
    data = (root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").read_bytes()
    (root / "train" / WNIDS[0] / "x_damaged.JPEG").write_bytes(data[:300])
    (root / "train" / WNIDS[1] / "x_empty.JPEG").write_bytes(b"")
    (root / "val" / WNIDS[2] / "x_copy.JPEG").write_bytes(data)
    return root


def samples_of(source: Source) -> list[tuple[int, bytes]]:
    return [(int(source.labels[index]), source.read(index)) for index in range(len(source))]


def test_scan_keeps_the_order_and_says_what_is_wrong(messy):
    paths = [str(path) for path in sorted(messy.rglob("*.*"))] + [str(messy / "lost.png")]
    inline, pooled = list(scan.scan(paths, 0)), list(scan.scan(iter(paths), 2))
    assert inline == pooled and [item.path for item in inline] == paths
    faults = {Path(item.path).name: item.error for item in inline if item.error}
    assert set(faults) == {"x_damaged.JPEG", "x_empty.JPEG", "lost.png"} and faults["x_empty.JPEG"] == "is empty"
    assert "does not decode" in faults["x_damaged.JPEG"] and "No such file" in faults["lost.png"]
    assert inline[0].size == (10, 12) and len(inline[0].digest) == 64 and inline[-1].digest == ""


def first_of_scan(paths: list[str], journal: Path) -> scan.Scanned:
    return next(scan.scan(paths, 0, journal))


def test_scan_goes_on_from_its_journal(photos, tmp_path, monkeypatch):
    paths, journal = [str(path) for path in sorted(photos.rglob("*.*"))], tmp_path / "journal"
    whole = list(scan.scan(paths, 0))
    first = scan.scan(paths, 0, journal)
    assert [next(first) for _ in range(8)] == whole[:8]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        with pytest.raises(OSError, match="journal: another run is at work here"):
            pool.submit(first_of_scan, paths, journal).result()
        first.close()
        assert pool.submit(first_of_scan, paths, journal).result() == whole[0]
    with open(journal, "ab") as file:
        file.write(b'[["half a li')
    seen, examine = [], scan.examine
    monkeypatch.setattr(scan, "examine", lambda path: (seen.append(path), examine(path))[1])
    assert list(scan.scan(paths, 0, journal)) == whole and seen == paths[8:]
    seen.clear()
    assert list(scan.scan(paths, 0, journal)) == whole and not seen
    os.utime(paths[5], ns=(0, 1))
    assert list(scan.scan(paths[:20], 0, journal)) == whole[:20] and seen == paths[5:20]
    seen.clear()
    assert list(scan.scan(paths[:3], 0, journal)) == whole[:3] and not seen
    assert len(journal.read_bytes().splitlines()) == 3


def kill(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_ends_the_scan(photos, monkeypatch):
    monkeypatch.setattr(scan, "examine", kill)
    with pytest.raises(OSError, match=r"a worker died while checking files from .*_0.JPEG on; .* fewer --workers"):
        list(scan.scan([str(path) for path in sorted(photos.rglob("*_0.JPEG"))], 1))


def test_workers_end_with_a_main_process_that_is_killed(photos, tmp_path, monkeypatch):
    """Else they would stay for good, and hold what they inherited."""

    def wait(path: str) -> None:
        (tmp_path / str(os.getpid())).touch()
        signal.pause()

    monkeypatch.setattr(scan, "examine", wait)
    monkeypatch.setattr(scan, "CHUNK", 1)
    paths = [str(path) for path in sorted(photos.rglob("*.*"))]
    main = multiprocessing.get_context("fork").Process(target=lambda: list(scan.scan(paths, 2, tmp_path / "journal")))
    main.start()

    def workers() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    def alive(worker: int) -> bool:
        state = Path(f"/proc/{worker}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    eventually(lambda: len(workers()) == 2)
    assert all(map(alive, workers()))
    main.kill()
    main.join()
    eventually(lambda: not any(map(alive, workers())))


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 seconds")


@pytest.mark.parametrize("classes", [["train", "val"], ["val"]])
def test_packed_zips_hold_what_the_folders_do(photos, tmp_path, caplog, classes):
    caplog.set_level(logging.INFO)
    make_zip.make_zip(photos, tmp_path, classes, workers=2)
    names = [f"{split}{end}" for split in classes for end in (".zip", "_map.txt")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for split in classes:
        assert samples_of(ZipSource(tmp_path, split)) == samples_of(FolderSource(photos / split))
        with zipfile.ZipFile(tmp_path / f"{split}.zip") as archive:
            assert archive.testzip() is None
            assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    digest = scan.hashlib.sha256((tmp_path / "val.zip").read_bytes()).hexdigest()
    assert f"val.zip: 6 images of 3 classes, 0.0 MB, sha256 {digest}" in caplog.text
    with pytest.raises(FileExistsError, match=r"val.zip exists; choose another folder, or replace it with --force"):
        make_zip.make_zip(photos, tmp_path, ["val"], workers=0)
    before = (tmp_path / "val.zip").read_bytes()
    make_zip.make_zip(photos, tmp_path, ["val"], workers=0, force=True)
    assert (tmp_path / "val.zip").read_bytes() == before  # nothing in it depends on the time


def test_packers_report_unreadable_and_equal_files(messy, tmp_path, caplog):
    pack = {
        "zip": lambda **more: make_zip.make_zip(messy, tmp_path / "zip", ["train", "val"], 0, **more),
        "list": lambda **more: make_22k_list.make_lists(messy, "train", val_folder="val", **more),
    }
    for form, results in (("zip", tmp_path / "zip"), ("list", messy)):
        caplog.clear()
        with pytest.raises(ValueError, match=r"2 of 24 files cannot be read, first .*x_damaged.*--skip-unreadable"):
            pack[form]()
        assert not [*results.glob("*.zip"), *results.glob("*.txt")]
        pack[form](skip_unreadable=True)
        assert f"{WNIDS[1]}/x_empty.JPEG: is empty" in caplog.text
        assert "1 file(s) repeat the bytes of another" in caplog.text and "x_copy.JPEG" in caplog.text
        make = ZipSource if form == "zip" else ListSource
        assert len(make(results, "train")) == 15 and len(make(results, "val")) == 7
        assert not list(results.glob(".*"))


def test_an_interrupted_packing_leaves_no_result_and_goes_on(photos, tmp_path, monkeypatch):
    """Interrupted while checking, while writing, and by a disk that gives back other bytes."""
    calls, examine = [], scan.examine

    def interrupted(path):
        calls.append(path)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return examine(path)

    monkeypatch.setattr(scan, "examine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_zip.make_zip(photos, tmp_path, ["train", "val"], workers=0)
    writestr = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_zip.make_zip(photos, tmp_path, ["train", "val"], workers=0)
    assert len(calls) == 10 + 12 and [path.name for path in tmp_path.iterdir()] == [".make_zip"]
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda self, info, data: writestr(self, info, data[:-1] + b"?"))
    with pytest.raises(OSError, match=r"train.zip@/.* differs from .*check the disk"):
        make_zip.make_zip(photos, tmp_path, ["train", "val"], workers=0)
    assert [path.name for path in (tmp_path / ".make_zip").iterdir()] == ["checked.jsonl"]
    monkeypatch.setattr(zipfile.ZipFile, "writestr", writestr)
    make_zip.make_zip(photos, tmp_path, ["train", "val"], workers=0)
    assert len(calls) == 22 and samples_of(ZipSource(tmp_path, "val")) == samples_of(FolderSource(photos / "val"))
    assert not (tmp_path / ".make_zip").exists()


def test_packing_refuses_what_it_cannot_write(photos, tmp_path, monkeypatch):
    root = shutil.copytree(photos, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="train/val: no such folder"):
        make_zip.make_zip(root / "train", tmp_path / "zip", ["val"], workers=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"zip: 0.00 GB are needed, but 0.00 GB are free"):
        make_zip.make_zip(root, tmp_path / "zip", ["train"], workers=0)
    monkeypatch.undo()
    odd = root / "train" / WNIDS[0] / "a\tb.png"
    odd.write_bytes(encoded(0, 0, "PNG"))
    with pytest.raises(ValueError, match=r"train: the name '.*a\\tb.png' cannot be written in a map; rename the file"):
        make_zip.make_zip(root, tmp_path / "zip", ["train"], workers=0)
    odd.unlink()
    for path in (root / "train" / WNIDS[0]).iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{WNIDS[0]}.*: no image .*can be read; replace or delete"):
        make_zip.make_zip(root, tmp_path / "zip", ["train"], workers=0, skip_unreadable=True)
    with pytest.raises(ValueError, match=rf"no image beside train/{WNIDS[0]}/.* can be read; replace or delete"):
        make_22k_list.make_lists(root, "train", val_per_class=1, skip_unreadable=True)


def test_lists_name_the_same_images_as_the_folders(photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = shutil.copytree(photos, tmp_path / "data")
    make_22k_list.make_lists(root, "train", val_folder="val", workers=2)
    for split, count in (("train", 15), ("val", 6)):
        assert samples_of(ListSource(root, split)) == samples_of(FolderSource(photos / split))
        digest = scan.hashlib.sha256((root / LISTS[split]).read_bytes()).hexdigest()
        assert f"{LISTS[split]}: {count} images of 3 classes, sha256 {digest}" in caplog.text
    with pytest.raises(FileExistsError, match=r"_map_train.txt exists; replace it with --force"):
        make_22k_list.make_lists(root, "train", val_folder="val")
    assert sorted(path.name for path in root.iterdir()) == sorted([*LISTS.values(), "train", "val"])


def test_lists_draw_validation_images_by_seed(photos, tmp_path, caplog):
    root = shutil.copytree(photos / "train", tmp_path / "data")
    drawn = []
    for seed in (0, 0, 1):
        make_22k_list.make_lists(root, val_per_class=2, seed=seed, force=True)
        sources = [ListSource(root, split) for split in ("train", "val")]
        assert [np.bincount(source.labels).tolist() for source in sources] == [[3, 3, 3], [2, 2, 2]]
        assert sources[0].classes == sources[1].classes == WNIDS
        assert len({*sources[0].paths, *sources[1].paths}) == 15
        drawn.append(list(sources[1].paths))
    assert drawn[0] == drawn[1] != drawn[2]
    make_22k_list.make_lists(root, val_per_class=9, force=True)
    assert len(ListSource(root, "train")) == 3 and "4 of 5 images for validation, not 9" in caplog.text


def test_lists_with_the_labels_of_released_models(photos, tmp_path):
    """Against data/map22kto1k.txt: the row of each ImageNet-1K class, here tench, collie and French horn or so."""
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "n15102894").mkdir()  # the last of the synsets, in the place of one without images
    (tmp_path / "train" / "n15102894" / "a.png").write_bytes(encoded(3, 0, "PNG"))
    make_22k_list.make_lists(tmp_path, "train", val_folder="val", official_labels=True)
    order = make_22k_list.ImageNetInfo("imagenet1k").label_names()
    rows = [int(line) for line in (ROOT / "data" / "map22kto1k.txt").read_text().split()]
    expected = {wnid: rows[order.index(wnid)] for wnid in WNIDS} | {"n15102894": 15027}
    source = ListSource(tmp_path, "train", num_classes=21841)
    assert {Path(path).parent.name: int(n) for path, n in zip(source.paths, source.labels, strict=True)} == expected
    (tmp_path / "train" / "n15102894").rename(tmp_path / "train" / "cats")
    with pytest.raises(ValueError, match=r"train: 1 class\(es\) that the training data does not have \(cats\)"):
        make_22k_list.make_lists(tmp_path, "train", val_folder="val", official_labels=True, force=True)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"val_folder": "../val"}, r"\.\./val: not inside"),
        ({"val_folder": "nowhere"}, "nowhere: no such folder"),
        ({"val_per_class": 0}, "--val-per-class=0; choose at least 1"),
        ({"val_folder": "empty"}, "empty: no image for validation"),
        ({"val_folder": "other"}, r"other: 1 class\(es\) that the training data does not have \(n0\)"),
    ],
)
def test_lists_name_folders_that_do_not_fit(photos, tmp_path, more, message):
    root = shutil.copytree(photos, tmp_path / "data")
    for folder in (f"empty/{WNIDS[0]}", "other/n0"):
        (root / folder).mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_22k_list.make_lists(root, "train", **more)
    assert not list(root.glob("*.txt"))


@pytest.mark.parametrize("script", ["make_zip", "make_22k_list"])
def test_packers_end_with_one_line_for_errors(tmp_path, monkeypatch, script):
    module = {"make_zip": make_zip, "make_22k_list": make_22k_list}[script]
    more = [str(tmp_path / "out")] if script == "make_zip" else ["--val-per-class", "1"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(tmp_path / "nowhere"), *more])
    with pytest.raises(SystemExit, match=rf"{script}.py: error: .*nowhere.*: no such folder"):
        module.main()
