"""A network of two layers that reads everything that diffusion tells one, for tests that compile whole trainings."""

import flax.linen as nn
import jax.numpy as jnp


class Net(nn.Module):
    """x + what the time, the texts where their mask is true, and the numbers say, by a convolution.

    added: whether it is told SDXL's pooled text and numbers.
    """

    channels: int = 4
    added: bool = False

    @nn.compact
    def __call__(self, x, t, *, context, context_mask=None, added=None, train=False, control=None, step=None):
        weight = jnp.ones(context.shape[:2]) if context_mask is None else context_mask.astype(jnp.float32)
        text = (context * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
        said = [text, t[:, None] / 1000]
        if self.added:
            said += [added[1] / 100] + ([] if added[0] is None else [added[0]])
        told = nn.Dense(self.channels, name="told")(jnp.concatenate(said, -1))
        return nn.Conv(self.channels, (3, 3), name="conv")(x + told[:, None, None])
