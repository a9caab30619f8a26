"""Every error a user can cause, and the exit code the commands answer it with.

Exit codes: 0 done · 2 usage, recipe, data or output · 3 source missing, damaged, unsupported or offline ·
4 a quality gate failed · 1 anything unexpected · 130 interrupted · 143 terminated.
"""


class SQAError(Exception):
    """A fault the user can mend. The message says what was given, what is allowed and which flag; where it comes out of
    a public function, which argument."""

    exit_code = 1


class RecipeError(SQAError, ValueError):
    """A flag or a recipe asks for something that is not possible."""

    exit_code = 2


class OutputError(SQAError, OSError):
    """The output cannot be written where it was asked for."""

    exit_code = 2


class DataError(SQAError, ValueError):
    """The text to evaluate or train on is missing, empty or does not fit the model."""

    exit_code = 2


class UnreadableTextError(DataError):
    """The model's tokenizer knows next to nothing of the text."""


class CheckpointError(SQAError, OSError):
    """The source checkpoint is missing, damaged or not reachable."""

    exit_code = 3


class UnsupportedModelError(SQAError, ValueError):
    """The source is sound, but of an architecture that cannot be converted."""

    exit_code = 3


class InterruptedByUserError(SQAError):
    """The user stopped the work at a point where something worth having was already there."""

    exit_code = 130


class QualityError(SQAError):
    """The result was written, but a quality gate failed."""

    exit_code = 4


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, as one line of at most `limit` characters, none of which steers a terminal."""
    text = " ".join(str(error).split())[:limit]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__


def shown(value: object, limit: int = 100) -> str:
    """What a source's file holds, fit for one line: as Python writes it where it is no plain text, and cut."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
