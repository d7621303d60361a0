"""Tell what is on a picture: a captioner trained by the next word (BLIP), and BLIP's pre-training with two losses more.

Source: Li et al. 2022 (BLIP, arXiv:2201.12086), section 3.2, and the authors' code (salesforce/BLIP).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vgen import sharding
from vgen.data import images as image_ops
from vgen.models.bert import Bert
from vgen.models.blip import MEAN, STD, Captioner
from vgen.models.clip import unit
from vgen.tasks.contrastive import LOG_TOP, clipped, info_nce
from vgen.tokens.beam import beam_search
from vgen.tokens.words import adjusting, draw_words
from vgen.types import Batch, Context, Loss, Params


@dataclasses.dataclass(frozen=True)
class Caption:
    """Pictures in, texts out, by the cross-entropy of every next word.

    network: a Captioner.  size: pixels of its pictures.
    start, end, pad: ids: what a text begins with, ends with, and what follows.  led: the texts of a batch begin with a
      token of their own (BERT's [CLS]), whose place `start` takes; otherwise it comes ahead of them.
    prompt: ids behind the start, which texts go on from; they are no part of the loss, nor of what is given.
    smoothing: share of the target that is spread over all words.
    length: of a text at most, start and prompt counted.  least: of a text that ends, counted so too.
    decode: "beam": the best text of `beams`; "nucleus": words are drawn.  early_stopping: see `beam_search`.
    mean, std: of the pictures' channels in [0, 1], which the network gets normalised.

    Parameters: network.  Raises ValueError for another decode.
    """

    writes = True  # its `sample` makes texts

    network: Captioner
    size: int
    start: int
    end: int
    pad: int = 0
    led: bool = False
    prompt: tuple[int, ...] = ()
    smoothing: float = 0.0
    length: int = 20
    least: int = 0
    decode: str = "beam"
    beams: int = 3
    early_stopping: bool | str = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    groups = {"main": r".*"}
    buffers = ""

    def __post_init__(self):
        if self.decode not in ("beam", "nucleus"):
            raise ValueError(f"Caption: decode must be 'beam' or 'nucleus', got {self.decode!r}")
        vocab, least = self.network.decoder.vocab, 1 + len(self.prompt)
        if max(self.start, self.end, self.pad, *self.prompt, 0) >= vocab:
            raise ValueError(f"Caption: start, end, pad and prompt must be ids below {vocab}, the decoder's words")
        if not least < self.length <= self.network.decoder.max_length:
            raise ValueError(
                f"Caption: length must be above {least}, the start's, and at most the decoder's max_length "
                f"{self.network.decoder.max_length}, got {self.length}"
            )

    def pixels(self, image) -> Float[Array, "b h w 3"]:
        """uint8 pictures as the network takes them."""
        return image_ops.standardise(image, self.mean, self.std)

    def init(self, key, batch: Batch) -> Params:
        text = jnp.zeros((1, batch["text"].shape[1]), jnp.int32)
        return {"network": self.network.init(key, self.pixels(batch["image"][:1]), text)["params"]}

    def _apply(self, params, *args, method, **kwargs):
        return self.network.apply({"params": params["network"]}, *args, method=method, **kwargs)

    def rows(self, text, mask, start: int, prompt: tuple[int, ...] = ()):
        """(ids, mask) [b, n] of texts that begin with `start` and `prompt`."""
        text, mask = (text[:, 1:], mask[:, 1:]) if self.led else (text, mask)
        ahead = jnp.broadcast_to(jnp.asarray((start, *prompt), text.dtype), (len(text), 1 + len(prompt)))
        return jnp.concatenate([ahead, text], 1), jnp.concatenate([jnp.ones(ahead.shape, bool), mask.astype(bool)], 1)

    def words(self, params: Params, features, batch: Batch) -> tuple[Any, Any]:
        """(mean cross-entropy of the batch's words with smoothed targets, their perplexity).

        A batch whose texts are empty has NaN, which ends a training; the end token alone is a text.
        """
        tokens, mask = self.rows(batch["text"], batch["text_mask"], self.start, self.prompt)
        logits = self._apply(params, tokens[:, :-1], features, mask[:, :-1], method="decode")
        logs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        right = jnp.take_along_axis(logs, tokens[:, 1:, None], 2)[..., 0]
        counted = mask[:, 1:] & (jnp.arange(1, tokens.shape[1]) > len(self.prompt))
        mean = lambda x: jnp.where(counted, x, 0).sum() / counted.sum()
        smooth = (1 - self.smoothing) * right + self.smoothing * logs.mean(-1)
        return -mean(smooth), jnp.exp(-mean(right))

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: the cross-entropy of the words; metrics: their perplexity."""
        features = self._apply(params, self.pixels(batch["image"]), method="encode")
        value, perplexity = self.words(params, features, batch)
        return {"main": Loss(value, {"perplexity": perplexity})}

    # ------------------------------------------------------------------------------------------------------- texts

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, temperature=1.0, top_p=0.9, repetition=1.0,
        length_penalty=1.0,
    ) -> dict[str, Any]:  # fmt: skip
        """{"text_out": int32 [b, length - start and prompt]} for uint8 pictures conds["image"]; all knobs are traced.

        temperature, top_p: of "nucleus".  repetition: see `adjusting`.  length_penalty: of "beam".
        """
        image = self.pixels(conds["image"])
        features = self._apply(params, image, method="encode")
        ahead = (self.start, *self.prompt)
        start = jnp.broadcast_to(jnp.asarray(ahead, jnp.int32), (len(image), len(ahead)))

        def following(ids, place):
            seen = jnp.repeat(features, len(ids) // len(features), axis=0)
            logits = self._apply(params, ids, seen, method="decode")
            return jax.lax.dynamic_index_in_dim(logits, place - 1, 1, keepdims=False)

        given = dict(end=self.end, pad=self.pad, adjust=adjusting(self.end, least=self.least, repetition=repetition))
        if self.decode == "beam":
            how = dict(beams=self.beams, length_penalty=length_penalty, early_stopping=self.early_stopping)
            ids = beam_search(following, start, self.length, **how, **given).ids[:, 0]
        else:
            ids = draw_words(key, following, start, self.length, temperature=temperature, top_p=top_p, **given)
        return {"text_out": ids[:, len(ahead) :]}

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Perplexity of the words of held-out captions."""

        def measure(params, batch):
            features = self._apply(params, self.pixels(batch["image"]), method="encode")
            return jnp.log(self.words(params, features, batch)[1])

        run = jax.jit(measure)
        rows = [run(params, {name: batch[name] for name in ("image", "text", "text_mask")}) for batch in batches]
        if not rows:
            raise ValueError("Caption.evaluate: no batches; the evaluation data is empty")
        return {"perplexity": float(np.exp(np.mean(rows)))}


@dataclasses.dataclass(frozen=True)
class Blip(Caption):
    """BLIP's pre-training: pictures and texts matched as in CLIP (ITC), hard pairs told from true ones (ITM), and the
    captioner's next words (LM); the sum of the three.

    The text encoder is the decoder but for its self-attention, which looks both ways; it looks at a picture for ITM
    and at none for ITC.  A hard negative of a picture is drawn from the batch's texts by their similarity to it, and
    one of a text from the pictures.
    Differs from the authors' code: ITC has the batch's own negatives and hard targets, no momentum encoders with a
    queue of their features.
    encoder_start: id that a text begins with where it is matched with a picture ([ENC]); text_start: alone ([CLS]).
    features: width of ITC's space.

    Parameters: network, a Captioner's; encoder {attn, attn_norm} [depth, ...]; heads {image, text, match};
    logit_scale [].
    """

    encoder_start: int = 0
    text_start: int = 0
    features: int = 256

    @property
    def _heads(self) -> dict[str, nn.Dense]:
        return {"image": nn.Dense(self.features), "text": nn.Dense(self.features), "match": nn.Dense(2)}

    def init(self, key, batch: Batch) -> Params:
        params, (attn_key, *keys) = super().init(key, batch), jax.random.split(jax.random.fold_in(key, 1), 4)
        width = {"image": self.network.vision.width}
        heads = {
            name: head.init(k, jnp.zeros((1, width.get(name, self.network.decoder.width))))["params"]
            for k, (name, head) in zip(keys, self._heads.items())
        }
        text = jnp.zeros((1, 2), jnp.int32)
        own = self._encoder(False).init(attn_key, text)["params"]["layers"]
        encoder = {name: own[name] for name in ("attn", "attn_norm")}
        return params | {"encoder": encoder, "heads": heads, "logit_scale": jnp.log(jnp.float32(1 / 0.07))}

    def _encoder(self, cross: bool) -> Bert:
        """The decoder's network without its head; without `cross`, for texts alone."""
        fields = {field.name: getattr(self.network.decoder, field.name) for field in dataclasses.fields(Bert)}
        return Bert(**{k: v for k, v in fields.items() if k not in ("parent", "name")} | dict(cross=cross, head=False))

    def encode(self, params: Params, tokens, mask, features=None) -> Float[Array, "b width"]:
        """The first token's state, of texts alone or of texts that look at a picture's features."""
        shared = params["network"]["decoder"]
        layers = dict(shared["layers"]) | dict(params["encoder"])
        if features is None:
            layers = {name: value for name, value in layers.items() if not name.startswith("cross")}
        weights = {"embed": shared["embed"], "embed_norm": shared["embed_norm"], "layers": layers}
        return self._encoder(features is not None).apply({"params": weights}, tokens, mask, features)[:, 0]

    def _head(self, params, name, x):
        return self._heads[name].apply({"params": params["heads"][name]}, x)

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: ITC + ITM + LM; metrics: the three, the words' perplexity, and how often ITM is right.

        Raises ValueError for a batch of one, in which there is nothing to tell it from.
        """
        if len(batch["image"]) < 2:
            raise ValueError("Blip: a batch must have two pictures or more, each the other's negative, got 1")
        features = sharding.constrain(self._apply(params, self.pixels(batch["image"]), method="encode"))
        text, mask = batch["text"], batch["text_mask"]
        image = unit(self._head(params, "image", features[:, 0]))
        alone = unit(self._head(params, "text", self.encode(params, *self.rows(text, mask, self.text_start))))
        scale = jnp.exp(clipped(params["logit_scale"], 0.0, LOG_TOP))
        logits = scale * jnp.dot(image, alone.T, preferred_element_type=jnp.promote_types(image.dtype, jnp.float32))
        words, perplexity = self.words(params, features, batch)
        matched, accuracy = self._matching(params, features, self.rows(text, mask, self.encoder_start), logits, key)
        terms = {"itc": info_nce(logits), "itm": matched, "lm": words}
        found = terms | {"perplexity": perplexity, "match_accuracy": accuracy, "scale": scale}
        return {"main": Loss(sum(terms.values()), found)}

    def _matching(self, params, features, text, logits, key):
        """(ITM's cross-entropy, its accuracy) of the true pairs and of two hard ones for each."""
        own = jnp.where(jnp.eye(len(logits), dtype=bool), -jnp.inf, jax.lax.stop_gradient(logits))
        texts, pictures = (jax.random.categorical(k, x) for k, x in zip(jax.random.split(key), (own, own.T)))
        tokens, mask = (_in_turn(x, x[texts], x) for x in text)
        found = self._head(
            params, "match", self.encode(params, tokens, mask, _in_turn(features, features, features[pictures]))
        )
        return matching_loss(found, jnp.arange(len(tokens)) % 3 == 0)


def _in_turn(*batches: Array) -> Array:
    """[b, ...] each -> [n b, ...]: the first of all, the second of all, and so on; a device's stay where they are."""
    return sharding.constrain(jnp.stack(batches, 1).reshape(-1, *batches[0].shape[1:]))


def matching_loss(logits: Float[Array, "n 2"], true: Bool[Array, " n"]) -> tuple[Any, Any]:
    """(mean cross-entropy, accuracy); true: which rows are pairs that belong together (class 1)."""
    label = true.astype(jnp.int32)
    logs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    right = jnp.take_along_axis(logs, label[:, None], 1)[:, 0]
    return -right.mean(), (logits.argmax(1) == label).mean()
