"""Pallas kernels of `tpu`.

A step has 128 channels of a few images in the chip's memory, with channels in
the lanes, as the network has them. It transposes each pixel's
[(group, image), channel] to [channel, (group, image)], collects the pixels of a
channel by loads with a stride, multiplies, and transposes the results back.
bfloat16 is handled as words of two pixels. The bands are built once per
channel, from a row that each next row repeats, shifted by a lane.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from convmixer_jax.ops import banded

LANES = 128
WORD = jnp.uint32


@dataclasses.dataclass(frozen=True)
class Steps(banded.Layout):
  """How a batch of maps is cut up for the steps of a kernel."""

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
  def images(self) -> int:
    """Images of a step: their groups fill lanes, and they fill sublanes."""
    return max(8 * self.per_word, LANES // math.gcd(self.groups, LANES))

  @property
  def lanes(self) -> int:
    """Groups times images of a step."""
    return self.groups * self.images

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


# --- Parts of the kernels. `words` scratch is [16, words * 8, lanes]: channel
# 8 i + j has word w in [i, 8 w + j], so that a stride of 8 collects its words.


def _bits(x):
  return pltpu.bitcast(x.astype(jnp.float32), WORD)


def _places(i, at: Steps):
  """Row and column of each pixel of word i, in every group."""
  i = i * at.per_word
  line = lax.shift_right_logical(i, at.row.bit_length() - 1)
  column = i & (at.row - 1)
  lines = [group * at.rows + line for group in range(at.groups)]
  return [[(y, column + n) for y in lines] for n in range(at.per_word)]


def _for(count, body, unroll):
  lax.fori_loop(0, count, lambda i, _: body(i), None, unroll=unroll)


def _load(source, words, at: Steps, reverse=False):
  """Transposes images to channels; `reverse` reverses the pixels of a group."""

  def body(i):
    pixels = [
      _bits(jnp.concatenate([source[place] for place in places]))
      for places in _places(i, at)
    ]
    if reverse:
      pixels, i = pixels[::-1], at.words - 1 - i
    word = pixels[-1]
    if at.per_word == 2:
      word |= pixels[0] >> 16
    rows = pl.ds(pl.multiple_of(8 * i, 8), 8)
    words[:, rows, :] = word.T.reshape(16, 8, at.lanes)

  _for(at.words, body, 16)


def _store(words, target, at: Steps, add=None):
  """Transposes channels to images, and adds `add`'s."""

  def body(i):
    rows = pl.ds(pl.multiple_of(8 * i, 8), 8)
    word = words[:, rows, :].reshape(LANES, at.lanes).T
    pixels = (
      [word] if at.per_word == 1 else [word << 16, word & WORD(0xFFFF0000)]
    )
    for pixel, places in zip(pixels, _places(i, at)):
      pixel = pltpu.bitcast(pixel, jnp.float32)
      pixel = pixel.reshape(at.groups, at.images, LANES)
      for group, place in enumerate(places):
        value = pixel[group]
        if add is not None:
          value += add[place].astype(jnp.float32)
        target[place] = value.astype(at.dtype)

  _for(at.words, body, 16)


def _build_bands(first_rows, mask, bands, at: Steps):
  length = first_rows.shape[1]

  def body(c, _):
    row = jnp.broadcast_to(first_rows[pl.ds(c, 1), :], (at.words, length))
    row = pltpu.roll(row, length - LANES, 1, stride=at.per_word, stride_axis=0)
    bands[c] = row[:, : at.window] & mask[...]

  _channels(body)


def _channels(body, unroll=1):
  """Calls body(c, of) for each channel; of(words) is its words in a scratch."""

  def eight(i):
    for j in range(8):
      body(pl.multiple_of(8 * i, 8) + j, functools.partial(_channel, i, j))

  _for(LANES // 8, eight, unroll)


def _channel(i, j, words):
  return words.at[i, pl.ds(j, words.shape[1] // 8, stride=8), :]


def _windows(words, at: Steps):
  """A channel's words [words, lanes] -> [window * 128, lanes] of `dtype`."""
  lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
  parts = []
  for group in range(-at.before, at.after + 1):
    moved = words
    if group:
      distance = group * at.images
      moved = pltpu.roll(words, -distance % at.lanes, 1)
      inside = (lane + distance >= 0) & (lane + distance < at.lanes)
      moved = jnp.where(inside, moved, jnp.zeros_like(moved))
    parts.append(pltpu.bitcast(moved, at.dtype))
  return jnp.concatenate(parts, 0)


def _dot(a, b, contracted, at: Steps):
  precision = lax.Precision.HIGHEST if at.per_word == 1 else None
  return lax.dot_general(
    a,
    b,
    (contracted, ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _sum_groups(row, at: Steps):
  """[1, lanes] -> [1, lanes]: the sum of an image's groups, in each of them."""
  total = row
  for group in range(1, at.groups):
    total += pltpu.roll(row, group * at.images, 1)
  return total


def _moments(a, inside, at: Steps):
  """Mean of an image, and sum of squared differences from it: [1, lanes]."""
  count = float(LANES)
  # In one pass: around each group's first value, then around the mean.
  centred = a - a[:1]
  if inside is not None:
    count = inside[...].sum(0, keepdims=True)
    centred *= inside[...]
  first = centred.sum(0, keepdims=True)
  second = (centred * centred).sum(0, keepdims=True)
  group_mean = a[:1] + first / count
  mean = _sum_groups(group_mean * count, at) / (at.height * at.width)
  second += count * jnp.square(group_mean - mean) - first * first / count
  return mean, _sum_groups(second, at)


# --- Activations: t -> value and slope.


def _gelu(t):
  # Phi(-|t|) by Abramowitz and Stegun's formula 7.1.26, within 1e-7; it needs
  # half of the operations of lax.erf.
  size = jnp.abs(t)
  d = 1 + size * (0.3275911 * math.sqrt(0.5))
  r = pl.reciprocal(d, approx=True)
  r *= 2 - d * r  # A step of Newton's method: all bits.
  total = 0.5 * 1.061405429
  for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
    total = total * r + 0.5 * c
  density = jnp.exp2(t * t * (-0.5 / math.log(2)))
  tail = total * r * density
  below = jnp.where(t > 0, 1 - tail, tail)
  slope = below + t * density * (1 / math.sqrt(2 * math.pi))
  return jnp.maximum(t, 0) - size * tail, slope


_ACTIVATIONS = {
  "identity": lambda t: (t, jnp.ones_like(t)),
  "relu": lambda t: (jnp.maximum(t, 0), (t > 0).astype(t.dtype)),
  "gelu": _gelu,
}


# --- The kernels.


def forward(*refs, at: Steps, activation):
  """y, and if there is an activation, moments of activation(y + bias)."""
  refs = iter(refs)
  take = lambda n: [next(refs) for _ in range(n)]
  first_rows, mask, x = take(3)
  (bias,) = take(1) if activation else (None,)
  inside = None
  if activation and not at.is_whole:
    (inside,) = take(1)
  (y,) = take(1)
  mean, squares = take(2) if activation else (None, None)
  words, bands = take(2)

  @pl.when(pl.program_id(1) == 0)
  def _():
    _build_bands(first_rows, mask, bands, at)

  _load(x, words, at)

  def channel(c, of):
    window = _windows(of(words)[...], at)
    band = pltpu.bitcast(bands[c], at.dtype)
    result = _dot(band, window, ((1,), (0,)), at).astype(at.dtype)
    of(words)[...] = pltpu.bitcast(result, WORD)
    if activation:
      t = result.astype(jnp.float32) + bias[pl.ds(c, 1), :]
      a, _ = _ACTIVATIONS[activation](t)
      average, square = _moments(a, inside, at)
      mean[pl.ds(c, 1), :] = average
      squares[pl.ds(c, 1), :] = square

  _channels(channel, 2)
  _store(words, y, at)


def backward(*refs, at: Steps, activation, residual):
  """Gradients of x and of the kernel, laid out as `at`, flipped.

  With an activation, grad is that of what BatchNorm made of y; see
  `normalize.input_grad` for p, q and r. With `residual`, it is added to x's
  gradient.
  """
  refs = iter(refs)
  take = lambda n: [next(refs) for _ in range(n)]
  first_rows, mask, reversed_mask, x, grad = take(5)
  y, bias, p, q, r = take(5) if activation else [None] * 5
  inside = None
  if activation and not at.is_whole:
    (inside,) = take(1)
  grad_x, grad_row = take(2)
  (grad_bias,) = take(1) if activation else (None,)
  grad_words, x_words, bands, sums = take(4)
  (y_words,) = take(1) if activation else (None,)
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    _build_bands(first_rows, mask, bands, at)

  _load(grad, grad_words, at)
  _load(x, x_words, at, reverse=True)
  if activation:
    _load(y, y_words, at)

  def channel(c, of):
    g = of(grad_words)[...]
    if activation:
      row = lambda values: values[pl.ds(c, 1), :]
      wide = lambda words: pltpu.bitcast(words, at.dtype).astype(jnp.float32)
      t = wide(of(y_words)[...]) + row(bias)
      a, slope = _ACTIVATIONS[activation](t)
      g = (wide(g) * row(p) + a * row(q) + row(r)) * slope
      if inside is not None:
        g *= inside[...]
      grad_bias[pl.ds(c, 1), :] = _sum_groups(g.sum(0, keepdims=True), at)
      g = pltpu.bitcast(g.astype(at.dtype), WORD)
    window = _windows(g, at)
    band = pltpu.bitcast(bands[c], at.dtype)
    result = _dot(band, window, ((1,), (0,)), at).astype(at.dtype)
    of(grad_words)[...] = pltpu.bitcast(result, WORD)
    pixels = pltpu.bitcast(of(x_words)[...], at.dtype)
    products = _dot(pixels, window, ((1,), (1,)), at)
    sums[c] = products + jnp.where(step == 0, 0.0, sums[c])

  _channels(channel, 2)
  _store(grad_words, grad_x, at, add=grad if residual else None)

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    def body(c, _):
      total = sums[c] * reversed_mask[...]
      total = jnp.concatenate([total, jnp.zeros((LANES, LANES))], 1)
      total = pltpu.roll(total, 0, 1, stride=1, stride_axis=0)
      grad_row[pl.ds(c, 1), :] = total.sum(0, keepdims=True)

    _channels(body)
