"""Pallas kernels of `tpu`.

A block is 128 channels of a few images, with channels in the lanes, as the
network has them. There are three parts of work on it:

1. transpose each pixel, [(group, image), channel], to [channel, ...],
2. collect the pixels of each channel by loads with a stride, and multiply,
3. transpose the results back.

A step of the grid does each part for another block, at the same time: they use
different units of the core. bfloat16 is handled as words of two pixels. The
bands are built once per channel, from a row that each next row repeats, shifted
by a lane.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from convmixer_jax.ops.tpu_blocks import Blocks
from convmixer_jax.ops.tpu_blocks import LANES
from convmixer_jax.ops.tpu_blocks import WORD

# --- Parts of the kernels. `words` scratch is [16, words * 8, lanes]: channel
# 8 i + j has word w in [i, 8 w + j], so that a stride of 8 collects its words.
# There are two of them, which take turns: parts 1 and 3 use one, part 2 uses
# the other.


def _bits(x):
  return pltpu.bitcast(x.astype(jnp.float32), WORD)


def _places(i, at: Blocks):
  """Row and column of each pixel of word i, in every group."""
  i = i * at.per_word
  line = lax.shift_right_logical(i, at.row.bit_length() - 1)
  column = i & (at.row - 1)
  lines = [group * at.rows + line for group in range(at.groups)]
  return [[(y, column + n) for y in lines] for n in range(at.per_word)]


def _for(count, body, unroll=1):
  lax.fori_loop(0, count, lambda i, _: body(i), None, unroll=unroll)


def _load(i, source, words, at: Blocks, reverse=False):
  """Transposes word i to channels; `reverse` reverses the pixels of a group."""
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


def _store(i, words, target, at: Blocks):
  """Transposes word i to images."""
  rows = pl.ds(pl.multiple_of(8 * i, 8), 8)
  word = words[:, rows, :].reshape(LANES, at.lanes).T
  pixels = [word] if at.per_word == 1 else [word << 16, word & WORD(0xFFFF0000)]
  for pixel, places in zip(pixels, _places(i, at)):
    pixel = pltpu.bitcast(pixel, jnp.float32)
    pixel = pixel.reshape(at.groups, at.images, LANES)
    for group, place in enumerate(places):
      target[place] = pixel[group].astype(at.dtype)


def _is_first(at: Blocks):
  """Whether the block of part 2 is the first of its channels."""
  return lax.rem(pl.program_id(0) - 1, at.per_channels) == 0


def _run(at: Blocks, load, begin, channel, end, store):
  """A step of the grid, t: part 1 of block t, 2 of t - 1, and 3 of t - 2.

  load(i, turn) and store(i, turn) are parts 1 and 3 of word i, the store first;
  channel(c, of, turn) is part 2, and of(words) is the channel in them. `turn`
  is which of the two scratch arrays they use. `begin` and `end` are called
  before and after the blocks of 128 channels.

  The first step only loads, and the last one only stores. The second one stores
  what nobody has written, to where the third one stores the first block; the
  last but one loads a block again. Neither reaches a result.
  """
  t = pl.program_id(0)
  computes = (t > 0) & (t <= at.blocks)

  @pl.when(computes & _is_first(at))
  def _():
    begin()

  def all_three(turn):
    each = at.words // (LANES // 2)  # Words for two channels.

    def sixteen(i):
      for pair in range(8):
        for j in (2 * pair, 2 * pair + 1):
          eight, j = 2 * i + j // 8, j % 8
          c = pl.multiple_of(8 * eight, 8) + j
          channel(c, functools.partial(_channel, eight, j), 1 - turn)
        for n in range(each):
          word = (8 * i + pair) * each + n
          store(word, turn)
          load(word, turn)

    _for(LANES // 16, sixteen)

  lax.switch(
    jnp.where(t == 0, 2, jnp.where(computes, lax.rem(t, 2), 3)),
    [
      lambda: all_three(0),
      lambda: all_three(1),
      lambda: _for(at.words, lambda i: load(i, 0), 16),
      lambda: _for(at.words, lambda i: store(i, (at.blocks + 1) % 2), 16),
    ],
  )

  @pl.when(computes & (lax.rem(t, at.per_channels) == 0))
  def _():
    end()


def _build_bands(first_rows, mask, bands, at: Blocks):
  length = first_rows.shape[1]

  def body(c):
    row = jnp.broadcast_to(first_rows[pl.ds(c, 1), :], (at.words, length))
    row = pltpu.roll(row, length - LANES, 1, stride=at.per_word, stride_axis=0)
    bands[c] = row[:, : at.window] & mask[...]

  _channels(body)


def _channels(body):
  """Calls body(c) for each channel."""

  def eight(i):
    for j in range(8):
      body(pl.multiple_of(8 * i, 8) + j)

  _for(LANES // 8, eight)


def _channel(i, j, words):
  return words.at[i, pl.ds(j, words.shape[1] // 8, stride=8), :]


def _windows(words, at: Blocks):
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


def _dot(a, b, contracted, at: Blocks):
  precision = lax.Precision.HIGHEST if at.per_word == 1 else None
  return lax.dot_general(
    a,
    b,
    (contracted, ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _moments(a, inside):
  """Mean of a group, and sum of squared differences from it: [1, lanes]."""
  count = float(LANES)
  centred = a - a[:1]  # Around the first value, in one pass.
  if inside is not None:
    count = jnp.maximum(inside[...].sum(0, keepdims=True), 1)
    centred *= inside[...]
  first = centred.sum(0, keepdims=True)
  second = (centred * centred).sum(0, keepdims=True)
  mean = first / count
  return a[:1] + mean, second - first * mean


# --- Activations: t -> value and slope.


# Of arctanh(erf(t / sqrt(2))) / t, by powers of t^2, fitted to the least error
# of GELU: 1.2e-5, and in float32 7e-8.
_ERF = {
  2: (0.797691107, 3.67292275e-2, -2.54499362e-4, -8.66633285e-6),
  1: (
    0.797884216,
    3.63342835e-2,
    -3.31299763e-5,
    -5.52401643e-5,
    3.96911030e-6,
    -1.33446463e-7,
    1.80561765e-9,
  ),
}


def gelu(t: jax.Array, at: Blocks) -> tuple[jax.Array, jax.Array]:
  """Value and slope of GELU, float32; `at` knows how exact they have to be."""
  square = t * t
  limited = jnp.minimum(square, 30)  # From there on, tanh is 1.
  total, *rest = reversed(_ERF[at.per_word])
  for c in rest:
    total = total * limited + c
  below = 0.5 + 0.5 * jnp.tanh(t * total)
  density = jnp.exp2(square * (-0.5 / math.log(2)))
  slope = below + t * density * (1 / math.sqrt(2 * math.pi))
  return t * below, slope


ACTIVATIONS = {
  "identity": lambda t, at: (t, jnp.ones_like(t)),
  "relu": lambda t, at: (jnp.maximum(t, 0), (t > 0).astype(t.dtype)),
  "gelu": gelu,
}


# --- The kernels.


def forward(*refs, at: Blocks, activation):
  """y, and if there is an activation, `_moments` of activation(y + bias)."""
  refs = iter(refs)
  take = lambda n: [next(refs) for _ in range(n)]
  first_rows, mask, x = take(3)
  (bias,) = take(1) if activation else (None,)
  inside = None
  if activation and not at.is_whole:
    (inside,) = take(1)
  (y,) = take(1)
  mean, squares = take(2) if activation else (None, None)
  words, (bands,) = take(2), refs

  def channel(c, of, turn):
    words_of = of(words[turn])
    band = pltpu.bitcast(bands[c], at.dtype)
    window = _windows(words_of[...], at)
    result = _dot(band, window, ((1,), (0,)), at).astype(at.dtype)
    words_of[...] = pltpu.bitcast(result, WORD)
    if activation:
      t = result.astype(jnp.float32) + bias[pl.ds(c, 1), :]
      a, _ = ACTIVATIONS[activation](t, at)
      average, square = _moments(a, inside)
      mean[pl.ds(c, 1), :] = average
      squares[pl.ds(c, 1), :] = square

  _run(
    at,
    load=lambda i, turn: _load(i, x, words[turn], at),
    begin=lambda: _build_bands(first_rows, mask, bands, at),
    channel=channel,
    end=lambda: None,
    store=lambda i, turn: _store(i, words[turn], y, at),
  )


def backward(*refs, at: Blocks, activation, residual):
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
  grad_words, x_words, (bands, sums) = take(2), take(2), take(2)
  y_words = take(2) if activation else None
  is_first = _is_first(at)

  def load(i, turn):
    _load(i, grad, grad_words[turn], at)
    _load(i, x, x_words[turn], at, reverse=True)
    if activation:
      _load(i, y, y_words[turn], at)

  def channel(c, of, turn):
    words = of(grad_words[turn])
    wide = lambda words: pltpu.bitcast(words, at.dtype).astype(jnp.float32)
    g = after = words[...]
    if activation:
      row = lambda values: values[pl.ds(c, 1), :]
      t = wide(of(y_words[turn])[...]) + row(bias)
      a, slope = ACTIVATIONS[activation](t, at)
      g = (wide(after) * row(p) + a * row(q) + row(r)) * slope
      if inside is not None:
        g *= inside[...]
      grad_bias[pl.ds(c, 1), :] = g.sum(0, keepdims=True)
      g = pltpu.bitcast(g.astype(at.dtype), WORD)
    window = _windows(g, at)
    band = pltpu.bitcast(bands[c], at.dtype)
    result = _dot(band, window, ((1,), (0,)), at)
    if residual:
      result += wide(after)
    words[...] = pltpu.bitcast(result.astype(at.dtype), WORD)
    pixels = pltpu.bitcast(of(x_words[turn])[...], at.dtype)
    products = _dot(pixels, window, ((1,), (1,)), at)
    sums[c] = products + jnp.where(is_first, 0.0, sums[c])

  def sum_diagonals(c):
    total = sums[c] * reversed_mask[...]
    total = jnp.concatenate([total, jnp.zeros((LANES, LANES))], 1)
    total = pltpu.roll(total, 0, 1, stride=1, stride_axis=0)
    grad_row[pl.ds(c, 1), :] = total.sum(0, keepdims=True)

  _run(
    at,
    load=load,
    begin=lambda: _build_bands(first_rows, mask, bands, at),
    channel=channel,
    end=lambda: _channels(sum_diagonals),
    store=lambda i, turn: _store(i, grad_words[turn], grad_x, at),
  )
