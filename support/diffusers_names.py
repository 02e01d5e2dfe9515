"""Stable Diffusion v1 as diffusers keeps it: the files of a folder, and names -> CompVis names.

A row of a table holds a part of a name in diffusers, and the same part in CompVis. All rows are
applied to every name, in order. i is a level, j a block inside it.
"""

from support.cli import UserError

UNET_NAMES = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "query.": "q.",  # older files have this and the next three names
    "key.": "k.",
    "value.": "v.",
    "proj_attn.": "proj_out.",
}


def unet_table():
    """CompVis counts the blocks through all levels, three to a level."""
    table = {}
    for j in range(3):
        table[f"resnets.{j}.norm1."] = f"resnets.{j}.in_layers.0."
        table[f"resnets.{j}.conv1."] = f"resnets.{j}.in_layers.2."
        table[f"resnets.{j}.time_emb_proj."] = f"resnets.{j}.emb_layers.1."
        table[f"resnets.{j}.norm2."] = f"resnets.{j}.out_layers.0."
        table[f"resnets.{j}.conv2."] = f"resnets.{j}.out_layers.3."
        table[f"resnets.{j}.conv_shortcut."] = f"resnets.{j}.skip_connection."
    for i in range(4):
        for j in range(3):
            table[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            table[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
            table[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            table[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        table[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * i + 3}.0.op."
        position = 1 if i == 0 else 2  # the coarsest level, the first, has no attention
        table[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{3 * i + 2}.{position}."
    return table | UNET_NAMES


def vae_table(levels):
    """CompVis counts the levels of the decoder from the finest, diffusers from the coarsest."""
    table = {}
    for i in range(levels):
        table[f"down_blocks.{i}.resnets."] = f"down.{i}.block."
        table[f"down_blocks.{i}.downsamplers.0."] = f"down.{i}.downsample."
        table[f"up_blocks.{i}.resnets."] = f"up.{levels - 1 - i}.block."
        table[f"up_blocks.{i}.upsamplers.0."] = f"up.{levels - 1 - i}.upsample."
    return table | VAE_NAMES


def compvis_names(tensors):
    """{name: tensor} with the names of CompVis. Names that are not of diffusers stay the same."""
    if "mid_block.resnets.0.norm1.weight" in tensors:
        prefix, table = "model.diffusion_model.", unet_table()
    elif "decoder.mid_block.resnets.0.norm1.weight" in tensors:
        up_blocks = {name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks")}
        prefix, table = "", vae_table(len(up_blocks))  # as in LDM's kl-f8
    else:
        return tensors
    renamed = {}
    for name, value in tensors.items():
        for old, new in table.items():
            name = name.replace(old, new)
        if ".attn_1." in name and value.dim() == 2:  # diffusers: linear; CompVis: 1x1 convolution
            value = value[:, :, None, None]
        renamed[prefix + name] = value
    return renamed


def find_part(folder, part):
    """The path of the U-Net ("unet") or the autoencoder ("vae") in a diffusers folder."""
    for ending in ("safetensors", "fp16.safetensors", "bin", "fp16.bin"):
        path = folder / part / f"diffusion_pytorch_model.{ending}"
        if path.is_file():
            return path
    file = f"{part}/diffusion_pytorch_model"
    raise UserError(f"{folder}: no {file}.safetensors or .bin in it; give a whole diffusers folder")
