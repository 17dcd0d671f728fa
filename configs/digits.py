"""ConvMixer-64/4 on scikit-learn's handwritten digits: the quick start.

  make train, or: python -m convmixer_jax.main --config configs/digits.py

1,437 real 8 x 8 images to train on and 360 held out (every fifth one). Nothing
is downloaded. README has the accuracy and the time. The values are ours: found
by trying, on the training images alone (train[:80%] against train[80%:]).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()

  config.model = config_dict.ConfigDict(
    {
      "name": "convmixer_128_4",
      "dim": config_dict.placeholder(int),
      "depth": config_dict.placeholder(int),
      "patch_size": config_dict.placeholder(int),
      "kernel_size": config_dict.placeholder(int),
      "activation": config_dict.placeholder(str),
      "norm": config_dict.placeholder(str),
      "depthwise_residual": config_dict.placeholder(bool),
      "pointwise_residual": config_dict.placeholder(bool),
      "bn_group_size": config_dict.placeholder(int),
      "scan": config_dict.placeholder(bool),
      "remat": config_dict.placeholder(str),
      "dtype": config_dict.placeholder(str),
    }
  )
  config.model.dim = 64
  config.model.kernel_size = 3

  config.data = config_dict.ConfigDict(
    {
      "name": "digits",
      "dir": config_dict.placeholder(str),
      "image_size": 8,
      "train_split": "train",
      "eval_split": "test",
      "mean": (0.305, 0.305, 0.305),
      "std": (0.376, 0.376, 0.376),
      "crop_pct": 1.0,
      "num_workers": 0,
      "max_unreadable": 0,
    }
  )

  config.augment = config_dict.ConfigDict(
    {
      "flip": False,
      "crop_scale": (0.8, 1.0),
      "crop_ratio": (0.8, 1.25),
      "interpolation": "bilinear",
      "randaugment": "",
      "color_jitter": 0.0,
      "mixup_alpha": 0.0,
      "cutmix_alpha": 0.0,
      "cutmix_prob": 0.5,
      "mix_group_size": 0,
      "erase_prob": 0.0,
      "erase_mode": "pixel",
      "erase_area": (0.02, 1 / 3),
      "erase_aspect": (0.3, 1 / 0.3),
      "label_smoothing": 0.1,
    }
  )

  config.optim = config_dict.ConfigDict(
    {
      "learning_rate": 0.01,
      "schedule": "onecycle",
      "warmup_epochs": 0.0,
      "weight_decay": 0.005,
      "decay_all": False,
      "eps": 1e-3,
      "betas": (0.9, 0.999),
      "clip_norm": 1.0,
    }
  )

  config.ema_decay = 0.0
  config.epochs = 20
  config.batch_size = 64
  config.accum_steps = 1
  config.seed = 0
  config.deterministic = False
  config.log_every = 10
  config.eval_every = 115  # Five epochs.
  config.save_every = 115
  config.init_from = config_dict.placeholder(str)
  config.freeze = ()
  config.backbone_lr_scale = 1.0
  return config
