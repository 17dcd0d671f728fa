"""ImageNet's test sets: TFDS's own builders, with photographs of digits."""

import importlib.util
import io
import json
from pathlib import Path
import re
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import weights
from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.data import test_sets
from tests import common

SIZE, CROP, COUNT = 16, 0.9, 21
REAL, V2 = "imagenet2012_real", "imagenet_v2/matched-frequency"
DATA = {"image_size": SIZE, "crop_pct": CROP, "mean": (0.5,) * 3,
        "std": (0.3,) * 3}  # fmt: skip


def photos():
  """Digits of several colours and sizes, as JPEG files."""
  digits = sources.open_source("digits", None, "test", 8).images
  colours = np.random.default_rng(0).uniform(0, 1, (COUNT, 3))
  for i, image in enumerate(
    (digits[:COUNT] * colours[:, None, None]).astype("u1")
  ):
    file = io.BytesIO()
    size = (20 + i, 30 - i // 2)
    Image.fromarray(image).resize(size).save(file, "jpeg")
    yield file.getvalue()


def save_model(path, images, num_classes=1000):
  """Saves random weights, and returns the logits of files, [N, K]."""
  model = common.tiny_model(num_classes=num_classes)
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(0.5, 0.5, x.shape).astype(np.float32) ** 2 + 0.1
  variables = jax.tree.map(draw, models.variable_shapes(model, SIZE))
  head = variables["params"]["head"]
  head["kernel"] = rng.normal(size=head["kernel"].shape).astype(np.float32)
  images = np.stack([decode.eval_image(x, SIZE, CROP) for x in images])
  normalize = augment.make_normalize(DATA["mean"], DATA["std"])
  apply = lambda: np.asarray(
    model.apply(variables, normalize(images), train=False)
  )
  head["bias"] -= apply().mean(0)  # Otherwise one class is the best of all.
  scale = 3 / apply().std()
  head["bias"] *= scale
  head["kernel"] *= scale
  weights.save(path, model, variables, {**DATA, "class_names": None})
  return apply()


def ranked(logits, allowed=slice(None)):
  """Classes from the best to the worst, [N, K], by numpy alone."""
  kept = np.full_like(logits, -np.inf)
  kept[:, allowed] = logits[:, allowed]
  return np.argsort(-kept, axis=1, kind="stable")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder of TFDS, weights, labels by set, logits of all images).

  The labels are such classes that some answers are right, some are among five,
  and some are wrong, by the protocol of the set.
  """
  root = tmp_path_factory.mktemp("sets")
  files = [*photos()]
  logits = save_model(root / "model.safetensors", files)
  names = tfds.builder("imagenet_a").info.features["label"].names
  labels = {}
  for name in ("imagenet_a", "imagenet_r"):
    best = ranked(logits, np.flatnonzero(test_sets.subset(name, names)))
    # Few of the best of all 1000 classes are among the 200.
    assert np.mean(best[:, 0] == ranked(logits)[:, 0]) < 0.6
    labels[name] = [int(best[i, (0, 0, 3, 9)[i % 4]]) for i in range(COUNT)]
  best = ranked(logits)
  labels[V2] = [int(best[i, (0, 4, 5)[i % 3]]) for i in range(COUNT)]
  labels[REAL] = [
    [int(k) for k in best[i, ([], [9, 0], [7, 8, 4], range(20, 29))[i % 4]]]
    for i in range(COUNT)
  ]
  for name, right in labels.items():
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    split = "validation" if name == REAL else "test"

    examples = []
    for i, (file, label) in enumerate(zip(files, right)):
      example = {"image": io.BytesIO(file), "file_name": f"{i}.jpeg"}
      if name == REAL:
        example |= {"original_label": 3, "real_label": label}
      else:
        example["label"] = label
      examples.append((f"{i}", example))

    with mock.patch.object(type(builder), "_split_generators") as generators:
      generators.return_value = {split: examples}
      builder.download_and_prepare()
    # In the order in which TFDS shuffled them.
    order = [
      int(x["file_name"].decode().removesuffix(".jpeg"))
      for x in builder.as_data_source(split)
    ]
    assert sorted(order) == [*range(COUNT)]
  return root, root / "model.safetensors", labels, logits


def expected(name, labels, logits):
  """The protocol with numpy: images, top-1, top-5 and loss."""
  logits = logits.astype(np.float64)
  allowed = np.arange(1000)
  if name in ("imagenet_a", "imagenet_r"):
    names = tfds.builder("imagenet_a").info.features["label"].names
    file = common.ROOT / "convmixer_jax" / "data" / "imagenet_subsets.txt"
    wnids = file.read_text().split(f"\n{name}\n")[1].split("\n\n")[0].split()
    allowed = np.array([names.index(wnid) for wnid in wnids])
    assert len(allowed) == 200
  hits, losses = [], []
  for row, label in zip(logits, labels):
    label = label if isinstance(label, list) else [label]
    if label:
      order = sorted(allowed, key=lambda k: -row[k])
      hits.append([bool({*order[:n]} & {*label}) for n in (1, 5)])
      log = np.log(np.exp(row[label]).sum() / np.exp(row[allowed]).sum())
      losses.append(-log)
  return len(hits), *(100 * np.mean(hits, axis=0)), np.mean(losses)


def evaluate(made, name, *more, split="test"):
  root, file, *_ = made
  fields = (
    "model.name=convmixer_768_32 model.dim=8 model.depth=2 model.patch_size=2"
    " model.kernel_size=3 model.activation=gelu model.dtype=float32"
    f" data.image_size={SIZE} data.crop_pct={CROP} batch_size=8"
    f" data.mean={DATA['mean']} data.std={DATA['std']} data.num_workers=0"
    " model.bn_group_size=8 augment.mix_group_size=8"
  ).replace(", ", ",")
  flags = common.flags("configs/imagenet.py:768_32", fields)
  code, out, err = common.call(
    "convmixer_jax.main", *flags, f"--config.data.name={name}",
    f"--config.data.dir={root}", f"--config.data.eval_split={split}",
    f"--config.init_from={file}", f"--workdir={root / 'none'}", *more,
  )  # fmt: skip
  assert not (root / "none").exists()
  return code, out, err


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", V2, REAL])
def test_protocol(made, name):
  """A last batch with padding, eight devices, numpy's numbers."""
  split = "validation" if name == REAL else "test"
  code, out, err = evaluate(made, name, "--mode=eval", split=split)
  assert code == 0, err
  found = json.loads(out.splitlines()[-1])
  count, top1, top5, loss = expected(name, made[2][name], made[3])
  assert 0 < top1 < top5 < 100
  assert found["count"] == count == (15 if name == REAL else COUNT)
  assert found["top1"] == pytest.approx(top1)
  assert found["top5"] == pytest.approx(top5)
  assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_slice_is_scored_among_the_same_classes(made):
  """Its own labels are fewer; the answers are of all 200 classes."""
  _, out, _ = evaluate(made, "imagenet_a", "--mode=eval", split="test[:4]")
  found = json.loads(out.splitlines()[-1])
  source = sources.open_source("imagenet_a", str(made[0]), "test[:4]", SIZE)
  labels = [int(source.read(i)[1]) for i in range(4)]
  order = [made[2]["imagenet_a"].index(label) for label in labels]
  _, top1, top5, _ = expected("imagenet_a", labels, made[3][order])
  assert (found["top1"], found["top5"]) == pytest.approx((top1, top5))


def test_classes_of_the_subsets_are_timms():
  names = tfds.builder("imagenet_a").info.features["label"].names
  # Without importing it, which takes seconds.
  (timm,) = importlib.util.find_spec("timm").submodule_search_locations
  info = Path(timm) / "data" / "_info"
  assert names == (info / "imagenet_synsets.txt").read_text().split()
  for name in ("imagenet_a", "imagenet_r"):
    subset = test_sets.subset(name, names)
    wanted = (info / f"{name}_indices.txt").read_text().split()
    assert np.flatnonzero(subset).tolist() == sorted(map(int, wanted))
  assert test_sets.subset("imagenet_v2", names) is None
  real = json.loads((info / "imagenet_real_labels.json").read_text())
  (most,) = test_sets.TEST_SETS[REAL].label_shape
  assert max(map(len, real)) == most


def test_several_labels_are_for_evaluation_only(made):
  code, _, err = evaluate(
    made, REAL, "--config.data.train_split=validation", split="validation"
  )
  assert code == 2
  assert err.endswith("has several labels an image: for --mode eval only\n")
  assert len(err.splitlines()) == 1


def test_more_labels_than_known_are_an_error(made):
  source = sources.open_source(REAL, str(made[0]), "validation", SIZE)
  read = source.read
  object.__setattr__(read, "label_shape", (2,))
  with pytest.raises(IndexError):
    [read(i) for i in range(COUNT)]


def test_the_table(made, tmp_path):
  root, file, labels, logits = made
  run = lambda *flags: common.call(
    "experiments.test_sets", f"--data_dir={root}", "--batch_size=5", *flags
  )
  chosen = "--sets=imagenet2012,imagenet_a,imagenet_sketch," + REAL
  code, out, err = run(f"--weights={file}", chosen)
  assert code == 0, err
  head, rule, *rows = out.splitlines()
  assert head == "| set | images | top-1 | top-5 | published top-1 |"
  assert rule.count("|") == 6
  cells = [row.strip("| ").split(" | ") for row in rows]
  for name, count, *accuracies in cells:
    wanted = expected(name, labels[name], logits)
    assert int(count) == wanted[0]
    assert accuracies[:2] == [f"{x:.2f}" for x in wanted[1:3]]
  assert [name for name, *_ in cells] == ["imagenet_a", REAL]
  absent = [line.split(": ")[1] for line in err.splitlines()]
  assert absent == ["imagenet2012", "imagenet_sketch"]
  # What is not scored.
  code, out, err = run(f"--weights={file}", "--sets=imagenet2012")
  assert (code, out) == (2, "")
  assert "error: --data_dir: none of the sets is prepared in " in err
  code, _, err = run(f"--weights={file}", "--sets=imagenet_b")
  assert code == 2
  assert "--sets=imagenet_b: unknown" in err
  few = tmp_path / "few.safetensors"
  save_model(few, photos(), 10)
  code, _, err = run(f"--weights={few}")
  assert code == 2
  assert f"--weights={few}: has 10 classes" in err
  code, _, err = evaluate((root, few), V2, "--mode=eval")
  assert code == 2
  assert "the weights have 10 classes, the data 1000 (n01440764, " in err
  model, variables, data = weights.load_model(file)
  names = tfds.builder("imagenet_resized/64x64").info.features["label"].names
  weights.save(few, model, variables, {**data, "class_names": names})
  code, _, err = run(f"--weights={few}", f"--sets={V2}")
  assert code == 2
  assert "They must have the order of the weights" in err


def test_published_values_are_the_models():
  from experiments import test_sets as table

  for name, sizes, value in (
    ("imagenet_a", dict(name="convmixer_1536_20"), "20.97"),
    (REAL, dict(name="convmixer_768_32", num_classes=1000), "86.22"),
    (V2, dict(name="convmixer_1024_20_ks9_p14"), "65.44"),
    (V2, dict(name="convmixer_1024_20_ks9_p14", depth=3), ""),
    (V2, dict(name="resnet50"), ""),
  ):
    assert table._published(name, models.create_model(**sizes)) == value
  page = (common.ROOT / "docs" / "experiments.md").read_text()
  for row in table._PUBLISHED:
    (line,) = re.findall(rf"^\| `{row['tfds_name']}` \|.*", page, re.M)
    assert f" {float(row['value']):.2f} |" in line
