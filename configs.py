"""The data for users to read and edit: one row for each architecture and each recipe, and default weights.

utils/config/ combines them with the flags into the configuration of a run.

Sizes: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), table 1; Ti and S: Steiner et
al., "How to train your ViT?" (arXiv 2106.10270), table 2. Dropout rates are those of Google's published
configurations (google-research/vision_transformer, vit_jax/configs/models.py).
"""

from ml_collections import ConfigDict

from models.families import FAMILIES, META, architecture, unbuilt  # noqa: F401

# --------------------------------------------------------------------------------------------- architectures


def cait(hidden_size: int, num_heads: int, num_layers: int, layer_scale: float, **more) -> ConfigDict:
    """Return a row of CaiT (arXiv 2103.17239, table 3): head width 48, MLP four times the width, two class-attention layers."""
    return architecture(16, hidden_size, 4 * hidden_size, num_heads, num_layers, class_layers=2, layer_scale=layer_scale,
                        **META, **more)


MODELS = {
    "ViT-Ti_16": architecture(16, 192, 768, 3, 12),
    "ViT-S_16": architecture(16, 384, 1536, 6, 12),
    "ViT-S_32": architecture(32, 384, 1536, 6, 12),
    "ViT-B_8": architecture(8, 768, 3072, 12, 12),
    "ViT-B_16": architecture(16, 768, 3072, 12, 12),
    "ViT-B_32": architecture(32, 768, 3072, 12, 12),
    "ViT-L_16": architecture(16, 1024, 4096, 16, 24, dropout_rate=0.1),
    "ViT-L_32": architecture(32, 1024, 4096, 16, 24),
    "ViT-H_14": architecture(14, 1280, 5120, 16, 32, dropout_rate=0.1),
    "R-ViT-Ti_16": architecture(8, 192, 768, 3, 12, resnet_layers=()),
    "R26-ViT-S_32": architecture(1, 384, 1536, 6, 12, resnet_layers=(2, 2, 2, 2)),
    "R26-ViT-B_32": architecture(1, 768, 3072, 12, 12, resnet_layers=(2, 2, 2, 2)),
    "R50-ViT-B_16": architecture(1, 768, 3072, 12, 12, resnet_layers=(3, 4, 9), dropout_rate=0.1),
    "R50-ViT-L_32": architecture(1, 1024, 4096, 16, 24, resnet_layers=(3, 4, 6, 3), dropout_rate=0.1),
    # DeiT (arXiv 2012.12877, table 1). The files at 384 px are these rows with --img_size 384.
    "DeiT-Ti_16": architecture(16, 192, 768, 3, 12, **META),
    "DeiT-S_16": architecture(16, 384, 1536, 6, 12, **META),
    "DeiT-B_16": architecture(16, 768, 3072, 12, 12, **META),
    "DeiT-Ti_16-distilled": architecture(16, 192, 768, 3, 12, distilled=True, **META),
    "DeiT-S_16-distilled": architecture(16, 384, 1536, 6, 12, distilled=True, **META),
    "DeiT-B_16-distilled": architecture(16, 768, 3072, 12, 12, distilled=True, **META),
    "CaiT-XXS24": cait(192, 4, 24, 1e-5),
    "CaiT-XXS36": cait(192, 4, 36, 1e-5),
    "CaiT-XS24": cait(288, 6, 24, 1e-5, img_size=384),
    "CaiT-S24": cait(384, 8, 24, 1e-5),
    "CaiT-S36": cait(384, 8, 36, 1e-6, img_size=384),
    "CaiT-M36": cait(768, 16, 36, 1e-6, img_size=384),
    "CaiT-M48": cait(768, 16, 48, 1e-6, img_size=448),
    # MAE's encoders (arXiv 2111.06377), as in its fine-tuning; --classifier token reads the cls token.
    "MAE-B_16": architecture(16, 768, 3072, 12, 12, classifier="patch_mean", **META),
    "MAE-L_16": architecture(16, 1024, 4096, 16, 24, classifier="patch_mean", **META),
    "MAE-H_14": architecture(14, 1280, 5120, 16, 32, classifier="patch_mean", **META),
    **FAMILIES,                                # models/families.py: DINOv2, DINOv3, SigLIP, CLIP, EVA-02, ...
    # The embedded default (assets/): images of 8 x 8 px, small enough for tests and a laptop.
    "ViT-Nano_2": architecture(2, 64, 256, 4, 4, img_size=8),
}

# --------------------------------------------------------------------------------------------------- recipes

# Augmentation and loss that DeiT, CaiT and MAE share (timm's "rand-m9-mstd0.5-inc1" is RandAugment with 2 operations of
# magnitude 9; here without its jitter of the magnitude).
META_TRAINING = {
    "optimizer": "adamw", "decay_on": "matrices", "decay_type": "cosine", "max_grad_norm": 0.0, "interpolation": "bicubic",
    "augmentation": "crop_flip", "crop_scale": 0.08, "randaugment_ops": 2, "randaugment_magnitude": 9, "eval_crop": 0.875,
    "random_erasing": 0.25, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}

# One row for each recipe: flags and their values; docs/recipe_tables.md compares them with the source's, with command and
# expected result. A typed flag wins over the row. A row without a data set or a model takes them from DEFAULTS_OF_DATASET.
# "function" names a function of utils/config/recipes.py, for flags that depend on the data.
RECIPES = {
    # Dosovitskiy et al., section 4.1 and appendix B.1.1, with the values of the ViT-pytorch scripts: fine-tuning on the paper's
    # data sets, in batches of 512 and thousands of steps.
    # Command and expected accuracy: docs/recipe_tables.md (CIFAR-100, ViT-B_16, 500 steps, warm-up 100: about 0.907).
    "vit-paper": {
        "optimizer": "sgd", "learning_rate": 3e-2, "weight_decay": 0.0, "train_batch_size": 512, "num_steps": 10_000,
        "warmup_steps": 500, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip", "eval_every": 100},
    # For your own images: `auto` means this one for folder and csv. Its function (utils/config/recipes.py) chooses batch, length
    # and how images are resized; FINE_TUNING has the learning rates.
    "photos": {
        "function": "photos",
        "decay_on": "matrices", "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip",
        "crop_scale": 0.5, "randaugment_magnitude": 5, "interpolation": "bicubic"},
    # The embedded default: `bash train.sh`. Expected: 94-95 % on the test block (docs/measured.md).
    "digits": {
        "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "train_batch_size": 64, "num_steps": 100,
        "warmup_steps": 10, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "none", "eval_every": 20},
    # Kolesnikov et al. (arXiv 1912.11370), section 3.3. Its function (utils/config/recipes.py) sets length, warm-up,
    # milestones and MixUp by the number of training images.
    "bit-hyperrule": {
        "function": "bit_hyperrule",
        "optimizer": "sgd", "learning_rate": 3e-3, "weight_decay": 0.0, "train_batch_size": 512, "decay_type": "step",
        "max_grad_norm": 0.0, "augmentation": "crop_flip", "crop_scale": 0.64, "eval_every": 100},
    # Steiner et al. (arXiv 2106.10270), section 3.5 and table 4, for data of CIFAR-100's size, from the recommended file.
    "augreg": {
        "optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, "train_batch_size": 512, "num_steps": 2_500,
        "warmup_steps": 200, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip", "eval_every": 100,
        "dropout_rate": 0.0, "pretrained_dir": "augreg"},
    # Touvron et al. (arXiv 2012.12877), table 9: ImageNet from scratch.
    "deit": META_TRAINING | {
        "dataset": "imagenet", "model_type": "DeiT-S_16", "pretrained_dir": "none", "train_batch_size": 1024,
        "learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6, "weight_decay": 0.05,
        "num_epochs": 300.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1},
    # Fine-tuning at 384 px (README of facebookresearch/deit).
    "deit-384": META_TRAINING | {
        "dataset": "imagenet", "model_type": "DeiT-B_16", "img_size": 384, "train_batch_size": 512,
        "learning_rate": 5e-6, "decay_type": "constant", "warmup_learning_rate": 1e-6, "weight_decay": 1e-8,
        "num_epochs": 30.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1},
    # Touvron et al. (arXiv 2103.17239), section 5: DeiT's recipe with stochastic depth by size (VARIANTS).
    "cait": META_TRAINING | {
        "dataset": "imagenet", "model_type": "CaiT-S24", "img_size": 224, "pretrained_dir": "none", "train_batch_size": 1024,
        "learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6, "weight_decay": 0.05,
        "num_epochs": 400.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1, "eval_crop": 1.0},
    # He et al. (arXiv 2111.06377), table 9: end-to-end fine-tuning; the larger encoders are in VARIANTS.
    "mae": META_TRAINING | {
        "dataset": "imagenet", "model_type": "MAE-B_16", "train_batch_size": 1024, "learning_rate": 2e-3,
        "min_learning_rate": 1e-6, "weight_decay": 0.05, "layer_decay": 0.65, "num_epochs": 100.0, "warmup_epochs": 5.0,
        "drop_path_rate": 0.1},
    # K. Salama, "Image classification with Vision Transformer" (keras.io): 72 px in patches of 6, from scratch.
    "scratch-small": {
        "dataset": "cifar100", "model_type": "ViT-Ti_16", "img_size": 72, "patch_size": 6, "hidden_size": 64, "mlp_dim": 128,
        "num_heads": 4, "num_layers": 8, "dropout_rate": 0.1, "pretrained_dir": "none", "optimizer": "adamw",
        "learning_rate": 1e-3, "weight_decay": 0.1, "train_batch_size": 256, "num_epochs": 100.0,
        "warmup_steps": 0, "decay_type": "constant", "max_grad_norm": 0.0, "attention_dropout_rate": 0.1,
        "augmentation": "crop_flip", "crop_scale": 0.64, "rotation": 7.2},
    # S. Kriventsov, "MNIST Handwritten Digit Recognition" (Towards Data Science): 28 px in patches of 7, one channel.
    "mnist-scratch": {
        "dataset": "mnist", "model_type": "ViT-Ti_16", "img_size": 28, "patch_size": 7, "hidden_size": 64, "mlp_dim": 128,
        "num_heads": 8, "num_layers": 6, "in_channels": 1, "pretrained_dir": "none", "optimizer": "adam",
        "learning_rate": 3e-3, "weight_decay": 0.0, "train_batch_size": 100, "num_epochs": 25.0,
        "warmup_steps": 0, "decay_type": "constant", "max_grad_norm": 0.0, "augmentation": "none"},
    # He et al., TransFG (arXiv 2103.07976), section 4.1: the settings of its plain ViT baseline, here for ViT-S.
    "cub-vit-s": {
        "dataset": "cub200", "model_type": "ViT-S_16", "img_size": 448, "optimizer": "sgd", "learning_rate": 3e-2,
        "weight_decay": 0.0, "train_batch_size": 64, "num_steps": 10_000, "warmup_steps": 500, "decay_type": "cosine",
        "max_grad_norm": 1.0, "augmentation": "crop_flip", "crop_scale": 0.5, "eval_crop": 0.747, "eval_every": 200},
    # Caron et al. (arXiv 2104.14294), eval_linear.py: a linear classifier on frozen features.
    "linear-probe": {
        "train_layers": "head", "optimizer": "sgd", "learning_rate": 4e-3, "weight_decay": 0.0, "train_batch_size": 1024,
        "num_epochs": 100.0, "warmup_steps": 0, "decay_type": "cosine", "max_grad_norm": 0.0, "augmentation": "crop_flip",
        "crop_scale": 0.08, "interpolation": "bicubic", "eval_crop": 0.875, "dropout_rate": 0.0},
}

# Other values of a recipe for one model.
VARIANTS = {
    ("mae", "MAE-L_16"): {"layer_decay": 0.75, "learning_rate": 4e-3, "num_epochs": 50.0, "drop_path_rate": 0.2},
    ("mae", "MAE-H_14"): {"layer_decay": 0.75, "learning_rate": 4e-3, "num_epochs": 50.0, "drop_path_rate": 0.3},
    ("cait", "CaiT-XXS24"): {"drop_path_rate": 0.05},
    ("cait", "CaiT-XXS36"): {"drop_path_rate": 0.1},
    ("cait", "CaiT-XS24"): {"drop_path_rate": 0.05},
    ("cait", "CaiT-S36"): {"drop_path_rate": 0.2},
    ("cait", "CaiT-M36"): {"drop_path_rate": 0.3},
    ("cait", "CaiT-M48"): {"drop_path_rate": 0.4},
}

# How the recipe `photos` fine-tunes a model: the first row counts whose `models` begin the model's name. Each row has its values
# by optimizer; the first optimizer is the default. AdamW's rates are for a batch of 32 images and grow with the batch, except in
# rows with `any_batch`; SGD's do not grow. `source` is for the row's first optimizer; AdamW for ViT, DeiT and CaiT is as in MAE's
# table, SGD for the others as for ViT. Rates that were not run here are published for more images and larger batches than most
# people have: try several (sweep.sh).
AS_MAE = {"learning_rate": 1.25e-4, "layer_decay": 0.75, "weight_decay": 0.05}
SGD = {"learning_rate": 0.01}
# Without start weights: the rates of `scratch-small` and `vit-paper`. A new head has no start weights either: where the other
# weights need a far smaller rate, the head uses this one, unless a larger one is typed.
FROM_SCRATCH = {"adamw": {"learning_rate": 1e-3, "weight_decay": 0.1}, "sgd": {"learning_rate": 0.03}}
NEW_HEAD = {"head_learning_rate": FROM_SCRATCH["adamw"]["learning_rate"]}
# 1e-5 for any batch; the others are published rates, converted to a batch of 32 images.
SMALL_RATE = {"learning_rate": 1e-5, **NEW_HEAD}
CLIP_B = {"learning_rate": 6e-4 * 32 / 2048, "layer_decay": 0.6, "weight_decay": 0.05, **NEW_HEAD}
CLIP_L = CLIP_B | {"learning_rate": 4e-4 * 32 / 2048, "layer_decay": 0.65}
EVA02 = {"learning_rate": 1e-4 * 32 / 1024, "layer_decay": 0.7, "weight_decay": 0.05, "drop_path_rate": 0.1, **NEW_HEAD}
FINE_TUNING = (
    {"models": "ViT-Ti", "source": "run here, on a model of width 128 with 6 blocks at 32 px",
     "sgd": {"learning_rate": 0.03}, "adamw": AS_MAE},
    {"models": "MAE-", "source": "not run here; arXiv 2111.06377, table 9: AdamW, 1e-3 times batch / 256",
     "adamw": AS_MAE | {"drop_path_rate": 0.1}, "sgd": SGD},
    {"models": ("DeiT-", "CaiT-"), "source": "not run here; github.com/facebookresearch/deit/issues/45: SGD, 0.01, batch 768",
     "sgd": SGD | {"weight_decay": 1e-4}, "adamw": AS_MAE},
    {"models": "DeiT3-", "source": "not run here; facebookresearch/deit README_revenge.md, fine-tuning: AdamW, 1e-5, batch 512",
     "adamw": SMALL_RATE | {"weight_decay": 0.1}, "sgd": SGD | {"weight_decay": 1e-4}, "any_batch": True},
    {"models": "DINOv2-", "source": "not run here; arXiv 2304.07193 fine-tunes as DeiT III does (AdamW, 1e-5, batch 512); the "
     "same rate in github.com/facebookresearch/dinov2/issues/252, and lower ones for larger models",
     "adamw": SMALL_RATE | {"weight_decay": 0.1}, "sgd": SGD, "any_batch": True},
    {"models": ("DINOv3-", "LingBot-", "EUPE-", "TIPSv2-"), "source": "not run here; none is published: as DINOv2",
     "adamw": SMALL_RATE | {"weight_decay": 0.1}, "sgd": SGD, "any_batch": True},
    {"models": ("CLIP-L", "CLIP-H", "CLIP-bigG", "OpenCLIP-L", "OpenCLIP-H", "OpenCLIP-g", "OpenCLIP-bigG"),
     "source": "not run here; arXiv 2212.06138 and scripts of LightDXY/FT-CLIP for L/14: AdamW, 4e-4, batch 2048",
     "adamw": CLIP_L, "sgd": SGD},
    {"models": ("CLIP-", "OpenCLIP-", "TinyCLIP-"),
     "source": "not run here; arXiv 2212.06138 and scripts of LightDXY/FT-CLIP for B/16: AdamW, 6e-4, batch 2048",
     "adamw": CLIP_B, "sgd": SGD},
    {"models": ("SigLIP-L", "SigLIP-SO400M", "SigLIP-gopt"), "source": "not run here; none is published: as CLIP's L/14",
     "adamw": CLIP_L, "sgd": SGD},
    {"models": ("SigLIP-", "PE-"), "source": "not run here; none is published: as CLIP's B/16", "adamw": CLIP_B, "sgd": SGD},
    {"models": "EVA02-Ti", "source": "not run here; baaivision/EVA EVA-02/asuka/README.md: AdamW, 2e-4, batch 1024",
     "adamw": EVA02 | {"learning_rate": 2e-4 * 32 / 1024, "layer_decay": 0.9}, "sgd": SGD},
    {"models": "EVA02-S", "source": "not run here; baaivision/EVA EVA-02/asuka/README.md: AdamW, 1e-4, batch 1024",
     "adamw": EVA02 | {"layer_decay": 0.8}, "sgd": SGD},
    {"models": "EVA02-L", "source": "not run here; baaivision/EVA EVA-02/asuka/README.md: AdamW, 5e-5, batch 1024",
     "adamw": EVA02 | {"learning_rate": 5e-5 * 32 / 1024, "layer_decay": 0.8, "drop_path_rate": 0.15}, "sgd": SGD},
    {"models": "EVA02-", "source": "not run here; baaivision/EVA EVA-02/asuka/README.md for B: AdamW, 1e-4, batch 1024",
     "adamw": EVA02, "sgd": SGD},
    {"models": ("EVA-", "BEiT3-", "AIMv2-", "IJEPA-", "InternViT-", "C-RADIO"),
     "source": "not run here; none is taken from their papers: as MAE", "adamw": AS_MAE, "sgd": SGD},
    {"models": "", "source": "not run here; arXiv 2010.11929, appendix B.1.1: SGD, the best of 0.001 to 0.03, batch 512",
     "sgd": SGD, "adamw": AS_MAE},
)

# The default recipe and model of a data set; None is for all others. Without a model, MODEL_OF_MACHINE chooses.
DEFAULTS_OF_DATASET = {
    None: {"recipe": "vit-paper", "model_type": "ViT-B_16"},
    "digits": {"recipe": "digits", "model_type": "ViT-Nano_2"},
    "folder": {"recipe": "photos"},
    "csv": {"recipe": "photos"},
}
# The default model of a machine: the first row whose memory (GiB) and cores a process has. `model` counts if no flag names
# weights, and `why` is printed as the reason; `plain` counts if a file is given that does not say its model, or none. All are
# Apache-2.0. DINOv2 at 224 px, as in its publisher's figures, has a fifth of the patches at 518 px.
DINO = "its features do well on images that it was not trained on (arXiv 2304.07193); it was not compared with others here"
SMALL = "it is small enough for its cores"
MODEL_OF_MACHINE = (
    {"device": "cuda", "memory": 40, "cores": 1, "model": "DINOv2-L_14-reg", "img_size": 224, "plain": "ViT-B_16", "why": DINO},
    {"device": "cuda", "memory": 10, "cores": 1, "model": "DINOv2-B_14-reg", "img_size": 224, "plain": "ViT-B_16", "why": DINO},
    {"device": "cuda", "memory": 0, "cores": 1, "model": "DINOv2-S_14-reg", "img_size": 224, "plain": "ViT-S_16", "why": DINO},
    {"device": "cpu", "memory": 8, "cores": 8, "model": "ViT-S_16", "img_size": 224, "plain": "ViT-S_16", "why": SMALL},
    {"device": "cpu", "memory": 0, "cores": 0, "model": "ViT-Ti_16", "img_size": 224, "plain": "ViT-Ti_16", "why": SMALL},
)

# Google's names for the sizes in the AugReg paper.
AUGREG_SIZES = ("Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32")

# The values of --dataset; utils/data/datasets.py has a function for each.
DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "imagenet", "cub200", "flowers102", "oxford_pets",
            "folder", "csv")
