"""`fmem train PRESET`: train a model on a packed corpus, into a run folder."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from factorization_memory.cli.common import choose, console, emit, interrupted_status, listing, parse, say
from factorization_memory.cli.generate import note_on_prompts
from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.presets import PRESETS

if TYPE_CHECKING:
    from factorization_memory.runs.training_record import RunResult

INIT_FROM = "--training.init-from"


@dataclass(frozen=True)
class TrainOptions:
    """Train a model. Any field of the preset can be overridden by its flag. `fmem train --resume RUN` goes on with a run of any
    preset, as it was started; a larger --training.steps lengthens it."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/run")
    """Run folder, for records, checkpoints and the report."""
    resume: bool = False
    """Resume from the run folder's last checkpoint, continuing the same loss curve."""
    json: bool = False
    """Write the result to stdout as JSON."""


def preset_and_options(arguments: list[str], verb: str, options: type[Any]) -> Any:
    """Options of `fmem VERB PRESET [flags]`, the preset's configuration their default.

    With --init-from MODEL the fields of `model` are those of that model, and without a preset all others are those that it was
    trained with.
    """
    arguments = [re.sub(r"^--init[-_]from(?==|$)", INIT_FROM, argument) for argument in arguments]
    source = value_of(arguments, INIT_FROM)
    if source is not None and arguments[0].startswith("-") and not {"-h", "--help"} & {*arguments}:
        return parse(options, arguments, verb, default=options(config=_started_from(source, None)))
    if not arguments or arguments[0].startswith("-"):
        presets = listing({name: " ".join((make.__doc__ or "").split()) for name, make in PRESETS.items()}, 16)
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        message = f"usage: fmem {verb} PRESET [options]\n       fmem {verb} PRESET --help lists every option\n\n{presets}"
        if verb == "train":
            message += (
                "\n\nfmem train --resume RUN resumes a run;"
                "\nfmem train PRESET --init-from MODEL starts from a trained one: a run, an export,\nor builtin"
            )
        if not asked:
            raise ConfigError(message)
        print(message)
        raise SystemExit(0)
    preset = choose(arguments[0], PRESETS, "preset")()
    if source is not None:
        preset = _started_from(source, preset)
    return parse(options, arguments[1:], f"{verb} {arguments[0]}", default=options(config=preset))


def value_of(arguments: list[str], flag: str) -> str | None:
    """The value given for a flag, if any."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == flag and following and not following.startswith("--"):
            return following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _started_from(source: str, preset: RunConfig | None) -> RunConfig:
    """The preset with the model named by `training.init_from`; without a preset, that model's own run configuration."""
    from factorization_memory.training import initial_config

    config = initial_config(source)
    own = config if preset is None else dataclasses.replace(preset, model=config.model)
    return dataclasses.replace(
        own,
        data=own.data if preset is not None else dataclasses.replace(own.data, corpus=""),
        training=dataclasses.replace(own.training, init_from=source),
    )


def _resumed(arguments: list[str]) -> tuple[Path, list[str]] | None:
    """The run that `fmem train --resume RUN [flags]`, without a preset, resumes, and the flags."""
    if not arguments or not arguments[0].startswith("-"):
        return None
    given = value_of(arguments, "--resume")
    if given is not None:
        at = next(i for i, each in enumerate(arguments) if each.partition("=")[0] == "--resume")
        return Path(given), arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    place = value_of(arguments, "--run-dir")
    return (Path(place), arguments) if "--resume" in arguments and place is not None else None


def _options(arguments: list[str]) -> TrainOptions:
    resumed = _resumed(arguments)
    if resumed is None:
        options: TrainOptions = preset_and_options(arguments, "train", TrainOptions)
        return options
    from factorization_memory.runs.record import RunRecord

    folder, rest = resumed
    config = RunRecord(folder).read_config()
    options = parse(TrainOptions, rest, f"train --resume {folder}", default=TrainOptions(config, folder, resume=True))
    if options.run_dir != folder:
        raise ConfigError(f"--run-dir={options.run_dir}: --resume already names the run folder, {folder}; drop one of them")
    return options


def run(arguments: list[str]) -> int:
    """`fmem train`."""
    options = _options(arguments)
    if not options.config.data.corpus:
        raise ConfigError("data.corpus='': give a packed corpus with --data.corpus DIR; make one with `fmem data pack`")
    from factorization_memory.experiments.session import Session
    from factorization_memory.training import RichProgress

    session = Session(options.config, options.run_dir, RichProgress(console()))
    if options.config.training.sample_every > 0:
        note_on_prompts(session.corpus.tokenizer, options.config.training.sample_prompts)
    result = session.train(options.resume)
    emit(result, options.json)
    if result["stopped"] == "interrupted":
        command = shlex.join(["fmem", "train", "--resume", str(options.run_dir)])
        say(f"stopped by {result['signal']} after step {result['steps']:,}; resume with: {command}")
        return interrupted_status(result)
    from factorization_memory.reports.report import write_report

    say(f"report: {write_report(options.run_dir)}")
    say(_last_line(result, options.run_dir))
    return 0


def _last_line(result: RunResult, run_dir: Path) -> str:
    """Quality and duration of a finished run, and what to do with it."""
    from factorization_memory._text import clock

    held_out, train = result["evaluation"], result["train"]
    loss = (
        f"held-out {held_out['bits_per_byte']:.3f} bits/byte"
        if held_out is not None and held_out["bits_per_byte"] is not None
        else "done"
        if train is None
        else f"training loss {train['loss']:.3f} nats/token"
    )
    run = shlex.quote(str(run_dir))
    return (
        f"{loss} after {result['steps']:,} steps in {clock(result['seconds'])}; next: fmem generate {run} --prompt TEXT, "
        f"fmem evaluate {run}, fmem export {run} FOLDER"
    )
