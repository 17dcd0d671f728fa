"""Sweeps as data: the cells of each table, and the seeds of each cell."""

from collections.abc import Sequence
import dataclasses
import difflib
import os

from convmixer_jax import config as config_lib
from convmixer_jax import imports
from convmixer_jax import models
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError
from experiments import paper
from experiments.cells import Cell


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The question, the cells, and the seeds that each cell is trained with.

  `name` is that of its folder; `get` sets it.
  """

  about: str
  cells: Sequence[Cell]
  seeds: Sequence[int] = (0, 1, 2)
  name: str = ""

  def runs(self) -> list[tuple[Cell, int]]:
    """All cells with the first seed, then all with the second, and so on."""
    return [(cell, seed) for seed in self.seeds for cell in self.cells]


def _grid(config, table, patches, kernels, **overrides):
  return [
    Cell(
      f"p{p}_k{k}",
      config,
      {"model.patch_size": p, "model.kernel_size": k, **overrides},
      table,
    )
    for p in patches
    for k in kernels
  ]


def _ablation(table, **overrides):
  """One change of model or recipe per cell, named as in the paper."""
  changes = {
    "baseline": {},
    "no depthwise residual": {"model.depthwise_residual": False},
    "add pointwise residual": {"model.pointwise_residual": True},
    "layernorm for batchnorm": {"model.norm": "layer"},
    "relu for gelu": {"model.activation": "relu"},
    "no mixup and cutmix": dict.fromkeys(
      ("augment.mixup_alpha", "augment.cutmix_alpha"), 0.0
    ),
    "no random erasing": {"augment.erase_prob": 0.0},
    "no randaugment": {"augment.randaugment": ""},
    "no random scaling": {"augment.crop_scale": (1.0, 1.0)},
    "no gradient clipping": {"optim.clip_norm": 0.0},
  }
  return [
    Cell(
      label.replace(" ", "_"),
      "configs/cifar10.py:paper",
      {**overrides, **change},
      table,
      label,
    )
    for label, change in changes.items()
  ]


# Sizes of the families: patch size -> cell -> model and fields. Where there are
# more patches, layers that mix them are larger, and there are fewer blocks, so
# that all have 0.6 M parameters, to 7 %.
_SIZES = {
  patch: {
    "convmixer": ("convmixer_256_8", dict(kernel_size=5)),
    "mlp_mixer": ("mixer_s16_224", dict(dim=96, depth=6 if patch == 2 else 7)),
    "gmlp": ("gmlp_ti16_224", dict(dim=96, depth=4 if patch == 2 else 7)),
    "resmlp": ("resmlp_12_224", dict(dim=96, depth=4 if patch == 2 else 7)),
    "vit": ("deit_tiny_patch16_224", dict(dim=96, depth=5, heads=3)),
    "mobilenetv3": ("mobilenetv3_isotropic_64_8", dict(head_dim=64)),
  }
  for patch in (2, 4)
} | {
  None: {"resnet": ("resnet50", dict(depths=(2, 2, 2), widths=(32, 64, 96)))}
}
# The same with 0.16 M parameters, to 11 %.
_SMALL_SIZES = {
  4: {
    "convmixer": ("convmixer_256_8", dict(dim=128, kernel_size=5)),
    "mlp_mixer": ("mixer_s16_224", dict(dim=48, depth=7)),
    "gmlp": ("gmlp_ti16_224", dict(dim=64, depth=4)),
    "vit": ("deit_tiny_patch16_224", dict(dim=64, depth=3, heads=2)),
    "mobilenetv3": ("mobilenetv3_isotropic_64_8", dict(dim=32, head_dim=64)),
  },
  None: {"resnet": ("resnet50", dict(depths=(2, 2, 2), widths=(16, 32, 48)))},
}
# One recipe for all of them: the script's, with AdamW as ViTs are trained with.
_SAME = {
  "optim.learning_rate": 0.003,
  "optim.weight_decay": 0.05,
  "optim.decay_all": False,
  "optim.clip_norm": 1.0,
  "batch_size": 128,
}


def _architecture(cell, model, patch, fields, **overrides):
  """A cell with any family's model; it sets or empties the config's sizes."""
  sizes = {"name": model, "patch_size": patch, "kernel_size": None, **fields}
  overrides |= {f"model.{field}": value for field, value in sizes.items()}
  return Cell(cell, _SCRIPT, {**overrides, **_SAME})


def _architectures(sizes, **overrides):
  """Families beside each other."""
  return [
    _architecture(
      f"{family}_p{patch}" if patch else family,
      model, patch, fields, **overrides,
    )
    for patch, families in sizes.items()
    for family, (model, fields) in families.items()
  ]  # fmt: skip


def _stems():
  """Patches, or a stem of stride 1 with a mean over each of them."""
  families = {
    "convmixer": _SIZES[4]["convmixer"],
    "resnet": _SIZES[None]["resnet"],
  }
  return [
    _architecture(
      f"{family}_{stem}_p{patch}",
      model, patch, {**fields, "pooled_stem": stem == "pooled"}, epochs=25,
    )
    for family, (model, fields) in families.items()
    for patch in (2, 4)
    for stem in ("patches", "pooled")
  ]  # fmt: skip


# Start of a model's name -> variant of configs/imagenet.py.
_RECIPES = {
  "convmixer_768": "768_32",
  "convmixer_1024_20": "1024_20",
  "convmixer": "1536_20",
  "resnet": "resnet152",
  "resmlp_big": "resmlp_big_24",
  "": "deit_base",
}


def _imagenet(table):
  """Every model of an ImageNet table, with the recipe that fits it."""
  recipe = lambda model: next(
    variant for start, variant in _RECIPES.items() if model.startswith(start)
  )
  return [
    Cell(
      f"{row.model}_p{row.patch_size}_k{row.kernel_size}"
      if row.kernel_size
      else row.model,
      f"configs/imagenet.py:{recipe(row.model)}",
      {
        "model.name": row.model,
        "model.patch_size": row.patch_size,
        "model.kernel_size": row.kernel_size,
      },
      table,
      row.model,
    )
    for row in paper.read()
    if row.table == table and row.model in models.VARIANTS
  ]


_SCRIPT, _PAPER = "configs/cifar10.py:script", "configs/cifar10.py:paper"
SWEEPS: dict[str, Sweep] = {
  "smoke": Sweep(
    "A test of the runner, on the digits: minutes on a CPU.",
    _grid("configs/digits.py", "", (1, 2), (3, 5), epochs=4),
    seeds=(0, 1),
  ),
  "patch_kernel": Sweep(
    "Patch and kernel size, with the authors' CIFAR-10 script.",
    _grid(_SCRIPT, "cifar10_script_grid", (1, 2, 4, 8), (3, 5, 7, 9)),
  ),
  "patch_kernel_small": Sweep(
    "Patch and kernel size for ConvMixer-64/4, 8 epochs: hours on two CPUs.",
    _grid(
      _SCRIPT,
      "",
      (2, 4, 8),
      (3, 5, 7),
      **{
        "model.dim": 64,
        "model.depth": 4,
        "epochs": 8,
        "batch_size": 128,
      },
    ),
    seeds=(0, 1),
  ),
  "cifar10_script": Sweep(
    "The authors' script, and the grid of an independent rerun.",
    [
      Cell("script", _SCRIPT, {}, "cifar10_script"),
      *(
        cell
        for cell in _grid(_SCRIPT, "cifar10_script_grid", (1, 2, 4), (3, 5, 7))
        if cell.name != "p2_k5"  # The script's own.
      ),
    ],
  ),
  "cifar10_kernel": Sweep(
    "Kernel size at 200 epochs.",
    _grid(_PAPER, "cifar10_kernel", (1,), (3, 5, 7, 9)),
  ),
  "cifar10_patch": Sweep(
    "Patch size at 200 epochs.",
    _grid(_PAPER, "cifar10_patch", (2, 4), (9,)),
  ),
  "cifar10_size": Sweep(
    "Width and depth at 200 epochs.",
    [
      Cell(
        f"{dim}_{depth}",
        _PAPER,
        {
          "model.dim": dim,
          "model.depth": depth,
          "model.patch_size": 1,
          "model.kernel_size": 8,
        },
        "cifar10_size",
        f"convmixer_{dim}_{depth}",
      )
      for dim in (128, 256)
      for depth in (4, 8, 12)
    ],
  ),
  "cifar10_ablation": Sweep(
    "What each part contributes.", _ablation("cifar10_ablation")
  ),
  "cifar10_ablation_small": Sweep(
    "The same for ConvMixer-128/4, patch 4, 10 epochs: hours on two CPUs.",
    _ablation(
      "",
      **{
        "model.name": "convmixer_128_4",
        "model.patch_size": 4,
        "model.kernel_size": 5,
        "epochs": 10,
        "batch_size": 128,
      },
    ),
    seeds=(0, 1),
  ),
  "architectures_cifar10": Sweep(
    "ConvMixer beside other families at 0.6 M parameters, 100 epochs.",
    _architectures(_SIZES, epochs=100),
  ),
  "architectures_small": Sweep(
    "The same at 0.16 M parameters, 5 epochs: hours on two CPUs.",
    _architectures(_SMALL_SIZES, epochs=5),
    seeds=(0, 1),
  ),
  "patches": Sweep(
    "Is it the patches? A stem of stride 1 and pooling in their place.",
    _stems(),
  ),
  "imagenet": Sweep(
    "The paper's ImageNet models, and those it compares them with.",
    _imagenet("imagenet"),
    seeds=(0,),
  ),
  "imagenet_small": Sweep(
    "Patch and kernel size for ConvMixer-512/16 on ImageNet at 32 pixels.",
    _grid("configs/imagenet_small.py:32", "", (1, 2), (3, 5, 9)),
    seeds=(0,),
  ),
  "imagenet_timm": Sweep(
    "Further models, beside the accuracy of timm's weights.",
    _imagenet("imagenet_timm"),
    seeds=(0,),
  ),
}


def get(*names: str) -> Sweep:
  """Finds a sweep by its name, the only argument of a command line.

  The name is a key of `SWEEPS`, or module:NAME or path/to/file.py:NAME for a
  sweep of one's own. A config file of its cells is looked for in the current
  folder, and then among ours.

  Raises:
    UserError: no such sweep, or a cell with an invalid config.
  """
  known = f"{', '.join(SWEEPS)}, or FILE.py:NAME of your own"
  if len(names) != 1:
    raise UserError(f"SWEEP: give one of {known}")
  (name,) = names
  if ":" in name:
    sweep = _own(name)
  elif name in SWEEPS:
    sweep = dataclasses.replace(SWEEPS[name], name=name)
  else:
    if name.endswith(".py"):
      known = f"{name}:NAME; known: {known}"
      raise UserError(f"{name}: add the name of its sweep, {known}")
    near = difflib.get_close_matches(name, SWEEPS, 1, cutoff=0)[0]
    raise UserError(f"{name}: no such sweep; nearest is {near}; known: {known}")
  for cell, seed in sweep.runs():
    try:
      config_lib.check(cell.resolve(seed), num_devices=1)
    except Exception as e:  # A config file may raise anything.
      kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
      text = f"cell {cell.name}: {cell.config}: {kind}{first_line(e)}"
      raise UserError(f"{name}: {text}") from e
  return sweep


def _own(name):
  """The sweep that a module or file of the user's own defines."""
  module, attribute = imports.load(name)
  if not hasattr(module, attribute):
    found = [k for k, v in vars(module).items() if isinstance(v, Sweep)]
    raise UserError(f"{name}: not there; its sweeps are {', '.join(found)}")
  sweep = getattr(module, attribute)
  cells = sweep.cells if isinstance(sweep, Sweep) else [None]
  if not all(isinstance(cell, Cell) for cell in cells):
    text = "must be an experiments.sweeps.Sweep of experiments.cells.Cells"
    raise UserError(f"{name}: {text}")
  cells = [
    dataclasses.replace(cell, config=os.path.abspath(path))
    if os.path.exists((path := os.path.expanduser(cell.config)).split(":")[0])
    else cell
    for cell in cells
  ]
  names = [cell.name for cell in cells]
  if twice := {x for x in names if names.count(x) > 1}:
    raise UserError(f"{name}: several cells are called {min(twice)}")
  return dataclasses.replace(sweep, name=attribute, cells=cells)
