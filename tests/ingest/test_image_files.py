"""From the bytes of image files to arrays of one size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from support.golden import GOLDEN
from support.images import encoded, image, odd_images

from diffit_jax.errors import UserError
from diffit_jax.ingest.decoding import DecodeError, Preprocessing, decode, frame

ODD = odd_images()


def test_adms_centre_crop_is_the_originals_bit_for_bit():
    """Of two photos at seven sizes, one of them narrow, one smaller than the crop."""
    china, flower = load_sample_images().images
    photos = {
        "china": china,
        "flower_tall": np.ascontiguousarray(flower.transpose(1, 0, 2)[:, :300]),
        "flower_small": np.ascontiguousarray(flower[:130, :97]),
    }
    golden = np.load(Path(GOLDEN) / "adm_center_crop.npz")
    names = [name for name in golden.files if name != "pillow"]
    assert len(names) == 7
    for name in names:
        photo, _, size = name.rpartition("_")
        ours, _ = frame(photos[photo], Preprocessing("adm", int(size)))
        np.testing.assert_array_equal(ours, golden[name])


def test_adms_crop_is_not_a_plain_resize():
    """The test above would see it: without boxes first, thousands of pixels differ."""
    china = load_sample_images().images[0]
    golden = np.load(Path(GOLDEN) / "adm_center_crop.npz")["china_64"]
    assert (frame(china, Preprocessing("center", 64))[0] != golden).sum() > 1000


@pytest.mark.parametrize("name", ODD, ids=lambda name: name.encode("ascii", "replace").decode())
def test_odd_images_become_what_the_page_says(name):
    content, expected = ODD[name]
    preprocessing = Preprocessing("resize", 32) if name == "one.png" else Preprocessing()
    if isinstance(expected, str):
        with pytest.raises(DecodeError, match=f"(?i){expected}"):
            decode(content, preprocessing, name)
        return
    notes, some = expected
    pixels, found = decode(content, preprocessing, name)
    assert found == notes and pixels.dtype == np.uint8 and pixels.shape[-1] == 3
    for place, colour in some.items():
        # A JPEG's colours are off by a level or two.
        np.testing.assert_allclose(pixels[place].astype(int), np.array(colour), atol=3)


def test_exif_is_left_alone_where_that_is_asked_for():
    """As ADM and DiT do."""
    content, _ = ODD["turned.jpg"]
    stored, notes = decode(content, Preprocessing(upright=False), "turned.jpg")
    assert stored.shape == (32, 40, 3) and notes == []
    assert decode(content, Preprocessing(), "turned.jpg")[0].shape == (40, 32, 3)


def test_grey_data_sets_have_one_channel():
    pixels, notes = decode(encoded(image(0)), Preprocessing(channels=1))
    assert pixels.shape == (32, 40, 1) and notes == []
    expected = np.asarray(Image.fromarray(image(0)).convert("L"))
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize("crop", ["center", "adm", "resize"])
@pytest.mark.parametrize(("width", "height"), [(40, 32), (32, 40), (7, 90), (16, 16), (1, 1)])
def test_every_crop_gives_its_size(crop, width, height):
    pixels, notes = frame(image(1, width, height), Preprocessing(crop, 16))
    assert pixels.shape == (16, 16, 3)
    assert ("enlarged" in notes) == (min(width, height) < 16)


def test_edms_resize_leaves_what_has_the_size():
    pixels = image(1, 16, 16)
    for crop in ("center", "resize"):
        np.testing.assert_array_equal(frame(pixels, Preprocessing(crop, 16))[0], pixels)


def test_edms_crops_differ_by_what_is_cut_off():
    """Of an image whose sides are a band each: the square in the middle has none of it, the resize
    all."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :12] = pixels[:, 36:] = 255
    assert frame(pixels, Preprocessing("center", 16))[0].max() == 0
    assert abs(int(frame(pixels, Preprocessing("resize", 16))[0].mean()) - 127) < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adm", 0), "--crop adm and --size 0 do not go together"),
        (("none", 64), "--crop none and --size 64 do not go together"),
        (("middle", 64), "--crop middle is unknown: use none, center, adm, resize"),
        (("adm", 64, 2), "--channels 1 or 3"),
    ],
)
def test_impossible_framings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(*arguments)
