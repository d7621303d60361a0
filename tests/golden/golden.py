"""Golden test vectors: data files (.npz) with inputs and outputs of reference networks on random weights.

Only numpy is needed.  A file holds no weights: they are drawn again from a seed by the recipe named in its `meta`
(see `draw`) and checked against a stored SHA-256.  Typical use, from a test of a re-implementation:

    import golden
    g = golden.load("dit_xl_style")          # dict: meta, weights, inputs, outputs, mid
    y = my_network(convert(g["weights"]), **g["inputs"])
    golden.check(g, "y", y)                  # raises AssertionError with the measured error

Array conventions are those of the reference (PyTorch: NCHW, Linear weight [out, in]; cases whose meta["framework"] is
"flax": NHWC, kernel [in, out]).  `outputs` and `mid` may be stored as a strided part of the full array; `check`
applies the same slices to the array it is given and also compares mean and RMS of the whole.

    python golden.py            # self-check of every file beside this module
"""

import glob
import hashlib
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
F32 = np.float32


def draw(rng, name, shape, kind, recipe):
    """One weight array.  Recipe 'r1': standard normal in float32, then

    running_var -> |x|/2 + 1/2;  rank<=1 named weight|gamma|g|scale -> 1 + x/10;  any other rank<=1 -> x/10;
    rank>=2 -> x / sqrt(prod(shape[1:])).  'r1k' (Flax) differs only for rank>=2 arrays named `kernel`: the product is
    over shape[:-1], or shape[:1] for those of query, key and value.  Arrays are drawn in the order of meta["params"].
    """
    parts = name.replace("/", ".").split(".")
    last = parts[-1]
    x = np.asarray(rng.standard_normal(tuple(shape)), dtype=F32)
    if last == "running_var":
        return np.abs(x) * F32(0.5) + F32(0.5)
    if len(shape) <= 1:
        return F32(1) + F32(0.1) * x if last in ("weight", "gamma", "g", "scale") else F32(0.1) * x
    dims = shape[1:]
    if recipe == "r1k" and last == "kernel":
        dims = shape[:1] if parts[-2] in ("query", "key", "value") else shape[:-1]
    return x / F32(max(int(np.prod(dims)), 1) ** 0.5)


def digest(arrays):
    h = hashlib.sha256()
    for a in arrays:
        a = np.ascontiguousarray(a)
        h.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return h.hexdigest()


def make_weights(meta, consts=None):
    """All arrays of the state dict, in order.  Kinds: param, stat (drawn); param_const (drawn, then replaced by a
    stored array); const (stored); const_omitted (a table the implementation computes itself; absent here);
    ignored (counters and the like; absent here)."""
    rng, out, consts = np.random.default_rng(meta["seed"]), {}, consts or {}
    for name, shape, kind in meta["params"]:
        if kind in ("param", "stat", "param_const"):
            out[name] = np.asarray(draw(rng, name, shape, kind, meta["recipe"]), dtype=F32).reshape(shape)
        if kind in ("const", "param_const"):
            out[name] = consts[name]
    return out


def make_input(spec):
    """Inputs too large to store: x = offset + scale * default_rng(seed).standard_normal(shape), in float32."""
    kind, seed, scale, offset = spec["gen"]
    assert kind == "normal", kind
    x = np.random.default_rng(seed).standard_normal(tuple(spec["shape"])).astype(F32)
    return x * F32(scale) + F32(offset)


def path(case, root=None):
    return os.path.join(root or HERE, case + ".npz")


def cases(root=None):
    return sorted(os.path.basename(p)[:-4] for p in glob.glob(os.path.join(root or HERE, "*.npz")))


def load(case, root=None, verify=True, with_weights=True):
    with np.load(path(case, root), allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files if k != "meta"}
        meta = json.loads(str(z["meta"]))
    group = lambda p: {k[len(p) :]: v for k, v in arrays.items() if k.startswith(p)}
    consts, inputs = group("const/"), group("in/")
    for k, spec in meta["inputs"].items():
        if k not in inputs:
            inputs[k] = make_input(spec)
    inputs = {k: inputs[k] for k in meta["inputs"]}
    weights = make_weights(meta, consts) if with_weights else {}
    if verify:
        for k, spec in meta["inputs"].items():
            assert digest([inputs[k]]) == spec["sha256"], f"{case}: input {k} differs from the one used"
        if with_weights:
            assert digest(weights.values()) == meta["weights_sha256"], f"{case}: weights differ from those used"
    return dict(meta=meta, weights=weights, inputs=inputs, outputs=group("out/"), mid=group("mid/"))


def cut(full, slices):
    full = np.asarray(full)
    return full if slices is None else full[tuple(slice(*s) for s in slices)]


def rel_error(got, ref, steps=False):
    """max |got - ref| / max |ref|; with `steps`, the largest such ratio over the entries of axis 0, each with its own
    scale."""
    got, ref = np.asarray(got, np.float64), np.asarray(ref, np.float64)
    if not ref.size:
        return 0.0
    if steps and ref.ndim:
        return max(rel_error(g, r) for g, r in zip(got, ref))
    return float(np.abs(got - ref).max()) / max(float(np.abs(ref).max()), 1e-30)


def compare(gold, key, full):
    """dict(rel, stat, shape_ok): `rel` = rel_error on the stored part; `stat` = error of the mean and RMS of the whole
    array relative to its RMS (integers: rel = share of unequal entries)."""
    group = "outputs" if key in gold["outputs"] else "mid"
    info, ref, full = gold["meta"][group][key], gold[group][key], np.asarray(full)
    if list(full.shape) != list(info["shape"]):
        return dict(rel=np.inf, stat=np.inf, shape_ok=False, got=full.shape, want=info["shape"])
    got = cut(full, info["slices"])
    if ref.dtype.kind in "iub":
        return dict(rel=float(np.mean(got != ref)) if ref.size else 0.0, stat=0.0, shape_ok=True)
    full, rel = full.astype(np.float64), rel_error(got, ref, info.get("steps", False))
    rms = max(info["rms"], 1e-30)
    drift = max(abs(full.mean() - info["mean"]), abs(np.sqrt((full**2).mean()) - info["rms"])) if full.size else 0.0
    stat = drift / rms
    return dict(rel=rel, stat=float(stat), shape_ok=True)


def check(gold, key, full, tol=None, dtype="float32"):
    """Assert agreement.  Default tolerance: the array's own `tol32` for a float32 candidate, else
    meta["tolerance"][dtype]; `dtype` is the arithmetic of the candidate.  Integers must match exactly."""
    m = gold["meta"]
    info = {**m["mid"], **m["outputs"]}[key]
    if tol is None:
        tol = info.get("tol32", m["tolerance"][dtype]) if dtype == "float32" else m["tolerance"][dtype]
        tol = tol if np.dtype(info["dtype"]).kind == "f" else 0.0
    r = compare(gold, key, full)
    assert r["shape_ok"] and r["rel"] <= tol and r["stat"] <= tol, f"{gold['meta']['case']}/{key}: {r} > {tol}"
    return r


def main():
    bad = 0
    for c in cases():
        try:
            g = load(c)
            m = g["meta"]
            for group in ("outputs", "mid"):
                for k, info in m[group].items():
                    a = g[group][k]
                    assert np.isfinite(a).all(), f"{k} not finite"
                    want = cut(np.broadcast_to(np.int8(0), info["shape"]), info["slices"]).shape
                    assert tuple(a.shape) == tuple(want), f"{k}: stored {a.shape}, slices give {want}"
            n = sum(int(w.size) for w in g["weights"].values())
            print(
                f"ok   {c:34s} {m['precision']:8s} {os.path.getsize(path(c)):>7,d} B {n:>11,d} weights"
                f"  out: {', '.join(m['outputs'])}",
                flush=True,
            )
        except Exception as e:
            bad += 1
            print(f"FAIL {c:34s} {type(e).__name__}: {e}", flush=True)
    print(f"{len(cases()) - bad} ok, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
