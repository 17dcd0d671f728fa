"""The operations of ConvMixer: convolutions and BatchNorm."""

from convmixer_jax.ops.batch_norm import BatchNorm as BatchNorm
from convmixer_jax.ops.batch_norm import Convolution as Convolution
from convmixer_jax.ops.depthwise import depthwise_conv as depthwise_conv
from convmixer_jax.ops.native import chosen as chosen
from convmixer_jax.ops.native import portable as portable
from convmixer_jax.ops.normalize import ACTIVATIONS as ACTIVATIONS
from convmixer_jax.ops.normalize import AVERAGES as AVERAGES
from convmixer_jax.ops.normalize import STATISTICS as STATISTICS
from convmixer_jax.ops.partition import over as over
from convmixer_jax.ops.pointwise import pointwise_conv as pointwise_conv
