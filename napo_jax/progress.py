"""How far answers are, shown every few seconds, and the wait for those of other processes."""

import time


class AnswerProgress:
    """Shows how many answers there are, and, once that is known, how fast they come and how long the rest will take.

    Rates are those since the first line: before it there was compilation, which tells nothing of what is left.
    """

    def __init__(self, console, total, seconds=5.0, clock=time.monotonic):
        """Takes the `Console`, the answers that are to be said, the seconds between two lines, and a clock."""
        self._console, self._total, self._seconds, self._clock = console, total, seconds, clock
        self._last, self._first, self._tokens = clock(), None, 0

    def __call__(self, done, tokens):
        """Takes how many there are now, and the tokens of the last one."""
        now = self._clock()
        self._tokens += tokens
        if now - self._last < self._seconds and done < self._total:
            return
        line = f"{done} of {self._total} answers"
        if self._first is None:
            self._first, self._tokens = (now, done), 0
        elif (seconds := now - self._first[0]) >= self._seconds:
            answers = done - self._first[1]
            left = round((self._total - done) * seconds / answers)
            line += f", {answers / seconds:.2f} answers/s, {self._tokens / seconds:.0f} tokens/s"
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        self._console.progress(line)
        self._last = now


def wait_until(done, check=lambda: None, seconds=2.0):
    """Waits until something is so, as other processes make it.

    Args:
      done: () -> whether it is.
      check: called between two looks; raises to end the wait.
      seconds: between two looks.
    """
    while not done():
        check()
        time.sleep(seconds)
