"""Rollout, distances, positions and filters, compared with plain numpy and published code (fixtures/rollout.npz)."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from configs import META, architecture
from models import create_model, record_attention
from utils.attention import maps as attention_maps
from utils.attention.maps import gradient_rollout, read_rows, rollout, upsample

ROLLOUT = reference.arrays(Path(__file__).parents[1] / "fixtures" / "rollout.npz")
FUSED = {"mean": np.mean, "max": np.max, "min": np.min}


def maps(layers=3, images=2, heads=4, tokens=7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layers)
    return [torch.randn(images, heads, tokens, tokens, generator=generator).mul(2).softmax(-1) for _ in range(layers)]


def cait_maps(talking=3, classes=2, images=2, heads=4, patches=6) -> list[torch.Tensor]:
    """Make talking-heads maps, partly negative, whose rows have any sum, then class attention."""
    generator = torch.Generator().manual_seed(0)
    square = [torch.randn(images, heads, patches, patches, generator=generator) + 0.5 for _ in range(talking)]
    return square + [torch.randn(images, heads, 1, 1 + patches, generator=generator).softmax(-1) for _ in range(classes)]


def joint(fused: np.ndarray, share: float, protected) -> np.ndarray:
    """Compute rollout of one image in plain numpy: (layers, N, N) -> (N, N). protected(row, column): is never dropped."""
    tokens = fused.shape[-1]
    result = np.eye(tokens)
    for layer in fused.astype(np.float64):
        layer = layer.copy()
        for index in np.argsort(layer.ravel(), kind="stable")[:int(layer.size * share)]:
            if not protected(*divmod(index, tokens)):
                layer.flat[index] = 0
        layer += np.eye(tokens)
        result = layer / layer.sum(axis=1, keepdims=True) @ result
    return result


def first_column(row, column) -> bool:
    return column == 0


def first_entry(row, column) -> bool:
    return row == column == 0


def mask(attention: np.ndarray) -> np.ndarray:
    """Return the mask that vit-explain shows: the row of cls over the patches, with maximum 1."""
    return attention[0, 1:].reshape(6, 6) / attention[0, 1:].max()


# ------------------------------------------------------------------------------------------------------ rollout


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_rollout_ends_with_the_pooling_by_attention(drop):
    """Its query is not a token: it has no residual connection, and may have other heads. Registers and cls are never dropped."""
    blocks, pool = maps(), torch.randn(2, 3, 1, 7, generator=torch.Generator().manual_seed(5)).softmax(-1)
    found = rollout([*blocks, pool], drop=drop, prefix_tokens=3)
    last = pool.mean(dim=1)
    for image in range(2):
        lowest = last[image, 0].argsort()[:int(7 * drop)]
        last[image, 0, lowest[lowest >= 3]] = 0
    expected = last / last.sum(dim=-1, keepdim=True) @ rollout(blocks, drop=drop, prefix_tokens=3)
    torch.testing.assert_close(found, expected)
    gradients = [torch.ones_like(layer) for layer in (*blocks, pool)]
    torch.testing.assert_close(gradient_rollout([*blocks, pool], gradients, drop, 3), found)
    assert gradient_rollout([*blocks, pool], [-one for one in gradients]).eq(0).all()          # not a number otherwise
    distances = attention_maps.attention_distance([*blocks, pool], (2, 2), (8, 8))
    torch.testing.assert_close(distances, attention_maps.attention_distance(blocks, (2, 2), (8, 8)))



@pytest.mark.parametrize("fusion", FUSED)
def test_rollout_against_the_reference(fusion):
    attention, expected = torch.from_numpy(ROLLOUT["attention"]), ROLLOUT[f"row_normalised_{fusion}"]
    assert attention.shape == (4, 1, 3, 37, 37)
    np.testing.assert_allclose(rollout(list(attention), fusion)[0].numpy(), expected, rtol=0, atol=1e-6)
    # The order of the layers matters, so that the comparison can fail.
    assert np.abs(rollout(list(attention.flip(0)), fusion)[0].numpy() - expected).max() > 1e-4


@pytest.mark.parametrize("fusion", FUSED)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_dropping_against_the_reference_and_numpy(fusion, share):
    """vit-explain spares one entry, ours the column of cls: the same computation with another condition."""
    attention, expected = ROLLOUT["attention"], ROLLOUT[f"rownorm_{fusion}_{share}"]
    layers, fused = list(torch.from_numpy(attention)), FUSED[fusion](attention[:, 0], axis=1)
    np.testing.assert_allclose(mask(joint(fused, share, first_entry)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rollout(layers, fusion, share)[0].numpy(), joint(fused, share, first_column), rtol=0, atol=1e-5)
    everything = rollout(layers, fusion, share, prefix_tokens=0)[0].numpy()
    np.testing.assert_allclose(everything, joint(fused, share, lambda row, column: False), rtol=0, atol=1e-5)


def test_the_columns_of_cls_and_dist_are_never_dropped():
    """Even in a map in which they have the lowest weights."""
    layer = torch.arange(1.0, 65.0).view(8, 8).T.reshape(1, 1, 8, 8)              # columns 0 and 1 hold the lowest
    for prefix in (0, 1, 2):
        left = rollout([layer], drop=0.99, prefix_tokens=prefix)[0] > 0           # the identity's entries, too
        expected = torch.eye(8, dtype=torch.bool)
        expected[:, :prefix] = expected[7, 7] = True
        assert torch.equal(left, expected)


def test_rows_sum_to_one_and_images_do_not_mix():
    recorded = maps(12, images=3, tokens=17)
    together = rollout(recorded, "max", 0.5)
    for number in range(3):
        torch.testing.assert_close(together[number], rollout([layer[number:number + 1] for layer in recorded], "max", 0.5)[0])
    for attention in (together, rollout(recorded), rollout(recorded, "min", 0.7),
                      gradient_rollout(recorded, [layer - 0.05 for layer in recorded])):
        assert attention.shape == (3, 17, 17) and (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 17), rtol=0, atol=1e-5)


def test_rollout_of_cait_against_numpy():
    recorded = cait_maps()
    expected, of_squares = np.tile(np.eye(7), (2, 2, 1, 1))
    for layer in recorded:
        own = slice(0, 1) if layer.shape[2] == 1 else slice(1, 7)         # the rows that the layer changes
        for number, heads in enumerate(layer.double().numpy()):
            fused = np.maximum(heads, 0).mean(axis=0)
            normalized, squares = fused / fused.sum(axis=1, keepdims=True), (heads ** 2).mean(axis=0)
            for product, weights in ((expected, normalized), (of_squares, squares)):
                step = np.eye(7)
                step[own, 7 - weights.shape[1]:] += weights
                product[number] = step / step.sum(axis=1, keepdims=True) @ product[number]
    found = rollout(recorded)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert found[:, 1:, 0].eq(0).all(), "no patch attends to cls"
    np.testing.assert_allclose(gradient_rollout(recorded, recorded).numpy(), of_squares, rtol=0, atol=1e-5)


def test_dropping_in_cait_counts_only_entries_of_the_layer():
    """The rows and columns that are added for cls are no entries of a talking-heads layer."""
    talking, asking = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 1, 7).softmax(-1)
    found, whole = (rollout([talking, asking], drop=share)[0] for share in (0.5, 0.0))
    assert (found[1:, 1:] == 0).sum() >= 18 - 6 and (whole[1:, 1:] == 0).sum() == 0
    assert found[0, 0] > whole[0, 0], "cls keeps itself, and loses the patches attended to least"


# ------------------------------------------------------------------------------------------- gradient rollout


@pytest.fixture(scope="module")
def explained():
    """The reference's model and image: (logits, maps, {class: gradients of its logit})"""
    row = architecture(16, 36, 144, 3, 4, img_size=96, **META | reference.HALF)
    model = create_model(row, pretrained=reference.TORCH / "deit_rollout.pth", head="keep").eval()
    with record_attention(model, differentiable=True) as recorded:
        logits = model(reference.normalize(ROLLOUT["image"]))
    gradients = {target: torch.autograd.grad(logits[0, target], recorded, retain_graph=True) for target in (0, 3)}
    return logits.detach(), [layer.detach() for layer in recorded], gradients


def test_recorded_gradients_against_the_reference(explained):
    logits, recorded, gradients = explained
    np.testing.assert_allclose(logits.numpy(), ROLLOUT["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(torch.stack(recorded).numpy(), ROLLOUT["attention"], rtol=0, atol=1e-5)
    # What the reference's hook received is the gradient of the softmax's input: its derivative leads from one to the other.
    of_input = [layer * (gradient - (layer * gradient).sum(-1, keepdim=True)) for layer, gradient in zip(recorded, gradients[3])]
    np.testing.assert_allclose(torch.stack(of_input).numpy(), ROLLOUT["attn_grad_cat3"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_gradient_rollout_against_the_reference_and_numpy(explained, target, share):
    """vit-explain cuts the mean at 0, ours each head; it takes another gradient, and spares one entry: the rest is the same."""
    _, recorded, gradients = explained
    expected = ROLLOUT[f"gradrollout_fixed_cat{target}_{share}"]
    of_input = [layer * (gradient - (layer * gradient).sum(-1, keepdim=True))
                for layer, gradient in zip(recorded, gradients[target])]
    product = np.stack([(layer * gradient)[0].numpy() for layer, gradient in zip(recorded, of_input)])
    theirs = joint(np.maximum(product.mean(axis=1), 0), share, first_entry)
    np.testing.assert_allclose(mask(theirs), expected, rtol=0, atol=1e-5)
    product = np.stack([(layer * gradient)[0].numpy() for layer, gradient in zip(recorded, gradients[target])])
    ours = joint(np.maximum(product, 0).mean(axis=1), share, first_column)
    np.testing.assert_allclose(gradient_rollout(recorded, gradients[target], share)[0].numpy(), ours, rtol=0, atol=1e-6)
    reversed_pairs = gradient_rollout(recorded, gradients[target][::-1], share)
    assert np.abs(reversed_pairs[0].numpy() - ours).max() > 1e-3             # the order matters


# ------------------------------------------------------------------------------------------------ to the picture


def test_rows_of_a_grid():
    attention = torch.rand(2, 3, 8, 8)
    cls = read_rows(attention, slice(0, 1), (2, 3))
    assert cls.shape == (2, 3, 1, 2, 3)
    assert cls[1, 2, 0].tolist() == [attention[1, 2, 0, 2:5].tolist(), attention[1, 2, 0, 5:8].tolist()]      # row by row
    both = read_rows(attention, slice(0, 2), (2, 3))                      # cls and dist
    assert both.shape == (2, 3, 2, 2, 3) and both[0, 0, 1, 1, 2] == attention[0, 0, 1, 7]
    patches = read_rows(attention.mean(dim=1), slice(2, None), (3, 2)).mean(dim=1)
    torch.testing.assert_close(patches[1, 2, 1], attention[1, :, 2:, 7].mean())


def test_class_attention_against_the_reference():
    expected = reference.torch_expected("cait")["class_attn"]
    model = create_model(reference.TORCH_ROWS["cait"], pretrained=reference.TORCH / reference.TORCH_FILES["cait"], head="keep")
    with torch.no_grad(), record_attention(model.eval()) as recorded:
        model(reference.torch_images("cait"))
    found = attention_maps.class_attention(recorded, model.grid)
    assert found.shape == (2, 2, 4, 4)                                    # layers, images, grid
    wanted = np.stack([heads.numpy().mean(axis=1)[:, 0, 1:].reshape(2, 4, 4) for heads in expected])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (2, 3)])
def test_upsample(size):
    grids = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.9]], [[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    large = upsample(grids, size)
    assert large.shape == (2, *size)
    torch.testing.assert_close(large.amax(dim=(1, 2)), torch.tensor([0.9, 3.0]))
    assert large.min() >= 0 and upsample(grids[None], size).shape == (1, 2, *size)
    if size == (2, 3):
        torch.testing.assert_close(large, grids)


# ------------------------------------------------------------------------------------- the paper's figure 7


def distance_by_hand(heads: np.ndarray, grid, img_size) -> float:
    """(hw, hw) of one head and image"""
    total, (height, width) = [], grid
    for query in range(height * width):
        weights = np.maximum(heads[query], 0)
        apart = [np.hypot((query // width - key // width) * img_size[0] / height,
                          (query % width - key % width) * img_size[1] / width) for key in range(height * width)]
        total.append((weights * apart).sum() / weights.sum())
    return np.mean(total)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_attention_distance_against_numpy(prefix):
    recorded, grid, size = maps(2, images=3, heads=2, tokens=6 + prefix), (2, 3), (32, 24)
    found = attention_maps.attention_distance(recorded, grid, size)
    assert found.shape == (2, 2)
    for layer in range(2):
        for head in range(2):
            expected = np.mean([distance_by_hand(image[head, prefix:, prefix:].double().numpy(), grid, size)
                                for image in recorded[layer]])
            assert found[layer, head] == pytest.approx(expected, abs=1e-5)


def test_attention_distance_of_known_maps():
    near, across = torch.eye(4).view(1, 1, 4, 4), torch.eye(4).flip(0).view(1, 1, 4, 4)
    found = attention_maps.attention_distance([near, across], (2, 2), (16, 16))
    torch.testing.assert_close(found, torch.tensor([[0.0], [8 * 2 ** 0.5]]))
    # Of a CaiT: no class attention, negative weights count as none.
    recorded = cait_maps()
    found = attention_maps.attention_distance(recorded, (2, 3), (32, 48))
    assert found.shape == (3, 4)
    expected = np.mean([distance_by_hand(image[1].double().numpy(), (2, 3), (32, 48)) for image in recorded[2]])
    assert found[2, 1] == pytest.approx(expected, abs=1e-5)


def test_a_head_of_negative_weights_has_no_distance():
    """With talking heads. It used to be drawn as a distance of 0."""
    layer = torch.eye(4).flip(0).repeat(1, 2, 1, 1)
    layer[:, 1] *= -1
    found = attention_maps.attention_distance([layer], (2, 2), (16, 16))
    assert found[0, 0] == pytest.approx(8 * 2 ** 0.5) and found[0, 1].isnan()


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_position_similarity(prefix):
    table = torch.randn(1, prefix + 6, 5, generator=torch.Generator().manual_seed(0))
    found = attention_maps.position_similarity(table, (2, 3))
    a, b = (table[0, prefix + index].double().numpy() for index in (1 * 3 + 2, 0 * 3 + 1))
    assert found.shape == (2, 3, 2, 3) and found[1, 2, 0, 1] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)
    torch.testing.assert_close(found[1, 1, 1, 1], torch.tensor(1.0))


@pytest.mark.parametrize("channels", [3, 1])
def test_patch_filters_are_principal_components(channels):
    kernel = torch.randn(40, channels, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    colours, shares = attention_maps.patch_filters(kernel, 5)
    assert colours.shape == (5, 4, 4, 3) and colours.min() >= 0 and colours.max() == 1
    data = kernel.double().numpy().reshape(40, -1)
    values, vectors = np.linalg.eigh(np.cov(data.T))
    for number in range(5):
        wanted = vectors[:, -1 - number].reshape(channels, 4, 4).transpose(1, 2, 0)
        shown = colours[number].double().numpy()[..., :channels] - 0.5
        cosine = (wanted * shown).sum() / np.linalg.norm(wanted) / np.linalg.norm(shown)
        assert abs(cosine) == pytest.approx(1, abs=1e-3)
        assert shares[number] == pytest.approx(values[-1 - number] / values.sum(), abs=1e-4)
    if channels == 1:
        assert torch.equal(colours[..., 0], colours[..., 2])
        assert attention_maps.patch_filters(kernel[:6], 28)[0].shape == (5, 4, 4, 3)        # no more than the kernel has
