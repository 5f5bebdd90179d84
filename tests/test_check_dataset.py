"""The check of data sets: planted faults are found and named, the same data in any form gives the same numbers."""

import json
import logging
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo

from data.classes import SelectedClasses, read_class_list
from data.sources import FolderSource, Source
from data.zipped import ZipSource
from tools import check_dataset as tool
from tools.check_dataset import check_dataset
from tools.make_22k_list import make_lists
from tools.make_shards import Options, make_shards
from tools.make_zip import make_zip

SYNSETS = ImageNetInfo("imagenet1k").label_names()
FISH = SYNSETS[:3]  # tench, goldfish, great white shark


@pytest.fixture
def fish(tmp_path: Path) -> Path:
    """train/ and val/ of 3 synsets: 15 and 6 images, one of train twice; 16 pixels wide, and 24 in val."""
    root = tmp_path / "fish"
    write_images(root / "train", FISH, 5)
    write_images(root / "val", FISH, 2, size=24, seed=1)
    (root / "train" / FISH[1] / "3.png").unlink()
    shutil.copy(root / "train" / FISH[0] / "0.png", root / "train" / FISH[2] / "again.png")
    return root


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, shape).astype(np.uint8), mode)


def checked(data: Path, output: Path, **options) -> tuple[list[str], dict]:
    """The faults and the summary of a check without other processes, unless ``options`` say otherwise."""
    faults = check_dataset(data, output=output, **options)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["faults"] == faults
    return faults, summary


def test_numbers_of_sound_data(fish, tmp_path):
    faults, summary = checked(fish, tmp_path / "report", workers=2)
    train, val = summary["splits"]["train"], summary["splits"]["val"]
    assert faults == [] and summary["repeated_between_splits"] == 0
    assert (train["images"], val["images"], train["classes"], val["classes"]) == (15, 6, 3, 3)
    assert train["images_of_class"] == {FISH[0]: 5, FISH[1]: 4, FISH[2]: 6}
    assert train["images_per_class"] == {
        "smallest": 4, "median": 5.0, "largest": 6, "smallest_class": FISH[1], "largest_class": FISH[2],
    }  # fmt: skip
    assert train["width"] == train["height"] == {"smallest": 16, "median": 16.0, "largest": 16}
    assert val["width"] == {"smallest": 24, "median": 24.0, "largest": 24} and val["modes"] == {"RGB": 6}
    assert (train["repeated"], val["repeated"], train["unreadable"], train["labels_out_of_range"]) == (1, 0, 0, 0)
    first, again = fish / "train" / FISH[0] / "0.png", fish / "train" / FISH[2] / "again.png"
    assert summary["named"] == {
        "the same image twice in train": [f"{first} = {again} (classes {FISH[0]} and {FISH[2]})"]
    }
    assert summary["notes"] == [
        "1 image(s) of train repeat another one of it",
        "synsets: ImageNet-1k, 3 of its 1000 classes, in its order, numbered anew",
    ]


def test_every_planted_fault_is_named(fish, tmp_path, caplog):
    train, val = fish / "train", fish / "val"
    broken, empty = train / FISH[0] / "broken.jpg", val / FISH[0] / "empty.png"
    noise(40, 30).save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    empty.touch()
    noise(50, 10, "L").save(train / FISH[0] / "grey.jpg")
    noise(20, 60, "CMYK").save(train / FISH[0] / "cmyk.jpg")
    noise(20, 20, "RGBA").save(train / FISH[0] / "rgba.png")
    write_images(train, ["n0148485"], 1, seed=2)
    (train / SYNSETS[5]).mkdir()
    write_images(val, ["n00007846"], 1, seed=3)  # a synset, but none of ImageNet-1k
    shutil.copy(train / FISH[1] / "0.png", val / FISH[1] / "leak.png")
    with caplog.at_level(logging.INFO):
        faults, summary = checked(fish, tmp_path / "report")
    assert faults == [
        "1 unreadable image(s) in train",
        "1 of 5 classes without images in train",
        "1 unreadable image(s) in val",
        "1 label(s) in val not from 0 to 4",
        "1 class(es) of val that train lacks: n00007846",
        "1 image(s) of val that train has, too",
        "1 class(es) that ImageNet-1k does not have: n0148485",
    ]
    named = summary["named"]
    assert [line.startswith(f"cannot decode {broken}: ") for line in named["unreadable in train"]] == [True]
    assert named["unreadable in val"] == [f"cannot decode {empty}: the file is empty; replace the file or delete it"]
    assert named["classes without images in train"] == [SYNSETS[5]]
    assert named["classes without images in val"] == ["n0148485", SYNSETS[5]]
    assert named["labels out of range in val"] == [f"{val}/n00007846/0.png: label 5"]
    assert named["the same image in train and val"] == [f"{train / FISH[1] / '0.png'} = {val / FISH[1] / 'leak.png'}"]
    assert named["strange classes"] == ["n0148485; did you mean n01484850?"]
    numbers = summary["splits"]["train"]
    assert numbers["modes"] == {"CMYK": 1, "L": 1, "RGB": 16, "RGBA": 1}
    assert numbers["width"] == {"smallest": 16, "median": 16.0, "largest": 50}
    assert numbers["height"] == {"smallest": 10, "median": 16.0, "largest": 60}
    printed = caplog.text
    assert all(line in printed for lines in named.values() for line in lines)
    assert all(f"fault: {fault}" in printed for fault in faults)
    assert re.search(r"mode CMYK +1 +0\n", printed) and re.search(r"unreadable +1 +1\n", printed)


def pack_list(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    make_lists(target, train_folder="train", val_folder="val")


def pack_tiny(source: Path, target: Path) -> None:
    (target / "val" / "images").mkdir(parents=True)
    lines = []
    for path in sorted((source / "val").glob("*/*.png")):
        shutil.copy(path, target / "val" / "images" / f"{path.parent.name}_{path.name}")
        lines.append(f"{path.parent.name}_{path.name}\t{path.parent.name}\t0\t0\t9\t9\n")
    for synset in FISH:
        shutil.copytree(source / "train" / synset, target / "train" / synset / "images")
    (target / "val" / "val_annotations.txt").write_text("".join(lines))
    (target / "wnids.txt").write_text("\n".join(FISH))


PACK = {
    "zip": lambda source, target: make_zip(source, target, ["train", "val"], workers=0),
    "list": pack_list,
    "shards": lambda source, target: make_shards(source, target, ["train", "val"], Options(shard_size=4)),
    "raw": lambda source, target: make_shards(source, target, ["train", "val"], Options("raw", shard_size=4)),
    "tiny_imagenet": pack_tiny,
}


@pytest.mark.parametrize("form", PACK)
def test_every_form_of_the_same_data_gives_the_same_summary(form, fish, tmp_path):
    shutil.copy(fish / "train" / FISH[0] / "0.png", fish / "val" / FISH[0] / "leak.png")
    PACK[form](fish, tmp_path / "packed")
    faults, expected = checked(fish, tmp_path / "folder", synsets="imagenet1k")
    others, summary = checked(tmp_path / "packed", tmp_path / form, source=form, synsets="imagenet1k", workers=2)
    assert len(faults) == 2 and others == faults
    assert (summary["source"], summary["splits"], summary["synsets"]) == (form, expected["splits"], expected["synsets"])
    assert summary["notes"] == expected["notes"]
    assert {title: len(lines) for title, lines in summary["named"].items()} == {
        title: len(lines) for title, lines in expected["named"].items()
    }
    for line in summary["named"]["the same image in train and val"]:
        assert line.count(str(tmp_path / "packed")) == 2


def test_a_damaged_shard_costs_the_samples_behind_the_damage(fish, tmp_path):
    PACK["shards"](fish, tmp_path / "packed")
    shard = tmp_path / "packed" / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    third = [match.start() for match in re.finditer(rb"\d{8}-n\d{8}-\w+\.png\0", content)][2]
    content[third + 148 : third + 156] = b"\xff" * 8  # the header's checksum
    shard.write_bytes(content)
    faults, summary = checked(tmp_path / "packed", tmp_path / "report", source="shards")
    assert faults == ["2 unreadable image(s) in train"] and sum(summary["splits"]["train"]["modes"].values()) == 13
    reason, more = summary["named"]["unreadable in train"]
    assert reason.startswith(f"{shard}: ") and more == "... and 1 more"


def test_labels_that_contradict_training_are_found(fish, tmp_path):
    PACK["zip"](fish, tmp_path / "packed")
    lines = (tmp_path / "packed" / "val_map.txt").read_text().splitlines()
    name = lines[0].split("\t")[0]
    (tmp_path / "packed" / "val_map.txt").write_text("\n".join([f"{name}\t3", *lines[1:]]))
    faults, summary = checked(tmp_path / "packed", tmp_path / "report", source="zip")
    assert "val_map.txt, line 1: the label 3" in faults[0] and faults[1] == "1 label(s) in val not from 0 to 2"
    line = summary["named"]["labels out of range in val"]
    assert line == [f"{tmp_path / 'packed' / 'val.zip'}@/{name}: label 3"]


def test_labels_of_shards_that_are_out_of_range_are_counted(fish, tmp_path):
    PACK["shards"](fish, tmp_path / "packed")
    shard = tmp_path / "packed" / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    header = re.search(rb"\d{8}-n\d{8}-\w+\.cls\0", content)
    content[header.start() + 512] = ord("7")
    shard.write_bytes(content)
    faults, summary = checked(tmp_path / "packed", tmp_path / "report", source="shards")
    assert faults == ["1 label(s) in train not from 0 to 2"]
    image = header.group()[:-5].decode() + ".png"
    assert summary["named"]["labels out of range in train"] == [f"{shard}@/{image}: label 7"]


def test_death_of_a_worker_is_an_error():
    with pytest.raises(OSError, match="a worker died"):
        list(tool.in_pool(lambda shared, task: os._exit(1), [0], None, 1))


def test_data_that_cannot_be_opened_is_an_error_of_its_own(fish, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.zip: no such file"):
        check_dataset(fish, source="zip", output=tmp_path / "report")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_dataset(fish / "nowhere", output=tmp_path / "report")
    with pytest.raises(ValueError, match="--workers=-1"):
        check_dataset(fish, output=tmp_path / "report", workers=-1)
    assert not (tmp_path / "report").exists()


def test_one_split_alone(fish, tmp_path):
    shutil.rmtree(fish / "train")
    faults, summary = checked(fish, tmp_path / "report", splits=["val"])
    assert faults == [] and list(summary["splits"]) == ["val"]


def test_data_without_any_readable_image(tmp_path):
    for name in FISH[:2]:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "0.png").write_bytes(b"no image")
    faults, summary = checked(tmp_path / "data", tmp_path / "report", splits=["train"])
    assert faults == ["2 unreadable image(s) in train"] and summary["splits"]["train"]["width"] is None


def compared(names, reference=None, form="folder"):
    report = tool.Report()
    return tool.compare_synsets(names, reference, form, report), report


def test_synsets_against_imagenets_order():
    result, report = compared(SYNSETS)
    assert report.faults == [] and result["known"] == 1000 and result["in_order"]
    assert report.notes == ["synsets: ImageNet-1k, all its classes in its order"]
    swapped = [SYNSETS[1], SYNSETS[0], *SYNSETS[2:]]
    result, report = compared(swapped)
    assert not result["in_order"] and "in another order than ImageNet-1k's" in report.faults[0]
    result, report = compared([name for name in SYNSETS if name != SYNSETS[7]])
    assert report.faults == [f"1 of ImageNet-1k's 1000 classes missing: {SYNSETS[7]}"]
    result, report = compared([*SYNSETS[:7], "n00007846", *SYNSETS[8:]])
    assert result["strange"] == ["n00007846"] and result["missing"] == [SYNSETS[7]]
    assert report.named["strange classes"][0].startswith("n00007846: person")
    assert len(report.faults) == 2


def test_synsets_are_compared_where_imagenet_is_meant():
    others = ImageNetInfo("imagenet22k").label_names()
    for names, form in ((others, "folder"), (FISH, "tiny_imagenet"), (["ant", "bee"], "folder")):
        result, report = compared(names, form=form)
        assert result is None and report.faults == []
    assert compared(FISH)[1].faults == []  # some of the classes
    assert compared(FISH, SYNSETS)[1].faults[0].startswith("997 of ImageNet-1k's 1000 classes missing")
    assert compared(FISH, list(reversed(FISH)))[1].faults[0].startswith("classes in another order than the list")
    assert compared(None, SYNSETS)[1].notes == [
        "the data has class numbers, but no names; they are not compared with synsets"
    ]


@pytest.mark.parametrize("count, group, shown", [(2, 12, 2), (10, 6, 10), (48, 2, 48), (70, 2, 48)])
def test_contact_sheet_shows_what_it_says(count, group, shown, tmp_path):
    colours = {f"class {i:02d}": (3 * i, 255 - 3 * i, 0) for i in range(count)}
    for split, images in (("train", 3), ("val", 1)):
        for name, colour in colours.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (100, 100), colour).save(folder / f"{i}.png")
    splits = [tool.Split(name, FolderSource(tmp_path / "data" / name)) for name in tool.SPLITS]
    tool.examine_all(splits, 0)
    classes = tool.Classes(splits, None)
    sheet, same, other = (tool.contact_sheet(splits, classes, "data", seed, 0) for seed in (0, 0, 1))
    below = (0, 20, *sheet.size)  # the title, which says the seed
    assert same == sheet and (other.crop(below) == sheet.crop(below)) == (shown == count)
    rows = shown * group // 12
    assert sheet.size == (12 * (96 + 6) + 6, 20 + rows * (96 + 38) + 6) and rows <= 8
    seen = Counter()
    for row in range(rows):
        for column in range(12):
            x, y = 6 + column * (96 + 6), 20 + row * (96 + 38)
            tile = np.array(sheet.crop((x, y, x + 96, y + 96))).reshape(-1, 3)
            assert (tile == tile[0]).all()
            seen[tuple(tile[0].tolist())] += 1
            caption = np.array(sheet.crop((x, y + 97, x + 96, y + 130)))
            assert (caption.min() < 128) == (tuple(tile[0]) != (255, 255, 255))  # words where an image is
    seen.pop((255, 255, 255), None)
    assert set(seen) <= set(colours.values()) and len(seen) == shown
    assert set(seen.values()) == {min(3, group // 2) + 1}  # val has one image of each class


def test_command_line(fish, tmp_path, run_script):
    (fish / "val" / FISH[0] / "0.png").write_bytes(b"GIF89a")
    result = run_script("tools/check_dataset.py", fish, "--workers", 1, check=False)
    assert result.returncode == 1
    assert result.stderr == f"check_dataset.py: error: {fish}: 1 unreadable image(s) in val\n"
    assert result.stdout.startswith(f"{fish} (folder)") and "images per class, median" in result.stdout
    output = tmp_path / "check_fish"
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet.png", "summary.json"]
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.size[0] == 12 * 102 + 6 and np.array(sheet).std() > 20


def test_results_are_replaced_only_on_demand(fish, tmp_path, monkeypatch):
    output = tmp_path / "report"
    output.mkdir()
    (output / "summary.json").write_text("precious")
    arguments = ["check_dataset.py", str(fish), "--workers", "0", "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match=r"error: .*summary\.json exists; .*--force"):
        tool.main()
    assert (output / "summary.json").read_text() == "precious"
    monkeypatch.setattr("sys.argv", [*arguments, "--force"])
    tool.main()  # sound data: it returns, for an exit code of 0
    assert json.loads((output / "summary.json").read_text())["splits"]["val"]["images"] == 6


def test_names_that_no_terminal_can_show():
    assert tool.printable("a\nb\udcff é  c") == "a\\nb\\udcff é  c"


# Class lists


def test_class_list_gives_classes_in_its_order(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeff# fish\r\ntench  # Tinca tinca\r\n\r\n\tgreat white#1 \nAal\n".encode())
    assert read_class_list(file) == ["tench", "great white#1", "Aal"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ant\n# bee\n bee\nant # again\n", r"classes\.txt, line 4: 'ant' is in line 1 already"),
        (b"# nothing\n\n", r"classes\.txt: no class in its 2 line\(s\)"),
        (b"", r"classes\.txt: no class"),
        (b"ant\nb\xffe\n", r"classes\.txt: byte 5 is not UTF-8"),
    ],
)
def test_wrong_class_lists_are_named(content, message, tmp_path):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_list(tmp_path / "classes.txt")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt: no such file"):
        read_class_list(tmp_path / "absent.txt")


class Numbers(Source):
    """Samples that are read as their own numbers."""

    def __init__(self, labels: list[int], classes: list[str] | None):
        self.labels, self.classes = np.array(labels, np.int64), classes

    def name(self, index: int) -> str:
        return f"sample {index}"

    def read(self, index: int) -> bytes:
        return b"%d" % index


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.permutations("abcde"), st.integers(1, 5))
def test_selected_classes_are_those_samples_with_new_numbers(labels, names, count):
    chosen = names[:count]
    expected = [(i, chosen.index("abcde"[label])) for i, label in enumerate(labels) if "abcde"[label] in chosen]
    source = Numbers(labels, list("abcde"))
    if not expected:
        with pytest.raises(ValueError, match=f"none of the {len(labels)} samples"):
            SelectedClasses(source, chosen)
        return
    for selected in (SelectedClasses(source, chosen), pickle.loads(pickle.dumps(SelectedClasses(source, chosen)))):
        assert selected.classes == chosen and selected.labels.dtype == np.int64
        found = [(int(selected.read(i)), int(selected.labels[i])) for i in range(len(selected))]
        assert found == expected and selected.name(0) == f"sample {expected[0][0]}"


def test_selected_classes_of_a_zip_are_those_of_the_folder(fish, tmp_path):
    PACK["zip"](fish, tmp_path / "packed")
    chosen = [FISH[2], FISH[0]]
    zipped = SelectedClasses(ZipSource(tmp_path / "packed", "val"), chosen)
    folder = SelectedClasses(FolderSource(fish / "val"), chosen)
    assert zipped.labels.tolist() == folder.labels.tolist() == [1, 1, 0, 0]
    assert [zipped.read(i) for i in range(4)] == [folder.read(i) for i in range(4)]
    assert folder.name(0) == str(fish / "val" / FISH[0] / "0.png")


def test_unknown_selected_classes_are_named():
    source = Numbers([0, 1], ["tench", "goldfish"])
    with pytest.raises(ValueError, match=r"fish\.txt: .* 1 of the 2 classes \('goldfisch'\); did you mean goldfish\?"):
        SelectedClasses(source, ["tench", "goldfisch"], "fish.txt")
    with pytest.raises(ValueError, match="listed twice"):
        SelectedClasses(source, ["tench", "tench"])
    with pytest.raises(ValueError, match="sample 0 and the other samples have class numbers, but no class names"):
        SelectedClasses(Numbers([0, 1], None), ["tench"])
