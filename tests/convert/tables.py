"""What the tests of conversion tables share: import, export and comparison of one layout on random weights."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.conftest import quick_compilation
from vgen.convert import families, rules
from vgen.convert.sources import Source


@pytest.fixture
def quick():
    """Less optimised programs: they are compiled sooner than these small networks run."""
    with quick_compilation():
        yield


def draw(module, *args, **kwargs):
    """Parameters of a network or a task, drawn by numpy in the shapes of init.

    Compiling the initialisers would take longer than the tests.
    """
    rng = np.random.default_rng(0)

    def one(path, leaf):
        scale = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        x = rng.standard_normal(leaf.shape) * scale
        return np.asarray(np.abs(x) + 1 if path[-1].key in ("scale", "var") else x, leaf.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
    return jax.tree_util.tree_map_with_path(one, shapes.get("params", shapes))


def shapes_of(family, module):
    """{path: shape} of all parameters of a module."""
    inputs = family.inputs(module, np.random.default_rng(0))
    made = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
    return flatten_dict(made, sep="/")


def load(family, state, config=None):
    """(module, params) of a checkpoint {name: array}, by the family's own sizes and table."""
    module = family.build(config or {}, {k: v.shape for k, v in state.items()})
    table, shapes = family.table(module), shapes_of(family, module)
    rules.prepare(state, table, shapes)  # what `vgen.load` does first, of which it is not told the values
    flat = rules.load(state.__getitem__, state, table, shapes)
    return module, unflatten_dict(flat, sep="/")


def found(state, config=None):
    """The family that a checkpoint of these names is given to."""
    return families.get(families.find(Source(Path("checkpoint"), state, config or {})))


def export(family, module, params):
    """{name: array} of a parameter tree."""
    return rules.export(flatten_dict(params, sep="/"), family.table(module))


def check_round_trip(family, state, config=None, lost=()):
    """In and out again gives the same names and bits, but for the names that the table ignores; those are `lost`."""
    module, params = load(family, state, config)
    out = export(family, module, params)
    assert set(out) == set(state) - set(lost)
    for name, array in out.items():
        assert array.dtype == state[name].dtype
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    return module, params


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, given):
    """A network's outputs; compiled once for equal modules."""
    return module.apply({"params": params}, **given)


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def error(got, want):
    """Largest difference, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return np.abs(got - want).max() / np.abs(want).max()


def randomize(model, seed=0):
    """Every parameter and norm statistic of a torch module drawn anew, in evaluation mode and float64."""
    import torch

    rng = np.random.default_rng(seed)
    model = model.double().eval()
    statistics = [(k, v) for k, v in model.named_buffers() if k.endswith(("running_mean", "running_var"))]
    for name, p in [*model.named_parameters(), *statistics]:
        if p.is_floating_point():
            x = rng.standard_normal(tuple(p.shape))
            if name.endswith("running_var"):
                x = np.abs(x) / 2 + 0.5
            elif p.ndim <= 1:
                x = x / 10 + name.endswith(("weight", "gamma"))
            else:
                x = x / np.prod(p.shape[1:]) ** 0.5
            # float32 values, so that a checkpoint of either precision holds the same weights
            p.data.copy_(torch.from_numpy(np.asarray(x, np.float32)))
    return model


def check_gradients(got, model, tol, zero=()):
    """Gradients {name: array} against those of a torch module, each relative to its own size.

    zero: endings of names whose gradient is zero but for rounding (a bias of all keys does not change a softmax).
    """
    wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(np.abs(want).max() for want in wanted.values())
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        if name.endswith(zero) if zero else False:
            assert max(np.abs(got[name]).max(), np.abs(want).max()) <= tol * largest, name
        else:
            assert error(got[name], want) <= tol, (name, error(got[name], want))


def check_gradient_tree(got, family, module, model, tol, zero=()):
    """As check_gradients, by vgen's paths: for a torch module whose live names the table renames."""
    grads = {k: p.grad.numpy() if p.grad is not None else p.detach().numpy() for k, p in model.named_parameters()}
    wanted = rules.load(grads.__getitem__, grads, family.table(module), shapes_of(family, module))
    got = flatten_dict(got, sep="/")
    largest = max(np.abs(want).max() for want in wanted.values())
    assert set(got) == set(wanted)
    for path, want in wanted.items():
        if path.endswith(tuple(zero)):
            assert max(np.abs(got[path]).max(), np.abs(want).max()) <= tol * largest, path
        else:
            assert error(got[path], want) <= tol, (path, error(got[path], want))


def check_folder(family, model, folder, name="diffusion_pytorch_model.safetensors"):
    """What is exported is what diffusers (or transformers: name="model.safetensors") saved, and it makes the same
    network of it."""
    from safetensors.numpy import load_file, save_file

    model.float().save_pretrained(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        module, params = check_round_trip(family, load_file(folder / name), config)
        assert found({}, config) is found({}, family.config(module)) is family
        back = folder / "back"
        back.mkdir()
        save_file(export(family, module, params), back / name, metadata={"format": "pt"})
        (back / "config.json").write_text(json.dumps(family.config(module)))
        again, info = type(model).from_pretrained(back, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        inputs = family.inputs(module, np.random.default_rng(0))
        for a, b in zip(*(family.compare(m, inputs).values() for m in (model, again)), strict=True):
            np.testing.assert_array_equal(a, b)
        return again
    finally:
        model.double()


def write_msgpack(path, weights):
    """The Flax tree of {path: array} as flax.serialization writes it; returns the path."""
    from flax.serialization import to_bytes

    path.write_bytes(to_bytes(unflatten_dict(weights, sep="/")))
    return path


def state_of(model):
    """The state dict of a torch module as numpy arrays, float32."""
    return {k: v.float().numpy() if v.is_floating_point() else v.numpy() for k, v in model.state_dict().items()}
