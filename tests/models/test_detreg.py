"""DETReg: the embedding loss by hand, targets against torchvision's network, a frozen network that stays as it is."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from engine import train_one_epoch
from main import build_optimizer
from models import build_model
from models.classification import FocalClassification
from models.criterion import SetCriterion
from models.detreg import RegionEmbedder, RegionNetwork
from models.matcher import HungarianMatcher
from util.errors import InputError
from util.misc import collate_fn

EMBEDDED = dict(dataset_file="regions", object_embedding_loss=True, num_classes=None)
MODELS = {"detr": {}, "deformable_detr": {}, "two stages": {"two_stage": True, "with_box_refine": True},
          "one level": {"num_feature_levels": 1}}


def region_args(tiny_args, model, **changes):
    name = model if model == "detr" else "deformable_detr"
    return tiny_args(model=name, **EMBEDDED, **MODELS[model], **changes)


def random_regions(counts, side=32, seed=0):
    """Targets of images with so many regions."""
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.ones(n, dtype=torch.int64),
             "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.3,
             "patches": torch.randn(n, 3, side, side, generator=generator)} for n in counts]


# The loss.


class MeanColour(nn.Module):
    """Embeds a crop as its mean colour, and counts its calls."""

    dim = 3
    calls = 0

    def forward(self, crops):
        self.calls += 1
        return crops.mean((2, 3))


def embedding_criterion(network):
    return SetCriterion(4, HungarianMatcher(2, 5, 2, classification=FocalClassification()), {}, None,
                        ["labels", "boxes", "object_embedding"], RegionEmbedder(network, torch.device("cpu")))


def two_images():
    """Query 1 of the first image finds its region 0, query 0 its region 1; the second image has no regions."""
    here, there = [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]
    outputs = {"pred_logits": torch.zeros(2, 2, 4), "pred_boxes": torch.tensor([[there, here]] * 2),
               "pred_features": torch.tensor([[[1.0, 1, 1], [0, 0, 0]], [[9.0, 9, 9], [9, 9, 9]]]).requires_grad_()}
    colours = torch.tensor([[2.0, -2, 2], [1, 1.6, 1]])
    return outputs, [{"labels": torch.tensor([1, 1]), "boxes": torch.tensor([here, there]),
                      "patches": colours[:, :, None, None].expand(-1, -1, 4, 4)},
                     {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
                      "patches": torch.zeros(0, 3, 4, 4)}]


def test_embedding_loss_by_hand():
    outputs, targets = two_images()
    losses = embedding_criterion(MeanColour())(outputs, targets)
    # Region 0: the three numbers are off by 2 each. Region 1: one of three is off by 0.6. Two regions divide.
    assert losses["loss_object_embedding"].item() == pytest.approx((2 + 0.2) / 2)
    losses["loss_object_embedding"].backward()
    # A sixth (three numbers, two regions) of the difference's sign, to matched queries only.
    expected = torch.tensor([[[0.0, -1, 0], [-1, 1, -1]], [[0, 0, 0], [0, 0, 0]]]) / 6
    torch.testing.assert_close(outputs["pred_features"].grad, expected)


def test_only_the_last_layer_has_the_embedding_loss():
    outputs, targets = two_images()
    outputs["aux_outputs"] = [{name: outputs[name] for name in ("pred_logits", "pred_boxes")}]
    losses = embedding_criterion(MeanColour())(outputs, targets)
    assert losses["loss_object_embedding"].item() == pytest.approx(1.1)
    assert "loss_bbox_0" in losses and "loss_object_embedding_0" not in losses


def test_all_regions_of_a_batch_are_embedded_at_once():
    outputs, targets = two_images()
    network = MeanColour()
    embedding_criterion(network)(outputs, [targets[0], targets[0]])
    assert network.calls == 1


def test_without_any_region_the_loss_is_zero_and_reaches_every_output():
    """Processes whose images have none still take part in the gradients' reduction."""
    outputs, targets = two_images()
    network = MeanColour()
    losses = embedding_criterion(network)(outputs, [targets[1], targets[1]])
    losses["loss_object_embedding"].backward()
    assert losses["loss_object_embedding"].item() == 0 and network.calls == 0
    assert not outputs["pred_features"].grad.any()


def test_embedding_loss_needs_an_embedder():
    with pytest.raises(ValueError, match="^the loss object_embedding needs an embedder$"):
        SetCriterion(4, HungarianMatcher(), {}, 0.1, ["labels", "object_embedding"])


# The frozen network.


def torchvisions(name, seed=0):
    """A network of torchvision in evaluation whose normalisation does something; SwAV's projection on top."""
    torch.manual_seed(seed)
    resnet = getattr(torchvision.models, name)(weights=None)
    projection = nn.Sequential(nn.Linear(resnet.fc.in_features, 2048), nn.BatchNorm1d(2048), nn.ReLU(),
                               nn.Linear(2048, 128))
    for module in [*resnet.modules(), *projection.modules()]:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return resnet.eval(), projection.eval()


def swav_file(path, resnet, projection):
    """The two in a file like SwAV's."""
    state = {**{f"module.{name}": value for name, value in resnet.state_dict().items() if not name.startswith("fc.")},
             **{f"module.projection_head.{name}": value for name, value in projection.state_dict().items()},
             "module.prototypes.weight": torch.zeros(5, 128)}
    torch.save(state, path)
    return str(path)


def maps_of(resnet, crops, last):
    layers = ("layer1", "layer2", "layer3", "layer4")
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(crops))))
    for layer in layers[:layers.index(last) + 1]:
        x = getattr(resnet, layer)(x)
    return x


@torch.no_grad()
def direct_embeddings(resnet, projection, crops, head):
    if head == "intermediate":
        return maps_of(resnet, crops, "layer2").mean((2, 3))
    return F.normalize(projection(maps_of(resnet, crops, "layer4").mean((2, 3))), dim=1)


@pytest.mark.parametrize("head, dim", [("intermediate", 128), ("head", 128)])
@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_targets_are_what_torchvisions_network_makes_of_the_crops(head, dim, model, tiny_args, tmp_path, capsys):
    theirs = torchvisions("resnet18")
    path = swav_file(tmp_path / "swav.pth", *theirs)
    args = region_args(tiny_args, model, obj_embedding_head=head, load_embedding=path)
    criterion = build_model(args)[1]
    crops = torch.randn(5, 3, 64, 64)
    found = criterion.embedder(crops)
    assert found.shape == (5, dim) and not found.requires_grad
    torch.testing.assert_close(found, direct_embeddings(*theirs, crops, head), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:2], criterion.embedder(crops[1:2]), rtol=1e-4, atol=1e-4)
    assert criterion.embedder(crops[:0]).shape == (0, dim)
    assert f"embedding: {len(criterion.embedder.network.state_dict())} tensors of resnet18 from {path}" in (
        capsys.readouterr().out)


def test_swav_stands_for_its_resnet50_whatever_the_backbone(tiny_args, tmp_path, monkeypatch):
    theirs = torchvisions("resnet50")[0]
    shallow = {name: value for name, value in theirs.state_dict().items() if not name.startswith("layer4")}
    torch.save({"state_dict": shallow}, tmp_path / "swav.pth")
    monkeypatch.setattr("models.backbone.SWAV_URL", str(tmp_path / "swav.pth"))
    model, criterion, _ = build_model(region_args(tiny_args, "deformable_detr", load_embedding="swav"))
    crops = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(criterion.embedder(crops), direct_embeddings(theirs, None, crops, "intermediate"),
                               rtol=1e-4, atol=1e-4)
    assert model.feature_embed.layers[1].weight.shape == (512, 32)


def test_one_file_gives_backbone_and_embeddings(tiny_args, tmp_path):
    """Nothing is fetched that wasn't named."""
    resnet, projection = torchvisions("resnet18")
    args = region_args(tiny_args, "deformable_detr", load_backbone=swav_file(tmp_path / "swav.pth", resnet, projection))
    model, criterion, _ = build_model(args)
    for body in (model.backbone[0].body, criterion.embedder.network):
        assert torch.equal(body.layer2[1].conv2.weight, resnet.layer2[1].conv2.weight)


def test_weights_without_a_projection_have_no_head(tiny_args, tmp_path):
    torch.save(torchvisions("resnet18")[0].state_dict(), tmp_path / "plain.pth")
    args = region_args(tiny_args, "detr", obj_embedding_head="head", load_embedding=str(tmp_path / "plain.pth"))
    with pytest.raises(InputError, match=r"^--load_embedding .*plain.pth doesn't fit resnet18: 8 tensors are missing "
                                         r"and 0 have another shape, first projection_head.0.bias$"):
        build_model(args)


def test_unknown_networks_are_refused():
    with pytest.raises(InputError, match="^--backbone 'resnet51' is not one of resnet18, resnet34, .*, wide_resnet101_2$"):
        RegionNetwork("resnet51", "head")


# Training.


def region_batches(count):
    """Batches of two images of different sizes; one image has no regions, and in the last batch both."""
    torch.manual_seed(1)
    for i in range(count):
        targets = random_regions([3, 0] if i < count - 1 else [0, 0], seed=i)
        yield collate_fn([(torch.randn(3, 64, 64), targets[0]), (torch.randn(3, 48, 64), targets[1])])


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_training_leaves_the_frozen_network_as_it_was(model_name, amp_dtype, tiny_args, capsys):
    args = region_args(tiny_args, model_name, obj_embedding_head="head", lr=1e-2)
    model, criterion, _ = build_model(args)
    network = criterion.embedder.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    head = model.feature_embed.layers[0].weight.clone()
    optimizer = build_optimizer(model, args)
    frozen = {id(parameter) for parameter in network.parameters()}

    stats = train_one_epoch(model, criterion, list(region_batches(3)), optimizer, torch.device("cpu"), 0, 0.1,
                            amp_dtype=amp_dtype)

    assert stats["loss_object_embedding"] > 0 and stats["loss"] > stats["loss_object_embedding"]
    assert before.keys() == network.state_dict().keys() and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert not torch.equal(head, model.feature_embed.layers[0].weight)
    # It is nowhere that a checkpoint, an optimizer or DistributedDataParallel would look.
    for module in (model, criterion):
        assert not frozen & {id(parameter) for parameter in module.parameters()}
        assert network not in list(module.modules())
    assert not frozen & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert criterion.state_dict().keys() <= {"empty_weight"}


@pytest.mark.parametrize("model_name", MODELS)
def test_every_part_that_trains_has_a_gradient_even_without_regions(model_name, tiny_args):
    model, criterion, _ = build_model(region_args(tiny_args, model_name))
    for targets in (random_regions([2, 1]), random_regions([0, 0])):
        losses = criterion(model([torch.randn(3, 64, 64), torch.randn(3, 48, 64)]), targets)
        sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
                   if parameter.requires_grad)
        model.zero_grad(set_to_none=True)


def test_embedding_loss_waits_for_the_device_only_at_the_matching(tiny_args, host_reads):
    model, criterion, _ = build_model(region_args(tiny_args, "deformable_detr"))
    outputs, targets = model([torch.randn(3, 64, 64)] * 2), random_regions([2, 0])
    with host_reads:
        criterion(outputs, targets)
    assert not host_reads.waited


def test_targets_are_float32_under_autocast(tiny_args):
    model, criterion, _ = build_model(region_args(tiny_args, "deformable_detr"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model([torch.randn(3, 64, 64)] * 2)
    assert criterion(outputs, random_regions([2, 0]))["loss_object_embedding"].dtype == torch.float32


def test_without_the_loss_it_is_the_plain_detector(tiny_args):
    for name in ("detr", "deformable_detr"):
        model, criterion, _ = build_model(tiny_args(model=name, dataset_file="regions", num_classes=None))
        assert criterion.embedder is None and "object_embedding" not in criterion.losses
        assert not any("feature_embed" in key for key in model.state_dict())
        assert len(model.state_dict()["class_embed.weight" if name == "detr" else "class_embed.0.weight"]) == (
            92 if name == "detr" else 91)


def test_detregs_detr_counts_positions_from_the_centre(tiny_args):
    shift = {(model, data): build_model(tiny_args(model=model, dataset_file=data))[0].backbone[1].shift
             for model in ("detr", "deformable_detr") for data in ("coco", "regions")}
    assert shift == {("detr", "coco"): 0, ("detr", "regions"): 0.5, ("deformable_detr", "coco"): 0.5,
                     ("deformable_detr", "regions"): 0.5}
