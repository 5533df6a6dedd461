"""The key tables at full size: published configs on the meta device, every name and shape, nothing missing or left."""

from functools import cache

import pytest
import torch
from diffusers.loaders import single_file_utils as stock_utils

from pipelines.convert_configs import LAYOUTS, infer, recognise, unheard
from pipelines.convert_files import stock_like
from pipelines.key_maps import MMDIT, UNET, VAE, pairs

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UPC, UPP = "CrossAttnUpBlock2D", "UpBlock2D"
FOUR = dict(
    block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, down_block_types=[CROSS] * 3 + [PLAIN],
    up_block_types=[UPP] + [UPC] * 3, in_channels=4, out_channels=4, norm_num_groups=32,
    transformer_layers_per_block=1,
)  # fmt: skip
KL = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, in_channels=3, out_channels=3, norm_num_groups=32,
    use_quant_conv=True, use_post_quant_conv=True,
)  # fmt: skip
VAE4 = KL | dict(latent_channels=4, scaling_factor=0.18215, sample_size=512)
VAE16 = KL | dict(
    latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024, force_upcast=True,
    use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
WORDS = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)
CLIP_L = WORDS | dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
    hidden_act="quick_gelu",
)  # fmt: skip
CLIP_H = WORDS | dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=1024,
    hidden_act="gelu",
)  # fmt: skip
CLIP_G = WORDS | dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    relative_attention_num_buckets=32, feed_forward_proj="gated-gelu",
)  # fmt: skip
SD3 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=192, dual_attention_layers=[], qk_norm=None,
)  # fmt: skip
SD3_TEXT = dict(vae=VAE16, text_encoder=CLIP_L, text_encoder_2=CLIP_G, text_encoder_3=T5_XXL)
PUBLISHED = {
    "sd15": dict(
        unet=FOUR | dict(cross_attention_dim=768, attention_head_dim=8, use_linear_projection=False, sample_size=64),
        vae=VAE4,
        text_encoder=CLIP_L,
    ),
    "sd21": dict(
        unet=FOUR
        | dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
        | dict(sample_size=96, upcast_attention=True),
        vae=VAE4 | dict(sample_size=768),
        text_encoder=CLIP_H,
    ),
    "sdxl": dict(
        unet=FOUR
        | dict(block_out_channels=[320, 640, 1280], down_block_types=[PLAIN, CROSS, CROSS])
        | dict(up_block_types=[UPC, UPC, UPP], transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048)
        | dict(attention_head_dim=[5, 10, 20], use_linear_projection=True, addition_embed_type="text_time")
        | dict(addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, sample_size=128),
        vae=VAE4 | dict(scaling_factor=0.13025, sample_size=1024, force_upcast=True),
        text_encoder=CLIP_L,
        text_encoder_2=CLIP_G,
    ),
    "sd3": dict(transformer=SD3, **SD3_TEXT),
    "sd3.5-medium": dict(
        transformer=SD3 | dict(dual_attention_layers=list(range(13)), qk_norm="rms_norm", pos_embed_max_size=384),
        **SD3_TEXT,
    ),
    "sd3.5-large": dict(
        transformer=SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"),
        **SD3_TEXT,
    ),
}
CASES = [(family, part) for family, parts in PUBLISHED.items() for part in parts]


def layout_of(family: str):
    return LAYOUTS[family[:3] if family.startswith("sd3") else family]


@cache
def both(family: str, name: str):
    """Part, its stock names, and its names in the file without the prefix: meta tensors."""
    part = next(p for p in layout_of(family).parts if p.name == name)
    stock = stock_like(part, PUBLISHED[family][name])
    found = pairs(part.table, stock)
    single = {p.single: p.op.to_single(*(stock[n] for n in p.stock)) for p in found}
    return part, stock, single, found


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_name_has_one_place_in_both_directions(family: str, name: str):
    _, stock, single, found = both(family, name)
    back = {n: x for p in found for n, x in zip(p.stock, p.op.to_stock(single[p.single]), strict=True)}
    assert len(single) == len(found) and sum(len(p.stock) for p in found) == len(stock)
    assert shapes(back) == shapes(stock)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_config_is_told_by_the_shapes(family: str, name: str):
    part, stock, single, _ = both(family, name)
    told = infer(layout_of(family), part, single)
    assert {k: told.get(k) for k in PUBLISHED[family][name]} == PUBLISHED[family][name]
    assert shapes(stock_like(part, told)) == shapes(stock)


@pytest.mark.parametrize("family", PUBLISHED)
def test_stock_translates_our_names_into_the_same(family: str):
    """The judge: the loader's own conversions, on names and shapes."""
    layout, config = layout_of(family), PUBLISHED[family]
    whole = {p.prefix + n: x for p in layout.parts for n, x in both(family, p.name)[2].items()}
    net = layout.parts[0].name
    if net == "unet":
        translated = stock_utils.convert_ldm_unet_checkpoint(dict(whole), config[net])
    else:
        kept = {n: x for n, x in whole.items() if n.startswith("model.diffusion_model.")}
        translated = stock_utils.convert_sd3_transformer_checkpoint_to_diffusers(kept)
    assert shapes(translated) == shapes(both(family, net)[1])
    translated = stock_utils.convert_ldm_vae_checkpoint(dict(whole), config["vae"])
    assert shapes(translated) == shapes(both(family, "vae")[1])
    kind = {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base", "sd3": "sd3", "sd3.5-medium": "sd35_medium"}
    assert stock_utils.infer_diffusers_model_type(whole) == kind.get(family, "sd35_large")
    assert recognise("x", list(whole)) is layout


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_reader_without_configs_knows_the_published_ones_and_is_told_of_others(family: str):
    layout, configs = layout_of(family), PUBLISHED[family]
    likes = {name: both(family, name)[2] for name in configs}
    assert unheard(layout, configs, layout.scheduler, likes) == []
    other = configs | {"vae": configs["vae"] | {"scaling_factor": 0.5}}
    other["text_encoder"] = configs["text_encoder"] | {"hidden_act": "relu"}
    schedule = "shift" if layout.name == "sd3" else "beta_end"
    told = unheard(layout, other, layout.scheduler | {schedule: 1.0}, likes)
    assert [note.split(" is ")[0] for note in told] == [
        "vae.scaling_factor", "text_encoder.hidden_act", f"scheduler.{schedule}"
    ]  # fmt: skip


# Names and shapes that those who have opened the published files know.
KNOWN = {
    "sd15": {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    },
    "sd21": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.out_proj.bias": (1280,),
    },
    "sd3": {
        "model.diffusion_model.pos_embed": (1, 36864, 1536),
        "model.diffusion_model.x_embedder.proj.weight": (1536, 16, 2, 2),
        "model.diffusion_model.y_embedder.mlp.0.weight": (1536, 2048),
        "model.diffusion_model.context_embedder.weight": (1536, 4096),
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.weight": (9216, 1536),
        "model.diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        "model.diffusion_model.joint_blocks.23.context_block.attn.qkv.weight": (4608, 1536),
        "model.diffusion_model.final_layer.linear.weight": (64, 1536),
        "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        "text_encoders.clip_g.transformer.text_projection.weight": (1280, 1280),
        "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
    },
    "sd3.5-medium": {
        "model.diffusion_model.pos_embed": (1, 147456, 1536),
        "model.diffusion_model.joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "model.diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "model.diffusion_model.joint_blocks.0.context_block.attn.ln_k.weight": (64,),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", KNOWN)
def test_names_that_are_known_by_heart(family: str):
    parts = layout_of(family).parts
    whole = {p.prefix + n: tuple(x.shape) for p in parts for n, x in both(family, p.name)[2].items()}
    assert {name: whole.get(name) for name in KNOWN[family]} == KNOWN[family]
    assert "model.diffusion_model.joint_blocks.23.context_block.attn.proj.weight" not in whole


@pytest.mark.parametrize(
    ("family", "part", "n"),
    [("sd15", "unet", 686), ("sd15", "vae", 248), ("sd15", "text_encoder", 196), ("sdxl", "unet", 1680)],
)
def test_as_many_tensors_as_in_the_published_files(family: str, part: str, n: int):
    assert len(both(family, part)[2]) == n


@pytest.mark.parametrize(
    ("table", "names", "said"),
    [
        (UNET, ["conv_in.weight", "encoder_hid_proj.weight"], "encoder_hid_proj.weight: has no place"),
        (UNET, ["add_embedding.linear_1.weight", "class_embedding.linear_1.weight"], "class_embedding.linear_1.weight"),
        (VAE, ["decoder.conv_in.bias", "encoder.down_blocks.0.attentions.0.to_q.bias"], "attentions.0.to_q.bias"),
        (MMDIT, ["transformer_blocks.0.attn.to_q.bias"], "attn.to_k.bias: missing beside .*attn.to_q.bias"),
    ],
)
def test_a_name_without_a_place_is_told(table, names, said):
    with pytest.raises(ValueError, match=said):
        pairs(table, names)


def test_two_names_for_one_place_are_told():
    """A level with one layer more than the others: CompVis's counting cannot say it."""
    names = [f"down_blocks.{i}.resnets.{j}.norm1.bias" for i, layers in enumerate((2, 3)) for j in range(layers)]
    names += [
        "down_blocks.0.downsamplers.0.conv.bias",
        "up_blocks.0.resnets.4.norm1.bias",
        "up_blocks.1.resnets.0.norm1.bias",
    ]
    with pytest.raises(ValueError, match=r"up_blocks.1.resnets.0.norm1.bias: its place .* is taken by up_blocks.0"):
        pairs(UNET, names)


def test_operations_are_their_own_inverse_and_keep_bits():
    from pipelines.key_maps import CONV, QKV, SAME, SWAP, TRANSPOSE

    x = torch.randn(6, 4, dtype=torch.bfloat16)
    for op, single in ((SAME, x), (CONV, x[:, :, None, None]), (QKV, x), (SWAP, x), (TRANSPOSE, x)):
        assert torch.equal(op.to_single(*op.to_stock(single)), single)
    assert torch.equal(SWAP.to_single(x), torch.cat([x[3:], x[:3]]))
