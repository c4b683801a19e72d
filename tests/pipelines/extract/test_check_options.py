"""Options of an extraction that contradict each other are refused before anything is loaded."""

import pytest
import torch

from dtcache.errors import ConfigError
from dtcache.options import ExtractOptions
from dtcache.teacher import CallableTeacher
from pipelines.extract.check_options import check_options, check_target

NOISELESS = CallableTeacher(torch.nn.Conv2d(3, 8, 4, stride=4), taps={"stride4": ""}, version="1")
"""A module that is called with clean images."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ""}, r"^`teacher`: expected the name of a teacher or, .*, got neither$"),
        (
            {"draws": 2, "encoding": "ddim"},
            r"^`encoding='ddim'` draws no noise: expected `draws=1` and no `average`, got "
            r"`draws=2`$",
        ),
        ({"average": True, "encoding": "ddim"}, r"^`encoding='ddim'` draws no noise: .*`draws=1`$"),
        ({"ddim_steps": 20}, r"^`ddim_steps` 20: expected `encoding='ddim'` with it"),
        ({"average": True}, r"^`average`: expected at least 2 `draws` to take the mean of, got 1$"),
        ({"batch_size": 1}, r"^`batch_size` 1: expected at least 2, both flips of an image$"),
        ({"draws": 33}, r"^`draws` 33: expected at most 64 draws, and at most 64 views per image$"),
        (
            {"draws": 65, "average": True},
            r"^`draws` 65: expected at most 64 draws, and at most 64 views per image$",
        ),
        ({"shard_rows": 2**20 + 1}, r"^`shard_rows` 1048577: expected at most 1048576$"),
        (
            {"workers": 2, "scheduler": "tcp://a:1"},
            r"^`workers` 2 starts a cluster, `scheduler` tcp://a:1 uses one: pass one of them$",
        ),
        (
            {"workers": 2, "device": "cuda:1"},
            r"^`device` cuda:1 names one GPU, and `workers` take one each",
        ),
        ({"dashboard": True}, r"^`dashboard`: expected `workers` with it"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], message: str) -> None:
    """Options that contradict each other are refused with the option to change."""
    with pytest.raises(ConfigError, match=message):
        check_options(ExtractOptions(**{"teacher": "x/y", **options}), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "x/y"}, r"^`teacher`: .* or, from Python, a CallableTeacher, got both$"),
        ({"prompt": "a cat"}, r"^`prompt`: a CallableTeacher reads no text"),
        ({"workers": 2}, r"^`workers`, `scheduler`: a CallableTeacher exists in this process only"),
        ({"draws": 2}, r"^a CallableTeacher without prepare draws no noise: .*, got `draws=2`$"),
    ],
)
def test_contradictions_to_a_module_are_refused(options: dict[str, object], message: str) -> None:
    """Options that a teacher made in Python cannot serve are refused with the option to change."""
    with pytest.raises(ConfigError, match=message):
        check_options(ExtractOptions(**{"teacher": "", **options}), NOISELESS)


def test_the_largest_values_are_accepted() -> None:
    """The most views, draws and shard rows are accepted."""
    check_options(ExtractOptions(teacher="x/y", draws=32, shard_rows=2**20), None)
    check_options(ExtractOptions(teacher="x/y", draws=64, average=True), None)
    check_options(ExtractOptions(teacher=""), NOISELESS)


def test_a_target_size_is_smaller_than_float16() -> None:
    """`bytes_per_image` of float16 or more, or beside `quality`, is refused; less is accepted."""
    check_target(ExtractOptions(teacher="x/y", bytes_per_image=999), 1000)
    check_target(ExtractOptions(teacher="x/y", quality="small"), 1000)
    for options in (
        ExtractOptions(teacher="x/y", bytes_per_image=1000),
        ExtractOptions(teacher="x/y", bytes_per_image=999, quality="small"),
    ):
        with pytest.raises(ConfigError, match=r"expected fewer than the 1000 bytes of float16"):
            check_target(options, 1000)
