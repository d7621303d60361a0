"""Text tokenizers: lossless BPE, ids equal to transformers' for CLIP and T5, end tokens and masks exact."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from vgen.data.images import DataError
from vgen.data.text import BPE, T5, Clip, Tokenizer, open_tokenizer

CORPUS = [f"a {size} {colour} {shape} left of the blue star" for size in ("small", "big") for colour in ("red", "green")
          for shape in ("circle", "square")] * 4  # fmt: skip
ODD = ["", " ", "  two  spaces\n\ttab ", "naïve café — 漢字 العربية", "👩‍👩‍👧 🇫🇷 e\u0301", "\x00\x7f\ufeff",
       "<pad></s><|endoftext|> x", "it's 2024: don't!!", "A" * 500, "word " * 200, "İstanbul ǅ ﬁ Ⅷ ½"]  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    return BPE.train(CORPUS, 320)


def test_bpe_is_lossless(bpe):
    tokens, mask = bpe.encode(ODD + CORPUS[:2], 2100)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (len(ODD) + 2, 2100)
    assert bpe.decode(tokens) == ODD + CORPUS[:2]
    assert bpe.pad_id not in tokens[mask] and (tokens[mask] < bpe.vocab_size).all() and isinstance(bpe, Tokenizer)


def test_bpe_rows_end_and_truncate(bpe):
    tokens, mask = bpe.encode(["", "a small red circle", "word " * 50], 6)
    assert tokens[0].tolist() == [bpe.end_id] + [bpe.pad_id] * 5 and mask[0].tolist() == [True] + [False] * 5
    assert tokens[2, -1] == bpe.end_id and mask[2].all()
    np.testing.assert_array_equal(mask.sum(1) - 1, [(row == bpe.end_id).argmax() for row in tokens])
    with pytest.raises(ValueError, match="length"):
        bpe.encode(["a"], 0)


def test_bpe_replaces_lone_surrogates(bpe):
    assert bpe.decode(bpe.encode(["a\ud83d b"], 20)[0]) == ["a? b"]


def test_bpe_learns_the_corpus(bpe):
    words = len(CORPUS[0].split())
    assert bpe.encode(CORPUS[:1], 100)[1].sum() <= words + 1
    assert bpe.vocab_size <= 320
    with pytest.raises(ValueError, match="258"):
        BPE.train(CORPUS, 257)


def test_bpe_is_deterministic_and_saves(bpe, tmp_path):
    bpe.save(tmp_path / "new" / "bpe.json")
    loaded = BPE.load(tmp_path / "new" / "bpe.json")
    np.testing.assert_array_equal(loaded.encode(ODD, 50)[0], bpe.encode(ODD, 50)[0])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(bpe)).encode(ODD, 50)[0], bpe.encode(ODD, 50)[0])
    code = f"from vgen.data.text import BPE; BPE.train({CORPUS!r}, 320).save({str(tmp_path / 'other.json')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)  # another process: other hash seeds
    assert (tmp_path / "other.json").read_text() == (tmp_path / "new" / "bpe.json").read_text()


def test_bpe_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        BPE.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="bad.json"):
        BPE.load(tmp_path / "bad.json")


def test_open_tokenizer(tmp_path):
    first = open_tokenizer("bpe", 9, vocab_size=300, corpus=lambda: CORPUS, cache=tmp_path / "t.json")
    again = open_tokenizer("bpe", 9, vocab_size=300, corpus=None, cache=tmp_path / "t.json")
    np.testing.assert_array_equal(first(ODD)[0], again(ODD)[0])
    assert first(ODD)[0].shape == (len(ODD), 9)
    with pytest.raises(ValueError, match="'bpe', 'clip' or 't5'"):
        open_tokenizer("wordpiece", 9)
    with pytest.raises(DataError, match="path"):
        open_tokenizer("clip", 77)


# --------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small vocabulary in CLIP's layout: 256 bytes, the same with </w>, some merges, the two markers."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>"), ("i", "t</w>"), ("'", "s</w>"),
              ("t", "h"), ("th", "e</w>"), ("Ã", "¯"), ("2", "0"), ("w", "o"), ("wo", "r"), ("!", "!</w>")]  # fmt: skip
    names = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return folder


def test_clip_ids_equal_transformers(clip_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    ours = Clip.load(clip_folder)
    texts = ODD + CORPUS[:3] + ["The RED blue's it!! <|startoftext|> 20", "hello<|endoftext|>tail"]
    want = theirs(texts, padding="max_length", truncation=True, max_length=77)
    tokens, mask = ours.encode(texts)
    np.testing.assert_array_equal(tokens, want["input_ids"])
    np.testing.assert_array_equal(mask, np.array(want["attention_mask"]) == 1)
    assert tokens.shape[1] == 77 and (tokens[:, 0] == ours.start_id).all()
    assert tokens[ODD.index("A" * 500), -1] == ours.end_id  # truncation keeps the end
    whole = clip_folder.parent / "whole"
    theirs.save_pretrained(whole)
    (whole / "vocab.json").unlink(missing_ok=True)
    np.testing.assert_array_equal(Clip.load(whole).encode(texts)[0], tokens)


def test_clip_decodes(clip_folder):
    clip = Clip.load(clip_folder)
    assert clip.decode(clip.encode(["The  red blue", "", "it's 20"])[0]) == ["the red blue", "", "it 's 2 0"]


def test_clip_pad(clip_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((clip_folder / name).read_text())
    assert Clip.load(tmp_path).pad_id == Clip.load(tmp_path).end_id
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    clip = Clip.load(tmp_path)
    assert clip.pad_id == 0 and clip.encode([""])[0][0, -1] == 0  # "!" is the first byte of the alphabet


def test_clip_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt, or tokenizer.json"):
        Clip.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- T5


@pytest.fixture(scope="module")
def t5_json(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5json")
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"],
                                                 unk_token="<unk>", show_progress=False)  # fmt: skip
    model.train_from_iterator(CORPUS, trainer)
    model.enable_truncation(3)  # published files may carry settings of their own; they must not act here
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_t5_from_tokenizer_json(t5_json):
    t5 = T5.load(t5_json)
    tokens, mask = t5.encode(["a small red circle", "", "the blue star " * 50], 40)
    assert t5.decode(tokens[:2]) == ["a small red circle", ""]
    assert tokens[1].tolist() == [1] + [0] * 39 and tokens[2, -1] == 1 and mask[2].all()
    np.testing.assert_array_equal(tokens != 0, mask)


def test_t5_from_sentencepiece_equals_transformers(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS + ["naïve café it's 2024"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=90, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    t5 = T5.load(tmp_path)
    texts = [t for t in ODD if "</s>" not in t] + CORPUS[:3]  # transformers reads a literal </s> as the end
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    want = theirs(texts, padding="max_length", truncation=True, max_length=32)
    tokens, mask = pickle.loads(pickle.dumps(t5)).encode(texts, 32)
    np.testing.assert_array_equal(mask, np.array(want["attention_mask"]) == 1)
    np.testing.assert_array_equal(tokens, want["input_ids"])
    assert t5.decode(t5.encode(CORPUS[:2], 40)[0]) == CORPUS[:2]


def test_t5_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="spiece.model or tokenizer.json"):
        T5.load(tmp_path)
