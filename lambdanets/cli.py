"""The command line: one command is parsed and run, its error becomes a sentence and an exit code (errors.EXIT_CODES).

An error that is none of those keeps its traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lambdanets import __version__
from lambdanets.commands import check, demo, evaluate, index, label, models, pack, plan, predict, report, select, train
from lambdanets.errors import EXIT_CODES_TEXT, exit_code, lost_reader, printable_text


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; `args` are those of the process by default. Gives the exit code; --help exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal's encoding lacks ends no run
            stream.reconfigure(errors="backslashreplace")
    parsed = _parser().parse_args(args)
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait. Beside one other busy process on two cores a training step took 2.0 s
        # instead of 0.13 s, and 0.36 s with this shorter spin, which costs nothing on a quiet machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _open_closed_streams()
    with _outliving_the_terminal() if parsed.command in ("train", "demo") else contextlib.nullcontext():
        try:
            return _run(parsed)
        except KeyboardInterrupt as error:
            print(f"\nlambdanets: {_message(error) or 'interrupted'}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `lambdanets predict ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _open_closed_streams() -> None:
    """Where a shell closed a stream (`2>&-`), the next file opened would take its number, and what is meant for a
    person would be written into it."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # for as long as the process lives


class _Dropping(io.FileIO):
    """What cannot be written is gone."""

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(content)
        return len(content)


@contextlib.contextmanager
def _outliving_the_terminal() -> Iterator[None]:
    """A run goes on where its output cannot be written (`| head`, a full disk, a terminal that is gone): log.jsonl has
    it. Streams that a caller has put in place of the process's own are left alone."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is getattr(sys, f"__{name}__") and stream is not None:
            stream.flush()
            how: dict[str, Any] = {
                n: getattr(stream, n) for n in ("encoding", "errors", "line_buffering", "write_through")
            }
            raw = _Dropping(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **how))
    try:
        yield
    finally:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _run(parsed: Namespace) -> int:
    try:
        return _COMMANDS[parsed.command][0].run(parsed[parsed.command])
    except Exception as error:
        if (lost := lost_reader(error)) is not None:
            error = lost
        code = exit_code(error)
        if code is None:
            raise
        print(f"lambdanets {parsed.command}: {_message(error)}", file=sys.stderr)
        return code


def _message(error: BaseException) -> str:
    return printable_text("\n".join([part for part in [str(error), *getattr(error, "__notes__", [])] if part]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lambdanets",
        description="LambdaNetworks (Bello, ICLR 2021): train, predict, and see what a model costs.",
        epilog=EXIT_CODES_TEXT,
        version=__version__,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (module, help_text) in _COMMANDS.items():
        commands.add_subcommand(name, module.parser(), help=help_text)
    return parser


_COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (train, "train on a folder of images, or on handwritten digits"),
    "predict": (predict, "what a run sees in image files"),
    "evaluate": (evaluate, "how good a run is on a data set"),
    "report": (report, "curves, mistakes and speed of a run in one HTML file"),
    "check": (check, "look for what is wrong with a COCO data set"),
    "pack": (pack, "pack a folder of images into tar shards"),
    "index": (index, "index tar shards, or verify them"),
    "label": (label, "a run labels images that nobody has labelled"),
    "select": (select, "select pictures to train on from a teacher's labels"),
    "models": (models, "list the models"),
    "plan": (plan, "what a model costs, a stage at a time"),
    "demo": (demo, "train on handwritten digits, then predict some"),
}
