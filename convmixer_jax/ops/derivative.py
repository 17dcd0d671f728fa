"""Functions with derivatives of their own, in both modes and of any order."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp

Function = Callable[..., Any]


def varying(tree: Any) -> Any:
  """Makes all arrays vary over the same axes of `jax.shard_map`.

  Its types say over which axes a value differs between devices. JAX adds what
  is needed to its own operations' arguments, and to their gradients.
  """
  axes_of = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(axes_of, jax.tree.leaves(tree)))
  return jax.tree.map(
    lambda x: jax.lax.pcast(x, (*(axes - axes_of(x)),), to="varying"), tree
  )


def differentiable(
  function: Function,
  tangent: Function,
  backward: Function,
  keep: Function = lambda y: (),
  symbolic_zeros: bool = False,
) -> Function:
  """Gives a function derivatives of its own, in both modes, of any order.

  Like `jax.custom_vjp`, whose functions have no forward mode.

  Args:
    function: (static, *args) -> y. `static` can be hashed; args are arrays or
      None.
    tangent: (static, args, tangents of args) -> y's tangent.
    backward: (static, args, keep(y), gradient of y) -> gradients of args.
    keep: y -> what `backward` needs besides the args.
    symbolic_zeros: `backward` gets `ad.Zero` for a gradient that is zero.
  """
  function = jax.custom_jvp(function, nondiff_argnums=(0,))

  @function.defjvp
  def _(static, args, tangents):
    y = function(static, *args)
    known, known_tree = jax.tree.flatten((args, keep(y)))
    linear, linear_tree = jax.tree.flatten(tangents)
    leaves, tree = jax.tree.flatten(y)

    def apply(*flat):
      args, _ = known_tree.unflatten(flat[: len(known)])
      tangents = linear_tree.unflatten(flat[len(known) :])
      return jax.tree.leaves(tangent(static, args, tangents))

    def transpose(*flat):
      args, kept = known_tree.unflatten(flat[: len(known)])
      grads = flat[len(known) :]
      if not symbolic_zeros:
        grads = map(ad.instantiate_zeros, grads)
      grad = tree.unflatten(grads)
      return jax.tree.leaves(backward(static, args, kept, grad))

    results = _linear.bind(
      *known,
      *linear,
      apply=apply,
      transpose=transpose,
      avals=tuple(jax.typeof(leaf).to_tangent_aval() for leaf in leaves),
      count=len(known),
    )
    return y, tree.unflatten(results)

  return lambda static, *args: function(static, *varying(args))


def tangent_of(function: Function) -> Function:
  """The `tangent` of a function that JAX can differentiate."""
  return lambda static, *args: jax.jvp(
    functools.partial(function, static), *args
  )[1]


def with_derivatives_of(plain: Function, function: Function) -> Function:
  """`function`, which JAX then differentiates as `plain`, of equal results."""
  function = jax.custom_jvp(function)
  function.defjvp(
    lambda args, tangents: (
      function(*args),
      jax.jvp(plain, args, tangents)[1],
    )
  )
  return function


# The tangent of a `differentiable` function: apply(*args). It is linear in all
# but the first `count` arguments, and transpose(*first, *gradients of results)
# are the gradients of the others.
_linear = core.Primitive("linear")
_linear.multiple_results = True
_linear.def_impl(lambda *args, apply, **_: apply(*args))
_linear.def_abstract_eval(lambda *args, avals, **_: avals)
mlir.register_lowering(_linear, mlir.lower_fun(_linear.impl, True))


def _linear_jvp(args, tangents, *, apply, **_):
  return jax.jvp(apply, args, (*map(ad.instantiate_zeros, tangents),))


def _linear_transpose(grads, *args, transpose, count, **_):
  grads = transpose(*args[:count], *grads)
  unknown = map(ad.is_undefined_primal, args[count:])
  return [None] * count + [g if u else None for g, u in zip(grads, unknown)]


def _linear_batch(args, axes, *, apply, transpose, avals, count):
  (size,) = {a.shape[i] for a, i in zip(args, axes) if i is not None}
  args = list(args)
  for i in range(count, len(args)):
    args[i] = batching.bdim_at_front(args[i], axes[i], size)
  known = (*axes[:count],)
  axes = known + (0,) * (len(args) - count)
  mapped = jax.vmap(transpose, known + (0,) * len(avals))
  results = _linear.bind(
    *args,
    apply=jax.vmap(apply, axes),
    transpose=lambda *args: mapped(*map(ad.instantiate_zeros, args)),
    avals=tuple(a.update(shape=(size, *a.shape)) for a in avals),
    count=count,
  )
  return results, [0] * len(results)


ad.primitive_jvps[_linear] = _linear_jvp
ad.primitive_transposes[_linear] = _linear_transpose
batching.primitive_batchers[_linear] = _linear_batch


@jax.custom_jvp
def sums_in_one_pass(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Sums [B, C] of arrays [B, H, W, C], which XLA computes in one loop.

  JAX cannot differentiate such a `lax.reduce` in all ways.
  """
  zeros = [jnp.zeros((), a.dtype) for a in arrays]
  add = lambda a, b: tuple(map(jnp.add, a, b))
  return tuple(lax.reduce(arrays, tuple(zeros), add, (1, 2)))


@sums_in_one_pass.defjvp
def _(args, dots):
  return sums_in_one_pass(*args), tuple(dot.sum((1, 2)) for dot in dots)
