"""ResNet backbones: what comes out, what trains, frozen normalisation, and where their weights come from."""
import pytest
import torch
import torchvision
from torch import nn

from models import build_model, fused
from models.backbone import (SUPERVISED_URLS, Backbone, BackboneBase, FrozenBatchNorm2d, Joiner, backbone_state_dict,
                             load_backbone_weights)
from models.from_checkpoint import RESNETS, architecture
from models.position_encoding import PositionEmbeddingSine
from util.errors import InputError
from util.misc import NestedTensor, nested_tensor_from_tensor_list


def test_frozen_batch_norm_equals_batch_norm_in_evaluation():
    norm = nn.BatchNorm2d(6).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.3, 2, generator=generator)
    for tensor in (norm.bias.data, norm.running_mean):
        tensor.normal_(generator=generator)
    frozen = FrozenBatchNorm2d(6)
    frozen.load_state_dict(norm.state_dict())  # the counter of batches that an ordinary norm has is passed over
    x = torch.randn(2, 6, 3, 4, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), norm(x), rtol=1e-5, atol=1e-5)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert not list(frozen.parameters())


def test_training_leaves_the_normalisation_alone(images):
    backbone = Backbone("resnet18", train_backbone=True, return_interm_layers=False, dilation=False).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(nested_tensor_from_tensor_list(images))["0"].tensors.sum().backward()
    assert len(before) == 20 * 4
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())


def assert_same_map(feature, expected):
    """Equal up to rounding, at the map's own scale: without normalisation, random weights make large numbers."""
    torch.testing.assert_close(feature / expected.std(), expected / expected.std(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, channels", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_features_equal_torchvisions(name, channels, images):
    """The same weights in torchvision's own network, in evaluation, up to its pooling."""
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    backbone = Backbone(name, train_backbone=False, return_interm_layers=True, dilation=False)
    backbone.body.load_state_dict({key: value for key, value in theirs.state_dict().items()
                                   if not key.startswith("fc.") and not key.endswith("num_batches_tracked")})
    batch = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        maps = backbone(batch)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(batch.tensors))))
        for i, layer in enumerate((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
            x = layer(x)
            assert_same_map(maps[str(i)].tensors, x)
    assert list(maps) == ["0", "1", "2", "3"] and backbone.num_channels == channels == x.shape[1]


@pytest.mark.parametrize("name, dilation, last_layer, channels, stride",
                         [("resnet18", False, "layer4", 512, 32), ("resnet50", False, "layer4", 2048, 32),
                          ("resnet50", True, "layer4", 2048, 16), ("resnet18", False, "layer3", 256, 16),
                          ("resnet50", False, "layer3", 1024, 16)])
def test_stride_and_channels(name, dilation, last_layer, channels, stride):
    backbone = Backbone(name, True, False, dilation, last_layer)
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :, 64:] = True
    with torch.no_grad():
        out = backbone(NestedTensor(torch.randn(1, 3, 64, 96), mask))
    assert list(out) == ["0"]
    feature, small_mask = out["0"].decompose()
    assert feature.shape == (1, channels, 64 // stride, 96 // stride) and backbone.num_channels == channels
    # The last third of the columns is padding at every scale.
    assert torch.equal(small_mask[0, 0], torch.arange(96 // stride) >= 64 // stride)
    assert any(key.startswith("body.layer4") for key in backbone.state_dict()) == (last_layer == "layer4")


def test_dilated_features_equal_torchvisions():
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
    backbone = Backbone("resnet50", False, False, dilation=True)
    load = {key: value for key, value in theirs.state_dict().items() if key in backbone.body.state_dict()}
    backbone.body.load_state_dict(load)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = nn.Sequential(*list(theirs.children())[:-2])(x)
        assert_same_map(backbone.body(x)["0"], expected)


@pytest.mark.parametrize("name", ["resnet152", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvisions_other_resnets_are_backbones(name, tiny_args):
    theirs = getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
    model = build_model(tiny_args(backbone=name, dilation=True, lr_backbone=1e-5))[0]
    backbone = model.backbone[0].eval()
    weights = {key: value for key, value in theirs.state_dict().items()
               if not key.startswith("fc.") and not key.endswith("num_batches_tracked")}
    backbone.body.load_state_dict(weights)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(backbone.body(x)["0"], nn.Sequential(*list(theirs.children())[:-2])(x))
        with fused.steps():
            assert fused.can_fuse(backbone.body)
            assert_same_map(backbone.body(x)["0"], backbone(NestedTensor(x, torch.zeros(1, 48, 48).bool()))["0"].tensors)
    assert backbone.num_channels == 2048 and set(SUPERVISED_URLS) == set(RESNETS)
    trained = {key.split(".")[1] for key, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert architecture(model.state_dict(), "file")["backbone"] == name


def test_any_network_with_torchvisions_names_will_do():
    network = torchvision.models.resnet18(weights=None)
    base = BackboneBase(network, train_backbone=True, num_channels=512, return_interm_layers=False)
    trained = {name.split(".")[1] for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("arguments, message", [
    (("resnet99", True, False, False), "--backbone 'resnet99' is not one of resnet18, resnet34, resnet50, resnet101"),
    (("resnet18", True, False, True), "--dilation needs a network of bottlenecks, which --backbone 'resnet18' is not"),
    (("resnet50", True, False, True, "layer3"), "--dilation needs layer4, not --backbone_last_layer 'layer3'"),
    (("resnet50", True, False, False, "layer1"), "--backbone_last_layer layer1 is not one of layer3, layer4")])
def test_impossible_backbones_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Backbone(*arguments)


def test_joiner_gives_maps_and_positions_from_the_shallowest(images):
    joiner = Joiner(Backbone("resnet18", True, True, False), PositionEmbeddingSine(8, normalize=True))
    assert joiner.num_channels == 512
    joiner.num_channels = 77  # notebooks set it
    assert joiner.num_channels == 77
    features, positions = joiner(nested_tensor_from_tensor_list(images))
    assert [tuple(feature.tensors.shape[1:]) for feature in features] == [
        (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]
    assert [tuple(position.shape) for position in positions] == [(2, 16, n, n) for n in (24, 12, 6, 3)]


@pytest.mark.parametrize("name, last_layer, num_maps, channels", [
    ("resnet18", "layer4", 3, [128, 256, 512]), ("resnet18", "layer4", 1, [512]), ("resnet18", "layer3", 2, [128, 256]),
    ("resnet50", "layer4", 3, [512, 1024, 2048])])
def test_the_deepest_maps_alone(images, name, last_layer, num_maps, channels):
    joiner = Joiner(Backbone(name, False, False, False, last_layer, num_maps), PositionEmbeddingSine(8, normalize=True))
    assert joiner.map_channels == channels and joiner.num_channels == channels[-1]
    features, positions = joiner(nested_tensor_from_tensor_list(images))
    assert [feature.tensors.shape[1] for feature in features] == channels and len(positions) == num_maps


# Where weights come from.


@pytest.fixture(scope="module")
def resnet18_state():
    torch.manual_seed(7)
    network = torchvision.models.resnet18(weights=None)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return network.state_dict()


def saved(tmp_path, checkpoint):
    path = tmp_path / "weights.pth"
    torch.save(checkpoint, path)
    return str(path)


LAYOUTS = {
    "torchvision": lambda state: state,
    "swav": lambda state: {**{f"module.{key}": value for key, value in state.items()},
                           "module.projection_head.0.weight": torch.zeros(4, 512),
                           "module.prototypes.weight": torch.zeros(9, 4)},
    "training run": lambda state: {"epoch": 3, "arch": "resnet18",
                                   "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "detector": lambda state: {"epoch": 1, "model": {
        **{f"backbone.0.body.{k}": v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k},
        "transformer.encoder.layers.0.linear1.weight": torch.zeros(2, 2),
        "input_proj.weight": torch.zeros(4, 512, 1, 1)}},
    "detector with masks": lambda state: {"model": {f"detr.backbone.0.body.{k}": v for k, v in state.items()
                                                    if not k.startswith("fc.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last_layer", ["layer4", "layer3"])
def test_weights_of_every_layout_arrive(layout, last_layer, resnet18_state, tmp_path, capsys):
    backbone = Backbone("resnet18", True, False, False, last_layer)
    path = saved(tmp_path, LAYOUTS[layout](resnet18_state))
    load_backbone_weights(backbone.body, path, "resnet18")
    state = backbone.body.state_dict()
    assert len(state) == {"layer4": 100, "layer3": 75}[last_layer]
    assert all(torch.equal(value, resnet18_state[name]) for name, value in state.items())
    assert f"backbone: {len(state)} tensors of resnet18 from {path}" in capsys.readouterr().out


def test_heads_are_left_out(resnet18_state):
    names = backbone_state_dict(LAYOUTS["swav"](resnet18_state))
    assert not any("projection" in name or "prototypes" in name or name.startswith("fc") for name in names)


def test_another_architecture_is_refused(resnet18_state, tmp_path):
    path = saved(tmp_path, resnet18_state)
    with pytest.raises(InputError, match=rf"--load_backbone {path} doesn't fit resnet34: \d+ tensors are missing and "
                                         r"0 have another shape, first layer1\.2\.bn1\.bias"):
        load_backbone_weights(Backbone("resnet34", True, False, False).body, path, "resnet34")
    with pytest.raises(InputError, match=r"doesn't fit resnet50: \d+ tensors are missing and \d+ have another shape"):
        load_backbone_weights(Backbone("resnet50", True, False, False).body, path, "resnet50")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = saved(tmp_path, {"model": {"weight": torch.zeros(3)}})
    with pytest.raises(InputError, match="doesn't fit resnet18: 100 tensors are missing and 0 have another shape, "
                                         "first bn1.bias"):
        load_backbone_weights(Backbone("resnet18", True, False, False).body, path, "resnet18")


def test_swav_is_a_resnet50_only():
    with pytest.raises(InputError, match="SwAV published a resnet50 only, not resnet18; pass --load_backbone FILE"):
        load_backbone_weights(Backbone("resnet18", True, False, False).body, "swav", "resnet18")


def test_weights_go_to_the_backbone_of_the_model(resnet18_state, tmp_path, tiny_args):
    model = build_model(tiny_args(load_backbone=saved(tmp_path, resnet18_state)))[0]
    assert torch.equal(model.backbone[0].body.layer3[0].conv1.weight, resnet18_state["layer3.0.conv1.weight"])


@pytest.mark.parametrize("flag", ["resume", "pretrain", "frozen_weights"])
def test_a_checkpoint_that_replaces_the_backbone_triggers_no_load(flag, tiny_args, tmp_path):
    """The source of the weights doesn't even exist, which would be an error if it were looked for."""
    missing = str(tmp_path / "missing.pth")
    with pytest.raises(InputError, match="--load_backbone .*missing.pth: no such file"):
        build_model(tiny_args(load_backbone=missing))
    build_model(tiny_args(load_backbone=missing, masks=flag == "frozen_weights", **{flag: "checkpoint.pth"}))
