"""ConvMixer on ImageNet-1k: the authors' recipe, for their three models.

  python -m convmixer_jax.main --config configs/imagenet.py            1536/20
  python -m convmixer_jax.main --config configs/imagenet.py:768_32
  python -m convmixer_jax.main --config configs/imagenet.py:1024_20

Published top-1: 81.37 % after 150 epochs, 80.16 % after 300, and 76.94 %. The
values are those of the authors' timm command ("command") and of the defaults of
the timm fork that it ran ("default").

Data: TFDS's imagenet2012 as ArrayRecord, or with --config.data.name=folder
--config.data.dir=DIR --config.data.eval_split=val the usual folders of JPEGs.
"""

from ml_collections import config_dict

# variant -> (model, epochs). The epochs of 1024_20 are not established: those
# of 1536_20 are taken.
VARIANTS = {
  "1536_20": ("convmixer_1536_20", 150),
  "768_32": ("convmixer_768_32", 300),
  "1024_20": ("convmixer_1024_20_ks9_p14", 150),
}


def get_config(variant: str = "1536_20") -> config_dict.ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/imagenet.py:{variant}: has {', '.join(VARIANTS)}"
    )
  name, epochs = VARIANTS[variant]
  config = config_dict.ConfigDict()

  config.model = config_dict.ConfigDict(
    {
      "name": name,
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
  config.model.dtype = "bfloat16"  # The authors: fp16 with loss scaling.
  config.model.bn_group_size = 64  # A GPU of the authors' ten.

  config.data = config_dict.ConfigDict(
    {
      "name": "imagenet2012",
      "dir": config_dict.placeholder(str),
      "image_size": 224,
      "train_split": "train",
      "eval_split": "validation",
      # timm's model: ImageNet's mean and standard deviation.
      "mean": (0.485, 0.456, 0.406),
      "std": (0.229, 0.224, 0.225),
      "crop_pct": 0.96,  # Evaluation: short side 233, centre 224.
      "num_workers": 16,
      "max_unreadable": 0,
    }
  )

  config.augment = config_dict.ConfigDict(
    {
      "flip": True,  # Default.
      "crop_scale": (0.08, 1.0),  # Default, and the next two.
      "crop_ratio": (3 / 4, 4 / 3),
      "interpolation": "random",
      "randaugment": "rand-m9-mstd0.5-inc1",  # Command.
      "color_jitter": 0.0,  # timm turns it off under RandAugment.
      "mixup_alpha": 0.5,  # Command.
      "cutmix_alpha": 0.5,  # Command.
      "cutmix_prob": 0.5,  # Default.
      "mix_group_size": 64,  # A GPU's images are mixed among themselves.
      "erase_prob": 0.25,  # Command.
      "erase_mode": "pixel",  # Command.
      "erase_area": (0.02, 1 / 3),  # Default.
      "erase_aspect": (0.3, 1 / 0.3),  # Default.
      "label_smoothing": 0.1,  # Default.
    }
  )

  config.optim = config_dict.ConfigDict(
    {
      "learning_rate": 0.01,  # Command; absolute.
      "schedule": "onecycle",  # The authors' addition to timm.
      "warmup_epochs": 0.0,
      "weight_decay": 2e-5,  # Default.
      "decay_all": False,  # Default: no bias, no norm's parameters.
      "eps": 1e-3,  # Command.
      "betas": (0.9, 0.999),  # Default.
      "clip_norm": 1.0,  # Command.
    }
  )

  config.ema_decay = 0.0
  config.epochs = epochs  # Command: 150; the authors' repository: 300.
  config.batch_size = 640  # Command: ten GPUs with 64 images each.
  config.accum_steps = 1
  config.seed = 0
  config.deterministic = False
  config.log_every = 50
  config.eval_every = 2002  # An epoch.
  config.save_every = 2002
  config.init_from = config_dict.placeholder(str)
  config.freeze = ()
  config.backbone_lr_scale = 1.0
  return config
