"""Wrong flags and verbs are answered in one line with the right name and exit code 2."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli import main
from pipelines.terminal.hints import (
    SENTENCES,
    SYNONYMS,
    VERBS,
    commands_of,
    flags_of,
    hint_for_flag,
)

COMMANDS = commands_of(main)
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_a_hint_names_only_flags_that_the_verb_has(verb: str) -> None:
    """Every hint, from the table or from another verb, names only flags of the verb itself."""
    wrongs = {*SYNONYMS, *(wrong for of, wrong in SENTENCES if of == verb)}
    wrongs |= {flag for command in COMMANDS.values() for flag in flags_of(command)}
    command = COMMANDS[verb]
    for wrong in wrongs - set(flags_of(command)):
        hint = hint_for_flag(wrong, command, verb, main)
        named = set(FLAG.findall(hint)) - {"--help"}
        assert named <= set(flags_of(command)), f"{verb} {wrong}: {hint}"


def test_the_tables_name_what_exists() -> None:
    """Every verb in the tables is a command."""
    assert {verb for verb, _ in SENTENCES} <= set(COMMANDS)
    groups = {word for words in COMMANDS for word in words.split()[:-1]}
    every = {flag for command in COMMANDS.values() for flag in flags_of(command)}
    assert {right for rights in SYNONYMS.values() for right in rights} <= every
    assert all(wrong not in flags_of(COMMANDS[verb]) for verb, wrong in SENTENCES)
    rights = {right for verbs in VERBS.values() for right in verbs.values()}
    assert rights <= set(COMMANDS) | groups


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train --model resnet50", "Use --student."),
        ("train --arch resnet50", "Use --student."),
        (
            "train --resume",
            "Run the same command again: it resumes. Use --extend RUN to train a finished run on.",
        ),
        ("extract --resume x", "Run the same command again: it resumes."),
        ("train --img-size 64", "Use --student-size."),
        ("extract --img-size 64", "Use --size."),
        ("train --amp", "Use --precision."),
        ("train --mixed-precision bf16", "Use --precision."),
        ("extract --num-workers 4", "Use --threads."),
        ("extract --force", "Use --skip-disk-check if the disk seems too small."),
        ("extract --images none", "Pass IMAGES without a flag. Use --no-store-images"),
        ("extract --fit crop", "Use --resize-mode."),
        ("train --num-workers-per-gpu 4", "Did you mean --num-workers?"),
        ("train --workers 4", "Use --num-workers."),
        ("train --threads 4", "Use --num-workers."),
        ("train --accumulate 4", "Use --micro-batches. It splits each batch"),
        ("train --gradient-accumulation-steps 4", "Use --micro-batches. It splits each batch"),
        ("train --online", "Leave it out: --teacher alone puts the teacher in the loop."),
        ("train --crop 0.3,1", "Use --scale."),
        ("train --jitter 1", "Use --color-jitter."),
        ("train --ema 0.9", "Use --ema-decay."),
        ("train --fit crop", "Use --resize-mode."),
        ("train --report-to wandb", "Use --log-with."),
        ("verify --sample 5%", "Use --fraction."),
        ("verify --yes", "Leave it out: --repair writes."),
        ("inspect --samples 5", "Use --num-samples."),
        ("evaluate --neighbours 5", "Use --k."),
        ("evaluate --ignore 255", "Use --ignore-index."),
        ("label fit --ignore 255", "Use --ignore-index."),
        ("teacher convert --half", "Use --weights."),
        ("train --max-grad-norm 1", "Use --clip-grad."),
        ("train --learning-rate 1", "Use --lr."),
        ("train --train_batch_size 8", "Use --batch-size."),
        ("train --train-batch-size 8", "Use --batch-size."),
        ("train --batch_size 8", "Use --batch-size."),
        ("train --num-train-epochs 8", "Use --epochs."),
        ("train --max-train-steps 8", "Use --epochs."),
        ("teacher train --max-train-steps 8", "Use --steps."),
        ("train --checkpointing-steps 8", "Use --save-every."),
        ("train --wd 0.1", "Use --weight-decay."),
        ("train --warmup 5", "Use --warmup-epochs."),
        ("train --data x", "Pass CACHE...|IMAGES without a flag."),
        ("extract --data-dir x", "Pass IMAGES without a flag."),
        ("evaluate --data x", "Use --train."),
        ("evaluate --model x", "Pass MODEL without a flag."),
        ("train --output-dir x", "Use --out."),
        ("extract --output x", "Use --out."),
        ("train --overwrite", "Nothing is overwritten. Pass a new folder to --out"),
        ("train --drop-path 0.1", "Students are trained without drop path; leave it out."),
        ("train --nproc-per-node 2", "Start several processes with torchrun"),
        ("extract --student x", "It is an option of dtcache train."),
        ("train --whitenin x", "Did you mean --whitening?"),
        ("extract --zzz", "Run dtcache extract --help for help."),
        ("teach x", "Use dtcache teacher train."),
        ("convert-adm x", "Use dtcache teacher convert."),
        ("teacher google/ddpm-cat-256", "Use dtcache teacher show google/ddpm-cat-256."),
        ("trian", "Did you mean dtcache train?"),
        ("label fti", "Did you mean dtcache label fit?"),
        ("zzz", "Expected one of demo, scenes, teacher, "),
    ],
)
def test_a_wrong_word_is_one_line_with_the_right_one(
    words: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of timm, accelerate, LightlyTrain, diffusers and old dtcache get the right name."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert result.output.startswith("Error: No such ")
    assert f". {hint}" in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train x --out y --optimizer sgd", "'sgd' is not one of 'adamw', 'lamb'"),
        ("train x --out y --epochs many", "'many' is not a valid integer"),
        ("train x --out y --lr fast", "Invalid value for '--lr': 'fast' is not a number"),
        ("train x", "Missing option '--out'"),
        ("train --out y", "Missing argument 'CACHE...|IMAGES'"),
        ("export x y --out z", "Got unexpected extra argument"),
        ("train x --out", "requires an argument"),
        ("--zzz", "No such option: --zzz. Run dtcache --help for help."),
    ],
)
def test_a_wrong_value_is_one_line(words: str, message: str) -> None:
    """Wrong and missing values exit with 2 and mention --help."""
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert message in result.output
    assert "--help for help." in result.output
    assert result.output.count("\n") == 1


def test_the_program_without_a_verb_shows_its_help() -> None:
    """Without a verb dtcache shows its help, with each verb as a whole sentence."""
    output = CliRunner().invoke(main, []).output
    assert all(command.get_short_help_str(200) in output for command in main.commands.values())
    assert isinstance(main, click.Group)
