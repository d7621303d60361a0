"""Layers: attention, transformer blocks, convolutions, embeddings and quantizers."""
