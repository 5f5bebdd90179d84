"""Data: the official transforms, exact sampling, seeds by sample, and errors that name files and classes."""

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, make_config, write_images
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import DistributedSampler
from torchvision import transforms

from data import build_loader, decoding
from data.decoding import build_decoder
from data.images import Images, Skipped, collate
from data.samplers import EvalSampler, PartSampler, TrainSampler
from data.sources import Source
from data.transforms import Normalised, build_transform, posterize


def config_for(folder: Path, *opts):
    return make_config(None, *SMALL, "DATA.DATA_PATH", str(folder), *opts)


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def test_loaders_take_the_class_count_from_the_folder(image_folder):
    config = config_for(image_folder)
    dataset_train, dataset_val, loader_train, loader_val, mixup = build_loader(config)
    assert config.MODEL.NUM_CLASSES == 3 and dataset_train.classes == dataset_val.classes == ["ant", "bee", "cat"]
    assert (len(dataset_train), len(dataset_val), len(loader_train), len(loader_val)) == (30, 11, 7, 3)
    images, labels = next(iter(loader_train))
    assert images.shape == (4, 3, 16, 16) and labels.shape == (4,)
    assert mixup(images, labels)[1].shape == (4, 3)


def test_evaluation_transforms_are_the_official_ones():
    image = photo(300, 250)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    resized = image.resize((307, 256), Image.BICUBIC).crop((42, 16, 42 + 224, 16 + 224))  # sides 256 / 224, centre
    expected = normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255)
    torch.testing.assert_close(build_transform(False, make_config())(image), expected)
    squashed = image.resize((224, 224), Image.BICUBIC)
    expected = normalise(torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255)
    torch.testing.assert_close(build_transform(False, make_config(None, "TEST.CROP", False))(image), expected)


def test_training_transforms_are_timms_under_the_same_seeds():
    theirs = create_transform(
        224, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel",
        re_count=1, interpolation="bicubic",
    )  # fmt: skip
    ours, image = build_transform(True, make_config()), photo(300, 250)
    compared = 0
    for seed in range(60):
        results = []
        for transform in (ours, theirs):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            try:
                results.append(transform(image))
            except ValueError:  # Pillow 13 refuses to keep 0 bits, in timm's own transform only
                assert transform is theirs
        if len(results) == 2:
            assert torch.equal(*results)
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_pixels_of_fast_decoders_give_the_same_as_pil_images(interpolation):
    transform = build_transform(True, make_config(None, "DATA.INTERPOLATION", interpolation))
    for seed, size in enumerate([(300, 250), (224, 224), (9, 700), (700, 9), (1, 1)] * 3):
        image, results = photo(*size), []
        for given in (image, np.array(image)):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            results.append(transform(given))
        assert torch.equal(*results)


def test_earlier_versions_of_opencv_give_the_same_pixels(monkeypatch):
    file = io.BytesIO()
    photo(90, 70).save(file, "JPEG")
    pixels = build_decoder("cv2")(file.getvalue(), "a.jpg")
    monkeypatch.setattr(decoding, "READ_RGB", None)
    assert np.array_equal(build_decoder("cv2")(file.getvalue(), "a.jpg"), pixels)
    assert np.array_equal(pixels, Image.open(file).convert("RGB"))


def test_normalising_is_torchvisions_bit_for_bit():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    official = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    for image in (levels, photo(31, 7), photo(1, 1), photo(700, 600)):
        assert torch.equal(Normalised()(image), official(image))
        assert Normalised()(image).is_contiguous()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_normalising_takes_rgb_alone(mode):
    with pytest.raises(ValueError, match=f"an image of mode '{mode}', but this takes RGB alone"):
        Normalised()(photo(16, 8).convert(mode))


def test_loading_in_this_process_leaves_the_global_generators_alone(image_folder):
    """A batch seeds them for each sample, and puts them back, also after an error."""

    def states() -> list:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    _, _, train, val, _ = build_loader(config_for(image_folder, "DATA.PIPELINE", "official"))
    before = states()
    assert len(list(train)) == 7 and len(list(val)) == 3 and states() == before
    broken = break_image(image_folder, "train/ant/0.png")
    train.sampler.set_epoch(1)
    with pytest.raises(ValueError, match=broken):
        for epoch in range(3):
            train.sampler.set_epoch(epoch)
            list(train)
    assert states() == before


def test_small_images_are_padded_and_cropped():
    transform = build_transform(True, make_config(None, "DATA.IMG_SIZE", 32))
    assert isinstance(transform.transforms[1], transforms.RandomCrop) and transform.transforms[1].padding == 4
    assert len(build_transform(False, make_config(None, "DATA.IMG_SIZE", 32)).transforms) == 2  # no resizing


def test_horizontal_flips_can_be_turned_off():
    for probability, expected in ((0.0, 0), (0.5, 1)):
        steps = build_transform(True, make_config(None, "AUG.HFLIP", probability)).transforms
        assert sum(isinstance(step, transforms.RandomHorizontalFlip) for step in steps) == expected


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "hamming", "lanczos", "nearest", "random"])
def test_every_interpolation_works(name):
    config = make_config(None, "DATA.INTERPOLATION", name)
    for is_train in (True, False):
        assert build_transform(is_train, config)(photo(300, 250)).shape == (3, 224, 224)


def test_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match=r"AUG\.AUTO_AUGMENT='bogus'"):
        build_transform(True, make_config(None, "AUG.AUTO_AUGMENT", "bogus"))


def test_posterize_without_bits_is_black():
    image = photo(32, 32)
    assert not np.array(posterize(image, 0)).any()
    for bits in (1, 4):
        assert np.array_equal(posterize(image, bits), ImageOps.posterize(image, bits))
    assert posterize(image, 8) is image


def test_augmentation_never_fails_at_full_strength():
    transform = build_transform(True, make_config(None, "AUG.AUTO_AUGMENT", "rand-m10-n4-inc1", "DATA.IMG_SIZE", 16))
    image = photo(16, 16)
    for seed in range(200):
        random.seed(seed), np.random.seed(seed)
        assert transform(image).isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_samples_are_seen_once_per_epoch(world_size):
    seen = Counter()
    for rank in range(world_size):
        sampler = TrainSampler(31, rank, world_size, seed=5)
        sampler.set_epoch(2)
        pairs = list(sampler)
        assert len(pairs) == len(sampler) == 31 // world_size and {epoch for epoch, _ in pairs} == {2}
        seen.update(index for _, index in pairs)
    assert len(seen) == 31 // world_size * world_size and set(seen.values()) == {1}


def test_training_order_is_that_of_pytorchs_sampler():
    ours, theirs = TrainSampler(40, 1, 2, seed=3), DistributedSampler(range(40), 2, 1, seed=3)
    ours.set_epoch(4), theirs.set_epoch(4)
    assert [index for _, index in ours] == list(theirs)


def test_training_continues_within_an_epoch():
    sampler = TrainSampler(20, seed=1)
    whole = list(sampler)
    sampler.set_epoch(0, start=8)
    assert list(sampler) == whole[8:] and len(sampler) == 20


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 13])
def test_evaluation_sees_each_sample_once(world_size, sequential, shuffle):
    parts = [list(EvalSampler(11, rank, world_size, sequential, shuffle, seed=1)) for rank in range(world_size)]
    seen = [index for part in parts for index in part]
    assert sorted(seen) == list(range(11))
    if sequential and not shuffle:
        assert seen == list(range(11))


@pytest.mark.parametrize("pipeline", ["device", "official"])
def test_random_transforms_depend_on_seed_epoch_and_sample_alone(image_folder, pipeline):
    loaders = []
    for workers in (0, 2):
        opts = ["DATA.NUM_WORKERS", workers, "AUG.REPROB", 1.0, "DATA.PIPELINE", pipeline]
        config = config_for(image_folder, *opts)
        loaders.append(build_loader(config)[2])
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    epochs = []
    for loader in loaders:
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seeds_reach_all_three_generators():
    class Nothing(Source):
        labels = np.zeros(3, np.int64)

        def name(self, index):
            return str(index)

        def read(self, index):
            return b""

    def draw(image):
        return random.random(), np.random.rand(), torch.rand(()).item()

    draws = Images(Nothing(), lambda data, name: data, draw, seed=0)
    assert draws[0, 1] == draws[0, 1]
    values = [draws[epoch, index][0] for epoch in (0, 1) for index in (0, 1)]
    assert all(len(set(column)) == 4 for column in zip(*values, strict=True))
    assert Images(Nothing(), lambda data, name: data, draw, seed=1)[0, 1] != draws[0, 1]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"DATA.DATA_PATH is empty; give --data-path"):
        build_loader(make_config())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build_loader(config_for(tmp_path / "nowhere"))
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        build_loader(config_for(tmp_path))


def test_empty_training_class_is_named(image_folder):
    (image_folder / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="dog"):
        build_loader(config_for(image_folder))


def test_class_that_training_lacks_is_named(image_folder):
    write_images(image_folder / "val", ["eel"], 1)
    with pytest.raises(ValueError, match=r"training data does not have \(eel\)"):
        build_loader(config_for(image_folder))


def test_a_validation_class_may_be_absent(image_folder):
    for path in (image_folder / "val" / "bee").iterdir():
        path.unlink()
    (image_folder / "val" / "bee").rmdir()
    dataset_val = build_loader(config_for(image_folder))[1]
    assert set(dataset_val.source.labels) == {0, 2}  # cat keeps its number


def test_head_given_in_the_configuration_must_be_large_enough(image_folder):
    config = config_for(image_folder, "MODEL.NUM_CLASSES", 2)
    with pytest.raises(ValueError, match=r"has 3 classes, but the head has MODEL.NUM_CLASSES=2"):
        build_loader(config)
    config = config_for(image_folder, "MODEL.NUM_CLASSES", 5)
    build_loader(config)
    assert config.MODEL.NUM_CLASSES == 5


def test_image_that_does_not_decode_is_named(image_folder):
    broken = image_folder / "train" / "ant" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    dataset = build_loader(config_for(image_folder))[0]
    with pytest.raises(ValueError, match=r"cannot decode .*ant/0\.png: "):
        for index in range(len(dataset)):
            dataset[index]


@pytest.mark.parametrize("pipeline", ["device", "official"])
def test_images_too_long_to_be_resized_are_named_or_skipped(image_folder, pipeline):
    long = image_folder / "val/bee/1.png"
    Image.new("RGB", (2, 60000)).save(long)
    opts = ["DATA.IMG_SIZE", 64, "DATA.PIPELINE", pipeline]
    with pytest.raises(ValueError, match=r"val/bee/1\.png: 2x60000 pixels; one side is more than 1000 times the other"):
        list(build_loader(config_for(image_folder, *opts))[3])
    loader_val = build_loader(config_for(image_folder, *opts, "DATA.ON_ERROR", "skip"))[3]
    assert sum(len(images) for images, _ in loader_val) == 10 and str(long) in loader_val.take_skipped()[0]
    Image.new("RGB", (2, 2000)).save(long)
    assert sum(len(images) for images, _ in build_loader(config_for(image_folder, *opts))[3]) == 11


def test_too_few_images_for_a_batch(image_folder):
    with pytest.raises(ValueError, match=r"30 training images on 1 process\(es\) do not fill one batch .*at most 30"):
        build_loader(config_for(image_folder, "DATA.BATCH_SIZE", 32))


def test_contradicting_sources_are_an_error(image_folder):
    with pytest.raises(ValueError, match=r"DATA.ZIP_MODE=True \(--zip\) and DATA.SOURCE='folder' exclude each other"):
        build_loader(config_for(image_folder, "DATA.ZIP_MODE", True, "DATA.SOURCE", "folder"))
    with pytest.raises(ValueError, match=r"DATA.DATASET='imagenet23K'; choose from"):
        config_for(image_folder, "DATA.DATASET", "imagenet23K")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_that_keep_a_part_in_memory_see_only_that_part(world_size):
    places = set()
    for rank in range(world_size):
        own = range(rank, 31, world_size)
        sampler = PartSampler(own, 31 // world_size, rank, seed=1)
        sampler.set_epoch(1)
        seen = [index for _, index in sampler]
        assert len(seen) == len(set(seen)) == len(sampler) == 31 // world_size and set(seen) <= set(own)
        places.add(tuple(index // world_size for index in seen))
        sampler.set_epoch(1, start=4)
        assert [index for _, index in sampler] == seen[4:]
    assert len(places) == world_size  # neighbours in the archive do not meet in a batch


def break_image(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(path.read_bytes()[:40])
    return str(path)


@pytest.mark.parametrize("pipeline", ["device", "official"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_counted_and_batches_stay_full(image_folder, pipeline, workers):
    broken = break_image(image_folder, "train/ant/0.png"), break_image(image_folder, "val/bee/1.png")
    opts = ["DATA.ON_ERROR", "skip", "DATA.NUM_WORKERS", workers, "DATA.PIPELINE", pipeline]
    _, _, loader_train, loader_val, _ = build_loader(config_for(image_folder, *opts))
    shapes = [images.shape for images, _ in loader_train]
    assert shapes == [(4, 3, 16, 16)] * 7
    reasons = loader_train.take_skipped()
    assert len(reasons) <= 1 and all(broken[0] in reason for reason in reasons)
    loader_train.sampler.set_epoch(1)
    list(loader_train)
    assert len(reasons + loader_train.take_skipped()) >= 1  # two samples of 30 are left out in each epoch
    assert sum(len(images) for images, _ in loader_val) == 10
    assert broken[1] in loader_val.take_skipped()[0] and loader_val.take_skipped() == []


def test_a_batch_without_any_usable_image():
    for fill in (True, False):
        images, labels, skips = collate([Skipped("a broken")], fill)
        assert images is None and labels is None and skips.reasons == ("a broken",)


def test_filled_places_repeat_images_of_the_batch():
    samples = [(torch.zeros(3, 2, 2), 0), Skipped("x"), (torch.ones(3, 2, 2), 1), Skipped("y"), Skipped("z")]
    images, labels, skips = collate(samples, fill=True)
    assert labels.tolist() == [0, 0, 1, 1, 0] and images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 0]
    assert skips.reasons == ("x", "y", "z")


def test_oblong_sizes_keep_the_aspect_of_images():
    """What lies inside the cropped middle is neither stretched nor filled up."""
    config = make_config(None, "DATA.IMG_SIZE", [96, 192])
    image = photo(300, 250)
    resized = image.resize((219, 182), Image.BICUBIC).crop((14, 43, 14 + 192, 43 + 96))  # 192 * 256 / 224 wide
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(build_transform(False, config)(image), normalise(expected))
    assert build_transform(True, config)(image).shape == (3, 96, 192)
    crop = build_transform(True, config).transforms[0]
    assert crop.size == (96, 192) and crop.ratio == (3 / 2, 8 / 3)
    tall = build_transform(False, make_config(None, "DATA.IMG_SIZE", [192, 96], "TEST.CROP", False))(image)
    assert tall.shape == (3, 192, 96)


def test_batches_of_an_odd_size_cannot_be_mixed(image_folder):
    config = make_config(None, "DATA.BATCH_SIZE", 7, data_path=str(image_folder))
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE=7 must be even with mixup"):
        build_loader(config)
