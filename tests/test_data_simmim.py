"""SimMIM's data: official masks and crops, every source and sampler, folders without classes, images to watch."""

import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, golden, make_config, write_images
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

import distributed
from data import build_loader, zipped
from data.build import resolve_pipeline
from data.data_simmim_pt import FastSimMIMTransform, MaskGenerator, SimMIMTransform, reconstruction_samples
from data.sources import FolderSource, ImageTree
from tools import make_22k_list, make_shards, make_zip

# 4 x 4 squares, of which 10 are hidden, of 2 x 2 patches each.
MASKS = ["DATA.MASK_PATCH_SIZE", 4, "DATA.MASK_RATIO", 0.6]
CLASSES = ["n01", "n02", "n03"]
ODD = ["AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0]  # allow odd batch sizes
PACKED = ("shards", "raw")  # in an order of their own
FORMS = ["folder", "zip", "zip-part", "zip-full", "list", "shards", "raw", "tiny_imagenet"]


def config_for(root: Path, *opts):
    return make_config(None, *SMALL, *MASKS, "DATA.DATA_PATH", str(root), *opts)


def pretraining(root: Path, *opts):
    return build_loader(config_for(root, *opts), simmim=True, is_pretrain=True)


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def seed_all(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def epoch_of(loader, epoch: int, start: int = 0) -> list[torch.Tensor]:
    """Images, masks and labels of an epoch."""
    loader.sampler.set_epoch(epoch, start)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


# Masks


def test_masks_are_the_official_ones():
    for expected in golden("simmim")["mask_generator"]:
        np.random.seed(7)
        generator = MaskGenerator(*expected["args"])
        mask = generator()
        assert mask.dtype == np.int64 and list(mask.shape) == expected["shape"] and mask.sum() == expected["sum"]
        assert generator.mask_count == expected["mask_count"]
        assert mask[:: generator.scale, :: generator.scale].ravel().tolist() == expected["first_row_flat"]


def test_squares_of_oblong_masks_are_hidden_as_a_whole():
    generator = MaskGenerator((96, 160), 32, 4, 0.5)
    mask = generator()
    assert mask.shape == (24, 40) and mask.sum() == 8 * 64  # 8 of 15 squares
    squares = mask.reshape(3, 8, 5, 8)
    assert (squares == squares[:, :1, :, :1]).all()


def test_a_generator_of_ones_own_draws_nothing_else():
    generator, before = MaskGenerator(), states()
    first, second = (generator(np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, second) and states() == before
    np.random.seed(3)
    assert np.array_equal(generator(np.random.RandomState(3)), generator())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATA.MASK_RATIO", 0.0], r"DATA.MASK_RATIO=0.0; it must be above 0 and below 1"),
        (["DATA.MASK_RATIO", 1.0], r"DATA.MASK_RATIO=1.0; "),
        (["DATA.MASK_RATIO", -0.5], r"DATA.MASK_RATIO=-0.5; "),
        (
            ["DATA.MASK_PATCH_SIZE", 3],
            r"MASK_PATCH_SIZE=3 must be a multiple of MODEL.SWIN.PATCH_SIZE=2 .*\[2, 4, 8, 1",
        ),
        (
            ["DATA.MASK_PATCH_SIZE", 6],
            r"MASK_PATCH_SIZE=6 must .* divide DATA.IMG_SIZE=16; choose from \[2, 4, 8, 16\]",
        ),
        (["DATA.MASK_PATCH_SIZE", 0], r"MASK_PATCH_SIZE=0 must "),
        (["DATA.MASK_PATCH_SIZE", -4], r"MASK_PATCH_SIZE=-4 must "),
        (["DATA.MASK_PATCH_SIZE", 32], r"MASK_PATCH_SIZE=32 must "),
        (["DATA.IMG_SIZE", [16, 24], "DATA.MASK_PATCH_SIZE", 16], r"DATA.IMG_SIZE=\[16, 24\]; choose from \[2, 4, 8\]"),
        (["DATA.IMG_SIZE", 15], r"DATA.IMG_SIZE=15 with MODEL.SWIN.PATCH_SIZE=2: sides must be multiples"),
        (["MODEL.TYPE", "swinv2", "DATA.MASK_PATCH_SIZE", 2], r"MASK_PATCH_SIZE=2 .* MODEL.SWINV2.PATCH_SIZE=4 "),
        (["MODEL.SWIN.PATCH_SIZE", [2, 4]], r"MODEL.SWIN.PATCH_SIZE=\[2, 4\]: SimMIM's patches are square"),
        (["MODEL.TYPE", "resnet"], r"MODEL.TYPE='resnet' has no MODEL.RESNET.PATCH_SIZE; choose swin or swinv2"),
    ],
)
def test_masks_that_do_not_fit_are_named(image_folder, opts, message):
    for call in (lambda: pretraining(image_folder, *opts), lambda: reconstruction_samples(config_for("", *opts), 1)):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# Transforms


def test_crops_and_masks_are_the_official_ones_under_the_same_seeds():
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(192, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)),
        ]
    )
    ours = SimMIMTransform(make_config(None, "DATA.IMG_SIZE", 192))
    again = pickle.loads(pickle.dumps(ours))
    for seed, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK", "1"] * 3):
        image = photo(300, 250).convert(mode)
        seed_all(seed)
        expected, hidden = official(image.convert("RGB")), np.random.permutation(36)[:22]
        for transform in (ours, again):
            seed_all(seed)
            pixels, mask = transform(image)
            assert torch.equal(pixels, expected)
            assert mask.shape == (48, 48) and set(np.flatnonzero(mask[::8, ::8])) == set(hidden)


@pytest.mark.parametrize("size", [192, 16, [96, 160]])
def test_the_device_pipeline_has_the_same_draws(size):
    config = make_config(None, "DATA.IMG_SIZE", size, "DATA.MASK_PATCH_SIZE", 16)
    official, fast, image = SimMIMTransform(config), FastSimMIMTransform(config), photo(304, 248)
    fast = pickle.loads(pickle.dumps(fast))
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for seed in range(12):
        seed_all(seed)
        (expected, hidden), after = official(image), states()
        seed_all(seed)
        pixels, mask = fast(np.array(image))
        assert states() == after
        assert np.array_equal(mask, hidden) and pixels.dtype == torch.uint8
        assert pixels.shape == expected.shape == (3, *(size if isinstance(size, list) else (size, size)))
        assert (pixels - 255 * (expected * deviation + mean)).abs().max() < 2.01


def test_flips_can_be_turned_off():
    image = photo(64, 64)
    transform = SimMIMTransform(make_config(None, "DATA.IMG_SIZE", 32, "AUG.HFLIP", 0.0))
    transform.crop.scale, transform.crop.ratio = (1.0, 1.0), (1.0, 1.0)
    assert all(torch.equal(transform(image)[0], transform(image)[0]) for _ in range(10))


# Loaders


@pytest.mark.parametrize("pipeline", ["device", "official"])
def test_batches_are_images_masks_and_labels(image_folder, pipeline):
    loader = pretraining(image_folder, "DATA.PIPELINE", pipeline)
    batches = list(loader)
    assert len(loader) == len(batches) == 7 and loader.take_skipped() == []
    for images, masks, labels in batches:
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32 and images.min() < -0.5
        assert masks.shape == (4, 8, 8) and masks.dtype == labels.dtype == torch.int64 and labels.shape == (4,)
        assert masks.sum((1, 2)).tolist() == [40] * 4
    labels = [label for _, _, labels in batches for label in labels.tolist()]
    expected = FolderSource(image_folder / "train").labels[[index for _, index in loader.sampler]][:28]
    assert labels == expected.tolist() and set(labels) == {0, 1, 2}


@pytest.mark.parametrize("pipeline", ["device", "official"])
def test_draws_depend_on_seed_epoch_and_sample_alone(image_folder, pipeline):
    seed_all(1)
    before = states()
    alone, several = (pretraining(image_folder, "DATA.PIPELINE", pipeline, "DATA.NUM_WORKERS", n) for n in (0, 2))
    epochs = [epoch_of(alone, epoch) for epoch in (0, 1)]
    for expected, epoch in zip(epochs, (0, 1), strict=True):
        assert all(map(torch.equal, epoch_of(several, epoch), expected))
        rest = epoch_of(several, epoch, start=12)  # as after a resume
        assert all(torch.equal(part, whole[12:]) for part, whole in zip(rest, expected, strict=True))
    assert states() == before
    masks = torch.cat([masks for _, masks, _ in epochs]).flatten(1).tolist()
    assert len(set(map(tuple, masks))) > 50  # of 56 draws from 8008
    other = epoch_of(pretraining(image_folder, "DATA.PIPELINE", pipeline, "SEED", 1), 0)
    assert not torch.equal(other[1], epochs[0][1])


def test_masks_do_not_depend_on_the_pipeline(image_folder):
    device, official = (
        epoch_of(pretraining(image_folder, "DATA.PIPELINE", name), 3) for name in ("device", "official")
    )
    assert torch.equal(device[1], official[1]) and torch.equal(device[2], official[2])
    assert (device[0] - official[0]).abs().max() < 2.01 / 255 / 0.224


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """15 training and 9 validation images of 3 classes in every form, and the options that read them."""
    root = tmp_path_factory.mktemp("forms")
    folder, tiny = root / "folder", root / "tiny"
    for seed, (split, count) in enumerate((("train", 5), ("val", 3))):
        for label, name in enumerate(CLASSES):
            write_images(folder / split, [name], count, seed=10 * seed + label)
    make_zip.make_zip(folder, root / "zip", ["train", "val"], workers=0)
    for form in ("shards", "raw"):
        options = make_shards.Options(shard_size=4, **({"format": "raw"} if form == "raw" else {}))
        make_shards.make_shards(folder, root / form, ["train", "val"], options)
    make_22k_list.make_lists(folder, "train", val_folder="val", workers=0)
    for name in CLASSES:
        shutil.copytree(folder / "train" / name, tiny / "train" / name / "images")
    (tiny / "val" / "images").mkdir(parents=True)
    lines = []
    for path in sorted((folder / "val").rglob("*.png")):
        lines.append(f"{path.parent.name}_{path.name}\t{path.parent.name}\t0\t0\t9\t9\n")
        shutil.copy(path, tiny / "val" / "images" / lines[-1].split("\t")[0])
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))
    (tiny / "wnids.txt").write_text("\n".join(CLASSES))
    paths = {form: root / form.split("-")[0] for form in FORMS} | {"list": folder, "tiny_imagenet": tiny}
    sources = {form: ["DATA.SOURCE", form.split("-")[0]] for form in FORMS}
    modes = {"zip": "no", "zip-part": "part", "zip-full": "full"}
    return {form: (paths[form], *sources[form], "DATA.CACHE_MODE", modes.get(form, "part")) for form in FORMS}


@pytest.mark.parametrize("pipeline", ["device", "official"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_image_once_and_its_mask_on_any_number_of_ranks(forms, form, pipeline, monkeypatch):
    found = []
    for world_size in (1, 3):
        monkeypatch.setattr(distributed, "world_size", lambda size=world_size: size)
        samples = {}
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            workers = 2 if rank else 0
            options = [*ODD, "DATA.PIPELINE", pipeline, "DATA.BATCH_SIZE", 5, "DATA.NUM_WORKERS", workers]
            loader = pretraining(*forms[form], *options)
            parts = epoch_of(loader, 1)
            loader.sampler.set_epoch(1)
            numbers = [item[1] for item in loader.sampler]
            assert len(numbers) == len(parts[0]) == 15 // world_size
            samples |= {number: part for number, *part in zip(numbers, *parts, strict=True)}
        assert sorted(samples) == list(range(15))
        assert sorted(int(label) for _, _, label in samples.values()) == [0] * 5 + [1] * 5 + [2] * 5
        found.append(samples)
    for number, parts in found[0].items():
        assert all(map(torch.equal, parts, found[1][number]))


def test_labels_above_the_heads_classes_do_not_matter(forms):
    for form in FORMS:
        config = config_for(*forms[form], "MODEL.NUM_CLASSES", 2)
        assert epoch_of(build_loader(config, simmim=True, is_pretrain=True), 0)[2].max() == 2, form
        assert config.MODEL.NUM_CLASSES == 2


def test_chosen_classes_are_those_that_pretraining_sees(forms, tmp_path):
    (tmp_path / "classes.txt").write_text("n03\nn01\n")
    loader = pretraining(*forms["folder"], "DATA.CLASSES", str(tmp_path / "classes.txt"))
    assert len(loader.dataset) == 10 and loader.dataset.classes == ["n03", "n01"]


@pytest.mark.parametrize("pipeline", ["device", "official"])
@pytest.mark.parametrize("workers", [0, 2])
def test_places_of_skipped_images_are_filled_with_others_and_their_masks(image_folder, pipeline, workers):
    for number in range(5):
        path = image_folder / "train" / "bee" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:40])
    opts = ["DATA.ON_ERROR", "skip", "DATA.PIPELINE", pipeline, "DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 10]
    loader = pretraining(image_folder, *opts)
    seen = 0
    for images, masks, _ in loader:
        assert images.shape == (10, 3, 16, 16) and masks.shape == (10, 8, 8)
        pairs = {(image.numpy().tobytes(), mask.numpy().tobytes()) for image, mask in zip(images, masks, strict=True)}
        seen += len(pairs)
        assert len({image for image, _ in pairs}) == len(pairs)  # a repeated image has its own mask
    reasons = loader.take_skipped()
    assert len(reasons) == 5 and seen == 25 and all("train/bee/" in reason for reason in reasons)
    with pytest.raises(ValueError, match=r"cannot decode .*bee/\d\.png"):
        list(pretraining(image_folder, "DATA.PIPELINE", pipeline))


def test_one_pipeline_is_chosen_whatever_the_policy_of_supervised_training(monkeypatch):
    for device, expected in (("cpu", "official"), ("cuda", "device"), ("mps", "official")):
        monkeypatch.setattr(distributed, "pick_device", lambda device=device: torch.device(device))
        config = make_config(None, "AUG.AUTO_AUGMENT", "original")
        assert resolve_pipeline(config, augments=False) == expected


def test_finetuning_has_the_loaders_of_supervised_training(image_folder):
    results = []
    for flags in ({}, {"simmim": True, "is_pretrain": False}):
        config = config_for(image_folder)
        dataset_train, dataset_val, loader_train, loader_val, mixup = build_loader(config, **flags)
        assert config.MODEL.NUM_CLASSES == 3 and mixup is not None and dataset_train.classes == dataset_val.classes
        results.append([part for loader in (loader_train, loader_val) for batch in loader for part in batch])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


# Folders


def test_folders_without_classes(tmp_path):
    write_images(tmp_path, ["photos", "photos/2020", "photos/2020/june", "photos/.thumbnails"], 3)
    photos = tmp_path / "photos"
    shutil.copy(photos / "0.png", photos / ".hidden.png")
    (photos / "2020" / "notes.txt").write_text("no image")
    for number in range(3):
        (photos / "2020" / f"{number}.png").rename(photos / "2020" / f"{number}.PNG")
    expected = sorted(str(path) for path in photos.rglob("*.[pP]*") if "/." not in str(path))
    source = ImageTree(photos)
    assert sorted(source.paths) == expected and len(expected) == 9
    assert source.labels.dtype == np.int64 and not source.labels.any() and source.classes is None
    assert source.read(0) == Path(source.name(0)).read_bytes()
    with_train = tmp_path / "with_train"
    with_train.mkdir()
    shutil.copytree(photos, with_train / "train")
    write_images(with_train, ["val"], 2)
    for root in (photos, with_train):
        loader = pretraining(root, *ODD, "DATA.BATCH_SIZE", 9)
        _, _, labels = next(iter(loader))
        assert len(loader.dataset) == 9 and labels.tolist() == [0] * 9 and loader.dataset.classes is None
        assert reconstruction_samples(config_for(root), 20)[0].shape == (2 if root is with_train else 9, 3, 16, 16)


def test_class_folders_are_numbered_as_in_supervised_training(image_folder):
    """Officially --data-path leads to the class folders themselves."""
    train, expected = image_folder / "train", FolderSource(image_folder / "train")
    for folder in (train / "dog", train / ".cache"):
        folder.mkdir()
    shutil.copy(train / "ant" / "0.png", train / ".cache")
    for source in (ImageTree(train), pretraining(train).dataset.source, pretraining(image_folder).dataset.source):
        assert source.paths == expected.paths and np.array_equal(source.labels, expected.labels)
        assert source.classes == ["ant", "bee", "cat", "dog"]  # the last without images


def test_shards_without_labels(image_folder, tmp_path):
    (tmp_path / "plain" / "train").mkdir(parents=True)
    paths = sorted((image_folder / "train").rglob("*.png"))[:8]
    with tarfile.open(tmp_path / "plain/train/shard-000000.tar", "w") as archive:
        for number, path in enumerate(paths):
            archive.add(path, f"{number:04d}.png")
    config = ["DATA.SOURCE", "shards", "DATA.WATCHED_IMAGES", 2]
    images, _, labels = epoch_of(pretraining(tmp_path / "plain", *config), 0)
    assert len(images) == 8 and not labels.any()
    watched, _ = reconstruction_samples(config_for(tmp_path / "plain", *config), 2)
    assert len(watched) == 2


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / ".hidden.png").touch()
    for root, message in ((tmp_path, r"train: no images in it, nor in its"), (tmp_path / "x", r"x: no such folder")):
        for call in (pretraining, lambda root: reconstruction_samples(config_for(root), 2)):
            with pytest.raises(FileNotFoundError, match=message):
                call(root)
    with pytest.raises(ValueError, match=r"DATA\.DATA_PATH is empty"):
        reconstruction_samples(config_for(""), 2)
    write_images(tmp_path, ["train"], 3)
    with pytest.raises(ValueError, match=r"3 training images on 1 process\(es\) do not fill one batch"):
        pretraining(tmp_path)


# Images to watch


def plain(path: Path) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    return transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(pixels)


def test_watched_images_are_the_same_in_every_form_and_at_every_call(forms, monkeypatch):
    monkeypatch.setattr(zipped, "Cache", None)  # nothing is cached for a few images
    seed_all(4)
    before = states()
    root = forms["folder"][0]
    paths = sorted((root / "val").rglob("*.png"))
    expected = torch.stack([plain(path) for path in paths])
    masks = None
    for form in FORMS:
        for rank, options in ((0, []), (3, ["SEED", 5, "DATA.NUM_WORKERS", 2, "DATA.PIPELINE", "device"])):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            config = config_for(*forms[form], *options)
            images, found = reconstruction_samples(config, 4)
            masks = found if masks is None else masks
            assert found.dtype == torch.int64 and torch.equal(found, masks) and found.sum((1, 2)).tolist() == [40] * 4
            if form not in PACKED:
                torch.testing.assert_close(images, expected[[0, 2, 4, 6]])
            whole = reconstruction_samples(config, 100)
            assert {image.numpy().tobytes() for image in whole[0]} == {image.numpy().tobytes() for image in expected}
            assert torch.equal(whole[1][:4], masks) and len(whole[0]) == len(whole[1]) == 9
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4 and states() == before


def test_watched_images_of_shards_are_the_first_ones(forms):
    """3 shards of 4, 4 and 1 images: numbers 0 and 1, 4, 8; more of them go on from there."""
    config = config_for(*forms["shards"])
    images = reconstruction_samples(config, 9)[0]
    order = [image.numpy().tobytes() for image in images]
    four = [order.index(image.numpy().tobytes()) for image in reconstruction_samples(config, 4)[0]]
    shards = sorted((forms["shards"][0] / "val").glob("*.tar"))
    assert len(shards) == 3 and four == [0, 1, 3, 6]  # of nine: three of each shard, where there are so many


def test_without_validation_images_training_images_are_watched(forms, monkeypatch, tmp_path):
    monkeypatch.setattr(zipped, "Cache", None)
    for form in FORMS:
        root, *options = forms[form]
        copy = tmp_path / form
        shutil.copytree(root, copy)
        for path in copy.glob("*val*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        images, _ = reconstruction_samples(config_for(copy, *options), 5)
        paths = sorted((forms["folder"][0] / "train").rglob("*.png"))
        if form not in PACKED:
            torch.testing.assert_close(images, torch.stack([plain(path) for path in paths[::3]]))
        assert len({image.numpy().tobytes() for image in images}) == 5


def test_shards_of_commands_need_no_folder_to_be_watched(forms, monkeypatch):
    monkeypatch.chdir(forms["folder"][0])  # its val/ has nothing to do with an empty DATA_PATH
    train = forms["shards"][0] / "train"
    shards = f"pipe:cat {train}/shard-{{000000..000003}}.tar"
    opts = ["DATA.SOURCE", "shards", "DATA.TRAIN_SHARDS", shards, "DATA.TRAIN_INDEX", str(train / "index.json")]
    assert reconstruction_samples(config_for("", *opts), 4)[0].shape == (4, 3, 16, 16)
    assert len(epoch_of(pretraining("", *opts), 0)[0]) == 12


def test_watched_images_cover_the_size_and_are_cropped_in_the_middle(tmp_path):
    photo(304, 248).save(tmp_path / "a.png")
    for size, resized, corner in (([64, 64], (78, 64), (7, 0)), ([64, 128], (128, 104), (0, 20))):
        images, masks = reconstruction_samples(
            config_for(tmp_path, "DATA.IMG_SIZE", size, "DATA.MASK_PATCH_SIZE", 32, "DATA.INTERPOLATION", "lanczos"), 1
        )
        box = (*corner, corner[0] + size[1], corner[1] + size[0])
        photo(304, 248).resize(resized, Image.BILINEAR).crop(box).save(tmp_path / "expected.bmp")
        torch.testing.assert_close(images[0], plain(tmp_path / "expected.bmp"))
        assert masks.shape == (1, size[0] // 2, size[1] // 2)
        (tmp_path / "expected.bmp").unlink()


def test_watched_images_too_long_to_be_resized_are_named_or_replaced(tmp_path):
    write_images(tmp_path, ["train"], 2)
    Image.new("RGB", (60000, 2)).save(tmp_path / "train/0.png")
    with pytest.raises(ValueError, match=r"train/0\.png: 60000x2 pixels; one side is more than 1000 times the other"):
        reconstruction_samples(config_for(tmp_path), 1)
    images, _ = reconstruction_samples(config_for(tmp_path, "DATA.ON_ERROR", "skip"), 1)
    assert torch.equal(images[0], plain(tmp_path / "train/1.png"))


def test_unusable_watched_images_are_replaced_by_the_next(tmp_path):
    write_images(tmp_path, ["train"], 8)
    paths = sorted((tmp_path / "train").iterdir())
    expected = torch.stack([plain(path) for path in paths])
    for broken in (2, 6, 7):
        paths[broken].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot decode .*train/2\.png"):
        reconstruction_samples(config_for(tmp_path), 4)
    skipping = config_for(tmp_path, "DATA.ON_ERROR", "skip")
    # 0, 2, 4, 6 are wanted: 3 takes the place of 2, and 1 that of 6, as 7 is broken and 0 there already.
    assert torch.equal(reconstruction_samples(skipping, 4)[0], expected[[0, 3, 4, 1]])
    assert len(reconstruction_samples(skipping, 8)[0]) == 5
    for path in paths:
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 8 images can be used; the first: cannot decode .*/0\.png"):
        reconstruction_samples(skipping, 4)


@pytest.mark.gpu
def test_the_accelerator_gives_what_the_cpu_gives(image_folder, monkeypatch):
    opts = ["DATA.PIPELINE", "device", "DATA.NUM_WORKERS", 2]
    there = epoch_of(pretraining(image_folder, *opts), 1)
    assert there[0].device == distributed.pick_device()
    monkeypatch.setattr(distributed, "pick_device", lambda: torch.device("cpu"))
    here = epoch_of(pretraining(image_folder, *opts), 1)
    torch.testing.assert_close(there[0].cpu(), here[0])
    assert torch.equal(there[1].cpu(), here[1]) and torch.equal(there[2].cpu(), here[2])
