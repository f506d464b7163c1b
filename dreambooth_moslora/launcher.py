"""Start a program, or say in one line why this Python cannot run it.

Old Pythons read this file, so it has their syntax and imports the standard library alone.
"""

import sys

MIN_VERSION = (3, 11)


def start(load):
    """Run the program that `load` imports, and return its exit code: 2 if Python is too old or
    packages are missing, 130 for Ctrl-C, also during the imports."""
    if sys.version_info < MIN_VERSION:
        version = ".".join(map(str, sys.version_info[:3]))
        return refuse("Python {}.{} or newer is needed; this is {}".format(*MIN_VERSION, version))
    try:
        try:
            run = load()
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package == __name__.partition(".")[0]:
                raise
            problem = f"the packages are not installed in {sys.executable}, which lacks {package}"
            return refuse(problem)
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def refuse(problem):
    """Print why the program cannot start, and how to mend it; return the exit code."""
    advice = "activate the environment, or run pip install -r requirements.txt"
    print(f"error: {problem}: {advice}", file=sys.stderr)
    return 2
