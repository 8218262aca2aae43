"""The readers' formats as tensorflow-datasets: fetched from their publishers where that can be checked.

    import rqv2_jax.data.readers.builders
    tfds.load("passage_ranking/msmarco", split="passages")

A format with a published checksum is fetched (md5; of BEIR as ir_datasets records it, of MS MARCO as
Anserini does); the others read `manual_dir`, a folder in the layout that their reader describes.
Records are those of `prepared`. What is fetched and prepared lies in tensorflow-datasets' own folder
(TFDS_DATA_DIR, else ~/tensorflow_datasets), for all workdirs.
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import util

from rqv2_jax.data import collection, prepared
from rqv2_jax.data.readers import beir, dpr, tables, tevatron
from rqv2_jax.errors import InputError

_BEIR = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/"
_DPR = "https://dl.fbaipublicfiles.com/dpr/"
_beir = functools.partial(beir.beir, train_qrels="qrels", eval_qrels="qrels")


@dataclasses.dataclass(eq=False, kw_only=True)
class Format(tfds.core.BuilderConfig):
    """A format: its reader, and the archive to fetch or, without `md5`, what a user has to fetch."""

    read: Callable[[Path], collection.Collection]
    source: str
    md5: str = ""


FORMATS = (
    Format(
        name="msmarco",
        read=tables.msmarco,
        source="https://msmarco.z22.web.core.windows.net/msmarcoranking/collectionandqueries.tar.gz",
        md5="31644046b18952c1386cd4564ba2ae69",
    ),
    *(
        Format(name=f"beir_{name}", read=_beir, source=f"{_BEIR}{name}.zip", md5=md5)
        for name, md5 in (
            ("msmarco", "444067daf65d982533ea17ebd59501e4"),
            ("nfcorpus", "a89dba18a62ef92f7d323ec890a0d38d"),
            ("hotpotqa", "f412724f78b0d91183a0e86805e16114"),
            ("fiqa", "17918ed23cd04fb15047f73e6c3bd9d9"),
            ("fever", "5a818580227bfb4b35bb6fa46d9b6c03"),
        )
    ),
    Format(name="beir", read=_beir, source=f"a dataset with qrels/train.tsv from {_BEIR}"),
    *(
        Format(
            name=f"rocketqa_{name}",
            read=tables.rocketqa,
            source=f"https://rocketqa.bj.bcebos.com/corpus/{name}.tar.gz",
        )
        for name in ("marco", "nq")
    ),
    Format(
        name="dpr",
        read=dpr.dpr,
        source=f"{_DPR}wikipedia_split/psgs_w100.tsv.gz and, from {_DPR}data/retriever/, "
        "biencoder-nq-train.json.gz, biencoder-nq-dev.json.gz and nq-test.qa.csv",
    ),
    Format(
        name="tevatron",
        read=tevatron.tevatron,
        source="the jsonl.gz files of a dataset of https://huggingface.co/Tevatron and of its corpus",
    ),
)


class PassageRanking(prepared.Builder):
    """Passages, queries and relevance labels for passage retrieval and re-ranking."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = types.MappingProxyType(
        {
            "1.1.0": "Passages may be empty; the metadata tell what was left out.",
            "1.2.0": "Dev is held out from the training queries that have a positive.",
        }
    )
    BUILDER_CONFIGS = FORMATS
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder in the layout of the format's reader."

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        config = self.builder_config
        folder = (_fetched if config.md5 else _manual)(dl_manager, config)
        texts = config.read(folder)
        self.info.metadata["fingerprint"] = texts.fingerprint
        self.info.metadata["answer_splits"] = list(texts.answer_splits)
        # Records hold only the texts and labels that are used.
        left = collection.Left()
        collection.left_out(texts, left)
        self.info.metadata["remarks"] = [*texts.remarks, *left.lines()]
        return {
            split: self._generate_examples(functools.partial(prepared.rows, texts, split))
            for split in ("passages", *texts.splits)
        }


def _fetched(dl_manager: tfds.download.DownloadManager, config: Format) -> Path:
    archive = Path(dl_manager.download(config.source))
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    if digest != config.md5:
        raise InputError(
            f"{archive}: has md5 {digest}, but {config.source} should have {config.md5}; delete it to "
            "fetch it again"
        )
    folder = Path(dl_manager.extract(archive))
    # The zip files of BEIR hold a folder of their own name.
    inside = folder / Path(config.source).stem
    return inside if inside.is_dir() else folder


def _manual(dl_manager: tfds.download.DownloadManager, config: Format) -> Path:
    try:
        return Path(dl_manager.manual_dir)
    except AssertionError:
        raise InputError(
            f"passage_ranking/{config.name}: no files; fetch {config.source}, and put the unpacked "
            f"files into {dl_manager.download_dir / 'manual'} or give their folder as "
            "DownloadConfig(manual_dir=...)"
        ) from None


def fetched(name: str) -> collection.Collection:
    """Returns the collection of a format, fetched and prepared unless it has been."""
    builder = PassageRanking(config=name)
    try:
        prepared.prepare(builder)
    except (OSError, util.DownloadError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{builder.builder_config.source}: cannot be fetched ({reason}); fetch and unpack it by "
            "other means and give the folder as --config.data.path=DIR"
        ) from None
    metadata = builder.info.metadata
    texts = prepared.collection(
        builder,
        name=name,
        fingerprint=metadata["fingerprint"],
        answer_splits=tuple(metadata["answer_splits"]),
    )
    return dataclasses.replace(texts, remarks=tuple(metadata["remarks"]))
