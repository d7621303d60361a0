"""safetensors, .npz and msgpack: read as their libraries read them; damaged and hostile ones are refused."""

import io
import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.convert.files import ARRAYS, RNG, Evil, mutated, refused, safetensors, same
from vgen.config import UserError
from vgen.convert import sources

# ------------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_as_the_library_reads_and_writes_it(tmp_path):
    from safetensors.flax import load_file
    from safetensors.numpy import save_file

    same(
        {name: np.asarray(a) for name, a in load_file(safetensors(tmp_path / "a.safetensors")).items()}
        | {"b.count": ARRAYS["b.count"]}
    )  # fmt: skip  (without x64 that reader makes it int32)
    same(sources.read_weights(tmp_path / "a.safetensors"))
    plain = {name: a for name, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16}
    save_file(plain, tmp_path / "b.safetensors")
    same(sources.read_weights(tmp_path / "b.safetensors"), plain)
    save_file({}, tmp_path / "none.safetensors")
    assert sources.read_weights(tmp_path / "none.safetensors") == {}


def test_arrays_are_read_when_asked_for(tmp_path):
    tensors = sources.open_file(safetensors(tmp_path / "a.safetensors"))
    assert tensors["a.weight"].shape == (3, 4) and tensors["a.half"].nbytes == 10
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-4])  # after it was opened
    order = [name for name in tensors if tensors[name].nbytes]
    tensors[order[0]].read()
    with pytest.raises(UserError, match="ends in the middle of an array"):
        tensors[order[-1]].read()


def header(entries, data=b"", raw=None):
    text = json.dumps(entries).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets), **more)


EIGHT = bytes(8)
BAD_HEADERS = {
    "empty": (b"", "cut off"),
    "short": (b"\x08\0\0", "cut off"),
    "length beyond the end": (struct.pack("<Q", 1 << 40) + b"{}", "cut off"),
    "length of all ones": (b"\xff" * 8 + b"{}", "cut off"),
    "not utf-8": (header(None, raw=b'{"\xff\xfe": 1}'), "JSON"),
    "not json": (header(None, raw=b"{'a': 1}"), "JSON"),
    "a list": (header([]), "does not begin"),
    "nested deeply": (header(None, raw=b'{"a":' + b"[" * 200_000), "JSON"),
    "a name twice": (header(None, EIGHT, b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "'a' stands"),
    "a key twice": (header(None, EIGHT, b'{"a":{"dtype":"F32","dtype":"F64","shape":[],"data_offsets":[]}}'), "twice"),
    "no offsets": (header({"a": dict(dtype="F32", shape=[2])}, EIGHT), "must hold dtype"),
    "more keys": (header({"a": entry(file="/etc/passwd")}, EIGHT), "must hold dtype"),
    "unknown dtype": (header({"a": entry("F31")}, EIGHT), "unknown dtype 'F31'"),
    "dtype a list": (header({"a": entry(["F32"])}, EIGHT), "unknown dtype"),
    "negative shape": (header({"a": entry(shape=(-2, -1))}, EIGHT), "natural numbers"),
    "float shape": (header({"a": entry(shape=(2.0,))}, EIGHT), "natural numbers"),
    "boolean shape": (header({"a": entry(shape=(True, 2))}, EIGHT), "natural numbers"),
    "too many axes": (header({"a": entry(shape=(1,) * 33 + (2,))}, EIGHT), "at most 32"),
    "product wraps to 8 bytes": (header({"a": entry(shape=(2**62, 4, 2))}, EIGHT), "data_offsets [0, 8] say 8"),
    "a shape too large": (header({"a": entry(shape=(3,))}, EIGHT), "takes 12 bytes"),
    "offsets reversed": (header({"a": entry(offsets=(8, 0))}, EIGHT), "say -8"),
    "one offset": (header({"a": entry(offsets=(8,))}, EIGHT), "two natural numbers"),
    "negative offset": (header({"a": entry(offsets=(-8, 0))}, EIGHT), "two natural numbers"),
    "beyond the end": (header({"a": entry(offsets=(0, 8))}, EIGHT[:7]), "speaks of 8 bytes"),
    "more than it says": (header({"a": entry()}, EIGHT + b"x"), "speaks of 8 bytes of arrays, the file has 9"),
    "overlap": (header({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT * 2), "begins at byte 4"),
    "the same place": (header({"a": entry(), "b": entry()}, EIGHT), "begins at byte 0"),
    "a hole": (header({"a": entry(), "b": entry(offsets=(9, 17))}, EIGHT * 3), "begins at byte 9"),
    "metadata not strings": (header({"__metadata__": {"a": 1}, "a": entry()}, EIGHT), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_headers_that_lie(case, tmp_path):
    data, message = BAD_HEADERS[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.safetensors", "x.safetensors", message)


def test_fuzzed_safetensors_are_read_as_the_library_reads_them_or_refused(tmp_path):
    """Whatever stands in the file, nothing but a UserError comes out, and what is let in the library lets in too."""
    from safetensors import safe_open

    rng, path = np.random.default_rng(1), tmp_path / "x.safetensors"
    good = safetensors(path).read_bytes()
    size = 8 + struct.unpack("<Q", good[:8])[0]
    taken = 0
    for _ in range(1500):
        path.write_bytes(mutated(good[:size], rng) + good[size:])
        try:
            got = sources.read_weights(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        taken += 1
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(got)
            for name, array in got.items():
                assert tuple(file.get_slice(name).get_shape()) == array.shape
                if array.dtype not in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
                    assert file.get_tensor(name).tobytes() == array.tobytes()
    assert taken > 20  # names may change, and metadata


# -------------------------------------------------------------------------------------------------- .npz and msgpack


def test_npz(tmp_path):
    plain = {name.replace(".", "/"): a for name, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16}
    plain["fortran"] = np.asfortranarray(RNG.normal(size=(3, 5)))
    np.savez(tmp_path / "a.npz", **plain, half=ARRAYS["a.half"].view("V2"), big=plain["fortran"].astype(">f8"))
    want = plain | {"half": ARRAYS["a.half"], "big": plain["fortran"]}
    for name, array in sources.read_weights(tmp_path / "a.npz").items():
        np.testing.assert_array_equal(array, want[name])
        assert array.dtype == want[name].dtype
    np.savez_compressed(tmp_path / "b.npz", **plain)
    assert set(sources.read_weights(tmp_path / "b.npz")) == set(plain)


def test_npz_with_pickles_lies_and_damage(tmp_path):
    np.savez(tmp_path / "evil.npz", a=np.array([Evil(tmp_path / "made")], dtype=object))
    refused(tmp_path / "evil.npz", "holds pickled objects")
    np.savez(tmp_path / "text.npz", a=np.array(["x"]))
    refused(tmp_path / "text.npz", "expected numbers")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="<f4", fortran_order=False, shape=(1 << 40,)))
    for name, members in dict(lies={"a.npy": buffer.getvalue()}, none={"a.npy": b"hello"}).items():
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    refused(tmp_path / "lies.npz", "says float32 (1099511627776,) but has 0 bytes")
    refused(tmp_path / "none.npz", "none.npz")
    np.savez(tmp_path / "good.npz", a=np.arange(100.0))
    good = (tmp_path / "good.npz").read_bytes()
    for size in range(0, len(good), 97):
        (tmp_path / "cut.npz").write_bytes(good[:size])
        refused(tmp_path / "cut.npz", "cut.npz")
    flipped = bytearray(good)
    flipped[300] ^= 1  # inside the numbers: the archive's checksum tells
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", "CRC")
    assert not (tmp_path / "made").exists()


def test_msgpack(tmp_path):
    from flax.serialization import to_bytes

    tree = dict(params=dict(a=ARRAYS["a.weight"], layers=[ARRAYS["a.half"], np.float32(2)], none={}))
    good = to_bytes(tree)
    (tmp_path / "f.msgpack").write_bytes(good)
    same(
        sources.read_weights(tmp_path / "f.msgpack"),
        {
            "params/a": ARRAYS["a.weight"],
            "params/layers/0": ARRAYS["a.half"],
            "params/layers/1": np.array(2, np.float32),
        },
    )
    rng = np.random.default_rng(3)
    for i in range(300):
        (tmp_path / "x.msgpack").write_bytes(mutated(good, rng) if i % 2 else good[: rng.integers(len(good))])
        try:
            sources.read_weights(tmp_path / "x.msgpack")
        except UserError as error:
            assert "\n" not in str(error)
    for value in (b"\x93\x01\x02\x03", to_bytes(dict(a="text")), b"\x81" * 5000):
        (tmp_path / "x.msgpack").write_bytes(value)
        refused(tmp_path / "x.msgpack", "x.msgpack")
