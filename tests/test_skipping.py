"""``DATA.ON_ERROR skip``: whatever is damaged, ranks keep in step, and a sample is itself or listed as skipped."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import SMALL, make_config, write_images
from hypothesis import HealthCheck, given, settings
from test_sources import CENTRAL, CHANGES, damage, in_ranks, mutate

import distributed
import logger
from data import build, zipped
from data.build import build_loader
from data.device import DeviceLoader
from data.images import Skipped, collate
from data.lists import LISTS
from data.transforms import Normalised
from data.zipped import ZipSource
from tools import make_22k_list, make_shards, make_zip

CLASSES = ["n01", "n02", "n03"]
TRAIN, VAL, SHARD = 24, 6, 6  # images of the splits and of a shard
FORMS = ["folder", "zip", "zip-part", "zip-full", "list", "shards", "raw", "tiny_imagenet"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> Path:
    """Folders of the same images in every form: tiny_imagenet/, zip/, ..."""
    root = tmp_path_factory.mktemp("forms")
    folder = root / "folder"
    for split, count in (("train", TRAIN), ("val", VAL)):
        write_images(folder / split, CLASSES, count // 3, seed=count)
    make_zip.make_zip(folder, root / "zip", ["train", "val"], workers=0)
    make_shards.make_shards(folder, root / "shards", ["train", "val"], make_shards.Options(shard_size=SHARD))
    make_shards.make_shards(folder, root / "raw", ["train", "val"], make_shards.Options("raw", SHARD))
    make_22k_list.make_lists(shutil.copytree(folder, root / "list"), "train", val_folder="val", workers=0)
    tiny, lines = root / "tiny_imagenet", []
    for path in sorted(folder.rglob("*.png")):
        split, wnid = path.parts[-3:-1]
        name = f"{wnid}_{path.name}"
        target = tiny / split / (wnid if split == "train" else "") / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        lines += [f"{name}\t{wnid}\t0\t0\t9\t9\n"] if split == "val" else []
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))
    (tiny / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in CLASSES))
    return root


@pytest.fixture(autouse=True)
def no_draws(monkeypatch):
    """Pixels are those of the file, whatever the sample's number."""
    monkeypatch.setattr(build, "build_transform", lambda is_train, config: Normalised())


def options(form: str, root: Path, *more) -> list:
    source, _, mode = form.partition("-")
    where = ["DATA.DATA_PATH", str(root), "DATA.SOURCE", source, "DATA.CACHE_MODE", mode or "no"]
    return [*SMALL, *where, "DATA.PIPELINE", "official", "MODEL.NUM_CLASSES", 3, *more]


class Seen(NamedTuple):
    """What a loader gave: the batches' sizes, its images (bytes and label), and the reasons for what it skipped."""

    sizes: list[int]
    images: list[tuple[bytes, int]]
    skipped: list[str]


def watch(loader: DeviceLoader) -> Seen:
    batches = list(loader)
    images = [
        (image.numpy().tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]
    return Seen([len(images) for images, _ in batches], images, loader.take_skipped())


def load(form: str, root: Path, *more) -> tuple[Seen, Seen]:
    """An epoch of training and an evaluation."""
    _, _, train, val, _ = build_loader(make_config(None, *options(form, root, *more)))
    return watch(train), watch(val)


# Every kind of damage, on two ranks


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def change_line(number: int, change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """Change a line of a text, counted from 0."""

    def apply(text: bytes) -> bytes:
        lines = text.decode().splitlines()
        lines[number] = change(lines[number])
        return "".join(f"{line}\n" for line in lines).encode()

    return apply


def change_entry(number: int, change: Callable[[list], object]) -> Callable[[bytes], bytes]:
    def apply(text: bytes) -> bytes:
        entries = json.loads(text)
        entries[number] = change(entries[number])
        return json.dumps(entries).encode()

    return apply


def relabel_record(root: Path) -> None:
    path = root / "train/shard-000001.npy"
    records = np.load(path)
    records["label"][2] = 3
    np.save(path, records)


def empty_class(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def break_archive(data: bytes) -> bytes:
    """One member's CRC, and another one's place: it ends beyond the archive."""
    broken = bytearray(data)
    broken[200] ^= 255
    damage(broken, CENTRAL, 42, b"\xff\xff\xff\x0f")
    return bytes(broken)


def second_header(tar: bytes) -> bytes:
    """A tar file whose second sample's first header is overwritten; members are padded to 512 bytes."""
    size = int(tar[124:135], 8)
    third = 512 + -(-size // 512) * 512 + 1024
    return tar[:third] + b"x" * 512 + tar[third + 512 :]


class Case(NamedTuple):
    form: str
    damage: Callable[[Path], object]
    message: str  # what is raised, and listed where it is skipped
    skipped: int  # samples of the training data, and of the validation data where these are damaged
    evaluated: int = 0


def map_case(change: Callable[[str], str], message: str) -> Case:
    return Case("zip", lambda root: rewrite(root / "train_map.txt", change_line(6, change)), message, 1)


def list_case(change: Callable[[list], object], message: str) -> Case:
    return Case("list", lambda root: rewrite(root / LISTS["train"], change_entry(6, change)), message, 1)


SECOND = "train/shard-000001"
CASES = {
    "map without a tab": map_case(lambda line: "nothing", "train_map.txt, line 7: no tab in 'nothing'"),
    "map label": map_case(lambda line: line[:-1] + "3", "train_map.txt, line 7: the label 3 of .* is out of range"),
    "map path": map_case(lambda line: "../a.png\t0", r"train_map.txt, line 7: the path '\.\./a.png' leaves the data's"),
    "map member": map_case(lambda line: "lost.png\t0", "train_map.txt, line 7: .*train.zip has no member 'lost.png'"),
    "map conflict": map_case(lambda line: "n01/0.png\t2", "train_map.txt, line 7: 'n01/0.png' has label 2, but 0 in l"),
    **{
        f"{form} members": Case(
            form, lambda root: rewrite(root / "train.zip", break_archive), "train.zip@/n0.* damaged", 2
        )
        for form in ("zip", "zip-part", "zip-full")
    },
    "entry": list_case(lambda entry: entry[:1], r"train.txt, entry 7: .* is not \[path, label\]"),
    "entry label": list_case(lambda entry: [entry[0], -1], "train.txt, entry 7: the label -1 of .* is out of range"),
    "entry path": list_case(lambda entry: ["/etc/passwd", 0], "train.txt, entry 7: the path '/etc/passwd' leaves"),
    "absent": list_case(lambda entry: ["a.png", 0], "a.png: no such file, but .*train.txt, entry 7, names it"),
    "no shard": Case("shards", lambda root: (root / f"{SECOND}.tar").unlink(), "000001.tar: no such shard", SHARD),
    "cut shard": Case(
        "shards", lambda root: os.truncate(root / f"{SECOND}.tar", 3000), "000001.tar: 3000 bytes, but .* by .*", SHARD
    ),
    "broken shard": Case(  # the third member's header, which is that of the second sample
        "shards",
        lambda root: rewrite(root / f"{SECOND}.tar", second_header),
        "000001.tar: (damaged at or after member|expected 6 samples, found 1)",
        SHARD - 1,
    ),
    "no pixels": Case("raw", lambda root: (root / f"{SECOND}.raw").unlink(), "000001.raw: no such file", SHARD),
    "cut pixels": Case("raw", lambda root: os.truncate(root / f"{SECOND}.raw", 99), "000001.raw has 99 bytes", SHARD),
    "no records": Case("raw", lambda root: (root / f"{SECOND}.npy").write_bytes(b""), "not an array of rec", SHARD),
    "record": Case("raw", relabel_record, "shard-000001.*the label 3.* but there are 3 c", 1),
    "no class": Case("folder", lambda root: empty_class(root / "train/n02"), "valid file for the classes n02", 0),
    "no bytes": Case(
        "folder", lambda root: (root / "train/n02/1.png").write_bytes(b""), "n02/1.png: the file is em", 1
    ),
    "no tiny class": Case("tiny_imagenet", lambda root: shutil.rmtree(root / "train/n03"), "the class n03 has no f", 0),
    "annotation": Case(
        "tiny_imagenet",
        lambda root: rewrite(
            root / "val/val_annotations.txt", change_line(1, lambda line: line.replace("\tn0", "\tx0"))
        ),
        "val_annotations.txt, line 2: .*wnids.txt has no class 'x01'",
        0,
        1,
    ),
}


def on_two_ranks(names: list[str], roots: Path, store: Path) -> dict[str, list[tuple[Seen, Seen]]]:
    def work(rank: int) -> list[tuple[Seen, Seen]]:
        os.environ["LOCAL_RANK"] = str(rank)
        return [load(CASES[name].form, roots / name, "DATA.ON_ERROR", "skip") for name in names]

    answers = in_ranks(2, work, store)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return {name: list(ranks) for name, *ranks in zip(names, *answers, strict=True)}


def test_each_kind_of_damage_is_an_error_or_skipped_in_step(forms, tmp_path):
    for name, case in CASES.items():
        root = shutil.copytree(forms / case.form.split("-")[0], tmp_path / name)
        case.damage(root)
        with pytest.raises((ValueError, OSError), match=case.message) as caught:
            load(case.form, root)
        assert "\n" not in str(caught.value), name
    whole = [Counter(seen.images) for seen in load("folder", forms / "folder")]
    for name, ranks in on_two_ranks(list(CASES), tmp_path, tmp_path / "store").items():
        case, train, val = CASES[name], *zip(*ranks, strict=True)
        assert train[0].sizes == train[1].sizes and set(train[0].sizes) == {4}, name
        reasons = [reason for seen in train for reason in seen.skipped]
        assert len(set(reasons)) == len(reasons) == case.skipped, (name, reasons)
        found = Counter(train[0].images + train[1].images)
        assert found.keys() <= whole[0].keys(), name
        if "class" in name:  # its samples are gone, and not known
            assert sum(train[0].sizes) == TRAIN // 3, name
        else:
            assert sum(train[0].sizes) == TRAIN // 2 and (whole[0] - found).total() == case.skipped, name
        evaluated = Counter(val[0].images + val[1].images)
        lost = [reason for seen in val for reason in seen.skipped]
        assert (whole[1] - evaluated).total() == VAL - evaluated.total() == len(lost) == case.evaluated, name
        assert all(re.search(case.message, reason) for reason in reasons + lost), (name, reasons, lost)


def test_the_same_is_skipped_by_workers(forms, tmp_path):
    for name in ("map member", "no shard", "cut pixels", "zip-full members"):
        case = CASES[name]
        root = shutil.copytree(forms / case.form.split("-")[0], tmp_path / name)
        case.damage(root)
        seen = [load(case.form, root, "DATA.ON_ERROR", "skip", "DATA.NUM_WORKERS", n)[0] for n in (0, 1, 2)]
        assert seen[0] == seen[1] == seen[2] and len(seen[0].skipped) == case.skipped, name


@pytest.mark.parametrize(
    "form, damage, message",
    [
        ("zip", lambda root: (root / "train.zip").unlink(), "train.zip: no such file"),
        ("zip", lambda root: os.truncate(root / "train.zip", 900), "train.zip: truncated or not a zip archive"),
        (
            "zip",
            lambda root: (root / "train_map.txt").write_text("a\nb\n"),
            "none of 2 samples can be used; the first: ",
        ),
        ("list", lambda root: os.truncate(root / LISTS["train"], 99), "train.txt, entry [0-9]: malformed JSON"),
        ("shards", lambda root: (root / "train/index.json").unlink(), "shard-000000.tar: damaged at or after member"),
        ("shards", lambda root: (root / "train/index.json").write_text("{"), "index.json: not a JSON file"),
        ("shards", lambda root: [p.unlink() for p in root.glob("train/*.tar")], "none of 4 shards can be used; the fi"),
        ("raw", lambda root: [p.unlink() for p in root.glob("train/*.raw")], "none of 4 shards can be used; the first"),
        ("raw", lambda root: relabel_records(root), "none of 24 images has a label that can be used; "),
        ("folder", lambda root: [p.unlink() for p in root.glob("train/*/*")], "train: no images in it"),
        ("tiny_imagenet", lambda root: (root / "train/x").mkdir(), "the class x is a folder here, but .*wnids.txt lac"),
        ("tiny_imagenet", lambda root: [shutil.rmtree(p) for p in root.glob("train/*")], "n01/images: no images in it"),
    ],
)
def test_without_a_count_or_anything_usable_it_stays_an_error(forms, tmp_path, form, damage, message):
    root = shutil.copytree(forms / form, tmp_path / form)
    if form == "shards":
        os.truncate(root / "train/shard-000000.tar", 3000)
    damage(root)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(form, root, "DATA.ON_ERROR", "skip")
    assert "\n" not in str(caught.value)


def relabel_records(root: Path) -> None:
    for path in root.glob("train/*.npy"):
        records = np.load(path)
        records["label"] = 7
        np.save(path, records)


def test_files_that_go_while_training_are_skipped(forms, tmp_path):
    for form, files in (("raw", "*.raw"), ("shards", "*.tar")):
        root = shutil.copytree(forms / form, tmp_path / form)
        _, _, train, _, _ = build_loader(make_config(None, *options(form, root, "DATA.ON_ERROR", "skip")))
        assert not watch(train).skipped
        train.loader.dataset.source.maps.clear() if form == "raw" else None
        paths = sorted(root.glob(f"train/{files}"))
        paths[0].unlink(), os.truncate(paths[1], 0 if form == "raw" else 600)
        seen = watch(train)
        assert seen.sizes == [4] * 6 and len(seen.skipped) == 2 * SHARD
        assert all(str(paths[0]) in reason or str(paths[1]) in reason for reason in seen.skipped)


def test_labels_of_validation_that_training_does_not_have(forms, tmp_path):
    """No folder names a class, and the number of classes comes from the training data."""
    root = tmp_path / "list"
    shutil.copytree(forms / "folder/train/n01", root / "flat")
    for split, labels in (("train", [0, 1, 2, 2]), ("val", [2, 7, -1])):
        (root / LISTS[split]).write_text(json.dumps([[f"flat/{i}.png", label] for i, label in enumerate(labels)]))
    config = make_config(None, *options("list", root)[:-2], "DATA.ON_ERROR", "skip")
    _, _, _, val, _ = build_loader(config)
    assert config.MODEL.NUM_CLASSES == 3
    seen = watch(val)
    assert [label for _, label in seen.images] == [2] and len(seen.skipped) == 2
    assert "val.txt, entry 2: the label 7 of 'flat/1.png' is out of range; labels go from 0 to 2" in seen.skipped[0]


def test_one_label_far_above_the_others_is_named(forms, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("data"), "propagate", True)
    root = tmp_path / "list"
    shutil.copytree(forms / "folder/train/n01", root / "flat")
    for split, labels in (("train", [0, 1, 2, 999999]), ("val", [2, 0])):
        (root / LISTS[split]).write_text(json.dumps([[f"flat/{i}.png", label] for i, label in enumerate(labels)]))
    opts = options("list", root)[:-2]
    message = "flat/3.png: its label 999999 makes 1000000 classes, of which 4 have samples; correct it, or give MODEL."
    with pytest.raises(ValueError, match=message):
        build_loader(make_config(None, *opts))
    build_loader(make_config(None, *opts, "DATA.ON_ERROR", "skip"))
    told = caplog.text.count(message)  # twice where a test before has made a log
    assert told
    build_loader(make_config(None, *opts, "MODEL.NUM_CLASSES", 1000000))
    assert caplog.text.count(message) == told


def test_a_choice_of_classes_still_lists_what_has_none(forms, tmp_path):
    root = shutil.copytree(forms / "list", tmp_path / "list")
    rewrite(root / LISTS["train"], change_entry(20, lambda entry: entry[0]))
    (tmp_path / "classes.txt").write_text("n03\nn01\n")
    more = ["DATA.CLASSES", str(tmp_path / "classes.txt"), "MODEL.NUM_CLASSES", 2, "DATA.ON_ERROR", "skip"]
    seen, _ = load("list", root, *more)
    assert seen.sizes == [4] * 4 and {label for _, label in seen.images} == {0, 1}
    assert len(seen.skipped) == 1 and "train.txt, entry 21: 'train/n03/4.png' is not [path, label]" in seen.skipped[0]


# Caches


def test_processes_of_a_machine_agree_on_what_a_cache_lacks(forms, tmp_path, monkeypatch):
    """Ranks that did not fill it turn to the archive for the damaged members, and for those alone."""
    data = bytearray((forms / "zip/train.zip").read_bytes())
    shutil.copy(forms / "zip/train_map.txt", tmp_path)
    for place in (100, len(data) // 2):
        data[place] ^= 255
    (tmp_path / "train.zip").write_bytes(data)
    expected = [ZipSource(forms / "zip", "train").read(index) for index in range(TRAIN)]

    def work(rank: int) -> list:
        calls = {"barrier": distributed.barrier, "broadcast": distributed.broadcast_object}
        source = ZipSource(tmp_path, "train", "full", local_rank=rank, skip=True, **calls)
        read, asked, answers = source.archive.read, [], []
        source.archive.read = lambda number: asked.append(number) or read(number)
        for index in range(TRAIN):
            try:
                answers.append(source.read(index))
            except ValueError as err:
                answers.append(str(err))
        return [asked, answers]

    results = in_ranks(3, work, tmp_path / "store")
    assert results[0] == results[1] == results[2]
    asked, answers = results[0]
    assert len(asked) == 2 and all("damaged: " in answers[index] for index in asked)
    assert [index for index in range(TRAIN) if answers[index] != expected[index]] == asked


def test_a_cache_reads_around_a_part_of_the_disk_that_fails(forms, monkeypatch):
    start = ZipSource(forms / "zip", "train").archive.starts[5]
    bad = start + 100  # the neighbours are read a little further than they go
    pread = zipped.File.pread

    def failing(self, size, offset):
        if not isinstance(self, zipped.SharedFile) and offset <= bad < offset + size:
            raise OSError(5, "Input/output error", str(self.path))
        return pread(self, size, offset)

    expected = [ZipSource(forms / "zip", "train").read(index) for index in range(TRAIN)]
    monkeypatch.setattr(zipped.File, "pread", failing)
    with pytest.raises(OSError, match=r"Input/output error.*train.zip"):
        ZipSource(forms / "zip", "train", "full")
    source = ZipSource(forms / "zip", "train", "full", skip=True)
    for index in range(TRAIN):
        if source.archive.starts[index] != start:
            assert source.read(index) == expected[index]
    with pytest.raises(OSError, match="Input/output error"):
        source.read(int(np.flatnonzero(source.archive.starts == start)[0]))


# Batches of which nothing is left


class Batches(torch.utils.data.Dataset):
    """Samples that say their number; ``bad`` ones are skipped."""

    def __init__(self, bad: set[int]):
        self.bad = bad

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int):
        return Skipped(f"file {number}") if number in self.bad else (torch.full((3, 2, 2), float(number)), number)


def device_loader(bad: set[int], workers: int = 0, fill: bool = True, start: int = 0) -> DeviceLoader:
    loader = torch.utils.data.DataLoader(
        *(Batches(bad), 3),
        sampler=range(start, 12),
        num_workers=workers,
        collate_fn=lambda samples: collate(samples, fill),
    )
    return DeviceLoader(loader, "cpu", fill=fill)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "bad, expected",
    [
        (range(3), [3, 3, 6, 9]),
        (range(6), [6, 6, 6, 9]),
        (range(3, 9), [0, 9, 9, 9]),
        (range(9, 12), [0, 3, 6, 6]),
        ([*range(3), *range(9, 12)], [3, 3, 6, 6]),
    ],
)
def test_a_batch_without_an_image_is_another_one_again(bad, expected, workers):
    loader = device_loader(set(bad), workers)
    for _ in range(2):
        first = []
        for images, labels in loader:
            assert len(labels) == 3 and torch.equal(images[:, 0, 0, 0], labels.float())
            first.append(int(labels[0]))
            images.zero_(), labels.zero_()  # as mixup does, more or less
        assert first == expected and loader.take_skipped() == [f"file {number}" for number in bad]
    assert [int(labels[0]) for _, labels in device_loader(set(bad), workers, fill=False)] == sorted(set(expected))


@pytest.mark.parametrize("bad", [range(3, 9), range(3, 6), range(9, 12)])
def test_a_resumed_run_fills_as_the_uninterrupted_one(bad):
    whole = [labels.tolist() for _, labels in device_loader(set(bad))]
    for batch in range(4):
        resumed = device_loader(set(bad), start=3 * batch)
        if min(bad) == 9 and batch == 3:  # there is none before it in this run
            with pytest.raises(ValueError, match=r"no usable image in the 1 batch\(es\) left of this epoch; .*file 9"):
                list(resumed)
        else:
            assert [labels.tolist() for _, labels in resumed] == whole[batch:]


def test_a_run_of_damaged_files_can_be_resumed_anywhere(forms, tmp_path):
    root = shutil.copytree(forms / "folder", tmp_path / "folder")
    _, _, train, _, _ = build_loader(make_config(None, *options("folder", root, "DATA.ON_ERROR", "skip")))
    for _, number in list(train.sampler)[8:16]:
        Path(train.dataset.source.name(number)).write_bytes(b"")
    whole = watch(train)
    assert whole.sizes == [4] * 6 and whole.images[8:12] == whole.images[12:16] == whole.images[16:20]
    for start in range(4, TRAIN, 4):
        train.sampler.set_epoch(0, start)
        assert watch(train).images == whole.images[start:]


def test_repeats_are_told_once_for_each_run_of_them(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("data"), "propagate", True)  # whatever log a test before has made
    list(device_loader({*range(6), *range(9, 12)}))
    # A log that a test before has made may give each record twice.
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        "another batch takes the place of 2 without a usable image; the first: file 0",
        "another batch takes the place of 1 without a usable image; the first: file 9",
    ]


def test_an_epoch_without_any_image_is_an_error_that_names_one_of_it():
    loader = device_loader({4})
    list(loader)
    loader.dataset.bad = set(range(12))
    with pytest.raises(ValueError, match=r"no usable image in the 4 batch\(es\) left of this epoch; the first: file 0"):
        list(loader)
    assert list(device_loader(set(range(12)), fill=False)) == []


# Names and machines


def test_files_whose_names_are_not_utf8_are_listed(forms, tmp_path, monkeypatch):
    root = shutil.copytree(forms / "folder", tmp_path / "folder")
    (root / "val/n02" / os.fsdecode(b"\xff\n.png")).write_bytes(b"")
    _, seen = load("folder", root, "DATA.ON_ERROR", "skip")
    assert len(seen.skipped) == 1 and r"n02/\udcff .png: the file is empty" in seen.skipped[0]
    monkeypatch.setattr(logger, "MODULES", ())
    run = logger.create_logger(str(tmp_path), name="names")
    run.info(os.fsdecode(b"a\xff"))
    run.handlers[-1].close()
    assert r"a\udcff" in (tmp_path / "log_rank0.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("split, kind", [("train", "training"), ("val", "evaluation")])
def test_a_machine_with_other_files_is_named(forms, tmp_path, split, kind):
    for rank in range(2):
        shutil.copytree(forms / "folder", tmp_path / str(rank))
    (tmp_path / "1" / split / "n02/0.png").unlink()

    def work(rank: int) -> None:
        load("folder", tmp_path / str(rank))

    all_of_them = {"train": TRAIN, "val": VAL}[split]
    for rank, caught in enumerate(in_ranks(2, work, tmp_path / "store")):
        own, other = all_of_them - rank, all_of_them - 1 + rank
        assert isinstance(caught, ValueError) and str(caught) == (
            f"{tmp_path}/{rank}: {own} {kind} images here, but {other} for process {1 - rank}; copy the data again"
        )


# Fuzzing: an error at the start that names a file, or both ranks run to the end in step, and each sample is itself.


@pytest.fixture(scope="module")
def scratch(forms) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(forms, folder, dirs_exist_ok=True)
        yield Path(folder)


def headers_alone(tar: bytes, changes: list) -> bytes:
    """Nothing tells whether a tar member's bytes are those that were packed: change headers and padding, or cut."""
    result, at = bytearray(tar), 0
    while tar[at]:  # the end is zeros
        size = int(tar[at + 124 : at + 135], 8)
        for _, place, piece, length in changes:
            if (length + at // 512) % 7 == 0 and piece:
                start = at + int(place * (512 - len(piece)))
                result[start : start + len(piece)] = piece
        at += 512 + -(-size // 512) * 512
    return bytes(result[: int(changes[0][1] * len(tar))] if changes[0][0] == "cut" else result)


# A form, the file that is changed, and how
TARGETS = [
    ("zip", "train.zip", mutate),
    ("zip-full", "train.zip", mutate),
    ("zip-part", "train.zip", mutate),
    ("zip", "train_map.txt", mutate),
    ("list", LISTS["train"], mutate),
    ("shards", "train/shard-000001.tar", headers_alone),
    ("shards", "train/index.json", mutate),
    ("raw", "train/shard-000001.npy", mutate),
    ("raw", "train/index.json", mutate),
    ("tiny_imagenet", "val/val_annotations.txt", mutate),
]
LABELS_CHANGE = ("_map.txt", LISTS["train"], ".npy", "annotations.txt")


@given(target=st.sampled_from(TARGETS), changes=CHANGES, with_size=st.booleans())
@settings(
    max_examples=int(os.environ.get("FUZZ", 150)), deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
def test_fuzzed_files_leave_ranks_in_step(forms, scratch, target, changes, with_size):
    form, name, change = target
    folder = form.split("-")[0]
    root, original = scratch / folder, forms / folder / name
    (root / name).write_bytes(change(original.read_bytes(), changes))
    index = root / "train/index.json"
    if form == "shards" and "index" not in name and not with_size:  # what is damaged has another size, mostly
        content = json.loads(index.read_text())
        for entry in content["shards"]:
            entry["bytes"] = None
        index.write_text(json.dumps(content))
    try:
        found = [outcome(form, root, rank) for rank in (0, 1)]
    finally:
        for path in {root / name, *([index] if form == "shards" else [])}:
            shutil.copy(forms / folder / path.relative_to(root), path)
    errors = [each for each in found if isinstance(each, str)]
    for error in errors:
        assert "\n" not in error and len(error) < 2000
        assert str(root) in error or "do not fill one batch" in error
    if errors:  # one alone is of a rank whose part has nothing that can be used
        assert len(errors) == 2 or "no usable image in" in errors[0]
        return
    exact, whole = images_of(forms, folder)
    (one, one_val), (other, other_val) = found
    assert one.sizes == other.sizes and set(one.sizes) == {4}
    for seen in (one, other, one_val, other_val):
        assert {pixels for pixels, _ in seen.images} <= whole
        assert name.endswith(LABELS_CHANGE) or set(seen.images) <= exact
        assert all(str(root) in reason and "\n" not in reason for reason in seen.skipped)
    if name.endswith((".zip", ".tar", ".npy")):  # the number of samples is known from another file
        distinct = set(one.images + other.images)
        assert sum(one.sizes) == TRAIN // 2 and len(distinct) + len(one.skipped + other.skipped) >= TRAIN


@cache
def images_of(forms: Path, form: str) -> tuple[set, set]:
    """The images of both splits: with labels, and without."""
    images = {image for seen in load(form, forms / form) for image in seen.images}
    return images, {pixels for pixels, _ in images}


def outcome(form: str, root: Path, rank: int) -> tuple[Seen, Seen] | str:
    """What a rank of two sees, or the error that its loader raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: rank)
        patch.setattr(distributed, "world_size", lambda: 2)
        try:
            return load(form, root, "DATA.ON_ERROR", "skip")
        except (ValueError, OSError) as err:
            return str(err)
