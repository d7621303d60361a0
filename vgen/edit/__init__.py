"""Editing methods, one file each; every one returns an `Edit` for the one sampling loop."""
