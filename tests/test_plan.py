import importlib.metadata
import io
import json
import os
from pathlib import Path
import pty
import re
import signal
import subprocess
import sys
import termios
from unittest import mock

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

from convmixer_jax import models
from convmixer_jax import plan
from convmixer_jax import sharding
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.ops import banded
from convmixer_jax.plan import cost
from convmixer_jax.plan import hlo
from convmixer_jax.plan import report
from convmixer_jax.plan import search
from convmixer_jax.plan import topology
from tests import common

DIGITS = sources.describe("digits", None, "train", 8)


def plan_digits(**overrides):
  """Eight images on each of the eight devices."""
  config = common.digits_config(batch_size=64, **overrides)
  return plan.plan(config, jax.devices(), DIGITS)


def bytes_by_cause(result):
  total = {}
  for row in result["collectives"]:
    total[row["cause"]] = total.get(row["cause"], 0) + row["bytes"]
  return total


@pytest.fixture(scope="module")
def grouped():
  fields = {"bn_group_size": 8, "depth": 2, "scan": True}
  return plan_digits(**{f"model.{name}": v for name, v in fields.items()})


@pytest.fixture(scope="module")
def synchronised():
  return plan_digits(**{"augment.mixup_alpha": 0.2})


def test_memory(synchronised):
  split = synchronised["memory_split_bytes"]
  # 322 parameters, three pairs of averages of 8 channels; AdamW's two moments,
  # and two counters; on each device 8 images of 8 x 8 and their labels.
  assert split["parameters"] == 322 * 4 == 1288
  assert split["batch_stats"] == 3 * 2 * 8 * 4
  assert split["optimizer"] == 2 * 1288 + 2 * 4
  assert split["batch"] == 8 * (8 * 8 * 3 + 4)
  assert split["ema"] == 0
  assert split["activations"] > 0
  assert sum(split.values()) == synchronised["memory_bytes"]
  assert synchronised["fits"]
  assert synchronised["steps"] == 23  # ceil(1437 / 64)


def test_groups_that_fit_exchange_gradients_and_averages_only(grouped):
  """Byte for byte; the blocks are a loop, whose runs all count."""
  split = grouped["memory_split_bytes"]
  assert bytes_by_cause(grouped) == {
    "gradients": split["parameters"],
    "BatchNorm running averages": split["batch_stats"],
    "metrics": 8,
  }
  assert {row["kind"] for row in grouped["collectives"]} == {"all-reduce"}


def test_statistics_of_the_whole_batch_are_exchanged(synchronised):
  causes = bytes_by_cause(synchronised)
  norms = 3 * 8 * 4
  # Mean, mean square and spread forward, two sums backward, which are the
  # gradients of scale and offset too.
  assert causes.pop("BatchNorm statistics") == 5 * norms
  parameters = synchronised["memory_split_bytes"]["parameters"]
  assert causes.pop("gradients") == parameters - 2 * norms
  # Images and labels of the whole batch, in reverse order.
  assert causes.pop("augmentation") > 0
  assert causes == {"metrics": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("overrides", "cause"),
  [
    ({"model.bn_group_size": 16}, "BatchNorm statistics"),
    ({"accum_steps": 2}, "microbatches"),
  ],
)
def test_other_exchanges(overrides, cause):
  assert bytes_by_cause(plan_digits(**overrides))[cause] > 0


def test_flops():
  config = common.digits_config(**{"model.dim": 64, "model.depth": 6})

  def flops(**fields):
    config.model.update(fields)
    *_, traced = plan.trace_step(config, jax.devices(), DIGITS)
    return cost.flops(traced.jaxpr.jaxpr)

  once = flops()
  model = models.create_model(num_classes=10, **config.model)
  forward = config.batch_size * models.flops(model, 8)
  assert once == pytest.approx(3 * forward, rel=0.01)
  assert flops(scan=True) == once
  assert flops(remat="nothing_saveable") == pytest.approx(4 * forward, rel=0.02)


def test_a_slice_counts_for_what_is_cut_out():
  rows = jax.ShapeDtypeStruct((1000, 4096), jnp.float32)
  total = lambda x: jax.lax.scan(lambda sum, row: (sum + row, row * 2), x[0], x)
  program = hlo.Program(jax.jit(total).lower(rows).compile().as_text())
  # Each row is read once or twice and written once, beside the sum.
  size = 1000 * 4096 * 4
  assert 3 * size <= program.bytes() <= 8 * size


def test_arrays_exchanged_by_loops_and_in_pairs():
  mesh = sharding.make_mesh()

  def body(x, _):
    total = jax.lax.psum((x, x[:2]), "data")
    return x + total[0] + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

  step = jax.shard_map(
    lambda x: jax.lax.scan(body, x, length=5)[0],
    mesh=mesh,
    in_specs=jax.P("data"),
    out_specs=jax.P("data"),
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct((8 * 100,), jnp.float32)
  program = hlo.Program(jax.jit(step).lower(x).compile().as_text())
  found = [
    (c.kind, c.bytes, c.runs, c.group_size, c.sent_bytes)
    for c in program.collectives()
  ]
  assert found.count(("all-reduce", 400, 5, 8, 400 * 2 * 7 / 8)) == 1
  assert ("collective-permute", 400, 5, 0, 400) in found


@pytest.mark.parametrize(
  "groups",
  [
    "{{0,1},{2,3},{4,5},{6,7}}",
    "[4,2]<=[8]",
    "mesh['a'=4,'b'=2] {'b'}",
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
    "mesh['a'=8] {'a':(4)2}",
  ],
)
def test_the_size_of_a_group(groups):
  program = hlo.Program(f"""
ENTRY %main (p: f32[100]) -> f32[100] {{
  %p = f32[100]{{0}} parameter(0)
  ROOT %sum = f32[100]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%a
}}
""")
  (collective,) = program.collectives()
  assert (collective.bytes, collective.group_size) == (400, 2)


# As XLA compiles it for GPUs: gradients and a metric as one vector.
GPU_PROGRAM = """
%join (a: f32[64], b: f32[192], c: f32[1]) -> f32[257] {
  %a = f32[64]{0} parameter(0)
  %b = f32[192]{0} parameter(1)
  %c = f32[1]{0} parameter(2)
  ROOT %all = f32[257]{0} concatenate(%a, %b, /*index=2*/%c), dimensions={0}
}

%first (a: f32[257]) -> f32[64] {
  %a.1 = f32[257]{0} parameter(0)
  ROOT %cut = f32[64]{0} slice(%a.1), slice={[0:64]}
}

%double (a: f32[257]) -> (f32[1], f32[192]) {
  %a.2 = f32[257]{0} parameter(0)
  %cut.1 = f32[1]{0} slice(%a.2), slice={[256:257]}, metadata={op_name="j/m"}
  %cut.2 = f32[192]{0} slice(%a.2), slice={[64:256]}, metadata={op_name="j/b"}
  %twice = f32[192]{0} add(%cut.2, %cut.2)
  ROOT %both = (f32[1]{0}, f32[192]{0}) tuple(%cut.1, %twice)
}

%product (x: bf16[32,64], y: bf16[64,64]) -> bf16[32,64] {
  %x = bf16[32,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  ROOT %dot = bf16[32,64]{1,0} dot(%x, %y), lhs_contracting_dims={1}
}

%gemm (x: bf16[32,64], y: bf16[64,64]) -> bf16[32,64] {
  %x.1 = bf16[32,64]{1,0} parameter(0)
  %y.1 = bf16[64,64]{1,0} parameter(1)
  ROOT %inner = bf16[32,64]{1,0} fusion(%x.1, %y.1), calls=%product
}

ENTRY %main (p: f32[64], q: f32[192], r: f32[1]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %q = f32[192]{0} parameter(1)
  %r = f32[1]{0} parameter(2)
  %x.2 = bf16[32,64]{1,0} parameter(3)
  %w = bf16[64,64]{1,0} parameter(4)
  %joined = f32[257]{0} fusion(%p, %q, /*index=2*/%r), kind=kLoop, calls=%join
  %start = f32[257]{0} all-reduce-start(%joined), replica_groups={{0,1}}
  %gemm.1 = bf16[32,64]{1,0} fusion(%x.2, %w), kind=kCustom, calls=%gemm
  %conv = (bf16[32,64]{1,0}, u8[100]{0}) custom-call(%gemm.1, %w)
  %done = f32[257]{0} all-reduce-done(%start)
  %cut.3 = f32[64]{0} fusion(%done), kind=kLoop, calls=%first
  %named = f32[8,8]{1,0} bitcast(%cut.3), metadata={op_name="j/a"}
  %pair = (f32[1]{0}, f32[192]{0}) fusion(%done), kind=kLoop, calls=%double
  %swap = ((f32[64]{0}), f32[64]{0}) all-to-all-start(%cut.3), dimensions={0}
  ROOT %swapped = f32[64]{0} all-to-all-done(%swap), metadata={op_name="j/s"}
}
"""


def test_arrays_that_gpus_exchange_as_one():
  found = [
    (c.kind, c.op_name, c.bytes, c.group_size, c.name)
    for c in hlo.Program(GPU_PROGRAM).collectives()
  ]
  assert found == [
    ("all-reduce", "j/a", 64 * 4, 2, "start"),
    ("all-reduce", "j/b", 192 * 4, 2, "start"),
    ("all-reduce", "j/m", 1 * 4, 2, "start"),
    ("all-to-all", "j/s", 64 * 4, 0, "swap"),
  ]


def test_traffic_of_a_gpu_program():
  vector, activations, weights = 257 * 4, 32 * 64 * 2, 64 * 64 * 2
  assert hlo.Program(GPU_PROGRAM).bytes() == (
    2 * vector  # Joined,
    + 2 * vector  # summed,
    + 2 * vector  # and cut up: the slices together are the vector.
    + (activations + weights + activations)  # The product,
    + (activations + weights + activations + 100)  # cuDNN and its workspace,
    + 2 * 64 * 4  # and the swap.
  )


@pytest.mark.parametrize(
  "change",
  [
    ("concatenate(", "add("),
    ("slice(", "reverse("),
    ("f32[192]{0} parameter", "f32[2,96]{1,0} parameter"),
  ],
)
def test_one_array_that_gpus_exchange(change):
  """Not several, if nothing tells where one ends."""
  program = hlo.Program(GPU_PROGRAM.replace(*change))
  assert [c.bytes for c in program.collectives()] == [257 * 4, 64 * 4]


@pytest.mark.parametrize(
  ("name", "error"),
  [
    ("v9:2x2", r"a TPU \(v4, v5e, v5p, v6e\)"),
    ("v5e", "number of chips along each axis, as in v5e:4x4"),
    *((name, "must be") for name in ("v5e:", "v5e:0x4", "cpu:2x2", "cpu:0")),
    *(
      (name, r"a GPU \(a100, h100, h200, l4\) and one number, as in h100:8")
      for name in ("h100", "h100:0", "h100:2x4", "l4:-1", "b200:8")
    ),
    ("a100:10001", "at most 10,000"),
    ("cpu:99999", "at most 10,000"),
    ("v5e:999x999", "at most 10,000"),
  ],
)
def test_invalid_topologies(name, error):
  with pytest.raises(UserError, match=error) as e:
    topology.open_topology(name)
  assert str(e.value).startswith(f"--topology={name}: ")
  assert "\n" not in str(e.value)


def test_without_libtpu(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr("sys.prefix", "/nonexistent")
  with pytest.raises(UserError, match=r'pip install "jax\[tpu\]==') as e:
    topology.open_topology("v5e:2x4")
  assert "\n" not in str(e.value)


def test_without_the_plugin_for_gpus(monkeypatch):
  missing = mock.Mock(side_effect=NotImplementedError)
  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  line = rf"^--topology=l4:2: .* --no-deps jax-cuda12-pjrt=={jax.__version__}$"
  with pytest.raises(UserError, match=line):
    topology.open_topology("l4:2")


def test_a_plugin_that_refuses_a_gpu(monkeypatch, capfd):
  def refuse(name, *, platform, target_config, topology):
    os.write(2, b"GPU will not be used")
    assert (platform, topology) == ("cuda", "1x1x3")
    assert 'device_description_str: "NVIDIA H200"' in target_config
    raise ValueError("unknown field\nnumber 7")

  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  with pytest.raises(UserError, match=r"^--topology=h200:3: unknown field$"):
    topology.open_topology("h200:3")
  os.write(2, b"shown again")
  assert capfd.readouterr() == ("", "shown again")


def test_memory_of_gpus(monkeypatch):
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    monkeypatch.delenv(name, raising=False)
  gpu = mock.Mock(platform="gpu", device_kind="NVIDIA L4")
  gpu.memory_stats.return_value = {"bytes_limit": 12345}
  assert topology.available_memory([gpu]) == 22 * 2**30 * 3 // 4
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
  assert topology.available_memory([gpu]) == 11 * 2**30
  for value in ("all", "1.1", "0", "nan"):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    with pytest.raises(UserError, match=f"^XLA_CLIENT_MEM_FRACTION={value}: "):
      topology.available_memory([gpu])
  monkeypatch.setattr(jax, "devices", lambda: [gpu])  # A GPU of this machine.
  assert topology.available_memory([gpu]) == 12345


def fake_plans(monkeypatch, activations, limit, available, known=10**9):
  """Batches up to `limit` fit, up to `known` compile; returns those planned."""
  sizes = []

  def fake(config, devices, data):
    size = config.batch_size
    sizes.append(size)
    return {
      "batch_size": size,
      "fits": size <= limit,
      "compile_seconds": 0.0,
      "memory_bytes": activations(size) + 5 if size <= known else None,
      "memory_available_bytes": activations(available) + 5,
      "memory_split_bytes": {"batch": 0, "activations": activations(size)},
    }

  monkeypatch.setattr(plan, "plan", fake)
  return sizes


@pytest.mark.parametrize("limit", [1, 3, 7, 100, 1437 // 64])
@pytest.mark.parametrize("begin", [1, 4, 20])
def test_find_batch(monkeypatch, limit, begin):
  """Batches fit up to `limit` units of 64, by memory that is not linear."""
  activations = lambda size: (size // 64) ** 2 + 10
  compiled = fake_plans(monkeypatch, activations, 64 * limit, 64 * limit)
  config = common.digits_config(
    batch_size=64 * begin, **{"model.bn_group_size": 8}
  )
  lines = []
  found = search.find_batch(config, jax.devices(), DIGITS, lines.append)
  assert found["batch_size"] == 64 * min(limit, 1437 // 64)
  assert [row["batch_size"] for row in found["tried"]] == compiled
  assert len(compiled) == len(set(compiled)) <= 10
  assert len(lines) == 1 + len(compiled)
  assert config.batch_size == 64 * begin


def test_find_batch_ends_within_two_percent(monkeypatch):
  plans = fake_plans(monkeypatch, lambda size: 3 * size, 700, 703, 700)
  config = common.digits_config()
  found = search.find_batch(config, jax.devices()[:1], DIGITS, lambda _: None)
  assert 686 <= found["batch_size"] <= 700
  assert len(plans) <= 6


@pytest.mark.slow
def test_find_batch_where_none_fits(monkeypatch):
  monkeypatch.setattr(topology, "available_memory", lambda devices: 1000)
  config = common.digits_config(batch_size=64)
  with pytest.raises(UserError, match="8, the smallest possible, does not"):
    search.find_batch(config, jax.devices(), DIGITS, print)


@pytest.mark.parametrize(
  ("name", "split", "size", "classes", "in_memory"),
  [
    ("digits", "train[:50%]", 718, 10, False),
    ("cifar10", "train[:45000]", 45_000, 10, True),
    ("imagenet2012", "train", 1_281_167, 1000, False),
    ("imagenet2012", "train[:98%]", 1_255_544, 1000, False),
    ("imagenet_resized/32x32", "train", 1_281_167, 1000, False),
    ("imagenet_resized/32x32", "validation", 50_000, 1000, True),
    ("folder", "train", None, None, False),
  ],
)
def test_size_and_classes_without_the_data(
  tmp_path, name, split, size, classes, in_memory
):
  missing = str(tmp_path / "missing")
  known = sources.describe(name, missing, split, 32)
  assert (known.size, known.num_classes) == (size, classes)
  assert known.in_memory == in_memory


def run_plan(*args):
  process = common.run_main(
    "--config=configs/digits.py",
    "--config.model.dim=8",
    "--config.model.depth=1",
    *args,
    module="convmixer_jax.plan",
  )
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.mark.slow
def test_the_command():
  code, out, err = run_plan("--topology=cpu:4", "--json")
  assert (code, err) == (0, "")
  result = json.loads(out)
  assert result["num_devices"] == 4
  assert result["fits"]
  assert result["versions"]["jax"] == jax.__version__
  code, out, err = run_plan("--topology=cpu:4", "--find_batch", "--json")
  assert code == 0, err
  result = json.loads(out)
  # All but one of the 1437 images: four devices get equal parts.
  assert result["batch_size"] == 1436
  assert "batch_size=1,436: fits" in err
  assert "Traceback" not in err


def test_the_report(grouped, synchronised):
  text = report.report(grouped)
  assert "memory a device: fits, 0.00 of" in text
  assert "  gradients                   2.024 kB, 22 arrays in " in text
  assert "BatchNorm statistics" in report.report(synchronised)
  caveat = "choose their algorithms on the machine itself"
  assert caveat in report.report(grouped | {"topology": "l4:1"})
  for name in (None, "v5e:1x1"):
    assert caveat not in report.report(grouped | {"topology": name})


def test_the_report_of_a_short_run(grouped):
  step = dict.fromkeys(("at_best", "arithmetic", "memory", "interconnect"), 1.0)
  for hours, says in ((30, "30.0 hours"), (0.5, "30.0 minutes"),
                      (0.01, "36.0 seconds")):  # fmt: skip
    result = grouped | {"seconds": step, "hours": {"at_best": hours}}
    assert f"epochs: {says}\n" in report.report(result)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_what_is_under_way_is_shown_on_a_terminal(monkeypatch, kind):
  monkeypatch.setenv("COLUMNS", "120")
  monkeypatch.setattr(sys, "stderr", kind())
  config = common.digits_config(**{"model.scan": True})
  plan.plan(config, jax.devices()[:1], DIGITS)
  what = "convmixer_128_4, batch 32, for 1 x cpu: 00:"
  shown = re.findall(r"\r(\w+) (.*?:.*?:)", sys.stderr.getvalue())
  if kind is Terminal:
    assert [*dict.fromkeys(shown)] == [("tracing", what), ("compiling", what)]
  else:
    assert sys.stderr.getvalue() == ""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_compilation(signum):
  """At once, without a word, and with all that it started."""
  read, write = pty.openpty()
  termios.tcsetwinsize(write, (40, 120))
  process = subprocess.Popen(
    [sys.executable, "-m", "convmixer_jax.plan", "--topology=cpu:2",
     "--config=configs/cifar10.py"],
    cwd=common.ROOT, stdout=write, stderr=write, start_new_session=True,
  )  # fmt: skip
  os.close(write)
  said = b""
  while b"compiling" not in said:
    said += os.read(read, 1000)
  process.send_signal(signum)
  assert process.wait(60) == -signum  # A shell says 128 + signum.
  with pytest.raises(ProcessLookupError):
    os.killpg(process.pid, 0)
  assert b"Traceback" not in said
  os.close(read)


RESULTS = sorted((common.ROOT / "benchmarks/results").glob("plan_*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_published_models(path):
  """The plans in benchmarks/results are consistent."""
  result = json.loads(path.read_text())
  assert result["fits"]
  assert result["batch_size"] == 64 * result["num_devices"]
  passes = 4 if result["remat"] else 3
  forward = result["model_flops"] / 3
  if result["seconds"].get("kernels"):
    # An output is a sum over a window instead of k * k pixels.
    k, side = result["kernel_size"], 224 // result["patch_size"]
    window = banded.layout(side, side, range(k)).window
    locations = result["batch_size"] // result["num_devices"] * side**2
    blocks = result["dim"] * result["depth"]
    forward += 2 * locations * blocks * (window - k**2)
  assert result["flops"] == pytest.approx(passes * forward, rel=0.02)
  causes = {"gradients", "metrics"}
  causes |= (
    {"BatchNorm running averages"}
    if result["bn_group_size"]
    else {"BatchNorm statistics"}
  )
  assert bytes_by_cause(result).keys() == causes
  assert {row["kind"] for row in result["collectives"]} == {"all-reduce"}


def is_apart(name):
  """Whether make installed it outside site-packages, where `plan` finds it."""
  return (Path(sys.prefix) / name).exists()


def is_installed(package):
  try:
    return bool(importlib.metadata.version(package))
  except importlib.metadata.PackageNotFoundError:
    return False


tpu = pytest.mark.skipif(
  not (
    is_apart("libtpu")
    or is_installed("libtpu")
    or "TPU_LIBRARY_PATH" in os.environ
  ),
  reason="NO LIBTPU: programs for TPUs are not checked",
)
gpu = pytest.mark.skipif(
  not (is_apart("cuda") or is_installed("jax-cuda12-pjrt")),
  reason="NO JAX-CUDA12-PJRT: programs for GPUs are not checked",
)


def plan_for_eight(*args):
  """Groups that fit on eight devices, and bounds of time."""
  code, out, err = run_plan(
    "--config.batch_size=64",
    "--config.model.bn_group_size=8",
    "--json",
    *args,
  )
  assert code == 0, err
  assert not err
  result = json.loads(out)
  split = result["memory_split_bytes"]
  assert result["num_devices"] == 8
  assert bytes_by_cause(result) == {
    "gradients": split["parameters"],
    "BatchNorm running averages": split["batch_stats"],
    "metrics": 8,
  }
  seconds = result["seconds"]
  bounds = [seconds[k] for k in ("arithmetic", "memory", "interconnect")]
  assert 0 < max(bounds) == seconds["at_best"]
  return result


@tpu
@pytest.mark.slow
def test_a_tpu_program():
  result = plan_for_eight("--topology=v5e:2x4")
  assert result["device"] == "TPU v5 lite"
  seconds = result["seconds"]
  assert seconds["at_best"] < seconds["compiler_estimate"]
  assert result["hours"]["at_best"] * 3600 == pytest.approx(
    result["steps"] * seconds["at_best"]
  )


@tpu
@pytest.mark.slow
def test_a_tpu_program_that_does_not_fit():
  code, out, err = run_plan(
    "--topology=v5e:1x1",
    "--config.data.image_size=512",
    "--config.model.dim=512",
    "--config.model.scan=true",
  )
  assert code == 1, err
  assert "memory a device: does not fit, " in out
  assert " of 15.75 GiB" in out
  assert "unknown" not in out


@tpu
@pytest.mark.slow
def test_topologies_that_libtpu_refuses():
  code, _, err = run_plan("--topology=v5e:3x5")
  assert code == 2
  assert err.startswith("error: --topology=v5e:3x5: ")
  assert err.count("\n") == 1


@tpu
@pytest.mark.slow
def test_tpus_get_no_code_for_cpus():
  script = """
import re
from convmixer_jax import plan
from convmixer_jax import recipe
from convmixer_jax.data import sources
from convmixer_jax.plan import topology
from tests import common
devices = topology.open_topology("v4:2x2x1")
assert [d.device_kind for d in devices] == ["TPU v4"] * 4
config = common.digits_config(batch_size=32)
config.augment.randaugment = "rand-m9-mstd0.5-inc1"
data = sources.describe("digits", None, "train", 8)
*_, traced = plan.trace_step(config, devices, data)
lowered = traced.lower()
text = lowered.as_text()
assert "feature_group_count = 8" in text  # XLA's own depthwise convolution.
assert "optimization_barrier" not in text  # As the sum of shifted products has.
text += lowered.compile().as_text()
assert not re.search("convmixer_(?!jax)", text)  # native.cc's functions.
# And they read or count no pixels one by one: the host applies the policy.
assert not re.search(r" (gather|scatter)\\(", text)
recipe._host = lambda *_: None
*_, traced = plan.trace_step(config, devices, data)
assert re.search(r" (gather|scatter)\\(", traced.lower().compile().as_text())
"""
  command = [sys.executable, "-c", script]
  result = subprocess.run(
    command, cwd=common.ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("scan", ["false", "true"])
def test_a_gpu_program(scan):
  result = plan_for_eight(
    "--topology=h100:8",
    "--config.model.depth=2",
    f"--config.model.scan={scan}",
  )
  assert result["device"] == "NVIDIA H100 80GB HBM3"
  assert 59 < result["memory_available_bytes"] / 2**30 < 60  # 3/4 of 79.1.
  assert "jax-cuda12-pjrt" in result["versions"]
  assert "compiler_estimate" not in result["seconds"]


@gpu
@pytest.mark.slow
def test_a_gpu_program_with_our_kernels():
  """Each GPU runs them on its own images."""

  def result_of(*args):
    code, out, err = run_plan(
      "--topology=h100:8",
      "--config.batch_size=64",
      "--config.model.depth=2",
      "--config.model.kernel_size=5",
      "--config.model.dtype=bfloat16",
      "--json",
      *args,
    )
    assert code == 0, err
    return json.loads(out)

  result = result_of()
  # They are in the program: it is not that of XLA's convolution.
  assert (
    result["bytes"] != result_of("--config.model.implementation=xla")["bytes"]
  )
  assert {c["kind"] for c in result["collectives"]} == {"all-reduce"}
  # Some gradients are exchanged in bfloat16.
  parameters = result["memory_split_bytes"]["parameters"]
  assert parameters / 2 < bytes_by_cause(result)["gradients"] <= parameters


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", topology.gpus.GPUS)
def test_one_gpu_exchanges_nothing(name):
  code, out, err = run_plan(f"--topology={name}:1")
  assert (code, err) == (0, "")
  assert "  exchanged                   nothing" in out
  assert "choose their algorithms on the machine itself" in out


@gpu
@pytest.mark.slow
def test_a_gpu_program_that_does_not_fit():
  code, out, err = run_plan(
    "--topology=l4:1",
    "--config.data.image_size=256",
    "--config.model.dim=512",
    "--config.model.scan=true",
  )
  assert code == 1, err
  assert "memory a device: does not fit, " in out
  assert " of 16.50 GiB" in out
  assert "unknown" not in out
