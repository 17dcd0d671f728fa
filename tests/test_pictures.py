import json

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors import numpy

from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import train
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from experiments import measures
from experiments import pictures
from tests import common


def trained(seed=0, cls=measures.Trained, **overrides):
  """A model with random weights and statistics."""
  model = common.tiny_model(**overrides)
  rng = np.random.default_rng(seed)
  variables = jax.tree.map_with_path(
    lambda path, leaf: rng.uniform(
      0.5 if "batch_stats" in str(path) else -0.5, 1, leaf.shape
    ).astype(np.float32),
    models.variable_shapes(model),
  )
  return cls(model, variables, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# --- CKA.


def u_centred(gram):
  """Székely and Rizzo's centring; its inner products are unbiased HSIC."""
  n = len(gram)
  gram = gram - np.diag(np.diag(gram))
  rows = gram.sum(0) / (n - 2)
  gram = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
  return gram - np.diag(np.diag(gram))


def direct_cka(batches):
  """Of [(x, y), ...], features [n, d] each."""
  sums = np.zeros(3)
  for x, y in batches:
    k, l_ = u_centred(x @ x.T), u_centred(y @ y.T)
    sums += [(k * l_).sum(), (k * k).sum(), (l_ * l_).sum()]
  return sums[0] / np.sqrt(sums[1] * sums[2])


def features(t, images, num_blocks):
  maps = t.features(t.variables, t.normalize(images), num_blocks)
  return np.asarray(maps, np.float64).reshape(len(images), -1)


def test_cka_is_the_direct_formula():
  """Of two models of different shapes, over two batches."""
  a, b = trained(0), trained(1, dim=6, depth=1, patch_size=4)
  batches = noise(2, 7, 8, 8, 3)
  found = measures.cka(a, b, batches)
  assert found.shape == (3, 2)
  # [layer][batch] -> [n, d]
  rows_a, rows_b = (
    [[features(t, images, n) for images in batches] for n in range(layers)]
    for t, layers in ((a, 3), (b, 2))
  )
  for i in range(3):
    for j in range(2):
      pairs = [*zip(rows_a[i], rows_b[j])]
      assert found[i, j] == pytest.approx(direct_cka(pairs), abs=1e-4)


class Rotated(measures.Trained):
  def features(self, variables, x, num_blocks):
    maps = super().features(variables, x, num_blocks)
    random = np.random.default_rng(num_blocks).normal(size=(8, 8))
    orthogonal, _ = np.linalg.qr(random)
    return 3 * maps @ orthogonal.astype(np.float32) + 1


def test_cka_with_itself_is_1_also_rotated_scaled_and_shifted():
  batches = noise(2, 9, 8, 8, 3)
  itself = measures.cka(trained(), trained(), batches)
  assert np.diag(itself) == pytest.approx(np.ones(3), abs=1e-6)
  assert itself == pytest.approx(itself.T, abs=1e-6)
  assert np.abs(itself - np.eye(3)).max() > 0.01
  rotated = measures.cka(trained(), trained(cls=Rotated), batches)
  assert rotated == pytest.approx(itself, abs=1e-4)


# --- Receptive fields.


@pytest.mark.parametrize(("patch", "kernel"), [(2, 3), (3, 4), (1, 5)])
def test_the_field_has_the_support_that_kernel_and_patch_allow(patch, kernel):
  model = trained(depth=1, patch_size=patch, kernel_size=kernel)
  side = 10 * patch
  batches = noise(2, 4, side, side, 3)
  for blocks, before, after in ((0, 0, 0), (1, (kernel - 1) // 2, kernel // 2)):
    field = measures.receptive_field(model, batches, blocks)
    allowed = np.zeros((side, side), bool)
    rows = slice((5 - before) * patch, (5 + after + 1) * patch)
    allowed[rows, rows] = True
    assert np.array_equal(field > 0, allowed)


def test_the_field_is_the_mean_of_absolute_differences():
  """Against finite differences of one image at a time."""
  model = trained(depth=1)
  batches = noise(2, 2, 8, 8, 3)
  field = measures.receptive_field(model, batches, 1)
  middle = jax.jit(
    lambda x: model.features(model.variables, x[None], 1)[0, 2, 2].sum()
  )
  total, step = 0.0, 1e-2
  for image in batches.reshape(4, 8, 8, 3):
    x = np.asarray(model.normalize(image))
    for channel in range(3):
      bump = np.zeros_like(x)
      bump[5, 4, channel] = step
      total += abs(float(middle(x + bump) - middle(x - bump))) / (2 * step)
  assert field[5, 4] == pytest.approx(total / 4, rel=0.01)


def test_the_centre_is_that_of_the_field():
  """Of families whose locations lie elsewhere, or that have no patches."""
  rng = np.random.default_rng(0)
  resnet = dict(depths=(1, 1), widths=(4, 4))
  for name, fields, blocks, center, before in (
    ("resnet50", resnet, 0, 32, 5),  # 7 x 7, then 3 x 3 with stride 2.
    ("resnet50", resnet, 2, 32, 5 + 4 + 4),
    ("resnet50", resnet | {"patch_size": 4}, 1, 33.5, 1.5 + 4),
    ("deit_tiny_patch16_224", dict(dim=8, depth=1, heads=1), 0, 39.5, 7.5),
  ):
    model = models.create_model(name, num_classes=3, **fields)
    shapes = models.variable_shapes(model, 64)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape), shapes)
    t = measures.Trained(model, variables, (0, 0, 0), (1, 1, 1))
    assert t.depth == (2 if name == "resnet50" else 1)
    assert t.center(64, blocks) == center
    field = measures.receptive_field(t, noise(8, 2, 64, 64, 3), blocks)
    for axis in (0, 1):
      (touched,) = np.nonzero(field.sum(axis))
      assert (touched[0], touched[-1]) == (center - before, center + before)


def test_reach():
  field = np.zeros((20, 20))
  field[10:12, 10:12] = 1  # The middle patch of 2 x 2.
  assert measures.reach(field, 10.5, 0.5) == 2
  assert measures.reach(field, 10.5, 1.0) == 2
  field[8:14, 8:14] += 1
  assert measures.reach(field, 10.5, 0.2) == 2
  assert measures.reach(field, 10.5, 0.95) == 6


# --- Scores.


def test_the_confusion_matrix_counts_every_image():
  source = sources.open_source("digits", None, "test", 8)
  model = trained()
  batches = stream.eval_batches(
    source, batch_size=128, rows=np.arange(128), image_size=8, crop_pct=1.0
  )
  logits = np.asarray(model.logits(model.variables, source.images))
  hits = logits.argmax(-1) == source.labels
  assert 0 < hits.sum() < len(source)
  assert not hits[0]  # With which the last batch is padded.
  keep = np.sum(~hits) - 1
  counts, mistakes = measures.score(model, batches, keep)
  assert counts.sum() == len(source) == 360
  assert np.trace(counts) == hits.sum()
  assert counts.sum(1).tolist() == np.bincount(source.labels).tolist()
  answers = np.bincount(logits.argmax(-1), minlength=10)
  assert counts.sum(0).tolist() == answers.tolist()
  probabilities = np.asarray(jax.nn.softmax(logits)).max(-1)
  wrong = np.flatnonzero(~hits)
  wrong = wrong[np.argsort(-probabilities[wrong], kind="stable")][:keep]
  assert [m.probability for m in mistakes] == pytest.approx(
    probabilities[wrong], rel=1e-5
  )
  first = mistakes[0]
  assert np.array_equal(first.image, source.images[wrong[0]])
  assert first.label == source.labels[wrong[0]] != first.predicted


# --- Kernels.


def test_spread():
  delta = np.zeros((4, 4, 2))
  delta[1, 1] = 1  # On the output's location; padding is below and right.
  delta[1, 3, 1] = -1  # Two to the right, as heavy.
  distances, means, rms = measures.spread(delta)
  assert distances.tolist()[:4] == pytest.approx([0, 1, 2**0.5, 2])
  assert means[:4] == pytest.approx([1, 0, 0, 0.5 / 2])
  assert rms == pytest.approx([0, 2**0.5])


def test_filters_side_by_side():
  kernels = np.random.default_rng(0).normal(size=(8, 8, 3, 5))
  images = pictures.scaled(kernels)
  assert images.min() >= 0
  assert images.max() <= 1
  ratio = kernels[..., 3] / (images[3] - 0.5)
  assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0, 0]))
  (axes,) = pictures._tiled(images, "title").axes
  grid = np.asarray(axes.images[0].get_array())
  assert grid.shape == (2 * 8 + 1, 3 * 8 + 2, 3)
  assert np.array_equal(grid[9:, :8], images[3])
  assert (grid[9:, 18:] == 1).all()  # There is no sixth.
  shades = pictures.shades(np.array([1.0, 0.0, -1.0]).reshape(3, 1, 1))
  red, white, blue = shades[0, :, 0]
  assert red[0] > 2 * red[2]
  assert white.min() > 0.95
  assert blue[2] > 2 * blue[0]


# --- The command.


@pytest.mark.slow
def test_every_picture_of_a_run(tmp_path):
  config = common.digits_config(**{"batch_size": 64})
  workdir = tmp_path / "run"
  train.train_and_evaluate(config, workdir)
  process = common.run_main(
    f"--workdir={workdir}", f"--against={workdir}", "--blocks=0",
    "--num_images=100", "--batch_size=40",
    module="experiments.pictures",
  )  # fmt: skip
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  written = dict(line.split(": ", 1) for line in out.splitlines())
  names = ("stem", "block_0", "spread", "receptive_field", "cka", "confusion",
           "mistakes")  # fmt: skip
  assert [*written] == [f"{workdir}/pictures/{name}.png" for name in names]
  for path in written:
    with Image.open(path) as image:
      assert np.asarray(image.convert("L")).std() > 5, path
  record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert written[f"{workdir}/pictures/confusion.png"] == (
    f"360 images, top-1 {record['top1']:.2f} %"
  )
  assert "80 held-out images" in out
  for args, says in (
    ("--blocks=1", "--blocks=1: must be numbers from 0 to 0"),
    ("--against=none.pth", "none.pth: No such file"),
    (f"--out={workdir}/config.json", "config.json: File exists"),
  ):
    code, _, err = common.call(
      "experiments.pictures", f"--workdir={workdir}", args
    )
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
  (workdir / "config.json").write_text('{"model": 3}')
  _, _, err = common.call("experiments.pictures", f"--workdir={workdir}")
  assert err == "error: config.model.name: missing; must be a string\n"


@pytest.mark.slow
def test_a_family_without_depthwise_kernels_beside_another(tmp_path):
  """Also one whose weights fit a single image size."""
  names = {"vit": "deit_tiny_patch16_224", "mixer": "mixer_s16_224"}
  for folder, name in names.items():
    config = common.digits_config(
      **{"model.name": name, "model.kernel_size": None, "model.patch_size": 2}
    )
    config.model.heads = 2 if folder == "vit" else None
    train.train_and_evaluate(config, tmp_path / folder)
  code, out, err = common.call(
    "experiments.pictures",
    f"--workdir={tmp_path / 'vit'}", f"--against={tmp_path / 'mixer'}",
    "--num_images=40", "--batch_size=40",
  )  # fmt: skip
  assert code == 0, err
  written = [line.split(": ")[0].split("/")[-1] for line in out.splitlines()]
  assert written == ["stem.png", "receptive_field.png", "cka.png",
                     "confusion.png", "mistakes.png"]  # fmt: skip
  other = tmp_path / "other.safetensors"
  model = models.create_model("mixer_s16_224", 10, dim=8, depth=1, patch_size=4)
  shapes = models.variable_shapes(model, 32)
  weights = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  numpy.save_file(interop.to_torch(weights), other)
  code, _, err = common.call(
    "experiments.pictures", f"--workdir={tmp_path / 'vit'}",
    f"--against={other}",
  )  # fmt: skip
  assert code == 2
  assert err == (
    f"error: {other}: is for images of 64 patches and cannot take 4: its layers"
    " mix all patches; choose data.image_size and model.patch_size to match\n"
  )


def test_a_class_may_have_any_name(tmp_path):
  names = ["a $\\frac$", "<b>\udce9", "c" * 99]
  mistake = measures.Mistake(noise(8, 8, 3), 0, 2, 0.5)
  for drawn in (
    pictures._draw_confusion(np.eye(3, dtype=int), names, "title"),
    pictures._draw_mistakes([mistake], names),
    pictures._draw_mistakes([], names),
    pictures._draw_cka(np.eye(3), "runs/$\\frac$"),
  ):
    drawn.savefig(tmp_path / "x.png")


def test_a_mistake_gets_one_line():
  code, _, err = common.call("experiments.pictures", "--workdir=no/where")
  assert code == 2
  assert err.startswith("error: no/where/config.json: ")
  assert len(err.splitlines()) == 1
