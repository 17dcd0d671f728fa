"""The parts of a run: `build` turns a config into model, steps and batches.

Training, evaluation, plan, replay, preview and benchmarks all start here.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import optim
from convmixer_jax import peaks
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError
from convmixer_jax.ops import tpu


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The parts of a run.

  Attributes:
    config: of the run.
    data: the training images, or their description.
    mesh: the devices, which share each batch.
    model: unbound.
    shapes: {'params', 'batch_stats'}, of the model's variables.
    tx: the optimiser.
    schedule: updates done -> learning rate of the next.
    host: a CPU of this process that applies RandAugment, and the crop and flip
      before it; None if the step does.
  """

  config: ml_collections.ConfigDict
  data: sources.Source | sources.Description
  mesh: jax.sharding.Mesh
  model: nn.Module
  shapes: Any
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  host: jax.sharding.Mesh | None = None

  @property
  def steps_per_epoch(self) -> float:
    """Not whole in general: batches cross epochs, and no image is dropped."""
    return self.data.size / self.config.batch_size

  @property
  def total_steps(self) -> int:
    """Updates in the whole run."""
    return -(-self.config.epochs * self.data.size // self.config.batch_size)

  def is_due(self, step: int, every: int | None) -> bool:
    """Whether something is due after `step` updates; it always is at the end.

    Args:
      step: at least 1.
      every: period in steps; None: at the end of each epoch.
    """
    if every is None:
      size, batch_size = self.data.size, self.config.batch_size
      epoch = lambda step: step * batch_size // size
      due = epoch(step) > epoch(step - 1)
    else:
      due = step % every == 0
    return due or step == self.total_steps

  @property
  def peak_rate(self) -> float | None:
    """Images per second of a device that trains at its peak FLOP/s.

    None if its peak, see `peaks.PEAKS`, or the model's FLOPs are unknown. A
    training step is counted as three forward passes (`models.flops`): one, and
    two for the gradients of the activations and of the weights, also of frozen
    ones. What `model.remat` computes again, augmentation and the optimiser do
    not count.
    """
    kind = self.mesh.devices.flat[0].device_kind
    dtype = np.dtype(self.model.dtype or np.float32).name
    peak = peaks.PEAKS.get(kind, {}).get(dtype)
    counted = "flops" in vars(models.family_of(self.model))
    if peak is None or not counted:
      return None
    return peak / (3 * models.flops(self.model, self.config.data.image_size))

  @property
  def augment(self) -> step_lib.Augment:
    """Augmentation in the step, after what the host does."""
    data = self.config.data
    return augment.make_augment(
      self.config.augment,
      mean=data.mean,
      std=data.std,
      crop=self.data.crop_on_device,
      policy=self.host is None,
    )

  @property
  def seed(self) -> jax.Array:
    """First argument of `train_step`: all seeds share one compiled program."""
    seed = np.uint32(self.config.seed)
    return jax.device_put(seed, sharding.replicated(self.mesh))

  @functools.cached_property
  def train_step(self) -> Any:
    """Jitted (seed, state, batch) -> (state, metrics); donates the state."""
    config = self.config
    replicated = sharding.replicated(self.mesh)
    batch_sharding = sharding.batch_sharding(self.mesh)
    on_gpus = {"xla_gpu_deterministic_ops": True}
    options = on_gpus if config.deterministic else {}
    # Under a scan, XLA uses this memory for the arrays of a block.
    if config.model.implementation == "pallas" and not config.model.scan:
      options |= tpu.compiler_options(self.mesh.devices.flat[0])

    def update(seed, state, batch):
      train_step = step_lib.make_train_step(
        self.model,
        self.tx,
        self.augment,
        seed=seed,
        label_smoothing=config.augment.label_smoothing,
        accum_steps=config.accum_steps,
        ema_decay=config.ema_decay,
        batch_sharding=batch_sharding,
      )
      with ops.over(self.mesh):
        return train_step(state, batch)

    return jax.jit(
      update,
      in_shardings=(replicated, replicated, batch_sharding),
      out_shardings=replicated,
      donate_argnames="state",
      compiler_options=options,
    )

  @functools.cached_property
  def eval_step(self) -> Any:
    """Jitted (state, batch) -> sums; see `step.make_eval_step`."""
    data = self.config.data
    eval_step = step_lib.make_eval_step(
      self.model,
      augment.make_normalize(data.mean, data.std),
      self.data.subset,
    )

    def score(state, batch):
      with ops.over(self.mesh):
        return eval_step(state, batch)

    return jax.jit(score, out_shardings=sharding.replicated(self.mesh))

  def training_images(
    self, batch: Any, step: int | jax.Array, num: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """The first `num` images of a batch as the model gets them.

    Args:
      batch: see `batch_shapes`.
      step: updates done before it.
      num: None is all.

    Returns:
      Float images [num, S, S, 3], scaled back to [0, 255] though some pixels
      may lie outside, and float targets [num, K].
    """
    data = self.config.data
    drawn = self._draw(self.seed, batch, step, num)
    images, targets = jax.device_get(drawn)
    return 255 * (images * np.array(data.std) + np.array(data.mean)), targets

  @functools.cached_property
  def _draw(self):
    def draw(seed, batch, step, num):
      with ops.over(self.mesh):
        images, targets = step_lib.augmented(
          self.augment,
          batch,
          self.model.num_classes,
          self.config.augment.label_smoothing,
          seed,
          step,
        )
      return images[:num], targets[:num]

    on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    # Less optimised: it runs once or twice, and compiles in half of the time.
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(
      draw,
      static_argnums=3,
      out_shardings=sharding.replicated(self.mesh),
      compiler_options=options,
    )

  def init_state(self) -> step_lib.TrainState:
    """The state of step 0, on all devices."""
    config = self.config
    init = lambda key: step_lib.init_state(
      key, self.model, self.tx, config.data.image_size, config.ema_decay > 0
    )
    init = jax.jit(init, out_shardings=sharding.replicated(self.mesh))
    return init(jax.random.key(config.seed))

  def batch_shapes(
    self, batch_size: int | None = None
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch, image uint8 [B, S, S, 3] and label int32 [B], as shapes."""
    b, size = batch_size or self.config.batch_size, self.config.data.image_size
    like = functools.partial(
      jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(self.mesh)
    )
    return {
      "image": like((b, size, size, 3), np.uint8),
      "label": like((b,), np.int32),
    }

  def train_batches(
    self,
    start: int,
    stop: int,
    stopped: Callable[[], object] = lambda: False,
  ) -> Iterator[stream.Batch]:
    """This process's part of the batches of steps start, ..., stop - 1.

    `self.data` must be a source. See `stream.train_batches`. What the `host`
    does of the augmentation is done.
    """
    config, data = self.config, self.config.data
    batches = stream.train_batches(
      self.data,
      seed=config.seed,
      batch_size=config.batch_size,
      rows=sharding.local_rows(self.mesh, config.batch_size),
      start=start,
      stop=stop,
      image_size=data.image_size,
      num_workers=data.num_workers,
      max_unreadable=data.max_unreadable,
      stopped=stopped,
      scale=config.augment.crop_scale,
      ratio=config.augment.crop_ratio,
      interpolation=config.augment.interpolation,
    )
    if self.policy is None:
      return batches
    return self._with_policy(self.policy, batches, start)

  def _with_policy(self, policy, batches, start):
    with contextlib.closing(batches):
      for step, batch in enumerate(batches, start):
        images = policy(self.config.seed, step, batch["image"])
        yield batch | {"image": images}

  @functools.cached_property
  def policy(self) -> Callable[..., np.ndarray] | None:
    """Compiled (seed, step, this process's images) -> images, on the `host`."""
    config, data = self.config, self.config.data
    if self.host is None:
      return None
    apply = augment.make_policy(
      config.augment, mean=data.mean, crop=self.data.crop_on_device
    )
    rows = sharding.local_rows(self.mesh, config.batch_size)
    rows = augment.Rows(config.batch_size, rows)

    def run(seed, step, images):
      with ops.over(self.host):
        return apply(step_lib.augment_key(seed, step), images, rows)

    shape = len(rows.index), data.image_size, data.image_size, 3
    images = jax.ShapeDtypeStruct(shape, np.uint8)
    number = jax.ShapeDtypeStruct((), np.uint32)
    jitted = jax.jit(run, in_shardings=sharding.replicated(self.host))
    compiled = jitted.lower(number, number, images).compile()

    def policy(seed, step, images):
      with jax.transfer_guard("allow"):
        return np.asarray(compiled(np.uint32(seed), np.uint32(step), images))

    return policy


def _host(config, mesh):
  """`Recipe.host`: for TPUs, which read pixels at computed places one by one.

  That would take longer than all the rest of a step (docs/speed.md).
  """
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  if not on_tpu or not config.augment.randaugment:
    return None
  try:
    return sharding.make_mesh(jax.local_devices(backend="cpu")[:1])
  except RuntimeError as e:
    text = f"{first_line(e)}; RandAugment runs on the host"
    raise UserError(f"{text}: set JAX_PLATFORMS=tpu,cpu") from e


def build(
  config: ml_collections.ConfigDict,
  data: sources.Source | sources.Description,
  devices: Sequence[Any] | None = None,
) -> Recipe:
  """Builds a run's parts.

  Args:
    config: of the run; see `config.check`, which is not called here.
    data: the training images, or a description with known size and classes.
    devices: None is all devices of all processes; they need not exist (see
      `plan.open_topology`) as long as nothing is computed.

  Raises:
    UserError: `config.freeze` names no parameter; JAX has no CPU, see `_host`.
  """
  model = models.create_model(num_classes=data.num_classes, **config.model)
  shapes = models.variable_shapes(model, config.data.image_size)
  schedule = optim.make_schedule(
    config.optim.schedule,
    config.optim.learning_rate,
    config.epochs,
    data.size / config.batch_size,
    config.optim.warmup_epochs,
  )
  tx = optim.make_optimizer(
    schedule,
    shapes["params"],
    config.optim,
    freeze=config.freeze,
    backbone_lr_scale=config.backbone_lr_scale,
  )
  mesh = sharding.make_mesh(devices)
  host = _host(config, mesh)
  return Recipe(config, data, mesh, model, shapes, tx, schedule, host)
