"""DeiT with a distillation token.

Touvron et al., "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877, section 4). A
second token follows the cls token. Its own head learns from a teacher's labels; the prediction is the mean of the two heads'
logits. DeiT without that token is a row of VisionTransformer. Differences from the published code: both heads start at zero, and
any image size is possible.
"""

from torch import Tensor, nn

from .vit import VisionTransformer


class DistilledVisionTransformer(VisionTransformer):
    """ViT with the tokens cls and dist before the patches. If `distilling` is set, training returns the logits of both heads."""

    def build(self) -> None:
        super().build()
        self.head_dist = nn.Linear(self.config.hidden_size, self.num_classes)
        self.distilling = False

    def forward_head(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D) -> logits (B, C)

        In training mode with `distilling` set, it returns a pair instead, the logits (B, C) of the cls head and of the dist head,
        because the two have different targets.
        """
        cls, dist = self.head(features[:, 0]), self.head_dist(features[:, 1])
        if self.training and self.distilling:
            return cls, dist
        return (cls + dist) / 2
