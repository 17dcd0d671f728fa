import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import step as step_lib
from convmixer_jax.errors import UserError
from tests import common


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 150])
@pytest.mark.parametrize("steps_per_epoch", [1, 3.5, 97.66])
def test_schedule_is_the_authors(epochs, steps_per_epoch):
  schedule = optim.make_schedule("onecycle", 0.01, epochs, steps_per_epoch)
  steps = np.ceil(epochs * steps_per_epoch)
  counts = np.unique(np.linspace(0, steps - 1, 500).astype(int))
  expected = np.interp(
    (counts + 1) / steps_per_epoch,
    [0, epochs * 2 // 5, epochs * 4 // 5, epochs],
    [0, 0.01, 0.01 / 20, 0],
  )
  ours = jax.vmap(schedule)(jnp.array(counts))
  assert np.abs(ours - expected).max() < 1e-7
  assert ours[-1] == 0  # The last update does not move the weights.


def test_cosine_and_constant():
  """Half a cosine, after a straight line; the last update's rate is 0."""
  epochs, warmup, steps_per_epoch = 10, 2, 7
  schedules = [
    optim.make_schedule(name, 0.01, epochs, steps_per_epoch, warmup)
    for name in ("cosine", "constant")
  ]
  counts = np.arange(epochs * steps_per_epoch)
  epoch = (counts + 1) / steps_per_epoch
  rise = np.minimum(epoch / warmup, 1)
  done = np.clip((epoch - warmup) / (epochs - warmup), 0, 1)
  fall = 0.5 * (1 + np.cos(np.pi * done))
  for schedule, expected in zip(schedules, [rise * fall, rise]):
    ours = jax.vmap(schedule)(jnp.array(counts))
    assert np.abs(ours - 0.01 * expected).max() < 1e-8
  flat = optim.make_schedule("constant", 0.01, 3, 5)
  assert np.all(np.float32(0.01) == jax.vmap(flat)(jnp.arange(15)))


@pytest.mark.parametrize("name", ["trajectory", "trajectory_clip"])
def test_trajectory(name):
  """Twelve steps as PyTorch and timm take them: losses and every tensor."""
  golden = common.golden(name)
  config = json.loads(str(golden["config"]))
  model = models.ConvMixer(
    config["dim"],
    config["depth"],
    config["patch_size"],
    config["kernel_size"],
    config["num_classes"],
  )
  variables = common.variables(golden, "before")
  schedule = optim.make_schedule(
    "onecycle", config["lr"], config["epochs"], config["steps_per_epoch"]
  )
  tx = common.adamw(
    variables["params"],
    schedule,
    weight_decay=config["weight_decay"],
    eps=config["eps"],
    betas=config["betas"],
    clip_norm=config["clip"],
  )
  state = step_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=tx.init(variables["params"]),
    **jax.tree.map(jnp.asarray, variables),
  )
  no_augment = lambda key, images, targets: (images, targets)
  step = jax.jit(step_lib.make_train_step(model, tx, no_augment, seed=0))
  losses, norms = [], []
  for images, targets in zip(golden["input_nchw"], golden["targets"]):
    batch = {"image": common.nhwc(images), "label": targets}
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
    norms.append(metrics["grad_norm"])
  after = {"params": state.params, "batch_stats": state.batch_stats}
  assert common.tree_error(after, common.variables(golden, "after")) <= 2e-5
  lrs = [schedule(i) for i in range(12)]
  common.assert_close(np.array(losses), golden["losses"], 2e-5)
  common.assert_close(np.array(norms), golden["grad_norms"], 2e-5)
  common.assert_close(np.array(lrs), golden["lrs"], 1e-6)


def two_updates(scan=False, **settings):
  """The second of them; of ones, by a clipped gradient and a small one."""
  shapes = models.variable_shapes(common.tiny_model(scan=scan))["params"]
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  settings = {"weight_decay": 0.1, "clip_norm": 1.0, **settings}
  tx = common.adamw(params, **settings)
  _, state = tx.update(params, tx.init(params), params)
  return tx.update(jax.tree.map(lambda x: x / 99, params), state, params)[0]


@pytest.mark.parametrize(
  "change",
  [
    {"decay_all": True},
    {"weight_decay": 0.0},
    {"eps": 1e-8},
    {"betas": (0.8, 0.999)},
    {"betas": (0.9, 0.9)},
    {"clip_norm": 0.1},
  ],
  ids=str,
)
def test_each_setting_acts(change):
  """So none has the trajectories' value whatever the config says."""
  assert common.tree_error(two_updates(**change), two_updates()) > 1e-3


def test_freeze_keeps_what_it_names():
  updates = two_updates(freeze=("stem", "block_0/depthwise"))
  zero = lambda tree: all(not np.any(x) for x in jax.tree.leaves(tree))
  assert zero(updates["stem"])
  assert zero(updates["block_0"]["depthwise"])
  assert not zero(updates["stem_norm"])
  assert not zero(updates["block_0"]["depthwise_norm"])
  # Frozen gradients do not count in the norm that is clipped.
  some, none = (
    two_updates(freeze=freeze, eps=1.0)["head"]["bias"][0]
    for freeze in (("stem", "block_0"), ())
  )
  assert abs(some) > abs(none)
  with pytest.raises(UserError, match="block_7"):
    two_updates(freeze=("block_7",))


def test_a_scanned_models_blocks_are_frozen_and_scaled_one_by_one():
  settings = {
    "freeze": ("stem", "block_0/depthwise", "block_1"),
    "backbone_lr_scale": 0.25,
  }
  expected = models.stack_blocks(two_updates(**settings))
  ours = two_updates(scan=True, **settings)
  kernels = ours["blocks"]["depthwise"]["kernel"]
  assert not kernels.any()
  assert ours["blocks"]["pointwise"]["kernel"][0].all()
  assert common.tree_error(ours, expected) < 1e-6
  with pytest.raises(UserError, match=r"block_2: no parameter.*has block_0, b"):
    two_updates(scan=True, freeze=("block_2",))


def test_backbone_lr_scale():
  whole, scaled = two_updates(), two_updates(backbone_lr_scale=0.25)
  assert common.tree_error(scaled["head"], whole["head"]) == 0
  quarter = jax.tree.map(lambda x: x / 4, whole["block_1"])
  assert common.tree_error(scaled["block_1"], quarter) < 1e-6


def test_no_clip_is_no_clip():
  whole, clipped = (
    optax.tree.norm(two_updates(clip_norm=norm, eps=1e3)) for norm in (0, 1e-3)
  )
  assert whole > clipped
