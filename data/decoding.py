"""Encoded images to RGB pixels, by the decoder that ``DATA.DECODER`` names.

``pil`` is the official one and the judge. The others decode common JPEG files (8 bits, Huffman-coded, one or three
colour components) with the same pixels, faster; whatever else they meet goes to PIL, and so does a file that they
refuse. So all decoders accept the same files and give the same pixels.

What PIL's ``convert("RGB")`` means for unusual files: colour profiles and EXIF rotation are ignored; CMYK and YCCK
become RGB by plain subtraction, Adobe's inverted ones included; 16-bit grey is clipped at 255 rather than scaled, while
16-bit colour keeps its high bytes; palettes are looked up; alpha is dropped without blending, and so is a palette's
transparent entry; grey is repeated; of an animation the first frame counts. A truncated file is an error, and so are
more pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
"""

import io
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

Encoded = bytes | np.ndarray  # a file's bytes, or pixels (H, W, 3), uint8, from a source that stores them so

POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
# Frames of baseline, extended and progressive Huffman coding; not all libraries know the other, rare ones.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
READ_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11; before, it gives BGR alone
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
SCAN_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within coded data: neither an escaped 255 nor a restart


def decode_pil(data: Encoded, name: str) -> Image.Image:
    """The image as RGB. Raises ``ValueError`` with ``name`` and the reason where it cannot be decoded."""
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    if not len(data):
        raise _undecodable(name, "the file is empty")
    if bytes(data[:4]).startswith(POSTSCRIPT):  # Pillow would start Ghostscript on it
        raise _undecodable(name, "PostScript is not an image format here")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGB":
                return image.convert("RGB")
            image.load()
            return image  # itself: converting it would copy it
    except UnidentifiedImageError as err:
        raise _undecodable(name, "not an image of any format that Pillow knows") from err
    except Exception as err:  # on corrupt data Pillow's plug-ins raise almost anything
        raise _undecodable(name, str(err) or type(err).__name__) from err


def decode_fast(read: Callable[[bytes, int], np.ndarray | None], data: Encoded, name: str) -> np.ndarray:
    """Pixels (H, W, 3), uint8, RGB, by ``read`` where it is sure to give PIL's, else by PIL. Errors as `decode_pil`."""
    if isinstance(data, np.ndarray):
        return data
    frame = _common_jpeg(data)
    pixels = read(data, frame) if frame else None
    return np.array(decode_pil(data, name)) if pixels is None else pixels


def as_pil(image: np.ndarray | Image.Image) -> Image.Image:
    """What any decoder gave, as the PIL image that the official transforms take."""
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _common_jpeg(data: bytes) -> int:
    """Where the frame header is, if the fast decoders agree with PIL on these bytes; else 0.

    Walks the header's segments and decodes nothing. A file without the end marker is truncated, and some libraries
    would fill it up with grey. The marker is looked for after the frame header, since thumbnails in the segments before
    have markers of their own. Sizes that PIL warns of or refuses are left to PIL.
    """
    if data[:2] != b"\xff\xd8":
        return 0
    at, last = 2, len(data) - 10
    while at <= last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in HUFFMAN_FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            limit = Image.MAX_IMAGE_PIXELS or height * width
            usual = data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= limit
            return at if usual and data.rfind(END_OF_IMAGE, at) >= 0 else 0
        elif marker in OTHER_FRAMES or marker == 0xDA:
            return 0
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _read_torchvision(data: bytes, frame: int) -> np.ndarray | None:
    package = _torchvision()
    try:  # a copy, since torch warns of memory that it may not write to
        pixels = package.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), package.ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels.permute(1, 2, 0).numpy()  # in memory it is (H, W, 3) already


def _read_cv2(data: bytes, frame: int) -> np.ndarray | None:
    # cv2 gives an image even where a broken marker ends the data early, so it gets what has one scan without any.
    scan = data.find(START_OF_SCAN, frame)
    marker = SCAN_MARKER.search(data, scan + 2)
    if scan < 0 or not marker or marker.group() != END_OF_IMAGE:
        return None
    mode = cv2.IMREAD_COLOR if READ_RGB is None else READ_RGB
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels is not None and READ_RGB is None else pixels


def _read_simplejpeg(data: bytes, frame: int) -> np.ndarray | None:
    package = _simplejpeg()
    try:
        return package.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def _torchvision() -> ModuleType:
    from torchvision import io  # 0.29 says that a later version will have no decoders

    if not hasattr(io, "decode_jpeg"):
        raise ValueError("DATA.DECODER='torchvision' needs torchvision's decode_jpeg, which is gone; choose cv2")
    return io


def _simplejpeg() -> ModuleType:
    try:
        import simplejpeg
    except ImportError as err:
        raise ValueError(
            "DATA.DECODER='simplejpeg' needs a package that is not installed; pip install simplejpeg, or choose cv2"
        ) from err
    return simplejpeg


def _undecodable(name: str, reason: str) -> ValueError:
    return ValueError(f"cannot decode {name}: {' '.join(reason.split())}; replace the file or delete it")


# Each is called with a source's data and the sample's name. pil gives a PIL image, the others pixels (H, W, 3), uint8.
DECODERS: dict[str, Callable[[Encoded, str], Image.Image | np.ndarray]] = {
    "pil": decode_pil,
    "torchvision": partial(decode_fast, _read_torchvision),
    "cv2": partial(decode_fast, _read_cv2),
    "simplejpeg": partial(decode_fast, _read_simplejpeg),
}
# Those that an installation may lack.
PACKAGES: dict[str, Callable[[], ModuleType]] = {"torchvision": _torchvision, "simplejpeg": _simplejpeg}


def build_decoder(name: str) -> Callable[[Encoded, str], Image.Image | np.ndarray]:
    """The decoder of that name. Raises ``ValueError`` where it is unknown or its package is not installed."""
    if name not in DECODERS:
        raise ValueError(f"DATA.DECODER={name!r}; choose from {list(DECODERS)}")
    if name in PACKAGES:
        PACKAGES[name]()
    return DECODERS[name]
