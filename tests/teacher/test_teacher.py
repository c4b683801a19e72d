"""Taps lie before the upsamplers, and cutting the network changes no bit of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher.batches import batch_of
from teacher.kinds import (
    TEXT_CHANNELS,
    TOKENS,
    save_class_unet,
    save_dit,
    save_ldm,
    save_stable_diffusion,
)

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, DeviceMemoryError
from dtcache.recipe import TapSpec, ViewSpec
from dtcache.rng import sample_noise
from dtcache.teacher import Prompt, Teacher, TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.ddpm import build_unet
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.unet import UNetDenoiser

CPU = resolve_compute("cpu", "fp32")


def tap(stride: int) -> TapSpec:
    """Return a tap with a stride."""
    return TapSpec(name=f"stride{stride}", block=0, stride=stride, channels=1, height=1, width=1)


def test_taps_are_found_before_the_upsamplers(teacher_dir: Path) -> None:
    """Each level's map has the level's own stride and channels, finest first."""
    taps = load_teacher(str(teacher_dir)).denoiser.find_taps(32, 32)
    found = [(t.name, t.block, t.stride, t.channels, t.height, t.width) for t in taps]
    assert found == [
        ("stride1", 3, 1, 16, 32, 32),
        ("stride2", 2, 2, 16, 16, 16),
        ("stride4", 1, 4, 32, 8, 8),
        ("stride8", 0, 8, 32, 4, 4),
    ]


def test_strides_hold_on_a_non_square_view(teacher_dir: Path) -> None:
    """A 16x64 view has the same strides, and maps of its shape."""
    taps = load_teacher(str(teacher_dir)).denoiser.find_taps(16, 64)
    assert [(t.stride, t.height, t.width) for t in taps] == [
        (1, 16, 64),
        (2, 8, 32),
        (4, 4, 16),
        (8, 2, 8),
    ]


def test_a_size_the_network_cannot_halve_is_refused(teacher_dir: Path) -> None:
    """A size that the network cannot halve is refused with the required multiple."""
    with pytest.raises(
        ConfigError, match=r"`size` 36x32: this U-Net halves the image 3 times.*multiples of 8"
    ):
        load_teacher(str(teacher_dir)).denoiser.find_taps(36, 32)


@pytest.mark.parametrize(
    ("offered", "asked", "chosen"),
    [
        ((1, 2, 4, 8, 16, 32), None, (4, 8, 16, 32)),
        ((1, 2, 4, 8), None, (1, 2, 4, 8)),
        ((1, 2, 4, 8, 16), None, (2, 4, 8, 16)),
        ((1, 2), None, (1, 2)),
        ((8, 16, 32, 64), None, (8, 16, 32, 64)),
        ((1, 2, 4, 8), ("stride8", "stride2"), (2, 8)),
    ],
)
def test_default_taps(
    offered: tuple[int, ...], asked: tuple[int, ...] | None, chosen: tuple[int, ...]
) -> None:
    """The default taps are strides 4 to 32 if all exist, else the four coarsest."""
    assert tuple(t.stride for t in choose_taps(tuple(map(tap, offered)), asked)) == chosen


def test_a_stride_that_is_not_offered_is_refused() -> None:
    """A stride without a tap is refused with the teacher's taps."""
    with pytest.raises(
        ConfigError,
        match=(
            "`taps` stride16: the teacher has no such map at this size; expected stride4, stride8"
        ),
    ):
        choose_taps((tap(4), tap(8)), ("stride16",))


def test_every_other_block_of_the_decoder_has_a_name(teacher_dir: Path) -> None:
    """The middle block and all layers but each level's last are taps, in the order of the pass."""
    denoiser = load_teacher(str(teacher_dir)).denoiser
    found = [(t.name, t.stride, t.channels, t.height) for t in denoiser.find_blocks(32, 32)]
    assert found == [
        ("mid", 8, 32, 4),
        ("up0layer0", 8, 32, 4),
        ("up1layer0", 4, 32, 8),
        ("up2layer0", 2, 16, 16),
        ("up3layer0", 1, 16, 32),
    ]


def seen_by_hooks(unet: Any, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every decoder map of an uncut network, by the name of its tap."""
    seen = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda m, args, out: seen.__setitem__(name, out.clone())

    unet.mid_block.register_forward_hook(keep("mid"))
    for block, level in enumerate(unet.up_blocks):
        attentions = getattr(level, "attentions", None)
        for layer in range(len(level.resnets)):
            module = attentions[layer] if attentions else level.resnets[layer]
            module.register_forward_hook(keep(f"up{block}layer{layer}"))
        if level.upsamplers:
            level.upsamplers[0].register_forward_pre_hook(
                lambda m, args, b=block: seen.__setitem__(f"stride{8 >> b}", args[0].clone())
            )
    with torch.inference_mode():
        unet(x, t)
    seen["stride1"] = seen["up3layer1"]
    return seen


@pytest.mark.parametrize(
    "names",
    [
        ("stride8",),
        ("stride8", "stride4"),
        ("stride4", "stride2"),
        ("stride8", "stride4", "stride2", "stride1"),
        ("mid",),
        ("up0layer0",),
        ("stride4", "up2layer0"),
        ("up3layer0", "mid", "stride2"),
    ],
)
def test_truncation_changes_no_bit(names: tuple[str, ...]) -> None:
    """The taps of the cut network equal those of the full network bit for bit."""

    def network() -> Any:
        torch.manual_seed(0)
        return build_unet(32, 32, (16, 16, 32, 32), layers=1, attention=2).eval()

    x = torch.randn(2, 3, 32, 32)
    t = torch.tensor([150, 150])
    seen = seen_by_hooks(network(), x, t)
    denoiser = UNetDenoiser(network())
    taps = choose_taps(denoiser.find_taps(32, 32), names, denoiser.find_blocks(32, 32))
    with torch.inference_mode():
        cut = denoiser.tapped(taps)(x, t)
    assert set(cut) == set(names)
    for name in names:
        assert torch.equal(cut[name], seen[name])


def test_truncation_drops_the_layers_after_the_last_tap() -> None:
    """Each earlier last tap leaves fewer weights of the decoder."""
    unet = build_unet(32, 32, (16, 16, 32, 32), layers=1, attention=1)
    denoiser = UNetDenoiser(unet)
    taps = {tap.name: tap for tap in (*denoiser.find_taps(32, 32), *denoiser.find_blocks(32, 32))}
    weights = [
        sum(p.numel() for p in denoiser.tapped([taps[name]]).parameters())
        for name in ("mid", "up0layer0", "stride8", "up1layer0", "stride4")
    ]
    assert weights == sorted(set(weights))
    assert weights[2] < 0.8 * sum(p.numel() for p in unet.parameters())


def test_features_do_not_depend_on_the_rest_of_the_batch(teacher_dir: Path) -> None:
    """A short batch is padded, so a sample's features do not depend on the rest of the batch."""
    view = ViewSpec(height=32, width=32)
    teacher = prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(view=view, timesteps=(150,), batch_size=4),
        CPU,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    flips = (False, True, False)
    inputs = [
        teacher.input(p, key, flip, seed=0, draws=[0])
        for p, key, flip in zip(pixels, "abc", flips, strict=True)
    ]
    (together,), (alone,) = (teacher.features(teacher.batch(part)) for part in (inputs, inputs[:1]))
    for name in together:
        assert together[name].dtype == torch.float32
        torch.testing.assert_close(together[name][:1], alone[name], rtol=1e-5, atol=1e-5)


def test_the_noised_input_is_the_papers_formula(teacher_dir: Path) -> None:
    """The network gets sqrt(a) x + sqrt(1 - a) noise with x in [-1, 1], and the timestep."""
    view = ViewSpec(height=32, width=32)
    teacher = prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(view=view, timesteps=(50,), batch_size=1),
        CPU,
    )
    seen = []
    teacher.network.unet.register_forward_pre_hook(lambda m, args: seen.append(args))
    pixels_CHW = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    list(teacher.features(teacher.batch([teacher.input(pixels_CHW, "a", True, seed=0, draws=[0])])))
    mirrored_BCHW = torch.from_numpy(pixels_CHW.copy()).flip(2)[None]
    noise_BCHW = torch.from_numpy(
        sample_noise((3, 32, 32), seed=0, key="a", timestep=50, draw=0, flip=True)
    )[None]
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[50]
    expected = (
        a.sqrt() * (mirrored_BCHW.double() / 127.5 - 1) + (1 - a).sqrt() * noise_BCHW.double()
    )
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=1e-5, atol=1e-5)
    assert seen[0][1].tolist() == [50]
    assert teacher.spec.alpha_bars[0] == pytest.approx(float(a), rel=1e-5)


@pytest.mark.parametrize(
    ("timesteps", "batch_size", "message"),
    [
        ((1000,), 4, r"`timestep` 1000: this teacher was trained with steps 0 to 999"),
        ((50, 50), 4, r"`timestep`: expected one or several different steps, got \[50, 50\]"),
        ((50,), 0, r"`batch_size` 0: expected at least 1"),
    ],
)
def test_bad_constants_are_refused(
    teacher_dir: Path, timesteps: tuple[int, ...], batch_size: int, message: str
) -> None:
    """An unusable timestep or batch size is refused by name."""
    with pytest.raises(ConfigError, match=message):
        prepare_teacher(
            load_teacher(str(teacher_dir)),
            TeacherSettings(
                view=ViewSpec(height=32, width=32), timesteps=timesteps, batch_size=batch_size
            ),
            CPU,
        )


def test_native_size_reads_both_forms() -> None:
    """A sample size is one number if square, else a pair."""
    assert UNetDenoiser(build_unet(32, 32, (16, 16), layers=1, attention=1)).native_size == (32, 32)
    assert UNetDenoiser(build_unet(16, 32, (16, 16), layers=1, attention=1)).native_size == (16, 32)


@pytest.mark.parametrize(
    ("save", "condition"),
    [(save_stable_diffusion, None), (save_ldm, None), (save_dit, None), (save_class_unet, "3")],
)
def test_every_kind_runs_in_bfloat16(
    tmp_path: Path, save: Callable[[Path], object], condition: str | None
) -> None:
    """Autocast moves features by a few per cent of their scale, and returns fp32."""
    save(tmp_path)
    embedding_LD = np.random.default_rng(0).normal(size=(TOKENS, TEXT_CHANNELS)).astype(np.float32)
    stored = Prompt(text="", embedding_LD=embedding_LD)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    found = []
    for precision in ("fp32", "bf16"):
        teacher = prepare_teacher(
            load_teacher(str(tmp_path), stored=stored),
            TeacherSettings(
                view=ViewSpec(height=32, width=32),
                timesteps=(150,),
                batch_size=2,
                condition=condition,
            ),
            resolve_compute("cpu", precision),
        )
        found.append(
            next(
                teacher.features(
                    batch_of(teacher, list(pixels), ["a", "b"], [False] * 2, seed=0, draws=[0])
                )
            )
        )
    exact, rough = found
    for name, maps in rough.items():
        assert maps.dtype == torch.float32
        assert 0 < float((maps - exact[name]).square().mean() / exact[name].var()) < 1e-2


@pytest.mark.parametrize("save", [save_stable_diffusion, save_ldm, save_class_unet])
def test_blocks_of_every_unet_alone_are_those_among_others(
    tmp_path: Path, save: Callable[[Path], object]
) -> None:
    """Each block alone, cut off after it, gives the same bits as among all taps of the U-Net."""
    save(tmp_path)
    embedding_LD = np.zeros((TOKENS, TEXT_CHANNELS), np.float32)
    loaded = load_teacher(str(tmp_path), stored=Prompt(text="", embedding_LD=embedding_LD))
    denoiser = loaded.denoiser
    geometry = (32, 32, loaded.latent_stride)
    taps = denoiser.find_taps(*geometry) + denoiser.find_blocks(*geometry)
    side = 32 // loaded.latent_stride
    x = torch.randn(2, denoiser.channels, side, side, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([150, 150])
    labels = None if denoiser.num_classes is None else torch.tensor([0, 1])
    with torch.inference_mode():
        together = denoiser.tapped(taps)(x, t, labels)
        for tap in taps:
            alone = denoiser.tapped([tap])(x, t, labels)[tap.name]
            assert alone.shape[1:] == (tap.channels, tap.height, tap.width)
            assert torch.equal(alone, together[tap.name])


@pytest.mark.slow
def test_one_graph_is_compiled_for_whole_views(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled teacher records it, gives the same features and compiles one shape only."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    loaded = load_teacher(str(teacher_dir))
    view = ViewSpec(height=32, width=32)

    def prepared(compile: bool) -> Teacher:
        return prepare_teacher(
            loaded, TeacherSettings(view=view, timesteps=(150,), batch_size=4, compile=compile), CPU
        )

    pixels = list(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8))
    fast = prepared(True)
    plain = prepared(False)
    assert (fast.spec.compiled, plain.spec.compiled) == (True, None)
    batch = batch_of(fast, pixels, list("abcd"), [False] * 4)
    torch._dynamo.utils.counters.clear()
    (found,), (wanted,) = fast.features(batch), plain.features(batch)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    list(
        fast.features(batch_of(fast, pixels[:3], list("abc"), [True] * 3))
    )  # padded to the same shape
    list(fast.features(batch.changed(lambda x: x[:, :, 8:24, 8:24])))  # a crop
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_device_without_room_is_one_clear_line(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of memory gives one line with the batch size and a remedy."""
    teacher = prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(view=ViewSpec(height=32, width=32), timesteps=(150,), batch_size=2),
        CPU,
    )

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")

    monkeypatch.setattr(teacher, "_run", full)
    pixels_CHW = np.zeros((3, 32, 32), np.uint8)
    with pytest.raises(
        DeviceMemoryError,
        match=r"ran out of memory with 2 views per pass \(CUDA out.*GiB\.\); pass a",
    ):
        list(teacher.features(batch_of(teacher, [pixels_CHW], ["a"], [False])))


def test_the_clock_counts_the_passes(teacher_dir: Path) -> None:
    """The clock advances with every pass and only then."""
    teacher = prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(view=ViewSpec(height=32, width=32), timesteps=(150,), batch_size=2),
        CPU,
    )
    batch = batch_of(teacher, [np.zeros((3, 32, 32), np.uint8)], ["a"], [False])
    assert teacher.clock.seconds == 0
    seen = []
    for _ in range(3):
        list(teacher.features(batch))
        seen.append(teacher.clock.seconds)
    assert 0 < seen[0] < seen[1] < seen[2] == teacher.clock.seconds
