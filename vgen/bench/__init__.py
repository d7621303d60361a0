"""Suites that measure and print tables: python -m vgen.bench SUITE."""
