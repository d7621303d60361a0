"""Objectives: networks plus losses, handed to the one training loop."""
