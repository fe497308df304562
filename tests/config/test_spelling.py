"""Names as other programs, papers and people write them."""

import pytest

from configs import DATASETS, MODELS, RECIPES
from models.checkpoints import hub
from models.checkpoints.published import published_name, published_names, require_published
from models.errors import ModelError
from utils.config import ConfigError, check_published, did_you_mean, name_model, parse, unknown_model, warn_of_variables
from utils.config.spelling import suggest

TYPED = {
    "ViT-B_16": ("ViT-B/16 vit_b_16 vit-b16 ViTB16 vit_base_patch16_224 vit_base_patch16_224.augreg_in21k_ft_in1k "
                 "google/vit-base-patch16-224-in21k"),
    "ViT-L_32": "vit_l_32 vit_large_patch32_384", "ViT-H_14": "vit_huge_patch14_224", "ViT-Ti_16": "vit_tiny_patch16_224",
    "DeiT-S_16": "deit_small_patch16_224 facebook/deit-small-patch16-224 DeiT-Small",
    "DeiT-B_16-distilled": "deit_base_distilled_patch16_384 facebook/deit-base-distilled-patch16-224",
    "CaiT-S24": "cait_s24_224", "CaiT-XXS36": "cait_xxs36_384", "MAE-B_16": "facebook/vit-mae-base vit_base_patch16_224.mae",
    "R50-ViT-B_16": "R50+ViT-B/16 vit_base_r50_s16_384", "R26-ViT-S_32": "vit_small_r26_s32_224",
    "cifar10": "CIFAR10 CIFAR-10 uoft-cs/cifar10", "cifar100": "cifar-100", "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST FMNIST fashion-mnist", "imagenet": "ImageNet-1k ILSVRC2012 IMNET",
    "cub200": "CUB_200_2011 CUB",
    "oxford_pets": "oxford-iiit-pet pets", "flowers102": "Flowers flowers-102", "folder": "ImageFolder", "mae": "MAE",
    "linear-probe": "linear_probe"}


def test_names_of_other_programs_are_recognized():
    """Only the one name that is meant is suggested."""
    for name, texts in TYPED.items():
        known = next(names for names in (MODELS, DATASETS, RECIPES) if name in names)
        for typed in texts.split():
            assert suggest(typed, known) == [name], typed


def test_several_names_or_none_are_suggested():
    assert did_you_mean("CIFAR", DATASETS) == " Did you mean cifar10 or cifar100?"
    assert did_you_mean("vit_base", MODELS) == " Did you mean ViT-B_16, ViT-B_32 or ViT-B_8?"
    for typed in ("swin_base_patch4_window7_224", "resnet50", "", "/"):
        assert did_you_mean(typed, MODELS) == "", typed
    for typed in ("stl10", "custom", "svhn"):
        assert did_you_mean(typed, DATASETS) == "", typed
    assert did_you_mean("bfloat16", ("fp32", "tf32", "bf16", "fp16")) == " Did you mean bf16?"
    assert did_you_mean("CosineAnnealingLR", ("cosine", "linear", "step", "constant")) == " Did you mean cosine?"


def test_a_model_at_another_image_size_is_recognized():
    assert unknown_model("vit_base_patch16_384") == (
        "--model_type vit_base_patch16_384: no such model. Did you mean ViT-B_16 with --img_size 384?")
    assert unknown_model("cait_xs24_384").endswith("Did you mean CaiT-XS24?")                # the image size of its row
    assert unknown_model("swin").endswith("no such model. MODEL_ZOO.md lists the models")


@pytest.mark.parametrize(("typed", "meant"), [
    ("mirror/vit-base-patch16-224", "imagenet21k/ViT-B_16"), ("vit_base_patch_16", "imagenet21k/ViT-B_16"),
    ("mirror/deit-small-patch16-224", "deit/deit_small_patch16_224-cd65a155"), ("sam/B16", "sam/ViT-B_16"),
    ("vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
    ("vit_small_patch14_dinov2.lvd142", "vit_small_patch14_dinov2.lvd142m"),
    ("mae/mae_pretrain_base", "mae/mae_pretrain_vit_base"), ("augreg/s16", "augreg/S_16"),
    ("checkpoint/ViT-B_16.npz", "imagenet21k/ViT-B_16"), ("imagenet21k/vit-b16", "imagenet21k/ViT-B_16")])
def test_published_names_are_recognized(typed, meant):
    with pytest.raises(ConfigError) as caught:
        check_published({"pretrained_dir": typed}, published_name, published_names())
    assert str(caught.value) == (f"--pretrained_dir {typed}: no such file or folder, and no published name. "
                                 f"Did you mean {meant}? MODEL_ZOO.md lists the names")
    assert published_name(meant).removeprefix("timm/").startswith(meant)


def test_a_published_name_as_model_type_also_sets_the_start():
    """Unless another flag sets the start."""
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    assert name_model({"model_type": name, "seed": 1}, hub) == {
        "model_type": "DINOv2-S_14-reg", "pretrained_dir": name, "seed": 1}
    assert name_model({"model_type": "facebook/dinov2-small", "pretrained_dir": "none"}, hub) == {
        "model_type": "DINOv2-S_14", "pretrained_dir": "none"}
    assert name_model({"model_type": name, "resume_path": "r"}, hub) == {"model_type": "DINOv2-S_14-reg", "resume_path": "r"}
    for flags in ({}, {"model_type": "ViT-B_16"}, {"pretrained_dir": name}):
        assert name_model(flags, hub) == flags
    for typed, words in (("beitv2_base_patch16_224", "it has positions relative to each pair"),
                         ("naflexvit_base_patch16_gap.e300_s576_in1k", "it has images of any shape"),
                         ("vit_base_patch_16", "no such model. Did you mean ViT-B_16?"),
                         ("hf-hub:a/b", "a repository that MODEL_ZOO.md does not list. To start"),
                         ("facebook/dinov2-smal", "a repository .* Did you mean facebook/dinov2-small or"),
                         ("swin_tiny_patch4_window7_224", "no such model. MODEL_ZOO.md lists the models$")):
        with pytest.raises(ConfigError, match=f"--model_type {typed}: {words}"):
            name_model({"model_type": typed}, hub)


def test_a_start_of_an_unsupported_model_is_refused_with_the_reason():
    for typed, words in (("naflexvit_base_patch16_gap.e300_s576_in1k", "images of any shape"),
                         ("timm/beit_base_patch16_224", "BEiT"),
                         ("hf-hub:timm/vit_pwee_patch16_reg1_gap_256.sbb_in1k", "attention and MLP side by side")):
        with pytest.raises(ConfigError, match=f"--pretrained_dir {typed}: it has .*{words}.*, which no model here supports"):
            check_published({"pretrained_dir": typed}, lambda name: None, published_names())
        with pytest.raises(ModelError, match=f"{typed}: it has .*{words}.*, which no model here supports"):
            require_published(typed)
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_published({"pretrained_dir": "beit_mine.pth"}, published_name, published_names())


def test_existing_weights_are_accepted():
    """A file, a folder, a published name, a word of the flag. A resumed run does not use them, so any name is accepted."""
    assert all(published_name(name) == name for name in published_names())
    for flags in ({}, {"pretrained_dir": "none"}, {"pretrained_dir": "."}, {"pretrained_dir": "ViT-B_16.npz"},
                  {"pretrained_dir": "gone.npz", "resume_path": "output/r"}):
        check_published(flags, published_name, published_names())
    with pytest.raises(ConfigError, match=r"--checkpoint gone\.npz: no such file or folder"):
        check_published({"checkpoint": "gone.npz"}, published_name, published_names(), "checkpoint")


def test_an_own_folder_as_data_set_is_reported_with_the_flags_for_it(tmp_path, monkeypatch):
    """Even if the name is misspelled. Also for a folder in data/ and for a list. A folder of code is not a data set."""
    monkeypatch.chdir(tmp_path)
    for folder in ("flowers", "my cats", "data/birds", "models"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/a.py").touch()
    (tmp_path / "birds.csv").touch()
    folder = "For the images in {}: DATASET=folder DATA_DIR={} (--dataset folder --data_dir)."
    for typed, words in (("flower", folder.format("flowers", "flowers") + " Did you mean flowers102?"),
                         ("flowers", folder.format("flowers", "flowers") + " Did you mean flowers102?"),
                         ("./my cats", folder.format("./my cats", "'./my cats'")),
                         ("bird", folder.format("data/birds", "data/birds")),
                         ("birds.csv", "For the images of the list birds.csv: DATASET=csv DATA_DIR=. "
                          "(--dataset csv --data_dir)."),
                         ("cifar", "Did you mean cifar10 or cifar100?")):
        with pytest.raises(ConfigError) as caught:
            parse(["--dataset", typed])
        assert str(caught.value) == f"--dataset cannot be {typed!r}. {words}"
    with pytest.raises(ConfigError, match=r"--dataset must be digits, .* or csv, got 'model'"):
        parse(["--dataset", "model"])


# Names in the environments of shells, macOS, conda, CI, containers, Kubernetes, MPI, Slurm, PBS, LSF, and launchers of training.
USUAL = """
    HOME PATH PWD OLDPWD SHELL USER USERNAME LOGNAME NAME HOSTNAME HOST HOSTTYPE LANG LANGUAGE LC_ALL TERM
    TERM_PROGRAM SHLVL EDITOR PAGER DISPLAY MAIL TMPDIR TEMP TMP TZ COLUMNS LINES SEEDS GPU OPTIONS OPTIND
    NODES NODE NODE_ENV NODE_PATH NODE_OPTIONS NODE_TYPE NODE_NAME NPROCS NCPUS NUM_PROCS NUM_GPUS NGPUS MODEL
    MODELS MODEL_NAME MODEL_PATH DATA DATASETS_PATH DATABASE DATABASE_URL DATADOG DATA_HOME DATA_PATH
    XDG_DATA_DIRS XDG_DATA_HOME XDG_RUNTIME_DIR NAMESPACE RESUME RESULTS_DIR LEARNING
    __CFBundleIdentifier COMMAND_MODE XPC_SERVICE_NAME SECURITYSESSIONID Apple_PubSub_Socket_Render
    SSH_AUTH_SOCK CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE RECIPE_DIR VIRTUAL_ENV PYTHON2 PYTHON3
    PYTHONPATH PYTHONHOME PIP_INDEX_URL VENV_DIR CI GITHUB_ACTIONS GITHUB_REF GITHUB_STEP_SUMMARY RUNNER_OS
    BUILD_ID JOB_NAME JENKINS_URL GITLAB_CI CI_NODE_TOTAL CI_NODE_INDEX KUBERNETES_SERVICE_HOST
    KUBERNETES_PORT MASTER_HOST MASTER_PORTS MASTER_PORT_80_TCP MASTER_SERVICE_PORT MASTER_SERVICE_HOST
    MASTER_ADDRESS MASTERPORT DATASET_ID DATASET_URI DATASET_NAME DATA_DIRECTORY RANK LOCAL_RANK GROUP_RANK
    ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODERANK NNODE PET_NNODES PET_NPROC_PER_NODE PET_MASTER_ADDR
    PET_MAX_RESTARTS PET_NODE_RANK SLURM_JOB_ID SLURM_NNODES SLURM_NPROCS SLURM_NODEID SLURM_NTASKS
    SLURM_STEP_NUM_NODES SLURM_GPUS SLURMD_NODENAME SLURM_GPUS_ON_NODE PBS_NUM_NODES PBS_NODEFILE PBS_NP
    LSB_JOBID LSB_DJOB_NUMPROC OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_NODE_RANK PMI_RANK PMI_SIZE
    MPI_LOCALRANKID OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER
    CUDA_CACHE_PATH NVIDIA_VISIBLE_DEVICES NCCL_DEBUG TORCH_HOME TORCH_LOGS HF_HOME HF_TOKEN WANDB_MODE
    WANDB_PROJECT VIT_TYPED VIT_CALLED_FROM http_proxy https_proxy no_proxy LS_COLORS LESSOPEN LD_LIBRARY_PATH
    LD_PRELOAD MANPATH WSLENV WSL_DISTRO_NAME BASH_FUNC_which%%
"""


def test_misspelt_variables_are_reported_and_no_others(capsys):
    meant = {"PRECISON": "PRECISION", "VAL_FRACTON": "VAL_FRACTION", "DATADIR": "DATA_DIR", "IMAGE_SIZE": "IMG_SIZE",
             "data_set": "DATASET", "NUMEPOCHS": "NUM_EPOCHS", "LEARNING_RATES": "LEARNING_RATE", "DRYRUN": "DRY_RUN",
             "PRETRAIND_DIR": "PRETRAINED_DIR", "MODELTYPE": "MODEL_TYPE", "OPTIMISER": "OPTIMIZER",
             "EPOCHS": "NUM_EPOCHS", "LR": "LEARNING_RATE", "BATCH_SIZE": "TRAIN_BATCH_SIZE", "VAL_FRAC": "VAL_FRACTION"}
    warn_of_variables([*USUAL.split(), "GPUS", "NPROC", "MASTER_PORT", "FP16_OPT_LEVEL", "DATA_DIR", *meant], "train.sh")
    assert capsys.readouterr() == ("", "".join(
        f"warning: {typed} is not a variable of train.sh. Did you mean {meant[typed]}?\n" for typed in sorted(meant)))
    warn_of_variables(["LEARNING_RATES", "LEARNINGRATES", "PRECISON"], "sweep.sh", "train.sh")
    assert capsys.readouterr().err.splitlines() == [
        "warning: LEARNINGRATES is not a variable of sweep.sh. Did you mean LEARNING_RATES?",
        "warning: PRECISON is not a variable of sweep.sh. Did you mean PRECISION?"]
