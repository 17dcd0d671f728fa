"""How `tpu` cuts arrays into the blocks of its kernels.

A block is 128 channels of a few images; see `tpu_kernels`.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convmixer_jax.ops import banded

LANES = 128
WORD = jnp.uint32


@dataclasses.dataclass(frozen=True)
class Blocks(banded.Layout):
  """How maps [height, width, batch, channels] are cut up."""

  batch: int
  channels: int
  dtype: Any

  @property
  def per_word(self) -> int:
    """Pixels in a word of 32 bits."""
    return 4 // jnp.dtype(self.dtype).itemsize

  @property
  def words(self) -> int:
    """Words of a group's pixels of one channel."""
    return self.pixels // self.per_word

  @property
  def groups(self) -> int:
    """Groups of a map: a power of two, so that they and images fill lanes."""
    return 1 << (super().groups - 1).bit_length()

  @property
  def images(self) -> int:
    """Images of a block: they fill sublanes, and their groups fill lanes.

    In float32 half of the lanes, if the groups allow: memory holds no more.
    """
    lanes = LANES * self.per_word // 2
    return max(8 * self.per_word, lanes // self.groups)

  @property
  def lanes(self) -> int:
    """Groups times images of a block."""
    return self.groups * self.images

  @property
  def per_channels(self) -> int:
    """Blocks of the same 128 channels; they follow each other."""
    return -(-self.batch // self.images)

  @property
  def blocks(self) -> int:
    """Blocks of all channels."""
    return -(-self.channels // LANES) * self.per_channels

  def first_words(self, kernel: jax.Array) -> jax.Array:
    """`first_row` as words, [C, whole lanes]."""
    row = self.first_row(kernel)
    row = jnp.pad(row, [(0, 0), (0, -row.shape[1] % LANES)]).T
    if self.per_word == 2:  # The second pixel's row is one lane further.
      row = jnp.stack([row, jnp.roll(row, 1, 1)], -1)
    return lax.bitcast_convert_type(row, WORD)

  def mask(self) -> jax.Array:
    """`is_tap` as words, [words, window]: all bits of a pixel or none."""
    bits, word = 32 // self.per_word, WORD(0)
    is_tap = self.is_tap().astype(WORD) * WORD(2**bits - 1)
    for n in range(self.per_word):
      word |= is_tap[n :: self.per_word] << WORD(n * bits)
    return word

  @property
  def is_whole(self) -> bool:
    """Whether the groups are full of pixels."""
    full = self.groups * self.rows, self.row
    return full == (self.height, self.width)

  def is_pixel(self) -> jax.Array:
    """Which pixels are of the map: [128, lanes], bool."""
    shape = self.pixels, self.lanes
    f = lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    line = lane // self.images * self.rows + f // self.row
    return (f % self.row < self.width) & (line < self.height)

  def padded(self, x: jax.Array) -> jax.Array:
    """[H, W, B, C] -> whole groups and blocks, with zeros."""
    padding = [
      (0, self.groups * self.rows - self.height),
      (0, self.row - self.width),
      (0, -self.batch % self.images),
      (0, -self.channels % LANES),
    ]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x

  def cut(self, x: jax.Array) -> jax.Array:
    """The inverse of `padded`."""
    return x[: self.height, : self.width, : self.batch, : self.channels]

  def on_lanes(self, bias: jax.Array) -> jax.Array:
    """[C] -> [C padded to whole lanes, lanes], float32: the same on each."""
    bias = jnp.pad(bias.astype(jnp.float32), (0, -self.channels % LANES))
    return jnp.broadcast_to(bias[:, None], (len(bias), self.lanes))

  @property
  def by_lane_shape(self) -> jax.ShapeDtypeStruct:
    """[per_channels, whole C, lanes], float32: a value for each group."""
    channels = self.channels + -self.channels % LANES
    shape = self.per_channels, channels, self.lanes
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def by_lane(self, values: jax.Array) -> jax.Array:
    """[B, C] -> `by_lane_shape`: an image's value at each of its groups."""
    padding = [(0, -self.batch % self.images), (0, -self.channels % LANES)]
    values = jnp.pad(values.astype(jnp.float32), padding)
    values = values.reshape(-1, 1, self.images, values.shape[-1])
    shape = len(values), self.groups, *values.shape[2:]
    values = jnp.broadcast_to(values, shape)
    return values.reshape(len(values), self.lanes, -1).swapaxes(1, 2)

  def by_group(self, values: jax.Array) -> jax.Array:
    """`by_lane_shape` -> [groups, B, C]."""
    values = values.reshape(len(values), -1, self.groups, self.images)
    values = values.transpose(2, 0, 3, 1)
    values = values.reshape(self.groups, -1, values.shape[-1])
    return values[:, : self.batch, : self.channels]

  def of_images(
    self, mean: jax.Array, squares: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Moments of groups, of `by_lane_shape`, -> of images, [B, C].

    They are the mean, and the sum of squared differences from it.
    """
    mean, squares = self.by_group(mean), self.by_group(squares)
    # Pixels of each group; 0 in one that fills up the lanes.
    count = self.is_pixel().sum(0)[:: self.images, None, None]
    whole = (mean * count).sum(0) / (self.height * self.width)
    return whole, (squares + count * jnp.square(mean - whole)).sum(0)

  def specs(self) -> tuple[Any, ...]:
    """Block specs, by what a step of the grid reads or writes of an array.

    images(lag): of images, those of `lag` steps before. rows(n): of [C, n], and
    lanes: of `by_lane_shape`, both of one step before, which is when part 2 is
    computed; see `tpu_kernels._run`. constant(array): all of it.
    """

    def block(shape, lag, index):
      def at_step(t):
        n = jnp.clip(t - lag, 0, self.blocks - 1)
        per_channels = jnp.int32(self.per_channels)
        return index(lax.div(n, per_channels), lax.rem(n, per_channels))

      return pl.BlockSpec(shape, at_step)

    maps = self.groups * self.rows, self.row, self.images, LANES
    images = lambda lag: block(maps, lag, lambda c, b: (0, 0, b, c))
    rows = lambda n: block((LANES, n), 1, lambda c, b: (c, 0))
    lanes = block((None, LANES, self.lanes), 1, lambda c, b: (b, c, 0))
    constant = lambda array: pl.BlockSpec(array.shape, lambda t: (0, 0))
    return images, rows, lanes, constant


def of_maps(x: Any, kernel: jax.Array, flipped: bool = False) -> Blocks:
  """Of x, [H, W, B, C]; see `banded.layout`."""
  height, width, batch, channels = x.shape
  layout = banded.layout(height, width, kernel, flipped)
  return Blocks(*dataclasses.astuple(layout), batch, channels, x.dtype)
