import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convmixer_jax import augment
from convmixer_jax import evaluate
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax.data import sources
from tests import common

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 32, 8, 8, 3), np.uint8)
AUGMENTED = {
  "flip": True,
  "crop_scale": (0.5, 1.0),
  "crop_ratio": (0.75, 4 / 3),
  "color_jitter": 0.2,
  "mixup_alpha": 0.5,
  "cutmix_alpha": 0.5,
  "mix_group_size": 4,
  "erase_prob": 0.25,
}
LABELS = RNG.integers(0, 10, (10, 32)).astype(np.int32)


@functools.cache
def run(*, devices=1, bn_group_size=0, accum_steps=1):
  """Trains a small ConvMixer for ten steps; returns its state as numpy."""
  model = common.tiny_model(depth=1, bn_group_size=bn_group_size)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  replicated = sharding.replicated(mesh)
  params = models.variable_shapes(model)["params"]
  tx = common.adamw(
    params,
    optim.make_schedule("onecycle", 0.01, 5, 4),
    weight_decay=0.01,
    clip_norm=1.0,
  )
  augment_fn = augment.make_augment(
    common.augment_config(**AUGMENTED), mean=(0.5,) * 3, std=(0.25,) * 3
  )
  step = jax.jit(
    step_lib.make_train_step(
      model,
      tx,
      augment_fn,
      seed=1,
      accum_steps=accum_steps,
      batch_sharding=sharding.batch_sharding(mesh),
    ),
    in_shardings=(replicated, sharding.batch_sharding(mesh)),
    out_shardings=replicated,
    donate_argnums=0,
  )
  init = lambda key: step_lib.init_state(key, model, tx, 8)
  state = jax.jit(init, out_shardings=replicated)(jax.random.key(0))
  for images, labels in zip(IMAGES, LABELS):
    batch = {"image": images, "label": labels}
    state, metrics = step(state, sharding.to_global(mesh, batch, 32))
  assert state.step == 10
  return jax.device_get((trees(state), metrics))


def trees(state):
  return {"params": state.params, "batch_stats": state.batch_stats}


# Groups of 0 (all 32 images) and 16 span devices that hold 4 images each; those
# of 4 do not. Float32 sums in another order: 2e-5 after ten steps.
@pytest.mark.slow
@pytest.mark.parametrize("bn_group_size", [0, 4, 16])
def test_one_device_equals_eight(bn_group_size):
  one, eight = (
    run(devices=devices, bn_group_size=bn_group_size) for devices in (1, 8)
  )
  assert common.tree_error(eight, one) <= 2e-5


@pytest.mark.parametrize(
  ("devices", "accum_steps"),
  # 8 microbatches of 4 images: fewer than the devices.
  [pytest.param(1, 4, marks=pytest.mark.slow), (8, 8)],
)
def test_accumulation_equals_one_large_batch(devices, accum_steps):
  """Also one device as eight do. Without groups it would not: test_recipe."""
  group = 32 // accum_steps
  whole = run(bn_group_size=group)
  parts = run(devices=devices, bn_group_size=group, accum_steps=accum_steps)
  assert common.tree_error(parts, whole) <= 2e-5


def test_augmentation_depends_on_seed_and_step_alone():
  first, again = (f(bn_group_size=4) for f in (run, run.__wrapped__))
  assert common.tree_error(again, first) == 0


class Scores:
  """A stand-in for a model: pixel 0 says which class it answers."""

  num_classes = 7

  def apply(self, variables, images, train):
    assert not train
    guess = jnp.round(images[:, 0, 0, 0]).astype(int)
    # Classes after the guess, cyclically, get ever lower scores.
    return -((jnp.arange(7) - guess[:, None]) % 7).astype(jnp.float32)


def make_score(source, state, batch_size, devices, max_unreadable=0):
  config = common.digits_config(batch_size=batch_size)
  config.data.max_unreadable = max_unreadable
  # Pixels stay as they are.
  config.data.update(image_size=2, mean=(0.0,) * 3, std=(1 / 255,) * 3)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  recipe = recipe_lib.Recipe(config, source, mesh, Scores(), None, None, None)
  return evaluate.make_evaluate(recipe, source, state)


# 3, 8 and 20 do not divide 45; 64 exceeds it.
@pytest.mark.parametrize("batch_size", [3, 8, 20, 45, 64])
@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_counts_once(batch_size, devices):
  rng = np.random.default_rng(2)
  labels = rng.integers(0, 7, 45).astype(np.int32)
  guesses = rng.integers(0, 7, 45)
  images = np.zeros((45, 2, 2, 3), np.uint8)
  images[:, 0, 0, 0] = guesses
  source = sources.InMemory(images, labels, [str(i) for i in range(7)])
  state = step_lib.TrainState(jnp.zeros(()), {}, {}, ())
  score = make_score(source, state, batch_size, devices)
  metrics = score(state)
  distance = (labels - guesses) % 7
  losses = distance + np.log(np.exp(-np.arange(7)).sum())
  assert metrics["count"] == 45
  assert metrics["top1"] == pytest.approx(100 * np.mean(distance == 0))
  assert metrics["top5"] == pytest.approx(100 * np.mean(distance < 5))
  assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
  pairs = np.zeros((7, 7), int)
  np.add.at(pairs, (labels, guesses), 1)
  assert np.array_equal(metrics["confusion"], pairs)
  assert score(state, stopped=lambda: True) is None


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_of_more_than_five_classes(monkeypatch, classes):
  labels = np.arange(classes, dtype=np.int32)
  images = np.zeros((classes, 2, 2, 3), np.uint8)
  images[:, 0, 0, 0] = labels
  source = sources.InMemory(images, labels, list("abcdef")[:classes])
  monkeypatch.setattr(Scores, "num_classes", classes)
  state = step_lib.TrainState(jnp.zeros(()), {}, {}, ())
  metrics = make_score(source, state, classes, 1)(state)
  assert ("top5" in metrics) == (classes > 5)
  line = logger.eval_line(metrics)
  assert line.startswith("top-1 100.00 %  ")
  assert ("top-5" in line) == (classes > 5)


def test_nan_logits_are_no_hits_and_show():
  class Model(Scores):
    def apply(self, variables, images, train):
      return images

  logits = jnp.eye(4, 7).at[1].set(jnp.nan).at[2, 2].set(jnp.nan)
  eval_step = step_lib.make_eval_step(Model(), lambda images: images)
  state = step_lib.TrainState(jnp.zeros(()), {}, {}, ())
  batch = {"image": logits, "label": jnp.arange(4), "mask": jnp.ones(4, bool)}
  sums = eval_step(state, batch)
  assert (sums["count"], sums["top1"], sums["top5"]) == (4, 2, 2)
  assert sums["confusion"].sum() == jnp.trace(sums["confusion"]) == 2
  assert jnp.isnan(sums["loss"])


def test_a_lost_image_is_an_error(monkeypatch):
  source = sources.InMemory(
    np.zeros((9, 2, 2, 3), np.uint8), np.zeros(9, np.int32), list("abcdefg")
  )
  batches = evaluate.stream.eval_batches
  monkeypatch.setattr(
    evaluate.stream,
    "eval_batches",
    lambda *a, **k: (b for b in list(batches(*a, **k))[:-1]),
  )
  state = step_lib.TrainState(jnp.zeros(()), {}, {}, ())
  score = make_score(source, state, 4, 1)
  with pytest.raises(RuntimeError, match="8 of 9"):
    score(state)
  # One that may be unreadable counts nowhere.
  metrics = make_score(source, state, 4, 1, max_unreadable=1)(state)
  assert (metrics["count"], metrics["top1"], metrics["top5"]) == (8, 100, 100)


def test_ema_follows_and_is_what_counts():
  """The averages by hand over three steps, and evaluation by them."""
  model = common.tiny_model(depth=1)
  tx = common.adamw(models.variable_shapes(model)["params"])
  normalize = augment.make_normalize((0.5,) * 3, (0.25,) * 3)
  augment_fn = lambda key, images, targets: (normalize(images), targets)
  step = jax.jit(
    step_lib.make_train_step(model, tx, augment_fn, seed=0, ema_decay=0.75)
  )
  init = lambda key: step_lib.init_state(key, model, tx, 8, ema=True)
  state = jax.jit(init)(jax.random.key(0))
  expected = jax.device_get(trees(state))
  for images, labels in zip(IMAGES[:3], LABELS):
    state, _ = step(state, {"image": images, "label": labels})
    after = jax.device_get(trees(state))
    expected = jax.tree.map(lambda e, v: 0.75 * e + 0.25 * v, expected, after)
  assert common.tree_error(state.ema, expected) < 1e-6
  assert common.tree_error(state.params, expected["params"]) > 1e-2
  score = jax.jit(step_lib.make_eval_step(model, normalize))
  batch = {"image": IMAGES[0], "label": LABELS[0], "mask": np.ones(32, bool)}
  of_ema = score(state, batch)["loss"]
  assert of_ema == score(state.replace(ema={}, **state.ema), batch)["loss"]
  assert of_ema != score(state.replace(ema={}), batch)["loss"]
