import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import step as step_lib
from convmixer_jax.errors import UserError
from tests import common

# timm's counts for the published three, the paper's tables for the rest, whose
# other patch and kernel sizes are test_experiments'.
PARAMETERS = {
  "convmixer_1536_20": 51_625_960,
  "convmixer_768_32": 21_110_248,
  "convmixer_1024_20_ks9_p14": 24_383_464,
  "convmixer_1024_12": 14_621_672,
  "convmixer_512_16": 5_357_544,
  "convmixer_1024_16": 19_381_224,
  "convmixer_512_12": 4_165_608,
  "convmixer_256_8": 706_570,
  "convmixer_128_4": 103_434,
}


def num_parameters(model):
  return sum(
    x.size for x in jax.tree.leaves(models.variable_shapes(model)["params"])
  )


@pytest.mark.parametrize("name", models.convmixer.VARIANTS)
def test_parameter_counts(name):
  classes = 10 if name in ("convmixer_256_8", "convmixer_128_4") else 1000
  model = models.create_model(name, classes, scan=True)  # Is traced sooner.
  assert num_parameters(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["k7p4", "k8p1", "relu_k3p2"])
class TestGoldens:
  """timm's numbers, on random weights and BatchNorm statistics.

  Among them an even kernel, ReLU, and images that the patch does not divide.
  """

  def setup(self, name):
    golden = common.golden(f"convmixer_{name}")
    before = common.variables(golden, "before")
    params = before["params"]
    model = models.ConvMixer(
      dim=params["stem"]["bias"].shape[0],
      depth=sum(name.startswith("block_") for name in params),
      patch_size=params["stem"]["kernel"].shape[0],
      kernel_size=params["block_0"]["depthwise"]["kernel"].shape[0],
      num_classes=params["head"]["bias"].shape[0],
      activation="relu" if "relu" in name else "gelu",
    )
    return golden, model, before, common.nhwc(golden["input_nchw"])

  def test_inference(self, name):
    golden, model, variables, images = self.setup(name)
    logits = model.apply(variables, images, train=False)
    features = model.apply(variables, images, train=False, return_features=True)
    common.assert_close(logits, golden["eval_logits"], 2e-5)
    common.assert_close(
      features, common.nhwc(golden["eval_features_nchw"]), 2e-5
    )

  def test_training(self, name):
    golden, model, variables, images = self.setup(name)
    targets = step_lib.soft_targets(
      jnp.array(golden["labels"]), model.num_classes, 0.1
    )

    def loss_fn(params):
      logits, updated = model.apply(
        {**variables, "params": params},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      loss = optax.softmax_cross_entropy(logits, targets).mean()
      return loss, (logits, updated)

    (loss, (logits, updated)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(variables["params"])
    common.assert_close(logits, golden["train_logits"], 2e-5)
    common.assert_close(loss, golden["train_loss"], 2e-5)
    after = common.variables(golden, "after")
    assert common.tree_error(updated, after) <= 2e-5
    golden_grads = common.variables(golden, "grad")["params"]
    assert common.tree_error(grads, golden_grads) <= 5e-5


def test_interop_round_trip():
  golden = common.golden("convmixer_k7p4")
  before = {
    k.removeprefix("before/"): v
    for k, v in golden.items()
    if k.startswith("before/") and "num_batches" not in k
  }
  back = interop.to_torch(interop.from_torch(before))
  assert back.keys() == before.keys()
  assert all(np.array_equal(back[k], before[k]) for k in before)
  with pytest.raises(UserError, match=r"layers\.0\.weight"):
    interop.from_torch({"layers.0.weight": np.zeros(3)})


def perturbed(model, size=8):
  """Variables with every leaf random, BatchNorm's included."""
  images = jnp.zeros((1, size, size, 3))
  variables = model.init(jax.random.key(0), images, train=False)
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    jnp.abs(x + 0.1 * jax.random.normal(key, x.shape))
    for key, x in zip(keys, leaves)
  ]
  return jax.tree.unflatten(tree, leaves)


def test_a_scanned_model_starts_with_the_unrolled_ones_values():
  model = common.tiny_model(depth=3)
  init = lambda model: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), 0)
  scanned, plain = init(model.clone(scan=True)), init(model)
  equal = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
  assert scanned["params"]["blocks"]["pointwise"]["kernel"].shape == (3, 8, 8)
  assert equal(scanned, models.stack_blocks(plain))
  assert equal(models.unstack_blocks(scanned), plain)
  assert num_parameters(model.clone(scan=True)) == num_parameters(model)


@pytest.mark.parametrize(
  ("scan", "remat"),
  [(True, None), (False, "nothing_saveable"), (True, "nothing_saveable")],
)
def test_scan_and_remat_compute_the_same(scan, remat):
  plain = common.tiny_model(depth=2)
  variables = perturbed(plain)
  images = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))

  def loss_fn(model):
    def loss(params, batch_stats):
      logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      return jnp.square(logits).sum(), updated["batch_stats"]

    return jax.jit(jax.grad(loss, has_aux=True))

  as_scan = models.stack_blocks if scan else (lambda v: v)
  expected = loss_fn(plain)(variables["params"], variables["batch_stats"])
  expected = as_scan(dict(zip(("params", "batch_stats"), expected)))
  inputs = as_scan(variables)
  model = common.tiny_model(depth=2, scan=scan, remat=remat)
  shapes = jax.tree.map(jnp.shape, models.variable_shapes(model))
  assert shapes == jax.tree.map(jnp.shape, inputs)
  ours = loss_fn(model)(inputs["params"], inputs["batch_stats"])
  ours = dict(zip(("params", "batch_stats"), ours))
  assert common.tree_error(ours, expected) <= 5e-5


@pytest.mark.slow
def test_remat_saves_memory():
  """Of 48 blocks the gradient keeps only their inputs."""
  images = jnp.zeros((4, 32, 32, 3))
  model = common.tiny_model(depth=48, scan=True)
  shapes = models.variable_shapes(model)
  variables = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)

  def temporary(remat):
    apply = model.clone(remat=remat).apply
    loss = lambda params: apply(
      variables | {"params": params}, images, True, mutable=["batch_stats"]
    )[0].sum()
    compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary("nothing_saveable") < temporary(None) / 3


def test_init_is_pytorchs():
  """Uniform in +-1/sqrt(fan_in), biases too; BatchNorm 1 and 0."""
  model = models.ConvMixer(128, 1, 4, 5, 50)
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)[
    "params"
  ]
  fan_in = {
    "stem": 3 * 4 * 4,
    "block_0/depthwise": 5 * 5,
    "block_0/pointwise": 128,
    "head": 128,
  }
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  for name, value in flat.items():
    layer, _, leaf = name.rpartition("/")
    if layer.endswith("_norm"):
      assert np.all(value == (1 if leaf == "scale" else 0)), name
      continue
    bound = fan_in[layer] ** -0.5
    assert np.abs(value).max() <= bound, name
    assert np.abs(value).max() > 0.9 * bound, name
    # The variance of a uniform law is bound^2 / 3.
    spread = 3 if value.size < 1000 else 1.15
    assert 1 / spread < 3 * value.var() / bound**2 < spread, name


def test_switches_change_what_they_name():
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  plain = common.tiny_model()
  variables = perturbed(plain)
  base = plain.apply(variables, images, train=False)
  for field in (
    {"depthwise_residual": False},
    {"pointwise_residual": True},
    {"activation": "relu"},
  ):
    other = common.tiny_model(**field).apply(variables, images, train=False)
    assert common.relative_error(other, base) > 1e-2, field


def test_layer_norm_is_over_channels():
  model = common.tiny_model(norm="layer", depth=1)
  variables = model.init(
    jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
  )
  assert "batch_stats" not in variables
  features = model.apply(
    variables,
    jax.random.normal(jax.random.key(1), (2, 8, 8, 3)),
    train=True,
    return_features=True,
  )
  assert np.abs(features.mean(-1)).max() < 1e-5
  assert np.allclose(features.var(-1), 1, atol=2e-2)
  assert num_parameters(model) == num_parameters(common.tiny_model(depth=1))


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  model = common.tiny_model(dtype=jnp.bfloat16)
  variables = perturbed(model)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  features = model.apply(variables, images, train=False, return_features=True)
  logits = model.apply(variables, images, train=False)
  exact = common.tiny_model().apply(variables, images, train=False)
  assert features.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  assert 0 < common.relative_error(logits, exact) < 2e-2


def test_create_model_refuses():
  with pytest.raises(UserError, match="convmixer_256_8"):
    models.create_model("convmixer_256_9")
  with pytest.raises(UserError, match="heads"):
    models.create_model("convmixer_256_8", heads=3)


@pytest.mark.parametrize(
  "scan", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_features_after_any_block(scan):
  """Those of a shallower model, at any size; pooled, what the head sees."""
  model = common.tiny_model(depth=3, scan=scan)
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False)
  variables = jax.jit(init)()
  images = jax.random.normal(jax.random.key(1), (2, 12, 20, 3))
  after = lambda n: model.apply(
    variables, images, False, return_features=True, num_blocks=n
  )
  maps = [after(n) for n in range(4)]
  assert all(m.shape == (2, 6, 10, 8) for m in maps)
  assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(maps))
  assert np.array_equal(maps[3], after(None))
  shallow = common.tiny_model(depth=2, scan=scan)
  cut = jax.tree.map(lambda x: x[:2], variables["params"].get("blocks", {}))
  stats = jax.tree.map(lambda x: x[:2], variables["batch_stats"].get("blocks"))
  if scan:
    variables = {
      "params": variables["params"] | {"blocks": cut},
      "batch_stats": variables["batch_stats"] | {"blocks": stats},
    }
  expected = shallow.apply(variables, images, False, return_features=True)
  common.assert_close(maps[2], expected, 1e-6)
  head = variables["params"]["head"]
  logits = expected.mean((1, 2)) @ head["kernel"] + head["bias"]
  common.assert_close(shallow.apply(variables, images, False), logits, 1e-5)
  with pytest.raises(ValueError, match="from 0 to 3"):
    after(4)
