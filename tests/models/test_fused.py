"""Convolution, frozen normalisation, residual and ReLU in one step: the numbers and gradients of the separate steps."""
import copy
import pickle

import pytest
import torch
import torch.utils._python_dispatch
import torch.utils.flop_counter
import torchvision
from torch import nn

from models import build_model, fused
from models.backbone import Backbone, ResNetBody
from models.fused import FrozenBatchNorm2d


@pytest.fixture(autouse=True)
def fusing():
    with fused.steps():
        yield
    fused.enable(True)


def randomise(module, seed=0):
    """Weights that keep the maps' scale, and normalisation that does something."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.weight.uniform_(0.5, 1.5, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.bias.normal_(0, 0.3, generator=generator)
            part.running_mean.normal_(0, 0.3, generator=generator)
    return module


def make_body(name="resnet18", dilation=False, train=True):
    torch.manual_seed(0)
    return randomise(Backbone(name, train_backbone=train, return_interm_layers=True, dilation=dilation)).body


def deepest(maps):
    return list(maps.values())[-1]


def run(body, images, on, backwards=True):
    """Maps and gradients of the body, with or without fused steps."""
    fused.enable(on)
    body.zero_grad()
    maps = list(body(images).values())
    if backwards:
        generator = torch.Generator().manual_seed(1)
        sum((m * torch.randn(m.shape, generator=generator)).sum() / m.std().detach() for m in maps[1:]).backward()
    return maps, {name: p.grad for name, p in body.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to rounding, at the tensor's own scale."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name, dilation", [("resnet18", False), ("resnet50", False), ("resnet50", True)])
@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 3, 33, 47)])
def test_fused_steps_give_the_maps_and_gradients_of_separate_ones(name, dilation, shape):
    body = make_body(name, dilation)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    plain_maps, plain_gradients = run(body, images, on=False)
    maps, gradients = run(body, images, on=True)
    assert type(maps[-1].grad_fn).__name__ == "_TrainedConvolutionBackward"
    for actual, expected in zip(maps, plain_maps):
        assert_close(actual, expected)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) >= 15
    for key in gradients:
        assert_close(gradients[key], plain_gradients[key], 1e-2)  # a ReLU at 0 may fall to either side


def test_without_onednns_operator_public_ones_do_the_same():
    """In double precision, which oneDNN doesn't take, they agree to twelve digits, ReLUs at 0 included."""
    body = make_body("resnet50").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, expected_gradients = run(body, images, on=False)
    maps, gradients = run(body, images, on=True)
    assert_close(maps[-1], expected[-1], 1e-11)
    with torch.no_grad():
        assert_close(deepest(body(images)), expected[-1], 1e-11)
    for key in gradients:
        assert_close(gradients[key], expected_gradients[key], 1e-9)


@pytest.mark.parametrize("kernel, stride, dilation", [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (7, 2, 1)])
@pytest.mark.parametrize("relu, with_residual", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_step_is_the_composition_of_its_parts(kernel, stride, dilation, relu, with_residual, onednn, monkeypatch):
    conv = nn.Conv2d(8, 16, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    norm = randomise(FrozenBatchNorm2d(16))
    x = torch.randn(2, 8, 13, 11, requires_grad=True)
    residual = torch.randn_like(conv(x), requires_grad=True) if with_residual else None
    if not onednn:
        monkeypatch.setattr(fused, "_onednn_takes", lambda x: False)

    def composition():
        out = norm(conv(x))
        out = out if residual is None else out + residual
        return out.relu() if relu else out

    sources = [source for source in (x, conv.weight, residual) if source is not None]
    expected, actual = composition(), fused.convolve(x, conv, norm, relu, residual)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((actual * weights).sum(), sources),
                            torch.autograd.grad((expected * weights).sum(), sources)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fused.convolve(x, conv, norm, relu, residual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu, with_residual", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("trained", [True, False])
def test_a_step_by_winograd_is_the_composition_of_its_parts(relu, with_residual, trained, monkeypatch):
    """In training with its gradients, and with constant weights; both do take that way."""
    conv = nn.Conv2d(128, 136, 3, padding=1, bias=False)
    norm = randomise(FrozenBatchNorm2d(136))
    x = torch.randn(2, 128, 22, 26, requires_grad=trained)
    conv.weight.requires_grad_(trained)
    residual = torch.randn(2, 136, 22, 26, requires_grad=trained) if with_residual else None
    reference = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    sources = [source for source in (x, conv.weight, residual) if source is not None]
    precise = [source.detach().double().requires_grad_(trained) for source in sources]
    reference[0].weight = nn.Parameter(precise[1], requires_grad=trained)
    precise[1] = reference[0].weight
    expected = reference[1](reference[0](precise[0])) + (precise[2] if with_residual else 0)
    expected = expected.relu() if relu else expected
    for direct in ("_apply", "_direct_gradients"):
        monkeypatch.delattr(fused, direct)
    actual = fused.convolve(x, conv, norm, relu, residual)
    assert_close(actual, expected, 5e-6)
    if trained:
        weights = torch.randn(expected.shape)
        found = torch.autograd.grad((actual * weights).sum(), sources)
        for ours, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), precise)):
            assert_close(ours, theirs, 1e-2 if relu else 1e-5)  # a ReLU at 0 may fall to either side


def test_gradients_by_finite_differences():
    conv, norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False).double(), randomise(FrozenBatchNorm2d(4)).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(x, residual, weight):
        conv.weight = nn.Parameter(weight)
        scale, shift = fused._scale_and_shift(norm)
        return fused._TrainedConvolution.apply(x, weight, scale, shift, residual, True, ([2, 2], [1, 1], [1, 1], 1))

    weight = conv.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, residual, weight))


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda conv, norm: conv.weight.data.mul_(3), lambda conv, norm: norm.running_mean.data.add_(1),
    lambda conv, norm: setattr(conv.weight, "data", -conv.weight), lambda conv, norm: setattr(norm, "eps", 1.0),
    lambda conv, norm: conv.weight.detach().numpy().fill(0.5), lambda conv, norm: norm.weight.fill_(float("nan"))])
def test_weights_kept_for_winograd_are_made_anew_after_any_change(change):
    conv, norm = nn.Conv2d(128, 128, 3, padding=1, bias=False), randomise(FrozenBatchNorm2d(128))
    x = torch.randn(1, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    before = fused.convolve(x, conv, norm)
    assert conv in fused._kept and torch.equal(fused.convolve(x, conv, norm), before)
    change(conv, norm)
    torch.testing.assert_close(fused.convolve(x, conv, norm), norm(conv(x)).relu(), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_changed_weights_are_seen_at_once():
    """However they are changed."""
    body, images = make_body(train=False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = deepest(body(images)).clone()
        assert torch.equal(deepest(body(images)), first)
        for change in (lambda: body.conv1.weight.mul_(2), lambda: body.layer3[0].bn1.bias.add_(1),
                       lambda: body.load_state_dict(make_body("resnet18").state_dict()),
                       lambda: setattr(body.layer4[0].conv1, "weight", nn.Parameter(torch.rand(512, 256, 3, 3) / 100))):
            change()
            after = deepest(body(images)).clone()
            assert not torch.equal(after, first)
            assert_close(after, run(body, images, on=False, backwards=False)[0][-1])
            fused.enable(True)
            first = after


def test_weights_changed_behind_autograds_back_are_seen():
    """As averages of weights are often put in place: by `weight.data.copy_`."""
    body, images = make_body(train=False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = deepest(body(images)).clone()
        body.layer4[1].conv2.weight.data.mul_(3)
        assert not torch.equal(deepest(body(images)), first)


def test_inference_mode_and_copies_work():
    body, images = make_body(train=False), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = deepest(body(images)).clone()
        inside = make_body(train=False)  # weights that are born in inference mode have no version
        torch.testing.assert_close(deepest(inside(images)), expected)
        inside.conv1.weight.mul_(2)
        assert not torch.equal(deepest(inside(images)), expected)
    with torch.no_grad():
        torch.testing.assert_close(deepest(copy.deepcopy(body)(images)), expected.clone())
        torch.testing.assert_close(deepest(pickle.loads(pickle.dumps(body))(images)), expected.clone())


def test_state_dict_is_untouched():
    body = make_body()
    before = {name: value.clone() for name, value in body.state_dict().items()}
    run(body, torch.randn(1, 3, 64, 64), on=True)
    assert body.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


def test_hooks_see_every_module():
    """Whoever watches a module inside gets the separate steps."""
    body, images, seen = make_body(), torch.randn(1, 3, 64, 64), []
    handle = body.layer3[0].conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    body(images)
    assert seen == [(1, 256, 4, 4)]
    handle.remove()
    body(images)
    assert len(seen) == 1


@pytest.mark.parametrize("make_other", [
    lambda: torchvision.models.resnet18(weights=None),  # normalises by its batches' own statistics
    lambda: torchvision.models.resnet18(weights=None, norm_layer=lambda n: nn.GroupNorm(2, n)),
])
def test_other_normalisation_is_run_as_it_is(make_other):
    resnet = make_other()
    body, images = ResNetBody(resnet, "layer4", 1), torch.randn(2, 3, 64, 64)
    assert not fused.can_fuse(body)
    assert deepest(body(images)).shape == (2, 512, 2, 2)


def test_a_traced_body_is_made_of_public_operators():
    body = make_body(train=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: deepest(body(x)), images, check_trace=False)
        assert "mkldnn::" not in str(traced.inlined_graph)
        assert_close(traced(images), deepest(body(images)))


@pytest.mark.parametrize("train", [True, False])
def test_autocast_computes_in_its_type(train):
    body = make_body("resnet50", train=train)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, gradients = run(body, images, on=True, backwards=train)
    assert all(feature.dtype == torch.bfloat16 for feature in maps)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    expected, _ = run(body, images, on=False, backwards=False)
    error = (maps[-1].float() - expected[-1]).norm() / expected[-1].norm()
    assert error < 0.03  # bfloat16 has 8 bits


def test_one_training_step_is_that_of_separate_steps(tiny_args, images):
    """A whole DETR: loss and the weights after a step."""
    args = tiny_args()
    results = []
    for on in (True, False):
        fused.enable(on)
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[.5, .5, .3, .3], [.3, .6, .2, .2]])}] * 2
        losses = criterion(model(images), targets)
        loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
        loss.backward()
        optimizer.step()
        results.append((loss.detach(), {name: p.detach() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-4, atol=1e-5)


def test_calls_outside_of_steps_are_torchvisions_own():
    body, images = make_body(train=False).eval(), torch.randn(1, 3, 64, 64)
    fused._inside = False
    with torch.no_grad():
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        for layer in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = layer(x)
        assert torch.equal(deepest(body(images)), x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("where", ["pixel", "weight", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(train, where, value):
    body, images = make_body("resnet50", train=train), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tensor = {"pixel": images, "weight": body.layer2[0].conv2.weight, "norm": body.layer3[0].bn1.bias}[where]
        tensor.view(-1)[0] = value
    assert not deepest(body(images)).isfinite().all()


def test_stored_parameters_and_gradients_are_contiguous():
    body = make_body("resnet50")
    deepest(body(torch.randn(1, 3, 64, 64))).sum().backward()
    assert all(value.is_contiguous() for value in body.state_dict().values())
    gradients = [p.grad for p in body.parameters() if p.grad is not None]
    assert len(gradients) > 30 and all(grad.is_contiguous() for grad in gradients)


def test_modes_transforms_replaced_forwards_and_global_hooks_are_served_step_by_step():
    body = make_body()
    assert fused.can_fuse(body)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not fused.can_fuse(body)
    with torch.overrides.TorchFunctionMode():
        assert not fused.can_fuse(body)
    seen = []
    torch.func.vmap(lambda x: seen.append(fused.can_fuse(body)) or x)(torch.zeros(2))
    assert seen == [False]
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert not fused.can_fuse(body)
    handle.remove()
    relu = body.layer1[0].relu
    relu.forward = relu.forward
    assert not fused.can_fuse(body)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch's newer switches")
def test_torchs_newer_switches_of_precision_are_heard():
    body, images = make_body("resnet50"), torch.randn(2, 3, 128, 128)
    switches = (torch.backends, torch.backends.mkldnn.conv, torch.backends.cudnn.conv)
    for switch in switches:
        before, switch.fp32_precision = switch.fp32_precision, "ieee"
        try:
            assert deepest(body(images)).isfinite().all()
            fused.memory_format(images)
        finally:
            switch.fp32_precision = before


def test_steps_that_are_counted_are_taken_under_modes():
    body = make_body(train=False)
    with fused.steps(counted=True), torch.utils._python_dispatch.TorchDispatchMode():
        with fused.steps():
            assert fused.can_fuse(body)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not fused.can_fuse(body)


def put(owner, name, part):
    setattr(owner, name, part)


@pytest.mark.parametrize("exchange", [
    lambda body: put(body.layer2[0], "relu", nn.Identity()), lambda body: put(body.layer2[0], "bn1", nn.Identity()),
    lambda body: put(body.layer2[0], "downsample", nn.Identity()), lambda body: put(body, "relu", nn.Identity()),
    lambda body: put(body.layer2[0], "relu", nn.GELU()), lambda body: body.layer2.append(nn.Identity()),
    lambda body: nn.utils.parametrizations.weight_norm(body.layer2[0].conv1)])
def test_exchanged_parts_are_run_as_they_are(exchange):
    body, images = make_body(train=False).eval(), torch.randn(1, 3, 64, 64)
    exchange(body)
    assert not fused.can_fuse(body)
    if body.layer2[0].downsample is not None and not isinstance(body.layer2[0].downsample, nn.Identity):
        assert deepest(body(images)).isfinite().all()


def plain_body():
    """A ResNet-18 of float64 whose calls take no fused steps, and a small image."""
    fused._inside = False
    return make_body().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)


def test_second_derivatives_and_forward_mode_as_torch_has_them():
    body, image = plain_body()
    image.requires_grad_()
    gradient, = torch.autograd.grad(deepest(body(image)).square().sum(), image, create_graph=True)
    second, = torch.autograd.grad(gradient.square().sum(), image)
    assert second.isfinite().all() and second.abs().sum() > 0
    _, along = torch.func.jvp(lambda x: deepest(body(x)), (image.detach(),), (torch.ones_like(image),))
    with fused.steps():  # transforms are served step by step here, too
        _, inside = torch.func.jvp(lambda x: deepest(body(x)), (image.detach(),), (torch.ones_like(image),))
    assert torch.equal(along, inside)


def test_functional_calls_and_their_gradients_see_the_given_weights():
    body, image = plain_body()
    weights = {name: 1.5 * value.detach() for name, value in body.named_parameters()}

    def loss(weights):
        return deepest(torch.func.functional_call(body, weights, (image,))).square().mean()

    expected = copy.deepcopy(body)
    expected.load_state_dict(weights, strict=False)
    with fused.steps():
        found = torch.func.grad(loss)(weights)
        assert_close(loss(weights), deepest(expected(image)).square().mean())
    deepest(expected(image)).square().mean().backward()
    for name, p in expected.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)


def test_fx_traces_the_steps_one_by_one():
    body, image = plain_body()
    with torch.no_grad():
        assert torch.equal(deepest(torch.fx.symbolic_trace(body)(image)), deepest(body(image)))


def test_a_copy_and_a_moving_average_have_weights_of_their_own():
    body, images = make_body(train=False), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = deepest(body(images)).clone()
        teacher = copy.deepcopy(body)
        for p in teacher.parameters():
            p.data = p.data * 0.9
        assert_close(deepest(teacher(images)), deepest(copy.deepcopy(teacher)(images)))
        assert not torch.allclose(deepest(teacher(images)), before)
        assert torch.equal(deepest(body(images)), before)
