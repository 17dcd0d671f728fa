import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convmixer_jax import ops
from convmixer_jax import sharding
from convmixer_jax.ops import depthwise
from tests import common


def exact(x, kernel):
  """SAME depthwise convolution in float64, by its definition."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  k = kernel.shape[0]
  low, high = (k - 1) // 2, k // 2
  padded = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (1, 2))
  return np.einsum("bhwcij,ijc->bhwc", windows, kernel)


def exact_vjp(x, kernel, grad):
  """The op is bilinear: its gradients by the transposed definition."""
  x, kernel, grad = (np.asarray(a, np.float64) for a in (x, kernel, grad))
  k = kernel.shape[0]
  low, high = (k - 1) // 2, k // 2
  padded = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (1, 2))
  grad_kernel = np.einsum("bhwcij,bhwc->ijc", windows, grad)
  grad_padded = np.zeros_like(padded)
  height, width = x.shape[1:3]
  for i in range(k):
    for j in range(k):
      grad_padded[:, i : i + height, j : j + width] += grad * kernel[i, j]
  return grad_padded[:, low : low + height, low : low + width], grad_kernel


SHAPES = [  # B, H, W, C, k
  (8, 7, 5, 3, 3),
  (16, 8, 8, 4, 5),
  (3, 5, 9, 2, 4),
  (2, 4, 4, 5, 8),
  (1, 3, 3, 1, 9),
  (5, 6, 6, 7, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", [None, *depthwise.IMPLEMENTATIONS])
def test_depthwise_and_its_gradients(implementation, shape):
  *image_shape, k = shape
  keys = jax.random.split(jax.random.key(0), 3)
  x, grad = (jax.random.normal(key, image_shape) for key in keys[:2])
  kernel = jax.random.normal(keys[2], (k, k, image_shape[-1]))
  y, vjp = jax.vjp(
    lambda x, kernel: ops.depthwise_conv(
      x, kernel, implementation=implementation
    ),
    x,
    kernel,
  )
  common.assert_close(y, exact(x, kernel), 1e-6)
  for ours, expected in zip(vjp(grad), exact_vjp(x, kernel, grad)):
    common.assert_close(ours, expected, 2e-6)


@pytest.mark.parametrize("implementation", ["xla", "shift"])
def test_depthwise_bfloat16(implementation):
  x = jax.random.normal(jax.random.key(0), (8, 8, 8, 4), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (5, 5, 4), jnp.bfloat16)
  y = ops.depthwise_conv(x, kernel, implementation=implementation)
  assert y.dtype == jnp.bfloat16
  common.assert_close(y.astype(np.float32), exact(x, kernel), 1e-2)


def test_depthwise_refuses():
  x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2))
  with pytest.raises(ValueError, match="fast"):
    ops.depthwise_conv(x, kernel, implementation="fast")
  with pytest.raises(ValueError, match="kernel"):
    ops.depthwise_conv(x, kernel[:, :2])


def gradient_hlo(fn, *args):
  grad = jax.jit(jax.grad(lambda *a: jnp.square(fn(*a)).sum(), (0, 1)))
  return grad.lower(*args).compile().as_text()


def test_depthwise_compiles_one_implementation_and_gathers_nothing():
  mesh = sharding.make_mesh()
  x = jax.device_put(jnp.ones((16, 8, 8, 4)), sharding.batch_sharding(mesh))
  kernel = jax.device_put(jnp.ones((3, 3, 4)), sharding.replicated(mesh))
  hlo = gradient_hlo(ops.depthwise_conv, x, kernel)
  assert "conditional" not in hlo
  assert "convolution" not in hlo  # On CPU it is the shifted sum.
  assert "all-gather" not in hlo
  assert "all-to-all" not in hlo
  assert "collective-permute" not in hlo
  assert "all-reduce" in hlo  # The kernel's gradient, over the batch.


def batch_norm(x, group_size, train=True, mesh=None):
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
    lambda v, x: module.apply(v, x, train, mutable=["batch_stats"])
  )
  if mesh is not None:
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    variables = jax.device_put(variables, sharding.replicated(mesh))
  y, updated = apply(variables, x)
  hlo = apply.lower(variables, x).compile().as_text()
  return np.asarray(y), updated["batch_stats"], hlo


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
@pytest.mark.parametrize("group_size", [0, 1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("devices", [1, 8])
def test_batch_norm_groups(group_size, devices):
  mesh = sharding.make_mesh(jax.devices()[:devices])
  y, running, hlo = batch_norm(X, group_size, mesh=mesh)
  expected, mean, var = batch_norm_by_hand(X, group_size or 32)
  common.assert_close(y, expected, 2e-6)
  common.assert_close(running["mean"], mean, 2e-6)
  common.assert_close(running["var"], var, 2e-6)
  # Only the running averages of such groups are summed over devices: [1 or C].
  if devices == 8 and 0 < group_size <= 4:
    assert "all-gather" not in hlo
    assert "all-to-all" not in hlo
    assert "collective-permute" not in hlo


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

    hlo = jax.jit(input_gradient).lower(x).compile().as_text()
    return [name for name in ("all-reduce", "all-gather", "all-to-all",
                              "collective-permute") if name in hlo]  # fmt: skip

  assert collectives(4) == []
  assert collectives(0) == ["all-reduce"]


def test_batch_norm_inference_uses_running_statistics():
  y, running, _ = batch_norm(X, 0, train=False)
  scale, bias = np.linspace(0.5, 2, 4), np.linspace(-1, 1, 4)
  common.assert_close(y, (X - 1) / np.sqrt(2 + 1e-5) * scale + bias, 2e-6)
  assert np.all(running["mean"] == 1)
  assert np.all(running["var"] == 2)


def test_batch_norm_refuses_broken_groups():
  with pytest.raises(ValueError, match="groups of 5"):
    batch_norm(X, 5)
