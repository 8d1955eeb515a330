"""Classes, boxes and their losses are float32 where autocast rounds the rest, and float64 where the model is."""
import pytest
import torch

from models import build_model
from models.deformable_detr import PostProcessFocal
from models.detr import PostProcess


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_autocast_rounds_neither_classes_nor_boxes(tiny_args, images, model):
    detector = build_model(tiny_args(model=model))[0].eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = detector(images)
    for layer in (out, *out["aux_outputs"]):
        assert layer["pred_logits"].dtype == layer["pred_boxes"].dtype == torch.float32


def test_heads_under_autocast_are_those_of_the_widened_hidden_state(tiny_args):
    detector = build_model(tiny_args())[0].eval()
    hidden = torch.randn(2, 1, 12, detector.transformer.d_model).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector.predictions(hidden)
    expected = detector.predictions(hidden.float())
    assert found["pred_logits"].equal(expected["pred_logits"]) and found["pred_boxes"].equal(expected["pred_boxes"])


@pytest.mark.parametrize("postprocess", [PostProcess(), PostProcessFocal()])
def test_rounded_boxes_are_not_rounded_again_in_pixels(postprocess):
    """A centre of 0.5 and a width of 1/256 on 1333 pixels: in bfloat16 the left edge would be 664, not 663.896."""
    outputs = {"pred_logits": torch.tensor([[[9.0, -9.0]]]).bfloat16(),
               "pred_boxes": torch.tensor([[[0.5, 0.5, 1 / 256, 1 / 256]]]).bfloat16()}
    box = postprocess(outputs, torch.tensor([[800, 1333]]))[0]["boxes"][0]
    torch.testing.assert_close(box, torch.tensor([663.896484375, 398.4375, 669.103515625, 401.5625]))


def test_losses_of_a_float64_model_are_float64(tiny_args, images, targets):
    detector, criterion, _ = build_model(tiny_args())
    out = detector.double()([image.double() for image in images] if isinstance(images, list) else images.to(torch.float64))
    losses = criterion.double()(out, [{**target, "boxes": target["boxes"].double()} for target in targets])
    assert {losses[name].dtype for name in ("loss_ce", "loss_bbox", "loss_giou")} == {torch.float64}


def test_masks_under_autocast_are_those_of_the_widened_hidden_states(tiny_args, images):
    segmenter = build_model(tiny_args(masks=True))[0].eval()
    seen = {}
    segmenter.mask_head.register_forward_pre_hook(lambda head, inputs: seen.update(inputs=inputs))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        masks = segmenter(images)["pred_masks"]
    assert all(tensor.dtype == torch.float32 for tensor in (*seen["inputs"][:2], *seen["inputs"][2]))
    with torch.no_grad():
        assert masks.flatten().equal(segmenter.mask_head(*seen["inputs"]).flatten())


def test_reference_points_are_not_rounded(tiny_args, images):
    detector = build_model(tiny_args(model="deformable_detr"))[0].eval()
    seen = {}
    detector.transformer.reference_points.register_forward_hook(lambda layer, inputs, out: seen.update(out=out))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        detector(images)
    position = detector.query_embed.weight[:, :detector.transformer.d_model]
    torch.testing.assert_close(seen["out"][0], detector.transformer.reference_points(position), rtol=1e-6, atol=1e-6)


def test_losses_of_embeddings_of_a_float64_model_are_float64(tiny_args):
    model, criterion, _ = build_model(tiny_args(
        model="deformable_detr", dataset_file="regions", num_classes=None, object_embedding_loss=True, load_embedding="none"))
    criterion.embedder.network.double()
    target = {"labels": torch.ones(1, dtype=torch.int64), "boxes": torch.full((1, 4), 0.4, dtype=torch.float64),
              "patches": torch.randn(1, 3, 32, 32, dtype=torch.float64)}
    outputs = model.double().eval()(torch.randn(1, 3, 128, 128, dtype=torch.float64))
    losses = criterion.double()(outputs, [target])
    assert {losses[name].dtype for name in losses if name in criterion.weight_dict} == {torch.float64}


@pytest.mark.parametrize("flags", [{}, {"model": "deformable_detr"}, {"model": "deformable_detr", "two_stage": True}])
def test_a_model_that_is_bfloat16_as_a_whole(tiny_args, images, targets, flags):
    detector, criterion, _ = build_model(tiny_args(**flags))
    losses = criterion.bfloat16()(detector.bfloat16()([image.bfloat16() for image in images]), targets)
    assert {losses[name].dtype for name in ("loss_ce", "loss_bbox", "loss_giou")} == {torch.float32}


def test_aims_are_not_rounded_under_autocast(tiny_args):
    """The features of UP-DETR's patches are means in float32; DETReg's embeddings are those without autocast."""
    updetr = build_model(tiny_args(dataset_file="imagenet", num_classes=None, num_queries=4, num_patches=2, feature_recon=True))[0]
    criterion = build_model(tiny_args(model="deformable_detr", dataset_file="regions", num_classes=None,
                                      object_embedding_loss=True, load_embedding="none"))[1]
    crops = torch.rand(1, 2, 3, 32, 32)
    expected = criterion.embedder(crops[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion.embedder(crops[0]).equal(expected)
        assert updetr(torch.rand(1, 3, 64, 64), crops)["gt_feature"].dtype == torch.float32
