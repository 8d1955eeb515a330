"""What several end-to-end tests start from."""
import pytest
import torch
import torchvision


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The flag of a ResNet-18's weights, as torchvision saves them."""
    path = tmp_path_factory.mktemp("backbone") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return ["--load_backbone", path]
