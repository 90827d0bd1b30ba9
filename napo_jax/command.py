"""What all commands do alike: flags out of a dataclass, and one line for what is wrong."""

import contextlib
import io
import os
import re
import select
import signal
import sys

import tyro

from napo_jax.storage import find_refusal, missing_store, refusal_of

# What a user can mend. Of what the system says of a file, that which another path or another permission would change.
USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# Some come as a ValueError too, such as a collective whose other end has gone: nobody can mend that in the command.
_OF_THE_RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_LONG, _SHOWN = re.compile(r"\S{1000,}"), 100  # a word that nobody reads to its end, and what is said of it


def read_flags(kind, argv, **options):
    """Makes a dataclass of a command line by tyro; raises one line for what is wrong with it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, **options)
    except SystemExit:
        if said.getvalue():
            raise ValueError(_without_box(said.getvalue())) from None
        raise  # --help


def _without_box(text):
    """Returns the message in one of tyro's boxes, and the flags that it finds near a wrong one."""
    parts = [[]]
    for line in text.splitlines()[1:]:  # the first line is the title
        line = line.strip().strip("│|").strip()
        if not line.strip("─-╰╯+"):
            parts.append([])
        else:
            parts[-1].append(line)
    first, *more = (part for part in parts if part)
    message = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(first))
    near = [line for part in more if "meant" in part[0] for line in part if line.startswith("--")]
    return message + (f"; perhaps you meant {' or '.join(near)}" if near else "; --help lists all")


def exit_with_one_line(main):
    """Runs a command; what is wrong with its usage, config or data becomes one line and exit status 2.

    So does a path that may not be written. A disk that is full is one line too, and exit status 1: with more room the
    same command may be given again, by a person or by what starts failed runs anew.

    If whoever reads the output has gone, as `head` does, it ends without a word, and with the status of such an end.
    """
    end = None
    try:
        try:
            main()
        except SystemExit as asked:  # by --help, or by a run that was told to stop
            end = asked
        except Exception as error:
            if (said := verdict(error)) is None:
                raise
            line, status = said
            print(line, file=sys.stderr)
            end = SystemExit(status)
        sys.stdout.flush()  # here, and not when the interpreter ends and can only complain
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end = SystemExit(128 + signal.SIGPIPE)
    if end is not None:
        raise end


def verdict(error) -> tuple[str, int] | None:
    """Returns the line and the exit status that an error ends a command with; None for a fault of the program."""
    mended = isinstance(error, USER_ERRORS) and not _OF_THE_RUNTIME.match(str(error))
    # What says itself what to do is not looked behind.
    if (refusal := refusal_of(error) if mended else find_refusal(error)) is not None:
        return one_line(refusal), 1 if refusal.full else 2
    if (lack := missing_store(error)) is not None:
        return one_line(lack), 2
    return (one_line(error), 2) if mended else None


def _reader_has_gone():
    """Tells whether it is the standard output that nobody reads, and not some other pipe."""
    try:
        output = sys.stdout.fileno()
    except OSError:
        return False  # it is no file
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def one_line(error) -> str:
    """Returns what to print of an error."""
    # Names of files and columns may hold anything.
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
    return f"error: {_LONG.sub(_shortened, ''.join(escaped))}"


def _shortened(word):
    """Returns the beginning of a word, such as a path that is too long, and its length."""
    return f"{word[0][:_SHOWN]}... ({len(word[0])} characters)"
