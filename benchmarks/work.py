"""The work that is timed: a model's steps, and the stages of its blocks."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import optim
from convmixer_jax import step as step_lib
from convmixer_jax.errors import UserError

MODES = ("train", "infer", "depthwise", "depthwise_grad", "pointwise")


def random_variables(
  model: nn.Module, image_size: int, rng: np.random.Generator
) -> dict[str, Any]:
  """Initial parameters, and random running statistics, as numpy arrays.

  What starts at 0, such as the heads of MLP-Mixers, is random too: results
  that are compared should depend on it.
  """
  images = jnp.zeros((1, image_size, image_size, 3))
  init = jax.jit(lambda key: model.init(key, images, train=False))
  variables = jax.device_get(init(jax.random.key(0)))
  stats = jax.tree.map(
    lambda v: rng.uniform(0.5, 1.5, v.shape).astype(np.float32),
    variables.get("batch_stats", {}),
  )
  fill = lambda v: rng.normal(0, 0.02, v.shape).astype(np.float32)
  params = jax.tree.map(
    lambda v: v if v.any() else fill(v), variables["params"]
  )
  return {"params": params, "batch_stats": stats}


def repeated_step(
  step: Callable[..., Any], state: step_lib.TrainState, batch: step_lib.Batch
) -> Callable[[], Any]:
  """Returns a function that makes one more update each time it is called."""

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics["loss"], state

  return run


def stage_sizes(model: nn.Module, image_size: int) -> tuple[int, int, int]:
  """Side of a block's feature maps, their channels, and the kernel size.

  Raises:
    UserError: the model's blocks have no depthwise convolution.
  """
  if getattr(model, "kernel_size", None) is None:
    raise UserError(
      f"--model: a {type(model).__name__} has no depthwise convolution; this"
      " benchmark needs a model that has one"
    )
  return image_size // model.patch_size, model.dim, model.kernel_size


def make_work(
  mode: str, model: nn.Module, batch: int, image_size: int
) -> tuple[Callable[[], Any], dict[str, Any], int]:
  """Builds what is timed, on random images and weights.

  Args:
    mode: of `MODES`. 'train' is forward, backward, clipping, AdamW and the
      update of the running statistics, without augmentation.
    model: 'train' and 'infer' time all of it, the other modes one stage.
    batch: number of images.
    image_size: their side in pixels.

  Returns:
    A function that does the work once, and whose first result is compared with
    PyTorch's; the inputs, name -> numpy array, with the model's weights as the
    tree 'variables'; and the FLOPs of one call.

  Raises:
    UserError: the model has no such stage.
  """
  if mode not in ("train", "infer"):
    return _make_stage(mode, model, batch, image_size)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(batch, image_size, image_size, 3))
  images = images.astype(np.float32)
  variables = random_variables(model, image_size, rng)
  labels = rng.integers(0, model.num_classes, batch)
  arrays = {"variables": variables, "x": images, "labels": labels}
  images = jnp.asarray(images)
  flops = batch * models.flops(model, image_size)
  if mode == "infer":
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
    variables = jax.device_put(variables)
    return lambda: apply(variables, images), arrays, flops
  tx = make_optimizer(variables["params"])
  state = step_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=tx.init(variables["params"]),
    **jax.tree.map(jnp.asarray, variables),
  )
  step = jax.jit(
    step_lib.make_train_step(model, tx, lambda _, *batch: batch, seed=0),
    donate_argnums=0,
  )
  batch = {"image": images, "label": jnp.asarray(labels)}
  return repeated_step(step, state, batch), arrays, 3 * flops


def _make_stage(mode, model, batch, image_size):
  """`make_work` for one convolution of a block."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  side, dim, k = stage_sizes(model, image_size)
  x = normal(batch, side, side, dim)
  implementation = model.implementation
  locations = batch * side * side
  if mode == "pointwise":
    kernel = normal(dim, dim) / dim**0.5
    bias = normal(dim)
    arrays = {"x": x, "kernel": kernel, "bias": bias}
    norm = ops.BatchNorm(activation="gelu", implementation=implementation)
    variables = norm.init(jax.random.key(0), jnp.asarray(x[:1]), False)
    variables = jax.tree.map(jnp.asarray, variables)

    def stage(x, kernel, bias):
      conv = ops.Convolution(ops.pointwise_conv, kernel, bias)
      return norm.apply(variables, x, False, conv=conv)

    flops = 2 * locations * dim**2
  else:
    kernel = normal(k, k, dim) / k
    arrays = {"x": x, "kernel": kernel}
    conv = lambda x, kernel: ops.depthwise_conv(
      x, kernel, implementation=implementation
    )
    flops = 2 * locations * dim * k**2
    stage = conv
    if mode == "depthwise_grad":
      arrays["grad"] = normal(*x.shape)
      flops *= 2
      stage = lambda x, kernel, grad: jax.vjp(conv, x, kernel)[1](grad)
  stage = jax.jit(stage)
  inputs = [jnp.asarray(a, model.dtype) for a in arrays.values()]
  return lambda: stage(*inputs), arrays, flops


def make_optimizer(params: Any) -> optax.GradientTransformation:
  """AdamW with clipping of the gradient's norm, as in the recipes."""
  settings = {
    "weight_decay": 0.01,
    "decay_all": True,
    "eps": 1e-3,
    "betas": (0.9, 0.999),
    "clip_norm": 1.0,
  }
  return optim.make_optimizer(lambda count: 1e-3, params, settings)
