"""Pictures beside the live processors of `transformers`, and bad ones, which raise ImageError and nothing else."""

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import transformers
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, features

from napo_jax.data import images
from napo_jax.data.images import ImageError, decode, fit, normalise

PROCESSORS = {"pad": transformers.LlavaImageProcessorPil, "crop": transformers.CLIPImageProcessorPil}
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")

# Wide, tall, odd differences to both sides of 336, one pixel, one row, tiny, exact, and the thinnest that is read.
SHAPES = [(640, 480), (480, 640), (337, 336), (335, 336), (341, 500), (500, 341), (1, 1), (1, 2), (7, 5), (2, 3)]
SHAPES += [(336, 336), (672, 336), (336, 100), (24, 1), (1, 24), (1000, 47), (47, 1000), (340, 900), (900, 340)]


def noise(width, height, channels=3):
    """Returns a picture that shows every shift by a pixel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng([width, height]).integers(0, 256, shape, np.uint8)


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pillow(data):
    """Decodes as the released code does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def official(rule, image, size=336, **options):
    """Returns what the processor of `transformers` makes of a picture, channels last."""
    processor = PROCESSORS[rule](
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **({"do_pad": True} if rule == "pad" else {}),
    )
    return np.asarray(processor(image, **options)["pixel_values"][0]).transpose(1, 2, 0)


def official_uint8(rule, image, size=336):
    return official(rule, image, size, do_rescale=False, do_normalize=False)


# --- fit and normalise


@pytest.mark.parametrize("rule", PROCESSORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pixels_are_those_of_the_official_processor(rule, shape):
    image = Image.fromarray(noise(*shape))
    pixels = fit(image, 336, rule)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, official_uint8(rule, image))


@pytest.mark.parametrize("rule", PROCESSORS)
def test_normalised_pixels_are_those_of_the_official_processor(rule):
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    expected = official(rule, image)
    for transform in (normalise, jax.jit(normalise)):
        normalised = transform(fit(image, 336, rule)[None, None])
        assert normalised.dtype == np.float32
        np.testing.assert_allclose(normalised[0, 0], expected, rtol=0, atol=1e-6)


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 70), st.sampled_from(["pad", "crop"]))
def test_any_shape_fits_any_square(width, height, size, rule):
    hypothesis.assume(max(width, height) <= images.MAX_RATIO * min(width, height))
    image = Image.fromarray(noise(width, height))
    np.testing.assert_array_equal(fit(image, size, rule), official_uint8(rule, image, size))


def one_step(
    rule, image, *, colour=images.PAD_COLOUR, offset=lambda gap: gap // 2, filtering=Image.Resampling.BICUBIC, whole=int
):
    """Fits a picture in one call of Pillow, with what can be got wrong as options."""
    if rule == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, tuple(offset(side - length) for length in image.size))
        return np.asarray(square.resize((336, 336), filtering))
    width, height = (whole(336 * length / min(image.size)) for length in image.size)
    left, top = offset(width - 336), offset(height - 336)
    return np.asarray(image.resize((width, height), filtering).crop((left, top, left + 336, top + 336)))


@pytest.mark.parametrize(
    ("rule", "shape", "wrong"),
    [
        ("pad", (500, 341), {"colour": (123, 117, 104)}),
        ("pad", (500, 341), {"colour": (0, 0, 0)}),
        ("pad", (500, 341), {"offset": lambda gap: (gap + 1) // 2}),
        ("pad", (500, 341), {"offset": lambda gap: 0}),
        ("pad", (500, 341), {"filtering": Image.Resampling.BILINEAR}),
        ("crop", (501, 341), {"whole": lambda length: int(np.ceil(length))}),
        ("crop", (501, 341), {"offset": lambda gap: (gap + 1) // 2}),
        ("crop", (501, 341), {"filtering": Image.Resampling.BILINEAR}),
    ],
)
def test_a_rule_gone_wrong_is_seen(rule, shape, wrong):
    image = Image.fromarray(noise(*shape))
    expected = official_uint8(rule, image)
    np.testing.assert_array_equal(one_step(rule, image), expected)
    assert not np.array_equal(one_step(rule, image, **wrong), expected)


def test_a_long_picture_is_padded_in_strips():
    image = Image.fromarray(noise(190, 4300))  # over 2**24 pixels as a square
    np.testing.assert_array_equal(fit(image, 336, "pad"), one_step("pad", image))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="one of pad, crop, got 'anyres'"):
        fit(Image.new("RGB", (2, 2)), 336, "anyres")


# --- decode


def with_palette(transparency):
    image = Image.fromarray(noise(40, 30)).quantize(16)
    return encode(image, transparency=transparency)


ENCODED = {
    "grayscale": encode(Image.fromarray(noise(40, 30, 1))),
    "grayscale16": encode(Image.fromarray(noise(40, 30, 1).astype(np.uint16) * 257)),
    "grayscale_alpha": encode(Image.fromarray(noise(40, 30, 2))),
    "rgba": encode(Image.fromarray(noise(40, 30, 4))),
    "palette": with_palette(None),
    "palette_transparent": with_palette(3),
    "palette_alpha": with_palette(bytes(range(16))),
    "rgb_transparent": encode(Image.fromarray(noise(40, 30)), transparency=(1, 2, 3)),
    "bilevel": encode(Image.fromarray(noise(40, 30, 1) > 127)),
    "cmyk": encode(Image.frombytes("CMYK", (40, 30), noise(40, 30, 4).tobytes()), "JPEG"),
    "webp_alpha": encode(Image.fromarray(noise(40, 30, 4)), "WEBP", lossless=True),
    "gif_transparent": encode(Image.fromarray(noise(40, 30)).quantize(16), "GIF", transparency=3),
} | {form: encode(Image.fromarray(noise(40, 30)), form) for form in FORMATS}


@pytest.mark.parametrize("kind", ENCODED)
def test_every_kind_of_picture_is_read_as_the_released_code_reads_it(kind):
    image = decode(ENCODED[kind])  # a warning would be an error here
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(image), pillow(ENCODED[kind]))
    for rule in PROCESSORS:
        np.testing.assert_array_equal(
            fit(image, 336, rule), official_uint8(rule, Image.fromarray(pillow(ENCODED[kind])))
        )


def test_alpha_is_dropped_and_not_laid_on_a_background():
    pixels = np.uint8([[[200, 10, 20, 0], [1, 2, 3, 128]]])
    assert np.asarray(decode(encode(Image.fromarray(pixels)))).tolist() == [[[200, 10, 20], [1, 2, 3]]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(form):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, form, save_all=True, append_images=[second], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(first))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_only_when_asked(orientation):
    pixels = noise(5, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(data)), pixels)
    # The side of the picture that the first row is, and the first column: as the EXIF standard words it.
    upright = {
        1: pixels,  # top, left
        2: pixels[:, ::-1],  # top, right
        3: pixels[::-1, ::-1],  # bottom, right
        4: pixels[::-1],  # bottom, left
        5: pixels.swapaxes(0, 1),  # left, top
        6: pixels.swapaxes(0, 1)[:, ::-1],  # right, top
        7: pixels.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
        8: pixels.swapaxes(0, 1)[::-1],  # left, bottom
    }[orientation]
    np.testing.assert_array_equal(np.asarray(decode(data, exif=True)), upright)


# --- bad pictures


def claiming(width, height):
    """Returns a PNG whose header claims a size that its pixels do not have."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def reason(data, **options):
    """Returns why a picture is refused."""
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "image_empty"),
        (b"\0", "image_unreadable"),
        (b"<html>404</html>", "image_unreadable"),
        (ENCODED["PNG"][:20], "image_unreadable"),
        (ENCODED["PNG"][:-100], "image_truncated"),
        (ENCODED["JPEG"][:-100], "image_truncated"),
        (ENCODED["PNG"][:200] + b"\xff" + ENCODED["PNG"][201:], "image_truncated"),
        (claiming(60000, 60000), "image_too_large"),
        (claiming(8193, 8192), "image_too_large"),
        (claiming(8192, 8192), "image_truncated"),
        (claiming(3000, 2), "image_too_thin"),
        (claiming(2, 3000), "image_too_thin"),
        (claiming(25, 1), "image_too_thin"),
        (claiming(0, 5), "image_unreadable"),
        (encode(Image.new("RGB", (8, 8)), "EPS"), "image_unreadable"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "image_unreadable"),
    ],
    ids=range(16),
)
def test_a_bad_picture_has_a_reason(data, expected):
    assert reason(data) == expected


def test_the_longest_and_thinnest_pictures_are_read():
    for size in [(24, 1), (1, 24)]:
        assert decode(claiming(*size)).size == size


def test_exif_that_is_no_exif_matters_only_when_asked_for():
    data = encode(Image.new("RGB", (5, 3)), exif=b"garbage")
    assert decode(data).size == (5, 3)
    assert reason(data, exif=True) == "image_unreadable"


@pytest.mark.parametrize("size", [(60000, 60000), (10000, 9000), (8193, 8192)])
def test_a_bomb_is_refused_by_its_header_and_in_silence(size, monkeypatch):
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: loads.append(image.size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert reason(claiming(*size)) == "image_too_large"
    assert not loads
    assert not caught


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_cut_anywhere_is_refused_or_whole(form):
    data = ENCODED[form]
    refused = 0
    for length in [*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 30, len(data))]:
        try:
            image = decode(data[:length])
        except ImageError:
            refused += 1
        else:  # only what comes after the pixels is missing
            np.testing.assert_array_equal(np.asarray(image), pillow(data))
    assert refused > 60


def test_random_bytes_raise_image_error_or_nothing():
    rng = np.random.default_rng(0)
    outcomes = []
    for turn in range(1200):
        data = bytearray(list(ENCODED.values())[turn % len(ENCODED)])
        if turn % 3:  # a picture with some bytes changed
            for place in rng.integers(0, len(data), rng.integers(1, 9)):
                data[place] = rng.integers(256)
        else:  # a header, or half of one, and then noise
            data = data[: rng.integers(40)] + rng.bytes(rng.integers(300))
        try:
            outcomes.append(decode(bytes(data), exif=bool(turn % 2)).mode)
        except ImageError as error:
            outcomes.append(error.reason)
    assert {"RGB", "image_unreadable", "image_truncated"} <= set(outcomes)


def test_an_error_can_be_sent_by_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageError("image_empty", "no bytes")))
    assert (error.reason, str(error)) == ("image_empty", "no bytes")


def test_threads_decode_at_once_and_leave_pillow_as_it_was():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    kinds = list(ENCODED) * 10
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda kind: np.asarray(decode(ENCODED[kind])), kinds))
    for kind, pixels in zip(kinds, decoded, strict=True):
        np.testing.assert_array_equal(pixels, pillow(ENCODED[kind]))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_want_of_memory_is_no_fault_of_the_picture(monkeypatch):
    """Counted as damaged, a good row would be lost for good."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")

    def short(*_):
        raise MemoryError

    for name in ("_open", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(PngImagePlugin.PngImageFile, name, short)
            with pytest.raises(MemoryError):
                decode(data.getvalue())
