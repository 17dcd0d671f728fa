"""A family from outside the package: it needs only what models/ lists."""

import json
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from convmixer_jax import augment
from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import evaluate
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import plan
from convmixer_jax import predict
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.models import layers
from convmixer_jax.plan import report
from tests import common


class Linear(nn.Module):
  """Patches to a vector, and a linear head."""

  dim: int
  patch_size: int
  num_classes: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, train):
    p = self.patch_size
    stem = layers.Conv(
      self.dim, (p, p), p, "VALID", dtype=self.dtype, name="patches"
    )
    x = nn.gelu(stem(images)).mean((1, 2)).astype(jnp.float32)
    return layers.dense(self.num_classes, self.dim, name="head")(x)

  def check(self, image_size):
    if image_size % self.patch_size:
      raise UserError(f"model.patch_size={self.patch_size}: not a divisor")


def infer(params):
  if "patches" not in params:
    return None
  patch, _, _, dim = params["patches"]["kernel"].shape
  classes = params["head"]["kernel"].shape[-1]
  return {"dim": dim, "patch_size": patch, "num_classes": classes}


@pytest.fixture
def family(monkeypatch):
  family = types.ModuleType("linear")
  family.MODEL = Linear
  family.VARIANTS = {"linear_16": {"dim": 16, "patch_size": 4}}
  family.preprocessing = lambda name: layers.IMAGENET
  family.TORCH_NAMES = (
    ("patch_embed", "patches", "conv"),
    ("fc", "head", "linear"),
  )
  family.timm_module = str
  family.num_patches = layers.any_number
  family.at_resolution = layers.any_resolution
  family.infer = infer
  family.flops = lambda model, image_size: 2 * image_size**2 * 3 * model.dim
  family.describe = lambda model: f"Linear-{model.dim}"
  monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, family))
  return family


def test_a_family_of_ones_own(family, tmp_path):
  config = common.load_config("configs/digits.py")
  config.model.name, config.epochs = "linear_16", 3
  config.model.dim = config.model.kernel_size = None
  config.eval_every = config.save_every = None
  config.augment.crop_scale = config.augment.crop_ratio = (1.0, 1.0)
  # Trains, once an epoch evaluates and saves, and resumes.
  state = train.train_and_evaluate(config, tmp_path / "run")
  assert state.batch_stats == {}
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  records = map(json.loads, lines)
  steps = [record["step"] for record in records if record["kind"] == "eval"]
  assert steps == [23, 45, 68]  # 1,437 images in batches of 64.
  assert checkpoint.latest_step(tmp_path / "run") == 68
  metrics = evaluate.evaluate_checkpoint(config, tmp_path / "run")
  assert metrics["count"] == 360
  # Plans.
  data = sources.describe("digits", None, "train", 8)
  result = plan.plan(config, jax.devices(), data)
  assert result["fits"]
  assert "Linear-16" in report.report(result)
  # Its weights load from the workdir and from timm's names.
  model, variables, _ = weights.load_model(str(tmp_path / "run"))
  tensors = interop.to_torch(variables)
  assert tensors["fc.weight"].shape == (10, 16)
  assert tensors["patch_embed.weight"].shape == (16, 3, 4, 4)
  path = str(tmp_path / "linear.safetensors")
  safetensors.numpy.save_file(tensors, path)
  loaded, again, data = weights.load_model(path)
  assert (loaded, data["crop_pct"]) == (model, 0.875)
  assert common.tree_error(again, variables) == 0
  # A field that it lacks, a size that it cannot have, and another's weights.
  config.model.kernel_size = 3
  with pytest.raises(UserError, match=r"linear_16: no such field: kernel_size"):
    config_lib.check(config, 1)
  config.model.kernel_size, config.model.patch_size = None, 3
  with pytest.raises(UserError, match="not a divisor"):
    config_lib.check(config, 1)
  with pytest.raises(UserError, match=r"of a Linear; the model is a ConvMixer"):
    weights.load_model(path, "convmixer_128_4")


def test_a_family_of_ones_own_predicts(family, tmp_path, capsys):
  model = models.create_model("linear_16", num_classes=1000)
  shapes = models.variable_shapes(model)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  path = tmp_path / "linear.safetensors"
  safetensors.numpy.save_file(interop.to_torch(variables), path)
  pixels = rng.integers(0, 256, (224, 256, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  predict._FLAGS(["predict", f"--weights={path}", "--json"])
  predict.main(str(tmp_path / "image.png"))
  (line,) = capsys.readouterr().out.splitlines()
  top = json.loads(line)["predictions"][0]
  image = decode.eval_image((tmp_path / "image.png").read_bytes(), 224, 0.875)
  normalize = augment.make_normalize(layers.IMAGENET["mean"],
                                     layers.IMAGENET["std"])  # fmt: skip
  logits = model.apply(variables, normalize(jnp.array(image[None])), False)
  assert top["class"] == int(logits.argmax())
