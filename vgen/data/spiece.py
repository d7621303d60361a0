"""sentencepiece's model files (Kudo and Richardson 2018), read without the package, as tokenizers of `tokenizers`."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from vgen.data.images import DataError

CONTROL, USER_DEFINED = 3, 4  # kinds of pieces
_UNIGRAM = 1


class Model(NamedTuple):
    """pieces: (text, score, kind).  charsmap: the compiled rules of normalisation, b"" for none.  unigram: whether the
    model is one, and not BPE, words or characters."""

    pieces: list[tuple[str, float, int]]
    charsmap: bytes
    unigram: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends) of protobuf's integer at a place."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message: integers, or bytes of whatever has a length or is a float."""
    at, fixed = 0, {1: 8, 5: 4}
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = divmod(key, 8)
        if wire not in (0, 2, *fixed):
            raise ValueError(f"field of kind {wire}")
        size, at = (fixed[wire], at) if wire in fixed else _varint(data, at)
        if wire == 0:
            yield number, size
            continue
        if at + size > len(data):
            raise IndexError(f"{size} bytes at {at} of {len(data)}")
        yield number, data[at : at + size]
        at += size


def read(path: Path) -> Model:
    """A spiece.model file; DataError if it is something else or damaged."""
    try:
        pieces, parts = [], {2: {}, 3: {}}
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, 1)))
            elif number in parts:  # 2: settings of the training, 3: of the normalisation
                parts[number] = dict(_fields(value))
        return Model(pieces, parts[3].get(2, b""), parts[2].get(3, _UNIGRAM) == _UNIGRAM)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        got = f"a file that does not parse ({error})"
        raise DataError(str(path), got, "a sentencepiece model", "download it again") from error


def tokenizer(path: Path, sentinels: int = 0) -> tokenizers.Tokenizer:
    """The unigram model of a file, with `sentinels` more ids, <extra_id_0> the last of all.

    The names of special pieces and of sentinels are recognised inside a text.  Ids are those of transformers'
    T5Tokenizer; sentencepiece itself gives others in rare texts: letters with several combining marks, runs of one
    character that several splits fit equally well.
    Raises DataError for another kind of model.
    """
    model = read(path)
    if not model.unigram or len(model.pieces) < 3:
        raise DataError(str(path), f"{len(model.pieces)} pieces, not a unigram model", "one", "check the file")
    names = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocab = [(piece, score) for piece, score, _ in model.pieces] + [(name, 0.0) for name in names]
    pre, made = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 2, False))
    if model.charsmap:
        made.normalizer = tokenizers.normalizers.Precompiled(model.charsmap)
    space = dict(replacement="▁", prepend_scheme="always", split=True)
    made.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(**space)])
    made.decoder = tokenizers.decoders.Metaspace(**space)
    special = [piece for i, (piece, _, kind) in enumerate(model.pieces) if kind == CONTROL or i == 2]
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special + names])
    own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    made.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in own])
    return made
