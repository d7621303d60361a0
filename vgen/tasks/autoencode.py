"""Train an autoencoder, to tokens or to a Gaussian: reconstruction, perceptual and adversarial losses, and the
rules of the bottleneck.

Sources: Esser et al. 2021 (taming), eq. 4-7; Chang et al. 2022 (MaskGIT), section 3.1; Chang et al. 2023 (Muse),
section 2.2 and, for the fine-tuned decoder, section 2.6; Razavi et al. 2019 (VQ-VAE-2) for the averaged codebook;
Rombach et al. 2022, appendix G, for the Gaussian; Ramesh et al. 2021 (DALL-E), section 2.1 and appendix A, for the
relaxed tokens of a DVAE.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen.data import images as image_ops
from vgen.hosts import whole
from vgen.layers.quantize import code_counts, ema_update, usage_from_counts
from vgen.metrics.lpips import feature_loss, init_lpips, lpips
from vgen.models import discriminator as gan
from vgen.models.autoencoder import AutoencoderKL
from vgen.models.dvae import DVAE, gumbel_softmax, kl_to_uniform, logit_laplace
from vgen.models.vqgan import VQGAN
from vgen.models.vqvae import VQVAE
from vgen.types import Batch, Context, Loss, Params

LAST_LAYER = "decoder/conv_out/kernel"


@dataclasses.dataclass(frozen=True)
class Autoencode:
    """Images in, the same images out, through discrete tokens or, with an AutoencoderKL, Gaussian latents.

    A DVAE is trained on draws from its relaxed tokens, by the likelihood of the pixels ("laplace", nats per value of
    the picture) beside the other losses of the picture.
    model: the autoencoder.  discriminator: a PatchGAN, or None for no adversarial loss.
    train: "all", or "decoder": only the decoder learns (Muse's fine-tuned decoder; encoder and codebook stay).
    l1, l2: weights of the mean absolute and squared error.  perceptual: weight of the perceptual loss.
    perceptual_kind: "features" (`metrics.lpips.feature_loss`, which needs no weights) or "lpips", whose network is then
      a frozen part of the parameters below `lpips`; give its weight files in the stage's `init`.
    gan, gan_start: weight of the generator's loss, and the step at which it and the discriminator begin.
    gan_loss: "hinge" or "nonsaturating".  adaptive: scale the generator's loss by the ratio of the two gradients at
      the decoder's last layer (taming, eq. 7).  r1: weight gamma / 2 of the penalty on real images (MaskGIT: 10 / 2);
      only for a discriminator without batch normalisation.
    kl: weight of the Gaussian's KL against a standard normal, in nats per value of the picture; 1e-6 in latent
      diffusion, whose sums over both have this ratio.  Of a DVAE: of the KL against uniform tokens (DALL-E: 6.6).
    kl_steps: that weight rises from 0 over so many steps.
    least_scale: of a DVAE's likelihood, see `logit_laplace`.
    temperature: (first, last, steps): the relaxation of a DVAE's tokens becomes sharper over so many steps; this and
      the KL's weight follow a cosine (appendix A.2).
    decay, revive_below: of an averaged codebook (`layers.quantize.ema_update`), when model.ema.
    continuous_steps: with an averaged codebook, so many first steps train the autoencoder without quantising, while the
      codes are redrawn from the latents of every batch: the codebook starts where the latents are, and none is wasted
      (the data-dependent start of Lancucki et al. 2020, "Robust training of vector quantized bottleneck models").
    crop_size, downsampled: 0 trains on whole images.  Otherwise on crop_size x crop_size views: the first `downsampled`
      share of a batch is the whole image reduced to that size, the rest are random crops, so that one tokenizer
      serves both resolutions of a cascade.
    """

    model: VQGAN | VQVAE | AutoencoderKL | DVAE
    discriminator: gan.NLayerDiscriminator | None = None
    train: str = "all"
    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.1
    perceptual_kind: str = "features"
    gan: float = 0.1
    gan_start: int = 0
    gan_loss: str = "hinge"
    adaptive: bool = True
    r1: float = 0.0
    kl: float = 1e-6
    kl_steps: int = 0
    least_scale: float = 0.0
    temperature: tuple[float, float, int] = (1.0, 1 / 16, 150_000)
    decay: float = 0.99
    revive_below: float = 0.0
    continuous_steps: int = 0
    crop_size: int = 0
    downsampled: float = 0.5

    def __post_init__(self):
        if self.train not in ("all", "decoder"):
            raise ValueError(f"Autoencode: train must be 'all' or 'decoder', got {self.train!r}")
        if self.gan_loss not in ("hinge", "nonsaturating"):
            raise ValueError(f"Autoencode: gan_loss must be 'hinge' or 'nonsaturating', got {self.gan_loss!r}")
        if self.continuous_steps and not (self._averaged and self.train == "all"):
            raise ValueError("Autoencode: continuous_steps needs model.ema and train='all'")
        if getattr(self.model, "layout", None) == "batch_norm":
            raise ValueError(
                "Autoencode: a VQVAE of layout 'batch_norm' goes by statistics that training does not move; train "
                "layout 'paper' or 'sonnet'"
            )
        if self.r1 and self.discriminator is not None and self.discriminator.norm == "batch":
            raise ValueError("Autoencode: r1 needs a discriminator whose norm is 'group' or 'none', got 'batch'")
        if self._relaxed and (self.discriminator is not None or self.train != "all"):
            raise ValueError("Autoencode: a DVAE takes no discriminator, and train must be 'all'")
        if self.perceptual_kind not in ("features", "lpips"):
            raise ValueError(f"Autoencode: perceptual_kind must be 'features' or 'lpips', got {self.perceptual_kind!r}")

    @property
    def _gaussian(self) -> bool:
        return isinstance(self.model, AutoencoderKL)

    @property
    def _relaxed(self) -> bool:
        return isinstance(self.model, DVAE)

    @property
    def _averaged(self) -> bool:
        return getattr(self.model, "ema", False)

    @property
    def groups(self) -> dict[str, str]:
        if self.train == "decoder":
            gen = r"decoder/.*|post_quant_conv/.*"
        else:
            gen = r"(encoder|decoder|quant_conv|post_quant_conv)/.*"
            gen += "" if self._gaussian or self._averaged else "|quantizer/codebook"
        return {"gen": gen} | ({"disc": r"discriminator/.*"} if self.discriminator is not None else {})

    @property
    def buffers(self) -> str:
        codebook = r"quantizer/.*|" if self._averaged and self.train == "all" else ""
        return codebook + r"discriminator/norm_\d+/(mean|var)"

    def init(self, key, batch: Batch) -> Params:
        """Parameters of the tokenizer at the top level, and of the discriminator below `discriminator`."""
        images = image_ops.to_float(batch["image"][:1])
        params = dict(self.model.init(key, images)["params"])
        if self.discriminator is not None:
            params["discriminator"] = self.discriminator.init(jax.random.fold_in(key, 1), images)["params"]
        if self.perceptual_kind == "lpips":
            params["lpips"] = init_lpips(key)
        return params

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"gen", "disc"}; the reconstruction, and with it the whole backward pass, is computed once for both."""
        view_key, code_key = jax.random.split(key)
        x = self._views(image_ops.to_float(batch["image"]), view_key)
        z_q, bottleneck = self._bottleneck(params, ctx, x, code_key)
        # A vjp in the decoder's last kernel alone gives the gradients that the adaptive weight needs.
        decode = lambda kernel: self.model.apply({"params": _with(params, LAST_LAYER, kernel)}, z_q, method="decode")
        x_hat, last_vjp = jax.vjp(decode, params["decoder"]["conv_out"]["kernel"])

        detached = jax.lax.stop_gradient(x_hat)
        compare = lambda y: self._reconstruction(params, y, x)
        (rec, parts), rec_grad = jax.value_and_grad(compare, has_aux=True)(detached)
        metrics, losses = parts | bottleneck.metrics, {}
        value, grad = rec, rec_grad
        if self.discriminator is not None:
            adversarial = ctx.step >= self.gan_start
            score = self._score(params["discriminator"])
            g, g_grad = jax.lax.cond(
                adversarial, lambda: jax.value_and_grad(lambda y: self._fool(score, y))(detached),
                lambda: (jnp.zeros((), rec.dtype), jnp.zeros_like(detached)),
            )  # fmt: skip
            weight = jnp.asarray(self.gan, rec.dtype)
            if self.adaptive:
                weight = weight * gan.adaptive_weight(last_vjp(rec_grad)[0], last_vjp(g_grad)[0], scale=1.0)
                weight = jnp.where(adversarial, weight, 0.0)
            value, grad = rec + weight * g, rec_grad + weight * g_grad
            losses["disc"] = jax.lax.cond(
                adversarial, lambda p: self._discriminate(p, x, detached), self._no_discriminator,
                params["discriminator"],
            )  # fmt: skip
            metrics |= {"gan/gen": g, "gan/weight": weight}
        # The gradient with respect to the picture is known; hand it to the decoder instead of differentiating again.
        pulled = (jax.lax.stop_gradient(grad) * x_hat).sum()
        value = value + pulled - jax.lax.stop_gradient(pulled)
        return {"gen": Loss(value + bottleneck.value, metrics, bottleneck.updates)} | losses

    def _bottleneck(self, params, ctx: Context, x, key) -> tuple[Any, Loss]:
        """(what the decoder gets, the bottleneck's own loss with its metrics and updates)."""
        if self._relaxed:
            return self._relaxation(self.model.apply({"params": params}, x, method="logits"), ctx.step, x[0].size, key)
        z = self.model.apply({"params": params}, x, method="encode")
        if self._gaussian:
            kl = z.kl().mean() / x[0].size
            metrics = {"kl": kl, "latent_std": z.mean.std()}
            return z.sample(key), Loss(self._kl_weight(ctx.step) * kl if self.train == "all" else 0.0, metrics)
        q = self.model.apply({"params": params}, z, method="quantize")
        continuous = ctx.step < self.continuous_steps
        z_q = jnp.where(continuous, z.astype(q.z_q.dtype), q.z_q) if self.continuous_steps else q.z_q
        metrics = {f"codebook/{name}": value for name, value in q.stats.items()}
        if self.train != "all":
            return z_q, Loss(0.0, metrics)
        metrics |= {f"codebook/{name}": term for name, term in q.losses.items()}
        updates = {}
        if self._averaged:
            state = ema_update(
                params["quantizer"], z.reshape(-1, z.shape[-1]), q.indices.reshape(-1), key, decay=self.decay,
                revive_below=jnp.where(continuous, jnp.inf, self.revive_below), normalize=self.model.normalize,
            )  # fmt: skip
            updates = {f"quantizer/{name}": leaf for name, leaf in state.items()}
        return z_q, Loss(jnp.where(continuous, 0.0, sum(q.losses.values())), metrics, updates)

    def _relaxation(self, logits, step, values, key) -> tuple[Any, Loss]:
        """A draw of relaxed tokens, and their KL per value of the picture (DALL-E, eq. 1)."""
        first, last, steps = self.temperature
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        temperature = last + (first - last) * _falling(step, steps)
        kl = kl_to_uniform(logits).sum((1, 2)).mean() / values
        stats = usage_from_counts(code_counts(logits.argmax(-1), self.model.num_codes))
        metrics = {f"codebook/{name}": value for name, value in stats.items()}
        metrics |= {"kl": kl, "temperature": temperature}
        return gumbel_softmax(key, logits, temperature), Loss(self._kl_weight(step) * kl, metrics)

    def _kl_weight(self, step):
        return self.kl * (1 - _falling(step, self.kl_steps)) if self.kl_steps else self.kl

    def _reconstruction(self, params, x_hat, x):
        """(weighted sum, {name: term}) of what compares pictures; in float32 or wider."""
        if self._relaxed:
            wide = x_hat.astype(jnp.promote_types(x_hat.dtype, jnp.float32))
            likelihood = logit_laplace(wide, x, self.least_scale).mean()
            value, terms = self._compared(params, self.model.picture(x_hat), x)
            return value + likelihood, terms | {"laplace": likelihood}
        return self._compared(params, x_hat, x)

    def _compared(self, params, x_hat, x):
        dtype = jnp.promote_types(x_hat.dtype, jnp.float32)
        error = x_hat.astype(dtype) - x.astype(dtype)
        terms = {"l1": jnp.abs(error).mean(), "l2": jnp.square(error).mean()}
        if self.perceptual and self.perceptual_kind == "lpips":
            terms["perceptual"] = lpips(params["lpips"], x_hat, x).mean().astype(dtype)
        elif self.perceptual:
            terms["perceptual"] = feature_loss(x_hat, x)
        return sum(getattr(self, name) * term for name, term in terms.items()), terms

    def _score(self, params):
        fixed = jax.lax.stop_gradient(params)
        return lambda y: self.discriminator.apply({"params": fixed}, y).logits

    def _fool(self, score, x_hat):
        fool = gan.hinge_g if self.gan_loss == "hinge" else gan.nonsaturating_g
        return fool(score(x_hat).astype(jnp.float32)).astype(jnp.promote_types(x_hat.dtype, jnp.float32))

    def _discriminate(self, params, real, fake) -> Loss:
        loss = gan.hinge_d if self.gan_loss == "hinge" else gan.nonsaturating_d
        on_real = self.discriminator.apply({"params": params}, real)
        on_fake = self.discriminator.apply({"params": _moved(params, on_real.updates)}, fake)
        wide = jnp.promote_types(on_real.logits.dtype, jnp.float32)
        value = loss(on_real.logits.astype(wide), on_fake.logits.astype(wide))
        if self.r1:
            logits = lambda y: self.discriminator.apply({"params": params}, y).logits
            value = value + self.r1 * gan.r1_penalty(logits, real)
        accuracy = ((on_real.logits > 0).mean() + (on_fake.logits < 0).mean()) / 2
        updates = {f"discriminator/{path}": leaf for path, leaf in on_fake.updates.items()}
        return Loss(value, {"gan/accuracy": accuracy.astype(jnp.float32)}, updates)

    def _no_discriminator(self, params) -> Loss:
        """The same shapes as `_discriminate`, for the steps before it begins."""
        kept = {
            f"discriminator/{name}/{stat}": params[name][stat]
            for name in params if "mean" in params[name] for stat in ("mean", "var")
        }  # fmt: skip
        dtype = jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.float32)
        return Loss(jnp.zeros((), dtype), {"gan/accuracy": jnp.zeros((), jnp.float32)}, kept)

    def _views(self, x, key):
        """Whole images, or training views of crop_size (see the class)."""
        size = self.crop_size
        if not size or size == x.shape[1]:
            return x
        low = round(self.downsampled * x.shape[0])
        corners = jax.random.randint(key, (x.shape[0] - low, 2), 0, jnp.array(x.shape[1:3]) - size + 1)
        cut = lambda image, corner: jax.lax.dynamic_slice(
            image, (corner[0], corner[1], 0), (size, size, image.shape[-1])
        )
        crops = jax.vmap(cut)(x[low:], corners)
        return jnp.concatenate([image_ops.downsample(x[:low], x.shape[1] // size), crops])

    # ------------------------------------------------------------------------------------------- use and measurement

    def reconstruct(self, params: Params, images) -> tuple[Any, Any]:
        """(reconstructions [b, h, w, 3] in [-1, 1], tokens or the means of latents) of uint8 images."""
        x_hat, q = self.model.apply({"params": params}, image_ops.to_float(images))
        if self._relaxed:
            return x_hat, q.argmax(-1)
        return jnp.clip(x_hat, -1, 1), q.mean if self._gaussian else q.indices

    def sample(self, params: Params, key, conds: Mapping[str, Any]) -> dict[str, Any]:
        """{"image_out": reconstruction of conds["image"]}; an autoencoder makes nothing up."""
        return {"image_out": image_ops.to_uint8(self.reconstruct(params, conds["image"])[0])}

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Mean PSNR (dB, per image, of uint8 pictures) over all batches, and statistics of the codes or latents.

        With crop_size, once on whole images ("psnr") and once on downsampled ones ("psnr_low").
        """
        run = jax.jit(self.reconstruct)
        names = ("", "_low") if self.crop_size else ("",)
        psnr, counts, spread = {name: [] for name in names}, {name: 0 for name in names}, []
        for batch in batches:
            for name in names:
                x = batch["image"]
                if name == "_low":
                    x = image_ops.to_uint8(image_ops.downsample(image_ops.to_float(x), x.shape[1] // self.crop_size))
                x_hat, latents = run(params, x)
                error = (image_ops.to_uint8(x_hat).astype(jnp.float32) - x) / 255
                psnr[name].append(whole(-10 * jnp.log10(jnp.square(error).mean((1, 2, 3)) + 1e-10)))
                if self._gaussian:
                    spread.append(float(latents.std()))
                else:
                    counts[name] = counts[name] + code_counts(latents, self.model.num_codes)
        if not psnr[""]:
            raise ValueError("Autoencode.evaluate: no batches; the evaluation data is empty")
        metrics = {f"psnr{name}": float(np.concatenate(psnr[name]).mean()) for name in names}
        if self._gaussian:
            return metrics | {"latent_std": float(np.mean(spread))}
        stats = usage_from_counts(sum(counts.values()))
        return metrics | {f"codebook_{name}": float(value) for name, value in stats.items()}

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"reconstruction": a sheet of originals above reconstructions}."""
        x = batch["image"][:8]
        x_hat = image_ops.to_uint8(jax.jit(self.reconstruct)(params, x)[0])
        return {"reconstruction": image_ops.grid(np.concatenate([whole(x), whole(x_hat)]), columns=len(x))}


def _falling(step, steps):
    """From 1 at the first step to 0 after `steps`, as half a cosine."""
    return (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1), 0, 1))) / 2


def _with(params, path, value):
    """A copy of a nested dict with one leaf replaced."""
    head, _, rest = path.partition("/")
    return {**params, head: _with(params[head], rest, value) if rest else value}


def _moved(params, updates):
    """Parameters with new running statistics, so that a second batch in the same step continues from them."""
    for path, leaf in updates.items():
        params = _with(params, path, leaf)
    return params
