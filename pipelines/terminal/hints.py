"""Hints for wrong flags and verbs: which one to use instead.

The tables cover the flags of timm, accelerate, LightlyTrain and diffusers, and common synonyms.
"""

import difflib
import re
from collections.abc import Mapping

import click

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    wrong: right
    for wrongs, right in (
        # data and models
        (
            "--model --model-name --arch -a --architecture --backbone",
            ("--student", "--students", "--teacher"),
        ),
        ("--student", ("--students",)),
        ("--model-id --pretrained-model-name-or-path --unet", ("--teacher", "--init")),
        (
            "--pretrained --initial-checkpoint --checkpoint --weights --pretrained-backbone "
            "--start-checkpoint --finetune-from",
            ("--init",),
        ),
        ("--data --data-dir --dataset --train-data-dir --train-dir --train-split", ("--train",)),
        ("--val --val-dir --val-data --test-dir --test-data --val-split", ("--test",)),
        ("--mask-dir --masks-dir --annotations", ("--masks", "--train-masks")),
        (
            "--img-size --image-size --input-size --resolution --train-crop-size",
            ("--student-size", "--size"),
        ),
        ("--fit --center-crop --crop-mode --resize", ("--resize-mode",)),
        ("--images", ("--store-images",)),
        (
            "--max-images --max-samples --max-train-samples --num-images --subset --num -n",
            ("--limit", "--limit-train", "--train-images", "--count"),
        ),
        # teacher
        (
            "--layers --blocks --tap --hooks --out-indices --up-ft-index --feature-layers",
            ("--taps",),
        ),
        ("--timesteps --t --noise-timestep --noise-step", ("--timestep",)),
        ("--class-id --class-label --class-labels --label", ("--condition",)),
        ("--instance-prompt --validation-prompt --text --caption", ("--prompt",)),
        ("--inversion --invert", ("--encoding",)),
        ("--noise-draws --num-draws --ensemble-size", ("--draws",)),
        ("--compression --ratio --rate", ("--quality",)),
        # optimisation
        ("--learning-rate --base-lr --blr", ("--lr",)),
        ("--wd --adam-weight-decay", ("--weight-decay",)),
        ("--opt --optim", ("--optimizer",)),
        (
            "--warmup --warmup-steps --lr-warmup-steps",
            ("--warmup-epochs", "--warmup"),
        ),
        (
            "--max-grad-norm --clip-grad-norm --grad-clip --clip --gradient-clip-val",
            ("--clip-grad",),
        ),
        (
            "--train-batch-size --per-device-train-batch-size --eval-batch-size --batch --bs -b",
            ("--batch-size",),
        ),
        (
            "--num-train-epochs --num-epochs --max-train-steps --max-steps --num-steps "
            "--iterations --total-steps",
            ("--epochs", "--steps"),
        ),
        ("--ema --model-ema --model-ema-decay --use-ema", ("--ema-decay",)),
        ("--loss-type --method --criterion --distillation-loss", ("--loss",)),
        ("--crop --random-crop --rrc-scale", ("--scale",)),
        ("--jitter --colour-jitter", ("--color-jitter",)),
        # hardware
        (
            "--amp --mixed-precision --amp-dtype --fp16 --bf16 --dtype --torch-dtype --no-amp",
            ("--precision", "--weights"),
        ),
        ("--half", ("--weights",)),
        ("--gpu --cuda --cpu --device-id", ("--device",)),
        (
            "--num-workers --workers --threads -j --dataloader-num-workers --num-threads",
            ("--num-workers", "--threads", "--jobs"),
        ),
        (
            "--gpus --num-gpus --num-processes --nproc-per-node --world-size --devices",
            ("--workers", "--jobs"),
        ),
        ("--torchcompile --torch-compile --use-torch-compile", ("--compile",)),
        # runs
        (
            "--output-dir --output -o --out-dir --save-dir --logdir --project-dir --experiment",
            ("--out", "--report"),
        ),
        (
            "--checkpointing-steps --save-steps --save-interval --checkpoint-every "
            "--recovery-interval",
            ("--save-every",),
        ),
        ("--log-interval --logging-steps --print-freq", ("--log-every",)),
        ("--report-to --logger --loggers --log-wandb --wandb --tracker", ("--log-with",)),
        ("--random-seed --global-seed", ("--seed",)),
        # evaluation and inspection
        ("--neighbours --neighbors --knn --nb-knn -k", ("--k",)),
        ("--knn-temperature --knn-weights --temperature --vote --votes", ("--knn-votes",)),
        ("--ignore --ignore-label", ("--ignore-index",)),
        ("--sample --samples --num-samples --fraction", ("--fraction", "--num-samples")),
        ("--format --library --target", ("--to",)),
    )
    for wrong in wrongs.split()
}
"""By wrong flag: the flags that may be meant. The hint names the first one that the verb has."""

SENTENCES: Mapping[tuple[str, str], str] = {
    (verb, wrong): sentence
    for verbs, wrongs, sentence in (
        (
            ("scenes", "teacher train", "extract", "label write", "train", "sweep", "demo"),
            "--resume --resume-from --resume-from-checkpoint --auto-resume --continue",
            "Run the same command again: it resumes.",
        ),
        (
            ("train",),
            "--resume --resume-from --resume-from-checkpoint --auto-resume --continue",
            "Run the same command again: it resumes. Use --extend RUN to train a finished run on.",
        ),
        (
            (
                *("scenes", "teacher train", "teacher convert", "extract", "label fit"),
                *("train", "sweep", "export", "demo"),
            ),
            "--overwrite --force -f --overwrite-output-dir --exist-ok",
            "Nothing is overwritten. Pass a new folder to --out, or delete the old one.",
        ),
        (
            ("extract",),
            "--force",
            "Use --skip-disk-check if the disk seems too small. Nothing is overwritten.",
        ),
        (
            ("extract",),
            "--images",
            "Pass IMAGES without a flag. Use --no-store-images to store no pixels.",
        ),
        (
            ("train",),
            "--gpus --num-gpus --num-processes --nproc-per-node --world-size --devices",
            "Start several processes with torchrun, as dtcache train --help shows.",
        ),
        (
            ("train",),
            "--sched --lr-scheduler --scheduler",
            "The schedule is linear warm-up (--warmup-epochs), then cosine decay.",
        ),
        (
            ("train",),
            "--drop-path --drop-path-rate --drop",
            "Students are trained without drop path; leave it out.",
        ),
        (
            ("train",),
            "--mixup --cutmix",
            "Cached features belong to single images, which cannot be mixed; leave it out.",
        ),
        (
            ("train",),
            "--accumulate --gradient-accumulation-steps --accum --accum-iter --grad-accum-steps "
            "--accumulate-grad-batches --update-freq --grad-checkpointing --gradient-checkpointing",
            "Use --micro-batches. It splits each batch; --batch-size stays the global size.",
        ),
        (
            ("train",),
            "--online",
            "Leave it out: --teacher alone puts the teacher in the loop.",
        ),
        (
            ("verify",),
            "--yes -y",
            "Leave it out: --repair writes. --dry-run shows what it would do.",
        ),
        (("evaluate",), "--model --arch --backbone", "Pass MODEL without a flag."),
        (("export",), "--model --checkpoint --run", "Pass RUN_OR_BACKBONE without a flag."),
    )
    for verb in verbs
    for wrong in wrongs.split()
}
"""By verb and wrong flag: the hint, if no single flag of the verb replaces the wrong one."""

DATA = {
    "--data",
    "--data-dir",
    "--dataset",
    "--train-data-dir",
    "--train-dir",
    "--images",
    "--cache",
}
"""Wrong flags for the first argument of a verb."""

VERBS: Mapping[str, Mapping[str, str]] = {
    "": {
        "teach": "teacher train",
        "convert-adm": "teacher convert",
        "convert": "teacher convert",
        "pretrain": "train",
        "distill": "train",
        "embed": "extract",
        "cache": "extract",
        "eval": "evaluate",
        "test": "evaluate",
        "validate": "evaluate",
        "info": "inspect",
        "show": "inspect",
        "check": "verify",
        "repair": "verify",
        "labels": "label",
    },
    "teacher": {"teach": "teacher train", "fit": "teacher train", "convert-adm": "teacher convert"},
    "label": {"train": "label fit", "apply": "label write", "predict": "label write"},
}
"""By group of verbs and wrong verb: the verb to use instead."""


def hint_for_flag(flag: str, command: click.Command, verb: str, program: click.Command) -> str:
    """Return a sentence that says what to use instead of `flag`, which `command` does not have.

    `verb` is the command's words after the program's name. The sentence names only flags that the
    command has, or another verb that has the flag.
    """
    flags = flags_of(command)
    plain = flag.lower().replace("_", "-") if flag.startswith("--") else flag
    if plain in flags:
        return f"Use {plain}."
    sentence = SENTENCES.get((verb, plain))
    if sentence is not None:
        return sentence
    for right in SYNONYMS.get(plain, ()):
        if right in flags:
            return f"Use {right}."
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    if plain in DATA and arguments:
        return f"Pass {arguments[0].human_readable_name} without a flag."
    others = [words for words, other in commands_of(program).items() if plain in flags_of(other)]
    if others:
        return f"It is an option of dtcache {' and of dtcache '.join(others[:2])}."
    close = difflib.get_close_matches(plain, flags, n=1, cutoff=0.7)
    if close:
        return f"Did you mean {close[0]}?"
    return see_help(verb)


def see_help(verb: str) -> str:
    """Return the sentence that points to a command's help."""
    return f"Run {' '.join(('dtcache', *verb.split()))} --help for help."


def hint_for_verb(word: str, group: click.Group, verb: str) -> str:
    """Return a sentence that says which verb to use instead of `word`, which `group` lacks."""
    right = VERBS.get(verb, {}).get(word)
    if right is not None:
        return f"Use dtcache {right}."
    if verb == "teacher":
        return f"Use dtcache teacher show {word}."
    start = f"dtcache {verb} " if verb else "dtcache "
    close = difflib.get_close_matches(word, group.commands, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {start}{close[0]}?"
    return f"Expected one of {', '.join(group.commands)}."


def option_hint(name: str, command: click.Command, verb: str, program: click.Command) -> str:
    """Return `hint_for_flag` for an option of a TOML file; flags are spelled as in TOML."""
    hint = hint_for_flag("--" + name.replace("_", "-"), command, verb, program)
    return re.sub(r"--(?!help)([a-z][a-z0-9-]*)", lambda match: match[1].replace("-", "_"), hint)


def flags_of(command: click.Command) -> list[str]:
    """Return every flag of a command, including the `--no-` forms."""
    return [
        flag
        for p in command.params
        if isinstance(p, click.Option)
        for flag in (*p.opts, *p.secondary_opts)
    ]


def commands_of(program: click.Command, *above: str) -> dict[str, click.Command]:
    """Return every command below a group, by its words after the program's name."""
    if not isinstance(program, click.Group):
        return {" ".join(above): program}
    return {
        words: command
        for name, child in program.commands.items()
        for words, command in commands_of(child, *above, name).items()
    }
