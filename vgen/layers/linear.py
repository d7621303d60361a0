"""The dense layer that transformers are made of."""

from collections.abc import Callable

import flax.linen as nn
import jax


def linear(features: int, **kwargs) -> Callable[[jax.Array], jax.Array]:
    """flax's Dense with the given arguments, computed on [rows, features] whatever the leading axes of its input are.

    The same numbers and parameters (kernel, bias).  With one leading axis the gradient of the kernel contracts a single
    axis: XLA's CPU backend does that with a fast matrix product and two axes without (an MLP's step took 2.6 times as
    long); accelerators are indifferent.
    """
    layer = nn.Dense(features, **kwargs)
    return lambda x: layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)
