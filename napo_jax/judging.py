"""A judge asked about all answers by a command of the user's: on from where it stopped, and all replies or none."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Annotated, Literal

import tyro

from napo_jax.evals.answers import read_rows
from napo_jax.evals.benchmarks import Asked

_PART = ".part"  # the end of the name of the file that replies are kept in until all are there
_EVERY = 10  # replies between two lines of progress


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
    # There is one wording of either benchmark, and neither has parts.
    part: Annotated[None, tyro.conf.Suppress] = None
    splits: Annotated[None, tyro.conf.Suppress] = None

    def __post_init__(self):
        """Checks the number of replies at a time."""
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}")


def judge(options: JudgeOptions):
    """Asks a judge about all answers, and writes its replies when all are there."""
    target = Path(options.replay)
    if target.exists():
        raise ValueError(f"{target} is there; score it, or name another file")
    part = Path(f"{target}{_PART}")
    rows, kept = read_rows(options.answers), _read_kept(part)
    ask = lambda prompt: _run(options.judge, prompt, part)
    asked = options.apply(
        options.module.ask_judge, rows, options.template, ask, options.name, kept=kept, at_once=options.at_once
    )
    done, new = [], 0
    with part.open("a") as file:
        for row in asked:
            done.append(row)
            if row not in kept:
                new += 1
                file.write(f"{json.dumps(row)}\n")
                file.flush()
                if new % _EVERY == 0:
                    print(f"{len(done)} of {len(rows)} answers judged", flush=True)
    aside = Path(f"{target}.new")
    aside.write_text("".join(f"{json.dumps(row)}\n" for row in done))
    os.replace(aside, target)
    part.unlink()
    print(f"wrote {target}: {len(done)} replies of {options.name}, {len(done) - new} of them from before")


def _read_kept(part):
    """Returns the rows that were written whole; the last may have been cut short."""
    if not part.exists():
        return []
    whole, _, cut = part.read_text().rpartition("\n")
    if cut:
        part.write_text(f"{whole}\n" if whole else "")
    return read_rows(part) if whole else []


def _run(command, prompt, part):
    """Returns what a shell command prints for a prompt."""
    done = subprocess.run(command, shell=True, input=prompt, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(
            f"the judge's command ended with {done.returncode} ({said}); "
            f"the replies so far are in {part}: give the same command again to go on"
        )
    return done.stdout.strip()
