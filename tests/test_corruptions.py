"""Image variants beside NumPy and PyTorch twins, and beside themselves in other batches and on other devices."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit

from napo_jax.data import corruptions
from napo_jax.data.corruptions import ABAR, BATCH_DEPENDENT, VARIANTS, image_variants

SIZE, BATCH = 56, 8
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])

IMAGES = np.random.default_rng(0).normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
SEEDS = np.arange(BATCH, dtype=np.uint32) * 0x22222222 + 7  # up to the top bit
MASKS = np.random.default_rng(1).random((BATCH, 4, 4)) < 0.4
MASKS[3] = False


OTHERS = IMAGES[::-1].copy()


@quick_jit
def all_variants(images, seeds, masks, others):
    return image_variants(images, seeds, VARIANTS, masks=masks, rejected_images=others)


@functools.cache
def variants():
    """Returns {name: float32[B, S, S, 3]} of the batch above."""
    made = np.asarray(all_variants(IMAGES, SEEDS, MASKS, OTHERS))
    assert made.dtype == np.float32
    return dict(zip(VARIANTS, made.swapaxes(0, 1), strict=True))


def make(name, images=IMAGES, seeds=SEEDS, **options):
    """Returns one variant of a batch."""
    run = quick_jit(lambda images, seeds: image_variants(images, seeds, (name,), **options))
    return np.asarray(run(images, seeds))[:, 0]


def draw(count, function):
    """Returns what a function of a key makes of many keys."""
    keys = jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))
    return jax.tree.map(np.asarray, quick_jit(jax.vmap(function))(keys))


def distance(a, b):
    """Returns the largest gap between two empirical distributions (Kolmogorov and Smirnov's)."""
    points = np.concatenate([a, b])
    share = lambda sample: np.searchsorted(np.sort(sample), points, side="right") / len(sample)
    return np.abs(share(a) - share(b)).max()


# --- what a variant may depend on


def test_a_record_has_the_same_variants_in_any_company_and_place():
    order = np.array([5, 0, 3])
    made = np.asarray(all_variants(IMAGES[order], SEEDS[order], MASKS[order], OTHERS[order])).swapaxes(0, 1)
    same = {name for name, image in zip(VARIANTS, made, strict=True) if np.array_equal(image, variants()[name][order])}
    assert set(VARIANTS) - same == BATCH_DEPENDENT == {"swap"}


def test_variants_are_the_same_over_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    made = all_variants(*jax.device_put((IMAGES, SEEDS, MASKS, OTHERS), sharding))
    for name, image in zip(VARIANTS, np.asarray(made).swapaxes(0, 1), strict=True):
        np.testing.assert_array_equal(image, variants()[name], err_msg=name)


def test_variants_do_not_depend_on_the_compiler():
    names = ("crop", "diffusion", "rotate")
    made = jax.jit(lambda images, seeds: image_variants(images, seeds, names))(IMAGES[:2], SEEDS[:2])
    for name, image in zip(names, np.asarray(made).swapaxes(0, 1), strict=True):
        np.testing.assert_allclose(image, variants()[name][:2], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "name", ["crop", "diffusion", "diffusion_pixels", "region", "noise", "rotate", "shuffle_patches"]
)
def test_the_seed_decides(name):
    same_picture = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    seeds = SEEDS.copy()
    seeds[1] = seeds[0]
    made = make(name, same_picture, seeds, **({"masks": np.ones((BATCH, 1, 1), bool)} if name == "region" else {}))
    np.testing.assert_array_equal(made[0], made[1])
    for other in made[2:]:
        assert np.mean(other != made[0]) > 0.3


def test_a_rejected_picture_is_the_records_own():
    np.testing.assert_array_equal(variants()["rejected_image"], OTHERS)


def test_the_reference_draws_a_crop_anew_where_it_is_asked_to():
    """As released, mDPO crops in each forward pass: policy and reference see two crops. Elsewhere they see one."""
    for name in ("crop", "crop_anew", "diffusion"):
        same = np.array_equal(make(name), make(name, reference=True))
        assert same == (name != "crop_anew"), name
    assert not np.array_equal(make("crop"), make("crop_anew"))


def test_no_two_variants_of_a_record_share_noise():
    a, b = np.sqrt(ABAR[500]), np.sqrt(1 - ABAR[500])
    draws = {name: make(name, masks=np.ones((BATCH, 1, 1), bool)) for name in ("noise", "diffusion", "region")}
    draws = [draws["noise"], (draws["diffusion"] - a * IMAGES) / b, (draws["region"] - a * IMAGES) / b]
    correlations = np.corrcoef([noise.ravel() for noise in draws])
    np.testing.assert_allclose(correlations, np.eye(3), atol=0.02)


def test_the_key_is_of_the_seed_and_the_name_alone():
    key = jax.random.fold_in(jax.random.key(SEEDS[4], impl="threefry2x32"), zlib.crc32(b"noise"))
    expected = jax.random.normal(key, (SIZE, SIZE, 3), jnp.float32)
    np.testing.assert_allclose(variants()["noise"][4], expected, rtol=0, atol=2e-6)
    with jax.default_prng_impl("rbg"):  # whose numbers change with the size of a batch
        np.testing.assert_array_equal(make("noise"), variants()["noise"])


# --- diffusion and region


def test_the_schedule_is_the_published_one():
    published = {0: 0.99998, 100: 0.99659, 300: 0.96233, 500: 0.74480, 700: 0.35127, 999: 0.08125}
    assert ABAR.dtype == np.float64
    assert ABAR.shape == (1000,)
    np.testing.assert_allclose([ABAR[step] for step in published], list(published.values()), rtol=0, atol=5.1e-6)


@pytest.mark.parametrize(("step", "kept"), [(500, 0.8630), (999, np.sqrt(0.08125))])
def test_a_step_keeps_its_share_of_the_picture_and_adds_noise_for_the_rest(step, kept):
    made = make("diffusion", IMAGES + 1e4, step=step).astype(np.float64)
    assert np.mean(made) / np.mean(IMAGES + 1e4) == pytest.approx(kept, abs=6e-5)  # a step further is 8e-4 off
    noise = make("diffusion", step=step) - np.sqrt(ABAR[step]) * IMAGES
    assert np.mean(noise) == pytest.approx(0, abs=0.01)
    assert np.std(noise) == pytest.approx(np.sqrt(1 - kept**2), rel=0.01)
    assert np.mean((noise / np.std(noise)) ** 4) == pytest.approx(3, abs=0.1)


def test_in_pixel_space_the_noisy_pixels_are_clamped():
    noise = (variants()["diffusion"] - np.sqrt(ABAR[500]) * IMAGES) / np.sqrt(1 - ABAR[500])
    pixels = np.sqrt(ABAR[500]) * (IMAGES * STD + MEAN) + np.sqrt(1 - ABAR[500]) * noise
    assert np.mean((pixels < 0) | (pixels > 1)) > 0.1  # without the clamp
    expected = (np.clip(pixels, 0, 1) - MEAN) / STD
    np.testing.assert_allclose(make("diffusion", space="pixels"), expected, rtol=0, atol=1e-5)


def test_the_pixel_variant_is_that_with_noise_of_its_own():
    pixels = variants()["diffusion_pixels"] * STD + MEAN
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    inside = (pixels > 0.01) & (pixels < 0.99)
    noise = (pixels - np.sqrt(ABAR[500]) * (IMAGES * STD + MEAN)) / np.sqrt(1 - ABAR[500])
    other = (variants()["diffusion"] - np.sqrt(ABAR[500]) * IMAGES) / np.sqrt(1 - ABAR[500])
    assert abs(np.corrcoef(noise[inside], other[inside])[0, 1]) < 0.02
    far = np.abs(IMAGES * STD + MEAN - 0.55) < 0.05  # where the clamp takes the tails of both sides alike
    assert np.std(noise[far]) == pytest.approx(0.78, abs=0.12)


def test_region_leaves_the_rest_of_the_picture_as_it_is():
    made = variants()["region"]
    pixels = MASKS.repeat(14, axis=1).repeat(14, axis=2)
    for record in range(BATCH):
        changed = np.any(made[record] != IMAGES[record], axis=-1)
        inside = pixels[record] if record != 3 else np.ones_like(changed)  # the one whose mask is all false
        np.testing.assert_array_equal(changed, inside)
    np.testing.assert_array_equal(make("region", masks=pixels), made)


def test_region_adds_the_noise_of_diffusion():
    everywhere = make("region", masks=np.ones((BATCH, 2, 7), bool))
    noise = (everywhere - np.sqrt(ABAR[500]) * IMAGES) / np.sqrt(1 - ABAR[500])
    assert (np.mean(noise), np.std(noise)) == pytest.approx((0, 1), abs=0.01)


# --- crop


def published_box(rng, size, *, scale=(0.01, 0.2), ratio=(3 / 4, 4 / 3), uniform_ratio=False, uniform_side=False):
    """Draws top, left, height and width as torchvision's documentation of RandomResizedCrop says."""
    for _ in range(10):
        area = rng.uniform(*np.sqrt(scale)) ** 2 if uniform_side else rng.uniform(*scale)
        aspect = rng.uniform(*ratio) if uniform_ratio else np.exp(rng.uniform(*np.log(ratio)))
        width, height = round(np.sqrt(size**2 * area * aspect)), round(np.sqrt(size**2 * area / aspect))
        if 0 < width <= size and 0 < height <= size:
            return rng.integers(size - height + 1), rng.integers(size - width + 1), height, width
    return 0, 0, size, size


def boxes(twin, scale, count=4000, **wrong):
    """Returns what is random about a box, drawn here or by a twin: its area, aspect ratio, and room above and left."""
    if twin:
        rng = np.random.default_rng(0)
        drawn = np.array([published_box(rng, 336, scale=scale, **wrong) for _ in range(count)])
    else:
        drawn = np.concatenate(draw(count, lambda key: corruptions._crop_box(key, 336)), axis=1)
    top, left, height, width = drawn.T
    return {"area": height * width, "aspect": width / height, "top": top / (337 - height), "left": left / (337 - width)}


@pytest.mark.parametrize("scale", [(0.01, 0.2), (0.7, 1.3)], ids=["mdpo", "often_too_large"])
def test_boxes_are_drawn_as_published(scale, monkeypatch):
    monkeypatch.setattr(corruptions, "CROP_SCALE", scale)
    ours, twins = boxes(False, scale), boxes(True, scale)
    for what, sample in ours.items():
        assert distance(sample, twins[what]) < 0.04, what  # by chance once in 300


def test_boxes_drawn_otherwise_are_told_apart():
    twins = boxes(True, (0.01, 0.2))
    assert distance(boxes(True, (0.01, 0.2), uniform_ratio=True)["aspect"], twins["aspect"]) > 0.06
    assert distance(boxes(True, (0.01, 0.2), uniform_side=True)["area"], twins["area"]) > 0.1


def test_boxes_reach_both_edges():
    top, left, height, width = np.concatenate(draw(2000, lambda key: corruptions._crop_box(key, 8)), axis=1).T
    assert min(top) == min(left) == 0
    assert max(top + height) == max(left + width) == 8
    assert min(height) == min(width) == 1


def test_a_box_that_never_fits_is_the_whole_picture(monkeypatch):
    monkeypatch.setattr(corruptions, "CROP_SCALE", (4, 5))
    np.testing.assert_array_equal(make("crop"), IMAGES)


def test_a_crop_is_cut_and_enlarged_as_by_torchvision():
    # The picture says where it is: its first channel is the row, its second the column.
    place = np.indices((SIZE, SIZE), np.float32)
    images = np.stack([*np.broadcast_to(place[:, None], (2, BATCH, SIZE, SIZE)), IMAGES[..., 0]], axis=-1)
    for image, made in zip(images, make("crop", images), strict=True):
        first, last = np.rint(made.min((0, 1))[:2]).astype(int), np.rint(made.max((0, 1))[:2]).astype(int)
        box = image[first[0] : last[0] + 1, first[1] : last[1] + 1]
        assert box.size < image.size / 4
        channels_first = torch.tensor(box).movedim(-1, 0)[None]
        expected = torch.nn.functional.interpolate(channels_first, (SIZE, SIZE), mode="bilinear", antialias=True)
        np.testing.assert_allclose(made, expected[0].movedim(0, -1), rtol=0, atol=2e-5)
        nearest = torch.nn.functional.interpolate(channels_first, (SIZE, SIZE), mode="nearest")
        assert np.abs(made - nearest[0].movedim(0, -1).numpy()).max() > 0.1


# --- the others


def test_flat_colours():
    for name, colour in {
        "black": [-1.792263, -1.752097, -1.480220],  # -mean / std
        "white": [1.930336, 2.074883, 2.145897],  # (1 - mean) / std
        "mean": [0, 0, 0],
    }.items():
        np.testing.assert_allclose(variants()[name], np.broadcast_to(colour, IMAGES.shape), rtol=0, atol=1e-5)


def test_clean_is_the_picture_and_swap_that_of_the_next_record():
    np.testing.assert_array_equal(variants()["clean"], IMAGES)
    np.testing.assert_array_equal(variants()["swap"], IMAGES[[1, 2, 3, 4, 5, 6, 7, 0]])


def test_noise_is_standard_normal():
    noise = variants()["noise"]
    assert (np.mean(noise), np.std(noise)) == pytest.approx((0, 1), abs=0.01)
    assert np.mean(noise**4) == pytest.approx(3, abs=0.1)


def test_a_quarter_turn_is_counter_clockwise():
    np.testing.assert_array_equal(corruptions._turn(IMAGES[0], jnp.float32(np.pi / 2)), np.rot90(IMAGES[0]))


@pytest.mark.parametrize("degrees", [10, 33.3, 45, 80])
def test_a_picture_is_turned_as_by_torchvision(degrees):
    # torchvision turns a tensor by affine_grid and grid_sample.
    angle = np.radians(degrees)
    matrix = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]
    grid = torch.nn.functional.affine_grid(torch.tensor([matrix]), (1, 3, SIZE, SIZE), align_corners=False)
    image = torch.tensor(IMAGES[:1]).movedim(-1, 1).double()
    turned = torch.nn.functional.grid_sample(image, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    made = np.asarray(corruptions._turn(IMAGES[0], jnp.float32(angle)))
    agree = np.all(made == turned[0].movedim(0, -1).float().numpy(), axis=-1)
    assert np.mean(agree) > 0.99  # but for halves of a pixel, where float32 rounds to the other side
    assert not made[0, 0].any()


def test_the_angle_is_uniform():
    place = np.indices((SIZE, SIZE), np.float32) - (SIZE - 1) / 2
    image = jnp.stack([*place, place[0]], axis=-1)
    turned = draw(1000, lambda key: corruptions.rotate(image, key)[SIZE // 2, -4])
    angles = np.degrees(np.arctan2(*turned[:, :2].T))  # of a place to the right of the middle
    assert distance(angles, np.linspace(10, 80, 1000) + 1.2) < 0.06


def test_patches_are_whole_and_in_another_order():
    tiles = lambda image: image.reshape(4, 14, 4, 14, 3).swapaxes(1, 2).reshape(16, -1)
    for image, made in zip(IMAGES, variants()["shuffle_patches"], strict=True):
        before, after = tiles(image), tiles(made)
        assert sorted(map(bytes, before)) == sorted(map(bytes, after))
        assert np.sum(np.any(before != after, axis=1)) > 8


def test_every_patch_goes_everywhere():
    image = np.broadcast_to(np.arange(16, dtype=np.float32).reshape(4, 4, 1), (4, 4, 3))
    shuffle = functools.partial(corruptions.shuffle_patches, patch=1)
    order = draw(3200, lambda key: shuffle(image, key))[..., 0].reshape(-1, 16).astype(int)
    counts = np.array([np.bincount(place, minlength=16) for place in order.T])
    np.testing.assert_allclose(counts, 200, atol=75)  # over five standard deviations


# --- what is refused


@pytest.mark.parametrize(
    ("variants", "changes", "message"),
    [
        (("clean", "blur"), {}, "no image variant blur; there are clean, crop, .*diffusion, .*swap"),
        (("clean",), {"images": IMAGES[0]}, r"float32\[B, S, S, 3\], got float32\[56, 56, 3\]"),
        (("clean",), {"images": IMAGES[:, :50]}, r"float32\[B, S, S, 3\], got float32\[8, 50, 56, 3\]"),
        (("clean",), {"images": IMAGES.astype(np.uint8)}, "got uint8"),
        (("crop",), {"seeds": SEEDS.astype(np.int32)}, r"uint32\[8\], got int32\[8\]"),
        (("crop",), {"seeds": SEEDS[:1]}, r"uint32\[8\], got uint32\[1\]"),
        (("region",), {}, "region needs masks"),
        (("region",), {"masks": MASKS.astype(np.float32)}, r"bool\[8, h, w\].*got float32"),
        (("region",), {"masks": MASKS[:2]}, r"got bool\[2, 4, 4\]"),
        (("region",), {"masks": np.ones((BATCH, 24, 24), bool)}, "that divide 56"),
        (("rejected_image",), {}, r"rejected_image needs pictures \[8, 56, 56, 3\], got \[\]"),
        (("diffusion",), {"step": 1000}, "from 0 to 999, got 1000"),
        (("diffusion",), {"step": -1}, "from 0 to 999, got -1"),
        (("diffusion",), {"space": "latent"}, "got 'latent'"),
        (("shuffle_patches",), {"patch": 15}, "patches of 15 pixels do not tile a picture of 56"),
        (("swap",), {"images": IMAGES[:1], "seeds": SEEDS[:1]}, "only one"),
    ],
)
def test_what_cannot_be_made_is_refused(variants, changes, message):
    with pytest.raises(ValueError, match=message):
        image_variants(**{"images": IMAGES, "seeds": SEEDS, "variants": variants} | changes)
