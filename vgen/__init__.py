"""vgen: visual generation in JAX and Flax, one training loop and one sampling loop."""

__version__ = "0.1.0"
