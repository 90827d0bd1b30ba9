"""How far answers are, shown every few seconds, and the wait for those of other processes."""

import time


class AnswerProgress:
    """Shows how many answers there are, how fast they come and how long the rest will take."""

    def __init__(self, console, total, seconds=5.0):
        """Takes the `Console`, the answers that are to be said, and the seconds between two lines."""
        self._console, self._total, self._seconds = console, total, seconds
        self._start = self._last = time.monotonic()
        self._tokens = 0

    def __call__(self, done, tokens):
        """Takes how many there are now, and the tokens of the last one."""
        now = time.monotonic()
        self._tokens += tokens
        if now - self._last < self._seconds and done < self._total:
            return
        self._last, seconds = now, now - self._start
        left = round((self._total - done) * seconds / done)
        self._console.progress(
            f"{done} of {self._total} answers, {done / seconds:.2f} answers/s, "
            f"{self._tokens / seconds:.0f} tokens/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )


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
