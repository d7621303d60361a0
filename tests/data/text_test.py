"""Text tokenizers: lossless BPE, ids equal to transformers' for CLIP and T5, end tokens and masks exact."""

import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from vgen.data import spiece
from vgen.data.images import DataError
from vgen.data.text import BPE, T5, Clip, Texts, Tokenizer, open_tokenizer

CORPUS = [f"a {size} {colour} {shape} left of the blue star" for size in ("small", "big") for colour in ("red", "green")
          for shape in ("circle", "square")] * 4  # fmt: skip
ODD = ["", " ", "  two  spaces\n\ttab ", "naïve café — 漢字 العربية", "👩‍👩‍👧 🇫🇷 e\u0301", "\x00\x7f\ufeff",
       "<pad></s><|endoftext|> x", "it's 2024: don't!!", "A" * 500, "word " * 200, "İstanbul ǅ ﬁ Ⅷ ½"]  # fmt: skip


HARD = [  # html, quotes, case and digits of other scripts, spaces of every kind, marks, runs, names of special tokens
    "a &amp; b &lt;tag&gt; &quot;q&quot; &#39;s &eacute; &amp;amp;", "<br/> http://x.y/z?q=1&r=2", "…“quotes”‘s’ — –",
    "a\u200bb\u00a0c\u2003d\u3000e", "Å A\u030a \u212b", "ẞ ß SS", "한국어 \u1112\u1161\u11ab", "𝔘𝔫𝔦 𝟙𝟚 ⓐⒷ",
    "١٢٣ 一二三 Ⅻ", "don`t don’t he'll've 'tis ''' 's's I'LL", "___---***", "tab\x0bvt\x0cff\x1cfs\x85nel\r\n",
    "e\u0301\u0301\u0301 a\u0300\u0316", "i\u0307ı ΑΣ ΣΑΣ", "🏳️‍🌈😀😀😀", "\u202eabc \ufffd", "$3.50 €4 100%", "ﷺ " * 99,
    "'" * 300, "😀" * 300, "日本" * 300, "<|endoftext|>", "a<|startoftext|>b <|ENDOFTEXT|>", "</s>", "x<pad></s><unk>y",
    "a <extra_id_0> cat <extra_id_99>. <extra_id_100> <EXTRA_ID_1>",
]  # fmt: skip
POOLS = [
    "abcdefXYZ",
    "'’`\"",
    " \t\n\u00a0\u200b",
    "0123٣²½",
    "éÉßǅİΣς",
    "漢字かな한",
    "😀👩‍🇫",
    "!?.,-_<>|&;#",
    "\u0301\u0308\u0327",
]


def fuzz(n):
    """Random texts of characters that tokenizers treat each in their own way, and of any characters at all."""
    rng = random.Random(0)
    found = ["".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randrange(1, 40))) for _ in range(n)]
    rest = ("".join(chr(rng.randrange(0x20, 0x1FBFF)) for _ in range(12)) for _ in range(n // 4))
    return found + [text.encode("utf-8", "replace").decode() for text in rest]


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
    with pytest.raises(ValueError, match="'bpe', 'clip', 't5' or 'bert'"):
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
    texts = ODD + CORPUS[:3] + ["The RED blue's it!! <|startoftext|> 20", "hello<|endoftext|>tail"] + HARD + fuzz(800)
    assert isinstance(theirs, transformers.CLIPTokenizerFast)  # one class in transformers 5
    short = theirs(texts, padding="max_length", truncation=True, max_length=9)
    np.testing.assert_array_equal(ours.encode(texts, 9)[0], short["input_ids"])
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


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    """A unigram model as T5's: the same normalisation (nmt_nfkc), the same special ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    lines = CORPUS + [" ".join(text.split()) for text in HARD[:16] + fuzz(40)[:40]] + ["naïve café it's 2024"]
    (folder / "corpus.txt").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=400, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<own>"],
    )  # fmt: skip
    return folder


def test_t5_ids_equal_transformers(spiece_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = T5.load(spiece_folder)
    texts = ODD + CORPUS[:3] + HARD + ["an <own> b<own>c"] + fuzz(800)
    theirs = transformers.T5Tokenizer.from_pretrained(spiece_folder)
    assert ours.vocab_size == len(theirs) and theirs.convert_tokens_to_ids("<extra_id_0>") == ours.vocab_size - 1
    for length in (64, 7):
        want = theirs(texts, padding="max_length", truncation=True, max_length=length)
        tokens, mask = pickle.loads(pickle.dumps(ours)).encode(texts, length)
        np.testing.assert_array_equal(mask, np.array(want["attention_mask"]) == 1)
        np.testing.assert_array_equal(tokens, want["input_ids"])
    assert ours.decode(ours.encode(CORPUS[:2], 40)[0]) == CORPUS[:2]
    theirs.save_pretrained(tmp_path)  # tokenizer.json
    np.testing.assert_array_equal(T5.load(tmp_path).encode(texts, 7)[0], tokens)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes((spiece_folder / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    assert T5.load(tmp_path).vocab_size == ours.vocab_size - 97


def test_t5_ids_equal_sentencepiece_on_plain_text(spiece_folder):
    """The authors' tokenizer; it knows no sentinels, and parts from transformers' where `spiece.tokenizer` says so."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    texts = [
        *CORPUS[:8],
        "naïve café — 漢字 العربية",
        "it's 2024: don't!!",
        "  two  spaces\n\ttab ",
        "",
        "word " * 9,
        "½ ﬁ Ⅷ",
    ]
    tokens, mask = T5.load(spiece_folder).encode(texts, 200)
    assert [row[m][:-1].tolist() for row, m in zip(tokens, mask)] == theirs.encode(texts)
    assert spiece.read(spiece_folder / "spiece.model").pieces[5][0] == theirs.id_to_piece(5)


def test_t5_refuses_damaged_files(spiece_folder, tmp_path):
    whole, rng = (spiece_folder / "spiece.model").read_bytes(), random.Random(0)
    path = tmp_path / "spiece.model"
    for damaged in (b"", b"\xff" * 9, whole[:1000], b"\x0b" + whole, b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="spiece.model"):
            T5.load(tmp_path)
    for _ in range(100):  # any damage is refused, or leaves a model
        at = rng.randrange(2000)
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            T5.load(tmp_path)
        except DataError:
            pass


def test_t5_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json or spiece.model"):
        T5.load(tmp_path)


def test_a_prompt_that_is_too_long_says_what_is_cut_off():
    texts = Texts(BPE.train(["a red circle left of a blue star"] * 4, 300), 12)
    prompt = "a red circle left of a blue star on the moon"
    with pytest.warns(UserWarning, match="longer than 12 tokens, its end is cut off: '") as found:
        ids, mask = texts.prompts([prompt, "a red circle"])
    (one,) = found
    end = str(one.message).rpartition(": '")[2][:-1]
    assert end.endswith("the moon") and texts.tokenizer.decode(ids)[0] + end == prompt
    np.testing.assert_array_equal(ids, texts([prompt, "a red circle"])[0])
