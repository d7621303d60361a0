"""Beam search against transformers' and against all texts there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.tokens.beam import beam_search
from vgen.tokens.words import adjusting

pytestmark = pytest.mark.usefixtures("quick")

VOCAB, LENGTH, END, PAD = 9, 7, 2, 7  # transformers takes padding of 0 for none
TABLE = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)) * 1.5
START = np.array([[1, 4], [3, 3], [1, 8], [5, 6]])


class Double:
    """torch for a module that has float32 written in it: float64 in its place."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@functools.cache
def bigram():
    """A language model of transformers whose logits hang on the last word alone."""
    transformers = pytest.importorskip("transformers")

    class Bigram(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self, config):
            super().__init__(config)
            self.table = torch.nn.Parameter(torch.tensor(TABLE))

        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids}

        def forward(self, input_ids, **kwargs):
            return transformers.modeling_outputs.CausalLMOutput(logits=self.table[input_ids])

    return Bigram(transformers.PretrainedConfig(vocab_size=VOCAB))


def theirs(**kwargs):
    out = bigram().generate(
        torch.tensor(START), max_length=LENGTH, eos_token_id=END, pad_token_id=PAD, use_cache=False, do_sample=False,
        num_return_sequences=kwargs["num_beams"], return_dict_in_generate=True, output_scores=True, **kwargs,
    )  # fmt: skip
    ids = out.sequences.numpy().reshape(len(START), kwargs["num_beams"], -1)
    ids = np.pad(ids, ((0, 0), (0, 0), (0, LENGTH - ids.shape[2])), constant_values=PAD)
    return ids, out.sequences_scores.numpy().reshape(ids.shape[:2])


@functools.partial(jax.jit, static_argnames=("beams", "early_stopping"))
def ours(start, length_penalty=1.0, least=0, repetition=1.0, *, beams=3, early_stopping=False):
    """length_penalty, least and repetition are traced."""
    following = lambda ids, place: jnp.asarray(TABLE)[jax.lax.dynamic_index_in_dim(ids, place - 1, 1, False)]
    adjust = adjusting(END, least=least, repetition=repetition)
    return beam_search(
        following, start, LENGTH, beams=beams, end=END, pad=PAD, length_penalty=length_penalty,
        early_stopping=early_stopping, adjust=adjust,
    )  # fmt: skip


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_against_transformers(early_stopping, x64, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.generation.utils, "torch", Double())
    seen = set()
    for penalty, least, repetition in ((1.0, 0, 1.0), (0.0, 5, 1.0), (2.5, 0, 1.7), (-1.0, 4, 1.0)):
        want, scores = theirs(
            num_beams=3, early_stopping=early_stopping, length_penalty=penalty, min_length=least,
            repetition_penalty=repetition,
        )  # fmt: skip
        found = ours(jnp.asarray(START), penalty, least, repetition, early_stopping=early_stopping)
        np.testing.assert_array_equal(found.ids, want)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-12)
        seen |= {tuple(row) for row in want[:, 0]}
    assert len(seen) > len(START)  # the settings matter


def test_enough_beams_find_the_likeliest_of_all_texts(x64):
    """Of up to three words, without a penalty on length."""
    logs = TABLE - np.log(np.exp(TABLE).sum(1, keepdims=True))
    texts = {}
    for count in (1, 2, 3):
        for words in itertools.product(range(VOCAB), repeat=count):
            if END not in words[:-1] and (words[-1] == END or count == 3):
                texts[words] = sum(logs[a, b] for a, b in zip((4, *words), words))
    following = lambda ids, place: jnp.asarray(TABLE)[jax.lax.dynamic_index_in_dim(ids, place - 1, 1, False)]
    start = jnp.asarray([[1, 4]])
    found = jax.jit(
        lambda: beam_search(following, start, 5, beams=VOCAB**2, end=END, length_penalty=0.0, early_stopping="never")
    )()
    best = sorted(texts.items(), key=lambda item: -item[1])[:5]
    for row, score, (words, want) in zip(np.asarray(found.ids[0]), found.scores[0], best):
        assert tuple(row[2 : 2 + len(words)]) == words and not row[2 + len(words) :].any()
        assert float(score) == pytest.approx(want, rel=1e-12)


def test_bad_settings_are_refused():
    start, nothing = jnp.zeros((1, 2), jnp.int32), lambda ids, place: None
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        beam_search(nothing, start, 5, beams=0, end=1)
    with pytest.raises(ValueError, match="must be True, False or 'never', got 'always'"):
        beam_search(nothing, start, 5, beams=1, end=1, early_stopping="always")
    with pytest.raises(ValueError, match="a text of 2 tokens cannot begin with 2"):
        beam_search(nothing, start, 2, beams=1, end=1)
