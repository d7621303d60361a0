"""Data: sources, the embedded world of scenes, image operations, text tokenizers and the input pipeline."""
