"""Captions as transformers' BLIP writes them, and the losses that BLIP is trained by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.convert import tables
from tests.convert.tables import draw, float64, quick  # noqa: F401  a fixture
from tests.tokens.beam_test import Double
from vgen import trees
from vgen.convert.blip import HF
from vgen.convert.pieces import pixels
from vgen.models.bert import Bert
from vgen.models.blip import Captioner
from vgen.models.vit import ViT
from vgen.tasks.caption import Blip, Caption, matching_loss
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

TEXT = dict(vocab_size=40, hidden_size=24, encoder_hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=12, bos_token_id=38, eos_token_id=2, sep_token_id=2,
            pad_token_id=0, label_smoothing=0.1)  # fmt: skip
VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
              patch_size=8)  # fmt: skip
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3)), jnp.uint8),
    "text": jnp.asarray([[9, 8, 2, 0, 0], [5, 6, 7, 2, 0], [30, 31, 32, 33, 2], [4, 2, 0, 0, 0]], jnp.int32),
    "text_mask": jnp.arange(5) < jnp.asarray([[3], [4], [5], [2]]),
}
CTX = Context(jnp.int32(0))
TOWER = dict(width=16, depth=2, heads=2, mlp_dim=24)
NET = Captioner(ViT(**TOWER, patch_size=8, image_size=16), Bert(40, **TOWER, max_length=12, cross=True, head=True))
BLIP = Blip(NET, 16, start=38, end=2, length=7, features=8, encoder_start=37, text_start=36, smoothing=0.1)


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    config = transformers.BlipConfig(text_config=TEXT, vision_config=VISION)
    model = tables.randomize(transformers.BlipForConditionalGeneration(config)).double().eval()
    with torch.no_grad():  # words that are told apart by more than rounding
        model.text_decoder.cls.predictions.bias.mul_(8)  # exact: they are loaded as float32
    return model


@pytest.fixture(scope="module")
def params():
    return draw(BLIP, BATCH)


def task_of(module, **kwargs):
    return Caption(module, 16, start=38, end=2, smoothing=0.1, **kwargs)


def test_captions_against_transformers(reference, x64, monkeypatch):
    """Beam search; pictures matter."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.generation.utils, "torch", Double())
    module, network = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    task, params = task_of(module, length=8, least=4), {"network": float64(network)}
    image = np.asarray(task.pixels(BATCH["image"]))
    want = reference.generate(pixels(reference, image), num_beams=3, max_length=8, min_length=4).numpy()
    got = np.asarray(jax.jit(task.sample)(params, KEY, {"image": BATCH["image"]})["text_out"])
    assert got.shape == (4, 7) and len({tuple(row) for row in got}) > 1
    np.testing.assert_array_equal(got[:, : want.shape[1] - 1], want[:, 1:])


def test_the_words_loss_against_transformers(reference, x64):
    """Value, and gradients of the vision tower, the cross-attention and the words."""
    module, network = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    task, network = task_of(module, length=8), float64(network)
    tokens, mask = (np.asarray(x) for x in task.rows(BATCH["text"], BATCH["text_mask"], 38))
    image = jnp.asarray(task.pixels(BATCH["image"]), jnp.float64)
    object.__setattr__(task, "pixels", lambda _: image)  # float32, and rounded as it is compiled
    reference.zero_grad()
    found = reference(
        pixel_values=pixels(reference, np.asarray(image)), input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(), labels=torch.tensor(np.where(mask, tokens, -100)).long(),
    )  # fmt: skip
    found.loss.backward()
    loss = lambda p: task.losses({"network": p}, CTX, BATCH, KEY)["main"].value
    value, grads = jax.jit(jax.value_and_grad(loss))(network)
    assert float(value) == pytest.approx(found.loss.item(), rel=1e-9)
    theirs = dict(reference.named_parameters())
    decoder = "text_decoder.bert.encoder.layer.1"
    for got, name in (
        (grads["vision"]["cls"], "vision_model.embeddings.class_embedding"),
        (grads["decoder"]["layers"]["cross"]["k"]["kernel"][1].T, f"{decoder}.crossattention.self.key.weight"),
        (grads["decoder"]["embed"]["words"]["embedding"], "text_decoder.bert.embeddings.word_embeddings.weight"),
    ):
        want = theirs[name].grad.numpy().reshape(got.shape)
        np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max(), err_msg=name)


def test_texts_alone_and_beside_pictures_against_transformers(reference, x64):
    """The encoder is the decoder with a self-attention of its own: here both have the same."""
    transformers = pytest.importorskip("transformers")
    module, network = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    task = Blip(module, 16, start=38, end=2, length=8, features=8)
    layers = network["decoder"]["layers"]
    params = {"network": float64(network), "encoder": float64({name: layers[name] for name in ("attn", "attn_norm")})}
    text = transformers.models.blip.modeling_blip_text.BlipTextModel(
        reference.config.text_config, add_pooling_layer=False
    ).double().eval()  # fmt: skip
    text.load_state_dict(reference.text_decoder.bert.state_dict())
    tokens, mask = (np.asarray(x) for x in task.rows(BATCH["text"], BATCH["text_mask"], 38))
    features = RNG.standard_normal((4, 5, 24))
    for seen in (None, features):
        given = {} if seen is None else dict(encoder_hidden_states=torch.tensor(seen))
        with torch.no_grad():
            want = text(
                torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), is_decoder=False, **given
            )
        got = jax.jit(task.encode)(params, tokens, mask, seen)
        assert tables.error(got, want.last_hidden_state[:, 0].numpy()) < 1e-9


def test_three_losses(params):
    """Their sum; what each one trains; hard negatives are never the pair itself."""

    def run(p):
        loss = BLIP.losses(p, CTX, BATCH, KEY)["main"]
        return loss.value, loss

    (value, found), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params | {"logit_scale": np.float32(2)})
    terms = {name: float(found.metrics[name]) for name in ("itc", "itm", "lm")}
    assert float(value) == pytest.approx(sum(terms.values()), rel=1e-6) and 0 <= found.metrics["match_accuracy"] <= 1
    still = [path for path, grad in trees.flatten(grads).items() if not np.abs(grad).max()]
    assert not [path for path in still if "/k/bias" not in path], still  # a key's bias moves no softmax
    logits = np.array([[9.0, -9.0, 0.0, 0.0]] * 4) + 20 * np.eye(4)
    seen = []
    task = dataclasses.replace(BLIP)
    spy = lambda params, tokens, mask, features: seen.append((tokens, features)) or jnp.zeros((12, 16))
    object.__setattr__(task, "encode", spy)
    for i in range(8):
        text = (jnp.arange(4)[:, None], jnp.ones((4, 1), bool))
        task._matching(params, jnp.arange(4.0)[:, None], text, jnp.asarray(logits), jax.random.key(i))
    pairs = [(np.asarray(tokens)[:, 0], np.asarray(features)[:, 0]) for tokens, features in seen]
    for tokens, features in pairs:
        pairs = [(tokens[k::3], features[k::3]) for k in range(3)]  # true, another text, another picture
        assert [(a == b).all() or (a != b).all() and "wrong" for a, b in pairs] == [True, "wrong", "wrong"]
        assert (pairs[0][0] == np.arange(4)).all() and (pairs[1][1] == np.arange(4)).all()
        assert (pairs[2][0] == np.arange(4)).all() and (
            pairs[1][0][1:] == 0
        ).all()  # text 0 is the likest to all pictures but its own


def test_matching_loss():
    logits = jnp.asarray([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    want = torch.nn.functional.cross_entropy(torch.tensor(np.asarray(logits)), torch.tensor([1, 0, 0]))
    value, accuracy = matching_loss(logits, jnp.asarray([True, False, False]))
    assert float(value) == pytest.approx(want.item(), rel=1e-6) and float(accuracy) == 1


def test_texts_begin_as_they_are_asked_to():
    plain = BLIP.rows(BATCH["text"], BATCH["text_mask"], 38, (7, 6))
    assert np.asarray(plain[0][0]).tolist() == [38, 7, 6, 9, 8, 2, 0, 0] and np.asarray(plain[1][0]).sum() == 6
    led = dataclasses.replace(BLIP, led=True).rows(BATCH["text"], BATCH["text_mask"], 38)
    assert np.asarray(led[0][1]).tolist() == [38, 6, 7, 2, 0]


def test_a_prompt_is_given_and_not_learned(params):
    """The loss of texts behind a prompt is that of the words behind it; nothing of it is in what is given."""
    task = dataclasses.replace(BLIP, prompt=(7, 6), decode="nucleus")
    out = jax.jit(task.sample)(params, KEY, {"image": BATCH["image"]}, temperature=2.0, top_p=1.0)["text_out"]
    assert out.shape == (4, 4)
    smooth, network = dataclasses.replace(task, smoothing=0.0), {"params": params["network"]}

    @jax.jit
    def run(features):
        tokens, _ = task.rows(BATCH["text"], BATCH["text_mask"], 38, (7, 6))
        logits = NET.apply(network, tokens, features, method="decode")
        return smooth.words(params, features, BATCH), jax.nn.log_softmax(logits)

    (value, perplexity), logs = run(RNG.standard_normal((4, 5, 16)).astype(np.float32))
    assert float(jnp.exp(value)) == pytest.approx(float(perplexity), rel=1e-5)
    logs = np.asarray(logs)[:, 2:-1]
    right = np.take_along_axis(logs, np.asarray(BATCH["text"])[..., None], 2)[..., 0]
    assert float(value) == pytest.approx(-right[np.asarray(BATCH["text_mask"])].mean(), rel=1e-4)


def test_bad_settings_are_refused(params):
    with pytest.raises(ValueError, match="decode must be 'beam' or 'nucleus', got 'greedy'"):
        dataclasses.replace(BLIP, decode="greedy")
    with pytest.raises(ValueError, match="ids below 40"):
        dataclasses.replace(BLIP, start=40)
    with pytest.raises(ValueError, match="length must be above 1.*at most the decoder's max_length 12, got 13"):
        dataclasses.replace(BLIP, length=13)
    with pytest.raises(ValueError, match="two pictures or more"):
        BLIP.losses(params, CTX, {name: value[:1] for name, value in BATCH.items()}, KEY)
    with pytest.raises(ValueError, match="no batches"):
        BLIP.evaluate(params, [], KEY)
    assert BLIP.evaluate(params, [BATCH], KEY)["perplexity"] > 1
