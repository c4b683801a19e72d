"""Diffusion transformers: a block is a tap, tokens keep their positions, later blocks are cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from teacher.batches import batch_of
from teacher.kinds import edit, hooked_transformer, save_dit
from teacher.test_autoencoder import CPU, PIXELS, noisy, pixels

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import TapSpec, ViewSpec
from dtcache.teacher import Teacher, TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.dit import TappedTransformer

BETAS = torch.linspace(1e-4, 0.02, 1000)


def prepared(root: Path, taps: tuple[str, ...] | None, condition: str | None) -> Teacher:
    """Return a DiT of 32 px views."""
    return prepare_teacher(
        load_teacher(str(root)),
        TeacherSettings(
            view=ViewSpec(height=32, width=32),
            taps=taps,
            timesteps=(150,),
            batch_size=2,
            condition=condition,
        ),
        CPU,
    )


@pytest.mark.parametrize(
    ("condition", "told"), [(None, [3, 3]), ("null", [3, 3]), ("1", [1, 1]), ("label", [2, 0])]
)
def test_taps_are_those_of_diffusers(
    tmp_path: Path, condition: str | None, told: list[int]
) -> None:
    """Taps loaded from disk equal hooks on the full model in memory for each kind of condition."""
    transformer, vae = save_dit(tmp_path)
    teacher = prepared(tmp_path, ("block1", "block4"), condition)
    batch = batch_of(
        teacher, list(PIXELS), ["a", "b"], [False, True], seed=3, draws=[0], labels=[2, 0]
    )
    (found,) = teacher.features(batch)
    with torch.inference_mode():
        latents_BCHW = vae.encode(pixels()).latent_dist.mode() * 0.18215
    wanted = hooked_transformer(
        transformer,
        (4, 4),
        noisy(latents_BCHW, BETAS, 150),
        timestep=torch.tensor([150, 150]),
        class_labels=torch.tensor(told),
    )
    assert list(found) == ["t150/block1", "t150/block4"]
    for name, maps in found.items():
        torch.testing.assert_close(maps, wanted[name.removeprefix("t150/")], rtol=1e-4, atol=1e-4)


def test_conditions_differ(tmp_path: Path) -> None:
    """The class changes a transformer's features."""
    save_dit(tmp_path)
    maps = []
    for condition in ("null", "0", "2"):
        teacher = prepared(tmp_path, ("block5",), condition)
        (found,) = teacher.features(
            batch_of(teacher, list(PIXELS), ["a", "b"], [False, True], seed=3, draws=[0])
        )
        maps.append(found["t150/block5"])
    assert not any(torch.allclose(maps[a], maps[b], atol=1e-3) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_every_block_offers_a_tap(tmp_path: Path) -> None:
    """All taps have the patch stride, also for a view that is not square."""
    save_dit(tmp_path)
    denoiser = load_teacher(str(tmp_path)).denoiser
    found = [
        (t.name, t.block, t.stride, t.channels, t.height, t.width)
        for t in denoiser.find_taps(32, 48, 4)
    ]
    assert found == [(f"block{n}", n, 8, 16, 4, 6) for n in range(6)]
    with pytest.raises(
        ConfigError,
        match=r"`size` 36x32: this transformer reads patches of 8 pixels; .*multiples of 8",
    ):
        denoiser.find_taps(36, 32, 4)


def test_a_view_that_is_not_square_is_folded_row_by_row(tmp_path: Path) -> None:
    """A 16x48 view gives 2x6 maps with each token at its patch's position."""
    transformer, _ = save_dit(tmp_path)
    x_BCHW = torch.from_numpy(
        np.random.default_rng(0).normal(size=(1, 4, 4, 12)).astype(np.float32)
    )
    t_B = torch.tensor([9])
    labels_B = torch.tensor([1])
    tokens = []
    transformer.transformer_blocks[0].register_forward_hook(lambda m, args, out: tokens.append(out))
    with torch.inference_mode():
        found = TappedTransformer(transformer, {0: "block0"})(x_BCHW, t_B, labels_B)["block0"]
    assert found.shape == (1, 16, 2, 6)
    assert torch.equal(found[0, :, 1, 2], tokens[0][0, 8])


def test_blocks_after_the_last_tap_are_cut_off(tmp_path: Path) -> None:
    """With block 1 as the only tap, two blocks remain."""
    save_dit(tmp_path)
    loaded = load_teacher(str(tmp_path))
    network = loaded.denoiser.tapped(
        [t for t in loaded.denoiser.find_taps(32, 32, 4) if t.block < 2]
    )
    assert sum("norm1.linear.weight" in name for name, _ in network.named_parameters()) == 2


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        (28, (5, 10, 16, 21)),
        (24, (4, 9, 13, 18)),
        (12, (1, 4, 6, 9)),
        (4, (0, 1, 2, 3)),
        (2, (0, 1)),
    ],
)
def test_default_taps_spread_over_the_depth(blocks: int, chosen: tuple[int, ...]) -> None:
    """The default taps are at one to four fifths of the blocks, or all of up to four blocks."""
    taps = tuple(
        TapSpec(name=f"block{n}", block=n, stride=16, channels=1, height=1, width=1)
        for n in range(blocks)
    )
    assert tuple(tap.block for tap in choose_taps(taps, None)) == chosen


def test_a_block_that_is_not_offered_is_refused(tmp_path: Path) -> None:
    """A stride is refused as a tap, and the message lists the blocks."""
    save_dit(tmp_path, blocks=2)
    with pytest.raises(
        ConfigError,
        match="`taps` stride8: the teacher has no such map at this size; expected block0, block1",
    ):
        prepared(tmp_path, ("stride8",), None)


def test_the_older_class_name_is_the_same_network(tmp_path: Path) -> None:
    """A DiT saved as Transformer2DModel loads; any other Transformer2DModel is refused."""
    save_dit(tmp_path)
    wanted = prepared(tmp_path, ("block5",), "null")
    config = tmp_path / "transformer" / "config.json"
    edit(
        config,
        lambda c: c.update(
            _class_name="Transformer2DModel", cross_attention_dim=None, num_vector_embeds=None
        ),
    )
    found = prepared(tmp_path, ("block5",), "null")
    assert found.spec.architecture == "Transformer2DModel"
    maps = [
        next(t.features(batch_of(t, list(PIXELS), ["a", "b"], [False, False], seed=0, draws=[0])))
        for t in (wanted, found)
    ]
    assert torch.equal(maps[0]["t150/block5"], maps[1]["t150/block5"])
    edit(config, lambda c: c.update(norm_type="ada_norm_single"))
    with pytest.raises(
        TeacherError,
        match=r"expected the Transformer2DModel of a DiT .*got norm_type 'ada_norm_single'",
    ):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sample_size", 1 << 20, r"position table of at most \d+ values, got sample_size 1048576"),
        ("sample_size", 1 << 80, r"position table of at most \d+ values, got sample_size \d+"),
        ("sample_size", "8", r"expected positive integers for sample_size, .*, got 8, 2, 2, 8"),
        ("patch_size", 0, r"expected positive integers for .*, got 8, 0, 2, 8"),
        ("num_attention_heads", 1 << 30, r"position table .* patch_size 2 and 8589934592 channels"),
        ("in_channels", 1 << 30, r"in_channels=4, .* got 1073741824"),
        ("out_channels", 1 << 30, r"cannot be loaded as DiTTransformer2DModel"),
        ("num_layers", 1 << 30, r"more than \d+ parameters, the file has \d+ tensors"),
        ("num_embeds_ada_norm", 1 << 30, r"cannot be loaded as DiTTransformer2DModel"),
    ],
)
def test_a_configuration_of_any_size_is_refused_before_memory_is_taken(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    """A DiT whose configuration describes a huge table or layer is refused in one line."""
    save_dit(tmp_path)
    edit(tmp_path / "transformer" / "config.json", lambda config: config.update({field: value}))
    with pytest.raises(TeacherError, match=message) as refused:
        load_teacher(str(tmp_path))
    assert str(tmp_path / "transformer") in str(refused.value)
