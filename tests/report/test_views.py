"""The rows of maps that are drawn, and their names. tests/system/test_visualize.py draws every family."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import CLASSES, LAYERS, family_model
from PIL import Image

from utils.attention import maps
from utils.report import views


def model(rows: slice, prefix: int, class_layers: int = 0, classifier: str = ""):
    """The attributes of a model that utils.report.views uses, with a grid of 2 x 3."""
    classifier = classifier or ("mean" if rows.stop is None else "token")
    return SimpleNamespace(query_rows=rows, num_prefix_tokens=prefix, grid=(2, 3), img_size=(128, 192),
                           config=SimpleNamespace(class_layers=class_layers, classifier=classifier))


def constant(values) -> np.ndarray:
    """Make (1, 4 heads, Q, 6 + prefix) with constant rows: the value in a picture identifies the row."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None].expand(1, 4, -1, -1)


@pytest.mark.parametrize(("rows", "prefix", "expected"), [
    (slice(0, 1), 1, {views.CLS: 10}),
    (slice(0, 2), 2, {views.CLS: 10, views.DIST: 11}),
    (slice(1, None), 1, {views.ALL: (11 + 12 + 13 + 14 + 15 + 16) / 6}),
    (slice(0, None), 0, {views.ALL: (10 + 11 + 12 + 13 + 14 + 15) / 6}),
])
def test_the_rows_that_the_head_reads(rows, prefix, expected):
    layer = constant(range(10, 16 + prefix)).expand(-1, -1, -1, 6 + prefix)
    found = views.read(model(rows, prefix), layer)
    assert list(found) == list(expected)
    for reader, value in expected.items():
        assert found[reader].shape == (4, 128, 192) and np.allclose(found[reader], value)


def test_the_two_kinds_of_layers_of_cait():
    cait = model(slice(0, 1), 0, class_layers=2)
    talking, asking = constant(range(6)).expand(-1, -1, -1, 6), constant([7]).expand(-1, -1, -1, 7)
    assert np.allclose(views.read(cait, talking)[views.ALL], 2.5) and np.allclose(views.read(cait, asking)[views.CLS], 7)
    joint = maps.rollout([talking, asking])
    assert list(views.read(cait, joint[:, None])) == [views.CLS]
    assert views.protected_columns(cait) == 1 and views.protected_columns(model(slice(0, 2), 2)) == 2


def view_of(family: str, classes: tuple[str, ...] = tuple(CLASSES)) -> views.View:
    """Return the view of a random image by a model of a later family."""
    subject = family_model(family).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*subject.img_size, 3), dtype=np.uint8))
    opened = SimpleNamespace(model=subject, classes=classes, title="a run", settings={},
                             region=lambda size: (0.0, 0.0, 1.0, 1.0),
                             transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return views.predict_with_attention(opened, views.Example("photo.png", [(image, 0)], 0))


def words_of(figure) -> list[str]:
    """Return every text, in one line and without the range of a small map."""
    texts = [part.get_text() for part in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return [" ".join(re.sub(r"\n(max )?-?[\d.e-]+( to \S+)?$", "", text).split()) for text in texts if text]


@pytest.mark.parametrize(("family", "readers", "note"), [
    ("dino", {views.CLS: slice(0, 1)}, ""), ("mean", {views.ALL: slice(2, None)}, "instead of a cls token"),
    ("dino_mean", {views.CLS: slice(0, 1), views.ALL: slice(3, None)}, "The head reads the cls token and the mean"),
    ("siglip", {views.POOL: slice(None)}, "pooling by attention"), ("pe", {views.POOL: slice(None)}, "pooling by attention")])
def test_pictures_of_later_families(family, readers, note):
    """Registers and the cls token are not drawn as patches, nor their queries read; pooling by attention is the last layer."""
    view = view_of(family)
    subject, patches = view.subject.model, int(np.prod(view.subject.model.grid))
    assert len(view.maps) == subject.attention_layers == LAYERS[family]
    figure = views.draw_attention(view)
    found, drawn = words_of(figure), views.read(subject, view.maps[-1])
    assert any(note in word for word in found) and bool(note) == any(word.startswith(("The head reads", "*")) for word in found)
    assert list(drawn) == list(readers)
    for reader, rows in readers.items():
        wanted = view.maps[-1][0, :, rows, -patches:].mean(dim=1)
        assert np.allclose(drawn[reader], views.enlarge(subject, wanted.unflatten(-1, subject.grid)), atol=1e-6)
        assert f"layer {LAYERS[family]}, mean of the heads, {reader}" in found
        several, heads = f", {reader}" * (len(readers) > 1), view.maps[-1].shape[1]
        assert f"head {heads}{several}" in found and f"head {heads + 1}{several}" not in found
    pooled = views.POOL in readers
    assert ("layer 2*" in found) == pooled and (not pooled or "layer 3" in found)
    joint = views.compute_rollout(view)
    assert joint.shape[1:] == (1 if pooled else subject.num_prefix_tokens + patches, subject.num_prefix_tokens + patches)
    torch.testing.assert_close(joint.sum(-1), torch.ones(joint.shape[:-1]))
    assert views.protected_columns(subject) == subject.num_prefix_tokens
    for figure in (views.draw_rollout(view, drop=0.5), views.draw_gradient_rollout(view)):
        assert [f"all layers, {reader}" in words_of(figure) for reader in readers] == [True] * len(readers)
    assert len(views.draw_distance([view]).axes[0].get_lines()[0].get_xdata()) == 2        # pooling has no place
    if subject.pos_embed is None:
        with pytest.raises(views.ViewError, match="only has rotary positions"):
            views.draw_positions(view.subject)
    else:
        views.draw_positions(view.subject)


def test_heads_of_the_pooling_are_its_own():
    few, many = view_of("pe"), view_of("siglip")                    # 1 and 3; the blocks have 2
    assert "layer 3, head 3, pooling query" in words_of(views.draw_attention(many, head=3))
    assert any("all heads, if it lacks this one" in word for word in words_of(views.draw_attention(many, head=3)))
    with pytest.raises(views.ViewError, match=r"--head 2: layer 3 has 1 head\. Give 1$"):
        views.draw_attention(few, head=2)
    assert "layer 2, head 2, mean of all queries" in words_of(views.draw_attention(few, layer=2, head=2))


def test_columns_are_patches_row_by_row():
    layer = torch.zeros(1, 1, 7, 7)
    layer[0, 0, 0, 1 + 1 * 3 + 2] = 1                       # cls attends to row 1, column 2
    heat = views.read(model(slice(0, 1), 1), layer)[views.CLS][0]
    assert heat.shape == (128, 192) and np.unravel_index(heat.argmax(), heat.shape)[0] >= 64
    assert heat[96:, 160:].min() > 0.9 and heat[:32].max() == 0 and heat[:, :64].max() == 0


def test_small_images_have_smooth_maps():
    small = model(slice(0, 1), 1)
    small.img_size = (8, 12)
    assert views.enlarge(small, torch.rand(5, 2, 3)).shape == (5, 80, 120)
    small.grid = (8, 12)
    grids = torch.rand(1, 8, 12)
    smooth = np.unique(views.enlarge(small, grids))
    assert len(smooth) > 1000 and smooth.max() <= grids.max()


def test_a_coarse_grid_is_drawn_patch_by_patch():
    """Otherwise the brightest point would be at a corner of four patches."""
    grids = torch.rand(1, 2, 3)
    np.testing.assert_array_equal(views.enlarge(model(slice(0, 1), 1), grids), grids.numpy().repeat(64, 1).repeat(64, 2))


def test_classes_by_name_and_number():
    assert views.class_index("bee", ("ant", "bee")) == views.class_index("1", ("ant", "bee")) == 1
    assert views.class_index("1", ("2", "1", "0")) == 1 and views.class_index("0", ("2", "1", "0")) == 2      # names first
    for wrong in ("cat", "2", "-1", ""):
        with pytest.raises(views.ViewError, match="no such class"):
            views.class_index(wrong, ("ant", "bee"))


def test_numbers_are_counted_from_one():
    assert views.check_range("--layer", 1, 3, "layers") == 1 and views.check_range("--layer", 3, 3, "layers") == 3
    for wrong in (0, 4, -1):
        with pytest.raises(views.ViewError, match="--layer"):
            views.check_range("--layer", wrong, 3, "layers")


def test_file_without_a_head_has_no_prediction():
    view = view_of("DINOv2", ("no head",))
    assert view.caption == "(no head: no prediction)"
    with pytest.raises(views.ViewError, match="has no head, so no class has a gradient"):
        views.draw_gradient_rollout(view)


def test_a_confusion_matrix_of_other_classes_is_refused():
    subject = SimpleNamespace(classes=("ant", "bee"), title="a run")
    with pytest.raises(views.ViewError, match=r"has 2 classes \(ant, bee\), the data have 1 \(cat\): not the same task"):
        views.draw_confusion(subject, [], "val", ("cat",))


@pytest.mark.parametrize(("family", "tokens"), [
    ("vit", "; the weights of cls are left out."), ("distilled", "; the weights of cls and dist are left out."),
    ("gap", "between their centers. "), ("siglip", "; the weights of the pooling are left out."),
    ("mean", "; the weights of registers are left out."), ("cait", "class attention is left out.")])
def test_captions_name_only_tokens_that_the_model_has(family, tokens):
    view = view_of(family)
    words = " ".join(" ".join(words_of(views.draw_distance([view]))).split())
    assert tokens in words and "some look near, others far" in words
    for drawing, good in ((views.draw_positions, "brightest at its own patch"), (views.draw_filters, "smooth edges")):
        assert good in " ".join(words_of(drawing(view.subject)))
