"""Fingerprints of earlier caches stay valid when recipes get new fields."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dtcache.hashing import canonical_json, sha256_json
from dtcache.recipe import (
    Box,
    CodecSpec,
    Equivariance,
    Recipe,
    TapSpec,
    TeacherSpec,
    ViewSpec,
    signal_to_noise,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/format2/cache/manifest.json").read_text())


def golden_recipe() -> Recipe:
    """The golden cache's recipe in the current types."""
    recipe = dict(GOLDEN["recipe"])
    teacher = dict(recipe.pop("teacher"))
    taps = tuple(TapSpec(**tap) for tap in teacher.pop("taps"))
    spec = TeacherSpec(
        taps=taps, **{k: tuple(v) if isinstance(v, list) else v for k, v in teacher.items()}
    )
    return Recipe(
        teacher=spec,
        view=ViewSpec(**recipe.pop("view")),
        codec=CodecSpec(**recipe.pop("codec")),
        **recipe,
    )


def test_an_early_recipe_has_its_early_fingerprint() -> None:
    """An early recipe keeps its fingerprint, because later fields are None and absent in JSON."""
    assert golden_recipe().to_json() == GOLDEN["recipe"]
    assert golden_recipe().fingerprint == GOLDEN["fingerprint"]


def absent(spec: type, place: str = "") -> list[str]:
    """Return the dotted names of the fields, nested ones included, that JSON may lack."""
    found = []
    for name, kind in get_type_hints(spec).items():
        default = next(f.default for f in fields(spec) if f.name == name)
        found += [f"{place}{name}"] if default is None else []
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                found += absent(inner, f"{place}{name}.")
    return found


def test_the_document_names_every_field_that_may_be_absent() -> None:
    """docs/format.md lists exactly the recipe fields that are omitted if they are None."""
    text = (Path(__file__).parents[1] / "docs/format.md").read_text()
    listed = text[text.index(" that caches may lack") : text.index("`recipe.teacher.taps` names")]
    assert {"threads", "teacher.compiled", "teacher.condition.number"} <= set(absent(Recipe))
    assert sorted(re.findall(r"`([a-z0-9_.]+)`", listed)) == sorted(absent(Recipe))


def test_later_fields_are_part_of_the_fingerprint_where_they_say_something() -> None:
    """Later fields enter JSON and fingerprint if set; a None without a default always does."""
    recipe = golden_recipe()
    measured = Equivariance(
        images=8, flip={"t150/stride2": 0.5}, box=None, crop=None, crop_interior=None
    )
    later = replace(
        recipe,
        teacher=replace(recipe.teacher, snrs=(3.0,), ddim_steps=20),
        codec=replace(recipe.codec, ratio=None),
        equivariance=measured,
        round_trip={"t150": 1e-3},
    )
    value = later.to_json()
    assert (value["teacher"]["snrs"], value["teacher"]["ddim_steps"], value["codec"]["ratio"]) == (
        [3.0],
        20,
        None,
    )
    assert value["equivariance"] == {
        "images": 8,
        "flip": {"t150/stride2": 0.5},
        "box": None,
        "crop": None,
        "crop_interior": None,
    }
    assert value["round_trip"] == {"t150": 1e-3}
    assert later.fingerprint == sha256_json(value) != recipe.fingerprint
    boxed = replace(
        later, equivariance=replace(measured, box=Box(top=0, left=4, height=4, width=4))
    )
    assert boxed.to_json()["equivariance"]["box"] == {"top": 0, "left": 4, "height": 4, "width": 4}


@pytest.mark.parametrize(("alpha_bar", "snr"), [(0.5, 1.0), (0.75, 3.0), (0.0, 0.0), (1.0, None)])
def test_snr_is_signal_over_noise(alpha_bar: float, snr: float | None) -> None:
    """The ratio is alpha_bar / (1 - alpha_bar), or None without noise, which JSON can hold."""
    assert signal_to_noise(alpha_bar) == snr
    assert canonical_json(signal_to_noise(alpha_bar))
