"""ConvMixer-64/4 on scikit-learn's handwritten digits: the quick start.

  make train, or: python -m convmixer_jax.main --config configs/digits.py

1,437 real 8 x 8 images to train on and 360 held out (every fifth one); nothing
is downloaded. Expected: 99.6 % (three seeds), 12 seconds on two CPU cores. The
values are ours: chosen on the training images (train[:80%], train[80%:]).
"""

from convmixer_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.name = "convmixer_128_4"
  config.model.dim = 64
  config.model.kernel_size = 3

  config.data.name = "digits"
  config.data.image_size = 8
  config.data.mean = (0.305, 0.305, 0.305)
  config.data.std = (0.376, 0.376, 0.376)

  config.augment.flip = False
  config.augment.crop_scale = (0.8, 1.0)
  config.augment.crop_ratio = (0.8, 1.25)
  config.augment.label_smoothing = 0.1

  config.optim.learning_rate = 0.01
  config.optim.weight_decay = 0.005
  config.optim.eps = 1e-3
  config.optim.clip_norm = 1.0

  config.epochs = 20
  config.batch_size = 64
  config.log_every = 10
  config.eval_every = 115  # About five epochs, which take three seconds.
  config.save_every = 115
  return config
