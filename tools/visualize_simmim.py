"""Show what a model that SimMIM has pre-trained fills in: a PNG of uncovered, masked and completed images, one a row.

python tools/visualize_simmim.py --cfg configs/simmim/simmim_pretrain__….yaml --resume FILE.pth photo.jpg folder \
    --output grid.png

Of a folder DATA.WATCHED_IMAGES images are shown, evenly spaced. Colours of the completed images are those predicted
where pixels are hidden, and the images' own elsewhere. The loss of each image is printed beside its name.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed
import utils
from config import get_config
from data.data_simmim_pt import build_mask_generator, spread, steady_transform
from data.decoding import decode_pil
from data.sources import ImageTree
from launch import USER_ERRORS, Session, pick_amp_dtype
from models import build_model
from reconstruction import reconstruct, write_png

logger = logging.getLogger("visualize_simmim")


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        check_target(args.target, args.force)
        visualize(get_config(args), args.images, args.seed, args.target)
    except USER_ERRORS as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="an image, or a folder with images")
    add("--cfg", metavar="FILE", required=True, help="YAML configuration of the pre-training")
    add("--opts", metavar=("KEY", "VALUE"), nargs="+", help="keys to override, as KEY VALUE pairs")
    add("--resume", metavar="FILE", required=True, help="checkpoint of main_simmim_pt.py")
    add("--seed", type=int, default=0, help="of the masks (default: 0)")
    add("--mask-ratio", type=float, metavar="R", help="share of the image to hide (DATA.MASK_RATIO)")
    add("--mask-patch-size", type=int, metavar="N", help="side, in pixels, of what is hidden (DATA.MASK_PATCH_SIZE)")
    add("--output", metavar="FILE", dest="target", type=Path, required=True, help="the file to write, FILE.png")
    add("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    # Behind the pairs of --opts, which they override.
    given = {"DATA.MASK_RATIO": args.mask_ratio, "DATA.MASK_PATCH_SIZE": args.mask_patch_size}
    args.opts = [*(args.opts or []), *(str(x) for pair in given.items() if pair[1] is not None for x in pair)]
    return args


def check_target(target: Path, force: bool) -> None:
    """Raise ``ValueError`` or ``OSError`` where ``target`` is no place to write to."""
    if target.suffix.lower() != ".png":
        raise ValueError(f"--output {target}: choose a name that ends in .png")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--output {target}: {target.parent} is not a folder")
    if target.is_dir():
        raise IsADirectoryError(f"--output {target} is a folder; choose another name")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another --output, or replace it with --force")


def visualize(config: Any, images: Sequence[Path], seed: int, target: Path) -> Tensor:
    """Write ``target``, and log the loss of each image with its name. Returns the losses (N,).

    Args:
        config: the pre-training's, with the weights' file as ``MODEL.RESUME``.
        images: files and folders.
        seed: of the masks; 0 gives those that pre-training itself shows.

    Raises ``ValueError`` or ``OSError`` for images that cannot be used, masks that do not fit, other weights.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: choose a number from 0 to {2**32 - 1}")
    masks, paths = build_mask_generator(config), find_images(images, config.DATA.WATCHED_IMAGES)
    model = load_model(config)
    transform, generator = steady_transform(config), np.random.RandomState(seed)
    pictures = torch.stack([transform(decode_pil(path.read_bytes(), str(path))) for path in paths])
    drawn = torch.from_numpy(np.stack([masks(generator) for _ in paths]))
    device = distributed.pick_device()
    session = Session(config, device, pick_amp_dtype(config, device), logger)
    losses, grid = reconstruct(session, model.to(device), pictures, drawn)
    write_png(grid, target)
    for path, loss in zip(paths, losses.tolist(), strict=True):
        logger.info(f"{path}: loss {loss:.4f}")
    logger.info(f"{target}: {len(paths)} image(s), each uncovered, masked, completed; mean loss {losses.mean():.4f}")
    return losses


def find_images(places: Sequence[Path], count: int) -> list[Path]:
    """The files among ``places``, and at most ``count`` images of each folder, evenly spaced, in the given order.

    Raises ``FileNotFoundError`` for a place that is not there, or a folder without images.
    """
    found = []
    for place in places:
        if place.is_dir():
            tree = ImageTree(place)
            found += [Path(tree.paths[number]) for number in spread(tree, count)]
        elif place.exists():
            found.append(place)
        else:
            raise FileNotFoundError(f"{place}: no such image or folder")
    return found


def load_model(config: Any) -> torch.nn.Module:
    """The pre-training model of ``config`` with exactly the weights of ``MODEL.RESUME``.

    Raises ``ValueError`` or ``OSError`` where the file is missing, broken or of another model.
    """
    model, quiet = build_model(config, is_pretrain=True), logging.getLogger("visualize_simmim.weights")
    quiet.setLevel(logging.ERROR)  # the error's one line says enough; a training's log lists every weight
    utils.resume(config, model, None, None, None, quiet)
    return model


if __name__ == "__main__":
    main()
