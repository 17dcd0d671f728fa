"""Your own photographs, in folders: ConvMixer-256/8, or a fine-tuned 768/32.

  /data/mine/train/CLASS/*.jpg and /data/mine/val/CLASS/*.jpg, of any size:

  python -m convmixer_jax.main --config configs/folder.py:finetune \\
      --config.data.dir=/data/mine
  python -m convmixer_jax.main --config configs/folder.py \\
      --config.data.dir=/data/mine

finetune starts from the published ImageNet weights and is the choice for some
dozens to thousands of images a class. Without it the model starts from random
weights: that needs thousands of images. Values without a source are our choice.
docs/own_data.md explains the steps, from the folder to predictions.
"""

from convmixer_jax import config as config_lib

VARIANTS = ("scratch", "finetune")


def get_config(variant: str = "scratch"):
  if variant not in VARIANTS:
    raise ValueError(f"configs/folder.py:{variant}: has {', '.join(VARIANTS)}")
  config = config_lib.defaults()
  config.model.name = "convmixer_256_8"
  # As in the paper's models for 224 pixels.
  config.model.patch_size = 7
  config.model.kernel_size = 7

  config.data.name = "folder"
  config.data.image_size = 224
  config.data.eval_split = "val"
  # ImageNet's: those of the published weights, and good for photographs.
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.crop_pct = 0.96  # timm's models.

  config.augment.crop_scale = (0.35, 1.0)  # From 0.08 many miss the object.
  config.augment.crop_ratio = (3 / 4, 4 / 3)
  config.augment.interpolation = "random"
  # The example of docs/own_data.md: 63.2 %, without it 60.2 % (one seed).
  config.augment.randaugment = "rand-m9-mstd0.5-inc1"
  config.augment.label_smoothing = 0.1  # configs/imagenet.py, timm's default.

  config.optim.schedule = "cosine"
  # As cifar10.py's paper_wd1e-2, which has batches of 64 too.
  config.optim.learning_rate = 0.01
  config.optim.weight_decay = 0.01
  config.optim.eps = 1e-3
  config.optim.clip_norm = 1.0
  config.optim.warmup_epochs = 5.0

  config.epochs = 60
  config.batch_size = 64  # BatchNorm's statistics are of 64 images, as theirs.
  config.log_every = 20

  if variant == "finetune":
    config.model.name = "convmixer_768_32"
    config.model.patch_size = config.model.kernel_size = None  # Its own.
    config.init_from = "hf-hub:timm/convmixer_768_32.in1k"
    config.model.dtype = "bfloat16"  # Half the memory; as configs/imagenet.py.
    config.optim.learning_rate = 3e-3  # Of the head, which starts anew.
    config.backbone_lr_scale = 0.3  # The example: 63.5 %; with 0.1 61.4 %.
    config.optim.eps = 1e-8  # PyTorch's. With 1e-3 small gradients do little.
    config.augment.randaugment = ""  # The example: no gain in so few epochs.
    config.optim.warmup_epochs = 1.0
    config.epochs = 15
  return config
