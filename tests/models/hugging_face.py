"""Fills models of Hugging Face's `transformers`, which name their tensors otherwise, with the weights of ours."""
import re

# (pattern, replacement) from our parameter names to theirs, for what DETR and Deformable DETR have in common.
COMMON = [
    (r"^backbone\.0\.body\.conv1\.", "embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", "embedder.embedder.normalization."),
    (r"^backbone\.0\.body\.layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"downsample\.0\.", "shortcut.convolution."),
    (r"downsample\.1\.", "shortcut.normalization."),
    (r"(?<=\d\.)conv(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution."),
    (r"(?<=\d\.)bn(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"linear(\d)\.", r"fc\1."),
    (r"^transformer\.", ""),
    (r"^query_embed\.", "query_position_embeddings."),
]
DETR = [
    (r"^transformer\.decoder\.norm\.", "decoder.layernorm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"multihead_attn", "encoder_attn"),
    (r"^input_proj\.", "input_projection."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^backbone\.1\.row_embed\.", "row_embeddings."),
    (r"^backbone\.1\.col_embed\.", "column_embeddings."),
]
DEFORMABLE_DETR = [
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"cross_attn", "encoder_attn"),
]


def copy_weights(ours, theirs, own_names):
    """Fill their model from ours; every tensor of both must take part. own_names: `DETR` or `DEFORMABLE_DETR`."""
    state = {}
    for name, value in ours.state_dict().items():
        for pattern, replacement in [*own_names, *COMMON]:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state[name.replace("attn.out_proj", "attn.o_proj")] = value
    names = {_simplified(name): name for name in theirs.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(names) == set(state)
    theirs.load_state_dict({names[name]: value for name, value in state.items()}, strict=False)


def randomise_batch_norm(module, generator):
    """Frozen batch norms that do something."""
    module.running_var.uniform_(0.5, 2.0, generator=generator)
    module.running_mean.normal_(0, 0.2, generator=generator)
    module.weight.uniform_(0.5, 1.2, generator=generator)
    module.bias.normal_(0, 0.2, generator=generator)


def _simplified(name):
    """Their names without what differs between versions of the library: containers, and three modules' names."""
    containers = r"^(model\.)?(backbone\.(conv_encoder\.)?(model\.|position_embedding\.)*|position_embedding\.)?"
    return re.sub(containers, "", name).replace("attn.out_proj", "attn.o_proj").replace(".mlp.fc", ".fc")
