"""The same images in every form of storage, through `build_loader`, on one rank and on many."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, make_config, write_images
from PIL import Image

import distributed
from data import build_loader
from data.build import resolve_pipeline
from tools import make_22k_list, make_shards, make_zip

FORMS = ["folder", "zip", "zip-part", "zip-full", "list", "shards", "raw"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """30 training and 13 validation images of 3 classes in every form, and the options that read them."""
    root = tmp_path_factory.mktemp("forms")
    folder = root / "folder"
    for split, counts in (("train", (10, 10, 10)), ("val", (5, 4, 4))):
        for name, count in zip(["n01", "n02", "n03"], counts, strict=True):
            write_images(folder / split, [name], count, seed=hash_of(split, name))
    make_zip.make_zip(folder, root / "zip", ["train", "val"], workers=0)
    make_shards.make_shards(folder, root / "shards", ["train", "val"], make_shards.Options(shard_size=4))
    make_shards.make_shards(folder, root / "raw", ["train", "val"], make_shards.Options(format="raw", shard_size=4))
    make_22k_list.make_lists(folder, "train", val_folder="val", workers=0)
    paths = {form: root / form.split("-")[0] for form in FORMS} | {"list": folder}
    options = {form: ["DATA.SOURCE", form] for form in ("folder", "list", "shards", "raw")}
    options |= {"zip": ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "no"]}
    options |= {f"zip-{mode}": ["DATA.SOURCE", "zip", "DATA.CACHE_MODE", mode] for mode in ("part", "full")}
    return {form: ["DATA.DATA_PATH", str(paths[form]), *options[form]] for form in FORMS}


def hash_of(*words: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate("".join(words)))


def loaders(options: list, *more):
    _, _, train, val, _ = build_loader(make_config(None, *SMALL, *options, *more))
    return train, val


def seen(loader) -> Counter:
    """How often each image was given with each label."""
    return Counter(
        (image.numpy().tobytes(), int(label))
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("pipeline", ["device", "official"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_validation_images(forms, form, pipeline):
    expected = seen(loaders(forms["folder"], "DATA.PIPELINE", "official")[1])
    assert sum(expected.values()) == 13 and len(expected) == 13
    assert seen(loaders(forms[form], "DATA.PIPELINE", pipeline, "DATA.DECODER", "pil")[1]) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_form_gives_each_image_once_on_any_number_of_ranks(forms, form, world_size, workers, monkeypatch):
    """Images of a plain crop without draws, so that they can be recognised."""
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    plain = ["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0, "AUG.REPROB", 0.0, "AUG.HFLIP", 0.0]
    options = [*forms[form], *plain, "DATA.PIPELINE", "device", "DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 2]
    lengths, labels, validated = set(), Counter(), Counter()
    numbers: list[int] = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        train, val = loaders(options)
        train.sampler.set_epoch(1)
        lengths.add(len(train))
        items = list(train.sampler)
        numbers += [item[1] for item in items]
        train.sampler.set_epoch(1)
        for images, targets in train:
            assert len(images) == 2
            labels.update(targets.tolist())
        validated += seen(val)
    assert lengths == {30 // world_size // 2}
    assert len(set(numbers)) == len(numbers) == 30 // world_size * world_size
    assert sum(labels.values()) == 30 // world_size // 2 * 2 * world_size
    assert set(validated.values()) == {1} and len(validated) == 13


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_training_batches_do_not_depend_on_workers_or_on_where_an_epoch_began(forms, form):
    batches = {}
    for workers in (0, 3):
        train, _ = loaders(forms[form], "DATA.PIPELINE", "device", "DATA.NUM_WORKERS", workers, "AUG.REPROB", 1.0)
        train.sampler.set_epoch(2)
        batches[workers] = [images.clone() for images, _ in train]
        train.sampler.set_epoch(2, start=12)
        rest = [images.clone() for images, _ in train]
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[workers][3:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[3], strict=True))


def test_a_list_of_classes_chooses_and_numbers_them(forms, tmp_path):
    (tmp_path / "classes.txt").write_text("n03\nn01  # in this order\n")
    options = [*forms["folder"], "DATA.CLASSES", str(tmp_path / "classes.txt")]
    config = make_config(None, *SMALL, *options)
    dataset_train, dataset_val, *_ = build_loader(config)
    assert (config.MODEL.NUM_CLASSES, len(dataset_train), len(dataset_val)) == (2, 20, 9)
    assert dataset_train.classes == ["n03", "n01"] and "n03" in dataset_train.source.name(
        list(dataset_train.source.labels).index(0)
    )


def test_class_counts_come_from_every_form(forms):
    for form in FORMS:
        config = make_config(None, *SMALL, *forms[form])
        build_loader(config)
        assert config.MODEL.NUM_CLASSES == 3, form
        config = make_config(None, *SMALL, *forms[form], eval=True)
        assert build_loader(config)[0] is None and config.MODEL.NUM_CLASSES == 3, form
        with pytest.raises(ValueError, match=r"NUM_CLASSES|label|classes"):
            build_loader(make_config(None, *SMALL, *forms[form], "MODEL.NUM_CLASSES", 2))


@pytest.mark.parametrize("form", FORMS)
def test_missing_data_names_what_is_missing(form, tmp_path):
    source = {"folder": "folder", "list": "list"}.get(form, form.split("-")[0])
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        build_loader(make_config(None, *SMALL, "DATA.DATA_PATH", str(tmp_path), "DATA.SOURCE", source))


DIES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import SMALL, make_config
from data import build_loader
loader = build_loader(make_config(None, *SMALL, *{options!r}, "DATA.NUM_WORKERS", 2, "DATA.PIPELINE", "official"))[2]
batches = iter(loader)
next(batches)
pids = [worker.pid for worker in loader.loader._iterator._workers]
assert pids
for queue in loader.loader._iterator._index_queues:  # as if it died while it sent an item: a part of one
    queue._writer._send((10**6).to_bytes(4, "big") + b"x")
os._exit(7)
"""


def test_workers_end_with_a_process_that_dies_in_the_middle_of_an_item(forms):
    """They hold its output open: the command would not return."""
    code = DIES.format(root=str(ROOT), tests=str(ROOT / "tests"), options=forms["shards"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 7, result.stderr


def test_classes_are_chosen_the_same_in_every_form(forms, tmp_path):
    (tmp_path / "classes.txt").write_text("n03\nn01\n")
    for form in FORMS:
        options = [*forms[form], "DATA.CLASSES", str(tmp_path / "classes.txt"), "MODEL.NUM_CLASSES", 2]
        if form == "shards":
            with pytest.raises(ValueError, match="a stream of shards cannot leave samples out"):
                loaders(options)
            continue
        for flags in ({}, {"eval": True}):
            train, val, *_ = build_loader(make_config(None, *SMALL, *options, **flags))
            assert (train is None or len(train) == 20) and len(val) == 9 and val.classes == ["n03", "n01"], form
    (tmp_path / "classes.txt").write_text("n03\nn0x\n")
    with pytest.raises(ValueError, match=r"classes.txt: the data lacks 1 of the 2 classes \('n0x'\)"):
        loaders([*forms["zip"], "DATA.CLASSES", str(tmp_path / "classes.txt")])


def test_commands_give_shards(forms):
    root = Path(forms["shards"][1])
    options = ["DATA.SOURCE", "shards", "DATA.DATA_PATH", ""]
    for split in ("train", "val"):
        last = len(list((root / split).glob("*.tar"))) - 1
        shards = f"pipe:cat {root}/{split}/shard-{{000000..{last:06d}}}.tar"
        options += [f"DATA.{split.upper()}_SHARDS", shards, f"DATA.{split.upper()}_INDEX", f"{root}/{split}/index.json"]
    assert seen(loaders(options)[1]) == seen(loaders(forms["shards"])[1])


def test_labels_without_names_are_counted_in_training_data(tmp_path):
    """The validation list lacks the last class; a label that training lacks is an error."""
    write_images(tmp_path, ["flat"], 12)
    lists = {
        "train": [[f"flat/{i}.png", i % 3] for i in range(12)],
        "val": [[f"flat/{i}.png", i % 2] for i in range(4)],
    }
    for split, entries in lists.items():
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps(entries))
    options = ["DATA.DATA_PATH", str(tmp_path), "DATA.SOURCE", "list"]
    for flags in ({}, {"eval": True}):
        config = make_config(None, *SMALL, *options, **flags)
        build_loader(config)
        assert config.MODEL.NUM_CLASSES == 3
    (tmp_path / "ILSVRC2011fall_whole_map_val.txt").write_text(json.dumps([["flat/0.png", 7]]))
    with pytest.raises(ValueError, match=r"has 8 classes, but the head has MODEL.NUM_CLASSES=3"):
        build_loader(make_config(None, *SMALL, *options))


def test_auto_leaves_what_the_device_cannot_do_to_the_official_pipeline(monkeypatch):
    assert resolve_pipeline(make_config(None, "DATA.PIPELINE", "device")) == "device"
    for device, policy, expected in (
        ("cpu", "rand-m9-mstd0.5-inc1", "official"),
        ("cuda", "rand-m9-mstd0.5-inc1", "device"),
        ("cuda", "original", "official"),
        ("mps", "rand-m9-mstd0.5-inc1", "official"),
    ):
        monkeypatch.setattr(distributed, "pick_device", lambda device=device: torch.device(device))
        assert resolve_pipeline(make_config(None, "AUG.AUTO_AUGMENT", policy)) == expected


def test_errors_of_transforms_name_the_image_and_can_be_skipped(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        write_images(tmp_path / split, ["a"], count)
    Image.new("RGB", (5, 5)).save(tmp_path / "train" / "a" / "0.png")
    for pipeline in ("device", "official"):
        options = ["DATA.DATA_PATH", str(tmp_path), "DATA.PIPELINE", pipeline]
        with pytest.raises(ValueError, match=r"train/a/0\.png: "):
            list(loaders(options)[0])
        assert [len(images) for images, _ in loaders(options, "DATA.ON_ERROR", "skip")[0]] == [4, 4]


def test_evaluation_reads_no_more_of_training_data_than_its_classes(forms, tmp_path):
    """Class folders may be empty, archives absent: names and labels alone are asked for."""
    for form in ("folder", "zip"):
        shutil.copytree(forms[form][1], tmp_path / form)
        for image in (tmp_path / form / "train").rglob("*.png"):
            image.unlink()
        (tmp_path / form / "train.zip").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / form / "val" / "n02", ignore_errors=True)
        config = make_config(None, *SMALL, *forms[form], "DATA.DATA_PATH", str(tmp_path / form), eval=True)
        _, val, *_ = build_loader(config)
        assert config.MODEL.NUM_CLASSES == 3 and val.classes == ["n01", "n02", "n03"] and max(val.source.labels) == 2
