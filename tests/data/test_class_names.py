"""The names stand at the numbers that published heads have them at."""

from utils.data.class_names import imagenet_names


def test_names_by_number():
    names = imagenet_names()
    assert len(names) == 1000
    assert (names[0], names[207], names[281], names[999]) == ("tench", "golden retriever", "tabby", "toilet tissue")
