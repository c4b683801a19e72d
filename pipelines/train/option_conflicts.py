"""Options of `dtcache train` that contradict each other."""

from dtcache.errors import ConfigError
from dtcache.options import TrainOptions

ONLINE_ONLY = ("teacher", "prompt", "condition", "size", "fit", "encoding", "ddim_steps")


def require_consistent(options: TrainOptions) -> None:
    """Raise ConfigError for options that contradict each other."""
    if options.ema is not None and options.ema >= 1:
        raise ConfigError(f"--ema {options.ema:g}: expected a decay under 1, such as 0.999")
    if options.online:
        against = [
            name for name in ("images", "allow_incomplete", "labels") if getattr(options, name)
        ]
        against += ["shuffle"] if options.shuffle != "full" else []
        if against:
            flag = against[0].replace("_", "-")
            raise ConfigError(
                f"--{flag}: it is about a cache, which --online does without; give one of the two"
            )
        if options.noise_weighting:
            raise ConfigError(
                "--noise-weighting: a cache records its noise, --online measures none; leave one out"
            )
    for name in ONLINE_ONLY:
        if not options.online and getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: a cache knows its own; expected --online beside it"
            )
    _require_labels(options)


def _require_labels(options: TrainOptions) -> None:
    """Raise ConfigError for weights of losses that are not there."""
    for name in ("label_weight", "feature_weight"):
        if options.labels is None and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag}: it weighs two losses, and without --labels there is one; expected --labels NAME"
            )
    if options.label_weight == 0:
        raise ConfigError(
            "--label-weight 0: expected a number over 0; leave --labels out to train on features alone"
        )
    if options.feature_weight == 0 and (
        options.noise_weighting or options.tap_weights or options.at_weight is not None
    ):
        raise ConfigError(
            "--feature-weight 0: no feature is trained on; leave --noise-weighting, --tap-weights and --at-weight out"
        )
