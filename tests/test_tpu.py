"""Kernels for TPUs: interpreted, against float64; and compiled by libtpu."""

import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from convmixer_jax import ops
from convmixer_jax import sharding
from convmixer_jax.ops import banded
from convmixer_jax.ops import normalize
from convmixer_jax.ops import tpu
from convmixer_jax.ops import tpu_blocks
from convmixer_jax.ops import tpu_kernels
from convmixer_jax.plan import cost
from tests import common
from tests import test_ops
from tests import test_plan


def maps(x):
  """[B, H, W, C] <-> [H, W, B, C]."""
  return jnp.transpose(x, (1, 2, 0, 3))


def images(x):
  return np.transpose(np.asarray(x, np.float64), (2, 0, 1, 3))


def inputs(shape, dtype):
  *image, k = shape
  x, grad = (test_ops.normal(i, *image, dtype=dtype) for i in range(2))
  return x, test_ops.normal(2, k, k, image[-1], dtype=dtype), grad


# B, H, W, C, k: even and odd k; maps that fill groups of rows, and do not, and
# are smaller than the kernel; windows of one, two, three and more groups; three
# groups, which are padded to four; several blocks of images and of channels.
SHAPES = [
  (3, 5, 9, 5, 4),
  (2, 32, 32, 2, 9),
  (140, 3, 3, 130, 5),
  (2, 9, 40, 3, 8),
  (20, 16, 16, 3, 1),
  (2, 40, 7, 3, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_against_float64(shape):
  x, kernel, grad = inputs(shape, jnp.float32)
  (y,) = tpu.forward(maps(x), kernel, interpret=True)
  grads = tpu.backward(maps(x), kernel, maps(grad), interpret=True)
  expected = test_ops.exact_vjp(x, kernel, grad)
  common.assert_close(images(y), test_ops.exact(x, kernel), 1e-6)
  common.assert_close(images(grads[0]), expected[0], 2e-6)
  common.assert_close(np.float64(grads[1]), expected[1], 2e-6)


def check_with_norm(shape, activation, dtype, tolerance):
  """Against the composition of the convolution and BatchNorm's functions."""
  x, kernel, grad = inputs(shape, dtype)
  batch, channels = len(x), x.shape[-1]
  bias = test_ops.normal(3, channels)
  p, q, r = (test_ops.normal(i, batch, channels) for i in (4, 5, 6))
  y, *moments = tpu.forward(maps(x), kernel, bias, activation, interpret=True)
  norm = tpu.Norm(y, bias, p, q, r)
  ours = tpu.backward(
    maps(x),
    kernel,
    maps(grad),
    norm,
    activation,
    residual=True,
    interpret=True,
  )

  y = jnp.transpose(y, (2, 0, 1, 3))
  common.assert_close(
    np.float64(y), test_ops.exact(x, kernel), max(tolerance, 1e-6)
  )
  how = "xla", activation
  for mine, golden in zip(moments, normalize.moments(how, y, bias)):
    common.assert_close(mine, golden, 2e-5)
  grad_y, grad_bias = normalize.input_grad(how, y, bias, p, q, r, grad)
  grad_x, grad_kernel = test_ops.exact_vjp(x, kernel, grad_y)
  common.assert_close(images(ours[0]), grad_x + np.float64(grad), tolerance)
  common.assert_close(np.float64(ours[1]), grad_kernel, tolerance)
  common.assert_close(ours[2], grad_bias, 2e-5)


def test_kernels_with_a_norm():
  check_with_norm((70, 40, 7, 3, 4), "gelu", jnp.bfloat16, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_kernels_with_a_norm_in_float32(activation):
  check_with_norm((130, 5, 9, 130, 4), activation, jnp.float32, 2e-5)


@pytest.mark.parametrize(
  ("dtype", "of_value", "of_slope"),
  [(jnp.bfloat16, 1.21e-5, 3e-5), (jnp.float32, 3e-7, 5e-7)],
)
def test_gelu_of_the_kernels(dtype, of_value, of_slope):
  x = jax.ShapeDtypeStruct((8, 8, 1, 1), dtype)
  at = tpu_blocks.of_maps(x, jnp.zeros((3, 3, 1)))
  far = [-1e18, -100, 100, 1e18]
  t = np.concatenate([np.linspace(-9, 9, 100_001), far]).astype(np.float32)
  t64 = np.float64(t)
  below, density = stats.norm.cdf(t64), stats.norm.pdf(t64)
  value, slope = tpu_kernels.gelu(jnp.asarray(t), at)
  # Errors of the formula; and of float32, relative to large values.
  size = np.maximum(np.abs(t64), 1)
  assert np.max(np.abs(value - t64 * below) / size) < of_value
  assert np.max(np.abs(slope - (below + t64 * density))) < of_slope


@pytest.mark.parametrize(
  ("shape", "dtype", "activation", "expected"),
  [
    ((64, 32, 32, 1536, 9), jnp.bfloat16, "gelu", True),
    ((64, 16, 16, 256, 5), jnp.bfloat16, "gelu", True),
    ((64, 32, 32, 1536, 9), jnp.float32, None, True),
    ((64, 32, 32, 1536, 9), jnp.float32, "gelu", False),  # Of memory.
    ((64, 28, 28, 768, 15), jnp.bfloat16, "gelu", True),
    ((1, 7, 5, 3, 4), jnp.bfloat16, "gelu", True),
    ((1, 7, 5, 3, 4), jnp.bfloat16, "silu", False),  # They lack it.
    ((1, 64, 32, 3, 4), jnp.bfloat16, None, False),  # More than 8 groups;
    ((1, 64, 32, 3, 2), jnp.float32, None, True),  # 16 in float32.
    ((1, 256, 256, 3, 4), jnp.bfloat16, None, False),
    ((1, 8, 8, 3, 4), jnp.float16, None, False),
    ((0, 8, 8, 3, 4), jnp.bfloat16, None, False),
  ],
)
def test_what_has_kernels(shape, dtype, activation, expected):
  *image, k = shape
  x = jax.ShapeDtypeStruct(image, dtype)
  kernel = jnp.zeros((k, k, image[-1]), dtype)
  assert tpu.supported(x, kernel, activation) == expected


def train_step(implementation, x, kernel, args):
  """A residual block's first half: its value, averages and gradients."""
  module = ops.BatchNorm(
    group_size=2, activation="gelu", implementation=implementation
  )
  variables = module.init(jax.random.key(0), x, False)

  def loss(x, kernel, bias, params):
    conv = ops.Convolution(ops.depthwise_conv, kernel, bias)
    y, new = module.apply(
      variables | {"params": params},
      x,
      True,
      conv=conv,
      residual=x,
      mutable=["batch_stats"],
    )
    return jnp.sin(y).sum(), new

  args = x, kernel, args[0], {"scale": args[1], "bias": args[2]}
  grad = jax.value_and_grad(loss, range(4), has_aux=True)
  return grad(*args), jax.jvp(lambda *a: loss(*a)[0], args, args)


def test_a_fused_train_step_where_there_is_no_tpu(monkeypatch):
  """By the same derivatives around it, with XLA's or native.cc's operations."""
  monkeypatch.setattr(tpu, "supported", lambda *args, **kwargs: True)
  x, kernel, _ = inputs((4, 5, 6, 3, 3), jnp.float32)
  args = [test_ops.normal(i, 3) for i in range(4, 7)]
  ours = jax.jit(train_step, static_argnums=0)("pallas", x, kernel, args)
  expected = train_step("xla", x, kernel, args)
  assert common.tree_error(ours, expected) < 5e-6


def test_one_pass_statistics_far_from_the_center():
  """Of values around 30 with a spread of 1: 1000 times its square is lost."""
  x = test_ops.normal(0, 4, 6, 5, 3) + 30
  how, bias = ("pallas", "identity"), jnp.zeros(3)
  x64 = np.float64(x)
  for center, tolerance in ((0, 2e-4), (29, 2e-6)):
    with ops.portable():
      mean, squares = normalize.moments(how, x, bias, jnp.full(3, center))
    common.assert_close(mean, x64.mean((1, 2)), 1e-6)
    exact = np.square(x64 - x64.mean((1, 2), keepdims=True)).sum((1, 2))
    common.assert_close(squares, exact, tolerance)


def test_products_are_counted():
  """Of every loop and step of the kernels, and their schedules."""
  x = jax.ShapeDtypeStruct((128, 32, 32, 256), jnp.bfloat16)
  kernel = jax.ShapeDtypeStruct((9, 9, 256), jnp.bfloat16)
  op = lambda *args: ops.depthwise_conv(*args, implementation="pallas")
  both = lambda x, kernel: jax.vjp(op, x, kernel)[1](x)
  product = 2 * 128 * 32 * 32 * 256 * 384
  for function, products in ((op, 1), (both, 2)):
    jaxpr = jax.jit(function).trace(x, kernel).jaxpr.jaxpr
    assert cost.flops(jaxpr) == products * product
    cycles = cost.kernel_cycles(jaxpr)
    assert cycles > 0
    with ops.over(sharding.make_mesh()):
      sharded = jax.jit(lambda *args: function(*args))  # noqa: B023
      jaxpr = sharded.trace(x, kernel).jaxpr.jaxpr
    assert cost.flops(jaxpr) == products * product
    # Each device makes its own bands.
    assert cycles < cost.kernel_cycles(jaxpr) < 8 * cycles
    mapped = jax.vmap(lambda *args: function(*args), (0, None))  # noqa: B023
    pairs = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    jaxpr = jax.jit(mapped).trace(pairs, kernel).jaxpr.jaxpr
    assert cost.flops(jaxpr) == 2 * products * product
    assert cost.kernel_cycles(jaxpr) == 2 * cycles


def test_schedules_are_those_of_the_benchmark():
  path = common.ROOT / "benchmarks/results/tpu_kernels_v5e.json"
  rows = json.loads(path.read_text())["rows"]
  for row in rows[:8]:  # Of 1536 channels with GELU, and 768 with ReLU.
    kernel, *norm = row["kernel"].split(", ")
    name = "_".join(["depthwise", kernel, *norm[:1]])
    expected = row["block"], row["channels"], row["call"]
    assert cost.BUNDLES[name] == expected, name


def test_wide_maps_are_banded_too():
  x, kernel, grad = inputs((1, 2, 200, 2, 3), jnp.float32)
  common.assert_close(
    banded.forward(x, kernel), test_ops.exact(x, kernel), 1e-6
  )
  for ours, golden in zip(
    banded.gradients(x, kernel, grad), test_ops.exact_vjp(x, kernel, grad)
  ):
    common.assert_close(np.float64(ours), golden, 2e-6)


SCRIPT = """
import json, os, sys
from convmixer_jax.plan import topology
kind, norm = sys.argv[1:]
devices = topology.open_topology(kind)
import jax, jax.numpy as jnp, numpy as np
from convmixer_jax import ops
from convmixer_jax import sharding
from tests import test_tpu
jax.config.update("jax_enable_compilation_cache", False)
mesh = sharding.make_mesh(devices)
spec = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
x = jax.ShapeDtypeStruct((16 * len(devices), 20, 12, 130), jnp.bfloat16,
                         sharding=spec("data"))
kernel = jax.ShapeDtypeStruct((5, 5, 130), jnp.bfloat16, sharding=spec())
args = [jax.ShapeDtypeStruct((130,), jnp.float32, sharding=spec())] * 3
step = lambda x, kernel, args: test_tpu.train_step("pallas", x, kernel, args)[0]
if norm == "False":
  op = lambda *a: ops.depthwise_conv(*a, implementation="pallas")
  step = lambda x, kernel, args: jax.vjp(op, x, kernel)[1](x)
with ops.portable(), ops.over(mesh):
  text = jax.jit(step).lower(x, kernel, args).compile().as_text()
kernels = text.count('"tpu_custom_call"')
print(json.dumps([kernels, test_tpu.test_ops.exchanges(text)]))
"""


def run_script(script, *args):
  process = subprocess.run(
    [sys.executable, "-c", script, *args],
    cwd=common.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-2000:]
  return json.loads(process.stdout.splitlines()[-1])


@test_plan.tpu
@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v6e:1x1"])
def test_programs_for_tpus(kind, norm):
  """The kernels compile; a sharded batch is not gathered.

  A v4 has too little memory on the chip for them, and gets XLA's operations.
  """
  kernels, exchanges = run_script(SCRIPT, kind, str(norm))
  if kind.startswith("v4"):
    assert kernels == 0
  else:  # Without a norm: the gradients' alone.
    assert kernels == (2 if norm else 1)
  assert exchanges == ([] if kind.endswith("1x1") else ["all-reduce"])


STEP = """
import json, re
from convmixer_jax import plan
from convmixer_jax.data import sources
from convmixer_jax.plan import hlo
from convmixer_jax.plan import topology
from tests import common
devices = topology.open_topology("v5e:1x1")
import jax
jax.config.update("jax_enable_compilation_cache", False)
config = common.load_config("configs/imagenet.py").unlock()
config.model.update(depth=1, implementation="pallas")
config.batch_size = 64
data = sources.Description(1281167, 1000, (None, None, 3), 224)
*_, traced = plan.trace_step(config, devices, data)
program = hlo.Program(traced.lower().compile().as_text())
print(json.dumps(sum(
  runs * len(re.findall(r"bf16\\[(?:64,32,32|32,32,64),1536\\]", i.shape))
  for i, runs in program.instructions()
  if i.opcode in ("fusion", "custom-call", "copy", "convolution")
)))
"""


@test_plan.tpu
@pytest.mark.slow
def test_a_step_writes_six_arrays_a_block():
  """The results of its norms and convolutions, but not of the first norm.

  x, y, u; and the gradients of u, z and x. The products compute z, the result
  of the first norm, as they read y and x. Around the block there are two.
  """
  assert run_script(STEP) == 6 + 2


def test_compiler_options():
  """Of the chips with enough memory alone; other compilers would refuse it."""
  device = lambda platform, kind: mock.Mock(platform=platform, device_kind=kind)
  for kind in ("TPU v5 lite", "TPU v6 lite"):
    (name,) = tpu.compiler_options(device("tpu", kind))
    assert name == "xla_tpu_scoped_vmem_limit_kib"
  assert tpu.compiler_options(device("tpu", "TPU v4")) == {}
  assert tpu.compiler_options(jax.devices()[0]) == {}
