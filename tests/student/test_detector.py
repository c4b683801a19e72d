"""The detector: anchors that follow from the view, its input, and a frozen backbone."""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from dtcache.student import make_backbone
from dtcache.student.detector import DetectorSpec, anchors_for, build_detector

TINY = "test_resnet"


def test_anchors_of_800_pixels_are_those_of_coco() -> None:
    """At 800 pixels, sides, levels and pooling are those of torchvision's Faster R-CNN."""
    anchors = anchors_for([(200, 200), (100, 100), (50, 50), (25, 25)], (800, 800))
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    sizes = [size for (size,) in theirs.rpn.anchor_generator.sizes]
    assert list(anchors.sides) == pytest.approx(sizes) and anchors.pooled
    assert anchors.canonical == theirs.roi_heads.box_roi_pool.canonical_scale
    assert anchors.sampled == theirs.roi_heads.fg_bg_sampler.batch_size_per_image


def test_anchors_of_a_small_view_fit_into_it() -> None:
    """At 64 pixels, no level is pooled and each anchor has two strides of its map."""
    anchors = anchors_for([(16, 16), (8, 8), (4, 4), (2, 2)], (64, 64))
    assert anchors.sides == (8, 16, 32, 64) and not anchors.pooled
    assert anchors.canonical == 56 and anchors.sampled == 127


@pytest.mark.parametrize("finetune", [False, True])
def test_a_frozen_backbone_has_no_gradient_and_keeps_its_statistics(finetune: bool) -> None:
    """A step changes the backbone and its batch normalisations only if it is finetuned."""
    torch.manual_seed(0)
    backbone = make_backbone(TINY, init=None, seed=0)
    spec = DetectorSpec(input_size=(32, 32), num_classes=2, masks=False, width=8, finetune=finetune)
    detector = build_detector(backbone, spec).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    target = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 32, 32), torch.rand(3, 32, 32)], [target, target])
    torch.stack(list(losses.values())).sum().backward()
    has_gradient = any(p.grad is not None and p.grad.any() for p in backbone.parameters())
    same = all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert has_gradient == finetune and same != finetune


def test_the_input_is_normalised_by_the_backbones_own_statistics_and_not_resized() -> None:
    """The backbone gets (image - mean) / std of its own mean and std, at the size of the view."""
    backbone = make_backbone(TINY, init=None, seed=0)
    backbone.mean, backbone.std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    spec = DetectorSpec(input_size=(32, 64), num_classes=2, masks=True, width=8, finetune=False)
    detector = build_detector(backbone, spec).eval()
    seen = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(3, 32, 64)
    (prediction,) = detector([image])
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    torch.testing.assert_close(seen[-1][0], (image - mean) / std)
    assert prediction["masks"].shape[1:] == (1, 32, 64)
