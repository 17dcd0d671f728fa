import jax
import numpy as np
import optax
from PIL import Image
import pytest

from convmixer_jax import augment
from convmixer_jax import preview
from convmixer_jax import sheet
from convmixer_jax import step as step_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from tests import common


def test_the_sheet_shows_what_the_step_trains_on(tmp_path):
  """The very images and targets that the train step's loss sees."""
  config = common.digits_config(
    **{
      "augment.mixup_alpha": 0.5,
      "augment.erase_prob": 0.5,
      "augment.color_jitter": 0.4,
    }
  )
  draw, names = preview.open_run(config)
  images, targets = draw(3)
  again, _ = preview.open_run(config)[0](3)
  other, _ = draw(4)
  assert np.array_equal(images, again)
  assert not np.array_equal(images, other)

  seen = []

  class Spy:
    num_classes = 10

    def apply(self, variables, images, **_):
      jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
      return np.zeros((len(images), 10)) + variables["params"], {}

  source = sources.open_source("digits", None, config.data.train_split, 8)
  (batch,) = stream.train_batches(
    source, seed=config.seed, batch_size=32, rows=np.arange(32), start=3,
    stop=4, image_size=8,
  )  # fmt: skip
  tx = optax.sgd(0.1)
  augment_fn = augment.make_augment(
    config.augment, mean=config.data.mean, std=config.data.std
  )
  step = step_lib.make_train_step(Spy(), tx, augment_fn, seed=config.seed)
  params = np.float32(0.0)
  state = step_lib.TrainState(np.int32(3), params, {}, tx.init(params))
  jax.block_until_ready(jax.jit(step)(state, batch))
  jax.effects_barrier()
  shown = (images / 255 - config.data.mean) / config.data.std
  assert np.abs(shown - seen[0]).max() < 1e-4
  assert targets.sum(1) == pytest.approx(np.ones(32))

  picture = sheet.draw(images, targets, names, "step 3")
  picture.save(tmp_path / "sheet.png")
  pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
  first = np.clip(np.round(images[0]), 0, 255)
  assert np.array_equal(
    pixels[16:144, 4:132], np.kron(first, np.ones((16, 16, 1)))
  )
  assert (pixels[144:172, 4:132] < 128).any()  # Its labels.
  assert (pixels[:14, :60] < 128).any()  # The title.


def test_the_command_draws_and_refuses(tmp_path):
  command = ("convmixer_jax.preview", "--config=configs/digits.py", "--num=5")
  code, out, err = common.call(*command, f"--out={tmp_path / 'a.png'}")
  assert code == 0, err
  assert out.strip() == f"{tmp_path / 'a.png'}: 5 images of step 0"
  with Image.open(tmp_path / "a.png") as file:
    assert file.width > 300
  code, _, err = common.call(*command, f"--out={tmp_path / 'a.what'}")
  assert code == 2
  assert err.startswith("error: --out=")
  assert len(err.splitlines()) == 1
  config = common.digits_config()
  config.model.kernel_size = 0
  with pytest.raises(UserError, match="kernel_size"):
    preview.open_run(config)


def test_the_default_step_mixes_visibly(tmp_path):
  """Not step 0 where its weight leaves the images as they are."""
  config = common.digits_config(
    **{"augment.mixup_alpha": 0.2, "augment.label_smoothing": 0.1}
  )
  draw, _ = preview.open_run(config)
  shares = [np.sort(draw(step)[1], axis=1)[:, -2] for step in range(8)]
  visible = [(share >= 0.2).mean() >= 0.25 for share in shares]
  command = [
    "convmixer_jax.preview", "--config=configs/digits.py",
    "--config.augment.mixup_alpha=0.2", "--config.batch_size=32",
    "--config.augment.label_smoothing=0.1", f"--out={tmp_path / 'a.png'}",
  ]  # fmt: skip
  code, out, err = common.call(*command)
  assert code == 0, err
  assert not visible[0]  # The weight is nearly 0 or 1.
  assert out.endswith(f" 32 images of step {visible.index(True)}\n")
  assert common.call(*command, "--step=0")[1].endswith("of step 0\n")


def test_one_class_mixes_invisibly(tmp_path):
  folder = tmp_path / "train" / "only"
  folder.mkdir(parents=True)
  for i in range(2):
    Image.new("RGB", (8, 8), (i, 9, 99)).save(folder / f"{i}.png")
  code, out, err = common.call(
    "convmixer_jax.preview", "--config=configs/digits.py",
    "--config.augment.mixup_alpha=0.2", "--config.batch_size=2",
    "--config.data.name=folder", f"--config.data.dir={tmp_path}",
    f"--out={tmp_path / 'a.png'}",
  )  # fmt: skip
  assert code == 0, err
  assert out.endswith(" 2 images of step 0\n")
