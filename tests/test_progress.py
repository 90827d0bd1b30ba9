"""What is said of answers under way: rates that know nothing of compilation, after the first line."""

import io

from napo_jax.metrics import Console
from napo_jax.progress import AnswerProgress


def test_rates_are_those_since_the_last_of_compilation():
    now, said = [0.0], io.StringIO()
    progress = AnswerProgress(Console(said), 1000, clock=lambda: now[0])
    for done in range(1, 1001):
        now[0] += 60.0 if done == 1 else 0.5  # the first waits for a compilation
        progress(done, 10)
    lines = said.getvalue().splitlines()
    assert lines[0] == "1 of 1000 answers"
    assert lines[1] == "11 of 1000 answers, 2.00 answers/s, 20 tokens/s, 0:08:14 left"
    assert lines[-1] == "1000 of 1000 answers, 2.00 answers/s, 20 tokens/s, 0:00:00 left"
    assert len(lines) == 1 + 99 + 1


def test_few_seconds_tell_no_rate():
    now, said = [0.0], io.StringIO()
    progress = AnswerProgress(Console(said), 8, clock=lambda: now[0])
    for done in range(1, 9):  # all in one batch, after a compilation
        now[0] = 30.0
        progress(done, 10)
    assert said.getvalue().splitlines() == ["1 of 8 answers", "8 of 8 answers"]
