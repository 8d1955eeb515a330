"""The transformer against torch's own layers, and laws of attention: masks, positions, shared queries, kept weights."""
import pytest
import torch
from torch import nn

from models.position_encoding import PositionEmbeddingSine
from models.transformer import MultiheadAttention, Transformer, TransformerDecoder, TransformerDecoderLayer
from util.misc import NestedTensor


def make_transformer(**changes):
    torch.manual_seed(0)
    arguments = dict(d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=48, dropout=0.1,
                     return_intermediate_dec=True)
    model = Transformer(**{**arguments, **changes}).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # their initial values would hide a mistake in their use
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_input(height=3, width=4, padding=True):
    generator = torch.Generator().manual_seed(2)
    src = torch.randn(2, 32, height, width, generator=generator)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    if padding:
        mask[0, :, width - 1:] = True
        mask[1, height - 1:] = True
    pos = PositionEmbeddingSine(16, normalize=True)(NestedTensor(src, mask))
    return src, mask, torch.randn(6, 32, generator=generator), pos


@pytest.mark.parametrize("normalize_before", [False, True])
def test_equals_torchs_own_layers_where_there_are_no_positions(normalize_before):
    """torch's layers know no positions, so all are zero here; the parameters' names and meaning are the same."""
    model = make_transformer(normalize_before=normalize_before)
    arguments = dict(d_model=32, nhead=4, dim_feedforward=48, batch_first=True, norm_first=normalize_before)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**arguments), 2,
                                    nn.LayerNorm(32) if normalize_before else None,
                                    enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**arguments), 3, nn.LayerNorm(32))
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    encoder.eval(), decoder.eval()
    src, mask, _, pos = make_input()
    tgt = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4))
    tokens, hidden = src.flatten(2).transpose(1, 2), mask.flatten(1)
    zeros, none = torch.zeros_like(tokens), torch.zeros_like(tgt)
    sees_neighbours = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
    with torch.no_grad():
        memory = model.encoder(tokens.transpose(0, 1), None, hidden, zeros.transpose(0, 1)).transpose(0, 1)
        expected_memory = encoder(tokens, src_key_padding_mask=hidden)
        torch.testing.assert_close(memory[~hidden], expected_memory[~hidden], rtol=1e-5, atol=1e-5)
        out = model.decoder(tgt.transpose(0, 1), memory.transpose(0, 1), ~sees_neighbours, None, None, hidden,
                            zeros.transpose(0, 1), none.transpose(0, 1)).transpose(1, 2)
        expected = decoder(tgt, memory, tgt_mask=~sees_neighbours, memory_key_padding_mask=hidden)
        torch.testing.assert_close(out[-1], expected, rtol=1e-5, atol=1e-5)
        decoder.layers = decoder.layers[:2]  # the first two layers under the same last norm: what layer 2 of 3 returns
        expected = decoder(tgt, memory, tgt_mask=~sees_neighbours, memory_key_padding_mask=hidden)
        torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-5)
    assert out.shape == (3, 2, 6, 32)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_positions_enter_queries_and_keys_but_never_values(normalize_before):
    """The same vector added to the positions of all keys adds one number to all scores of a query, which a softmax
    ignores; added to values it would change the result."""
    layer = make_transformer(normalize_before=normalize_before).decoder.layers[0]
    generator = torch.Generator().manual_seed(3)
    tgt, memory, pos, query_pos = (torch.randn(n, 2, 32, generator=generator) for n in (6, 12, 12, 6))
    shift = torch.randn(32, generator=generator)
    with torch.no_grad():
        out = layer(tgt, memory, pos=pos, query_pos=query_pos)
        shifted = layer(tgt, memory, pos=pos + shift, query_pos=query_pos)
        torch.testing.assert_close(shifted, out, rtol=1e-4, atol=1e-4)
        moved = layer(tgt, memory, pos=pos.flip(0), query_pos=query_pos)
    assert (moved - out).abs().max() > 1e-2, "other positions of the keys do matter"


@pytest.mark.parametrize("normalize_before", [False, True])
def test_queries_shared_by_all_images_equal_queries_given_for_each(normalize_before):
    model = make_transformer(normalize_before=normalize_before)
    src, mask, queries, pos = make_input()
    with torch.no_grad():
        shared, memory = model(src, mask, queries, pos)
        given, _ = model(src, mask, queries.expand(2, -1, -1).clone(), pos)
    assert shared.shape == (3, 2, 6, 32) and memory.shape == (2, 32, 3, 4)
    torch.testing.assert_close(given, shared, rtol=0, atol=1e-6)


def test_only_the_last_layer_without_intermediate_results():
    src, mask, queries, pos = make_input()
    with torch.no_grad():
        every, _ = make_transformer()(src, mask, queries, pos)
        last, _ = make_transformer(return_intermediate_dec=False)(src, mask, queries, pos)
    assert last.shape == (1, 2, 6, 32)
    torch.testing.assert_close(last[0], every[-1])


@pytest.mark.parametrize("normalize_before", [False, True])
def test_padding_has_no_influence(normalize_before):
    """Neither what stands in padded positions nor how many there are."""
    model = make_transformer(normalize_before=normalize_before)
    src, mask, queries, pos = make_input()
    inside = ~mask
    other = src.masked_fill(mask[:, None], 7.0)
    wider = torch.cat([src, torch.full((2, 32, 3, 2), -5.0)], dim=3)
    wider_mask = torch.cat([mask, torch.ones(2, 3, 2, dtype=torch.bool)], dim=2)
    wider_pos = PositionEmbeddingSine(16, normalize=True)(NestedTensor(wider, wider_mask))
    with torch.no_grad():
        decoded, memory = model(src, mask, queries, pos)
        for decoded2, memory2 in (model(other, mask, queries, pos), model(wider, wider_mask, queries, wider_pos)):
            torch.testing.assert_close(decoded2, decoded, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(memory2[..., :4].permute(0, 2, 3, 1)[inside], memory.permute(0, 2, 3, 1)[inside],
                                       rtol=1e-5, atol=1e-5)
        # An image alone, without padding, decodes as it does in its batch.
        alone, _ = model(src[:1, :, :, :3], None, queries, pos[:1, :, :, :3])
    torch.testing.assert_close(alone[:, 0], decoded[:, 0], rtol=1e-5, atol=1e-5)


def test_an_all_false_mask_equals_none():
    model = make_transformer()
    src, mask, queries, pos = make_input(padding=False)
    with torch.no_grad():
        torch.testing.assert_close(model(src, mask, queries, pos)[0], model(src, None, queries, pos)[0])


def test_order_of_queries_does_not_matter():
    model = make_transformer()
    src, mask, queries, pos = make_input()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        torch.testing.assert_close(model(src, mask, queries[order], pos)[0],
                                   model(src, mask, queries, pos)[0][:, :, order],
                                   rtol=1e-5, atol=1e-5)


def test_queries_that_may_not_look_at_each_other_decode_as_if_alone():
    model = make_transformer()
    src, mask, queries, pos = make_input()
    with torch.no_grad():
        hermits, _ = model(src, mask, queries, pos, ~torch.eye(6, dtype=torch.bool))
        for i in range(6):
            alone, _ = model(src, mask, queries[i:i + 1], pos)
            torch.testing.assert_close(hermits[:, :, i:i + 1], alone, rtol=1e-5, atol=1e-5)
        together, _ = model(src, mask, queries, pos)
    assert (together - hermits).abs().max() > 1e-3


def collect_weights(model):
    """A dict that gets the second output of each attention at each forward pass, and the hooks' handles."""
    attention = {name: module for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}
    assert len(attention) == 2 + 2 * 3
    collected, handles = {}, []
    for name, module in attention.items():
        handles.append(module.register_forward_hook(
            lambda module, inputs, output, name=name: collected.__setitem__(name, output[1])))
    return collected, handles


def check_weights(collected, mask):
    for name, weights in collected.items():
        assert weights.shape == {"encoder": (2, 12, 12), "decoder": (2, 6, 6)}.get(name.split(".")[0]) or \
            "multihead_attn" in name and weights.shape == (2, 6, 12), name
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        if "decoder" not in name or "multihead_attn" in name:
            assert (weights.transpose(1, 2)[mask.flatten(1)] == 0).all(), "no weight on padding"


@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_attention_weights_and_change_no_number(training):
    model = make_transformer().train(training)
    src, mask, queries, pos = make_input()
    collected, handles = collect_weights(model)
    torch.manual_seed(3)
    hooked, _ = model(src, mask, queries, pos)
    assert len(collected) == 8
    check_weights(collected, mask)
    for handle in handles:
        handle.remove()
    collected.clear()
    torch.manual_seed(3)
    assert torch.equal(model(src, mask, queries, pos)[0], hooked)
    assert not collected


def test_global_hooks_see_attention_weights():
    model = make_transformer()
    src, mask, queries, pos = make_input()
    collected = {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}

    def collect(module, inputs, output):
        if module in names:
            collected[names[module]] = output[1]

    handle = nn.modules.module.register_module_forward_hook(collect)
    try:
        with torch.no_grad():
            model(src, mask, queries, pos)
    finally:
        handle.remove()
    assert len(collected) == 8
    check_weights(collected, mask)


def test_attention_weights_are_formed_on_request_only():
    attention = MultiheadAttention(32, 4).eval()
    x = torch.randn(5, 2, 32)
    with torch.no_grad():
        assert attention(x, x, x)[1] is None
        out, weights = attention(x, x, x, need_weights=True)
        assert torch.equal(attention(x, x, x)[0], out) and weights.shape == (2, 5, 5)
        attention.register_forward_hook(lambda module, inputs, outputs: None)
        assert torch.equal(attention(x, x, x)[1], weights)
        assert attention(x, x, x, need_weights=False)[1] is None


def masks_of_every_kind():
    generator = torch.Generator().manual_seed(6)
    padding = torch.rand(2, 7, generator=generator) > 0.7
    hidden = torch.rand(5, 7, generator=generator) > 0.7
    padding[:, 0] = hidden[:, 0] = False
    of_heads = torch.rand(2 * 4, 5, 7, generator=generator)
    for key_padding_mask in (None, padding):
        for attn_mask in (None, hidden, torch.zeros(5, 7).masked_fill(hidden, float("-inf")), of_heads,
                          (of_heads > 0.5) & hidden):
            yield key_padding_mask, attn_mask


def test_attention_equals_torchs_own_by_the_same_arguments():
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(32, 4).eval(), nn.MultiheadAttention(32, 4).eval()
    theirs.load_state_dict(ours.state_dict())
    query, key, value = (torch.randn(n, 2, 32) for n in (5, 7, 7))
    for key_padding_mask, attn_mask in masks_of_every_kind():
        for average in (True, False):
            arguments = {"key_padding_mask": key_padding_mask, "average_attn_weights": average}
            with torch.no_grad():
                out, weights = ours(query, key, value, attn_mask=attn_mask, need_weights=True, **arguments)
                if key_padding_mask is not None and attn_mask is not None and attn_mask.dtype != torch.bool:
                    zeros = torch.zeros(2, 7)  # torch asks for masks of one type
                    arguments["key_padding_mask"] = zeros.masked_fill(key_padding_mask, float("-inf"))
                expected_out, expected_weights = theirs(query, key, value, attn_mask=attn_mask, **arguments)
            torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_torchs_own_attention_fits_in_and_layers_show_sequences_first(normalize_before):
    model = make_transformer(normalize_before=normalize_before)
    src, mask, queries, pos = make_input()
    seen = []
    model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.decoder.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        expected, expected_memory = model(src, mask, queries, pos)
        for layer in (*model.encoder.layers, *model.decoder.layers):
            for name in ("self_attn", "multihead_attn"):
                if hasattr(layer, name):
                    other = nn.MultiheadAttention(32, 4).eval()
                    other.load_state_dict(getattr(layer, name).state_dict())
                    setattr(layer, name, other)
        decoded, memory = model(src, mask, queries, pos)
    assert seen[:2] == [(12, 2, 32), (6, 2, 32)]
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)


def test_parts_by_their_published_positional_arguments():
    """Layers one after another are what the stacks do, and the stacks are what the transformer does."""
    model = make_transformer()
    src, mask, queries, pos = make_input()
    tokens, place, hidden = src.flatten(2).permute(2, 0, 1), pos.flatten(2).permute(2, 0, 1), mask.flatten(1)
    query_pos = queries[:, None].expand(-1, 2, -1)
    with torch.no_grad():
        expected, expected_memory = model(src, mask, queries, pos)
        memory = tokens
        for layer in model.encoder.layers:
            memory = layer(memory, None, hidden, place)
        assert torch.equal(memory, model.encoder(tokens, None, hidden, place))
        assert torch.equal(memory.permute(1, 2, 0).view(2, 32, 3, 4), expected_memory)
        x, layers = torch.zeros(6, 2, 32), []
        for layer in model.decoder.layers:
            x = layer(x, memory, None, None, None, hidden, place, query_pos)
            layers.append(model.decoder.norm(x))
        decoded = model.decoder(torch.zeros(6, 2, 32), memory, None, None, None, hidden, place, query_pos)
    assert decoded.shape == (3, 6, 2, 32)
    torch.testing.assert_close(torch.stack(layers), decoded, rtol=0, atol=1e-6)
    torch.testing.assert_close(decoded.transpose(1, 2), expected, rtol=0, atol=1e-6)
    alone = TransformerDecoder(TransformerDecoderLayer(32, 4, 48), 2)
    assert alone(torch.zeros(6, 2, 32), torch.zeros(5, 2, 32)).shape == (1, 6, 2, 32)


def test_dropout_acts_in_training_only():
    model = make_transformer(dropout=0.5)
    src, mask, queries, pos = make_input()
    with torch.no_grad():
        assert torch.equal(model(src, mask, queries, pos)[0], model(src, mask, queries, pos)[0])
        model.train()
        assert not torch.equal(model(src, mask, queries, pos)[0], model(src, mask, queries, pos)[0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activations(activation):
    layer = make_transformer(activation=activation).encoder.layers[0]
    theirs = nn.TransformerEncoderLayer(32, 4, 48, activation=activation, batch_first=True).eval()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.transpose(0, 1)).transpose(0, 1), theirs(x), rtol=1e-5, atol=1e-5)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation 'swish' is not one of relu, gelu"):
        make_transformer(activation="swish")
