"""ConvMixer-512/16 on downsampled ImageNet, for one GPU instead of a pod.

  python -m convmixer_jax.main --config configs/imagenet_small.py
  python -m convmixer_jax.main --config configs/imagenet_small.py:64

Data: TFDS's imagenet_resized, all of ImageNet-1k at 32 x 32 or 64 x 64 pixels.
Its classes are in another order than imagenet2012's. The model is the smallest
of the paper's ImageNet table. Patch 1 at 32 pixels and patch 2 at 64 give the
32 x 32 locations that patch 7 gives at 224, so an image costs as much as there,
9.8 GFLOP. The recipe is that of configs/imagenet.py, which has its sources and
writes out the defaults too; what differs is commented here. Nothing has been
trained with it yet.
"""

from convmixer_jax import config as config_lib

VARIANTS = {"32": 1, "64": 2}  # Pixels -> patch size.


def get_config(variant: str = "32"):
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/imagenet_small.py:{variant}: has {', '.join(VARIANTS)}"
    )
  config = config_lib.defaults()
  config.model.name = "convmixer_512_16"
  config.model.patch_size = VARIANTS[variant]
  config.model.kernel_size = 8  # The paper's of this model.
  config.model.dtype = "bfloat16"
  config.model.bn_group_size = 64

  config.data.name = f"imagenet_resized/{variant}x{variant}"
  config.data.image_size = int(variant)
  config.data.eval_split = "validation"
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.crop_pct = 1.0  # The images are whole already.
  config.data.num_workers = 8  # Small PNG files decode fast.

  # At 32 pixels ImageNet's least crop, 8 %, has 9 x 9. The paper's of CIFAR-10.
  config.augment.crop_scale = (0.75, 1.0)
  config.augment.crop_ratio = (3 / 4, 4 / 3)
  config.augment.interpolation = "random"
  config.augment.randaugment = "rand-m9-mstd0.5-inc1"
  config.augment.mixup_alpha = 0.5
  config.augment.cutmix_alpha = 0.5
  config.augment.mix_group_size = 64
  config.augment.erase_prob = 0.25
  config.augment.label_smoothing = 0.1

  # The batch is the paper's too, so that its learning rate needs no scaling.
  config.optim.learning_rate = 0.01
  config.optim.schedule = "onecycle"
  config.optim.weight_decay = 2e-5
  config.optim.eps = 1e-3
  config.optim.clip_norm = 1.0
  config.batch_size = 640

  # Our choice, instead of 150: 1.5e18 FLOPs, forward and backward.
  config.epochs = 40
  config.log_every = 50
  return config
