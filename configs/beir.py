"""Any folder in BEIR layout: joint training from all-MiniLM-L6-v2, sized for two CPU cores.

Aims at: a retriever and a re-ranker for your own collection, without a download.
Command:
  python -m rqv2_jax.main --config configs/beir.py --workdir DIR --config.data.path=FOLDER
The folder holds corpus.jsonl, queries.jsonl (or queries.<split>.jsonl) and qrels/{train,dev,test}.tsv,
each gzipped or not. Labels to train on and to measure by may lie in folders of their own:
  --config.data.train_qrels=qrels_sparse --config.data.eval_qrels=qrels_full
Times and scores: the README's tables.
"""

