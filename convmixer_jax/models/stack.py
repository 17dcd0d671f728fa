"""Applies equal blocks in a row: unrolled, or as one scan."""

from collections.abc import Callable
import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# The names in jax.checkpoint_policies that a model's `remat` accepts.
REMAT_POLICIES = ("nothing_saveable",)


def apply_blocks(
  module: nn.Module,
  make_block: Callable[..., nn.Module],
  depth: int,
  x: jax.Array,
  train: bool,
  *,
  num_blocks: int | None = None,
  noise: Any = None,
) -> jax.Array:
  """Applies blocks one after the other; called in `module`'s compact method.

  Args:
    module: the model. Its submodules are block_0, block_1, ..., or if
      `module.scan` a single one, `blocks`, with all variables stacked along a
      leading axis and applied by `nn.scan`. Both start with the same values.
      With `module.remat`, the backward pass recomputes each block.
    make_block: a `functools.partial` of the class; blocks are called
      (x, train), or with `noise` (x, train, noise of the block).
    depth: number of blocks.
    x: input of the first block; every block returns the same shape.
    train: argument of every call.
    num_blocks: apply only this number of blocks, 0 to `depth`; None is all.
    noise: a pytree of arrays [depth, ...], or None; see `tokens.noise`.

  Returns:
    The last block's result.

  Raises:
    ValueError: num_blocks is out of range.
  """
  if module.remat is not None:
    make_block = functools.partial(
      nn.remat(
        make_block.func,
        policy=getattr(jax.checkpoint_policies, module.remat),
        prevent_cse=not module.scan,
        static_argnums=(2,),
      ),
      *make_block.args,
      **make_block.keywords,
    )

  if num_blocks is not None and not 0 <= num_blocks <= depth:
    raise ValueError(f"num_blocks={num_blocks}: must be from 0 to {depth}")

  extra = () if noise is None else (noise,)

  def unrolled(module, x, count):
    for i in range(count):
      block = make_block(parent=module, name=f"block_{i}")
      x = block(x, train, *jax.tree.map(operator.itemgetter(i), extra))
    return x

  if not module.scan:
    return unrolled(module, x, depth if num_blocks is None else num_blocks)
  if module.is_initializing():
    return nn.map_variables(
      unrolled,
      ("params", "batch_stats"),
      trans_in_fn=unstack_blocks,
      trans_out_fn=stack_blocks,
      init=True,
    )(module, x, depth)

  def body(block, x, i, *extra):
    y = block(x, train, *extra)
    if num_blocks is not None:
      y = jnp.where(i < num_blocks, y, x)
    return y, None

  scanned = nn.scan(
    body, variable_axes={"params": 0, "batch_stats": 0}, length=depth
  )
  block = make_block(name="blocks")
  return scanned(block, x, jnp.arange(depth), *extra)[0]


def stack_blocks(tree: Any) -> Any:
  """Renames an unrolled model's block_0, block_1, ... to a scanned `blocks`.

  Args:
    tree: any pytree with variables in it: a model's, an optimiser's, a train
      state's. A part without blocks is not changed.
  """
  unrolled = lambda node: isinstance(node, dict) and "block_0" in node

  def stack(node):
    if not unrolled(node):
      return node
    rest = {k: v for k, v in node.items() if not k.startswith("block_")}
    blocks = [node[f"block_{i}"] for i in range(len(node) - len(rest))]
    return rest | {"blocks": jax.tree.map(_stack, *blocks)}

  return jax.tree.map(stack, tree, is_leaf=unrolled)


def _stack(*leaves):
  """numpy arrays stay on the host."""
  return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)


def unstack_blocks(tree: Any) -> Any:
  """The inverse of `stack_blocks`."""
  scanned = lambda node: isinstance(node, dict) and "blocks" in node

  def unstack(node):
    if not scanned(node):
      return node
    node = dict(node)
    blocks = node.pop("blocks")
    for i in range(len(jax.tree.leaves(blocks)[0])):
      node[f"block_{i}"] = jax.tree.map(operator.itemgetter(i), blocks)
    return node

  return jax.tree.map(unstack, tree, is_leaf=scanned)
