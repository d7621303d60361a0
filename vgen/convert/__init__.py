"""Published checkpoints in and out: rule tables per family, file formats, and the engine that applies them."""
