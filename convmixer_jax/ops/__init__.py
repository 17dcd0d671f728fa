"""The operations that ConvMixer is made of."""

from convmixer_jax.ops.batch_norm import BatchNorm as BatchNorm
from convmixer_jax.ops.depthwise import depthwise_conv as depthwise_conv
