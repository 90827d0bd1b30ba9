"""A judge, which is a command of the user's, asked about all answers: no reply is paid for twice."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import threading
from typing import Annotated, Literal

import tyro
from etils import epath

from napo_jax.evals.answers import misfit, parse_json, read_rows
from napo_jax.evals.benchmarks import Asked
from napo_jax.journal import StoppedError
from napo_jax.pieces import make_room, write_durably

_PART = ".part"  # the end of the name of the file that replies are kept in until all are there
_LINE = {"asked": str, "judge": str, "reply": str}  # of that file
_EVERY = 10  # replies between two lines of progress
_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions(Asked):
    """Asks a judge about all answers, and keeps its replies for `score --replay`. Goes on where it was."""

    # Whose questions.
    benchmark: Literal["chair", "mmhal"]
    # The answers, as for `score`.
    answers: str
    # A text file with the judge's prompt: see docs/evaluation.md for the places it is to have.
    template: str
    # A shell command that reads one prompt on its standard input and prints the reply.
    judge: str
    # The judge's name with its version, as gpt-4-0613: part of the result.
    name: str
    # The file of replies to write, on this machine.
    replay: str
    # How many replies are waited for at a time.
    at_once: int = 1
    # How often CHAIR's judge is asked for a reply that can be read.
    tries: int | None = None
    # There is one wording of either benchmark, and neither has parts.
    part: Annotated[None, tyro.conf.Suppress] = None
    splits: Annotated[None, tyro.conf.Suppress] = None

    def __post_init__(self):
        """Checks the numbers."""
        for name in ("at_once", "tries"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if "://" in self.replay:
            raise ValueError(f"replay must be a file of this machine, got {self.replay}")


def judge(options: JudgeOptions):
    """Asks a judge about all answers, and writes its replies when all are there."""
    target = epath.Path(options.replay)
    if target.exists():
        raise ValueError(f"{target} is there; score it, or name another file")
    make_room(target)
    rows = read_rows(options.answers)
    more = {"at_once": options.at_once, "tries": options.tries}
    with _asked_to_stop() as stop, open(f"{target}{_PART}", "a+", encoding="utf-8") as kept:
        replies = _Replies(kept, options, len(rows), stop)
        try:
            found = list(options.apply(options.module.ask_judge, rows, options.template, replies, options.name, **more))
        except (ValueError, StoppedError) as error:
            if not os.path.getsize(kept.name):
                os.unlink(kept.name)
                raise
            go_on = f"{error}; the replies so far are in {kept.name}: give the same command again to go on"
            raise (ValueError(go_on) if isinstance(error, ValueError) else StoppedError(go_on, error.status)) from None
        write_durably(target, "".join(f"{json.dumps(row)}\n" for row in found))
        os.unlink(kept.name)
    print(f"wrote {target}: {len(found)} replies of {options.name}, {replies.remembered} of them from before")


class _Replies:
    """A judge that asks the user's command, and writes down what it says before anyone uses it.

    Attributes:
      remembered: replies that were there from before and have been used.
    """

    def __init__(self, file, options, count, stop):
        """Takes an open file, whose replies of the same judge count, the options, the answers and an Event to end."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another command is at work on {file.name}; wait for its end") from None
        self._file, self._options, self._count, self._stop = file, options, count, stop
        self._lock, self._new, self.remembered = threading.Lock(), 0, 0
        whole, newline, cut = epath.Path(file.name).read_bytes().rpartition(b"\n")
        if cut:  # the process was killed while it wrote
            file.truncate(len(whole + newline))
        lines = [_read_line(line, file.name, number) for number, line in enumerate(whole.split(b"\n"), 1) if line]
        self._known = {line["asked"]: line["reply"] for line in lines if line["judge"] == options.name}

    def __call__(self, prompt) -> str:
        """Returns the reply to a prompt; one from before only once, for who asks again could not read it."""
        asked = hashlib.sha256(prompt.encode()).hexdigest()
        with self._lock:
            if asked in self._known:
                self.remembered += 1
                return self._known.pop(asked)
        if self._stop.is_set():
            raise StoppedError("asked to stop", _INTERRUPTED)
        reply = _run(self._options.judge, prompt)
        with self._lock:
            self._file.write(json.dumps({"asked": asked, "judge": self._options.name, "reply": reply}) + "\n")
            self._file.flush()
            self._new += 1
            if self._new % _EVERY == 0:
                print(f"{self._new + self.remembered} of {self._count} answers judged", flush=True)
        return reply


def _read_line(line, file, number):
    """Reads what was replied before."""
    try:
        row = parse_json(line)
        wrong = misfit(row, _LINE)
    except ValueError as error:
        wrong = f"is not JSON ({error})"
    if wrong:
        raise ValueError(f"{file}, line {number}, {wrong}; take the line out, and its answer is judged again")
    return row


def _run(command, prompt) -> str:
    """Returns what a shell command prints for a prompt."""
    # In a session of its own, Ctrl-C does not reach it: a reply on its way is waited for.
    how = {"shell": True, "encoding": "utf-8", "errors": "replace", "start_new_session": True}
    done = subprocess.run(command, input=prompt, capture_output=True, **how)
    reply = done.stdout.strip()
    if done.returncode or not reply:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        what = f"ended with {done.returncode}" if done.returncode else "printed no reply"
        raise ValueError(f"the judge's command {what} ({said})")
    return reply


@contextlib.contextmanager
def _asked_to_stop():
    """Yields an Event that the first SIGINT or SIGTERM sets; a second one ends the process as it always does."""
    stop, before = threading.Event(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hear(number, _):
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, hear)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
