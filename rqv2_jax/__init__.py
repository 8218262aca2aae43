"""Joint training of a dense passage retriever and a cross-encoder re-ranker (RocketQAv2)."""
