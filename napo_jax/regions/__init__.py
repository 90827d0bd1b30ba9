"""Where in a picture an answer points: the phrases of the answer that name things, and which of them matter most."""
