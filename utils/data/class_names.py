"""The names of the 1000 classes of ImageNet (ILSVRC 2012), in the order that published heads have them."""


def imagenet_names() -> tuple[str, ...]:
    """As torchvision spells them; a few occur twice, such as "crane", the bird and the machine."""
    from torchvision.models import ViT_B_16_Weights

    return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
