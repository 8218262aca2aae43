"""Writes a folder in BEIR layout from a file of questions with their answers.

The file is CSV, TSV, JSON lines (each may be gzipped) or Parquet, and its columns are named. Rows
without a question or an answer are left out; equal texts (but for case and white space) become one. The
questions are split into train, dev and test so that no passage and no question is in two of them. What
was left out and merged is counted, and the commands to run next are printed.

Examples:
  python -m rqv2_jax.convert --from questions.csv --query question --passage answer --to questions
  python -m rqv2_jax.convert --from faq.jsonl.gz --query q --passage a --title page \\
      --corpus pages.jsonl.gz --splits 70/10/20 --to faq
"""

import pathlib

from absl import flags

from rqv2_jax import disk, program
from rqv2_jax.errors import InputError

flags.DEFINE_string("from", None, "File with a question, and a passage that answers it, in a row.")
flags.DEFINE_string("query", None, "Name of the column of questions.")
flags.DEFINE_string("passage", None, "Name of the column of passages, or answers.")
flags.DEFINE_string("to", None, "The new folder.")
flags.DEFINE_string("title", None, "Name of the column of the passages' titles.")
flags.DEFINE_string("query_id", None, "Name of the column of the questions' ids, else numbers.")
flags.DEFINE_string("passage_id", None, "Name of the column of the passages' ids, else numbers.")
flags.DEFINE_string(
    "corpus", None, "File with further passages, without questions, in columns of the same names."
)
_SPLITS = flags.DEFINE_string("splits", "80/10/10", "Shares of the questions: train/dev/test.")
_SEED = flags.DEFINE_integer("seed", 0, "Another number gives other splits.")


def main() -> None:
    """Converts, and prints the counts and the commands to run next."""
    from rqv2_jax.tools import conversion

    given, folder = flags.FLAGS, pathlib.Path(flags.FLAGS.to)
    columns = conversion.Columns(*(getattr(given, name) for name in conversion.Columns._fields))
    file, corpus = getattr(given, "from"), given.corpus
    shares = conversion.shares_of(_SPLITS.value)
    if columns.query == columns.passage:
        raise InputError(f"--query and --passage both name {columns.query!r}; name two columns")
    # Reading may take long.
    disk.check_new(folder)
    files = pathlib.Path(file), pathlib.Path(corpus) if corpus else None
    made = conversion.convert(*files, columns, shares, _SEED.value)
    conversion.write(made, folder)
    print(conversion.render(made), conversion.next_steps(made, folder), sep="\n\n")


if __name__ == "__main__":
    program.run(main, __doc__, required=("from", "query", "passage", "to"))
