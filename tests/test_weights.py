"""Weights in and out: files, names, and what is made of them."""

import argparse
import collections
import functools
import json
import os
import pathlib
import pickle
import re
import shutil
import socket
import subprocess
import sys
import types
import zipfile

from huggingface_hub import constants as hub
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
from sklearn import datasets
import torch

from convmixer_jax import augment
from convmixer_jax import evaluate
from convmixer_jax import export
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import torch_pickle
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax.data import decode
from convmixer_jax.errors import UserError
from tests import common
from tests import test_data

VARIANTS = models.convmixer.VARIANTS
GOLDEN = common.golden("convmixer_k7p4")
STATE = {
  name.removeprefix("before/"): np.array(value)
  for name, value in GOLDEN.items()
  if name.startswith("before/")
}
TENSORS = {name: torch.from_numpy(value) for name, value in STATE.items()}
OTHER = {name: value * 0 for name, value in TENSORS.items()}
PREFIXED = {f"module.{name}": value for name, value in TENSORS.items()}
TRAINING = {  # As timm's trainer saves it.
  "epoch": 3,
  "arch": "convmixer",
  "args": argparse.Namespace(lr=0.01, opt="adamw"),
  "metric": np.float64(81.4),
  "optimizer": {
    "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}},
    "param_groups": [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0]}],
  },
}
WAYS = {
  "weights": TENSORS,
  "module.": PREFIXED,
  "checkpoint": TRAINING | {"state_dict": PREFIXED},
  "averages": TRAINING | {"state_dict": OTHER, "state_dict_ema": TENSORS},
  "parameters": {k: torch.nn.Parameter(v, False) for k, v in TENSORS.items()},
  "any name": {"epoch": 3, "loss": 0.1, "weights": {"of": TENSORS}},
  "compiled": {f"_orig_mod.module.{k}": v for k, v in TENSORS.items()},
  "lightning": {
    "state_dict": {f"net.model.{k}": v for k, v in TENSORS.items()},
    "callbacks": {"best": {"score": torch.tensor(0.5)}},
  },
  "beside objects": TENSORS
  | {
    "epoch": 3,
    "args": argparse.Namespace(lr=0.01),
    "paths": {pathlib.Path("a"), (1, 2)},
    "config": types.SimpleNamespace(table={(1, 2): 3}, dtype=torch.float32),
    "of objects": np.array([None, "a"]),
    "counts": collections.Counter("aab"),
    "complex": [torch.zeros(3, dtype=torch.complex64)],
  },
  "beside arrays": {
    "state_dict": TENSORS,
    "mean": np.ones(3),
    "std": TENSORS["head.bias"],
  },
  "arrays": {"state_dict": STATE},
}
MMPRETRAIN = {
  re.sub(r"(backbone\.)head", "head.fc", f"backbone.{name}").replace(
    ".blocks.", ".stages."
  ): value
  for name, value in TENSORS.items()
}


def same(found, wanted=STATE):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert np.array_equal(found[name], value), name
    assert found[name].dtype == value.dtype, name


# --- Files.


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_pytorch_files(way, zipped, tmp_path):
  path = tmp_path / "weights.pth.tar"
  for protocol in (2, 4):
    torch.save(WAYS[way], path, pickle_protocol=protocol,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    same(interop.load(path))


def test_views_and_types(tmp_path):
  whole = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "turned": whole.T,
    "cut": whole[1:3, ::2],
    "shared": whole,
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5),
    "half": whole.half(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "truth": torch.tensor([True, False]),
  }
  for zipped in (True, False):
    torch.save(
      tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    same(interop.load(tmp_path / "a.pth"),
         {name: x.numpy() for name, x in tensors.items()})  # fmt: skip
  torch.save({"brain": whole.bfloat16()}, tmp_path / "b.pth")
  brain = interop.load(tmp_path / "b.pth")["brain"]
  assert brain.dtype == jnp.bfloat16
  assert np.array_equal(brain.astype(np.float32), whole)


@pytest.mark.parametrize(
  ("saved", "says"),
  [
    ({"net": TENSORS, "teacher": {"net": OTHER}}, "several models: net, net;"),
    ({"a": TENSORS, "b": OTHER}, "holds several models: a, b; save one alone"),
    (
      {"model": torch.nn.ReLU(), "epoch": 3},
      r"holds torch\.nn\..*\.ReLU; only",
    ),
  ],
)
def test_which_tensors_are_meant_is_not_guessed(saved, says, tmp_path):
  torch.save(saved, tmp_path / "a.pth")
  with pytest.raises(UserError, match=says):
    interop.load(tmp_path / "a.pth")


def test_safetensors(tmp_path):
  safetensors.numpy.save_file(STATE, tmp_path / "weights.safetensors")
  same(interop.load(tmp_path / "weights.safetensors"))
  # A header of 0x80 bytes: the file starts like a pickle.
  tensors = {"a" * 67: np.zeros(3, np.float32)}
  safetensors.numpy.save_file(tensors, tmp_path / "short")
  assert (tmp_path / "short").read_bytes()[0] == 0x80
  same(interop.load(tmp_path / "short"), tensors)


class Call:
  """Pickles as a call of `function`."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
  ("function", "name"),
  [(eval, "__builtin__.eval"), (torch.load, "torch.serialization.load")],
)
def test_a_hostile_pickle_runs_nothing(function, name, zipped, tmp_path):
  mark = tmp_path / "mark"
  call = Call(function, f"open({str(mark)!r}, 'w')")
  state = TENSORS | {"stem.0.weight": call}
  path = tmp_path / "weights.pth"
  torch.save(state, path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match=f"{path}: holds {name}"):
    interop.load(path)
  assert not mark.exists()


def test_a_bare_hostile_pickle_runs_nothing(tmp_path):
  mark = tmp_path / "mark"
  path = tmp_path / "weights.pth"
  path.write_bytes(pickle.dumps(Call(os.mkdir, str(mark))))
  with pytest.raises(UserError, match=r"holds posix\.mkdir"):
    interop.load(path)
  path.write_bytes(pickle.dumps([1, 2]))
  with pytest.raises(UserError, match=r"a pickle, but not a PyTorch"):
    interop.load(path)
  assert not mark.exists()


def test_tensors_lie_inside_their_data():
  data = np.arange(6.0)
  rebuild = torch_pickle._rebuild_tensor
  assert rebuild(data, 1, (2, 2), (2, 1)).tolist() == [[1, 2], [3, 4]]
  for offset, shape, strides in [
    (1, (6,), (1,)),
    (0, (2, 2), (5, 1)),
    (-1, (2,), (1,)),
    (0, (2,), (-1,)),
    (0, (-2,), (1,)),
    (0, (2, 2), (1,)),
  ]:
    with pytest.raises(ValueError, match="tensor"):
      rebuild(data, offset, shape, strides)


def test_what_is_no_checkpoint_is_refused(tmp_path):
  path = tmp_path / "file"
  with pytest.raises(UserError, match="No such file"):
    interop.load(path)
  path.write_text("just a text file\n")
  with pytest.raises(UserError, match="neither a PyTorch checkpoint nor"):
    interop.load(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", "x")
  with pytest.raises(UserError, match="damaged or cut short"):
    interop.load(path)
  torch.save([1, 2], path)
  with pytest.raises(UserError, match="holds a list, not tensors"):
    interop.load(path)
  torch.save({"state_dict": {"a": 3}}, path)
  with pytest.raises(UserError, match="holds a dict, not tensors"):
    interop.load(path)


# --- Names.


def test_the_papers_sequential(tmp_path):
  """The nn.Sequential of the paper's appendix, in PyTorch, gives our logits."""
  nn = torch.nn
  dim, depth, kernel, patch, classes = 12, 3, 5, 4, 7

  class Residual(nn.Module):
    def __init__(self, fn):
      super().__init__()
      self.fn = fn

    def forward(self, x):
      return self.fn(x) + x

  norm = lambda: [nn.GELU(), nn.BatchNorm2d(dim)]
  depthwise = lambda: nn.Conv2d(dim, dim, kernel, groups=dim, padding="same")
  torch.manual_seed(0)
  theirs = nn.Sequential(
    nn.Conv2d(3, dim, patch, stride=patch),
    *norm(),
    *[
      nn.Sequential(
        Residual(nn.Sequential(depthwise(), *norm())),
        nn.Conv2d(dim, dim, 1),
        *norm(),
      )
      for _ in range(depth)
    ],
    nn.AdaptiveAvgPool2d((1, 1)),
    nn.Flatten(),
    nn.Linear(dim, classes),
  )
  images = torch.randn(4, 3, 16, 16)
  theirs(images)  # Moves the running statistics.
  torch.save(theirs.state_dict(), tmp_path / "model.pth")
  path = str(tmp_path / "model.pth")
  _, found = weights.architecture(weights.load(path), path)
  assert sorted(found.values()) == sorted((dim, depth, kernel, patch, classes))
  model, variables, _ = weights.load_model(path)
  with torch.no_grad():
    expected = theirs.eval()(images).numpy()
  ours = model.apply(variables, common.nhwc(images.numpy()), train=False)
  common.assert_close(ours, expected, 2e-5)


def test_other_names_and_types_give_the_same_variables():
  wanted = interop.from_torch(STATE)
  half = jax.tree.map(lambda x: x.astype(np.float16), wanted)
  averaged = interop.from_torch(PREFIXED | {"n_averaged": np.array(3)})
  found = [weights.match(half, wanted, "run"), averaged] + [
    interop.from_torch({k: x.to(dtype) for k, x in MMPRETRAIN.items()})
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
  ]
  for tree in found:
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
    assert common.tree_error(tree, wanted) < 4e-3


def test_what_does_not_fit_is_named(tmp_path):
  variables = interop.from_torch(STATE)
  model = common.tiny_model(dim=16)
  shapes = models.variable_shapes(model)
  name = "weights.pth"
  with pytest.raises(
    UserError,
    match=r"^weights.pth: .* is \(.*model's is .*dim is \d+ there and 16 here",
  ):
    weights.match(variables, shapes, name)
  own = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
  other = models.variable_shapes(model.clone(num_classes=3))
  with pytest.raises(UserError, match="have 10 classes, the data 3: ev"):
    weights.match(own, other, name)
  assert weights.match(own, shapes, name).keys() == own.keys()
  missing = {**own, "params": {**own["params"]}}
  del missing["params"]["block_1"]
  with pytest.raises(UserError, match=r"has no params/block_1/.*; the model's"):
    weights.match(missing, shapes, name)
  extra = {**own, "params": {**own["params"], "neck": {"bias": np.ones(3)}}}
  with pytest.raises(UserError, match=r"params/neck/bias \(3,\) is not in the"):
    weights.match(extra, shapes, name)
  with pytest.raises(UserError, match="not the weights of a ConvMixer"):
    weights.architecture({"params": {"conv1": {}}}, name)
  path = tmp_path / "vgg.pth"
  torch.save({"features.0.weight": torch.ones(3)}, path)
  with pytest.raises(UserError, match=r"vgg.pth: features.0.weight: not a te"):
    weights.load(path)


def test_a_missing_head_starts_anew(capsys):
  wanted = jax.tree.map(
    lambda x: np.ones(x.shape), models.variable_shapes(common.tiny_model())
  )
  headless = jax.tree.map(np.zeros_like, wanted)
  del headless["params"]["head"]
  fitted = weights.match(headless, wanted, "file", new_head=True)
  assert np.all(fitted["params"]["head"]["kernel"] == 1)
  assert np.all(fitted["params"]["stem"]["kernel"] == 0)
  line = "init_from: the weights have no classes, the data 10: the head starts"
  assert capsys.readouterr().out == f"{line} anew\n"
  assert weights.architecture(headless, "file")[1]["num_classes"] is None
  with pytest.raises(UserError, match="has no params/head/bias"):
    weights.match(headless, wanted, "file")


def test_the_wrong_activation_is_a_warning(tmp_path, capsys):
  def load(name, **overrides):
    model = models.create_model(name, dim=8, depth=1, **overrides)
    shapes = models.variable_shapes(model)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    path = tmp_path / f"{name}.safetensors"
    safetensors.numpy.save_file(interop.to_torch(variables), path)
    weights.load_init_from(str(path), model, shapes)
    return capsys.readouterr().err

  small = {k: v | {"dim": 8, "depth": 1} for k, v in VARIANTS.items()}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(models.convmixer, "VARIANTS", small)
    assert "convmixer_768_32, which was trained with activation=relu" in load(
      "convmixer_768_32", activation="gelu"
    )
    assert not load("convmixer_768_32")
    assert not load("convmixer_1536_20")


# --- What is made of them.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run on the digits, and its weights as a PyTorch file."""
  workdir = tmp_path_factory.mktemp("run")
  config = common.digits_config(**{"data.train_split": "train[:320]"})
  with ops.portable():
    state = train.train_and_evaluate(config, workdir)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  tensors = interop.to_torch(jax.device_get(variables))
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
  path = workdir / "weights.pth"
  torch.save(tensors, path)
  return workdir, path, config


def test_init_from_and_eval_of_a_file(run, tmp_path, portable):
  workdir, path, config = run
  by_workdir = evaluate.evaluate_checkpoint(config, workdir)
  config = common.digits_config(init_from=str(path))
  by_file = evaluate.evaluate_checkpoint(config, tmp_path / "none")
  assert np.array_equal(by_file.pop("confusion"), by_workdir.pop("confusion"))
  assert by_file == by_workdir | {"step": None}
  assert not (tmp_path / "none").exists()
  # Fine-tuned at another resolution, from weights of half precision.
  half = tmp_path / "half.safetensors"
  types = {"running_mean": np.float32, "running_var": np.float32}
  safetensors.numpy.save_file(
    {
      name: x.astype(types.get(name.rpartition(".")[2], np.float16))
      for name, x in interop.load(path).items()
    },
    half,
  )
  tuned = {
    "init_from": str(half),
    "data.image_size": 12,
    "data.train_split": "train[:64]",
    "optim.learning_rate": 0.0,
  }
  config = common.digits_config(**tuned)
  state = train.train_and_evaluate(config, tmp_path / "tuned")
  loaded = interop.from_torch(interop.load(half))["params"]["stem"]
  common.assert_close(state.params["stem"]["kernel"], loaded["kernel"], 0.0)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("f4")}
  config = common.digits_config(init_from=str(tmp_path / "none.pth"))
  with pytest.raises(UserError, match=r"config.init_from=.*No such file"):
    evaluate.evaluate_checkpoint(config, tmp_path / "none")


def test_weights_of_a_file_in_a_scanned_model(tmp_path):
  """And back; the messages name the file's own blocks."""
  torch.save(TENSORS, tmp_path / "weights.pth")
  path = str(tmp_path / "weights.pth")
  plain, loaded, _ = weights.load_model(path)
  scanned = plain.clone(scan=True)
  variables = weights.match(
    weights.load(path), models.variable_shapes(scanned), path
  )
  images = common.nhwc(GOLDEN["input_nchw"])
  logits = scanned.apply(variables, images, train=False)
  common.assert_close(logits, GOLDEN["eval_logits"], 2e-5)
  same(interop.to_torch(variables), interop.to_torch(loaded))
  shapes = models.variable_shapes(scanned.clone(depth=plain.depth + 1))
  with pytest.raises(UserError, match=rf"has no \w+/block_{plain.depth}/"):
    weights.match(weights.load(path), shapes, path)


predict = functools.partial(common.call, "convmixer_jax.predict")


def test_predict(run, tmp_path):
  """A table, JSON, a folder, a list; a workdir and its file agree."""
  workdir, *_ = run
  folder = tmp_path / "photos"
  (folder / "deeper").mkdir(parents=True)
  for i, kind in enumerate(("JPEG", "PNG", "WEBP")):
    place = folder / "deeper" if i == 2 else folder
    data = test_data.encoded(test_data.photo(i, 40, 30), format=kind)
    (place / f"{i}.{kind.lower()}").write_bytes(data)
  (folder / "notes.txt").write_text("nothing")
  code, out, err = predict(f"--weights={workdir}", "--json", folder)
  assert code == 0, err
  rows = [json.loads(line) for line in out.splitlines()]
  names = [os.path.basename(row["image"]) for row in rows]
  assert names == ["0.jpeg", "1.png", "2.webp"]
  # As the model itself says of the first.
  model, variables, data = weights.load_model(str(workdir))
  image = decode.eval_image((folder / "0.jpeg").read_bytes(), 8, 1.0)
  images = augment.make_normalize(data["mean"], data["std"])(image[None])
  logits = model.apply(variables, images, train=False)
  expected = np.asarray(jax.nn.softmax(logits))[0]
  best = rows[0]["predictions"]
  assert len(best) == 5
  assert best[0]["class"] == int(expected.argmax())
  assert best[0]["name"] == str(expected.argmax())
  assert best[0]["probability"] == pytest.approx(expected.max(), rel=1e-4)

  (folder / "bad.jpg").write_text("no image")
  names = ("0.jpeg", "bad.jpg", "none.png")
  listing = "".join(f"{folder / name}\n" for name in names)
  code, out, err = predict(
    f"--weights={workdir}", "--top=2", "--batch_size=2", "-", stdin=listing
  )
  assert code == 2
  assert out.splitlines()[0] == str(folder / "0.jpeg")
  assert len(out.splitlines()) == 3
  assert out.splitlines()[1].endswith(f"%  {expected.argmax()}")
  first, second = err.splitlines()
  assert first.startswith(f"error: {folder / 'bad.jpg'}: cannot be decoded")
  assert second.endswith(
    "none.png: cannot be decoded: No such file or directory"
  )


def test_the_hubs_cache_is_read(run, tmp_path, monkeypatch):
  """hf-hub:OWNER/NAME, without a network, of a model fetched before."""
  _, path, _ = run
  model = tmp_path / "models--timm--convmixer_digits"
  (model / "refs").mkdir(parents=True)
  (model / "refs" / "main").write_text("0" * 40)
  snapshot = model / "snapshots" / ("0" * 40)
  snapshot.mkdir(parents=True)
  safetensors.numpy.save_file(
    interop.load(path), snapshot / "model.safetensors"
  )
  photo = tmp_path / "photo.png"
  photo.write_bytes(test_data.encoded(test_data.photo(0, 40, 30), format="PNG"))
  # It reads its environment once, when it is imported.
  monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
  code, out, err = predict("--weights=hf-hub:timm/convmixer_digits", photo)
  assert code == 0, err
  assert out.splitlines()[0] == str(photo)
  asked = []

  def no_network(*args, **kwargs):
    asked.append(args)
    raise socket.gaierror(-3, "Temporary failure in name resolution")

  monkeypatch.setattr(socket, "getaddrinfo", no_network)
  for offline, calls in ((True, 0), (False, 1)):  # It is not asked again.
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    code, _, err = predict("--weights=hf-hub:timm/another", photo)
    assert code == 2
    assert err.startswith("error: hf-hub:timm/another: cannot be downloaded: ")
    assert len(err.splitlines()) == 1
    assert len(asked) == calls


def test_torch_is_not_needed():
  code = "import sys, convmixer_jax.predict; print('torch' in sys.modules)"
  assert common.run_python(code).stdout.strip() == "False"


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["a.jpg"], "--weights: is required"),
    (["--weights=none.pth", "a.jpg"], "none.pth: No such file"),
    (["--weights=hf_hub:timm/x", "a.jpg"], "file or directory; a model of the"),
    (["--weights=tests", "a.jpg"], "tests: holds no checkpoints"),
    (["--weights=README.md"], "no images"),
    (["--weights=README.md", "--tpo=3", "a.jpg"], "tpo"),
  ],
)
def test_predicts_mistakes(args, says):
  code, out, err = predict(*args)
  assert code == 2
  assert not out
  assert err.startswith("error: ")
  assert says in err
  assert len(err.splitlines()) == 1


def test_imagenets_names_are_built_in(tmp_path):
  variables = interop.from_torch(STATE)
  head = variables["params"]["head"]
  dim = head["kernel"].shape[0]
  variables["params"]["head"] = {
    "kernel": np.zeros((dim, 1000), np.float32),
    "bias": np.eye(1000, dtype=np.float32)[281],
  }
  path = tmp_path / "a.safetensors"
  tensors = interop.to_torch(variables)
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path
  )
  *_, data = weights.load_model(str(path))
  assert data["class_names"][281] == "tabby"
  assert len(set(data["class_names"])) == 1000
  assert (data["image_size"], data["crop_pct"]) == (224, 0.96)


# --- Export.


@pytest.mark.parametrize(
  "options",
  [
    {"pointwise_residual": True, "depthwise_residual": False, "scan": True},
    {"norm": "layer", "activation": "relu"},
  ],
)
def test_what_is_exported_is_the_model(options, tmp_path):
  """Of any batch, with random statistics, from uint8 to logits."""
  model = common.tiny_model(**options)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) / 8,
    {"batch_stats": {}} | models.variable_shapes(model),
  )
  stats = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
  function = export.inference_function(model, variables, **stats)
  path = export.write_stablehlo(function, 8, tmp_path)
  exported = jax.export.deserialize(bytearray(path.read_bytes()))
  assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
  images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
  ours = model.apply(
    variables, augment.make_normalize(**stats)(images), train=False
  )
  for batch in (1, 5):
    common.assert_close(exported.call(images[:batch]), ours[:batch], 1e-5)


def test_the_export_command(run, tmp_path):
  _, path, _ = run
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["data"] |= {"crop_pct": 0.8, "mean": (0.1, 0.2, 0.3)}
  (workdir / "config.json").write_text(json.dumps(config))
  out = tmp_path / "exported"
  export = functools.partial(common.call, "convmixer_jax.export")
  code, text, err = export(f"--weights={workdir}", f"--out={out}")
  assert code == 0, err
  assert "read back, it differs" in text
  about = json.loads((out / "model.json").read_text())
  assert about["class_names"] == [str(i) for i in range(10)]
  # With Pillow, the two files alone give what predict computes.
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (30, 50, 3), np.uint8)
  file = tmp_path / "photo.png"
  Image.fromarray(pixels).save(file)
  how, given = about["preprocessing"], about["input"]
  image = Image.open(file).convert(how["color"])
  short, size = how["resize_short_side"], how["image_size"]
  assert how["antialias"]  # Pillow's resize has no other way.
  filters = {"bicubic": Image.Resampling.BICUBIC}
  image = image.resize((short * 50 // 30, short), filters[how["interpolation"]])
  left, top = (round((side - size) / 2) for side in image.size)
  image = image.crop((left, top, left + size, top + size))
  assert (given["layout"], given["range"]) == ("NHWC", [0, 255])
  batch = np.asarray(image, given["dtype"])[None]
  assert ["batch", *batch.shape[1:]] == given["shape"]
  program = (out / "model.stablehlo").read_bytes()
  logits = jax.export.deserialize(bytearray(program)).call(batch)
  assert ["batch", *logits.shape[1:]] == about["output"]["shape"]
  code, text, err = predict("--json", f"--weights={workdir}", file)
  top = json.loads(text)["predictions"][0]
  assert top["class"] == int(logits.argmax())
  assert top["probability"] == pytest.approx(
    float(jax.nn.softmax(logits).max()), rel=1e-4
  )
  code, _, err = export(f"--weights={path}", f"--out={path}")
  assert code == 2
  assert err.startswith(f"error: --out={path}: File exists")


@pytest.mark.parametrize("kind", ["stablehlo", "timm"])
def test_an_export_that_cannot_be_written(kind, run, tmp_path):
  suffix = {"timm": "safetensors"}.get(kind, kind)
  (tmp_path / f"model.{suffix}").mkdir()
  code, _, err = common.call(
    "convmixer_jax.export", f"--weights={run[0]}", f"--out={tmp_path}",
    f"--format={kind}",
  )  # fmt: skip
  assert code == 2
  assert err == f"error: {tmp_path}/model.{suffix}: Is a directory\n"


def test_timms_weights_of_a_run(run, tmp_path):
  """The file tells as much as the run."""
  workdir = run[0]
  process = common.call(
    "convmixer_jax.export", f"--weights={workdir}", f"--out={tmp_path}",
    "--format=timm",
  )  # fmt: skip
  assert process[0] == 0, process[2]
  path = tmp_path / "model.safetensors"
  model, variables, data = weights.load_model(workdir)
  again, loaded, told = weights.load_model(path)
  assert again == model.clone(dtype=jnp.float32, bn_group_size=0)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  assert told == data
  # By the names that the tests above load into timm's model.
  tensors = safetensors.numpy.load_file(path)
  wanted = interop.to_torch(variables)
  assert tensors.keys() == wanted.keys()
  for name, value in tensors.items():
    assert np.array_equal(value, wanted[name]), name


@pytest.mark.parametrize(
  ("header", "error"),
  [
    ("{", "header convmixer_jax: "),
    ("[1]", "header convmixer_jax: is no JSON object"),
    ('{"model.name": "resnet9"}', "data.image_size=None: must be"),
    (
      '{"model.dim": 1.5, "data.image_size": 32, "data.crop_pct": 1,'
      ' "data.mean": [0, 0, 0], "data.std": [1, 1, 1]}',
      "model.name=None: must be",
    ),
  ],
)
def test_headers_that_tell_nonsense(header, error, tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file(STATE, path, metadata={"convmixer_jax": header})
  with pytest.raises(UserError, match=re.escape(f"{path}: {error}")):
    weights.load_model(path)


@pytest.mark.slow
def test_the_segmentation_example(run, tmp_path):
  """The loss falls; pixels are told apart; there is a picture."""
  out = tmp_path / "overlay.png"
  process = common.run_main(
    f"--weights={run[0]}",
    f"--out={out}",
    "--steps=100",
    module="examples.segmentation",
  )
  text, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", text)]
  assert losses[0] > 1.5
  assert losses[-1] < 1.0  # The classes' shares alone give 1.3.
  assert re.search(r"mean IoU [\d.]+ %", text)
  with Image.open(out) as picture:
    assert picture.width > 1000


# --- Against timm itself, at full size.


def timms(name, folder):
  """The images that timm makes of the photo, and its logits."""
  subprocess.run(
    [sys.executable, common.ROOT / "tests" / "timm_peer.py", name, folder],
    check=True,
  )
  images, logits = (
    np.load(folder / f"{file}.npy") for file in ("input", "logits")
  )
  return common.nhwc(images), logits


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "convmixer_1536_20",
    "convmixer_768_32",
    "convmixer_1024_20_ks9_p14",
    "mixer_b16_224",
    "gmlp_s16_224",
    "resmlp_24_224",
    "deit_small_patch16_224",
    "resnet50",
  ],
)
def test_full_size_models_are_timms(name, tmp_path):
  photo = Image.fromarray(datasets.load_sample_image("china.jpg"))
  data = test_data.encoded(photo, quality=95)
  (tmp_path / "photo.jpg").write_bytes(data)
  wanted, expected = timms(name, tmp_path)
  # Their weights here.
  model, variables, given = weights.load_model(str(tmp_path / "weights.pth"))
  # From file to tensor.
  image = decode.eval_image(data, given["image_size"], given["crop_pct"])
  std = np.array(given["std"])
  images = augment.make_normalize(given["mean"], std)(image[None])
  assert np.all(np.abs(images - wanted) <= 1 / 255 / std)
  ours = model.apply(variables, wanted, train=False)
  common.assert_close(ours, expected, 1e-4, name)
  # Both start alike: constants are equal, and draws have the same moments.
  start = jax.jit(lambda: model.init(jax.random.key(0), wanted[:1], False))()
  theirs = interop.load(tmp_path / "init.pth")
  for key, x in interop.to_torch(start).items():
    y = theirs[key]
    if np.ptp(y) == 0:
      assert np.all(x == y.ravel()[0]), key
    elif y.size > 1000:
      assert abs(x.std() / y.std() - 1) < 0.1, key
      assert abs(x.mean() - y.mean()) < 6 * y.std() / y.size**0.5, key
  # Ours there.
  other = jax.tree.map(lambda x: x * np.float32(0.9), variables)
  tensors = interop.to_torch(other)
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, tmp_path / "ours.safetensors")
  _, expected = timms(name, tmp_path)
  ours = model.apply(other, wanted, train=False)
  common.assert_close(ours, expected, 1e-4, name)
