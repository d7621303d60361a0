"""Discrete tokens: mask schedules and token samplers for the one sampling loop."""
