"""The fast pipeline: crops and resizing beside Pillow's, each operation beside timm's, batches on the device."""

import itertools
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_config
from PIL import Image, ImageEnhance
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing as TimmRandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from data import transforms
from data.augment import FILL, Draw, Finish, Plan, augment, erase
from data.device import DeviceLoader
from data.fast import FastEval, FastTrain, collate, crop_ratio, random_crop, resize, sample_generator
from data.policies import Augmentation, ColorJitter, RandAugment, RandomErasing
from data.samplers import TrainSampler

POLICY = "rand-m9-mstd0.5-inc1"
CPU = torch.device("cpu")


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.RandomState(seed).randint(0, 255, (max(2, height // 8), max(2, width // 8), 3))
    return np.array(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC))


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def difference(ours: torch.Tensor, theirs: Image.Image | np.ndarray) -> np.ndarray:
    """Per value, of an image (3, H, W) from one of PIL's."""
    return np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))


def fast_train(size=(48, 48), hflip=0.5, interpolation="bicubic", **augmentation) -> FastTrain:
    return FastTrain(size, hflip, interpolation, Augmentation(size, **augmentation))


# --- In the workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (96, 192), (192, 96)])
def test_crops_are_drawn_as_timm_draws_them(size):
    ratio = crop_ratio(size)
    step = transforms.build_transform(True, make_config(None, "DATA.IMG_SIZE", list(size))).transforms[0]
    assert ratio == tuple(step.ratio)
    for seed, (width, height) in enumerate([(500, 375), (30, 400), (640, 33), (17, 12), (3, 200)] * 20):
        random.seed(seed)
        theirs = RandomResizedCropAndInterpolation.get_params(Image.new("L", (width, height)), (0.08, 1.0), ratio)
        assert random_crop(height, width, ratio, random.Random(seed)) == theirs


def test_tiny_images_give_crops_that_are_not_empty():
    for seed, (height, width) in enumerate([(1, 1), (1, 7), (5, 1)] * 30):
        top, left, h, w = random_crop(height, width, crop_ratio((64, 64)), random.Random(seed))
        assert 0 < h <= height - top and 0 < w <= width - left
        assert fast_train()(photo(width, height), random.Random(seed))[0].shape == (3, 48, 48)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("width, height", [(40, 60), (201, 190), (500, 333), (64, 700), (3, 5)])
def test_resizing_is_that_of_pillow(mode, width, height):
    """At most 2 levels: to the side that Pillow changes first, so that both filter in one order."""
    pixels = photo(width, height)
    rows = Image.fromarray(pixels).resize((112, height), str_to_pil_interp(mode))
    theirs = rows.resize((112, 96), str_to_pil_interp(mode))
    ours = resize(pixels, (96, 112), mode)
    assert ours.dtype == torch.uint8 and ours.permute(1, 2, 0).is_contiguous()
    if mode in ("bicubic", "bilinear"):
        assert difference(ours, theirs).max() <= 2 and difference(ours, theirs).mean() < 0.1
    else:
        theirs = Image.fromarray(pixels).resize((112, 96), str_to_pil_interp(mode))
        assert difference(ours, theirs).max() == 0


def test_training_images_are_crops_of_the_photograph():
    pixels = photo(150, 100)
    flipped, plain = fast_train(hflip=1), fast_train(hflip=0)
    for seed in range(20):
        image, _ = plain(pixels, random.Random(seed))
        top, left, h, w = random_crop(100, 150, crop_ratio((48, 48)), random.Random(seed))
        theirs = Image.fromarray(pixels[top : top + h, left : left + w]).resize((48, 48), Image.BICUBIC)
        assert difference(image, theirs).mean() < 0.2
        mirrored, _ = flipped(Image.fromarray(pixels), random.Random(seed))
        assert difference(mirrored.flip(2), theirs).mean() < 0.2
    halves = [fast_train()(pixels, random.Random(seed))[0] for seed in range(200)]
    plains = [plain(pixels, random.Random(seed))[0] for seed in range(200)]
    assert 70 < sum(torch.equal(a, b) for a, b in zip(halves, plains, strict=True)) < 130


def test_random_interpolation_takes_both():
    pixels, rest = photo(150, 100), fast_train(hflip=0, interpolation="random")
    found = dict.fromkeys(("bilinear", "bicubic"), 0)
    for seed in range(40):
        top, left, h, w = random_crop(100, 150, rest.ratio, random.Random(seed))
        image, _ = rest(pixels, random.Random(seed))
        for mode in found:
            found[mode] += torch.equal(image, resize(pixels[top : top + h, left : left + w].copy(), (48, 48), mode))
    assert sum(found.values()) == 40 and min(found.values()) > 10
    with pytest.raises(ValueError, match=r"DATA\.INTERPOLATION='cubic'; choose from \['bilinear', 'bicubic', "):
        fast_train(interpolation="cubic")


def test_small_images_are_padded_and_cropped():
    pixels, train, places = photo(40, 32), fast_train((32, 32), hflip=0), Counter()
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    for seed in range(300):
        image = train(pixels, random.Random(seed))[0].permute(1, 2, 0).numpy()
        found = [(y, x) for y in range(9) for x in range(17) if np.array_equal(padded[y : y + 32, x : x + 32], image)]
        assert len(found) == 1
        places.update(found)
    assert {y for y, _ in places} == set(range(9)) and {x for _, x in places} == set(range(17))
    with pytest.raises(ValueError, match=r"image of 23x40 pixels is too small to crop DATA.IMG_SIZE=\[32, 32\]"):
        train(photo(40, 23), random.Random(0))


def test_draws_depend_on_the_sample_alone():
    train, pixels = fast_train(policy=POLICY, erasing=0.5), photo(150, 100)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    results = {key: train(pixels, sample_generator(*key)) for key in itertools.product((0, 1), (0, 1), (0, 1))}
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert len({draw.noise for _, draw in results.values()}) == 8
    again = train(pixels, sample_generator(1, 0, 1))
    assert torch.equal(again[0], results[1, 0, 1][0]) and again[1] == results[1, 0, 1][1]


def test_read_only_pixels_and_worker_processes_are_served():
    pixels, train = photo(64, 48), fast_train(policy=POLICY)
    pixels.flags.writeable = False  # such as those of a mapped file
    before = pixels.copy()
    image, draw = pickle.loads(pickle.dumps(train))(pixels, random.Random(5))
    image.zero_()
    assert draw == train(pixels, random.Random(5))[1] and np.array_equal(pixels, before)


@pytest.mark.parametrize("opts", [(), ("TEST.CROP", False), ("DATA.IMG_SIZE", [96, 160]), ("DATA.IMG_SIZE", 32)])
def test_evaluation_is_exactly_the_official_one(opts):
    official = transforms.build_transform(False, make_config(None, *opts))
    pixels = photo(32, 32) if opts[-1:] == (32,) else photo(300, 250)
    images, labels = collate([(FastEval(official.transforms[:-1])(pixels), 7)] * 2)
    assert images.dtype == torch.uint8 and labels.tolist() == [7, 7]
    assert torch.equal(Finish(CPU)(images)[1], official(Image.fromarray(pixels)))


# --- What is drawn for the device -------------------------------------------------------------------------------------

OPERATIONS = [op.name for policy in ("rand-inc1", "rand-inc0") for op in rand_augment_transform(policy, {}).ops]
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
PICTURES = [
    *(photo(72, 60, seed) for seed in range(4)),
    *(photo(72, 60, seed) // 3 + 40 for seed in range(2)),
    np.full((60, 72, 3), 77, np.uint8),
    np.dstack([np.zeros((60, 72), np.uint8), np.full((60, 72), 255, np.uint8), photo(72, 60, 9)[..., 0]]),
    np.random.RandomState(0).randint(0, 256, (60, 72, 3)).astype(np.uint8),
]


def timm_policy(policy: str, interpolation: str = "bicubic") -> TimmRandAugment:
    hints = {"img_mean": FILL, "translate_const": 30}
    if interpolation != "random":
        hints["interpolation"] = str_to_pil_interp(interpolation)
    official = rand_augment_transform(policy, hints)
    for op in official.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = transforms.posterize
    return official


@pytest.mark.parametrize("name", sorted(set(OPERATIONS)))
def test_operations_are_those_of_timm(name):
    """From one generator's state: the same choice, the same argument and the same picture."""
    inc = "1" if name in OPERATIONS[:15] else "0"
    applied = 0
    policies = (f"rand-m9-mstd0.5-inc{inc}", f"rand-m7-mstd101-p0.9-inc{inc}", f"rand-m12-mmax20-p1-inc{inc}")
    for policy, interpolation in itertools.product(policies, ("bicubic", "random")):
        theirs = next(op for op in timm_policy(policy, interpolation).ops if op.name == name)
        ours = RandAugment(policy, (60, 72), interpolation)
        for seed, picture in enumerate(PICTURES * 2):
            random.seed(seed)
            expected = theirs(Image.fromarray(picture))
            op = ours.draw_op(name, random.Random(seed))
            result = augment(batch(picture), Plan.of([Draw([op] if op else [])]))[0]
            wrong = difference(result, expected)
            applied += op is not None
            if name in GEOMETRY:
                assert wrong.max() <= 1 and wrong.mean() < 0.05, (policy, seed)
            else:
                assert wrong.max() == 0, (policy, seed)
    assert applied > 60


@pytest.mark.parametrize("name", GEOMETRY)
def test_nearest_geometry_is_near_that_of_timm(name):
    theirs = next(op for op in timm_policy("rand-p1", "nearest").ops if op.name == name)
    ours = RandAugment("rand-p1", (60, 72), "nearest")
    for seed, picture in enumerate(PICTURES[:4]):
        random.seed(seed)
        plan = Plan.of([Draw([ours.draw_op(name, random.Random(seed))])])
        assert difference(augment(batch(picture), plan)[0], theirs(Image.fromarray(picture))).mean() < 0.1


def test_all_operations_are_drawn_equally_often():
    policy, counts, layers = RandAugment("rand-n3-inc1-p1", (60, 72)), Counter(), Counter()
    generator = random.Random(0)
    for _ in range(3000):
        ops = policy.draw(generator)
        layers[len(ops)] += 1
        counts.update(name for name, _ in ops)
    geometry = counts.pop("affine_bicubic")
    assert layers == {3: 3000} and len(counts) == 10
    assert abs(geometry - 3000) < 200 and all(abs(count - 600) < 100 for count in counts.values())


def test_weighted_choice_does_not_repeat():
    policy, generator, counts = RandAugment("rand-m9-n2-tweights", (60, 72)), random.Random(0), Counter()
    for _ in range(2000):
        names = policy._choose(generator)
        assert len(set(names)) == 2
        counts.update(names)
    assert counts["Rotate"] > counts["ShearX"] > counts["TranslateXRel"] > counts["AutoContrast"] > counts["Invert"]


@pytest.mark.parametrize("policy", ["original", "v0r", "augmix-m5", "3a", "rand-m9-t3a", "rand-x9", "bogus"])
def test_policies_that_cannot_run_on_the_device_are_named(policy):
    with pytest.raises(ValueError, match=rf"^AUG\.AUTO_AUGMENT='{policy}' .*; set DATA\.PIPELINE official, or "):
        RandAugment(policy, (60, 72))


def test_colour_jitter_is_that_of_pillow():
    jitter, orders = ColorJitter(0.4), set()
    for seed, picture in enumerate(PICTURES):
        ops = jitter.draw(random.Random(seed))
        expected = Image.fromarray(picture)
        for name, (factor,) in ops:
            assert 0.6 <= factor <= 1.4
            expected = getattr(ImageEnhance, name.capitalize())(expected).enhance(factor)
        assert difference(augment(batch(picture), Plan.of([Draw(ops)]))[0], expected).max() == 0
        orders.add(tuple(name for name, _ in ops))
    assert len(orders) > 3
    assert not Augmentation((60, 72)).draw(random.Random(0)).ops
    assert len(Augmentation((60, 72), color_jitter=0.4).draw(random.Random(0)).ops) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_are_those_of_timm(count):
    ours, erased = RandomErasing(0.5, count, (40, 50)), 0
    theirs = TimmRandomErasing(0.5, mode="const", max_count=count, device="cpu")
    for seed in range(60):
        random.seed(seed)
        expected = theirs(torch.ones(3, 40, 50))
        boxes = ours.draw(random.Random(seed))
        plan = Plan.of([Draw(), Draw(boxes=boxes)])
        images = erase(torch.ones(2, 3, 40, 50), plan, "const")
        assert torch.equal(images[1], expected) and images[0].min() == 1
        erased += bool(boxes)
    assert 20 < erased < 40


def test_erased_boxes_are_filled_with_noise():
    boxes = [(5, 10, 20, 15), (12, 3, 9, 30)]
    inside = torch.zeros(40, 50, dtype=torch.bool)
    for top, left, h, w in boxes:
        inside[top : top + h, left : left + w] = True
    plain = torch.full((2, 3, 40, 50), 9.0)
    plans = [Plan.of([Draw(noise=noise), Draw(boxes=boxes)]) for noise in (1, 1, 2)]
    one, same, other = (erase(plain.clone(), plan, "pixel") for plan in plans)
    assert torch.equal(one, same) and torch.equal(one[0], plain[0]) and (one[1][:, ~inside] == 9).all()
    values = one[1][:, inside]
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1 and (values != other[1][:, inside]).all()
    rand = erase(plain.clone(), plans[0], "rand")[1]
    assert len(rand[:, 5:12, 10:25].flatten(1).unique(dim=1).T) == 1 and len(rand[:, 14, 4].unique()) == 3
    with pytest.raises(ValueError, match=r"AUG\.REMODE='noise'; choose from"):
        Finish(CPU, "noise")


# --- Batches on the device --------------------------------------------------------------------------------------------


def drawn(size: tuple[int, int], count: int, seed: int = 0) -> list[Draw]:
    augmentation = Augmentation(size, "rand-m9-n3-mstd0.5-inc1-p0.8", erasing=0.5, count=2)
    return [augmentation.draw(sample_generator(seed, 0, number)) for number in range(count)]


def test_a_batch_is_its_samples():
    pictures, draws = [photo(72, 60, seed) for seed in range(24)], drawn((60, 72), 24)
    together = augment(batch(*pictures), Plan.of(draws))
    for picture, draw, result in zip(pictures, draws, together, strict=True):
        alone = batch(picture)
        for op in draw.ops:
            alone = augment(alone, Plan.of([Draw([op])]))
        assert torch.equal(alone[0], result)


def test_a_plan_groups_draws():
    one, two = ("brightness", (0.5,)), ("posterize", (4,))
    plan = Plan.of(
        [Draw([one, two], [(1, 2, 3, 4)], 5), Draw([two]), Draw(), Draw([one], [(0, 0, 1, 1), (1, 1, 1, 1)])]
    )
    assert plan.steps == [("brightness", 0, 2), ("posterize", 2, 3), ("posterize", 3, 4)]
    assert plan.samples.tolist() == [0, 3, 1, 0] and plan.arguments[:, 0].tolist() == [0.5, 0.5, 4, 4]
    assert plan.rounds == [(0, 2), (2, 3)] and plan.boxes[:, 0].tolist() == [0, 3, 3] and plan.noise == 5
    empty = Plan.of([Draw(), Draw()])
    assert not empty.steps and empty.samples.shape == (0,) and empty.boxes.shape == (0, 5)


class NoReads(TorchDispatchMode):
    """Fails where a tensor's values decide what to do: on an accelerator the host would wait for them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(word in name for word in ("_local_scalar", "nonzero", "masked_select", "bincount", "unique")), (
            name
        )
        if name.startswith(("aten::index.", "aten::index_put")):
            assert all(index is None or index.dtype == torch.long for index in args[1]), name
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_from_the_device():
    images = batch(*(photo(72, 60, seed) for seed in range(64)))
    with NoReads():
        assert Finish(CPU)(images, Plan.of(drawn((60, 72), 64))).isfinite().shape == (64, 3, 60, 72)
    with pytest.raises(AssertionError), NoReads():
        images[images > 9]


class Photos(Dataset):
    """Items as `data.images.Images` gives them with `FastTrain`."""

    def __init__(self, transform: FastTrain, count: int = 22):
        self.transform, self.pictures = transform, [photo(70 + i, 60, i) for i in range(count)]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, item):
        epoch, number = item
        return self.transform(self.pictures[number], sample_generator(3, epoch, number)), number


def device_loader(workers: int) -> DeviceLoader:
    train = fast_train(policy=POLICY, erasing=0.5)
    loader = DataLoader(
        Photos(train), 4, sampler=TrainSampler(22), drop_last=True, num_workers=workers, collate_fn=collate,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return DeviceLoader(loader, "cpu")


def test_batches_are_the_same_for_any_number_of_workers():
    alone, several = device_loader(0), device_loader(2)
    assert len(alone) == 5 and alone.batch_size == 4 and len(alone.dataset) == 22
    for epoch in (0, 1):
        epochs = []
        for loader in (alone, several):
            loader.sampler.set_epoch(epoch)
            epochs.append(list(loader))
        for (images, labels), (others, numbers) in zip(*epochs, strict=True):
            assert images.shape == (4, 3, 48, 48) and images.dtype == torch.float32 and images.is_contiguous()
            assert torch.equal(images, others) and torch.equal(labels, numbers)


def test_an_epoch_may_end_early_and_start_in_its_middle():
    loader = device_loader(2)
    whole = [images for images, _ in loader]
    for _ in range(2):
        for step, (images, _) in enumerate(loader):
            assert torch.equal(images, whole[step])
            if step == 1:
                break
    loader.sampler.set_epoch(0, start=8)
    assert all(torch.equal(images, rest) for (images, _), rest in zip(loader, whole[2:], strict=True))


def test_finished_batches_pass_unchanged():
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=6)
    for result, numbers in DeviceLoader(loader, "cpu"):
        assert torch.equal(result, images) and torch.equal(numbers, labels)


def test_augmentation_keeps_the_mean_of_normalised_photographs():
    """The whole path beside the official one: statistics of 400 pictures from each."""
    config = make_config(None, "DATA.IMG_SIZE", 48)
    official, pixels = transforms.build_transform(True, config), photo(150, 100)
    train = fast_train(policy=POLICY, erasing=config.AUG.REPROB)
    ours = collate([(train(pixels, sample_generator(0, 0, number)), 0) for number in range(400)])
    ours = Finish(CPU, config.AUG.REMODE)(ours[0], ours[2])
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    theirs = torch.stack([official(Image.fromarray(pixels)) for _ in range(400)])
    for statistic in (torch.mean, torch.std):
        a, b = (statistic(images, dim=(0, 2, 3)) for images in (ours, theirs))
        assert (a - b).abs().max() < 5 * theirs.mean((2, 3)).std() / math.sqrt(400)


@pytest.mark.gpu
def test_an_accelerator_gives_what_the_cpu_gives():
    images = batch(*(photo(72, 60, seed) for seed in range(64)))
    draws, device = [draw._replace(boxes=()) for draw in drawn((60, 72), 64)], torch.device("cuda")
    expected = Finish(CPU)(images.clone(), Plan.of(draws))
    finish, plan, there = Finish(device), Plan.of(draws).pin_memory().to(device), images.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = finish(there, plan)
        erase(result.clone(), Plan.of(drawn((60, 72), 64)).pin_memory().to(device), "pixel")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ((result.cpu() - expected).abs() > 1e-5).float().mean() < 0.01  # rounding after geometry


@pytest.mark.gpu
def test_prefetched_batches_are_those_of_the_cpu():
    ahead, plain = DeviceLoader(device_loader(2).loader, "cuda"), device_loader(0).loader
    device = torch.device("cuda")
    finish = Finish(device)
    for (images, labels), (pixels, numbers, plan) in zip(ahead, plain, strict=True):
        assert images.is_cuda and torch.equal(labels.cpu(), numbers)
        assert torch.equal(images, finish(pixels.to(device), plan.to(device)))
