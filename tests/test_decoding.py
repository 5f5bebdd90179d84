"""Decoders: PIL's pixels and PIL's errors from each of them, whatever the file."""

import io
import pickle
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
import torchvision
from PIL import Image, ImageCms

from data import decoding
from data.decoding import DECODERS, as_pil, build_decoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

FAST = [name for name in DECODERS if name != "pil"]
ANY = pytest.mark.parametrize("name", DECODERS)


def photo(width: int = 157, height: int = 93, seed: int = 0) -> Image.Image:
    coarse = np.random.RandomState(seed).randint(0, 255, (height // 6, width // 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(name: str, data: bytes | np.ndarray) -> np.ndarray:
    decoded = DECODERS[name](data, "some/file.JPEG")
    assert isinstance(decoded, Image.Image if name == "pil" else np.ndarray)
    array = np.asarray(decoded)
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.flags.c_contiguous
    return array


def oracle(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


COMMON = {
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2, "quality": 60},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "rgb": {"keep_rgb": True, "quality": 90},
    "exif": {"exif": b"Exif\0\0" + b"\xff\xd8 thumbnail \xff\xd9"},
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", COMMON)
def test_jpeg_pixels_are_those_of_pil(name, kind):
    for width, height in ((157, 93), (16, 16), (7, 9), (1, 1)):
        data = encode(photo(max(width, 12), max(height, 12)).crop((0, 0, width, height)), **COMMON[kind])
        assert np.array_equal(pixels(name, data), oracle(data))


@pytest.mark.parametrize("name", FAST)
def test_fast_decoders_do_without_pil(name, monkeypatch):
    """cv2 leaves files of several scans to it."""
    files = [encode(photo(), **options) for kind, options in COMMON.items() if (name, kind) != ("cv2", "progressive")]
    files.append(encode(photo().convert("L")))
    monkeypatch.setattr(decoding, "decode_pil", None)
    assert all(pixels(name, data).shape == (93, 157, 3) for data in files)


RARE = {
    "grey JPEG": lambda: encode(photo().convert("L")),
    "CMYK JPEG": lambda: encode(photo().convert("CMYK")),
    "PNG": lambda: encode(photo(), "PNG"),
    "palette": lambda: encode(photo().quantize(16), "PNG"),
    "palette with transparency": lambda: encode(photo().quantize(16), "PNG", transparency=3),
    "alpha": lambda: encode(photo().convert("RGBA"), "PNG"),
    "grey with alpha": lambda: encode(photo().convert("LA"), "PNG"),
    "bits": lambda: encode(photo().convert("1"), "PNG"),
    "16-bit grey": lambda: cv2.imencode(".png", np.arange(0, 60000, 1000, np.uint16).reshape(6, 10))[1].tobytes(),
    "16-bit colour": lambda: cv2.imencode(".png", np.arange(0, 54000, 1000, np.uint16).reshape(3, 6, 3))[1].tobytes(),
    "GIF": lambda: encode(photo(), "GIF"),
    "animation": lambda: encode(photo(), "GIF", save_all=True, append_images=[photo(seed=1)]),
    "WebP": lambda: encode(photo(), "WEBP"),
    "BMP": lambda: encode(photo(), "BMP"),
    "TIFF": lambda: encode(photo(), "TIFF"),
}


@ANY
@pytest.mark.parametrize("kind", RARE)
def test_all_else_is_as_pil_converts_it(name, kind):
    data = RARE[kind]()
    assert np.array_equal(pixels(name, data), oracle(data))


@ANY
def test_what_conversion_means(name):
    original = np.asarray(photo()).astype(int)
    assert np.abs(pixels(name, encode(photo().convert("CMYK"), quality=95)) - original).mean() < 3  # not inverted
    grey = pixels(name, RARE["16-bit grey"]()).reshape(-1, 3)
    assert (grey[0] == 0).all() and (grey[1:] == 255).all()  # clipped: the second value is 1000
    color = pixels(name, RARE["16-bit colour"]())
    assert np.array_equal(color[..., ::-1].flatten(), np.arange(0, 54000, 1000) >> 8)  # cv2 writes BGR
    transparent = photo().convert("RGBA")
    transparent.putalpha(0)
    assert np.array_equal(pixels(name, encode(transparent, "PNG")), original)


@ANY
def test_rotation_and_profiles_are_ignored(name):
    plain = encode(photo())
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for data in (encode(photo(), exif=exif), encode(photo(), icc_profile=profile)):
        assert len(data) > len(plain) and np.array_equal(pixels(name, data), oracle(plain))


@ANY
@pytest.mark.parametrize("options", [{}, COMMON["progressive"], COMMON["exif"]])
def test_truncated_files_are_errors(name, options):
    data = encode(photo(), **options)
    for cut in [1, 2, 3, *range(10, len(data), 97)]:
        with pytest.raises(ValueError, match=r"^cannot decode some/file\.JPEG: .+; replace the file or delete it$"):
            pixels(name, data[: len(data) - cut])


@ANY
def test_corrupt_files_fare_as_with_pil(name):
    """Either the same pixels or the same error."""
    random, original = np.random.RandomState(3), encode(photo(60, 40))
    outcomes = set()
    for _ in range(300):
        data = bytearray(original)
        for _ in range(random.randint(1, 4)):
            data[random.randint(len(data))] = random.randint(256)
        results = []
        for decoder in (name, "pil"):
            try:
                results.append(pixels(decoder, bytes(data)).tobytes())
            except ValueError as err:
                results.append(str(err))
        assert results[0] == results[1]
        outcomes.add(type(results[0]))
    assert outcomes == {bytes, str}


NO_IMAGES = {
    "the file is empty": b"",
    "not an image of any format that Pillow knows": b"n01440764\tnot an image",
    "PostScript is not an image format here": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@ANY
@pytest.mark.parametrize("reason", NO_IMAGES)
def test_what_is_no_image_is_named(name, reason):
    with pytest.raises(ValueError, match=f"^cannot decode some/file.JPEG: {reason}; replace the file or delete it$"):
        pixels(name, NO_IMAGES[reason])


@ANY
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_by_their_header(name, kind):
    data = bytearray(encode(photo(), kind))
    if kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    else:
        data[16:24] = struct.pack(">II", 65000, 65000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ValueError, match=r"cannot decode some/file.JPEG: .*4225000000 pixels.*replace the file"):
        pixels(name, bytes(data))


@ANY
def test_the_limit_of_pixels_is_that_of_pil(name, monkeypatch):
    data = encode(photo(20, 10))
    for limit, accepted in ((200, True), (100, True), (99, False), (None, True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if not accepted:
            with pytest.raises(ValueError, match="200 pixels"):
                pixels(name, data)
        elif limit == 100:
            with pytest.warns(Image.DecompressionBombWarning):
                pixels(name, data)
        else:
            pixels(name, data)


@ANY
def test_stored_pixels_are_taken_as_they_are(name):
    stored = np.asarray(photo())
    assert np.array_equal(pixels(name, stored), stored)
    assert np.array_equal(np.asarray(as_pil(DECODERS[name](stored, "x"))), stored)


def test_decoders_are_chosen_by_name(monkeypatch):
    assert all(build_decoder(name) is DECODERS[name] for name in DECODERS)
    with pytest.raises(ValueError, match=r"DATA\.DECODER='gimp'; choose from \['pil', 'torchvision', 'cv2', 'simplejp"):
        build_decoder("gimp")
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with pytest.raises(ValueError, match=r"^DATA.DECODER='torchvision' needs .*, which is gone; choose cv2$"):
        build_decoder("torchvision")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    for use in (lambda: build_decoder("simplejpeg"), lambda: pixels("simplejpeg", encode(photo()))):
        with pytest.raises(ValueError, match=r"^DATA.DECODER='simplejpeg' needs .*; pip install simplejpeg, or "):
            use()


@ANY
def test_decoders_travel_to_workers(name):
    data = encode(photo())
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(DECODERS[name]))(data, "x")), oracle(data))
