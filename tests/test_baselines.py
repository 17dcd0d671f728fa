"""The families beside ConvMixer: exact beside timm, and in one trainer."""

import json

import flax.linen as nn
import jax
from jax import export as jax_export
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from benchmarks import layers
from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import export
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sharding
from convmixer_jax import weights
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.models import resnet
from tests import common

TINY = {"dim": 24, "depth": 2, "patch_size": 8}
GOLDENS = {
  "mixer_b16_224": TINY,
  "gmlp_ti16_224": TINY,
  "resmlp_12_224": TINY,
  "vit_base_patch16_224": TINY | {"heads": 3},
  "resnet50": {"depths": (1, 2, 1, 1), "widths": (8, 16, 16, 24)},
}


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_timms(name):
  golden = common.golden(f"baseline_{name}")
  tensors = {
    k.removeprefix("before/"): v
    for k, v in golden.items()
    if k.startswith("before/") and not k.endswith("num_batches_tracked")
  }
  variables = interop.from_torch(tensors)
  model = models.create_model(name, num_classes=7, **GOLDENS[name])
  images = common.nhwc(golden["input_nchw"])
  shapes = models.variable_shapes(model, images.shape[1])
  variables = {"batch_stats": {}} | variables
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
  logits = jax.jit(model.apply, static_argnums=2)(variables, images, False)
  common.assert_close(logits, golden["eval_logits"], 2e-5)
  logits, _ = jax.jit(
    lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])
  )(variables, images)
  common.assert_close(logits, golden["train_logits"], 2e-5)
  # And back, by the names alone.
  back = interop.to_torch(variables)
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[k], tensors[k]) for k in back)
  broken = tensors | {"blocks.0.other.weight": np.zeros(3, np.float32)}
  with pytest.raises(UserError, match="not a tensor of timm's"):
    interop.from_torch(broken)


QUICK = ("mixer_b16_224", "vit_base_patch16_224")
quick = lambda names: [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name in names
]


@pytest.mark.parametrize("name", quick(GOLDENS))
def test_files_load_whole_or_say_what_is_wrong(name, tmp_path):
  golden = common.golden(f"baseline_{name}")
  tensors = {
    k.removeprefix("before/"): np.asarray(v, np.float32)
    for k, v in golden.items()
    if k.startswith("before/") and not k.endswith("num_batches_tracked")
  }
  path = tmp_path / "x.safetensors"

  def load(tensors):
    safetensors.save_file(tensors, path)
    return weights.load_model(path)

  model, _, data = load(tensors)
  size = golden["input_nchw"].shape[-1]
  assert data["image_size"] == (224 if name == "resnet50" else size)
  assert model.num_classes == 7
  first = [k for k in tensors if "blocks.1" not in k and "layer" not in k]
  for tensor in [*first, "layer1.0.conv2.weight"]:
    if tensor not in tensors:
      continue
    rest = {k: v for k, v in tensors.items() if k != tensor}
    value = tensors[tensor]
    for wrong in ({}, {tensor: np.stack([value] * 3)}, {tensor: value[:0]}):
      with pytest.raises(UserError, match=r"x.safetensors: ") as e:
        load(rest | wrong)
      assert "\n" not in str(e.value)


def test_position_embeddings_are_interpolated_as_timm_does():
  golden = common.golden("positions")
  for old, new in ((4, 7), (7, 4), (6, 3)):
    before = {"positions": golden[f"before_{old}_{new}"]}
    after = golden[f"after_{old}_{new}"]
    found = models.vit.at_resolution(before, {"positions": after})["positions"]
    common.assert_close(found, after, 2e-5)
    same = models.vit.at_resolution(before, before)
    assert same is before


def count_parameters(model):
  shapes = models.variable_shapes(model, 224)
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
  "resnets", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_parameters_are_as_many_as_timms(resnets):
  counts = json.loads((common.DATA / "timm_param_counts.json").read_text())
  for name, count in counts.items():
    if ("resnet" in name) != resnets:
      continue
    model = models.create_model(name)
    if resnets:
      ours = count_parameters(model)
    else:  # Few blocks are traced sooner.
      one, two = (count_parameters(model.clone(depth=n)) for n in (1, 2))
      ours = one + (model.depth - 1) * (two - one)
    assert ours == count, name


def test_a_pooled_stem_has_stride_1_and_a_mean_over_each_patch():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 10, 10, 3)).astype(np.float32)
  for name, fields in (
    ("convmixer_256_8", {"dim": 8, "depth": 1, "kernel_size": 3}),
    ("resnet50", GOLDENS["resnet50"]),
  ):
    fields |= {"patch_size": 4}
    model = models.create_model(name, 7, pooled_stem=True, **fields)
    shapes = models.variable_shapes(model, 10)
    variables = jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape), shapes)
    variables = jax.tree.map(np.float32, variables)
    plain = models.create_model(name, 7, **fields)
    assert models.variable_shapes(plain, 10) == shapes
    x = model.apply(variables, images, False, True, 0)

    params, stats = variables["params"], variables["batch_stats"]["stem_norm"]
    padded = jnp.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0)))
    windows = jnp.stack([
      padded[:, i : i + 10, j : j + 10] for i in range(4) for j in range(4)
    ])  # fmt: skip
    kernel = params["stem"]["kernel"].reshape(16, 3, -1)
    y = jnp.einsum("tbhwc,tcd->bhwd", windows, kernel, precision="highest")
    if name != "resnet50":
      y = jax.nn.gelu(y + params["stem"]["bias"], approximate=False)
    y = (y - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    y = y * params["stem_norm"]["scale"] + params["stem_norm"]["bias"]
    y = jax.nn.relu(y) if name == "resnet50" else y
    y = y[:, :8, :8].reshape(2, 2, 4, 2, 4, -1).mean((2, 4))
    common.assert_close(x, y, 1e-5)
  with pytest.raises(UserError, match=r"pooled_stem: needs config.model.patch"):
    models.create_model("resnet50", pooled_stem=True).check(32)


SOURCE = sources.open_source("digits", None, "train[:32]", 8)
ISOTROPIC = "mobilenetv3_isotropic_64_8"
FAMILIES = {
  "mixer_s16_224": {"dim": 8, "depth": 2},
  "gmlp_ti16_224": {"dim": 8, "depth": 2},
  "resmlp_12_224": {"dim": 8, "depth": 2},
  "deit_tiny_patch16_224": {"dim": 8, "depth": 2, "heads": 2},
  "resnet50": {"depths": (1, 1), "widths": (4, 8)},
  ISOTROPIC: {"dim": 8, "depth": 2, "kernel_size": 3},
}


def build(name, devices, **more):
  fields = models.create_model(name).__dataclass_fields__
  random = {"drop_path": 0.3, "dropout": 0.2}
  values = {"patch_size": 2, "scan": False} | random | FAMILIES[name]
  values = {k: v for k, v in values.items() if k in fields}
  config = common.digits_config(
    **{f"model.{k}": None for k in ("dim", "depth", "kernel_size")}
    | {f"model.{k}": v for k, v in values.items()}
    | {"model.name": name, "batch_size": 16, "accum_steps": 2}
    | more
  )
  config_lib.check(config, devices)
  return recipe_lib.build(config, SOURCE, jax.devices()[:devices])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_take_any_batch(name, tmp_path):
  model = build(name, 1).model
  shapes = models.variable_shapes(model, 8)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.uniform(-1, 1, x.shape), shapes)
  variables["batch_stats"] = jax.tree.map(np.square, variables["batch_stats"])
  zero = (0.0,) * 3
  function = export.inference_function(model, variables, zero, (1.0,) * 3)
  path = export.write_stablehlo(function, 8, tmp_path)
  call = jax_export.deserialize(bytearray(path.read_bytes())).call
  images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
  logits = model.apply(variables, images / np.float32(255), False)
  common.assert_close(call(images), logits, 1e-5)


def steps(recipe, state, start, stop):
  for batch in recipe.train_batches(start, stop):
    batch = sharding.to_global(recipe.mesh, batch, 16)
    state, metrics = recipe.train_step(recipe.seed, state, batch)
  return state, metrics["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_device_equals_eight_scanned_and_resumed(name, portable, tmp_path):
  """With dropout and drop path, whose draws are those of the whole batch."""
  recipe = build(name, 1)
  state, loss = steps(recipe, recipe.init_state(), 0, 2)

  first, _ = steps(recipe, recipe.init_state(), 0, 1)
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, first)
  checkpointer.close()
  resumed = checkpoint.restore(tmp_path, recipe.init_state(), 2)
  resumed, _ = steps(recipe, resumed, 1, 2)
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed, state))

  options = {"model.scan": True, "model.remat": "nothing_saveable"}
  options = options if name != "resnet50" else {}
  recipe = build(name, 8, **options)
  other, other_loss = steps(recipe, recipe.init_state(), 0, 2)
  other = models.unstack_blocks(jax.device_get(other))
  assert common.relative_error(other_loss, loss) <= 1e-5
  # All at once, for some biases have no effect but through rounding.
  params, others = (flatten_util.ravel_pytree(s.params)[0]
                    for s in (state, other))  # fmt: skip
  common.assert_close(others, params, 1e-4)
  assert (state.batch_stats != {}) == (name in ("resnet50", ISOTROPIC))


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 8)])
def test_max_pool(shape):
  """Of small integers, so that many windows have equal values."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(-1, 3, (2, *shape, 3)), jnp.float32)
  pool = lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
  wanted, wanted_vjp = jax.vjp(lambda x: pool(nn.relu(x)), x)
  found, vjp = jax.vjp(lambda x: resnet.max_pool(nn.relu(x)), x)
  np.testing.assert_array_equal(found, wanted)
  grad = jnp.asarray(rng.normal(size=found.shape), jnp.float32)
  common.assert_close(vjp(grad)[0], wanted_vjp(grad)[0], 1e-6)
  x = x.at[0, 0, -1, 0].set(jnp.nan)
  np.testing.assert_array_equal(resnet.max_pool(x.clip(0)), pool(x.clip(0)))


def test_layers_of_a_profile(tmp_path):
  model = models.create_model("mixer_s32_224", dim=8, depth=2)
  x = jnp.ones((2, 64, 64, 3))
  variables = model.init(jax.random.key(0), x, train=False)
  loss = lambda v: model.apply(v, x, train=False).sum()
  grad = jax.jit(jax.grad(loss))
  jax.block_until_ready(grad(variables))
  ms = layers.milliseconds(lambda: grad(variables), str(tmp_path))
  assert [*ms.values()] == sorted(ms.values(), reverse=True)
  for name in ("forward", "backward"):
    assert any(f"{name} block/token_mlp/fc" in layer for layer in ms), ms
  assert 0 < sum(ms.values()) < 10_000
