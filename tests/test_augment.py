import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from convmixer_jax import augment
from convmixer_jax.augment import geometry
from tests import test_data

PHOTOS = np.stack(
  [np.asarray(test_data.photo(seed, 48, 32)) for seed in range(16)]
)


def test_flip():
  flipped = np.asarray(augment.random_flip(jax.random.key(0), PHOTOS))
  turned = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, PHOTOS)]
  kept = [np.array_equal(a, b) for a, b in zip(flipped, PHOTOS)]
  assert np.all(np.logical_xor(turned, kept))
  assert 0 < sum(turned) < 16


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_pillows(interpolation):
  """The boxes that it drew, cut and resized by Pillow.

  One level of difference is left where the exact value is a half. Bilinear
  weights are small fractions, so that is common, and Pillow's weights of 22
  bits and our float32 break the tie differently.
  """
  key = jax.random.key(3)
  options = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
  ours = np.asarray(
    augment.random_resized_crop(
      key, PHOTOS, interpolation=interpolation, **options
    )
  )
  box_key, _ = jax.random.split(key)
  boxes = geometry._random_boxes(
    box_key, len(PHOTOS), 32, 48, options["scale"], options["ratio"]
  )
  resample = Image.Resampling[interpolation.upper()]
  theirs = np.stack(
    [
      Image.fromarray(photo)
      .crop((left, top, left + width, top + height))
      .resize((48, 32), resample)
      for photo, top, left, height, width in zip(
        PHOTOS, *map(np.asarray, boxes)
      )
    ]
  )
  difference = np.abs(ours.astype(int) - theirs.astype(int))
  assert difference.max() <= 1
  assert np.mean(difference == 0) > 0.99


def test_crop_of_the_whole_changes_nothing():
  whole = augment.random_resized_crop(
    jax.random.key(0), PHOTOS, scale=(1.0, 1.0), ratio=(1.5, 1.5)
  )
  assert np.array_equal(whole, PHOTOS)


def test_random_interpolation_is_either():
  key = jax.random.key(0)
  options = {"scale": (0.2, 0.5), "ratio": (1.0, 1.0)}
  bilinear, bicubic, either = (
    np.asarray(
      augment.random_resized_crop(key, PHOTOS, interpolation=name, **options)
    )
    for name in ("bilinear", "bicubic", "random")
  )
  equal = lambda a: np.array([np.array_equal(x, y) for x, y in zip(a, either)])
  assert np.all(np.logical_xor(equal(bilinear), equal(bicubic)))
  assert 0 < equal(bicubic).sum() < len(PHOTOS)


def test_boxes_follow_their_law():
  top, left, height, width = map(
    np.asarray,
    geometry._random_boxes(
      jax.random.key(0), 4000, 450, 450, (0.08, 1.0), (3 / 4, 4 / 3)
    ),
  )
  assert top.min() == 0
  assert left.min() == 0
  assert (top + height).max() <= 450
  assert (left + width).max() <= 450
  share, ratio = height * width / 450**2, width / height
  assert 0.078 < share.min() < 0.1
  assert share.max() > 0.95
  assert 0.74 < ratio.min() < 0.77
  assert 1.30 < ratio.max() < 1.35
  assert abs(np.log(ratio).mean()) < 0.02
  # Uniform over the room that is left: mean one half, variance 1/12.
  room = 450 - height
  place = top[room > 50] / room[room > 50]
  assert abs(place.mean() - 0.5) < 0.02
  assert abs(place.var() - 1 / 12) < 0.01


def test_impossible_boxes_fall_back_to_the_centre():
  """No 4:1 box of the whole area fits: the widest allowed one, centred."""
  top, left, height, width = geometry._random_boxes(
    jax.random.key(0), 3, 40, 40, (1.0, 1.0), (4.0, 4.0)
  )
  assert np.all(width == 40)
  assert np.all(height == 10)
  assert np.all(top == 15)
  assert np.all(left == 0)


def test_augment_is_a_function_of_the_key():
  augment_fn = jax.jit(
    augment.make_augment(
      augment.make_normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
      flip=True,
      crop_scale=(0.5, 1.0),
      crop_ratio=(1.0, 1.0),
      interpolation="random",
    )
  )
  targets = jnp.ones((16, 3))
  a, b, c = (
    augment_fn(jax.random.key(seed), PHOTOS, targets)[0] for seed in (0, 0, 1)
  )
  assert np.array_equal(a, b)
  assert not np.array_equal(a, c)
  assert a.dtype == jnp.float32


def test_normalize():
  normalize = augment.make_normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
  expected = (PHOTOS / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
  assert np.abs(normalize(PHOTOS) - expected).max() < 1e-5
