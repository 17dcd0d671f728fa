"""The operations against float64, and the library that some of them are in."""

from concurrent import futures
import functools
import math
import os
from pathlib import Path
import shutil
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from convmixer_jax import ops
from convmixer_jax import sharding
from convmixer_jax.models import layers
from convmixer_jax.ops import build
from convmixer_jax.ops import native
from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu
from tests import common

needs_compiler = pytest.mark.skipif(
  not native.available(jnp.zeros(1)), reason="no C++ compiler: native is shift"
)


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def float64(*arrays):
  return [np.asarray(a, np.float64) for a in arrays]


def exact(x, kernel):
  """SAME depthwise convolution in float64, by its definition."""
  windows, _ = padded_windows(x, len(kernel))
  return np.einsum("bhwcij,ijc->bhwc", windows, *float64(kernel))


def exact_vjp(x, kernel, grad):
  """The op is bilinear: its gradients by the transposed definition."""
  kernel, grad = float64(kernel, grad)
  windows, padded = padded_windows(x, k := len(kernel))
  grad_kernel = np.einsum("bhwcij,bhwc->ijc", windows, grad)
  grad_padded = np.zeros_like(padded)
  (height, width), low = x.shape[1:3], (k - 1) // 2
  for i in range(k):
    for j in range(k):
      grad_padded[:, i : i + height, j : j + width] += grad * kernel[i, j]
  return grad_padded[:, low : low + height, low : low + width], grad_kernel


def padded_windows(x, k):
  """Each location's k x k window, and the padded images they are cut from."""
  sides = ((k - 1) // 2, k // 2)
  padded = np.pad(*float64(x), ((0, 0), sides, sides, (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (1, 2))
  return windows, padded


SHAPES = [  # B, H, W, C, k
  (8, 7, 5, 3, 3),
  (16, 8, 8, 4, 5),
  (3, 5, 9, 2, 4),
  (2, 4, 4, 5, 8),
  (1, 3, 3, 1, 9),
  (5, 6, 6, 7, 1),
  (2, 3, 9, 21, 3),  # More than one vector and one tile, neither whole.
]
# Uneven sums over images, several tasks, past the caches, and mostly padding.
NATIVE_SHAPES = [
  (70, 2, 3, 5, 3),
  (2, 24, 20, 300, 5),
  (8, 32, 32, 272, 2),
  (1, 2, 1, 33, 12),
  (1, 1, 1, 1, 1),
]
CASES = [
  (None, SHAPES[0]),  # None chooses one of the others.
  *[(i, s) for i in native.IMPLEMENTATIONS for s in SHAPES],
  *[("native", shape) for shape in NATIVE_SHAPES],
]


def check_bilinear(op, implementation, args, expected, tolerances):
  """Value and gradients of op(x, kernel) against float64."""
  x, kernel, grad = args
  y, vjp = jax.vjp(
    lambda x, kernel: op(x, kernel, implementation=implementation), x, kernel
  )
  for ours, golden, tolerance in zip(
    (y, *vjp(grad)), expected, tolerances, strict=True
  ):
    assert ours.dtype == x.dtype
    common.assert_close(*float64(ours, golden), tolerance)


@pytest.mark.parametrize(("implementation", "shape"), CASES)
def test_depthwise_and_its_gradients(implementation, shape):
  *image, k = shape
  args = normal(0, *image), normal(1, k, k, image[-1]), normal(2, *image)
  expected = exact(*args[:2]), *exact_vjp(*args)
  tolerances = 1e-6, 2e-6, 5e-6 if shape[1] > 20 else 2e-6
  check_bilinear(ops.depthwise_conv, implementation, args, expected, tolerances)


@pytest.mark.parametrize("implementation", native.IMPLEMENTATIONS)
def test_depthwise_bfloat16(implementation):
  image = (8, 8, 8, 20)
  args = [
    normal(seed, *shape, dtype=jnp.bfloat16)
    for seed, shape in enumerate((image, (5, 5, 20), image))
  ]
  expected = exact(*args[:2]), *exact_vjp(*args)
  check_bilinear(ops.depthwise_conv, implementation, args, expected, [1e-2] * 3)


# B, H, W, C, D. The rows fill tiles or do not, as do C and D the vectors; some
# are several blocks of each.
PRODUCTS = [
  (1, 1, 1, 1, 1),
  (2, 3, 5, 7, 3),
  (1, 4, 7, 16, 32),
  (3, 5, 11, 33, 50),
  (2, 9, 9, 300, 530),
  (9, 32, 32, 31, 65),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("implementation", "shape"),
  [
    *[(i, PRODUCTS[1]) for i in native.IMPLEMENTATIONS if i != "native"],
    *[("native", shape) for shape in PRODUCTS],
  ],
)
def test_pointwise_and_its_gradients(implementation, dtype, shape):
  *image, width = shape
  x = normal(0, *image, dtype=dtype)
  kernel = normal(1, image[-1], width, dtype=dtype)
  grad = normal(2, *image[:-1], width, dtype=dtype)
  x64, kernel64, grad64 = float64(x, kernel, grad)
  expected = (
    x64 @ kernel64,
    grad64 @ kernel64.T,
    np.tensordot(x64, grad64, 2 * [[0, 1, 2]]),
  )
  tolerance = 1e-2 if dtype == jnp.bfloat16 else 3e-6
  args = x, kernel, grad
  check_bilinear(
    ops.pointwise_conv, implementation, args, expected, [tolerance] * 3
  )


BILINEAR = {
  ops.depthwise_conv: ((2, 5, 4, 6), (3, 3, 6)),
  ops.pointwise_conv: ((2, 5, 4, 6), (6, 9)),
}


@pytest.mark.parametrize(
  ("op", "implementation"),
  [*((op, "native") for op in BILINEAR), (ops.depthwise_conv, "banded")],
)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_vmap_of_ops_and_gradients(op, implementation, axes):
  """Over each argument, in a scan, with remat."""
  shapes = BILINEAR[op]
  args = [
    normal(i, *shape) if axis is None else normal(i, 3, *shape)
    for i, (shape, axis) in enumerate(zip(shapes, axes))
  ]

  def loss(x, kernel):
    return jnp.sin(op(x, kernel, implementation=implementation)).sum()

  grad = jax.value_and_grad(jax.checkpoint(loss), (0, 1))
  one_by_one = [
    grad(*(a if axis is None else a[i] for a, axis in zip(args, axes)))
    for i in range(3)
  ]
  expected = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
  moved = [
    a if axis is None else jnp.moveaxis(a, 0, axis)
    for a, axis in zip(args, axes)
  ]
  ours = jax.jit(jax.vmap(grad, axes))(*moved)
  assert common.tree_error(ours, expected) < 2e-6

  if axes == (0, 0):
    _, scanned = jax.lax.scan(lambda _, xs: (None, grad(*xs)), None, args)
    assert common.tree_error(scanned, expected) < 2e-6


@pytest.mark.parametrize("op", BILINEAR)
def test_ops_of_nothing(op):
  """An empty batch has an output without images, and gradients of zero."""
  (_, *image), kernel_shape = BILINEAR[op]
  kernel = normal(0, *kernel_shape)
  y, vjp = jax.vjp(
    lambda x, kernel: op(x, kernel, implementation="native"),
    jnp.zeros((0, *image)),
    kernel,
  )
  assert y.shape == (0, *image[:-1], kernel_shape[-1])
  np.testing.assert_array_equal(vjp(y)[1], np.zeros(kernel_shape))


@pytest.mark.parametrize("op", BILINEAR)
def test_other_dtypes(op):
  """Half precision is left to XLA; dtypes are not mixed."""
  shapes = BILINEAR[op]
  x, kernel = (normal(0, *shape, dtype=jnp.float16) for shape in shapes)
  assert not native.available(x)
  y = op(x, kernel, implementation="native")
  assert y.dtype == jnp.float16
  expected = op(*(a.astype(jnp.float32) for a in (x, kernel)))
  common.assert_close(y.astype(jnp.float32), expected, 1e-2)
  with pytest.raises(ValueError, match="of one dtype"):
    op(x, kernel.astype(jnp.float32))


@needs_compiler
def test_what_is_chosen(monkeypatch):
  assert ops.chosen(None, jnp.float32) == "native"
  assert ops.chosen("auto", jnp.bfloat16) == "native"
  assert ops.chosen("auto", jnp.float16) == "shift"
  assert ops.chosen("xla", jnp.float32) == "xla"
  with ops.portable():
    assert ops.chosen("native", jnp.float32) == "shift"
  gpu = mock.Mock(platform="gpu", compute_capability="8.0")
  monkeypatch.setattr(partition, "device", lambda: gpu)
  assert ops.chosen(None, jnp.float32) == "xla"
  assert ops.chosen("native", jnp.float32) == "native"


def test_ops_from_several_threads():
  x, kernel = normal(0, 16, 6, 6, 20), normal(1, 3, 3, 20)
  op = jax.jit(lambda x: ops.depthwise_conv(x, kernel))
  with futures.ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda i: op(x * i), range(32)))
  expected = exact(x, kernel)
  for i, y in enumerate(results):
    common.assert_close(y, i * expected, 1e-6)


def test_depthwise_refuses():
  x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2))
  with pytest.raises(ValueError, match="fast"):
    ops.depthwise_conv(x, kernel, implementation="fast")
  with pytest.raises(ValueError, match="kernel"):
    ops.depthwise_conv(x, kernel[:, :2])
  with pytest.raises(ValueError, match="kernel"):
    ops.depthwise_conv(x, kernel[:0, :0])
  with pytest.raises(ValueError, match="kernel"):
    ops.pointwise_conv(x, kernel)


def exchanges(hlo):
  """The kinds of communication in a program."""
  kinds = ("all-reduce", "all-gather", "all-to-all", "collective-")
  return [kind for kind in kinds if kind in hlo]


@pytest.mark.parametrize("op", BILINEAR)
def test_ops_compile_one_implementation_and_gather_nothing(op):
  mesh = sharding.make_mesh()
  (_, *image), kernel_shape = BILINEAR[op]
  x = jax.device_put(normal(0, 16, *image), sharding.batch_sharding(mesh))
  kernel = jax.device_put(normal(1, *kernel_shape), sharding.replicated(mesh))
  gradients = jax.jit(jax.grad(lambda *a: jnp.square(op(*a)).sum(), (0, 1)))
  compiled = gradients.lower(x, kernel).compile()
  hlo = compiled.as_text()
  assert "conditional" not in hlo
  assert "convolution" not in hlo  # On CPU it is C++, or the shifted sum.
  assert ("convmixer_" in hlo) == native.available(x)
  assert exchanges(hlo) == ["all-reduce"]  # The kernel's gradient.
  alone = [jax.device_put(a, jax.devices()[0]) for a in (x, kernel)]
  assert common.tree_error(compiled(x, kernel), gradients(*alone)) < 2e-6


def test_banded_gathers_nothing():
  mesh = sharding.make_mesh()
  x = jax.device_put(normal(0, 16, 5, 4, 6), sharding.batch_sharding(mesh))
  kernel = jax.device_put(normal(1, 3, 3, 6), sharding.replicated(mesh))
  op = lambda *a: ops.depthwise_conv(*a, implementation="banded")
  gradients = jax.jit(jax.grad(lambda *a: jnp.square(op(*a)).sum(), (0, 1)))
  hlo = gradients.lower(x, kernel).compile().as_text()
  assert exchanges(hlo) == ["all-reduce"]  # The kernel's gradient.


@pytest.mark.parametrize(("devices", "batch"), [((8,), 2), ((2, 3), 8)])
def test_a_batch_that_does_not_divide_over_the_devices(devices, batch):
  """Every operation and its gradients; XLA pads what each device gets."""
  args = normal(0, batch, 3, 4, 5), normal(1, 2, 2, 5), normal(2, 5, 5)
  module = ops.BatchNorm(activation="gelu")
  variables = module.init(jax.random.key(0), args[0], False)
  # In another order than the devices' own.
  devices = np.array(jax.devices()[: math.prod(devices)][::-1]).reshape(devices)
  mesh = jax.sharding.Mesh(devices, ("a", "b")[: devices.ndim])

  def value_and_gradients(x, kernel, matrix, spec=None):
    x = jnp.cos(x)
    if spec is not None:  # As of a microbatch: of a value, not of an argument.
      x = jax.lax.with_sharding_constraint(x, spec)

    def loss(x, kernel, matrix, bias, params):
      apply = lambda x, op, kernel, train: module.apply(
        variables | {"params": params},
        x,
        train,
        conv=ops.Convolution(op, kernel, bias),
        residual=x,
        mutable=["batch_stats"],
      )[0]
      x = apply(x, ops.depthwise_conv, kernel, True)
      x = apply(x, ops.pointwise_conv, matrix, False)
      return jnp.sin(x).sum()

    args = x, kernel, matrix, jnp.ones(5), variables["params"]
    return jax.value_and_grad(loss, range(5))(*args)

  spec = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
  jitted = jax.jit(value_and_gradients, static_argnums=3)
  assert common.tree_error(jitted(*args, spec), jitted(*args)) < 5e-6


def test_a_batch_over_devices_in_a_way_without_a_name():
  """XLA cuts the axis `data` of eight devices into two times four."""
  x, kernel = normal(0, 16, 3, 4, 5), normal(1, 2, 2, 5)
  gradient = jax.grad(lambda *args: jnp.sin(ops.depthwise_conv(*args)).sum(), 1)

  def halves(x, kernel):
    return [gradient(half, kernel) for half in x.reshape(2, 8, *x.shape[1:])]

  mesh = sharding.make_mesh()
  sharded = jax.device_put(x, sharding.batch_sharding(mesh))
  expected = [gradient(half, kernel) for half in (x[:8], x[8:])]
  assert common.tree_error(jax.jit(halves)(sharded, kernel), expected) < 2e-6


# --- Activation and BatchNorm.


def activated(implementation, activation, x):
  one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
  how = implementation, activation
  return ops.normalize.affine(how, x, zero[0], one, zero, None)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("implementation", [None, "native"])
def test_an_activation_of_ones_own(monkeypatch, implementation, train):
  """native.cc lacks it: XLA computes it."""
  monkeypatch.setitem(ops.ACTIVATIONS, "silu", jax.nn.silu)
  x, kernel, bias = normal(0, 4, 5, 6, 3), normal(1, 3, 3, 3), normal(2, 3)

  def gradients(implementation):
    module = ops.BatchNorm(activation="silu", implementation=implementation)
    variables = module.init(jax.random.key(0), x, False)

    def loss(x, kernel, bias):
      conv = ops.Convolution(ops.depthwise_conv, kernel, bias)
      y, _ = module.apply(
        variables, x, train, conv=conv, residual=x, mutable=["batch_stats"]
      )
      return jnp.sin(y).sum()

    return jax.value_and_grad(loss, range(3))(x, kernel, bias)

  error = common.tree_error(gradients(implementation), gradients("xla"))
  assert error < 5e-6


# Half of a unit in the last place of 12 is 4.8e-7.
@pytest.mark.parametrize(
  ("implementation", "bound"), [("xla", 1e-6), ("native", 5e-7)]
)
def test_gelu_and_its_derivative(implementation, bound):
  x = np.concatenate([np.linspace(-12, 12, 48001), [-1e30, -20.0, 20.0, 1e30]])
  x = x.astype(np.float32).reshape(1, 5, -1, 1)
  y, vjp = jax.vjp(lambda x: activated(implementation, "gelu", x), x)
  (derivative,) = vjp(jnp.ones_like(x))
  z, y, derivative = float64(x, y, derivative)
  below = scipy.special.ndtr(z)
  near = np.abs(z) < 100
  error = np.abs(y - z * below)
  assert error[near].max() < bound
  assert (error / np.abs(z).clip(1)).max() < bound
  expected = below + z * np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)
  assert np.abs(derivative - expected).max() < 3e-7


@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_activations_of_special_values(implementation):
  x = np.float32([np.inf, np.nan, 0.0, -0.0]).reshape(1, 2, 2, 1)
  for activation in ops.ACTIVATIONS:
    y = activated(implementation, activation, x)
    np.testing.assert_array_equal(y, x, activation)


@functools.cache
def exact_norm(activation, dtype, train, residual):
  """Inputs of a norm, and its value and gradients in float64."""
  # Channels: a block of 256 and a part of one, which ends within a vector.
  shape, channels, group = (6, 3, 5, 275), 275, 2
  x, added, grad = (normal(i, *shape, dtype=dtype) for i in range(3))
  args = x, *(normal(i, channels) for i in range(3, 6))
  args += (added,) * residual
  stats = {"mean": normal(6, channels), "var": jnp.exp(normal(7, channels))}
  pad = (None,) * (not residual)
  with jax.enable_x64(True):
    y, vjp = jax.vjp(
      lambda *args: norm_reference(
        activation, *args, *pad, group, None if train else stats
      ),
      *(jnp.asarray(a, jnp.float64) for a in args),
    )
    exact = float64(y, *vjp(jnp.asarray(grad, jnp.float64)))
  return args, grad, stats, group, exact


def norm_reference(activation, x, bias, scale, offset, residual, group, stats):
  """Groups' own statistics, or `stats`; written for any precision."""
  a = {
    "identity": lambda x: x,
    "relu": lambda x: jnp.where(x > 0, x, 0),
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
  }[activation](x + bias)
  if stats is None:
    groups = a.reshape(-1, group, *a.shape[1:])
    mean = groups.mean((1, 2, 3), keepdims=True)
    var = jnp.square(groups - mean).mean((1, 2, 3), keepdims=True)
    a = ((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(a.shape)
  else:
    a = (a - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
  return a * scale + offset + (0 if residual is None else residual)


@pytest.mark.parametrize(
  ("implementation", "dtype"),
  [
    ("native", jnp.float32),
    ("native", jnp.bfloat16),
    ("xla", jnp.float32),
    pytest.param("xla", jnp.bfloat16, marks=pytest.mark.slow),
    ("for a GPU", jnp.float32),
    ("for a GPU", jnp.bfloat16),
  ],
)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_its_gradients(
  monkeypatch, implementation, train, activation, dtype
):
  """With respect to all of its inputs, with a residual and without."""
  on_gpu = implementation == "for a GPU"
  if on_gpu:  # What XLA compiles for GPUs, here for the CPU.
    implementation = "xla"
    gpu = mock.Mock(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(partition, "device", lambda: gpu)
  for residual in (True, False):
    args, grad, stats, group, expected = exact_norm(
      activation, dtype, train, residual
    )
    module = ops.BatchNorm(group, activation, implementation=implementation)

    def ours(x, bias, scale, offset, residual=None, module=module, stats=stats):
      params = {"scale": scale, "bias": offset}
      return module.apply(
        {"params": params, "batch_stats": stats},
        x,
        train,
        conv=common.add(bias),
        residual=residual,
        mutable=["batch_stats"],
      )[0]

    y, vjp = jax.vjp(ours, *args)
    results = zip((y, *vjp(grad)), expected, strict=True)
    for i, (value, golden) in enumerate(results):
      # Parameters' gradients are float32, also where images are rounded. They
      # are sums of 90 terms, of which that of a bias before a mere
      # normalisation is 0. On a GPU, that of a bias sums rounded numbers.
      rounded = on_gpu and i == 2 and dtype == jnp.bfloat16
      exact = value.dtype == jnp.float32 and not rounded
      tolerance = 5e-6 if exact else 1e-2
      largest = max(np.abs(golden).max(), 10 * (golden.ndim == 1))
      assert np.abs(float64(value)[0] - golden).max() <= tolerance * largest


@pytest.mark.parametrize(
  ("implementation", "dtype", "activation"),
  [
    *((None, jnp.float32, activation) for activation in ops.ACTIVATIONS),
    (None, jnp.bfloat16, "gelu"),
    pytest.param(None, jnp.bfloat16, "relu", marks=pytest.mark.slow),
    pytest.param(None, jnp.bfloat16, "identity", marks=pytest.mark.slow),
    ("xla", jnp.float32, "gelu"),
  ],
)
@pytest.mark.parametrize(
  ("conv", "x", "kernel"),
  [
    (ops.depthwise_conv, (3, 5, 10, 21), (4, 4, 21)),
    (ops.pointwise_conv, (3, 5, 6, 21), (21, 35)),
    # More than one block in each direction.
    (ops.pointwise_conv, (1, 16, 20, 300), (300, 530)),
  ],
)
def test_norm_within_a_convolution(
  conv, x, kernel, activation, dtype, implementation
):
  """At inference; the result, and all gradients, with a residual or not."""
  x, kernel = (normal(i, *s, dtype=dtype) for i, s in enumerate((x, kernel)))
  channels = kernel.shape[-1]
  residual, grad = (
    normal(i, *x.shape[:3], channels, dtype=dtype) for i in (2, 3)
  )
  bias, scale, offset = (normal(i, channels) for i in (4, 5, 6))
  stats = {"mean": normal(7, channels), "var": jnp.exp(normal(8, channels))}
  module = ops.BatchNorm(activation=activation, implementation=implementation)

  def ours(x, kernel, bias, scale, offset, residual=None):
    return module.apply(
      {"params": {"scale": scale, "bias": offset}, "batch_stats": stats},
      x,
      False,
      conv=ops.Convolution(conv, kernel, bias),
      residual=residual,
    )

  def reference(x, kernel, bias, scale, offset, residual=None):
    y = conv(x, kernel, implementation="xla")
    return norm_reference(
      activation, y, bias, scale, offset, residual, 1, stats
    )

  without = x, kernel, bias, scale, offset
  for args in (without, (*without, residual)):
    y, vjp = jax.vjp(ours, *args)
    assert y.dtype == dtype
    with jax.enable_x64(True):
      exact_y, exact_vjp = jax.vjp(
        reference, *(jnp.asarray(a, jnp.float64) for a in args)
      )
      expected = exact_y, *exact_vjp(jnp.asarray(grad, jnp.float64))
    if dtype == jnp.bfloat16:
      # The gradients take the convolution's rounded result, on another side of
      # ReLU's kink here and there.
      common.assert_close(*float64(y, expected[0]), 1e-2)
      continue
    for value, golden in zip((y, *vjp(grad)), float64(*expected), strict=True):
      common.assert_close(*float64(value), golden, 5e-6)


@pytest.mark.parametrize("conv", BILINEAR)
def test_norm_within_a_convolution_of_several_devices_and_vmap(conv):
  (_, *image), kernel_shape = BILINEAR[conv]
  x, kernel = normal(0, 3, 16, *image), normal(1, *kernel_shape)
  bias = normal(2, kernel_shape[-1])
  module = ops.BatchNorm(activation="gelu")
  variables = module.init(
    jax.random.key(0), jnp.zeros((1, 1, 1, len(bias))), False
  )

  @jax.jit
  def apply(x):
    layer = ops.Convolution(conv, kernel, bias)
    return module.apply(variables, x, False, conv=layer)

  one_by_one = jnp.stack([apply(images) for images in x])
  common.assert_close(jax.jit(jax.vmap(apply))(x), one_by_one, 2e-6)
  sharded = jax.device_put(x[0], sharding.batch_sharding(sharding.make_mesh()))
  hlo = apply.lower(sharded).compile().as_text()
  op = conv.__name__.removesuffix("_conv")
  assert (f"convmixer_{op}_norm" in hlo) == native.available(x)
  assert not exchanges(hlo)
  common.assert_close(apply(sharded), one_by_one[0], 2e-6)


def test_batch_norm_of_mixed_dtypes_and_vmap():
  """Parameters and residual may have other dtypes than x."""
  module = ops.BatchNorm(activation="gelu")
  x, residual = normal(0, 2, 4, 3, 3, 5), normal(1, 2, 4, 3, 3, 5)
  bias = normal(2, 2, 5)
  variables = module.init(jax.random.key(0), x[0], False)

  def apply(x, bias, residual):
    return module.apply(
      variables,
      x,
      True,
      conv=common.add(bias),
      residual=residual,
      mutable=["batch_stats"],
    )

  half = [a.astype(jnp.bfloat16) for a in (bias, residual)]
  y, stats = jax.vmap(apply)(x, *half)
  assert y.dtype == jnp.float32
  for i in range(2):
    expected = apply(x[i], *(a[i].astype(jnp.float32) for a in half))
    ours = y[i], jax.tree.map(lambda s, i=i: s[i], stats)
    assert common.tree_error(ours, expected) < 2e-6


def chain(x, kernel, matrix, bias, exactly=False, implementation=None):
  """All operations but a norm without a convolution, to one number.

  `exactly`: of JAX's own functions, for any precision.
  """
  module = ops.BatchNorm(2, "gelu", implementation=implementation)
  stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
  params = {"scale": jnp.cos(bias), "bias": bias}

  def norm(x, op, kernel, train):
    if exactly:
      y = op(x, kernel, implementation="xla")
      args = bias, params["scale"], bias, x, 2, None if train else stats
      return norm_reference("gelu", y, *args)
    conv = ops.Convolution(op, kernel, bias)
    return module.apply(
      {"params": params, "batch_stats": stats},
      x,
      train,
      conv=conv,
      residual=x,
      mutable=["batch_stats"],
    )[0]

  x = norm(x, ops.depthwise_conv, kernel, True)
  return jnp.sin(norm(x, ops.pointwise_conv, matrix, False)).sum()


CHAIN = ((4, 3, 2, 5), (2, 2, 5), (5, 5), (5,))


def gradient(*args, **options):
  return jax.grad(functools.partial(chain, **options), range(4))(*args)


@functools.cache
def exact_chain():
  """Arguments, a vector, and in float64 gradients and Hessian times vector."""
  args, dots = (tuple(normal(i, *s) for s in CHAIN) for i in (0, 1))
  with jax.enable_x64(True):
    wide = (tuple(map(jnp.float64, arrays)) for arrays in (args, dots))
    function = functools.partial(gradient, exactly=True)
    expected = jax.jit(functools.partial(jax.jvp, function))(*wide)
    return args, dots, jax.tree.map(np.asarray, expected)


@pytest.mark.parametrize(
  ("implementation", "fused"),
  [(None, False), ("pallas", False), ("pallas", True)],
)
def test_derivatives_of_second_order(monkeypatch, implementation, fused):
  monkeypatch.setattr(tpu, "supported", lambda *args, **kwargs: fused)
  args, dots, (_, expected) = exact_chain()
  value = functools.partial(chain, implementation=implementation)
  gradients = functools.partial(gradient, implementation=implementation)

  @jax.jit
  def derivatives(args, dots):
    forward = lambda *args: jax.jvp(value, args, dots)[1]
    product = lambda *args: sum(map(jnp.vdot, gradients(*args), dots))
    times = lambda c: jax.jvp(gradients, args, (*(c * dot for dot in dots),))[1]
    return {
      # As in jax.hessian.
      "forward over reverse": [v[1] for v in jax.vmap(times)(jnp.arange(2.0))],
      "reverse over forward": jax.grad(forward, range(4))(*args),
      "reverse over reverse": jax.grad(product, range(4))(*args),
    }

  ours = derivatives(args, dots)
  for name, values in ours.items():
    for value, golden in zip(values, expected, strict=True):
      common.assert_close(value, golden, 2e-5, name)


@pytest.mark.parametrize(("first_row", "tolerance"), [(0, 2e-6), (10, 2e-5)])
def test_derivatives_of_a_norm_for_a_gpu(monkeypatch, first_row, tolerance):
  """The same as elsewhere, also of second order; here for the CPU.

  Sums are of differences from the mean of the first row. If that is far from
  the mean of all 32, a variance is up to 32 roundings off.
  """
  x, weights = normal(0, 4, 32, 3, 5), normal(1, 4, 32, 3, 5)
  x = x.at[:, 0].add(first_row)
  module = ops.BatchNorm(2, "gelu", implementation="xla")
  variables = module.init(jax.random.key(0), x, True)

  def derivatives():
    values = {}
    for power in (1, 2):  # Of the first, some tangents are symbolic zeros.

      def loss(x, power=power):
        y, _ = module.apply(variables, x, True, mutable=["batch_stats"])
        return (weights * y**power).mean()

      gradient = jax.grad(loss)
      values[power] = (
        gradient(x),
        jax.jvp(gradient, (x,), (weights,))[1],
        jax.grad(lambda x, g=gradient: jnp.vdot(g(x), weights))(x),
      )
    return values

  expected = derivatives()
  gpu = mock.Mock(platform="gpu", compute_capability="9.0")
  monkeypatch.setattr(partition, "device", lambda: gpu)
  assert common.tree_error(derivatives(), expected) < tolerance


def test_float64_is_computed_in_float64():
  args, _, (expected, _) = exact_chain()
  with jax.enable_x64(True):
    ours = jax.jit(gradient)(*map(jnp.float64, args))
    assert common.tree_error(ours, expected) < 1e-12


@pytest.mark.parametrize("implementation", [None, "shift"])
def test_within_shard_map(implementation):
  """With its default check of which values differ between devices."""
  x, kernel = normal(0, 16, 3, 4, 5), normal(1, 2, 2, 5)
  op = functools.partial(ops.depthwise_conv, implementation=implementation)

  def loss(x, kernel):
    norm = ops.BatchNorm(2, implementation=implementation)
    conv = ops.Convolution(ops.depthwise_conv, kernel, kernel[0, 0])
    y, _ = norm.init_with_output(jax.random.key(0), x, True, conv=conv)
    return jnp.sin(y * op(x, kernel)).sum()

  sharded = jax.shard_map(
    lambda *args: jax.lax.psum(loss(*args), "data"),
    mesh=sharding.make_mesh(),
    in_specs=(jax.P("data"), jax.P()),
    out_specs=jax.P(),
  )
  ours, expected = (
    jax.jit(jax.grad(f, (0, 1)))(x, kernel) for f in (sharded, loss)
  )
  assert common.tree_error(ours, expected) < 5e-6


def batch_norm(x, group_size, mesh=None):
  """Returns y and the updated running statistics, from mean 1 and var 2."""
  module = ops.BatchNorm(group_size)
  channels = x.shape[-1]
  variables = {
    "params": {
      "scale": jnp.linspace(0.5, 2, channels),
      "bias": jnp.linspace(-1, 1, channels),
    },
    "batch_stats": {
      "mean": jnp.full(channels, 1.0),
      "var": jnp.full(channels, 2.0),
    },
  }
  apply = jax.jit(
    lambda v, x: module.apply(v, x, True, mutable=["batch_stats"])
  )
  if mesh is not None:
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    variables = jax.device_put(variables, sharding.replicated(mesh))
  compiled = apply.lower(variables, x).compile()
  y, updated = compiled(variables, x)
  return np.asarray(y), updated["batch_stats"], compiled.as_text()


def batch_norm_by_hand(x, group):
  """Group by group, in float64."""
  x = np.asarray(x, np.float64)
  scale, bias = (np.linspace(*r, x.shape[-1]) for r in ((0.5, 2), (-1, 1)))
  parts, means, variances = [], [], []
  for start in range(0, len(x), group):
    part = x[start : start + group]
    mean, var = part.mean((0, 1, 2)), part.var((0, 1, 2))
    parts.append((part - mean) / np.sqrt(var + 1e-5) * scale + bias)
    means.append(mean)
    variances.append(part.var((0, 1, 2), ddof=1))
  running_mean = 0.9 * 1 + 0.1 * np.mean(means, 0)
  running_var = 0.9 * 2 + 0.1 * np.mean(variances, 0)
  return np.concatenate(parts), running_mean, running_var


X = 3 + 2 * np.random.default_rng(0).normal(size=(32, 3, 5, 4)).astype("f4")


# On eight devices with four images each, groups of 1, 2 and 4 images lie within
# a device, and groups of 8 and 16 (and 0, all 32) span several.
@pytest.mark.parametrize(
  ("devices", "group_size"),
  [(1, 0), (1, 1), (1, 8), *((8, size) for size in (0, 1, 2, 4, 8, 16, 32))],
)
def test_batch_norm_groups(devices, group_size):
  mesh = sharding.make_mesh(jax.devices()[:devices])
  y, running, hlo = batch_norm(X, group_size, mesh=mesh)
  expected, mean, var = batch_norm_by_hand(X, group_size or 32)
  common.assert_close(y, expected, 2e-6)
  common.assert_close(running["mean"], mean, 2e-6)
  common.assert_close(running["var"], var, 2e-6)
  # Only the running averages of such groups are summed over devices: [1 or C].
  if devices == 8 and 0 < group_size <= 4:
    assert exchanges(hlo) == ["all-reduce"]


def test_groups_within_a_device_need_no_communication():
  """Forward and backward, running statistics aside."""
  mesh = sharding.make_mesh()
  x = jax.device_put(X, sharding.batch_sharding(mesh))

  def collectives(group_size):
    module = ops.BatchNorm(group_size)
    variables = module.init(jax.random.key(0), X, train=False)

    def input_gradient(x):
      apply = lambda x: module.apply(
        variables, x, train=True, mutable=["batch_stats"]
      )[0]
      return jax.vjp(apply, x)[1](x**2)

    return exchanges(jax.jit(input_gradient).lower(x).compile().as_text())

  assert collectives(4) == []
  assert collectives(0) == ["all-reduce"]


def test_batch_norm_refuses():
  with pytest.raises(ValueError, match="groups of 5"):
    batch_norm(X, 5)
  with pytest.raises(ValueError, match="takes images"):
    batch_norm(X[0], 0)
  apply = lambda **kwargs: ops.BatchNorm().init(
    jax.random.key(0), X, False, **kwargs
  )
  for shape in (X[:1].shape, X[..., :1].shape, X.shape[1:]):
    with pytest.raises(ValueError, match="a residual"):
      apply(residual=jnp.ones(shape))
  with pytest.raises(ValueError, match="a bias"):
    apply(conv=ops.Convolution(ops.pointwise_conv, jnp.eye(4), jnp.zeros(1)))


@pytest.mark.parametrize(
  "change",
  [
    {"strides": 2},
    {"strides": (1, 1)},
    {"padding": "VALID"},
    {"padding": 1},
    {"kernel_size": (3, 5)},
    {"kernel_size": (0, 0)},
    {"kernel_size": (3,)},
    {"features": 8},
    {"feature_group_count": 1, "strides": 2},
    {"feature_group_count": 1, "padding": "VALID"},
    {"feature_group_count": 2},
    {"strides": 2, "padding": "VALID", "feature_group_count": 1},
    {"kernel_dilation": 2},
    {"input_dilation": 2},
    {"mask": 1},
  ],
)
def test_a_layer_refuses_what_it_does_not_honour(change):
  attributes = {"kernel_size": (3, 3), "feature_group_count": 4} | change
  with pytest.raises((ValueError, TypeError), match=r"depthwise|keyword"):
    layers.Conv(**{"features": 4, **attributes}).init(jax.random.key(0), X)


def test_a_full_convolution_is_linens():
  for kernel, use_bias in ((3, True), (4, False)):
    arguments = {"features": 6, "kernel_size": (kernel, kernel)}
    ours = layers.Conv(**arguments, use_bias=use_bias)
    variables = ours.init(jax.random.key(0), X)
    assert ("bias" in variables["params"]) == use_bias
    theirs = nn.Conv(**arguments, use_bias=use_bias)
    expected = theirs.apply(variables, X)
    common.assert_close(ours.apply(variables, X), expected, 1e-6)


def test_other_layers_refuse_what_they_do_not_honour():
  with pytest.raises(ValueError, match="dtype"):
    layers.LayerNorm(dtype=jnp.bfloat16).init(jax.random.key(0), X, True)
  with pytest.raises(AttributeError, match="operands"):  # Its own attributes.
    ops.BatchNorm().init(
      jax.random.key(0), X, True, conv=nn.Conv(4, (3, 3), kernel_dilation=2)
    )


# --- The library.


@pytest.mark.parametrize(
  "command", ["/nonexistent", "/bin/false", "g++ 'unfinished"]
)
def test_without_a_compiler(command, tmp_path):
  """One line, and the same numbers."""
  code = (
    "import numpy as np, jax; from convmixer_jax import ops\n"
    "x = np.arange(24, dtype='f4').reshape(1, 3, 4, 2)\n"
    "for i in ('native', 'auto', 'auto'):\n"
    "  y = ops.depthwise_conv(x, np.ones((2, 2, 2), 'f4'), implementation=i)\n"
    "  y = ops.pointwise_conv(y, np.ones((2, 3), 'f4'), implementation=i)\n"
    "  print(float(y.sum()))\n"
  )
  env = {"CXX": command, "XDG_CACHE_HOME": str(tmp_path)}
  process = common.run_python(code, environment=env)
  x = np.arange(24, dtype="f4").reshape(1, 3, 4, 2)
  total = 3 * exact(x, np.ones((2, 2, 2))).sum()
  assert [float(line) for line in process.stdout.split()] == [total] * 3
  (line,) = process.stderr.splitlines()
  assert "apt-get install g++" in line
  assert list(tmp_path.glob("**/*.so")) == []


@needs_compiler
def test_the_librarys_cache(monkeypatch, tmp_path):
  builds = []

  def fake_build(folder):
    builds.append(folder)
    path = Path(folder) / "native.so"
    path.write_bytes(b"a library")
    return path

  monkeypatch.setattr(build, "_build", fake_build)
  monkeypatch.setattr(build, "key", lambda: "key")
  path = build._cached(tmp_path)
  assert build._cached(tmp_path) == path
  assert len(builds) == 1
  path.write_bytes(b"a libr")  # Cut short: built anew, once.
  assert build._cached(tmp_path) == path
  assert build._cached(tmp_path) == path
  assert len(builds) == 2
  assert path.read_bytes() == b"a library"
  assert list(tmp_path.iterdir()) == [path]
  monkeypatch.setattr(build, "key", lambda: "another")
  another = build._cached(tmp_path)
  assert another != path
  assert len(builds) == 3
  for command in ("/nonexistent", "/bin/false", "g++ 'unfinished"):
    monkeypatch.setenv("CXX", command)  # The compiler is gone.
    assert build._cached(tmp_path) == another
  monkeypatch.setenv("CXX", "g++ -O1")  # Another compiler.
  assert build._cached(tmp_path) != another


def test_where_the_library_is_cached(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = build.cache_folder()
  assert folder == tmp_path / "convmixer_jax"
  folder.chmod(0o777)  # Anyone may leave a library there.
  assert build.cache_folder() is None
  folder.rmdir()
  folder.write_text("a file")
  assert build.cache_folder() is None
  monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
  assert build.cache_folder() is None


@needs_compiler
def test_flags_that_a_compiler_refuses(monkeypatch, tmp_path):
  monkeypatch.setattr(build, "_FLAGS", ("-std=c++17", "-fsyntax-only"))
  monkeypatch.setattr(build, "_SOURCES", (tmp_path / "empty.cc",))
  build._SOURCES[0].touch()
  monkeypatch.setattr(build, "_TUNING", (["-march=nonsense"], []))
  build._build(str(tmp_path))
  monkeypatch.setattr(build, "_TUNING", (["-march=nonsense"],))
  with pytest.raises(subprocess.CalledProcessError) as e:
    build._build(str(tmp_path))
  assert "nonsense" in e.value.stderr


@needs_compiler
@pytest.mark.slow
def test_many_processes_build_at_once(tmp_path):
  """And a library that was cut short is built again, in a process's start."""
  code = (
    "import jax.numpy as jnp; from convmixer_jax import ops\n"
    "from convmixer_jax.ops import native\n"
    "assert native.available(jnp.ones(1))\n"
    "x, kernel = jnp.ones((1, 9, 9, 1)), jnp.ones((3, 3, 1))\n"
    "print(ops.depthwise_conv(x, kernel).sum())"
  )
  env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}

  def start():
    return subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=common.ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  processes = [start() for _ in range(4)]
  assert [p.communicate()[0] for p in processes] == ["625.0\n"] * 4
  (path,) = tmp_path.glob("convmixer_jax/*")
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  assert start().communicate()[0] == "625.0\n"
  assert path.stat().st_size == len(whole)
  # A home that cannot be used leaves nothing behind.
  shutil.rmtree(tmp_path / "convmixer_jax")
  (tmp_path / "convmixer_jax").touch()
  env["TMPDIR"] = str(tmp_path)
  assert start().communicate()[0] == "625.0\n"
  assert [p.name for p in tmp_path.iterdir()] == ["convmixer_jax"]
