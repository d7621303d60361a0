"""Text to token ids: a byte-level BPE trained on the corpus; CLIP's BPE, T5's sentencepiece and BERT's word pieces from
checkpoint folders.

Every tokenizer keeps one contract (`Tokenizer`): ids end with the end token, text that is too long loses its tail and
keeps the end token, what is left of the row is padding, and the mask covers everything up to the end token.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from vgen.bucket import local
from vgen.data import spiece
from vgen.data.images import DataError

Tokens = tuple[Int32[np.ndarray, "b length"], Bool[np.ndarray, "b length"]]


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids.  encode: texts -> (int32 [b, length], bool mask [b, length]).  decode: ids [b, n] -> b texts."""

    vocab_size: int
    pad_id: int

    def encode(self, texts: Sequence[str], length: int) -> Tokens: ...

    def decode(self, ids) -> list[str]: ...


def _rows(ids: Sequence[Sequence[int]], length: int, pad: int, end: int, start: int | None = None) -> Tokens:
    """Lists of ids to [start] ids... end pad... of one length, and the mask."""
    room = length - 1 - (start is not None)
    if room < 0:
        raise ValueError(f"encode: length must be at least {length - room}, for the start and end tokens, got {length}")
    tokens, mask = np.full((len(ids), length), pad, np.int32), np.zeros((len(ids), length), bool)
    for i, row in enumerate(ids):
        row = [*([] if start is None else [start]), *row[:room], end]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def _until(ids, end: int, drop: frozenset[int]) -> list[list[int]]:
    """Rows of ids cut at the first end token, without those in `drop`."""
    rows = [np.asarray(row).tolist() for row in ids]
    return [[t for t in (row[: row.index(end)] if end in row else row) if t not in drop] for row in rows]


def _valid(texts: Sequence[str]) -> list[str]:
    """Lone surrogates (broken JSON escapes) cannot be written as UTF-8; each becomes "?"."""
    return [text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _ids(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [model.encode(text, add_special_tokens=False).ids for text in _valid(texts)]


# ----------------------------------------------------------------------------------------------------- byte-level BPE


class BPE:
    """Byte-level BPE: lossless on every text, no unknown token; id 0 is padding, id 1 the end.

    The two special ids have no spelling, so no text can produce them.  Splitting into words follows GPT-2.
    """

    pad_id, end_id, specials = 0, 1, 2

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model
        self.vocab_size = model.get_vocab_size() + self.specials

    @classmethod
    def train(cls, texts, vocab_size: int) -> "BPE":
        """Learn at most `vocab_size` tokens (fewer if the corpus has no more pairs), the same ones every time.

        texts: iterable of str.  Raises ValueError if vocab_size < 258: 256 bytes, padding and end.
        """
        if vocab_size < 256 + cls.specials:
            raise ValueError(
                f"BPE.train: vocab_size must be at least {256 + cls.specials} (256 bytes, padding, end), "
                f"got {vocab_size}"
            )
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - cls.specials,
            show_progress=False,
            initial_alphabet=sorted(alphabet),
            special_tokens=[],
        )
        model.train_from_iterator(_valid(texts if isinstance(texts, Sequence) else list(texts)), trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Read what `save` wrote.  Raises FileNotFoundError, or DataError if the file is something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"BPE.load: looked for {path}, a file written by BPE.save")
        text = path.read_text("utf-8")
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(
                f"tokenizer {path}",
                f"a file that does not parse ({error})",
                "a file written by BPE.save",
                "train it again",
            ) from error
        if json.loads(text)["pre_tokenizer"] is None or model.get_added_tokens_decoder():
            raise DataError(
                f"tokenizer {path}",
                "another kind of tokenizer",
                "a file written by BPE.save",
                "load it with Clip.load or T5.load",
            )
        return cls(model)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(self._model.to_str(pretty=True), "utf-8")
        part.replace(path)

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        rows = [[t + self.specials for t in row] for row in _ids(self._model, texts)]
        return _rows(rows, length, self.pad_id, self.end_id)

    def decode(self, ids) -> list[str]:
        rows = _until(ids, self.end_id, frozenset((self.pad_id,)))
        return [self._model.decode([t - self.specials for t in row]) for row in rows]


# --------------------------------------------------------------------------------------------------------------- CLIP

# The pattern of CLIP's tokenizer (Radford et al. 2021): contractions, runs of letters, single digits, runs of the rest.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Clip:
    """CLIP's lower-cased BPE, rows `<|startoftext|> ... <|endoftext|> pad...`, 77 ids as published.

    Ids equal transformers' CLIPTokenizer.  Differs from OpenAI's code in not repairing mojibake with ftfy and not
    unescaping HTML.  The padding is what the folder names, else the end token.
    """

    def __init__(self, model: tokenizers.Tokenizer, pad: str | None = None):
        self._model = model
        self.start_id, self.end_id = model.token_to_id("<|startoftext|>"), model.token_to_id("<|endoftext|>")
        if self.start_id is None or self.end_id is None:
            raise DataError("CLIP vocabulary", "no <|startoftext|> or <|endoftext|>", "both", "check the folder")
        pad_id = model.token_to_id(pad) if pad else None
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.vocab_size = model.get_vocab_size()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Clip":
        """Read a checkpoint's tokenizer folder: vocab.json and merges.txt, or tokenizer.json.

        Raises FileNotFoundError naming what was looked for.
        """
        folder = Path(folder)
        vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
        if vocab.is_file() and merges.is_file():
            model = _clip_model(vocab, merges)
        elif whole.is_file():
            model = tokenizers.Tokenizer.from_file(str(whole))
            model.no_truncation()
            model.no_padding()
        else:
            raise FileNotFoundError(f"Clip.load: looked in {folder} for vocab.json and merges.txt, or tokenizer.json")
        return cls(model, _pad_token(folder))

    def encode(self, texts: Sequence[str], length: int = 77) -> Tokens:
        return _rows(_ids(self._model, texts), length, self.pad_id, self.end_id, self.start_id)

    def decode(self, ids) -> list[str]:
        rows = [row[1:] if row[:1] == [self.start_id] else row for row in _until(ids, self.end_id, frozenset())]
        return [self._model.decode(row).replace("</w>", " ").strip() for row in rows]


def _clip_model(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    pre, norm = tokenizers.pre_tokenizers, tokenizers.normalizers
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(
            str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"
        )
    )
    model.normalizer = norm.Sequence([norm.NFC(), norm.Replace(tokenizers.Regex(r"\s+"), " "), norm.Lowercase()])
    model.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(_CLIP_WORDS), "removed", invert=True), pre.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    # the markers are recognised inside a text, as CLIP's own code does
    model.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in ("<|startoftext|>", "<|endoftext|>")]
    )
    return model


def _pad_token(folder: Path) -> str | None:
    # QUIRK: Stable Diffusion 2's and SDXL's second tokenizer pad with "!" (id 0), the first ones with the end token;
    # special_tokens_map.json or tokenizer_config.json says which.  Source: those files; test: text_test.test_clip_pad.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            pad = json.loads((folder / name).read_text("utf-8")).get("pad_token")
            if pad:
                return pad["content"] if isinstance(pad, dict) else pad
    return None


# ----------------------------------------------------------------------------------------------------------------- T5


class T5:
    """T5's sentencepiece: rows `ids... </s> pad...` with </s> = 1 and padding 0 (Raffel et al. 2020).

    Ids equal transformers' T5Tokenizer, which recognises "</s>", "<extra_id_0>" and the like inside a text; see
    `vgen.data.spiece.tokenizer` for where sentencepiece's own differ.
    vocab_size counts pieces and sentinels (32100 in the published folders); their embedding tables have 32128 rows.
    """

    pad_id, end_id = 0, 1

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model
        self.vocab_size = model.get_vocab_size()
        names = [model.id_to_token(i) for i in (0, 1)]
        if names != ["<pad>", "</s>"]:
            raise DataError("T5 vocabulary", f"ids 0 and 1 are {names}", "<pad> and </s>", "check the folder")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "T5":
        """Read a checkpoint's tokenizer folder: tokenizer.json, else spiece.model.

        Beside a spiece.model, tokenizer_config.json may give another number of sentinels than 100 (`extra_ids`).
        Raises FileNotFoundError naming what was looked for, DataError for a file that does not parse.
        """
        folder = Path(folder)
        piece, whole, config = (folder / n for n in ("spiece.model", "tokenizer.json", "tokenizer_config.json"))
        if whole.is_file():
            model = tokenizers.Tokenizer.from_file(str(whole))
            model.no_truncation()
            model.no_padding()
        elif piece.is_file():
            sentinels = json.loads(config.read_text("utf-8")).get("extra_ids", 100) if config.is_file() else 100
            model = spiece.tokenizer(piece, sentinels)
        else:
            raise FileNotFoundError(f"T5.load: looked in {folder} for tokenizer.json or spiece.model")
        return cls(model)

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        return _rows(_ids(self._model, texts), length, self.pad_id, self.end_id)

    def decode(self, ids) -> list[str]:
        return [self._model.decode(row) for row in _until(ids, self.end_id, frozenset((self.pad_id,)))]


# --------------------------------------------------------------------------------------------------------------- BERT


class Bert:
    """BERT's word pieces: rows `[CLS] ids... [SEP] pad...` (Devlin et al. 2018), as BLIP and FLIP have them.

    Ids equal transformers' BertTokenizer.  Ids beyond the vocabulary, such as BLIP's [DEC], have no spelling.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model
        self.vocab_size = model.get_vocab_size()
        ids = [model.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")]
        if None in ids:
            raise DataError("BERT vocabulary", "no [CLS], [SEP] or [PAD]", "all of them", "check the folder")
        self.start_id, self.end_id, self.pad_id = ids

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Bert":
        """Read a checkpoint's tokenizer folder: vocab.txt, in which case letters become small ones unless
        tokenizer_config.json says otherwise, or tokenizer.json.

        Raises FileNotFoundError naming what was looked for.
        """
        folder = Path(folder)
        words, whole, config = (folder / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"))
        if whole.is_file():
            model = tokenizers.Tokenizer.from_file(str(whole))
            model.no_truncation()
            model.no_padding()
        elif words.is_file():
            small = json.loads(config.read_text("utf-8")).get("do_lower_case", True) if config.is_file() else True
            pieces = {word: i for i, word in enumerate(words.read_text("utf-8").splitlines())}
            model = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
            model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=small)
            model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            model.decoder = tokenizers.decoders.WordPiece()
        else:
            raise FileNotFoundError(f"Bert.load: looked in {folder} for vocab.txt or tokenizer.json")
        return cls(model)

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        return _rows(_ids(self._model, texts), length, self.pad_id, self.end_id, self.start_id)

    def decode(self, ids) -> list[str]:
        rows = _until(ids, self.end_id, frozenset((self.start_id, self.pad_id)))
        return [self._model.decode([i for i in row if i < self.vocab_size]) for row in rows]


def open_tokenizer(
    kind: str,
    length: int,
    *,
    path: str = "",
    vocab_size: int = 1024,
    corpus=None,
    cache: str | os.PathLike | None = None,
) -> "Texts":
    """A tokenizer with its text length, as a config names it.

    kind: "bpe" (from `path`; without one, trained to `vocab_size` on the captions that `corpus()` gives, once, and kept
    at `cache`), "clip", "t5" or "bert" (from the checkpoint folder `path`).  path: also in a bucket, gs:// or s3://.
    length: tokens per text.
    Raises ValueError for another kind, DataError when one of the latter has no path.
    """
    path = path and local(path, lambda names: [name for name in names if name.endswith((".json", ".txt", ".model"))])
    if kind == "bpe":
        if path:
            return Texts(BPE.load(path), length)
        if cache is not None and Path(cache).is_file():
            return Texts(BPE.load(cache), length)
        if corpus is None:
            raise DataError("tokenizer bpe", "neither a path nor a corpus", "one of them", "set config.text.path")
        model = BPE.train(list(corpus()), vocab_size)
        if cache is not None:
            model.save(cache)
        return Texts(model, length)
    folders = dict(clip=Clip, t5=T5, bert=Bert)
    if kind not in folders:
        raise ValueError(f"open_tokenizer: kind must be 'bpe', 'clip', 't5' or 'bert', got {kind!r}")
    if not path:
        raise DataError(f"tokenizer {kind}", "no path", "the checkpoint's folder", "set --config.text.path=FOLDER")
    return Texts(folders[kind].load(path), length)


@dataclasses.dataclass(frozen=True)
class Texts:
    """A tokenizer and the length its texts are padded or cut to; calling it encodes."""

    tokenizer: Tokenizer
    length: int

    def __call__(self, texts: Sequence[str]) -> Tokens:
        return self.tokenizer.encode(texts, self.length)

    def prompts(self, texts: Sequence[str]) -> Tokens:
        """The same of what a user asks for: a UserWarning says what is cut off a text that is too long."""
        for text in texts:
            if cut := self._cut(text):
                warnings.warn(
                    f"a prompt is longer than {self.length} tokens, its end is cut off: {cut!r}", stacklevel=4
                )
        return self(texts)

    def _cut(self, text: str) -> str:
        """What does not fit of a text."""
        length = self.length
        ids, mask = self.tokenizer.encode([text], length)
        while mask.all():  # as long as it may be longer
            length *= 2
            ids, mask = self.tokenizer.encode([text], length)
        count = int(mask.sum())
        return self.tokenizer.decode(ids[:, self.length - 1 : count - 1])[0] if count > self.length else ""
