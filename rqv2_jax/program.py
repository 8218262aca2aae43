"""The start and the failure of every command: one line on standard error, a non-zero exit."""

import contextlib
import errno
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from rqv2_jax import stopping
from rqv2_jax.errors import InputError

# Says whether Linux gives large pages to all memory, to that for which they are asked, or to none.
LARGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

# A flag that is defined here belongs to the program that asked for it, and to its --help.
flags.disclaim_key_flags()


class _ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """The parser of --config, which takes names of shipped files too."""

    def parse(self, path: str) -> Any:
        """Returns the config of `FILE[:preset]`."""
        name, colon, preset = path.partition(":")
        return super().parse(f"{config_file(name)}{colon}{preset}")


def config_file(name: str) -> str:
    """Returns where a config file lies: `name` itself, or the shipped file of that name.

    A shipped file is named as `nq.py` or `configs/nq.py`. A file that the user has comes first.
    """
    # Inside the package where it is installed, beside it in a clone.
    folder = pathlib.Path(__file__).with_name("configs")
    folder = folder if folder.is_dir() else folder.parent.with_name("configs")
    shipped = folder / name.removeprefix("configs/")
    return str(shipped) if not os.path.exists(name) and shipped.is_file() else name


def define_config(
    help_text: str = "Config file, as configs/nq.py[:preset]: yours, or one that is shipped.",
) -> flags.FlagHolder:
    """Defines --config, and --config.group.key=value for its settings; exits 2 on a bad flag file."""
    try:
        holder = config_flags.DEFINE_config_file("config", None, help_text)
    except flags.Error as e:
        _fail(e, 2)
    flags.FLAGS["config"].parser = _ConfigParser("config")
    return holder


def define_workdir(help_text: str = "A workdir that rqv2_jax.main has finished.") -> None:
    """Defines --workdir, and --data, --weights and --reranker_weights for what has moved."""
    flags.DEFINE_string("workdir", None, help_text)
    flags.DEFINE_string("data", "", "The data's new place, if they have moved since.")
    flags.DEFINE_string("weights", "", "The weights' new place, if they have moved since.")
    flags.DEFINE_string("reranker_weights", "", "That of the re-ranker's, if they are others.")


def define_force() -> flags.FlagHolder:
    """Defines --force."""
    return flags.DEFINE_bool("force", False, "Go on where disk or memory look too small.")


def open_run() -> Any:
    """Opens the `Run` of `define_workdir`'s flags, in which others may work meanwhile."""
    from rqv2_jax.recipe.claim import open_workdir

    moved = {name: getattr(flags.FLAGS, name) for name in ("data", "weights", "reranker_weights")}
    return open_workdir(pathlib.Path(flags.FLAGS.workdir), **moved)


@contextlib.contextmanager
def opened(reads: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """Gives the `Run` of `define_workdir`'s flags, and keeps other processes out of it.

    But for those that only read it, if `reads(run)` says that this one does so too.
    """
    from rqv2_jax.recipe.workdir import alone

    run = open_run()
    with alone(run.workdir, reads=reads(run)):
        yield run


def run(
    main: Callable[..., None],
    doc: str,
    required: tuple[str, ...] = (),
    arguments: int = 0,
    one_of: tuple[str, ...] = (),
) -> None:
    """Parses the flags and runs `main`.

    Exits 2 on bad flags, 1 on an InputError and on a full disk, 130 on Ctrl-C, `stopping.AGAIN` on
    SIGTERM. --help prints `doc`. All of the `required` flags must be given, and exactly one of
    `one_of`. `main` gets the arguments beside the flags, `arguments` at most.
    """
    _with_large_pages()
    # TensorFlow's greeting would bury what the program has to say.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not sys.stderr.isatty():
        # In a file every update of a progress bar is a line.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    logging.set_verbosity(logging.WARNING)
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(f"{doc.strip()}\n\nFlags:{flags.FLAGS.main_module_help()}")
        return
    try:
        rest = _parse(required, arguments, one_of)
    except AttributeError as e:
        # ml_collections wraps the KeyError of a key that the config file does not have.
        key = " ".join(str(getattr(x, "args", [x])[0]) for x in e.args)
        _fail(f"--config has no such setting: {key}", 2)
    except (flags.Error, InputError, OSError, TypeError, ValueError) as e:
        _fail(_from_config_file(e), 2)
    stopping.install()
    try:
        main(*rest)
    except InputError as e:
        _fail(e, 1)
    except stopping.Terminated:
        print("\nterminated; the same command resumes", file=sys.stderr)
        sys.exit(stopping.AGAIN)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        # Orbax gives the system's message in a ValueError.
        if os.strerror(errno.ENOSPC) not in str(e):
            raise
        try:
            _say(f"the disk is full ({e}); free some of it, then give the same command again")
            sys.stdout.flush()
        finally:
            # Orbax's threads would go on to fail while Python shuts down, by hundreds of lines.
            # Nor can what is printed be written, where it goes to a file on that disk.
            os._exit(1)


def _with_large_pages() -> None:
    """Starts this process anew with a C library that asks for large pages, where it has to ask.

    XLA allocates the arrays of each step anew; a fault for every 4 KiB of them is a fifth of a step on
    a CPU. The library (glibc from 2.35 on) reads its environment once, before Python runs.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in asked or not LARGE_PAGES.exists():
        return
    if "[madvise]" in LARGE_PAGES.read_text():
        tunables = ":".join(filter(None, (asked, "glibc.malloc.hugetlb=1")))
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": tunables})


def _parse(required: tuple[str, ...], arguments: int, one_of: tuple[str, ...]) -> list[str]:
    rest = flags.FLAGS(sys.argv)[1:]
    if len(rest) > arguments:
        raise InputError(f"unexpected argument {rest[arguments]!r}; --help shows an example")
    values = {name: getattr(flags.FLAGS, name) for name in (*required, *one_of)}
    for name, value in values.items():
        # A config that could not be loaded raises OSError when it is first looked into.
        getattr(value, "keys", None)
        if value is None and name in required:
            raise InputError(f"--{name} is missing; --help shows an example")
    if one_of and sum(values[name] is not None for name in one_of) != 1:
        names = " and ".join(f"--{name}" for name in one_of)
        raise InputError(f"give exactly one of {names}; --help shows an example")
    return rest


def file_to_write(flag: str) -> pathlib.Path | None:
    """Returns the file that a flag names, None if it names none; raises InputError on a folder."""
    given = getattr(flags.FLAGS, flag)
    if not given:
        return None
    path = pathlib.Path(given)
    if not path.parent.is_dir():
        raise InputError(f"--{flag} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise InputError(f"--{flag} {path}: is a folder; name a file")
    return path


def _from_config_file(error: Exception) -> Exception | str:
    """Returns a config file's own error, with its line, for a flag error that holds a traceback."""
    inner: BaseException | None = error if "Traceback" in str(error) else None
    while inner is not None:
        # What the file calls may have raised it; the mend is in the file.
        frames = traceback.extract_tb(inner.__traceback__)
        own = [frame for frame in frames if frame.name in ("get_config", "<module>")]
        if own:
            return f"{own[-1].filename}, line {own[-1].lineno}: {inner}"
        inner = inner.__context__
    return error


def _fail(error: Exception | str, code: int) -> NoReturn:
    _say(error)
    sys.exit(code)


def _say(error: Exception | str) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
