"""The picture of what SimMIM fills in: whose pixels are where, which images and masks, and errors in one line."""

import logging
import re
import sys

import numpy as np
import pytest
import torch
from conftest import EMPTY_CONFIG, SMALL, fill, make_config, write_images
from PIL import Image

from data.data_simmim_pt import reconstruction_samples
from models import build_model
from tools import visualize_simmim as tool

SIDE, GAP = 16, 2  # pixels of an image, and between the grid's images
OPTS = [*SMALL, "DATA.MASK_PATCH_SIZE", 4, "DATA.MASK_RATIO", 0.5, "DATA.WATCHED_IMAGES", 5]


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of pre-training, in the folder where the tests look for everything."""
    model = fill(build_model(make_config(None, *OPTS), is_pretrain=True))
    torch.save({"model": model.state_dict(), "epoch": 0}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def images(tmp_path, weights):
    """Nine images of the size of the model's, in three folders."""
    write_images(tmp_path / "images", ["ant", "bee", "cat"], 3)
    return tmp_path / "images"


@pytest.fixture
def call(monkeypatch, capsys, caplog, tmp_path, weights):
    """Run the tool on images, with further arguments; returns its log."""

    def run(*arguments, opts=()):
        every = map(str, [*OPTS, *opts])
        first = ["tool", "--cfg", str(EMPTY_CONFIG), "--resume", str(weights)]
        monkeypatch.setattr(sys, "argv", [*first, *map(str, arguments), "--opts", *every])
        caplog.clear()
        caplog.set_level(logging.INFO)
        tool.main()
        return caplog.text

    return run


def cells(path) -> np.ndarray:
    """Rows and columns of a grid's images: (N, 3, SIDE, SIDE, colours)."""
    grid = np.array(Image.open(path)).astype(int)
    step = SIDE + GAP
    rows, columns = ((length - GAP) // step for length in grid.shape[:2])
    assert columns == 3 and grid.shape == (rows * step + GAP, columns * step + GAP, 3)
    return np.stack(
        [
            [grid[GAP + r * step : (r + 1) * step, GAP + c * step : (c + 1) * step] for c in range(columns)]
            for r in range(rows)
        ]
    )


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB")).astype(int)


def hidden(masked: np.ndarray) -> np.ndarray:
    """Where an image (SIDE, SIDE, 3) shows the mean colour: that of the squares that are hidden."""
    return (masked == [124, 116, 104]).all(-1)


def test_visible_pixels_are_the_images_and_hidden_ones_are_filled_in(call, images, tmp_path):
    paths = [images / "cat/0.png", images / "ant/2.png"]
    log = call(*paths, "--output", tmp_path / "grid.png")
    for path, (whole, masked, completed) in zip(paths, cells(tmp_path / "grid.png"), strict=True):
        assert np.array_equal(whole, pixels(path))
        mask = hidden(masked)
        squares = mask.reshape(4, 4, 4, 4)
        assert mask.sum() == SIDE * SIDE // 2 and (squares == squares[:, :1, :, :1]).all()
        assert np.array_equal(masked[~mask], whole[~mask]) and np.array_equal(completed[~mask], whole[~mask])
        assert (completed[mask] != whole[mask]).any(-1).mean() > 0.9
        assert not np.array_equal(completed[mask], masked[mask])
    assert [name for name, _ in re.findall(r"(\S+): loss (\d\.\d{4})\n", log)] == list(map(str, paths))


def test_losses_are_those_of_the_model(images, weights):
    paths = [images / "cat/0.png", images / "ant/2.png"]
    config = make_config(None, *OPTS, resume=str(weights))
    losses = tool.visualize(config, paths, 3, weights.with_name("grid.png"))
    model = tool.load_model(config).eval()
    for path, loss, (whole, masked, _) in zip(paths, losses, cells(weights.with_name("grid.png")), strict=True):
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        image = torch.from_numpy((whole / 255 - mean) / deviation).permute(2, 0, 1)[None].float()
        mask = torch.from_numpy(hidden(masked)[None, ::2, ::2].astype(np.int64))  # patches of 2 pixels
        assert loss.item() == pytest.approx(model(image, mask).item(), rel=1e-4), path


def test_seeds_choose_masks_and_the_first_are_those_of_pretraining(call, images, tmp_path):
    grids = {}
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        call(images, "--seed", seed, "--output", tmp_path / f"{name}.png")
        grids[name] = (tmp_path / f"{name}.png").read_bytes()
    assert grids["a"] == grids["c"] != grids["b"]
    shown = cells(tmp_path / "a.png")
    data = ["DATA.DATA_PATH", str(images)]
    expected, masks = reconstruction_samples(make_config(None, *OPTS, *data), 5)
    assert len(shown) == len(expected) == 5
    for (whole, masked, _), image, mask in zip(shown, expected, masks, strict=True):
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        assert np.array_equal(whole, (image.permute(1, 2, 0) * deviation + mean).mul(255).round().int().numpy())
        assert np.array_equal(hidden(masked), mask.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy() == 1)


def test_flags_override_the_configuration_of_masks(call, images, tmp_path):
    call(images / "ant", "--mask-ratio", 0.25, "--mask-patch-size", 8, "--output", tmp_path / "grid.png")
    for _, masked, _ in cells(tmp_path / "grid.png"):
        squares = hidden(masked).reshape(2, 8, 2, 8).all((1, 3))
        assert hidden(masked).sum() == 64 and squares.sum() == 1


def test_nothing_is_overwritten_unless_asked(call, images, tmp_path):
    target = tmp_path / "grid.png"
    target.write_text("precious")
    with pytest.raises(SystemExit, match=r"grid\.png exists; .* --force"):
        call(images, "--output", target)
    assert target.read_text() == "precious"
    call(images, "--output", target, "--force")
    assert len(cells(target)) == 5


@pytest.mark.parametrize(
    ("arguments", "opts", "message"),
    [
        (["images/ant/9.png"], [], r"images/ant/9\.png: no such image or folder"),
        (["empty"], [], r"empty: no images in it"),
        (["weights.pth"], [], r"weights\.pth: not an image"),
        (["images", "--mask-ratio", 1.0], [], r"DATA\.MASK_RATIO=1\.0; it must be above 0 and below 1"),
        (["images", "--mask-ratio", 0.0], [], r"DATA\.MASK_RATIO=0\.0; it must be above 0 and below 1"),
        (["images", "--mask-patch-size", 5], [], r"DATA\.MASK_PATCH_SIZE=5 must be a multiple of .* from \[2, 4, 8, "),
        (["images", "--seed", -1], [], r"--seed -1: choose a number from 0"),
        (["images", "--resume", "nowhere.pth"], [], r"nowhere\.pth: no such checkpoint"),
        (
            ["images"],
            ["MODEL.SWIN.EMBED_DIM", 16],
            r"weights\.pth: its model has MODEL\.SWIN\.EMBED_DIM=8, this one 16",
        ),
        (
            ["images"],
            ["MODEL.SWIN.WINDOW_SIZE", 2],
            r"weights\.pth: its weights are not this model's: .*of another sha",
        ),
        (["images", "--resume", "classifier.pth"], [], r"classifier\.pth: its weights are not this model's: .*missing"),
        (["images"], ["MODEL.TYPE", "swin_mlp"], r"MODEL\.TYPE='swin_mlp' cannot be pre-trained by SimMIM"),
        (["images", "--output", "grid.jpg"], [], r"--output grid\.jpg: choose a name that ends in \.png"),
        (["images", "--output", "nowhere/grid.png"], [], r"nowhere is not a folder"),
    ],
)
def test_errors_are_one_line(call, images, tmp_path, monkeypatch, caplog, arguments, opts, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    classifier = build_model(make_config(None, *OPTS, "MODEL.NUM_CLASSES", 3))
    torch.save({"model": classifier.state_dict()}, "classifier.pth")
    target = [] if "--output" in arguments else ["--output", "grid.png"]
    with pytest.raises(SystemExit, match=message) as caught:
        call(*arguments, *target, opts=opts)
    assert not caplog.records and "\n" not in str(caught.value)
    assert str(caught.value).startswith("visualize_simmim.py: error: ")
    assert not (tmp_path / "grid.png").exists()
