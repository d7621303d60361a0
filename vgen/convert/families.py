"""Which family reads which checkpoint: an explicit table by config class, and telltale names for files without one."""

import re
from collections.abc import Mapping

from vgen.config import UserError, resolve
from vgen.convert.family import Family
from vgen.convert.sources import Source

# Class in config.json (`architectures` of transformers, `_class_name` of diffusers) -> family.
BY_CLASS: Mapping[str, str] = {
    "T5EncoderModel": "vgen.convert.t5:T5",
    "T5ForConditionalGeneration": "vgen.convert.t5:T5",
    "T5Model": "vgen.convert.t5:T5",
    "T5WithLMHeadModel": "vgen.convert.t5:T5",  # as the files of version 1.0 call it
    "UVit2DModel": "vgen.convert.amused:UVIT",
    "UNet2DModel": "vgen.convert.unet_diffusers:PLAIN",
    "UNet2DConditionModel": "vgen.convert.unet_diffusers:TEXT",
    "AutoencoderKL": "vgen.convert.autoencoder:DIFFUSERS_KL",
    "VQModel": "vgen.convert.vqgan:DIFFUSERS_VQ",
    "MaskGitVQGAN": "vgen.convert.vqgan:OPENMUSE_MASKGIT_VQ",
    "ViTModel": "vgen.convert.vit:HF_VIT",
    "ViTForImageClassification": "vgen.convert.vit:HF_VIT_CLASSIFIER",
    "Dinov2Model": "vgen.convert.dinov2:HF_DINOV2",
    "Dinov2ForImageClassification": "vgen.convert.dinov2:HF_DINOV2_CLASSIFIER",
    "Dinov2WithRegistersModel": "vgen.convert.dinov2:HF_REGISTERS",
    "Dinov2WithRegistersForImageClassification": "vgen.convert.dinov2:HF_REGISTERS_CLASSIFIER",
    "ViTMAEForPreTraining": "vgen.convert.mae:HF_MAE",
    "ViTMAEModel": "vgen.convert.mae:HF_MAE_ENCODER",
    "CLIPModel": "vgen.convert.clip:HF_CLIP",
    "open_clip": "vgen.convert.clip:OPEN_CLIP",
    "CLIPTextModel": "vgen.convert.clip:HF_TEXT",
    "CLIPTextModelWithProjection": "vgen.convert.clip:HF_TEXT_PROJECTION",
    "CLIPVisionModel": "vgen.convert.clip:HF_VISION",
    "CLIPVisionModelWithProjection": "vgen.convert.clip:HF_VISION_PROJECTION",
    "SamModel": "vgen.convert.sam:HF",
    "Blip2QFormerModel": "vgen.convert.qformer:HF",
    "Blip2Model": "vgen.convert.blip:BLIP2",
    "Blip2ForConditionalGeneration": "vgen.convert.blip:BLIP2",
    "BlipForConditionalGeneration": "vgen.convert.blip:HF",
    "DiTTransformer2DModel": "vgen.convert.dit:DIFFUSERS",
    "PixArtTransformer2DModel": "vgen.convert.pixart:DIFFUSERS",
    "Transformer2DModel": "vgen.convert.pixart:TRANSFORMER_2D",  # as the published folders of both call it
}
# Regular expression that one of the names in the file matches entirely -> family; the first that does wins.
BY_NAME: tuple[tuple[str, str], ...] = (
    (r"temb\.dense\.0\.weight", "vgen.convert.unet_ddpm:DDPM"),
    (r"out\.2\.positional_embedding", "vgen.convert.unet_openai:ADM_CLASSIFIER"),
    (r"middle_block\.1\.qkv\.weight", "vgen.convert.unet_openai:ADM"),
    (r"middle_block\.1\.transformer_blocks\.0\.attn1\.to_q\.weight", "vgen.convert.unet_openai:LDM"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "vgen.convert.t5:T5"),
    (r"(transformer\.)?blocks\.0\.attn\.key\.weight", "vgen.convert.gpt:TAMING"),  # ahead of the VQ-GAN beside it
    (r"first_stage_model\.quantize\.embedding\.weight", "vgen.convert.vqgan:LDM_VQ"),
    (r"first_stage_model\.encoder\.down\.0\.block\.0\.conv1\.weight", "vgen.convert.autoencoder:FIRST_STAGE_KL"),
    (r"model\.diffusion_model\.middle_block\.1\..*", "vgen.convert.unet_openai:LDM_DENOISER"),
    (r"decoder\.up\.1\.upsample_conv\.weight", "vgen.convert.vqgan:OPENMUSE_MASKGIT_VQ"),
    (r"quantize\.embedding\.weight", "vgen.convert.vqgan:TAMING_VQ"),
    (r"encoder\.down\.0\.block\.0\.conv1\.weight", "vgen.convert.autoencoder:LDM_KL"),
    (r"(params/)?encoder/ResBlock_0/Conv_0/kernel", "vgen.convert.vqgan:MASKGIT_VQ"),
    (r"(params/)?MlmLayer_0/mlm_dense/kernel", "vgen.convert.maskgit:MASKGIT"),
    (r"encoder\.blocks\.input\.w", "vgen.convert.dvae:DVAE_BOTH"),
    (r"blocks\.group_1\.block_1\.id_path\.w", "vgen.convert.dvae:DECODER"),  # the encoder's first block has none
    (r"blocks\.group_1\.block_1\.res_path\.conv_1\.w", "vgen.convert.dvae:ENCODER"),
    (r"Mixed_5b\.branch1x1\.conv\.weight", "vgen.convert.inception:PYTORCH_FID"),
    (r"blocks\.2\.0\.branch1x1\.conv\.weight", "vgen.convert.inception:WRAPPER"),
    (r"net\.slice1\.0\.weight", "vgen.convert.lpips:PACKAGE"),
    (r"codebook\.embedding\.weight", "vgen.convert.vqvae:VQ"),
    (r"layers\.0\.vert_to_horiz\.weight", "vgen.convert.vqvae:PIXELCNN"),
    (r"horizontal\.conv\.conv\.weight_v", "vgen.convert.pixelsnail:ROSINALITY"),
    (r"layer1\.0\.prelu\.weight", "vgen.convert.iresnet:ARCFACE"),
    (r"((opt/target|params)/)?Transformer/posembed_input/pos_embedding", "vgen.convert.vit:AUGREG"),
    (r"((opt/target|params)/)?Transformer/encoder_norm/scale", "vgen.convert.vit:BIG_VISION"),
    (r"blocks\.(\d+\.)?0\.ls1\.gamma", "vgen.convert.dinov2:AUTHORS"),
    (r"y_embedder\.embedding_table\.weight", "vgen.convert.dit:AUTHORS"),
    (r"y_embedder\.y_proj\.fc1\.weight", "vgen.convert.pixart:AUTHORS"),
    (r"blocks\.0\.attn\.qkv\.weight", "vgen.convert.mae:AUTHORS"),
    (r"(.+\.)?visual\.(class_embedding|attnpool\.positional_embedding)", "vgen.convert.clip:OPENAI"),
    (r"image_encoder\.blocks\.0\.attn\.rel_pos_h", "vgen.convert.sam:AUTHORS"),
    (r"Qformer\.bert\.embeddings\.word_embeddings\.weight", "vgen.convert.qformer:LAVIS"),
    (r"text_decoder\.bert\.embeddings\.word_embeddings\.weight", "vgen.convert.blip:AUTHORS"),
)


def classes(source: Source) -> list[str]:
    """The classes that a config names, [] where there is none or it names none; open_clip's names no class."""
    if isinstance(source.config.get("model_cfg"), Mapping):
        return ["open_clip"]
    named = source.config.get("architectures") or source.config.get("_class_name") or []
    return [str(name) for name in (named if isinstance(named, list) else [named])]


def find(source: Source) -> str:
    """The family of a checkpoint as "vgen.convert.module:NAME"; UserError listing what is known if it has none."""
    if source.family:
        if not re.fullmatch(r"vgen\.convert\.\w+:\w+", source.family):
            raise UserError(f"{source.path}: {source.family!r} is not a family of vgen.convert")
        return source.family
    named = classes(source)
    for name in named:
        if name in BY_CLASS:
            return BY_CLASS[name]
    if named:
        raise UserError(
            f"{source.path}: vgen does not read a {' or '.join(named)}; it reads {', '.join(sorted(BY_CLASS))}"
        )
    for pattern, family in BY_NAME:
        if any(re.fullmatch(pattern, name) for name in source.tensors):
            return _checked(family, source)
    known = ", ".join(sorted({family for _, family in BY_NAME}))
    raise UserError(
        f"{source.path}: no config.json names a class, and no array has a name that tells the family "
        f"(there are e.g. {', '.join(list(source.tensors)[:3])}); choose one by hand, such as {known}"
    )


def _checked(family: str, source: Source) -> str:
    """A family that names alone tell; UserError where they do not tell enough."""
    if family == "vgen.convert.clip:OPENAI" and (
        reason := resolve("vgen.convert.clip:untold")(source.path.name, source.shapes)
    ):
        raise UserError(
            f"{source.path} {reason}, and the arrays do not tell its activation: choose the family by hand, "
            "vgen.convert.clip:OPEN_CLIP (GELU) or vgen.convert.clip:OPENAI (quick GELU)"
        )
    return family


def get(name: str) -> Family:
    """The Family that "vgen.convert.module:NAME" names; UserError if it is none."""
    family = resolve(name)
    if not isinstance(family, Family):
        raise UserError(f"{name} is a {type(family).__name__}, expected a vgen.convert.family.Family")
    return family
