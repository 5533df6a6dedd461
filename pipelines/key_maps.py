"""Names of weights: one CompVis-style file on the left, a diffusers pipeline folder on the right.

Each table holds rows of patterns, first match first, and is read in both directions: ``pairs`` turns a table and the
names that a stock class has into a one-to-one list, which ``convert.py`` walks from either end. In a pattern

    ``*``       is the rest of the name, the same on both sides
    ``{i}``     is a number of the right side, used as it is on the left or counted on by one of ``COUNTS``
    ``{last}``  is the number of the last transformer block
    ``{resnet}``, ``{attn}``, ``{part}``, ``{norm}`` are words of ``WORDS``, spelt differently on both sides

CompVis's UNet counts all its layers through (``input_blocks.0`` to ``output_blocks.11``) where the stock class counts
levels and layers within them; its VAE's decoder counts levels from the fine end. Sources: the module trees of
CompVis/stable-diffusion, Stability-AI/generative-models, Stability-AI/sd3.5 and open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# --- what may happen to a tensor on its way --------------------------------------------------------------------------


class Op(NamedTuple):
    """Exact in both directions: values are moved, never computed."""

    to_stock: Callable[[Tensor], Sequence[Tensor]]  # one tensor of the file -> one or several of the folder
    to_single: Callable[..., Tensor]  # and back


def _swap(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


SAME = Op(lambda x: [x], lambda x: x)
CONV = Op(lambda x: [x.reshape(x.shape[:2])], lambda x: x[:, :, None, None])  # (O, I, 1, 1) <-> (O, I)
QKV = Op(lambda x: x.chunk(3), lambda q, k, v: torch.cat([q, k, v]))  # (3D, ...) <-> three of (D, ...)
SWAP = Op(lambda x: [_swap(x)], _swap)  # (shift, scale) <-> (scale, shift), (2D, ...)
TRANSPOSE = Op(lambda x: [x.T], lambda x: x.T)  # a bare parameter (I, O) <-> a Linear's weight (O, I)


# --- the tables ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    single: str
    stock: tuple[str, ...]
    op: Op


def row(single: str, *stock: str, op: Op = SAME) -> Row:
    return Row(single, stock, op)


WORDS = {  # stock: CompVis
    "resnet": {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    },
    "attn": {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    "part": {"encoder": "encoder", "decoder": "decoder"},
    "norm": {"norm_q": "ln_q", "norm_k": "ln_k"},
}  # fmt: skip

UNET = (
    row("time_embed.0.*", "time_embedding.linear_1.*"),
    row("time_embed.2.*", "time_embedding.linear_2.*"),
    row("label_emb.0.0.*", "add_embedding.linear_1.*"),
    row("label_emb.0.2.*", "add_embedding.linear_2.*"),
    row("label_emb.weight", "class_embedding.weight"),
    row("input_blocks.0.0.*", "conv_in.*"),
    row("input_blocks.{down}.0.{resnet}.*", "down_blocks.{i}.resnets.{j}.{resnet}.*"),
    row("input_blocks.{down}.1.*", "down_blocks.{i}.attentions.{j}.*"),
    row("input_blocks.{downsample}.0.op.*", "down_blocks.{i}.downsamplers.0.conv.*"),
    row("middle_block.{twice}.{resnet}.*", "mid_block.resnets.{j}.{resnet}.*"),
    row("middle_block.1.*", "mid_block.attentions.0.*"),
    row("output_blocks.{up}.0.{resnet}.*", "up_blocks.{i}.resnets.{j}.{resnet}.*"),
    row("output_blocks.{up}.1.*", "up_blocks.{i}.attentions.{j}.*"),
    row("output_blocks.{upsample}.{after}.conv.*", "up_blocks.{i}.upsamplers.0.conv.*"),
    row("out.0.*", "conv_norm_out.*"),
    row("out.2.*", "conv_out.*"),
)

VAE = (
    row("{part}.conv_in.*", "{part}.conv_in.*"),
    row("encoder.down.{i}.block.{j}.nin_shortcut.*", "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.*"),
    row("encoder.down.{i}.block.{j}.*", "encoder.down_blocks.{i}.resnets.{j}.*"),
    row("encoder.down.{i}.downsample.conv.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"),
    row("{part}.mid.block_{next}.*", "{part}.mid_block.resnets.{j}.*"),
    row("{part}.mid.attn_1.norm.*", "{part}.mid_block.attentions.0.group_norm.*"),
    row("{part}.mid.attn_1.{attn}.weight", "{part}.mid_block.attentions.0.{attn}.weight", op=CONV),
    row("{part}.mid.attn_1.{attn}.bias", "{part}.mid_block.attentions.0.{attn}.bias"),
    row("decoder.up.{mirror}.block.{j}.nin_shortcut.*", "decoder.up_blocks.{i}.resnets.{j}.conv_shortcut.*"),
    row("decoder.up.{mirror}.block.{j}.*", "decoder.up_blocks.{i}.resnets.{j}.*"),
    row("decoder.up.{mirror}.upsample.conv.*", "decoder.up_blocks.{i}.upsamplers.0.conv.*"),
    row("{part}.norm_out.*", "{part}.conv_norm_out.*"),
    row("{part}.conv_out.*", "{part}.conv_out.*"),
    row("quant_conv.*", "quant_conv.*"),
    row("post_quant_conv.*", "post_quant_conv.*"),
)

MMDIT = (
    row("pos_embed", "pos_embed.pos_embed"),
    row("x_embedder.proj.*", "pos_embed.proj.*"),
    row("t_embedder.mlp.0.*", "time_text_embed.timestep_embedder.linear_1.*"),
    row("t_embedder.mlp.2.*", "time_text_embed.timestep_embedder.linear_2.*"),
    row("y_embedder.mlp.0.*", "time_text_embed.text_embedder.linear_1.*"),
    row("y_embedder.mlp.2.*", "time_text_embed.text_embedder.linear_2.*"),
    row("context_embedder.*", "context_embedder.*"),
    row("joint_blocks.{i}.x_block.adaLN_modulation.1.*", "transformer_blocks.{i}.norm1.linear.*"),
    row("joint_blocks.{i}.x_block.attn.qkv.*", *(f"transformer_blocks.{{i}}.attn.to_{x}.*" for x in "qkv"), op=QKV),
    row("joint_blocks.{i}.x_block.attn.{norm}.*", "transformer_blocks.{i}.attn.{norm}.*"),
    row("joint_blocks.{i}.x_block.attn.proj.*", "transformer_blocks.{i}.attn.to_out.0.*"),
    row("joint_blocks.{i}.x_block.attn2.qkv.*", *(f"transformer_blocks.{{i}}.attn2.to_{x}.*" for x in "qkv"), op=QKV),
    row("joint_blocks.{i}.x_block.attn2.{norm}.*", "transformer_blocks.{i}.attn2.{norm}.*"),
    row("joint_blocks.{i}.x_block.attn2.proj.*", "transformer_blocks.{i}.attn2.to_out.0.*"),
    row("joint_blocks.{i}.x_block.mlp.fc1.*", "transformer_blocks.{i}.ff.net.0.proj.*"),
    row("joint_blocks.{i}.x_block.mlp.fc2.*", "transformer_blocks.{i}.ff.net.2.*"),
    # the last block only reads the text: two modulations, and the stock class has them the other way round
    row(
        "joint_blocks.{last}.context_block.adaLN_modulation.1.*",
        "transformer_blocks.{last}.norm1_context.linear.*",
        op=SWAP,
    ),
    row("joint_blocks.{i}.context_block.adaLN_modulation.1.*", "transformer_blocks.{i}.norm1_context.linear.*"),
    row(
        "joint_blocks.{i}.context_block.attn.qkv.*",
        *(f"transformer_blocks.{{i}}.attn.add_{x}_proj.*" for x in "qkv"),
        op=QKV,
    ),
    row("joint_blocks.{i}.context_block.attn.ln_q.*", "transformer_blocks.{i}.attn.norm_added_q.*"),
    row("joint_blocks.{i}.context_block.attn.ln_k.*", "transformer_blocks.{i}.attn.norm_added_k.*"),
    row("joint_blocks.{i}.context_block.attn.proj.*", "transformer_blocks.{i}.attn.to_add_out.*"),
    row("joint_blocks.{i}.context_block.mlp.fc1.*", "transformer_blocks.{i}.ff_context.net.0.proj.*"),
    row("joint_blocks.{i}.context_block.mlp.fc2.*", "transformer_blocks.{i}.ff_context.net.2.*"),
    row("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", op=SWAP),
    row("final_layer.linear.*", "proj_out.*"),
)

PLAIN = (row("*", "*"),)  # CLIP and T5 as transformers names them

_LAYER, _BLOCK = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
OPEN_CLIP = (
    row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    row("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    row(f"{_BLOCK}.attn.in_proj_weight", *(f"{_LAYER}.self_attn.{x}_proj.weight" for x in "qkv"), op=QKV),
    row(f"{_BLOCK}.attn.in_proj_bias", *(f"{_LAYER}.self_attn.{x}_proj.bias" for x in "qkv"), op=QKV),
    row(f"{_BLOCK}.attn.out_proj.*", f"{_LAYER}.self_attn.out_proj.*"),
    row(f"{_BLOCK}.ln_1.*", f"{_LAYER}.layer_norm1.*"),
    row(f"{_BLOCK}.ln_2.*", f"{_LAYER}.layer_norm2.*"),
    row(f"{_BLOCK}.mlp.c_fc.*", f"{_LAYER}.mlp.fc1.*"),
    row(f"{_BLOCK}.mlp.c_proj.*", f"{_LAYER}.mlp.fc2.*"),
    row("ln_final.*", "text_model.final_layer_norm.*"),
    row("text_projection", "text_projection.weight", op=TRANSPOSE),
)

# Weights of neither form's network that files bring along: no reader needs them.
JUNK = re.compile(
    r"model_ema\.|(first_stage_model\.)?loss\.|first_stage_model\.model_ema\.|denoiser\.|edm_vpred\.|global_step$"
    r"|(\w+\.)?(alphas_cumprod(_prev)?|betas|logvar|lvlb_weights|(sqrt|log_one_minus|posterior)_\w+)$"
    r"|.*\.(position_ids|logit_scale)$|logit_scale$"
)
MARKERS = ("v_pred", "ztsnr")  # empty tensors by which ComfyUI knows SDXL's v-prediction and zero terminal SNR

OLD_SINGLE = (  # the first Stable Diffusion files were written before transformers had a ``text_model``
    (
        r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)",
        "cond_stage_model.transformer.text_model.",
    ),
)
OLD_STOCK = (  # the first pipeline folders' autoencoders
    (r"(\.mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(\.mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(\.mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(\.mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, by in table:
        name = re.sub(pattern, by, name)
    return name


# --- reading them ----------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the counting needs to know of a network; found in its stock names."""

    layers: int  # resnets in a level of the way down
    levels: int
    last: int  # number of the last transformer block
    attending: frozenset[int]  # levels of the way up that have attention

    @classmethod
    def of(cls, names: Iterable[str]) -> Sizes:
        names = list(names)

        def numbers(pattern: str) -> set[int]:
            return {int(m[1]) for name in names if (m := re.match(pattern, name))}

        return cls(
            layers=1 + max(numbers(r"down_blocks\.\d+\.resnets\.(\d+)\."), default=0),
            levels=1 + max(numbers(r"(?:decoder\.up|down)_blocks\.(\d+)\."), default=0),
            last=max(numbers(r"transformer_blocks\.(\d+)\."), default=0),
            attending=frozenset(numbers(r"up_blocks\.(\d+)\.attentions\.")),
        )


COUNTS: dict[str, Callable[[Sizes, int, int], int]] = {  # of level i, layer j
    "down": lambda s, i, j: (s.layers + 1) * i + j + 1,  # layer 0 is conv_in
    "downsample": lambda s, i, j: (s.layers + 1) * (i + 1),
    "up": lambda s, i, j: (s.layers + 1) * i + j,
    "upsample": lambda s, i, j: (s.layers + 1) * i + s.layers,  # in one layer with the level's last resnet,
    "after": lambda s, i, j: 2 if i in s.attending else 1,  # behind it and its attention
    "twice": lambda s, i, j: 2 * j,  # resnets 0 and 2, the attention between them
    "next": lambda s, i, j: j + 1,
    "mirror": lambda s, i, j: s.levels - 1 - i,
}


class Pair(NamedTuple):
    single: str
    stock: tuple[str, ...]  # several where the file fuses them
    op: Op


def pairs(table: Sequence[Row], names: Iterable[str]) -> list[Pair]:
    """One-to-one list between the file's names (without the part's prefix) and these stock names, of one part.

    Raises:
        ValueError: naming a stock name that has no place in the table, or one that it would put on another's place.
    """
    left = dict.fromkeys(names)
    sizes, found, taken = Sizes.of(left), [], {}
    for single, patterns, op in table:
        wanted = re.compile(_regex(patterns[0], sizes))
        for name in list(left):
            if not (match := wanted.fullmatch(name)):
                continue
            values = match.groupdict()
            stock = tuple(_fill(p, values, sizes, of_single=False) for p in patterns)
            pair = Pair(_fill(single, values, sizes, of_single=True), stock, op)
            if absent := [n for n in stock if n not in left]:
                raise ValueError(f"{absent[0]}: missing beside {name}, with which {pair.single} holds it in one")
            if pair.single in taken:
                raise ValueError(f"{name}: its place {pair.single} is taken by {taken[pair.single]}")
            taken[pair.single] = name
            found.append(pair)
            for n in stock:
                del left[n]
    if left:
        raise ValueError(f"{next(iter(left))}: has no place in this layout ({len(left)} such names)")
    return found


def _regex(pattern: str, sizes: Sizes) -> str:
    regex = re.escape(pattern.replace("{last}", str(sizes.last))).replace(r"\*", "(?P<tail>.+)")
    regex = re.sub(r"\\\{([ij])\\\}", r"(?P<\1>\\d+)", regex)
    for word, spelt in WORDS.items():
        regex = regex.replace(rf"\{{{word}\}}", f"(?P<{word}>{'|'.join(map(re.escape, spelt))})")
    return regex


def _fill(pattern: str, values: dict[str, str], sizes: Sizes, *, of_single: bool) -> str:
    i, j = int(values.get("i", 0)), int(values.get("j", 0))
    known = {name: count(sizes, i, j) for name, count in COUNTS.items()} | {"i": i, "j": j, "last": sizes.last}
    known |= {word: WORDS[word][values[word]] if of_single else values[word] for word in WORDS if word in values}
    return pattern.format(**known).replace("*", values.get("tail", ""))
