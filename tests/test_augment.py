import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
from scipy import stats

from convmixer_jax import augment
from convmixer_jax import ops
from convmixer_jax import sharding
from convmixer_jax.augment import erasing
from convmixer_jax.augment import geometry
from convmixer_jax.augment import jitter
from convmixer_jax.augment import mixing
from convmixer_jax.augment import randaugment
from convmixer_jax.augment import stages
from convmixer_jax.errors import UserError
from convmixer_jax.ops import native
from tests import common
from tests import test_data

# Laws are tested with fixed seeds, at this probability of a false alarm.
SIGNIFICANCE = 1e-3
TIMM = "rand-m9-mstd0.5-inc1"


@pytest.fixture(params=["native", "xla"])
def form(request):
  """Runs a test by ops/augment.cc, and as where that cannot be compiled."""
  if request.param == "xla":
    with ops.portable():
      yield
  else:
    if not native.loaded():
      pytest.skip("no C++ compiler: ops/augment.cc is not tested")
    yield


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
  ours = augment.random_resized_crop(
    key, PHOTOS, interpolation=interpolation, **options
  )
  box_key, _ = jax.random.split(key)
  boxes = geometry.random_boxes(
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
  difference = np.abs(np.asarray(ours, int) - theirs.astype(int))
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


def follows(law, values):
  return stats.kstest(values, law.cdf).pvalue > SIGNIFICANCE


def happens(count, total, probability):
  test = stats.binomtest(int(count), total, probability)
  return test.pvalue > SIGNIFICANCE


def test_boxes_follow_their_law():
  boxes = geometry.random_boxes(
    jax.random.key(0), 4000, 450, 450, (0.08, 1.0), (3 / 4, 4 / 3)
  )
  test_data.assert_are_imagenets(*map(np.asarray, boxes))


@pytest.mark.parametrize(
  ("draw", "area", "high"),
  [
    (geometry.random_boxes, (0.1, 0.5), 4 / 3),
    (erasing._boxes, (0.02, 0.3), 2),
  ],
)
def test_areas_and_ratios_are_uniform_and_log_uniform(draw, area, high):
  """Of boxes all of which fit, so that no try is thrown away."""
  boxes = draw(jax.random.key(1), 4000, 2000, 2000, area, (1 / high, high))
  top, left, height, width = map(np.asarray, boxes)
  law = stats.uniform(area[0], area[1] - area[0])
  assert follows(law, height * width / 4e6)
  law = stats.uniform(-np.log(high), 2 * np.log(high))
  assert follows(law, np.log(width / height))
  for start, length in ((top, height), (left, width)):
    assert follows(stats.uniform, (start + 0.5) / (2001 - length))


def test_impossible_boxes_fall_back_to_the_centre():
  """No 4:1 box of the whole area fits: the widest allowed one, centred."""
  top, left, height, width = geometry.random_boxes(
    jax.random.key(0), 3, 40, 40, (1.0, 1.0), (4.0, 4.0)
  )
  assert np.all(width == 40)
  assert np.all(height == 10)
  assert np.all(top == 15)
  assert np.all(left == 0)


# --- RandAugment, to the pixel.


def golden_cases(name):
  golden = common.golden(name)
  cases = json.loads(str(golden["cases"]))
  photos = np.stack([golden[f"photo{case['photo']}"] for case in cases])
  outs = [golden[case.get("key", f"out{j}")] for j, case in enumerate(cases)]
  return golden, cases, photos, np.stack(outs)


def apply_cases(cases, photos, ops, levels, signs, fill, bicubic):
  """Each case's operation, chosen by its name in the dialect."""
  chosen, args = {}, jnp.zeros(len(cases))
  for name, (op, argument) in ops.items():
    chosen[op] = jnp.array([case["op"] == name for case in cases])
    size = photos.shape[1:3]
    args = jnp.where(chosen[op], argument(levels, signs, size), args)
  apply = jax.jit(lambda *args: apply_stages(*args, fill))
  of_one = jax.tree.map(lambda x: x[None], (chosen, args, bicubic))
  return np.asarray(apply(photos, of_one)), np.asarray(args)


def apply_stages(images, drawn, fill=(0, 0, 0)):
  """With what was drawn for all stages."""
  return stages.apply_stages(images, lambda stage: stage, drawn, fill)


EXACT = {"Identity", "AutoContrast", "Equalize", "Invert", "Solarize",
         "SolarizeAdd", "Posterize", "PosterizeIncreasing",
         "SolarizeIncreasing"}  # fmt: skip
NEAREST = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def assert_pixels(ours, theirs, cases, exact):
  """Equal for `exact` operations; elsewhere at most one level apart.

  The level is lost where Pillow's value is whole or nearly so, and it then
  truncates: it blends in float32 and resamples in float64, we in float32 with
  fused multiply-adds.
  """
  difference = np.abs(ours.astype(int) - theirs.astype(int))
  for case, d in zip(cases, difference):
    if case["op"] in exact:
      assert d.max() == 0, case
    else:
      assert np.mean(d <= 1) >= 0.995, case
      assert np.mean(d == 0) >= 0.99, case


def test_every_operation_is_timms(form):
  golden, cases, photos, theirs = golden_cases("randaugment")
  assert {case["op"] for case in cases} == set(randaugment.TIMM)
  ours, args = apply_cases(
    cases,
    photos,
    randaugment.TIMM,
    jnp.array([case["magnitude"] / 10 for case in cases]),
    jnp.array([-1.0 if case["negate"] else 1.0 for case in cases]),
    golden["fill"].tolist(),
    jnp.array([case["interpolation"] == "bicubic" for case in cases]),
  )
  for case, arg in zip(cases, args):
    expected = (case["args"] or [0])[0]
    if case["op"].startswith("Translate"):  # timm's is a share of the side.
      expected *= photos.shape[1]
    assert arg == pytest.approx(expected, rel=1e-6), case
  assert_pixels(ours, theirs, cases, EXACT)


def test_every_operation_is_torchvisions(form):
  """What torchvision 0.28's _apply_op gave."""
  _, cases, photos, theirs = golden_cases("randaugment_torchvision")
  assert {case["op"] for case in cases} == set(randaugment.TORCHVISION)
  ours, _ = apply_cases(
    cases,
    photos,
    randaugment.TORCHVISION,
    jnp.array([case["magnitude"] / 30 for case in cases]),
    jnp.array([float(case["sign"]) for case in cases]),
    (0, 0, 0),
    None,
  )
  assert_pixels(ours, theirs, cases, EXACT | NEAREST)


RNG = np.random.default_rng(0)
# Few values, narrow ranges, constants, and much of one value: the corners of
# histograms.
CORNERS = np.stack(
  [
    RNG.integers(low, high + 1, (24, 30, 3), np.uint8)
    for low, high in np.sort(RNG.integers(0, 256, (400, 2)), axis=1)
  ]
)
CORNERS[:100, 2:] = 0


@pytest.mark.parametrize("op", ["AutoContrast", "Equalize"])
def test_histogram_operations_are_pillows(op, form):
  """Also where a double rounds to just below a whole number."""
  drawn = {op: jnp.full((1, 400), True)}, jnp.zeros((1, 400)), None
  ours = apply_stages(CORNERS, drawn)
  function = getattr(ImageOps, op.lower())
  theirs = [np.asarray(function(Image.fromarray(image))) for image in CORNERS]
  assert np.array_equal(ours, np.stack(theirs))


def test_what_is_not_chosen_stays(form):
  none = jnp.zeros((2, len(PHOTOS)), bool)
  every = {op for op, _ in randaugment.TIMM.values()}
  drawn = dict.fromkeys(every, none), jnp.ones((2, 16)), none
  images = apply_stages(PHOTOS, drawn)
  assert np.array_equal(images, PHOTOS)


# --- RandAugment, its law.


def draws(policy, batch=20000):
  chosen, args, bicubic = randaugment.draw(
    jax.random.key(1), randaugment.parse(policy), batch, (100, 200)
  )
  return {k: np.asarray(v) for k, v in chosen.items()}, args, bicubic


def test_timms_law():
  chosen, args, bicubic = draws(TIMM)
  applied = sum(chosen.values())
  assert applied.max() == 1
  counts = np.array([mask.sum() for mask in chosen.values()])
  assert len(counts) == 15
  assert happens(applied.sum(), 20000, 0.5)
  assert stats.chisquare(counts).pvalue > SIGNIFICANCE
  assert happens(bicubic.sum(), 20000, 0.5)
  # Levels: normal around 9, what is above 10 is 10; a fair sign.
  degrees = np.asarray(args)[chosen["Rotate"]]
  assert happens((degrees > 0).sum(), len(degrees), 0.5)
  levels = np.abs(degrees) / 3
  assert levels.max() == pytest.approx(10)
  assert happens(np.isclose(levels, 10).sum(), len(levels), stats.norm.sf(2))
  law = stats.truncnorm(-18, 2, loc=9, scale=0.5)
  assert follows(law, levels[levels < 9.999])
  # Sides: 45 % of 200 columns and of 100 rows at level 10.
  assert np.abs(args[chosen["TranslateX"]]).max() == pytest.approx(90)
  assert np.abs(args[chosen["TranslateY"]]).max() == pytest.approx(45)


def test_torchvisions_law():
  chosen, args, bicubic = draws("torchvision-n2-m12")
  counts = np.array([mask.sum() for mask in chosen.values()])
  assert len(counts) == 14
  assert counts.sum() == 20000
  assert stats.chisquare(counts).pvalue > SIGNIFICANCE
  assert bicubic is None
  degrees = np.asarray(args)[chosen["Rotate"]]
  assert np.allclose(np.abs(degrees), 12)
  assert happens((degrees > 0).sum(), len(degrees), 0.5)


def test_layers_are_drawn_apart():
  """Two layers of one operation each: a quarter of the images get both."""
  policy = randaugment.parse("rand-m9-n2-inc1:SolarizeAdd")
  image = np.zeros((2000, 4, 4, 3), np.uint8)
  images = augment.apply_policy(jax.random.key(0), image, policy, (0, 0, 0))
  values, counts = np.unique(images[:, 0, 0, 0], return_counts=True)
  assert values.tolist() == [0, 99, 198]
  expected = 2000 * np.array([0.25, 0.5, 0.25])
  assert stats.chisquare(counts, expected).pvalue > SIGNIFICANCE


def test_parse():
  policy = randaugment.parse("rand-m7-n3-p1-mstd1-mmax12-inc1:Rotate,Invert")
  assert list(policy.ops) == ["Rotate", "Invert"]
  assert policy.num_ops == 3
  numbers = (policy.prob, policy.mean, policy.std, policy.high)
  assert numbers == pytest.approx((1.0, 0.7, 0.1, 1.2))
  assert policy.smooth
  policy = randaugment.parse("torchvision-n1-m30")
  assert (policy.num_ops, policy.prob, policy.mean) == (1, 1.0, 1.0)


@pytest.mark.parametrize(
  ("policy", "part"),
  [
    ("augmix-m5", "'augmix'"),
    ("rand-m9-mstd0.5", "inc is missing"),
    ("rand-m9-inc0", "'inc0'"),
    ("rand-m9-inc1-inc1", "'inc1': .* once each"),
    ("rand-m9-q4-inc1", "'q4'"),
    ("rand-m31-inc1", "'m31': m must be 0 to 30"),
    ("rand-m9-n2.5-inc1", "'n2.5': n must be an integer"),
    ("rand-m9-inc1:Rotate,Blur", "'Blur': must be one of AutoContrast"),
    ("rand-m9-inc1:", "''"),
    ("torchvision-m31", "'m31'"),
    ("torchvision-mstd1-m9", "'mstd1'"),
    ("rand--m9-inc1", "''"),
  ],
)
def test_what_does_not_parse_is_named(policy, part):
  with pytest.raises(UserError, match=part) as e:
    randaugment.parse(policy)
  assert "\n" not in str(e.value)
  assert str(e.value).startswith(f"config.augment.randaugment={policy}: ")


# --- Colour jitter.


def test_color_jitter_is_torchvisions(form):
  """In each of its six orders, by Pillow's ImageEnhance."""
  key = jax.random.key(5)
  ours = augment.color_jitter(key, PHOTOS, 0.4)
  orders, factors = map(np.asarray, jitter.draw(key, len(PHOTOS), 0.4))
  assert len(np.unique(orders, axis=0)) > 3
  for image, our, order, factor in zip(PHOTOS, ours, orders, factors):
    theirs = Image.fromarray(image)
    for i, value in zip(order, factor):
      enhancer = getattr(ImageEnhance, jitter.OPS[i])
      theirs = enhancer(theirs).enhance(float(value))
    d = np.abs(np.asarray(our, int) - np.asarray(theirs, int))
    assert np.mean(d <= 1) >= 0.995
    assert np.mean(d == 0) >= 0.98


def test_color_jitters_law():
  orders, factors = jitter.draw(jax.random.key(0), 6000, 0.4)
  _, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(counts) == 6
  assert stats.chisquare(counts).pvalue > SIGNIFICANCE
  assert follows(stats.uniform(0.6, 0.8), np.ravel(factors))


# --- Random erasing.


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing(mode, form):
  images = jnp.full((4000, 16, 24, 3), 7.0)
  erased = np.asarray(
    augment.random_erasing(
      jax.random.key(0),
      images,
      prob=0.25,
      mode=mode,
      area=(0.02, 1 / 3),
      aspect=(0.3, 1 / 0.3),
    )
  )
  changed = (erased != 7).any(-1)
  touched = changed.any((1, 2))
  assert happens(touched.sum(), 4000, 0.25)
  for mask in changed[touched]:  # One whole box, which is not the image.
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert mask.any(1).sum() < 16
    assert mask.any(0).sum() < 24
  values = erased[changed]
  if mode == "const":
    assert not values.any()
  else:
    assert follows(stats.norm, values.ravel()[:5000])


def test_what_does_not_fit_is_not_erased():
  *_, height, width = erasing._boxes(
    jax.random.key(0), 50, 8, 64, (0.5, 0.5), (2.0, 2.0)
  )
  assert not height.any()
  assert not width.any()


# --- What augment.cc computes, and XLA elsewhere.


def both_forms(function, *args):
  """The result of augment.cc, and of XLA."""
  if not native.loaded():
    pytest.skip("no C++ compiler: ops/augment.cc is not tested")
  run = lambda: np.asarray(jax.jit(lambda *args: function(*args))(*args))
  ours = run()
  with ops.portable():
    return ours, run()


@pytest.mark.slow  # Without LLVM's optimisations, XLA rounds otherwise.
@pytest.mark.parametrize("size", [(31, 17), (5, 40), (1, 3), (64, 64)])
@pytest.mark.parametrize("policy", [f"{TIMM}-n5-p1", "torchvision-n5-m12"])
def test_pixels_are_the_same_in_both_forms(policy, size):
  """To the bit, after five operations in a row."""
  images = RNG.integers(0, 256, (200, *size, 3), np.uint8)
  policy = randaugment.parse(policy)
  apply = lambda key, images: augment.apply_policy(
    key, images, policy, (124, 116, 104)
  )
  ours, xlas = both_forms(apply, jax.random.key(2), images)
  assert np.array_equal(ours, xlas)


@pytest.mark.parametrize("size", [(24, 31), (5, 7)])
def test_noise_is_the_same_in_both_forms(size):
  """Up to the rounding of a logarithm."""
  images = np.full((300, *size, 3), 7, np.float32)
  erase = lambda key, images: augment.random_erasing(
    key, images, prob=0.8, mode="pixel", area=(0.02, 0.9), aspect=(0.3, 3.3)
  )
  ours, xlas = both_forms(erase, jax.random.key(3), images)
  assert 0.05 < np.mean(xlas != 7) < 0.9
  assert np.array_equal(ours == 7, xlas == 7)
  assert np.abs(ours - xlas).max() < 2e-6
  assert np.abs(xlas[xlas != 7]).max() > 3.5  # Both parts of the formula.


# --- Mixup and cutmix.

MIX = {"mixup_alpha": 0.5, "cutmix_alpha": 0.5, "switch_prob": 0.5}
TARGETS = jnp.eye(16)


def mix(key, **options):
  images, targets = augment.mix(
    jax.random.key(key), PHOTOS, TARGETS, **{**MIX, "group_size": 0, **options}
  )
  return np.asarray(images), np.asarray(targets)


def test_mixup_is_timms():
  images, targets = mix(2, mixup_alpha=5.0, cutmix_alpha=0.0)
  weight = targets[0, 0]
  assert 0.05 < weight < 0.95
  mirror = np.arange(16)[::-1]
  assert np.allclose(
    targets, weight * np.eye(16) + (1 - weight) * np.eye(16)[mirror]
  )
  exact = PHOTOS * weight + PHOTOS[mirror] * (np.float32(1) - weight)
  near_half = np.abs(exact % 1 - 0.5) < 1e-3
  assert np.array_equal(images[~near_half], np.rint(exact)[~near_half])


def test_cutmix_is_timms():
  """A box of the mirror image, whose area is the weight of its label."""
  images, targets = mix(1, mixup_alpha=0.0, cutmix_alpha=5.0)
  mirror = PHOTOS[::-1]
  from_mirror = (images == mirror).all(-1)
  from_own = (images == PHOTOS).all(-1)
  assert (from_own | from_mirror).all()
  box = ~from_own[0]
  rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
  area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
  assert 0 < area < box.size
  assert targets[0, 0] == pytest.approx(1 - area / box.size)
  assert targets[0, 15] == pytest.approx(area / box.size)


def test_groups_are_mixed_apart():
  images, targets = mix(0, group_size=4)
  partners = np.argsort(-targets, axis=1)[:, :2]
  for i, pair in enumerate(partners):
    assert set(pair) <= {i, 4 * (i // 4) + 3 - i % 4} or targets[i, i] == 1
  weights = targets[np.arange(16), np.arange(16)].reshape(4, 4)
  assert np.array_equal(weights, np.repeat(weights[:, :1], 4, axis=1))
  assert len(np.unique(weights[:, 0])) == 4
  assert images.shape == PHOTOS.shape


def test_mixing_that_is_off_does_nothing():
  images, targets = mix(0, mixup_alpha=0.0, cutmix_alpha=0.0)
  assert np.array_equal(images, PHOTOS)
  assert np.array_equal(targets, TARGETS)


def test_mixings_law():
  """Beta(0.5, 0.5) for mixup's weight; cutmix in a fifth of the groups."""
  images = np.zeros((8000, 8, 8, 3), np.uint8)
  images[::2] = 255
  targets = jnp.tile(jnp.eye(2), (4000, 1))
  mixed, targets = augment.mix(
    jax.random.key(0), images, targets, mixup_alpha=0.5, cutmix_alpha=0.5,
    switch_prob=0.2, group_size=2,
  )  # fmt: skip
  first, weight = np.asarray(mixed[::2]), np.asarray(targets[::2, 0])
  is_mixup = ((first > 0) & (first < 255)).any((1, 2, 3))
  # A mixup so slight that it rounds away, or a whole box, tells nothing.
  law = stats.beta(0.5, 0.5)
  told = law.sf(0.5 / 255) - law.sf(1 - 0.5 / 255)
  assert happens(is_mixup.sum(), 4000, 0.8 * told)
  inner = (law.cdf(weight[is_mixup]) - law.cdf(0.5 / 255)) / told
  assert follows(stats.uniform, inner)


@pytest.mark.parametrize("alpha", [0.4, 0.5, 1.0, 3.0])
def test_weights_follow_their_law(alpha):
  keys = jax.random.split(jax.random.key(0))
  first, second = (
    mixing._log_gamma_variate(key, jnp.full(20000, alpha)) for key in keys
  )
  law = stats.gamma(alpha)
  moderate = np.exp(first)[np.exp(first) > 1e-20]  # Float32 has no smaller.
  assert len(moderate) > 19000
  below = law.cdf(1e-20)
  inner = (law.cdf(moderate) - below) / (1 - below)
  assert follows(stats.uniform, inner)
  assert follows(stats.beta(alpha, alpha), jax.nn.sigmoid(first - second))


def test_cut_boxes_follow_their_law():
  """Side sqrt(1 - weight), centre uniform, clipped at the edges."""
  side = jnp.full(20000, 0.5)
  low, high = map(np.asarray, mixing._interval(jax.random.key(0), side, 100))
  assert low.min() == 0
  assert high.max() == 100
  whole = (low > 0) & (high < 100)
  assert np.all((high - low)[whole] == 50)
  counts = np.bincount(low[whole])[1:]
  assert len(counts) == 49
  assert stats.chisquare(counts).pvalue > SIGNIFICANCE


# --- All of it.

IMAGENET = {
  "flip": True,
  "randaugment": TIMM,
  "mixup_alpha": 0.5,
  "cutmix_alpha": 0.5,
  "mix_group_size": 8,
  "erase_prob": 0.25,
}
STATS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
EVERYTHING = {
  **IMAGENET,
  "crop_scale": (0.5, 1.0),
  "interpolation": "random",
  "color_jitter": 0.4,
}


def test_the_whole_of_it_is_a_function_of_the_key(form):
  """A golden, in which the order, the keys and the fill colour matter.

  It holds each image's mean and standard deviation by channel, and the targets,
  as crop, flip, RandAugment, jitter, mixing, normalisation and erasing gave
  them, called one by one. So every draw stays as it is.
  """
  config = EVERYTHING | {"erase_prob": 0.7, "erase_mode": "const"}
  augment_fn = jax.jit(
    augment.make_augment(common.augment_config(**config), **STATS)
  )
  a, b, c = (
    augment_fn(jax.random.key(seed), PHOTOS, TARGETS) for seed in (4, 4, 1)
  )
  assert np.array_equal(a[0], b[0])
  assert np.array_equal(a[1], b[1])
  assert not np.array_equal(a[0], c[0])
  assert a[0].dtype == jnp.float32
  golden = common.golden("augment")
  moments = np.stack([a[0].mean((1, 2)), a[0].std((1, 2))])
  common.assert_close(moments, golden["moments"], 1e-3)
  common.assert_close(a[1], golden["targets"], 1e-6)


def test_torchvisions_randaugment_fills_with_black():
  """Of a white image, every operation and black leave a grey one."""
  config = common.augment_config(randaugment="torchvision-n2-m30")
  augment_fn = jax.jit(augment.make_augment(config, **STATS))
  images = np.full((32, 8, 8, 3), 255, np.uint8)
  images, _ = augment_fn(jax.random.key(0), images, jnp.eye(32))
  pixels = images * np.array(STATS["std"]) + np.array(STATS["mean"])
  assert np.ptp(pixels, axis=-1).max() < 1e-5
  assert (pixels < 1e-5).any()


CROP = {"crop_scale": (0.5, 1.0), "interpolation": "random"}
MIXED = {"mixup_alpha": 0.5, "cutmix_alpha": 0.5, "mix_group_size": 2}
ERASE = {"erase_prob": 0.5, "erase_mode": "const"}


SWITCHES = (
  ({}, {"flip": True, "randaugment": "rand-m9-n1-inc1:Invert"}),
  ({"color_jitter": 0.4}, {"color_jitter": 0.1}),
  (CROP, {"crop_scale": (0.2, 0.4), "crop_ratio": (2.0, 3.0),
          "interpolation": "bicubic"}),
  (MIXED, {"mixup_alpha": 5.0, "cutmix_alpha": 5.0, "cutmix_prob": 0.0,
           "mix_group_size": 4}),
  (ERASE, {"erase_prob": 1.0, "erase_mode": "pixel", "erase_area": (0.5, 0.9),
           "erase_aspect": (1.0, 1.0)}),
)  # fmt: skip


@pytest.mark.parametrize(("base", "changes"), SWITCHES)
def test_each_switch_acts(base, changes):
  # Not jitted: so many programs take longer to compile than to run.
  run = lambda config: np.asarray(
    augment.make_augment(common.augment_config(**config), **STATS)(
      jax.random.key(7), PHOTOS, TARGETS
    )[0]
  )
  before = run(base)
  for name, value in changes.items():
    assert not np.array_equal(run({**base, name: value}), before), name


@pytest.mark.slow
def test_devices_augment_their_own_images():
  """As one device would, bit for bit, and with nothing to tell each other."""
  augment_fn = augment.make_augment(
    common.augment_config(**EVERYTHING), **STATS
  )
  images = np.repeat(PHOTOS, 4, axis=0)
  targets = jnp.tile(TARGETS, (4, 1))
  mesh = sharding.make_mesh()
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  sharded = jax.jit(
    augment_fn, in_shardings=(whole, split, split), out_shardings=split
  )
  args = (jax.random.key(3), images, targets)
  text = sharded.lower(*args).compile().as_text()
  assert "fusion" in text
  collectives = r"all-(gather|reduce|to-all)|collective|reduce-scatter"
  assert not re.search(rf"= \S+ ({collectives})", text)
  ours = sharded(*args)
  alone = jax.jit(augment_fn)(*args)
  assert np.array_equal(ours[0], alone[0])
  assert np.array_equal(ours[1], alone[1])


@pytest.mark.slow
def test_memory_is_bounded(form):
  """At most four float32 batches for ImageNet's recipe."""
  augment_fn = augment.make_augment(
    common.augment_config(**IMAGENET), **STATS, crop=False
  )
  images = jax.ShapeDtypeStruct((16, 224, 224, 3), jnp.uint8)
  targets = jax.ShapeDtypeStruct((16, 1000), jnp.float32)
  compiled = jax.jit(augment_fn).lower(jax.random.key(0), images, targets)
  memory = compiled.compile().memory_analysis()
  assert 0 < memory.temp_size_in_bytes <= 4 * 4 * images.size


def test_normalize():
  ours = augment.make_normalize(**STATS)(PHOTOS)
  expected = (PHOTOS / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
  assert np.abs(ours - expected).max() < 1e-5
