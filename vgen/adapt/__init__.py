"""Adapters: changes of weights as data, each an `Adapter` of two functions, and `stack`, which joins several."""
