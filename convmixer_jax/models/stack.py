"""Equal blocks in a row: so many modules, or one that is scanned."""

from collections.abc import Callable
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

REMAT_POLICIES = ("nothing_saveable",)


def rematerialized(block: type[nn.Module], policy: str, scan: bool) -> Any:
  """`block`, called (x, train), whose backward pass computes it again.

  Args:
    block: a class.
    policy: what is kept for the backward pass; one of `REMAT_POLICIES`.
    scan: whether it will be scanned.
  """
  saveable = getattr(jax.checkpoint_policies, policy)
  return nn.remat(
    block, policy=saveable, prevent_cse=not scan, static_argnums=(2,)
  )


def apply_blocks(
  module: nn.Module,
  block: Callable[..., nn.Module],
  depth: int,
  x: jax.Array,
  train: bool,
  *,
  scan: bool,
  num_blocks: int | None = None,
) -> jax.Array:
  """Applies blocks one after the other; of `module`'s compact method.

  Args:
    module: whose submodules they are: block_0, block_1, ..., or with `scan`
      one, `blocks`, with their variables stacked along a leading axis. They
      start with the same values.
    block: makes one, from linen's `name` and `parent`.
    depth: how many `module` has.
    x: [B, H, W, C], like what each returns.
    train: of each one's call.
    scan: compile one, and run it `depth` times.
    num_blocks: apply only so many of them, 0 to `depth`; None is all.

  Returns:
    [B, H, W, C], what the last one returned.
  """

  def unrolled(module, x, count):
    for i in range(count):
      x = block(parent=module, name=f"block_{i}")(x, train)
    return x

  if not scan:
    return unrolled(module, x, depth if num_blocks is None else num_blocks)
  if module.is_initializing():
    return nn.map_variables(
      unrolled,
      ("params", "batch_stats"),
      trans_in_fn=unstack_blocks,
      trans_out_fn=stack_blocks,
      init=True,
    )(module, x, depth)

  def body(block, x, i):
    y = block(x, train)
    if num_blocks is not None:
      y = jnp.where(i < num_blocks, y, x)
    return y, None

  scanned = nn.scan(
    body, variable_axes={"params": 0, "batch_stats": 0}, length=depth
  )
  return scanned(block(name="blocks"), x, jnp.arange(depth))[0]


def stack_blocks(tree: Any) -> Any:
  """An unrolled model's block_0, block_1, ... to a scanned one's `blocks`.

  Args:
    tree: any pytree with variables in it: a model's, an optimiser's, a train
      state's. What has no blocks stays as it is.
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
  """Leaves numpy's arrays on the host."""
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
