"""A config's fields all arrive: a recipe's parts, beside ones wired by hand."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convmixer_jax import evaluate
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sharding
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from convmixer_jax.ops import tpu
from tests import common

# Every field that the step depends on, off its default and digits' own value.
AUGMENT = {
  "flip": True,
  "crop_scale": (0.3, 0.7),
  "crop_ratio": (0.5, 1.5),
  "interpolation": "bicubic",
  "randaugment": "rand-m9-inc1:Invert",
  "color_jitter": 0.3,
  "mixup_alpha": 0.4,
  "cutmix_alpha": 0.6,
  "cutmix_prob": 0.3,
  "mix_group_size": 4,
  "erase_prob": 0.6,
  "erase_mode": "const",
  "erase_area": (0.1, 0.2),
  "erase_aspect": (0.5, 2.0),
}
OPTIM = {
  "learning_rate": 0.03,
  "schedule": "cosine",
  "warmup_epochs": 0.5,
  "weight_decay": 0.2,
  "decay_all": True,
  "eps": 1e-4,
  "betas": (0.7, 0.8),
  "clip_norm": 0.05,
}
MODEL = {"dim": 6, "depth": 1, "patch_size": 2, "kernel_size": 4,
         "activation": "relu", "pointwise_residual": True,
         "depthwise_residual": False}  # fmt: skip
MEAN, STD = (0.2, 0.3, 0.4), (0.3, 0.2, 0.5)
RNG = np.random.default_rng(0)
SOURCE = sources.InMemory(
  RNG.integers(0, 256, (40, 8, 8, 3), np.uint8),
  RNG.integers(0, 5, 40).astype(np.int32),
  list("abcde"),
)


def make_recipe(**more):
  fields = {f"augment.{k}": v for k, v in AUGMENT.items()}
  fields |= {f"optim.{k}": v for k, v in OPTIM.items()}
  fields |= {f"model.{k}": v for k, v in MODEL.items()}
  fields |= {
    "augment.label_smoothing": 0.3,
    "data.mean": MEAN,
    "data.std": STD,
    "batch_size": 16,
    "accum_steps": 2,
    "ema_decay": 0.4,
    "epochs": 3,
    "seed": 5,
    "freeze": ("stem",),
    "backbone_lr_scale": 0.25,
  }
  config = common.digits_config(**fields | more)
  return recipe_lib.build(config, SOURCE, jax.devices()[:1])


def noisy(key, images, targets):
  """A stand-in for augmentation, for its key and its place in the step."""
  return images / 255 + jax.random.normal(key, images.shape), targets


def test_the_step_is_what_the_config_says(monkeypatch):
  asked = []

  def make_augment(config, **options):
    asked.append((dict(config), options))
    return noisy

  monkeypatch.setattr(recipe_lib.augment, "make_augment", make_augment)
  recipe = make_recipe()
  state = recipe.init_state()
  batch = {"image": SOURCE.images[:16], "label": SOURCE.labels[:16]}
  model = models.ConvMixer(num_classes=5, **MODEL)
  schedule = optim.make_schedule("cosine", 0.03, 3, 40 / 16, 0.5)
  tx = optim.make_optimizer(
    schedule, state.params, OPTIM, freeze=("stem",), backbone_lr_scale=0.25
  )

  @jax.jit
  def by_hand(batch):
    variables = model.init(jax.random.key(5), jnp.zeros((1, 8, 8, 3)), False)
    params = variables["params"]
    targets = 0.7 * jax.nn.one_hot(batch["label"], 5) + 0.3 / 5
    key = jax.random.fold_in(jax.random.key(5), 0)
    images, targets = noisy(key, batch["image"], targets)

    def loss(params, half):
      logits, updated = model.apply(
        variables | {"params": params},
        images[half],
        True,
        mutable="batch_stats",
      )
      loss = optax.softmax_cross_entropy(logits, targets[half]).mean()
      hits = logits.argmax(-1) == targets[half].argmax(-1)
      metrics = {"loss": loss, "top1": 100.0 * hits.mean()}
      return loss, (updated["batch_stats"], metrics)

    halves = [
      jax.grad(loss, has_aux=True)(params, half)
      for half in (slice(0, 8), slice(8, 16))
    ]
    grads, (stats, metrics) = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = {"params": optax.apply_updates(params, updates), "batch_stats": stats}
    ema = jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, variables, new)
    return new, ema, metrics | {"grad_norm": optax.tree.norm(grads)}

  new, ema, expected = by_hand(batch)
  assert expected["top1"] > 0
  before = state
  state, metrics = recipe.train_step(recipe.seed, state, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
  assert common.tree_error(state.params, new["params"]) <= 2e-5
  assert common.tree_error(state.batch_stats, new["batch_stats"]) <= 2e-5
  assert common.tree_error(state.ema, ema) <= 2e-5
  assert common.tree_error(metrics, expected) <= 2e-5
  groups = make_recipe(**{"model.bn_group_size": 4}).model.bn_group_size
  assert groups == 4  # With it, accumulation would change nothing above.
  # What acts on GPUs and TPUs only.
  in_pallas = {"model.implementation": "pallas"}
  with monkeypatch.context() as context:
    context.setattr(jax, "jit", lambda f, **options: options)
    context.setattr(tpu, "compiler_options", lambda device: {"memory": 48})
    for fields, of_compiler in (
      ({"deterministic": True}, {"xla_gpu_deterministic_ops": True}),
      (in_pallas, {"memory": 48}),
      (in_pallas | {"model.scan": True}, {}),
      ({}, {}),
    ):
      options = make_recipe(**fields).train_step["compiler_options"]
      assert options == of_compiler
  config, options = asked[0]
  assert AUGMENT.items() <= config.items()
  wanted = {"mean": MEAN, "std": STD, "crop": True, "policy": True}
  assert options == wanted
  assert (recipe.total_steps, recipe.steps_per_epoch) == (8, 2.5)
  due = [n for n in range(1, 9) if recipe.is_due(n, None)]
  assert due == [3, 5, 8]  # The first steps beyond 40, 80 and 120 samples.
  assert [n for n in range(1, 9) if recipe.is_due(n, 3)] == [3, 6, 8]


def test_batches_get_what_the_config_says(monkeypatch):
  """The crops of images that the host decodes, and those of evaluation."""
  recipe = make_recipe()
  recipe.config.data.update(num_workers=3, max_unreadable=7, crop_pct=0.8)
  given = {}

  def keep(source, **options):
    given.update(options)
    return iter(())

  monkeypatch.setattr(stream, "train_batches", keep)
  monkeypatch.setattr(stream, "eval_batches", keep)
  recipe.train_batches(2, 4)
  common_fields = {"batch_size": 16, "image_size": 8, "num_workers": 3,
                   "max_unreadable": 7}  # fmt: skip
  wanted = common_fields | {
    "seed": 5,
    "start": 2,
    "stop": 4,
    "scale": (0.3, 0.7),
    "ratio": (0.5, 1.5),
    "interpolation": "bicubic",
  }
  assert wanted.items() <= given.items()
  given.clear()
  score = evaluate.make_evaluate(recipe, SOURCE, recipe.init_state())
  score(None, stopped=lambda: True)
  assert (common_fields | {"crop_pct": 0.8}).items() <= given.items()
  # The host crops what has another size, and then the step does not.
  encoded = sources.Encoded(None, 40, list("abcde"))
  whole = dataclasses.replace(encoded, crop_on_device=True)
  for data, crops in ((SOURCE, True), (whole, True), (encoded, False)):
    called = []
    monkeypatch.setattr(
      recipe_lib.augment,
      "make_augment",
      lambda *args, crop, called=called, **kw: called.append(crop),
    )
    _ = recipe_lib.build(recipe.config, data, jax.devices()[:1]).augment
    assert called == [crops]


def recipe_on_a_tpu(monkeypatch, on_tpu=True):
  host = sharding.make_mesh(jax.devices()[:1]) if on_tpu else None
  monkeypatch.setattr(recipe_lib, "_host", lambda *_: host)
  return make_recipe(**{"augment.randaugment": "rand-m9-mstd0.5-inc1"})


def test_the_host_applies_the_policy_as_the_step_does(monkeypatch):
  """Crop, flip and RandAugment before the step, bit for bit."""
  runs = []
  for on_host in (False, True):
    recipe = recipe_on_a_tpu(monkeypatch, on_host)
    state, seen = recipe.init_state().replace(step=np.int32(3)), []
    for step, batch in enumerate(recipe.train_batches(3, 5), 3):
      seen.append((batch, recipe.training_images(batch, step)))
      state, metrics = recipe.train_step(recipe.seed, state, batch)
    runs.append((seen, jax.device_get((state.params, metrics))))
  (seen, result), (seen_host, result_host) = runs
  jax.tree.map(np.testing.assert_array_equal, result, result_host)
  for (batch, images), (batch_host, images_host) in zip(seen, seen_host):
    jax.tree.map(np.testing.assert_array_equal, images, images_host)
    same = batch["image"] == batch_host["image"]
    assert same.mean() < 0.5  # The host did it, not the step.


def test_a_host_has_some_rows_of_a_batch(monkeypatch):
  recipe = recipe_on_a_tpu(monkeypatch)
  whole = next(recipe.train_batches(1, 2))
  rows = np.array([3, 4, 9])
  monkeypatch.setattr(sharding, "local_rows", lambda *_: rows)
  part = next(recipe_on_a_tpu(monkeypatch).train_batches(1, 2))
  np.testing.assert_array_equal(part["image"], whole["image"][rows])


def test_which_devices_need_the_host(monkeypatch):
  mesh = mock.Mock(devices=np.array([mock.Mock(platform="tpu")]))
  config = make_recipe().config
  assert recipe_lib._host(config, mesh).devices.tolist() == jax.devices()[:1]
  assert recipe_lib._host(config, sharding.make_mesh()) is None
  config.augment.randaugment = ""
  assert recipe_lib._host(config, mesh) is None

  def local_devices(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  config.augment.randaugment = "rand-m9-inc1"
  monkeypatch.setattr(jax, "local_devices", local_devices)
  with pytest.raises(UserError, match="set JAX_PLATFORMS=tpu,cpu"):
    recipe_lib._host(config, mesh)
