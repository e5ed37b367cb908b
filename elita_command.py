"""The installed command `elita`: `elita_tf.runs.commands`, without TensorFlow's messages.

It is a module beside the package, as importing the package already loads TensorFlow.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def main(arguments: list[str] | None = None) -> int:
    """Runs `elita` with these arguments, by default those of the command line.

    `--verbose`, anywhere among them, shows all that TensorFlow says.

    Returns:
        The exit status.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if "--verbose" in given:
        from elita_tf.runs import commands
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with _held_back_errors():
            from elita_tf.runs import commands
        # What TensorFlow says of the names in a SavedModel, for instance.
        for logger in ("absl", "tensorflow"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    return commands.main([argument for argument in given if argument != "--verbose"])


@contextmanager
def _held_back_errors() -> Iterator[None]:
    """Holds back what is written to the error stream, by C++ too, and shows it after an error."""
    sys.stderr.flush()
    stream = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(stream, held_back.read())
            raise
        finally:
            os.dup2(stream, 2)
            os.close(stream)


if __name__ == "__main__":
    sys.exit(main())
